"""A VM with a forwarder, as the host reaches it: what the hypervisor's socket wants to hear, then any generation."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from portfwd.carriers import Destination
from portfwd.mux.accept import Accepted
from portfwd.mux.channel import Channel, Ending
from portfwd.mux.engine import Role
from portfwd.mux.plane import Plane
from portfwd.mux.records import Record, RecordChannel
from portfwd.mux.splice import Splice, reset, splice
from portfwd.mux.where import Where


class Vm:
    """Listens at `path` as the hypervisor does for `kind`; channels are dialled, those of UDP echo."""

    def __init__(self, path: Path, kind: str = "unix", answer: bytes = b"OK 1073741824\n") -> None:
        self.path = path
        self.kind = kind
        self.answer = answer
        self.lines: list[bytes] = []
        """First reads of connections."""
        self.accepted: list[Accepted] = []
        self.records: list[Record] = []
        self.datagrams: list[RecordChannel] = []
        self.endings: list[Ending] = []
        self.splices: list[Splice] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(2000)
        self._listener.setblocking(False)
        self._task = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            if self.kind != "unix":
                self.lines.append(await loop.sock_recv(sock, 18 if self.kind == "hyperkit" else 64))
                if not self.answer:
                    sock.close()
                    continue
                if self.kind == "connect":
                    sock.send(self.answer)
            self.meet(sock)

    def meet(self, sock: socket.socket, **options: Any) -> Accepted:
        self.accepted.append(Accepted(sock, self.opened, **options))
        return self.accepted[-1]

    async def connect(self, path: Path, generation: int = 3) -> Accepted:
        """`-data-connect`."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return self.meet(sock, role=Role.CONNECTOR, generation=generation)

    def opened(self, destination: Destination, channel: Channel) -> None:
        if destination.protocol == "udp":
            if destination.port == 1:
                channel.close()
                return
            holder: list[RecordChannel] = []

            def echo(record: Record) -> None:
                self.records.append(record)
                holder[0].send(Record(record.payload[::-1], record.address, record.port, record.zone))

            holder.append(RecordChannel(channel, echo, self.endings.append))
            self.datagrams.append(holder[0])
            return
        family = socket.AF_UNIX if destination.protocol == "unix" else socket.AF_INET
        sock = socket.socket(family)
        try:
            sock.connect(destination.path or (socket.inet_ntoa(destination.address), destination.port))
        except OSError:
            reset(sock)
            channel.close()
        else:
            self.splices.append(splice(channel, sock))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._listener.close()
            self._task = None
        for one in self.accepted:
            one.close()
        for made in self.splices:
            made.abort()
        self.accepted.clear()


@contextlib.asynccontextmanager
async def machine(path: Path, kind: str = "unix", *, up: bool = True, **options: Any) -> AsyncIterator[Vm]:
    made = Vm(path, kind, **options)
    if up:
        await made.start()
    try:
        yield made
    finally:
        await made.stop()


@contextlib.asynccontextmanager
async def plane(text: str, **options: Any) -> AsyncIterator[Plane]:
    made = Plane(Where.parse(text), **options)
    try:
        made.start(asyncio.get_running_loop())
        yield made
    finally:
        await made.close()


class Server:
    """A TCP or unix server that reads to the end and answers with the same octets, turned round."""

    def __init__(self, path: Path | None = None) -> None:
        self.sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.sock.bind(str(path) if path else ("127.0.0.1", 0))
        self.sock.listen(2000)
        self.target = (
            Destination("unix", path=str(path))
            if path
            else Destination("tcp", bytes((127, 0, 0, 1)), self.sock.getsockname()[1])
        )
        self.peers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, sock=self.sock, limit=1 << 22, backlog=2000)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peers.append(writer)
        try:
            octets = await reader.read(-1)
            writer.write(octets[::-1])
            await writer.drain()
            writer.close()
        except ConnectionError:
            writer.close()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self.peers:
            writer.close()
        for writer in self.peers:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def client(plane: Plane, target: Destination, **options: Any) -> socket.socket:
    """A TCP client of a published port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    theirs.setblocking(False)
    ours.setblocking(False)
    plane.stream(target, theirs, **options)
    return ours


async def read_all(sock: socket.socket) -> bytes:
    octets = b""
    async with asyncio.timeout(20):
        while part := await asyncio.get_running_loop().sock_recv(sock, 1 << 18):
            octets += part
    return octets


async def ask(plane: Plane, target: Destination, question: bytes, **options: Any) -> bytes:
    """Send, end, and read to the end."""
    with client(plane, target, **options) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, question)
        sock.shutdown(socket.SHUT_WR)
        return await read_all(sock)
