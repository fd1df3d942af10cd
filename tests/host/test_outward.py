"""The ways out as one object, with real proxies on loopback: names in threads, and connections of our own services."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from netstack.api import Endpoint
from netstack.errors import ConfigError, HostError
from netstack.host import outward
from netstack.host.outward import WaysOut
from netstack.host.ways_out import Upstream
from netstack.settings import Network
from netstack.stack import Stack

FAR = Endpoint.of("203.0.113.9", 443)
"""Nobody has it (RFC 5737): whoever is reached there is reached through a proxy."""
LIMIT_S = 20.0


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    made = Stack(Network())
    yield made
    made.close()


@dataclass
class Proxy:
    """A listener that plays a script: it hears so many octets, and says these."""

    script: list[tuple[int, bytes]]
    heard: list[bytes] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for octets, says in self.script:
                self.heard.append(await reader.readexactly(octets))
                writer.write(says)
            writer.write(await reader.read(100))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


SOCKS = [(3, b"\5\0"), (10, b"\5\0\0\1" + bytes(6) + b"hello")]
REFUSES = [(3, b"\5\0"), (10, b"\5\5\0\1" + bytes(6))]
HTTP_ASKED = b"CONNECT name.example:443 HTTP/1.1\r\nHost: name.example:443\r\n\r\n"


@pytest.fixture
async def proxy() -> AsyncIterator[Callable[..., Awaitable[Proxy]]]:
    servers: list[asyncio.Server] = []

    async def make(script: list[tuple[int, bytes]], host: str = "127.0.0.1") -> Proxy:
        made = Proxy(script)
        server = await asyncio.start_server(made.serve, host, 0)
        servers.append(server)
        made.port = server.sockets[0].getsockname()[1]
        return made

    yield make
    for server in servers:
        server.close()
        await server.wait_closed()


def started(stack: Stack, *rules: str, **options: object) -> WaysOut:
    made = WaysOut(stack, rules, **options)  # type: ignore[arg-type]
    made.start(asyncio.get_running_loop())
    return made


def upstream(stack: Stack) -> Upstream:
    (found,) = stack.upstreams.all()
    return found


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # what another thread does
            await asyncio.sleep(0.005)


async def talk(sock: socket.socket, first: bytes) -> None:
    loop = asyncio.get_running_loop()
    with sock:
        assert await loop.sock_recv(sock, 100) == first
        await loop.sock_sendall(sock, b"question")
        assert await loop.sock_recv(sock, 100) == b"question"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_connection_of_ours_goes_through_the_proxy(
    stack: Stack, proxy: Callable[..., Awaitable[Proxy]], host: str
) -> None:
    server = await proxy(SOCKS, host)
    where = f"[{host}]" if ":" in host else host
    ways = started(stack, f"* -> socks5://{where}:{server.port}")
    await talk(await ways.connect(FAR, "name.example"), b"hello")
    assert server.heard == [b"\5\1\0", b"\5\1\0\1" + FAR.address + b"\1\xbb"]
    assert upstream(stack).carried == 1
    ways.close()


async def test_http_is_told_the_name(stack: Stack, proxy: Callable[..., Awaitable[Proxy]]) -> None:
    server = await proxy([(len(HTTP_ASKED), b"HTTP/1.1 200 OK\r\n\r\nhello")])
    ways = started(stack, f"name.example -> http://127.0.0.1:{server.port}", "* -> refuse")
    await talk(await ways.connect(FAR, "name.example"), b"hello")
    assert server.heard == [HTTP_ASKED]
    with pytest.raises(HostError, match="refuses"):
        await ways.connect(FAR)
    ways.close()


async def test_loopback_and_what_no_rule_takes_are_reached_directly(
    stack: Stack, proxy: Callable[..., Awaitable[Proxy]]
) -> None:
    server = await proxy([(0, b"hello")])
    ways = started(stack, "* -> refuse")
    await talk(await ways.connect(Endpoint.of("127.0.0.1", server.port)), b"hello")
    ways.close()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


async def test_what_fails_is_told_and_closed(stack: Stack, proxy: Callable[..., Awaitable[Proxy]]) -> None:
    server = await proxy(REFUSES)
    silent = await proxy([(100, b"")])
    ends = await proxy([(3, b"\5")])
    ways = started(stack, connect_s=0.5)
    for rule, words in (
        (f"* -> socks5://me:SECRET@127.0.0.1:{closed_port()}", "refused"),
        (f"* -> socks5://127.0.0.1:{server.port}", "connection refused"),
        (f"* -> socks5://127.0.0.1:{silent.port}", "within 0.5 s"),
        (f"* -> socks5://127.0.0.1:{ends.port}", "within 0.5 s|version|without an answer|reset"),
    ):
        ways.replace([rule])
        with pytest.raises(HostError, match=words) as caught:
            await ways.connect(FAR)
        assert "SECRET" not in str(caught.value) + str(ways.status())
        assert upstream(stack).failed == 1
    ways.close()


async def test_fail_open_goes_around_a_proxy_that_is_down(
    stack: Stack, proxy: Callable[..., Awaitable[Proxy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await proxy([(0, b"hello")])
    monkeypatch.setattr(outward, "_where", lambda endpoint: (socket.AF_INET, ("127.0.0.1", server.port)))
    ways = started(stack, f"* -> socks5://127.0.0.1:{closed_port()}", fail="open")
    await talk(await ways.connect(FAR), b"hello")
    ways.replace([f"* -> socks5://127.0.0.1:{closed_port()}"])
    with pytest.raises(HostError):
        await ways.connect(FAR)
    ways.close()


class Resolver:
    """Answers in the order it is told, in the thread that asks; while `held` it waits."""

    def __init__(self) -> None:
        self.answers: list[Sequence[str] | OSError] = []
        self.asked: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        assert self.free.wait(LIMIT_S)
        answer = self.answers.pop(0) if self.answers else OSError(errno.EIO, "no such name")
        if isinstance(answer, OSError):
            raise answer
        return answer


async def test_connections_wait_for_the_name_of_the_proxy(stack: Stack, proxy: Callable[..., Awaitable[Proxy]]) -> None:
    server = await proxy(SOCKS)
    resolver = Resolver()
    resolver.free.clear()
    resolver.answers = [["127.0.0.1", "127.0.0.1"]]
    ways = started(stack, f"* -> socks5://proxy.example:{server.port}", resolve=resolver)
    connecting = asyncio.create_task(ways.connect(FAR))
    await until(lambda: bool(resolver.asked))
    assert upstream(stack).resolving and not connecting.done()
    resolver.free.set()
    await talk(await connecting, b"hello")
    assert ways.status()["proxies"][0]["addresses"] == ["127.0.0.1"]
    ways.close()


async def test_a_name_that_is_not_resolved_is_asked_for_again(
    stack: Stack, proxy: Callable[..., Awaitable[Proxy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outward, "RETRY_S", 0.01)
    monkeypatch.setattr(outward, "PAUSE_S", 0.0)
    server = await proxy(SOCKS)
    resolver = Resolver()
    resolver.answers = [OSError(errno.EIO, "down"), OSError(errno.EIO, "down"), ["127.0.0.1"]]
    ways = started(stack, f"* -> socks5://proxy.example:{server.port}", resolve=resolver)
    await until(lambda: "down" in upstream(stack).last_error)
    await until(lambda: bool(upstream(stack).addresses))
    assert len(resolver.asked) == 3
    await talk(await ways.connect(FAR), b"hello")
    ways.close()


async def test_a_proxy_that_moved_is_found_again_and_a_resolver_that_is_down_takes_nothing_away(
    stack: Stack, proxy: Callable[..., Awaitable[Proxy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outward, "PAUSE_S", 0.0)
    server = await proxy(SOCKS)
    resolver = Resolver()
    resolver.answers = [["127.0.0.99"], ["127.0.0.1"]]
    ways = started(stack, f"* -> socks5://proxy.example:{server.port}", resolve=resolver)
    with pytest.raises(HostError, match="refused"):
        await ways.connect(FAR)
    await until(lambda: ways.status()["proxies"][0]["addresses"] == ["127.0.0.1"])
    await talk(await ways.connect(FAR), b"hello")
    ways.refresh()
    await until(lambda: "no such name" in upstream(stack).last_error)
    assert upstream(stack).addresses
    ways.close()


async def test_many_failures_ask_once_in_a_while(stack: Stack) -> None:
    resolver = Resolver()
    ways = started(stack, "* -> socks5://proxy.example:1", resolve=resolver, connect_s=0.5)
    await until(lambda: not upstream(stack).resolving)
    for _ in range(20):
        with pytest.raises(HostError, match="not resolved"):
            await ways.connect(FAR)
    assert len(resolver.asked) == 1
    ways.close()


async def test_the_end_comes_while_a_resolver_hangs(stack: Stack) -> None:
    resolver = Resolver()
    resolver.free.clear()
    ways = started(stack, "* -> socks5://proxy.example:1", resolve=resolver)
    connecting = asyncio.create_task(ways.connect(FAR))
    await until(lambda: bool(resolver.asked))
    ways.close()
    with pytest.raises(HostError):
        await connecting
    resolver.free.set()
    await until(lambda: not upstream(stack).resolving)
    assert stack.ways_out, "the rules hold on"


async def test_a_change_of_the_network_during_a_look_up_asks_again(stack: Stack) -> None:
    resolver = Resolver()
    resolver.free.clear()
    resolver.answers = [["192.0.2.1"], ["192.0.2.2"]]
    ways = started(stack, "* -> socks5://proxy.example:1", resolve=resolver)
    await until(lambda: bool(resolver.asked))
    ways.refresh()
    assert len(resolver.asked) == 1
    resolver.free.set()
    await until(lambda: ways.status()["proxies"][0]["addresses"] == ["192.0.2.2"])
    ways.close()


async def test_a_proxy_that_is_down_is_told_once_in_a_while(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    ways = started(stack, f"* -> socks5://me:SECRET@127.0.0.1:{closed_port()}")
    for _ in range(5):
        with pytest.raises(HostError):
            await ways.connect(FAR)
    (record,) = caplog.records
    assert "refused; connections fail" in record.message and "SECRET" not in record.message
    ways.close()


async def test_rules_that_cannot_be_used_leave_those_before(stack: Stack) -> None:
    ways = started(stack, "* -> refuse")
    for rules, options in (
        (["* -> nowhere"], {}),
        (["* -> direct"], {"fail": "perhaps"}),
        (["* -> direct"], {"datagrams": "perhaps"}),
        (["* -> direct"] * 2000, {}),
    ):
        with pytest.raises(ConfigError):
            ways.replace(rules, **options)
    with pytest.raises(HostError, match="refuses"):
        await ways.connect(FAR)
    assert ways.status() == {"fail": "closed", "datagrams": "auto", "rules": ["* -> refuse"], "proxies": []}
    ways.close()


@pytest.mark.parametrize(
    ("fail", "datagrams", "direct"),
    [
        ("closed", "auto", False),
        ("open", "auto", True),
        ("closed", "direct", True),
        ("open", "refuse", False),
    ],
)
async def test_datagrams_follow_fail_unless_told_otherwise(
    stack: Stack, fail: str, datagrams: str, direct: bool
) -> None:
    ways = started(stack, fail=fail, datagrams=datagrams)
    assert stack.ways_out.datagrams is direct
    ways.close()
