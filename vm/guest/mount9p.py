"""A directory of the host, mounted by 9P over vsock (spec companions 4.4; vpnkit-9pmount-vsock's way, spec vpnkit 1.2).

    mount9p -port 564 /mnt             dials the host, and mounts what is served there
    mount9p -listen -port 564 /mnt     waits until the host dials
    umount /mnt                        as any other

The connection is handed to the kernel (`trans=fd`); this program ends when it is mounted.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

PORT = 564  # 9P's own (IANA: 9pfs)
HOST_CID = 2  # vsock(7): VMADDR_CID_HOST
ANY_CID = 0xFFFFFFFF  # vsock(7): VMADDR_CID_ANY
MSIZE = 262144
"""Octets of a message; the kernel takes less where its transport wants less."""
WAIT_S = 10.0
RETRY_S = 0.2

MS_RDONLY = 1  # mount(2)

_HINTS = {
    errno.ENODEV: "the kernel has no 9p; try: modprobe 9p",
    errno.EINVAL: "the kernel has no trans=fd (try: modprobe 9pnet_fd), or the server speaks another version",
    errno.EPERM: "it takes root",
    errno.EACCES: "the server turned us away",
    errno.ENOENT: "the directory to mount at does not exist, or the server has no such -aname",
    errno.EBUSY: "something is mounted there already",
}

Mount = Callable[[str, str, int, str, int], None]
"""Source, target, flags, options, and the descriptor that the options name. Raises `OSError`."""


def options(fd: int, *, aname: str = "", msize: int = MSIZE, access: str = "user", more: str = "") -> str:
    """The mount options for a connection to a server."""
    words = ["trans=fd", f"rfdno={fd}", f"wfdno={fd}", "version=9p2000.L", f"msize={msize}", f"access={access}"]
    if aname:
        words.append(f"aname={aname}")
    if more:
        words.append(more)
    return ",".join(words)


def mount(source: str, target: str, flags: int, data: str, fd: int) -> None:
    """mount(2); by the tool of that name where Python has no ctypes. Raises `OSError`."""
    try:
        import ctypes
    except ImportError:
        _mount_by_tool(source, target, flags, data, fd)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), os.fsencode(target), b"9p", ctypes.c_ulong(flags), os.fsencode(data)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount_by_tool(source: str, target: str, flags: int, data: str, fd: int) -> None:
    argv = ["mount", "-t", "9p", "-o", f"ro,{data}" if flags & MS_RDONLY else data, source, target]
    done = subprocess.run(argv, pass_fds=(fd,), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise OSError(errno.EIO, done.stderr.strip() or f"mount ended with {done.returncode}")


def dial(at: str, cid: int, wait_s: float) -> socket.socket:
    """To a vsock port or the path of a Unix socket, again and again for `wait_s`. Raises `OSError`."""
    until = time.monotonic() + wait_s
    while True:
        sock = _socket(at)
        try:
            sock.connect(at if "/" in at else (cid, int(at, 0)))
            return sock
        except OSError:
            sock.close()
            if time.monotonic() + RETRY_S > until:
                raise
        time.sleep(RETRY_S)


def accept(at: str, cid: int, wait_s: float) -> socket.socket:
    """The first connection from `cid` within `wait_s`. Raises `OSError`, `TimeoutError`."""
    until = time.monotonic() + wait_s
    with _socket(at) as listening:
        listening.bind(at if "/" in at else (ANY_CID, int(at, 0)))
        if "/" in at:
            os.chmod(at, 0o600)  # nobody can connect before it listens
        listening.listen(1)
        try:
            while True:
                listening.settimeout(max(0.001, until - time.monotonic()))
                sock, peer = listening.accept()
                sock.setblocking(True)
                if "/" in at or peer[0] == cid:
                    return sock
                sock.close()
        finally:
            if "/" in at:
                os.unlink(at)


def _socket(at: str) -> socket.socket:
    return socket.socket(socket.AF_UNIX if "/" in at else socket.AF_VSOCK, socket.SOCK_STREAM)


def main(argv: list[str] | None = None, *, mount: Mount = mount) -> int:
    """0 when it is mounted, 1 when not, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        "mount9p", description="Mount a directory of the host by 9P over vsock.", allow_abbrev=False
    )
    parser.add_argument(
        "-port", "--port", default=str(PORT), metavar="PORT|PATH", help="vsock port, or a Unix socket [564]"
    )
    parser.add_argument("-cid", "--cid", type=int, default=HOST_CID, help="of the host [2]")
    parser.add_argument("-listen", "--listen", action="store_true", help="wait for the host to connect")
    parser.add_argument("-wait", "--wait", type=float, default=WAIT_S, metavar="SECONDS", help="for the host [10]")
    parser.add_argument("-aname", "--aname", default="", help="which of the server's trees")
    parser.add_argument("-msize", "--msize", type=int, default=MSIZE, metavar="OCTETS", help="of a message [262144]")
    parser.add_argument("-access", "--access", default="user", help="user, any, client, or a user id [user]")
    parser.add_argument("-o", "--options", default="", help="more mount options, such as cache=loose")
    parser.add_argument("-read-only", "--read-only", action="store_true")
    parser.add_argument("target", help="the directory to mount at, which is made where it is absent")
    given = parser.parse_args(argv)
    if "," in given.aname:
        parser.error(f"-aname {given.aname!r}: the kernel's options cannot have a comma in a name")
    try:
        if "/" not in given.port:
            int(given.port, 0)
    except ValueError:
        parser.error(f"-port {given.port!r}: write a vsock port such as 564, or the path of a Unix socket")
    try:
        os.makedirs(given.target, exist_ok=True)
        connection = (accept if given.listen else dial)(given.port, given.cid, given.wait)
    except OSError as error:
        print(f"mount9p: {given.port}: {error.strerror or error}", file=sys.stderr)
        return 1
    with connection:
        data = options(
            connection.fileno(), aname=given.aname, msize=given.msize, access=given.access, more=given.options
        )
        try:
            flags = MS_RDONLY if given.read_only else 0
            mount(f"vsock:{given.port}", given.target, flags, data, connection.fileno())
        except OSError as error:
            hint = _HINTS.get(error.errno or 0)
            print(f"mount9p: {given.target}: {error.strerror}{f' ({hint})' if hint else ''}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
