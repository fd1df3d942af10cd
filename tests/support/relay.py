"""A guest's network card as a process: a TAP device on one side, a link of pyvpnkit on the other, faults between.

    relay.py LINK [--mtu N] [--mac MAC] [--uuid UUID] [--loss P] [--dup P] [--reorder P] [--corrupt P] [--seed N]

LINK is `qemu:PATH`, `vmnet:PATH`, `unixgram:PATH` or `fd:N` (a connected stream socket with QEMU's framing). Makes eth0 in
the network namespace it runs in, as a TAP without offloads: the kernel segments and fills in checksums. Prints `ready MAC`
when frames can flow, and its counters as JSON when it is told to end (SIGTERM). Imports nothing of the project: its
framings are written from vpnkit.md 2.2 and QEMU's and vfkit's documentation.

Faults (each a probability per frame and direction) fall on IPv4 frames only: nothing protects ARP against a wrong bit, and
a guest that believes in a wrong MAC address shows nothing of ours. One bit is wrong at most, from octet 14 on: the Internet
checksum finds that always, so streams must arrive unhurt. A frame out of order comes 1 to 5 ms late.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from typing import Any

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_SIOCGIFHWADDR = 0x8927
_BATCH = 64
_HELD = 1 << 20
"""Octets that wait for a stream's reader before the TAP is left alone."""


class StreamPeer:
    def __init__(self, sock: socket.socket, length: struct.Struct) -> None:
        self.sock, self._length = sock, length
        self._in, self._out = bytearray(), bytearray()
        sock.setblocking(False)

    @property
    def full(self) -> bool:
        return len(self._out) > _HELD

    def send(self, frame: bytes) -> None:
        self._out += self._length.pack(len(frame)) + frame

    def flush(self) -> bool:
        """Whether everything went."""
        with contextlib.suppress(BlockingIOError):
            while self._out:
                del self._out[: self.sock.send(self._out)]
        return not self._out

    def receive(self) -> list[bytes]:
        octets = self.sock.recv(1 << 18)
        if not octets:
            raise EOFError
        self._in += octets
        frames, at, head = [], 0, self._length.size
        while len(self._in) - at >= head:
            (length,) = self._length.unpack_from(self._in, at)
            if len(self._in) - at - head < length:
                break
            frames.append(bytes(self._in[at + head : at + head + length]))
            at += head + length
        del self._in[:at]
        return frames


class DatagramPeer:
    full = False

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._own = f"{path}.{os.getpid()}"
        self.sock.bind(self._own)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.sock.setsockopt(socket.SOL_SOCKET, option, 1 << 21)
        self.sock.connect(path)
        self.sock.send(b"VFKT")
        self.sock.setblocking(False)

    def send(self, frame: bytes) -> None:
        with contextlib.suppress(BlockingIOError):  # as a virtual machine monitor: no room, no frame
            self.sock.send(frame)

    def flush(self) -> bool:
        return True

    def receive(self) -> list[bytes]:
        frames = []
        with contextlib.suppress(BlockingIOError):
            while len(frames) < _BATCH:
                frames.append(self.sock.recv(1 << 16))
        return frames

    def close(self) -> None:
        os.unlink(self._own)


