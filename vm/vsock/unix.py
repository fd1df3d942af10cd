"""The host's side of a guest's vsock: Unix sockets in one directory, by the conventions of HyperKit and of Firecracker at once
(spec companions 1.2).

    DIR/connect          18 octets `%08x.%08x\\n` (CID and port, hexadecimal), no answer; a port that is refused is a close
    DIR/vsock            `CONNECT <port>\\n` (decimal), and `OK <host port>\\n` when the guest has taken it
    DIR/guest.%08x       a port of the guest without any line: a link to the socket DIR/<CID>.%08x
    DIR/00000002.%08x    where a service of the host listens for what the guest dials, or else
    DIR/vsock_<port>     the same in decimal

Lines are read octet by octet as far as they go, so what follows stays in the socket and is the guest's. Who does not say its line
in `LINE_S` is closed; so many may be at it at once as `vm.accepting` allows. Others than this user and root are turned away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from netstack.errors import ConfigError, Malformed
from netstack.link.listening import UnixSocket
from vm.accepting import Accepted, Acceptor
from vm.vsock.api.common import FULL_QUEUE_RETRY_S, HOST_CID
from vm.vsock.api.paths import ShortPath, short_path
from vm.vsock.packet import LARGEST_PORT

CONNECT: Final = "connect"
HYBRID: Final = "vsock"
LINE_S: Final = 5.0
"""For the line that names a port."""
DIAL_S: Final = 5.0
"""For a service whose queue is full; Linux's guests give up after 2 s."""
MAX_RETRIES: Final = 500
"""Of these in a second, all services together."""
BACKLOG: Final = 256
_HYPERKIT: Final = re.compile(rb"([0-9a-fA-F]{8})\.([0-9a-fA-F]{8})\n")
HYPERKIT_OCTETS: Final = 18
_HYBRID: Final = re.compile(rb"CONNECT ([0-9]{1,10})\n")
HYBRID_OCTETS: Final = 19

Connect: TypeAlias = Callable[[int, socket.socket, Callable[[int], bytes]], bool]
"""`connect(port, socket, greeting)`, as `VsockDevice.connect`."""


def parse_hyperkit(line: bytes) -> tuple[int, int]:
    """CID and port. Raises `Malformed`."""
    found = _HYPERKIT.fullmatch(line)
    if found is None:
        raise Malformed(f"vsock: {line!r} is not CID.port, 8 hexadecimal digits each and a newline")
    return int(found[1], 16), _port(int(found[2], 16))


def parse_hybrid(line: bytes) -> int:
    """The port. Raises `Malformed`."""
    found = _HYBRID.fullmatch(line)
    if found is None:
        raise Malformed(f"vsock: {line!r} is not CONNECT, a port in decimal and a newline")
    return _port(int(found[1]))


def _port(number: int) -> int:
    if number > LARGEST_PORT:
        raise Malformed(f"vsock: there is no port {number}; the last one is {LARGEST_PORT}")
    return number


