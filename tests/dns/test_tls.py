"""Resolvers asked over TLS: whose certificate is believed, and how a connection is used (RFC 7858, RFC 8310)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from dns import codec
from dns.askers import askers
from dns.server import Server as DnsServer
from dns.servers import ANY_NAME, Resolvers, Server, Upstream
from dns.tls import Certificates, TlsAsker
from netstack.errors import ConfigError, HostError
from tests.dns.support import a_reply, ask, framed, parse, query, read_framed

NAME = "dns.corp.example"


@dataclass
class Pki:
    """A certificate authority and a server certificate of it."""

    ca: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    directory = tmp_path_factory.mktemp("pki")

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=directory, check=True, capture_output=True, timeout=60)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test authority")
    openssl("req", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    (directory / "names").write_text(f"subjectAltName=DNS:{NAME},IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "server.pem", "-days", "2", "-extfile", "names"),
    )
    return Pki(directory / "ca.pem", directory / "server.pem", directory / "server.key")


Say = Callable[[bytes], None]


@dataclass
class Played:
    """A resolver behind TLS. `on_query` is given each query, a way to answer, and one to hang up."""

    port: int = 0
    connections: int = 0
    asked: list[bytes] = field(default_factory=list)
    alpn: list[str | None] = field(default_factory=list)
    on_query: Callable[[bytes, Say, Callable[[], None]], None] = lambda asked, say, hang_up: say(
        a_reply(asked, "10.0.0.1")
    )

    def server(self, name: str = NAME) -> Server:
        return Server(Upstream("127.0.0.1", self.port), tls=name)


@contextlib.asynccontextmanager
async def played(pki: Pki) -> AsyncIterator[Played]:
    made = Played()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.certificate, pki.key)
    context.set_alpn_protocols(["dot"])
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        made.alpn.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        writers.append(writer)
        with contextlib.suppress(OSError, EOFError):
            while True:
                asked = await read_framed(reader)
                made.asked.append(asked)
                made.on_query(asked, lambda reply: writer.write(framed(reply)), writer.transport.abort)
        writer.transport.abort()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    made.port = listener.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listener.close()
        for writer in writers:
            writer.transport.abort()
        await listener.wait_closed()
        await asyncio.sleep(0.01)  # transports close in the loop's next turns


@contextlib.asynccontextmanager
async def asker(server: Server, pki: Pki | None, idle_s: float = 30.0) -> AsyncIterator[TlsAsker]:
    made = TlsAsker(server, Certificates(None if pki is None else str(pki.ca)), idle_s=idle_s)
    try:
        yield made
    finally:
        made.close()
        await asyncio.sleep(0.01)


async def put(tls: TlsAsker, name: str, query_id: int = 0x1234) -> list[str]:
    """The addresses of `name`."""
    message = query(name, query_id=query_id)
    async with asyncio.timeout(10):
        answer = parse(await tls.ask(message, codec.question_end(message)))
    assert answer.header.id == query_id and str(answer.q.qname) == f"{name}."
    return [str(rr.rdata) for rr in answer.rr]


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("tls://192.0.2.53#dns.example", Server(Upstream("192.0.2.53", 853), tls="dns.example")),
        ("tls://192.0.2.53:8853#dns.example", Server(Upstream("192.0.2.53", 8853), tls="dns.example")),
        ("tls://[2001:db8::53]", Server(Upstream("2001:db8::53", 853), tls="2001:db8::53")),
        ("tls://2001:db8::53#*", Server(Upstream("2001:db8::53", 853), tls="*")),
        ("192.0.2.53#5353", Server(Upstream("192.0.2.53", 5353))),
    ],
)
def test_a_server_over_tls_is_written_as_an_address_and_a_name(text: str, server: Server) -> None:
    assert Server.parse(text) == server


@pytest.mark.parametrize("text", ["tls://dns.example", "tls://192.0.2.53#a..b", "tls://", "https://192.0.2.53"])
def test_what_is_no_server_over_tls_is_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.53"):
        Server.parse(text)


@pytest.mark.parametrize("name", [NAME, "127.0.0.1"])
async def test_a_server_with_a_certificate_for_its_name_is_asked(pki: Pki, name: str) -> None:
    async with played(pki) as upstream, asker(upstream.server(name), pki) as tls:
        assert await put(tls, "a.example") == ["10.0.0.1"]
        assert upstream.alpn == ["dot"]  # RFC 7858 as registered with IANA
        assert upstream.asked[0][2:] == query("a.example")[2:], "relayed as it is, but for the id"


@pytest.mark.parametrize("case", ["another name", "an authority we do not trust"])
async def test_a_server_that_is_not_who_it_should_be_is_told_nothing(pki: Pki, case: str) -> None:
    trusted, name = (pki, "other.example") if case == "another name" else (None, NAME)
    async with played(pki) as upstream, asker(upstream.server(name), trusted) as tls:
        with pytest.raises(HostError, match=f"127.0.0.1:{upstream.port}.*certificate"):
            await put(tls, "secret.corp.example")
        assert upstream.asked == []


async def test_any_certificate_will_do_when_that_is_asked_for(pki: Pki) -> None:
    async with played(pki) as upstream, asker(upstream.server(ANY_NAME), None) as tls:
        assert await put(tls, "a.example") == ["10.0.0.1"]


async def test_many_questions_share_a_connection_and_are_answered_in_any_order(pki: Pki) -> None:
    async with played(pki) as upstream, asker(upstream.server(), pki) as tls:
        held: list[tuple[bytes, Say]] = []

        def answer_backwards(asked: bytes, say: Say, hang_up: Callable[[], None]) -> None:
            held.append((asked, say))
            if len(held) == 100:
                for number, (message, to) in enumerate(reversed(held)):
                    to(a_reply(message, f"10.0.1.{99 - number}"))

        upstream.on_query = answer_backwards
        async with asyncio.TaskGroup() as group:  # all under the same id of their askers
            tasks = [group.create_task(put(tls, f"n{number}.example")) for number in range(100)]
        by_name = {str(parse(message).q.qname): f"10.0.1.{place}" for place, (message, _) in enumerate(held)}
        assert [task.result() for task in tasks] == [[by_name[f"n{number}.example."]] for number in range(100)]
        assert upstream.connections == 1
        assert len({message[:2] for message, _ in held}) == 100, "each on its own id"


async def test_a_connection_the_server_closes_is_made_again(pki: Pki) -> None:
    async with played(pki) as upstream, asker(upstream.server(), pki) as tls:
        assert await put(tls, "first.example") == ["10.0.0.1"]
        usual = upstream.on_query

        def hang_up_once(asked: bytes, say: Say, hang_up: Callable[[], None]) -> None:
            upstream.on_query = usual
            hang_up()

        upstream.on_query = hang_up_once
        assert await put(tls, "second.example") == ["10.0.0.1"]
        assert upstream.connections == 2


async def test_a_changed_network_takes_a_new_connection_and_asks_again(pki: Pki) -> None:
    async with played(pki) as resolver:
        arrived = asyncio.Event()
        own = DnsServer(
            hosts_path=None,
            source=lambda: Resolvers(servers=(resolver.server(),)),
            asker_for=askers(cafile=str(pki.ca)),
        )
        resolver.on_query = lambda asked, say, hang_up: arrived.set()
        waiting = asyncio.create_task(ask(own, query("a.example")))
        async with asyncio.timeout(10):
            await arrived.wait()
            resolver.on_query = lambda asked, say, hang_up: say(a_reply(asked, "10.0.0.2"))
            own.network_changed()
            answer = parse(await waiting)
        assert [str(rr.rdata) for rr in answer.rr] == ["10.0.0.2"]
        assert resolver.connections == 2
        own.close()


async def test_a_connection_without_questions_is_closed(pki: Pki) -> None:
    async with played(pki) as upstream, asker(upstream.server(), pki, idle_s=0.05) as tls:
        for connections in (1, 2):
            assert await put(tls, "a.example") == ["10.0.0.1"]
            assert upstream.connections == connections
            await asyncio.sleep(0.5)


async def test_a_server_that_speaks_no_tls_is_an_error_of_the_host(pki: Pki) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(framed(a_reply(query("a.example"), "10.0.0.6")))
        await reader.read(1)
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with asker(Server(Upstream("127.0.0.1", port), tls=NAME), pki) as tls:
        with pytest.raises(HostError, match=f"127.0.0.1:{port}"):
            await put(tls, "a.example")
    listener.close()
    await listener.wait_closed()
    async with asker(Server(Upstream("127.0.0.1", port), tls=NAME), pki) as tls:
        with pytest.raises(HostError, match=f"127.0.0.1:{port}"):
            await put(tls, "a.example")


async def test_authorities_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    nobody = TlsAsker(Server(Upstream("127.0.0.1", 9), tls=NAME), Certificates(str(tmp_path / "none.pem")))
    for _ in range(2):
        with pytest.raises(HostError, match=r"certificates in .*none\.pem.*No such file"):
            await put(nobody, "a.example")
    nobody.close()


async def test_who_waits_is_told_when_the_server_is_not_wanted_any_more(pki: Pki) -> None:
    async with played(pki) as upstream, asker(upstream.server(), pki) as tls:
        arrived = asyncio.Event()
        upstream.on_query = lambda asked, say, hang_up: arrived.set()
        waiting = asyncio.create_task(put(tls, "a.example"))
        await arrived.wait()
        tls.close()
        with pytest.raises(HostError):
            await waiting
        with pytest.raises(HostError):
            await put(tls, "b.example")


async def test_a_guest_is_answered_over_tls_and_gets_servfail_rather_than_clear_text(pki: Pki) -> None:
    async with played(pki) as upstream:
        for name, expected in ((NAME, codec.NOERROR), ("other.example", codec.SERVFAIL)):
            source = partial(Resolvers, servers=(upstream.server(name),))
            server = DnsServer(hosts_path=None, source=source, asker_for=askers(cafile=str(pki.ca)))
            try:
                assert parse(await ask(server, query("a.example"))).header.rcode == expected
            finally:
                server.close()
                await asyncio.sleep(0.01)
        assert len(upstream.asked) == 1
