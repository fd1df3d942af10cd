"""The project's vhost-user back-end with a played machine on it and no stack: the test holds the link in its hands.

    bench = Bench(features=FULL)
    bench.nic.send(frame); assert bench.take() == [frame]
    bench.give(frame); assert bench.nic.receive()[0].frame == frame

Everything happens in this thread, when it is asked for.
"""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Any, Literal

from netstack.errors import LinkDown
from netstack.link.vhost_user.link import VhostUserLink
from netstack.link.vhost_user.server import VhostUserPeer
from netstack.observe.metrics import Counters
from tests.support.guest_memory import GuestMemory
from tests.support.vhost_front import FrontEnd
from tests.support.virtio_net import FULL, NO_OFFLOAD, Header
from tests.support.virtio_nic import Nic

_recvmsg: Any = ctypes.CDLL(None, use_errno=True).recvmsg
_recvmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_recvmsg.restype = ctypes.c_ssize_t
ROUNDS = 1000
HEADERS = 54
"""Octets that the stack has in the first piece of a frame."""


def open_descriptors() -> dict[int, str]:
    """What this process has open."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # of the directory itself
            continue
    return found


def count_descriptors() -> int:
    """How many; faster than `open_descriptors`."""
    return len(os.listdir("/proc/self/fd")) - 1


class Source:
    """Octets for a frame's payload, as `netstack.host.octets` has them; `native`: in a socket."""

    def __init__(self, octets: bytes, native: bool) -> None:
        self._octets = octets
        self._pair = socket.socketpair() if native else None
        if self._pair is not None:
            self._pair[0].setblocking(False)
            self._pair[1].setblocking(False)
            assert self._pair[0].send(octets) == len(octets)

    def read_scattered(self, offset: int, into: list[memoryview]) -> int:
        at = offset
        for view in into:
            part = self._octets[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return at - offset

    def read_message(self, offset: int, message: int) -> int:
        assert not offset and self._pair is not None
        count: int = _recvmsg(self._pair[1].fileno(), message, 0)
        assert count >= 0, os.strerror(ctypes.get_errno())
        return count

    def close(self) -> None:
        if self._pair is not None:
            self._pair[0].close()
            self._pair[1].close()


class Bench:
    """See the module. `spread` is that of the guest's memory, `options` are the `Nic`'s."""

    def __init__(
        self,
        features: int = FULL,
        *,
        mtu: int = 1500,
        memory: GuestMemory | None = None,
        spread: bool = True,
        start: bool = True,
        offload: bool = True,
        **options: Any,
    ) -> None:
        self.mtu = mtu
        self.offload = offload
        self.counters = Counters()
        self.memory = memory or GuestMemory(spread=spread)
        self.link: VhostUserLink | None = None
        self.appeared = 0
        self.reasons: list[str] = []
        """Why links went, in order."""
        self.closed: list[str] = []
        """Why connections ended."""
        self.peer: VhostUserPeer
        options.setdefault("buffers", 64)
        self.nic = Nic(self.connect(), self.memory, features=features, mtu=mtu, **options)
        if start:
            self.nic.start()

    def connect(self) -> FrontEnd:
        """A new connection to a new back-end."""
        ours, theirs = socket.socketpair()
        self.peer = VhostUserPeer(
            theirs,
            "vhost-user:bench",
            self.mtu,
            appeared=self._appeared,
            gone=self._gone,
            closed=self.closed.append,
            counters=self.counters,
            offload=self.offload,
        )
        return FrontEnd(ours, self.peer.readable)

    def reconnect(self, like: Literal["qemu", "cloud-hypervisor"] = "qemu") -> None:
        """The connection ends, and the hypervisor makes a new one to a back-end that knows nothing."""
        self.nic.front.close()
        self.peer.readable()
        assert not self.peer.open and self.link is None
        self.nic.reconnect(self.connect(), like)

    def _appeared(self, link: VhostUserLink) -> None:
        assert self.link is None, "a second link of one device"
        self.appeared += 1
        self.link = link

    def _gone(self, link: VhostUserLink, reason: str) -> None:
        assert link is self.link, "a link went that was not there"
        self.reasons.append(reason)
        self.link = None
        link.close()

    def _lost(self, link: VhostUserLink, error: LinkDown) -> None:
        """As the stack does with a link that raises `LinkDown`."""
        self.reasons.append(str(error))
        self.link = None
        link.close()

    @property
    def drops(self) -> int:
        return self.counters.drops.total()

    # what the stack does with a link

    def take(self) -> list[bytes]:
        """Frames of the guest, without headers, until none waits or the link is down."""
        return [frame for _header, frame in self.take_with_headers()]

    def take_with_headers(self) -> list[tuple[Header, bytes]]:
        found: list[tuple[Header, bytes]] = []
        for _ in range(ROUNDS):
            link = self.link
            if link is None:
                return found
            try:
                frames = [bytes(view) for view in link.receive()]
            except LinkDown as error:
                self._lost(link, error)
                return found
            link.publish()
            if not frames and not link.busy:
                return found
            head = link.headroom
            found += [(Header.unpack(frame[:head]), frame[head:]) for frame in frames]
        raise AssertionError("frames without an end")

    def give(self, *frames: bytes, header: Header = NO_OFFLOAD, one: bool = False, publish: bool = True) -> int:
        """Frames to the guest, as pieces or (`one`) each in one; how many the link took."""
        link = self.link
        assert link is not None, f"no link: {self.reasons}"
        head = header.pack(10) + b"\1\0"[: link.headroom - 10]
        taken = 0
        try:
            if one:
                for frame in frames:
                    if not link.send_one(memoryview(head + frame)):
                        break
                    taken += 1
            else:
                taken = link.send([(head + frame[:HEADERS], memoryview(frame)[HEADERS:]) for frame in frames])
        except LinkDown as error:
            self._lost(link, error)
            return taken
        if publish:
            link.publish()
        return taken

    def give_by_room(
        self, frame: bytes, header: Header = NO_OFFLOAD, *, spare: int = 0, native: bool = False, publish: bool = True
    ) -> bool:
        """A frame made in the guest's own buffers, of which `spare` octets more were asked for; whether there was room for it.

        The octets behind its headers are read in, from memory or (`native`) from a socket.
        """
        link = self.link
        assert link is not None, f"no link: {self.reasons}"
        octets = header.pack(10) + b"\1\0"[: link.headroom - 10] + frame
        lead = min(link.headroom + HEADERS, len(octets) - 1)
        source = Source(octets[lead:], native)
        try:
            room = link.room(len(octets) + spare, lead, bytes(12), native)
            if room is None:
                return False
            assert lead < room.octets <= len(octets) + spare
            count = room.read(source, 0)
            if count != len(octets) - lead:
                assert count == room.octets - lead, f"{count} octets read into {room.octets}"
                return False
            if room.buffer is None:
                room.write(memoryview(octets)[:lead])
            else:
                room.buffer[room.at : room.at + lead] = octets[:lead]
            room.sent(len(octets))
        except LinkDown as error:
            self._lost(link, error)
            return False
        finally:
            source.close()
        if publish:
            link.publish()
        return True

    def close(self) -> None:
        """The hypervisor ends, and then the back-end."""
        self.nic.close()
        self.peer.readable()
        self.peer.close()
        if self.link is not None:
            self.link.close()
            self.link = None
