"""Around the DNS server in tests: a shell that puts it on loopback sockets, resolvers played by us, and dnsmasq."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
from dnslib import QTYPE, RR, A, DNSHeader, DNSRecord

from dns.server import Server
from netstack.api import Endpoint

GUEST = Endpoint.of("192.168.65.3", 40000)

needs_dnsmasq = pytest.mark.skipif(shutil.which("dnsmasq") is None, reason="dnsmasq is not installed")
needs_dig = pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed")


def query(name: str, qtype: str = "A", query_id: int = 0x1234) -> bytes:
    """A recursive query, its name in the case given."""
    record = DNSRecord.question(name, qtype)
    record.header.id = query_id
    return bytes(record.pack())


def parse(message: bytes) -> DNSRecord:
    return DNSRecord.parse(message)


def a_reply(message: bytes, *addresses: str) -> bytes:
    """What a resolver answers to the query `message`."""
    asked = parse(message)
    header = DNSHeader(id=asked.header.id, qr=1, rd=1, ra=1)
    answer = DNSRecord(header, q=asked.q)
    for address in addresses:
        answer.add_answer(RR(asked.q.qname, QTYPE.A, rdata=A(address), ttl=60))
    return bytes(answer.pack())


def code_reply(message: bytes, rcode: int) -> bytes:
    asked = parse(message)
    return bytes(DNSRecord(DNSHeader(id=asked.header.id, qr=1, rd=1, ra=1, rcode=rcode), q=asked.q).pack())


class Upstream(asyncio.DatagramProtocol):
    """A resolver on 127.0.0.1 whose datagrams `answer` makes; `asked` keeps what came and from which port."""

    def __init__(self, answer: Callable[[bytes], Sequence[bytes]]) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.peers: list[tuple[str, int]] = []
        self.arrivals: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue()
        self.transport: asyncio.DatagramTransport | None = None
        self.spec = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self.transport is not None
        self.asked.append(data)
        self.peers.append(addr)
        self.arrivals.put_nowait((data, addr))
        for reply in self.answer(data):
            self.transport.sendto(reply, addr)


@contextlib.asynccontextmanager
async def upstream(answer: Callable[[bytes], Sequence[bytes]]) -> AsyncIterator[Upstream]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: Upstream(answer), local_addr=("127.0.0.1", 0))
    protocol.spec = f"127.0.0.1#{transport.get_extra_info('sockname')[1]}"
    try:
        yield protocol
    finally:
        transport.close()
        await asyncio.sleep(0)


def free_port() -> int:
    """A port that nobody has just now, UDP and TCP."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.bind(("127.0.0.1", 0))
            port: int = udp.getsockname()[1]
            with contextlib.suppress(OSError):
                tcp.bind(("127.0.0.1", port))
                return port


async def ask(server: Server, message: bytes, within_s: float = 10.0) -> bytes:
    """The answer over UDP; `TimeoutError` when there is none."""
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    server.datagram(message, GUEST, answered.set_result)
    async with asyncio.timeout(within_s):
        return await answered


def ask_now(server: Server, message: bytes) -> list[bytes]:
    """What the server answers without waiting for anybody."""
    answers: list[bytes] = []
    server.datagram(message, GUEST, answers.append)
    return answers


@contextlib.asynccontextmanager
async def shell(server: Server) -> AsyncIterator[int]:
    """The server on a UDP and a TCP port of 127.0.0.1; yields the number they share."""
    loop = asyncio.get_running_loop()

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.DatagramTransport, transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            server.datagram(data, Endpoint.of(*addr), lambda reply: self.transport.sendto(reply, addr))

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.stream(reader, writer, Endpoint.of(*writer.get_extra_info("peername")))

    port = free_port()
    transport, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", port))
    listener = await asyncio.start_server(stream, "127.0.0.1", port)
    try:
        yield port
    finally:
        server.close()
        transport.close()
        listener.close()
        await listener.wait_closed()
        await asyncio.sleep(0.01)  # transports close in the loop's next turns


def framed(message: bytes) -> bytes:
    return struct.pack("!H", len(message)) + message


async def read_framed(reader: asyncio.StreamReader) -> bytes:
    (octets,) = struct.unpack("!H", await reader.readexactly(2))
    return await reader.readexactly(octets)


@contextlib.asynccontextmanager
async def dnsmasq(directory: Path, *options: str) -> AsyncIterator[int]:
    """Debian's dnsmasq with only what `options` say, as a resolver on a port of 127.0.0.1."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-hosts",
        "--no-resolv",
        "--bind-interfaces",
        "--listen-address=127.0.0.1",
        f"--port={port}",
        f"--pid-file={directory / 'dnsmasq.pid'}",
        *(("--user=root",) if os.geteuid() == 0 else ()),
        *options,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(10):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                break
        assert process.returncode is None, "dnsmasq ended at once"
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def dig(port: int, *arguments: str) -> str:
    """The output of dig against 127.0.0.1#`port`."""
    process = await asyncio.create_subprocess_exec(
        "dig", "-p", str(port), "@127.0.0.1", "+tries=1", "+time=8", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return output.decode()