def vmnet(path: str, identity: str) -> tuple[StreamPeer, str]:
    """The link after its handshake, and the MAC address that it gave us."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(b"VMN3T" + struct.pack("<I", 22) + b"0" * 40 + b"\x01" + identity.encode() + bytes(4))
    answer = b""
    while len(answer) < 49 + 258:
        octets = sock.recv(49 + 258 - len(answer))
        if not octets:
            raise EOFError("handshake")
        answer += octets
    assert answer[:9] == b"VMN3T" + struct.pack("<I", 22), answer[:9]
    assert answer[49] == 1, answer[49:]
    return StreamPeer(sock, struct.Struct("<H")), answer[54:60].hex(":")


def open_tap(name: str, mac: str, mtu: int) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    words = ["ip", "link", "set", name, "mtu", str(mtu), *(["address", mac] if mac else []), "up"]
    subprocess.run(words, check=True)
    return tap


class Line:
    """One direction: frames go in, and come out as the faults would have it."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self._loss, self._dup = options.loss, options.dup
        self._reorder, self._corrupt = options.reorder, options.corrupt
        self._clean = not (self._loss or self._dup or self._reorder or self._corrupt)
        self._chance = random.Random(seed)
        self._late: list[tuple[float, int, bytes]] = []
        self._number = 0
        self.counts = dict.fromkeys(("frames", "lost", "doubled", "late", "corrupted"), 0)

    def put(self, frame: bytes, now: float) -> list[bytes]:
        """What leaves at once."""
        self.counts["frames"] += 1
        if self._clean or frame[12:14] != b"\x08\x00":
            return [frame]
        chance = self._chance
        if chance.random() < self._loss:
            self.counts["lost"] += 1
            return []
        if chance.random() < self._corrupt:
            self.counts["corrupted"] += 1
            bit = chance.randrange(14 * 8, len(frame) * 8)
            wrong = bytearray(frame)
            wrong[bit >> 3] ^= 1 << (bit & 7)
            frame = bytes(wrong)
        if chance.random() < self._reorder:
            self.counts["late"] += 1
            self._number += 1
            heapq.heappush(self._late, (now + chance.uniform(0.001, 0.005), self._number, frame))
            return []
        if chance.random() < self._dup:
            self.counts["doubled"] += 1
            return [frame, frame]
        return [frame]

    def due(self, now: float) -> list[bytes]:
        frames = []
        while self._late and self._late[0][0] <= now:
            frames.append(heapq.heappop(self._late)[2])
        return frames

    @property
    def next(self) -> float | None:
        return self._late[0][0] if self._late else None


def relay(tap: int, peer: Any, to_host: Line, to_guest: Line) -> None:
    """Until the link ends or `SystemExit` comes by signal."""
    poller = select.poll()
    poller.register(peer.sock, select.POLLIN)
    poller.register(tap, select.POLLIN)
    wanted = (select.POLLIN, select.POLLIN)
    while True:
        now = time.monotonic()
        for frame in to_host.due(now):
            peer.send(frame)
        for frame in to_guest.due(now):
            write(tap, frame)
        flushed = peer.flush()
        want = (0 if peer.full else select.POLLIN, select.POLLIN | (0 if flushed else select.POLLOUT))
        if want != wanted:
            poller.modify(tap, want[0])
            poller.modify(peer.sock, want[1])
            wanted = want
        times = [line.next for line in (to_host, to_guest) if line.next is not None]
        ready = dict(poller.poll(max(0.0, min(times) - now) * 1000 + 0.5 if times else None))
        now = time.monotonic()
        if ready.get(tap, 0) & select.POLLIN:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_BATCH):
                    for frame in to_host.put(os.read(tap, 1 << 16), now):
                        peer.send(frame)
        if ready.get(peer.sock.fileno(), 0) & (select.POLLIN | select.POLLHUP):
            for received in peer.receive():
                for frame in to_guest.put(received, now):
                    write(tap, frame)


def write(tap: int, frame: bytes) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(tap, frame)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("link")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--mac", default="")
    parser.add_argument("--uuid", default=str(uuid.uuid4()))
    for fault in ("loss", "dup", "reorder", "corrupt"):
        parser.add_argument(f"--{fault}", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    kind, _, where = options.link.partition(":")
    mac, peer = options.mac, None
    if kind == "qemu":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(where)
        peer = StreamPeer(sock, struct.Struct(">I"))
    elif kind == "fd":
        peer = StreamPeer(socket.socket(fileno=int(where)), struct.Struct(">I"))
    elif kind == "vmnet":
        peer, mac = vmnet(where, options.uuid)
    else:
        peer = DatagramPeer(where)
    tap = open_tap("eth0", mac, options.mtu)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # not from /sys, which shows another namespace
        request = fcntl.ioctl(control, _SIOCGIFHWADDR, struct.pack("40s", b"eth0"))
        mac = request[18:24].hex(":")
    to_host, to_guest = Line(options, options.seed), Line(options, options.seed + 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"ready {mac}", flush=True)
    try:
        relay(tap, peer, to_host, to_guest)
    except (EOFError, ConnectionError):
        pass
    finally:
        if isinstance(peer, DatagramPeer):
            peer.close()
        print(json.dumps({"to_host": to_host.counts, "to_guest": to_guest.counts}), flush=True)


if __name__ == "__main__":
    main()
