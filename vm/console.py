"""The serial console of a machine: always a symbolic link to a pty, and a log with a bound.

    hypervisor makes a pty, keeps a log    `PtyConsole`: we link to its pty and trim its log (QEMU), or it makes the link (HyperKit)
    hypervisor makes a pty and no log      `pty_shim.PtyShim.over_pty`: one of ours before it (vfkit, Cloud Hypervisor)
    hypervisor has it on stdin and stdout  `pty_shim.PtyShim.over_pipes` (Firecracker)

Ptys are made raw, so that what the machine says is not echoed to it as if it had been typed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from netstack.errors import HostError
from vm.console_log import MOST, LogKeeper

log = logging.getLogger("pyvpnkit")

CHUNK: Final = 4096
LINK_WAIT_S: Final = 10.0
_LINK_POLL_S: Final = 0.02


def link_to(path: Path, pty: Path) -> None:
    """Make `path` a symbolic link to a pty, in place of what link is there, and the pty private. Raises `HostError`."""
    make_private(pty)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(pty)
        beside.replace(path)
    except OSError as error:
        raise HostError(f"console: {path}: {error.strerror}") from None


def make_private(pty: Path) -> None:
    """Let nobody else open a pty, which has to be this user's. Raises `HostError`."""
    try:
        fd = os.open(pty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"console: {pty}: {error.strerror}") from None
    try:
        if not os.isatty(fd):
            raise HostError(f"console: {pty} is no terminal")
        if os.fstat(fd).st_uid != os.geteuid():
            raise HostError(f"console: {pty} is a terminal of another user")
        os.fchmod(fd, 0o600)
    except OSError as error:
        raise HostError(f"console: {pty}: {error.strerror}") from None
    finally:
        os.close(fd)


def open_pty(path: Path) -> int:
    """A descriptor of the console at `path`, raw and non-blocking. Raises `HostError`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        why = (
            "there is no console; does the machine run?" if error.errno in (errno.ENOENT, errno.EIO) else error.strerror
        )
        raise HostError(f"console: {path}: {why}") from None
    try:
        tty.setraw(fd, termios.TCSANOW)
    except termios.error as error:
        os.close(fd)
        raise HostError(f"console: {path} is no terminal: {error.args[-1]}") from None
    return fd


def holders(path: Path) -> list[str]:
    """Programs of this user, besides this one, that have the pty behind `path` open, as `name (pid N)`; Linux only."""
    pty = os.path.realpath(path)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name != str(os.getpid()) and pty in _descriptors(process):
            with contextlib.suppress(OSError):
                found.append(f"{(process / 'comm').read_text().strip()} (pid {process.name})")
    return found


def _descriptors(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # not ours, or gone
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(link)


class LinkedConsole:
    """The part that all have. `path` and `log` are as in `vm.api.Console`."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        self.log = log
        self._attached: set[asyncio.Task[None]] = set()

    async def attach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        others = holders(self.path)
        if others:
            log.warning("console: %s is open in %s too; each gets a part of what it says", self.path, ", ".join(others))
        terminal = open_pty(self.path)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        task = asyncio.create_task(_between(terminal, theirs))
        self._attached.add(task)
        task.add_done_callback(self._attached.discard)
        return await asyncio.open_unix_connection(sock=ours)

    async def close(self) -> None:
        """Remove the link, and let go of who is attached; harmless when repeated."""
        with contextlib.suppress(OSError):
            if self.path.is_symlink():
                self.path.unlink()
        for task in self._attached:
            task.cancel()
        await asyncio.gather(*self._attached, return_exceptions=True)


async def _between(terminal: int, sock: socket.socket) -> None:
    """Carry octets between a terminal and a socket until either ends; closes both.

    (Loops have pipe transports, but uvloop's does not read from a terminal.)
    """
    loop = asyncio.get_running_loop()
    with contextlib.closing(sock), os.fdopen(terminal, "rb", 0):
        ways = [
            asyncio.ensure_future(_shown(loop, terminal, sock)),
            asyncio.ensure_future(_typed(loop, terminal, sock)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)


async def _shown(loop: asyncio.AbstractEventLoop, terminal: int, sock: socket.socket) -> None:
    data: bytes | None = None
    while data != b"":
        data = None
        await _ready(terminal, loop.add_reader, loop.remove_reader)
        with contextlib.suppress(BlockingIOError):
            data = os.read(terminal, CHUNK)
            await loop.sock_sendall(sock, data)


async def _typed(loop: asyncio.AbstractEventLoop, terminal: int, sock: socket.socket) -> None:
    while data := await loop.sock_recv(sock, CHUNK):
        while data:
            try:
                data = data[os.write(terminal, data) :]
            except BlockingIOError:
                await _ready(terminal, loop.add_writer, loop.remove_writer)


async def _ready(fd: int, add: Callable[..., None], remove: Callable[[int], object]) -> None:
    ready = asyncio.Event()
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)


class PtyConsole(LinkedConsole):
    """A pty that the hypervisor made and logs itself."""

    def __init__(self, path: Path, log: Path, *, most: int = MOST) -> None:
        """`path` is a link to it already; `most` is the bound of the log in octets. Wants a running loop."""
        super().__init__(path, log)
        self._keeper = LogKeeper(log, most)

    @classmethod
    def linked(cls, path: Path, log: Path, pty: Path, *, most: int = MOST) -> PtyConsole:
        """For a pty that the hypervisor named. Raises `HostError`."""
        link_to(path, pty)
        return cls(path, log, most=most)

    @classmethod
    async def found(cls, path: Path, log: Path, *, most: int = MOST, limit_s: float = LINK_WAIT_S) -> PtyConsole:
        """For a link that the hypervisor makes itself, once it is there. Raises `HostError`."""
        until = time.monotonic() + limit_s
        while not _is_there(path):
            if time.monotonic() > until:
                raise HostError(f"console: the hypervisor has not made {path} within {limit_s:g} s")
            await asyncio.sleep(_LINK_POLL_S)
        make_private(path)
        return cls(path, log, most=most)

    async def close(self) -> None:
        await self._keeper.close()
        await super().close()


def _is_there(path: Path) -> bool:
    return path.exists()
