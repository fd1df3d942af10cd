"""A TAP device in a guest's network namespace, with virtio-net header and segmentation offload. HOT PATH, Linux only.

With `IFF_VNET_HDR` every frame begins with a 12-octet virtio-net header (virtio 1.2, 5.1.6): the guest kernel hands over
TCP super-frames of up to 64 KiB without checksums and takes the same, which is what makes Python fast enough (spec dataplane
A). `offload=off` gives ordinary frames of at most the MTU with complete checksums.

The device is opened by a short-lived child, because entering a user namespace needs a process of its own; the descriptor
comes back over a socket pair.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from netstack.api import Frame
from netstack.errors import ConfigError, LinkDown
from netstack.link.common import super_frame_payload
from netstack.link.namespace import open_inside

VNET_HEADER: Final = 12

_MAX_FRAME: Final = 65550
_BATCH: Final = 16
"""Frames per `receive`: the knee of the measured curve (spec dataplane B)."""

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNGETIFF: Final = 0x800454D2
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFHWADDR: Final = 0x8924
_SIOCGIFHWADDR: Final = 0x8927
_IFF_UP: Final = 1
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TUN_F_CSUM: Final = 1
_TUN_F_TSO4: Final = 2
_TUN_F_TSO_ECN: Final = 8
_NO_OFFLOAD_HEADER: Final = bytes(VNET_HEADER)


class TapLink:
    """`netstack.api.Link` over an open TAP descriptor (which it owns).

    `vnet` says whether frames carry the virtio-net header (set up by `open_tap`).
    """

    def __init__(self, fd: int, name: str, *, mtu: int, vnet: bool) -> None:
        os.set_blocking(fd, False)
        self.name = name
        self.mtu = mtu
        self.max_frame = _MAX_FRAME if vnet else mtu + 14
        self.headroom = VNET_HEADER if vnet else 0
        self.partial_checksums = vnet
        self.tso = super_frame_payload(mtu) if vnet else 0
        self.guest_mac: bytes | None = None
        """Of the guest's interface, where it is known."""
        self._fd = fd
        self._file = os.fdopen(fd, "r+b", buffering=0, closefd=True)
        self._readinto = self._file.readinto
        room = self.headroom + max(_MAX_FRAME, mtu + 18)
        self._views = [memoryview(bytearray(room)) for _ in range(_BATCH)]

    def fileno(self) -> int:
        return self._fd

    def receive(self) -> Sequence[memoryview]:
        frames: list[memoryview] = []
        readinto = self._readinto
        try:
            for view in self._views:
                octets = readinto(view)
                if not octets:
                    break
                frames.append(view[:octets])
        except OSError as error:
            if error.errno not in (
                errno.EAGAIN,
                errno.EINTR,
                errno.EIO,
            ):  # EIO: the interface is down, it may come back
                raise LinkDown(f"{self.name}: {error.strerror}") from error
        return frames

    def send(self, frames: Sequence[Frame]) -> int:
        fd = self._fd
        taken = 0
        try:
            for frame in frames:
                if len(frame) == 1:
                    os.write(fd, frame[0])
                else:
                    os.writev(fd, frame)
                taken += 1
        except BlockingIOError:
            return taken
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL, errno.ENOBUFS, errno.ENOMEM):
                # Down, or a frame the kernel refuses: gone like on a wire.
                return taken + 1
            raise LinkDown(f"{self.name}: {error.strerror}") from error
        return taken

    def send_one(self, frame: memoryview) -> bool:
        """As `send` for one frame in one piece; whether it was taken."""
        try:
            os.write(self._fd, frame)
        except OSError:
            return self.send(((frame,),)) == 1
        return True

    def flush(self) -> bool:
        return True

    def prefix(self, octets: int) -> bytes:
        return _NO_OFFLOAD_HEADER if self.headroom else b""

    def close(self) -> None:
        self._file.close()


def open_tap(
    ifname: str,
    *,
    namespaces: Sequence[tuple[str, int]] = (),
    name: str = "",
    mtu: int = 1500,
    offload: bool = True,
    mac: bytes | None = None,
) -> TapLink:
    """Create (or attach to) TAP `ifname` inside `namespaces`, see `netstack.link.namespace`. Raises `ConfigError`.

    The device gets `mtu`, the guest's `mac` when given, and is brought up; its address is the guest's business (DHCP).
    """

    def task() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        _set_up(fd, ifname, vnet=offload, mtu=mtu, mac=mac)
        return fd

    try:
        fd = open_inside(namespaces, task)
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"tap {ifname}: {reason}; it needs /dev/net/tun and CAP_NET_ADMIN in the namespace "
            "(as an ordinary user use a 'packet' link or 'pyvpnkit shell')"
        ) from error
    link = TapLink(fd, name or f"tap:{ifname}", mtu=mtu, vnet=offload)
    link.guest_mac = _hardware_address(fd)
    return link


def adopt_tap(fd: int, *, name: str = "", mtu: int = 1500, offload: bool = True) -> TapLink:
    """A TAP descriptor somebody else opened (`fd:N,kind=tap`); its flags tell whether it has a virtio-net header."""
    import fcntl

    request = bytearray(struct.pack("16sH22x", b"", 0))
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
        ifname, flags = struct.unpack_from("16sH", request)
        vnet = bool(flags & _IFF_VNET_HDR)
        if vnet:
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO_ECN if offload else 0)
    except OSError as error:
        raise ConfigError(f"fd:{fd} is not an attached TAP device: {error.strerror}") from error
    return TapLink(fd, name or f"tap:{ifname.rstrip(bytes(1)).decode()}", mtu=mtu, vnet=vnet)


def _hardware_address(fd: int) -> bytes | None:
    import fcntl

    try:
        return fcntl.ioctl(fd, _SIOCGIFHWADDR, bytes(32))[18:24]
    except OSError:
        return None


def _set_up(fd: int, ifname: str, *, vnet: bool, mtu: int, mac: bytes | None) -> None:
    import fcntl

    request = struct.pack("16sH22x", ifname.encode(), _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet else 0))
    fcntl.ioctl(fd, _TUNSETIFF, request)
    if vnet:
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO_ECN)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mac is not None:
            fcntl.ioctl(control, _SIOCSIFHWADDR, struct.pack("16sH6s8x", ifname.encode(), 1, mac))
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si12x", ifname.encode(), mtu))
        bring_up(control, ifname)


def bring_up(control: socket.socket, ifname: str) -> None:
    """Bring an interface up, in the network namespace of `control`, an IPv4 socket. Raises `OSError`."""
    import fcntl

    flags = struct.unpack_from("16sH", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH14x", ifname.encode(), 0)))[
        1
    ]
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", ifname.encode(), flags | _IFF_UP))
