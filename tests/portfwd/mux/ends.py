"""Two sessions over a pair of sockets, and clients and servers behind their splices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from portfwd.carriers import Destination
from portfwd.mux.channel import Channel
from portfwd.mux.engine import Role
from portfwd.mux.session import Session
from portfwd.mux.splice import Splice, splice

TARGET = Destination("tcp", bytes((10, 0, 0, 1)), 80)


async def until(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.002)


@dataclass
class Near:
    """The application's end of a spliced socket."""

    sock: socket.socket
    splice: Splice
    ends: list[str] = field(default_factory=list)
    """What `on_close` said."""

    async def send(self, octets: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, octets)

    def shut(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def all(self) -> bytes:
        """Octets until the end of file. Raises `ConnectionError` after a reset."""
        parts = []
        while part := await asyncio.get_running_loop().sock_recv(self.sock, 1 << 18):
            parts.append(part)
        return b"".join(parts)

    async def some(self, octets: int) -> bytes:
        got = b""
        while len(got) < octets:
            part = await asyncio.get_running_loop().sock_recv(self.sock, octets - len(got))
            assert part
            got += part
        return got


def near(channel: Channel, *, tcp: bool = False, preface: bytes = b"") -> Near:
    """An application behind a splice."""
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
    else:
        ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ends: list[str] = []
    return Near(ours, splice(channel, theirs, on_close=ends.append, preface=preface), ends)


class Sessions:
    """A host's session and the VM's; what the host opens appears in `served`."""

    def __init__(self, generation: int = 3, *, tcp: bool = False, serve: bool = True, **options: Any) -> None:
        ours, theirs = socket.socketpair()
        self.tcp = tcp
        self.serve = serve
        self.ends: list[str] = []
        self.asked: list[tuple[Destination, Channel]] = []
        """What was opened and not served."""
        self.served: dict[int, Near] = {}
        self.nears: list[Near] = []
        self.host = Session(
            ours,
            generation=generation,
            role=Role.CONNECTOR if generation == 3 else Role.OCAML,
            on_open=self.opened,
            on_end=self.ends.append,
            **options,
        )
        self.vm = Session(
            theirs, generation=generation, role=Role.LISTENER, on_open=self.opened, on_end=self.ends.append, **options
        )

    def opened(self, destination: Destination, channel: Channel) -> None:
        if not self.serve:
            self.asked.append((destination, channel))
            return
        self.served[channel.id] = made = near(channel, tcp=self.tcp)  # type: ignore[attr-defined]
        self.nears.append(made)

    def client(self, session: Session | None = None, preface: bytes = b"") -> Near:
        channel = (session or self.host).open(TARGET)
        made = near(channel, tcp=self.tcp, preface=preface)
        self.nears.append(made)
        self.last = channel.id
        return made

    async def both(self) -> tuple[Near, Near]:
        """A client, and the server it is joined with."""
        client = self.client()
        id = self.last
        await until(lambda: id in self.served)
        return client, self.served[id]

    @property
    def channels(self) -> int:
        return len(self.host._mux.flows) + len(self.vm._mux.flows)


@contextlib.asynccontextmanager
async def sessions(generation: int = 3, **options: Any) -> AsyncIterator[Sessions]:
    made = Sessions(generation, **options)
    try:
        yield made
    finally:
        made.host.close()
        made.vm.close()
        for one in made.nears:
            one.splice.abort()
            one.sock.close()