class UnixSide:
    """See the module. An async context manager: its sockets are there from its begin to its end.

    `connect` is asked for each connection to the guest. Raises `ConfigError` where sockets cannot be had.
    """

    def __init__(self, directory: Path, cid: int, connect: Connect, forwards: Sequence[int] = ()) -> None:
        self._directory = directory.absolute()
        self._cid = cid
        self._connect = connect
        self._forwards = forwards
        self._stack = contextlib.AsyncExitStack()
        self._acceptors: dict[str, Acceptor] = {}
        self._retries: set[asyncio.TimerHandle] = set()

    async def __aenter__(self) -> UnixSide:
        for port in self._forwards:
            if not 0 <= port <= LARGEST_PORT:
                raise ConfigError(f"vsock forward {port}: ports are from 0 to {LARGEST_PORT}")
        private_directory(self._directory)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._forget_retries)
            self._listen(stack, CONNECT, self._hyperkit)
            self._listen(stack, HYBRID, self._hybrid)
            for port in self._forwards:
                name = f"{self._cid:08x}.{port:08x}"
                self._listen(stack, name, self._forward(port))
                self._link(stack, f"guest.{port:08x}", name)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _listen(
        self, stack: contextlib.AsyncExitStack, name: str, serve: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        bound = stack.enter_context(listening(self._directory / name, "vsock directory"))
        acceptor = Acceptor(bound.sock, serve, name=f"vsock {name}")
        self._acceptors[name] = acceptor
        stack.push_async_callback(acceptor.close)

    def _link(self, stack: contextlib.AsyncExitStack, name: str, target: str) -> None:
        path = self._directory / name
        try:
            if path.is_symlink():
                path.unlink()
            path.symlink_to(target)
        except OSError as error:
            raise ConfigError(
                f"vsock forward: {path}: {error.strerror}; remove it or choose another directory"
            ) from None
        stack.callback(path.unlink, missing_ok=True)

    def counts(self) -> dict[str, Accepted]:
        """Of each socket, by its name."""
        return {name: acceptor.counts for name, acceptor in self._acceptors.items()}

    # Host to guest. The acceptor closes its socket when these return, so one that is passed on is detached from it.

    async def _hyperkit(self, sock: socket.socket) -> None:
        async with asyncio.timeout(LINE_S):
            cid, port = parse_hyperkit(await _line(sock, HYPERKIT_OCTETS))
        if cid == self._cid:
            self._pass_on(sock, port, lambda host_port: b"")

    async def _hybrid(self, sock: socket.socket) -> None:
        async with asyncio.timeout(LINE_S):
            port = parse_hybrid(await _line(sock, HYBRID_OCTETS))
        self._pass_on(sock, port, lambda host_port: b"OK %d\n" % host_port)

    def _forward(self, port: int) -> Callable[[socket.socket], Awaitable[None]]:
        async def serve(sock: socket.socket) -> None:
            self._pass_on(sock, port, lambda host_port: b"")

        return serve

    def _pass_on(self, sock: socket.socket, port: int, greeting: Callable[[int], bytes]) -> None:
        passed = socket.socket(fileno=sock.detach())
        if not self._connect(port, passed, greeting):
            passed.close()

    # Guest to host.

    def dial(self, port: int, answer: Callable[[socket.socket | None], None]) -> None:
        """Connect to the service of `port`; `answer(None)` where nobody listens."""
        self._dial(port, answer, asyncio.get_running_loop().time() + DIAL_S)

    def _dial(self, port: int, answer: Callable[[socket.socket | None], None], until: float) -> None:
        for name in (f"{HOST_CID:08x}.{port:08x}", f"vsock_{port}"):
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            except OSError:  # no descriptors are left
                break
            sock.setblocking(False)
            try:
                with short_path(self._directory / name) as path:
                    sock.connect(path)
            except BlockingIOError:
                sock.close()
                self._dial_again(port, answer, until)
                return
            except (OSError, ConfigError):
                sock.close()
            else:
                answer(sock)
                return
        answer(None)

    def _dial_again(self, port: int, answer: Callable[[socket.socket | None], None], until: float) -> None:
        """The service's queue is full, and nothing tells when it has room again."""
        loop = asyncio.get_running_loop()
        if loop.time() >= until:
            answer(None)
            return

        def again() -> None:
            self._retries.discard(handle)
            self._dial(port, answer, until)

        # A guest that dials a thousand times a service which hangs keeps us no busier than one that dials it a few times.
        handle = loop.call_later(max(FULL_QUEUE_RETRY_S, len(self._retries) / MAX_RETRIES), again)
        self._retries.add(handle)

    def _forget_retries(self) -> None:
        for handle in self._retries:
            handle.cancel()
        self._retries.clear()


async def _line(sock: socket.socket, most: int) -> bytes:
    """Up to a newline, or `most` octets, or the end."""
    loop = asyncio.get_running_loop()
    line = b""
    while len(line) < most and not line.endswith(b"\n"):
        octet = await loop.sock_recv(sock, 1)
        if not octet:
            break
        line += octet
    return line


@contextlib.contextmanager
def listening(path: Path, setting: str) -> Iterator[UnixSocket]:
    """A socket of mode 0600 at `path`, however long that is. Raises `ConfigError`."""
    try:
        short = ShortPath(path)
    except OSError as error:
        raise ConfigError(f"{setting}: {path.parent}: {error.strerror}; create it or choose another one") from None
    with contextlib.closing(short):
        try:
            bound = UnixSocket(short.text, socket.SOCK_STREAM, setting=setting, backlog=BACKLOG)
        except ConfigError as error:
            raise ConfigError(str(error).replace(short.text, str(path))) from None
        with contextlib.closing(bound):
            yield bound


def private_directory(path: Path) -> None:
    """Make it, for nobody but this user, where it is not there. Raises `ConfigError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"vsock directory: {path}: {error.strerror}; choose another one") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"vsock directory: {path} is another user's, or others may write to it: who may put sockets there is dialled "
            "by the guest; choose one of your own with mode 0700"
        )
