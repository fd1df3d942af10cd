"""AF_PACKET on one end of a veth pair, with virtio-net header: TAP's speed where /dev/net/tun may not be opened. HOT PATH,
Linux only.

The other end of the pair is the guest's interface. `PACKET_VNET_HDR` gives super-frames and partial checksums both ways, as
on a TAP. It works for an ordinary user in a user namespace of its own (`pyvpnkit shell`), which is why it exists.

The kernel bounds what waits for us by the socket's receive buffer and drops the rest, so `window` tells TCP how much to let
a guest send ahead: without the privilege to enlarge the buffer that is a few super-frames.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from typing import Final

from netstack.api import Frame
from netstack.errors import ConfigError, LinkDown
from netstack.link.common import super_frame_payload
from netstack.link.namespace import open_inside
from netstack.link.tap import VNET_HEADER

_SOL_PACKET: Final = 263
_PACKET_VNET_HDR: Final = 15
_PACKET_IGNORE_OUTGOING: Final = 23
_PACKET_VNET_HDR_SZ: Final = 24
_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_STXCSUM: Final = 0x17
_SO_RCVBUFFORCE: Final = 33
_SO_SNDBUFFORCE: Final = 32
_ETH_P_ALL: Final = 3
_BUFFER: Final = 16 << 20
_MAX_FRAME: Final = 65550
_BATCH: Final = 16


class PacketLink:
    """`netstack.api.Link` over a bound AF_PACKET socket (which it owns)."""

    def __init__(self, sock: socket.socket, name: str, *, mtu: int, vnet: bool) -> None:
        sock.setblocking(False)
        self.name = name
        self.mtu = mtu
        self.max_frame = _MAX_FRAME if vnet else mtu + 14
        self.headroom = VNET_HEADER if vnet else 0
        self.partial_checksums = vnet
        self.tso = super_frame_payload(mtu) if vnet else 0
        held = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.window = max(held // 3, 65535)
        """Octets one guest connection should be allowed to send ahead."""
        self.guest_mac: bytes | None = None
        """Of the guest's interface, where we made it."""
        self._sock = sock
        room = self.headroom + max(_MAX_FRAME, mtu + 18)
        self._views = [memoryview(bytearray(room)) for _ in range(_BATCH)]

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Sequence[memoryview]:
        frames: list[memoryview] = []
        recv_into = self._sock.recv_into
        try:
            for view in self._views:
                frames.append(view[: recv_into(view)])  # noqa: PERF401  # ends by exception, which keeps what came before
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.ENETDOWN) or not self._bound():  # down: it may come up again
                raise LinkDown(f"{self.name}: {error.strerror}") from error
        return frames

    def _bound(self) -> bool:
        """Whether the interface still exists: deleting it looks like taking it down, but unbinds the socket for good."""
        return bool(self._sock.getsockname()[0])

    def send(self, frames: Sequence[Frame]) -> int:
        sock = self._sock
        taken = 0
        try:
            for frame in frames:
                if len(frame) == 1:
                    sock.send(frame[0])
                else:
                    sock.sendmsg(frame)
                taken += 1
        except BlockingIOError:
            return taken
        except OSError as error:
            if error.errno in (errno.ENETDOWN, errno.ENOBUFS, errno.EINVAL, errno.EMSGSIZE, errno.ENOMEM):
                return taken + 1  # gone, like on a wire
            raise LinkDown(f"{self.name}: {error.strerror}") from error
        return taken

    def flush(self) -> bool:
        return True

    def prefix(self, octets: int) -> bytes:
        return bytes(self.headroom)

    def close(self) -> None:
        self._sock.close()


def packet_socket(ifname: str, *, offload: bool = True) -> socket.socket:
    """An AF_PACKET socket bound to `ifname` in this network namespace, set up for a link. Raises `OSError`."""
    if not hasattr(socket, "AF_PACKET"):
        raise OSError(errno.EAFNOSUPPORT, "AF_PACKET is Linux only")
    # Protocol 0 receives nothing until bind names one, so nothing of another interface can slip in before.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        if offload:
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR_SZ, VNET_HEADER)
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, force, _BUFFER)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, plain, _BUFFER)
        sock.bind((ifname, _ETH_P_ALL))
    except OSError:
        sock.close()
        raise
    return sock


def make_veth(ifname: str, ours: str, *, mtu: int, mac: bytes) -> None:
    """Create the pair `ifname` (the guest's end) and `ours` in this namespace, both up. Raises `ConfigError`."""
    ip = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if ip is None:
        raise ConfigError("a packet link makes its veth pair with 'ip'; install the package iproute2")
    commands = [
        [
            "link",
            "add",
            ifname,
            "address",
            mac.hex(":"),
            "mtu",
            str(mtu),
            "type",
            "veth",
            "peer",
            "name",
            ours,
            "mtu",
            str(mtu),
        ],
        ["link", "set", ours, "up"],
        ["link", "set", ifname, "up"],
    ]
    for command in commands:
        done = subprocess.run([ip, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"ip {' '.join(command)}: {done.stderr.strip()}")


def complete_checksums(ifname: str) -> None:
    """Make the kernel fill in checksums, and therefore segment, before frames leave `ifname`. Raises `OSError`.

    A veth hands super-frames without checksums to its other end whatever reads them there; with no virtio-net header
    nothing would tell us what is missing.
    """
    import ctypes
    import fcntl

    value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP16x", ifname.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, request)


def open_packet(
    ifname: str,
    *,
    namespaces: Sequence[tuple[str, int]] = (),
    name: str = "",
    mtu: int = 1500,
    offload: bool = True,
    mac: bytes | None = None,
) -> PacketLink:
    """A link on a veth pair inside `namespaces`; `ifname` is the guest's end. Raises `ConfigError`.

    A pair that does not exist is made, our end being `ifname` with `-link` behind. Where `ifname-link` exists it is taken;
    where only `ifname` exists, `ifname` itself is taken as our end (a pair somebody else laid: without offload its other
    end must have checksum offload turned off too).
    """
    ours = f"{ifname[:10]}-link"
    if mac is None:
        first, *rest = os.urandom(6)
        mac = bytes((first & 0xFC | 2, *rest))  # locally administered, of one station

    def task() -> int:
        known = {found for _index, found in socket.if_nameindex()}
        if ours in known:
            target = ours
        elif ifname in known:
            target = ifname
        else:
            make_veth(ifname, ours, mtu=mtu, mac=mac)
            target = ours
        if not offload and any(found == ifname for _index, found in socket.if_nameindex() if target == ours):
            complete_checksums(ifname)
        return packet_socket(target, offload=offload).detach()

    try:
        fd = open_inside(namespaces, task)
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"packet {ifname}: {reason}; it needs CAP_NET_RAW and CAP_NET_ADMIN in the namespace "
            "(an ordinary user has them in a user namespace: 'pyvpnkit shell')"
        ) from error
    link = PacketLink(socket.socket(fileno=fd), name or f"packet:{ifname}", mtu=mtu, vnet=offload)
    link.guest_mac = mac
    return link
