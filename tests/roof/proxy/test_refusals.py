"""What the proxy does not do: lead around the egress policy (threats G25, G26), pass on what two could read differently, and
hold more than its bounds."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from netstack.api import Endpoint, OutwardProxy, TunnelRule, Way, WayOutRule
from pyvpnkit.proxy import conversation, origin
from pyvpnkit.proxy.http1 import MAX_HEAD
from tests.roof.proxy.house import House, Make, Servers, echo, head_of

# The egress policy

LOOPBACK = [
    "127.0.0.1", "127.0.0.2", "127.255.255.254", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.1",
    "017700000001", "0X7F.0.0.1", "0", "0.0.0.0", "0.1.2.3", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::ffff:0:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::5efe:127.0.0.1]", "[2001:db8::5efe:7f00:1]",
    "localhost", "LOCALHOST", "localhost.", "a.localhost",
]  # fmt: skip
METADATA = [
    "169.254.169.254", "169.254.170.2", "2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "[fd00:ec2::254]",
    "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "168.63.129.16", "100.100.100.200",
    "192.0.0.192", "[fe80::1]", "[fd20:ce::254]",
]  # fmt: skip
NOBODYS = ["224.0.0.1", "255.255.255.255", "240.0.0.1", "192.168.65.3", "192.168.65.255", "192.168.65.1", "[ff02::1]"]
SPELLINGS = LOOPBACK + METADATA + NOBODYS
REBOUND = ["127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fd00:ec2::254", "192.168.65.3"]

strict = pytest.mark.parametrize("house", [{"allow": ()}], indirect=True)


@pytest_asyncio.fixture
async def inside(house: House, server: Servers) -> AsyncIterator[list[bytes]]:
    """Requests that a server on the host's loopback got, v4 and v6; its port is `house.port`."""
    seen: list[bytes] = []
    house.port = await server(echo(seen))
    yield seen


def requests(host: str, port: int) -> list[tuple[str, int, list[str]]]:
    """The ways to name a host: where, and the request."""
    return [
        ("192.168.65.1", 3128, [f"GET http://{host}:{port}/ HTTP/1.1", "Host: x"]),
        ("192.168.65.1", 3129, [f"GET http://{host}:{port}/ HTTP/1.1", f"Host: {host}:{port}"]),
        ("192.168.65.1", 3128, ["GET / HTTP/1.1", f"Host: {host}:{port}"]),
        ("192.168.65.1", 3128, [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]),
        ("203.0.113.7", 80, ["GET / HTTP/1.1", f"Host: {host}:{port}"]),
        ("203.0.113.7", 80, [f"CONNECT {host}:{port} HTTP/1.1", "Host: x"]),
    ]


@strict
@pytest.mark.parametrize("upstream", [False, True], ids=["alone", "before another proxy"])
async def test_no_spelling_of_a_refused_address_gets_anywhere(
    house: House, proxy: Make, server: Servers, inside: list[bytes], upstream: bool
) -> None:
    """Six ways times all spellings: 403, and nobody was connected to, the other proxy included."""
    asked: list[bytes] = []
    other = await server(echo(asked))
    settings: dict[str, Any] = {"http": f"127.0.0.1:{other}", "https": f"127.0.0.1:{other}"}
    if not upstream:  # interception wants a proxy, and all are excluded from it
        settings["exclude"] = "*"
        house.names |= {name.lower().rstrip("."): ["127.0.0.1", "::1"] for name in LOOPBACK if "local" in name.lower()}
        house.names |= {"LOCALHOST": ["127.0.0.1"], "localhost.": ["127.0.0.1"]}
    proxy(settings | {"allow_enabled": True, "allow": ["*"]})
    for host in SPELLINGS:
        for address, port, lines in requests(host, house.port):
            status, _, body = await house.connect(port, address).ask(*lines)
            assert status == 403, (host, lines, body)
    assert inside == asked == []


@strict
@pytest.mark.parametrize("upstream", [False, True], ids=["alone", "before a proxy on this host"])
async def test_a_name_that_leads_there_gets_nowhere(
    house: House, proxy: Make, server: Servers, inside: list[bytes], upstream: bool
) -> None:
    asked: list[bytes] = []
    proxy(
        {
            "http": f"127.0.0.1:{await server(echo(asked))}",
            "exclude": "" if upstream else "*",
            "allow_enabled": True,
            "allow": ["*"],
        }
    )
    for number, address in enumerate(REBOUND):
        name = f"rebound{number}.test"
        house.names[name] = [address]
        for where, port, lines in requests(name, house.port):
            if port != 3129:
                assert (await house.connect(port, where).ask(*lines))[0] == 403, (address, lines)
    assert inside == asked == []


@strict
async def test_names_that_only_the_other_proxy_knows_do_not_wait_for_long(
    house: House, proxy: Make, server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def never(name: str) -> list[bytes]:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(origin, "JUDGE_S", 0.05)
    proxy({"http": f"127.0.0.1:{await server(echo([]))}"}, resolve=never)
    guest = house.connect()
    for _ in range(3):
        assert (await guest.ask("GET http://far.test/ HTTP/1.1", "Host: x"))[0] == 200
    assert asked == 1


@strict
async def test_names_are_not_looked_up_for_a_proxy_elsewhere(house: House, proxy: Make) -> None:
    house.names["proxy.test"] = ["203.0.113.99"]
    way = OutwardProxy("http", "127.0.0.1", 1)
    house.egress.ways_out.replace([WayOutRule(None, "", 0, way)])  # so that nobody outside is connected to
    proxy({"http": "proxy.test:3128"})
    status, _, body = await house.connect().ask("GET http://far.test/ HTTP/1.1", "Host: x")
    assert status == 503 and b"unable to connect to HTTP proxy 203.0.113.99:3128" in body
    assert set(house.asked) == {"proxy.test"}


@strict
async def test_of_several_addresses_those_that_are_refused_are_left_out(
    house: House, proxy: Make, inside: list[bytes]
) -> None:
    house.names["two.test"] = ["127.0.0.1", "192.168.65.2"]
    proxy({})
    guest = house.connect()
    assert (await guest.ask(f"GET http://two.test:{house.port}/ HTTP/1.1", "Host: x"))[0] == 200
    assert len(inside) == 1, "by the host alias, which guests may use"


@pytest.mark.parametrize("house", [{"allow": (), "host_alias": None}], indirect=True)
async def test_without_a_host_alias_its_names_mean_nothing(house: House, proxy: Make) -> None:
    proxy({})
    guest = house.connect()
    assert (await guest.ask("GET http://host.internal/ HTTP/1.1", "Host: x"))[0] == 503


@strict
async def test_the_policy_holds_for_what_is_intercepted(house: House, proxy: Make) -> None:
    proxy({"http": "127.0.0.1:1", "https": "127.0.0.1:1"})
    for address in ("169.254.169.254", "127.0.0.1", "192.168.65.9"):
        assert house.handler(address, 80) is None and house.handler(address, 443) is None


@strict
async def test_tunnels_take_what_the_proxy_connects_to(house: House, proxy: Make, tmp_path: Path) -> None:
    questions: list[object] = []

    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        questions.append(json.loads(await reader.readexactly(int.from_bytes(await reader.readexactly(2), "little"))))
        accepted = questions[-1]["dst_port"] != 81  # type: ignore[index]
        answer = json.dumps({"accepted": accepted}).encode()
        writer.write(len(answer).to_bytes(2, "little") + answer)
        if accepted:
            # Right behind it, so that nothing of it may be lost.
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        await reader.read()
        writer.close()

    path = str(tmp_path / "t.sock")
    running = await asyncio.start_unix_server(program, path)
    house.egress.tunnels.replace(
        [
            TunnelRule(ipaddress.ip_network("10.0.0.0/8"), 0, path),
            TunnelRule(ipaddress.ip_network("10.0.0.0/8"), 0, "/x"),
        ]
    )
    house.names["inner.test"] = ["10.1.2.3"]
    proxy({})
    assert (await house.connect().ask("GET http://inner.test/ HTTP/1.1", "Host: x"))[0] == 200
    assert (await house.connect().ask("GET http://inner.test:81/ HTTP/1.1", "Host: x"))[0] == 503
    proxy({"http": "10.0.0.1:3128"})
    assert (await house.connect().ask("GET http://other.test/ HTTP/1.1", "Host: x"))[0] == 200
    assert [(each["dst_ip"], each["dst_port"]) for each in questions] == [  # type: ignore[index]
        ("10.1.2.3", 80),
        ("10.1.2.3", 81),
        ("10.0.0.1", 3128),
    ]
    running.close()


async def test_ways_out_hold_for_the_proxy_and_fail_closed(
    house: House, proxy: Make, server: Servers, closed_port: int
) -> None:
    seen: list[bytes] = []

    async def connect_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    way = OutwardProxy("http", "127.0.0.1", await server(connect_proxy), "u", "secret")
    dead = OutwardProxy("socks5", "127.0.0.1", closed_port)
    house.egress.ways_out.replace(
        [
            WayOutRule(None, "corp.test", 0, way),
            WayOutRule(ipaddress.ip_network("203.0.113.9/32"), "", 0, Way.REFUSE),
            WayOutRule(None, "", 0, dead),
        ]
    )
    house.names |= {"www.corp.test": ["203.0.113.80"], "other.test": ["203.0.113.81"], "no.test": ["203.0.113.9"]}
    proxy({})
    assert (await house.connect().ask("GET http://www.corp.test/ HTTP/1.1", "Host: x"))[0] == 200
    assert head_of(seen[0])[0] == "CONNECT www.corp.test:80 HTTP/1.1"
    assert (await house.connect().ask("GET http://other.test/ HTTP/1.1", "Host: x"))[0] == 503
    status, _, body = await house.connect().ask("GET http://no.test/ HTTP/1.1", "Host: x")
    assert status == 403 and b"secret" not in body


# Requests


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a:0\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a:b:c\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {'a' * 300}\r\n\r\n", 400),
        ("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET http://a%2eb/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("CONNECT a: HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("CONNECT http://a:1/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 4\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\nabc", 400),
        (f"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: {'9' * 50}\r\n\r\nabc", 400),
        ("POST http://a/ HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        ("POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n", 501),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        ("GET http://a/ HTTP/1.9\r\nHost: a\r\n\r\n", 505),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n", 400),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
        ("GET  http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\nX: " + "x" * (MAX_HEAD + 10) + "\r\n\r\n", 431),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\n" + "X: y\r\n" * (MAX_HEAD // 5) + "\r\n", 431),
        ("GET http://a/ HTTP/1.1\r\nHost: a\r\nX: " + "x" * (3 * MAX_HEAD), 431),
        ("GET /" + "x" * (3 * MAX_HEAD), 431),
    ],
)
async def test_what_is_not_acceptable_is_refused_and_its_connection_ends(
    house: House, proxy: Make, request_: str, status: int
) -> None:
    proxy({})
    guest = house.connect()
    await guest.send(request_.encode("latin-1"))
    found, headers, body = await guest.answer()
    assert found == status, body
    assert headers["connection"] == "close" and b"</html>" in body
    assert await guest.rest() == b""
    assert house.asked == []


async def test_equal_lengths_become_one(house: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    proxy({"http": f"127.0.0.1:{await server(echo(seen))}"})
    status, _, body = await house.connect().ask(
        "POST http://a.test/ HTTP/1.1", "Host: a", "Content-Length: 3, 3", "Content-Length: 3", body=b"abc"
    )
    assert (status, body) == (200, b"abc") and head_of(seen[0])[1]["content-length"] == ["3"]


@pytest.mark.parametrize(
    "body",
    [
        "x\r\nabc",
        "-1\r\nabc",
        "0x3\r\nabc\r\n",
        "3\r\nabcd\r\n",
        "3\nabc\r\n",
        "3\r\nabcXX0\r\n\r\n",
        "f" * 40 + "\r\n",
    ],
)
async def test_chunks_that_are_none_end_the_exchange(house: House, proxy: Make, server: Servers, body: str) -> None:
    got = asyncio.get_running_loop().create_future()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.read())

    port = await server(script)
    house.names["a.test"] = ["127.0.0.1"]
    proxy({})
    guest = house.connect()
    await guest.send(
        f"POST http://a.test:{port}/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}GET / HTTP/1.1"
    )
    assert (await guest.answer())[0] == 400
    assert await guest.rest() == b""
    async with asyncio.timeout(20):
        heard = await got
    assert not heard.endswith(b"0\r\n\r\n"), "the server must not take the body for whole"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_page_says_what_is_wrong_and_escapes_it(house: House, proxy: Make, method: str) -> None:
    proxy({"allow_enabled": True, "allow_error_msg": "<b>%s</b>\r\nX-Evil: 1 é"})
    guest = house.connect()
    await guest.send(f"{method} http://a.test/ HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = (await guest.rest()).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 403 <b>a.test</b> X-Evil: 1\r\n") and "\r\nX-Evil" not in head
    assert ("&lt;b&gt;a.test&lt;/b&gt;" in body) == (method == "GET")
    assert bool(body) == (method == "GET")


# Bounds


async def test_connections_are_bounded_in_all_and_by_guest(house: House, proxy: Make) -> None:
    one = proxy({}, max_connections=5, max_per_guest=3)
    guests = [Endpoint.of(f"192.168.65.{number}", 1) for number in (3, 3, 3, 3, 4, 4, 4)]
    clients = [house.connect(guest=guest) for guest in guests]
    assert one.connections == 5 and one.counters["turned_away"] == 2
    for number in (3, 6):
        assert await clients[number].rest() == b""
    for client in clients:
        client.close()
    async with asyncio.timeout(20):
        while one.connections:  # noqa: ASYNC110  # tasks of the proxy end on their own
            await asyncio.sleep(0.002)
    assert (await house.connect().ask("GET / HTTP/1.0"))[0] == 400


async def test_who_asks_nothing_is_let_go(house: House, proxy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "HEAD_S", 0.1)
    proxy({}, idle_s=0.1)
    silent, slow = house.connect(), house.connect()
    await slow.send(b"GET / HT")
    assert await silent.rest() == b""
    assert (await slow.answer())[0] == 408


async def test_a_body_that_does_not_go_on_is_let_go(
    house: House, proxy: Make, server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "BODY_S", 0.1)
    proxy({"http": f"127.0.0.1:{await server(echo([]))}"})
    guest = house.connect()
    await guest.send(b"POST http://a.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
    assert (await guest.answer())[0] == 408


async def test_a_name_that_is_never_answered(house: House, proxy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(name: str) -> list[bytes]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(origin, "LOOKUP_S", 0.1)
    proxy({}, resolve=never)
    assert (await house.connect().ask("GET http://a.test/ HTTP/1.1", "Host: a"))[0] == 503


async def test_a_server_that_does_not_answer_the_connect(
    house: House, proxy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "CONNECT_S", 0.1)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        house.names["a.test"] = ["127.0.0.1"]
        proxy({})
        status, _, _ = await house.connect().ask(f"GET http://a.test:{full.getsockname()[1]}/ HTTP/1.1", "Host: a")
        assert status == 503
        for filler in fillers:
            filler.close()


async def test_descriptors_that_run_out_are_a_503(
    house: House, proxy: Make, server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scarce:
        def socket(self, *kind: int) -> Any:
            raise OSError(24, "Too many open files")

    port = await server(echo([]))
    house.names["a.test"] = ["127.0.0.1"]
    house.io.close()
    house.io = Scarce()  # type: ignore[assignment]
    house.io.close = lambda: None  # type: ignore[method-assign]
    proxy({})
    assert (await house.connect().ask(f"GET http://a.test:{port}/ HTTP/1.1", "Host: a"))[0] == 503


async def test_a_bug_ends_one_connection_and_is_counted(
    house: House, proxy: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = proxy({})

    async def broken(host: str) -> list[bytes]:
        raise KeyError("broken")

    other = house.connect()
    monkeypatch.setattr(one.outside, "addresses", broken)
    guest = house.connect()
    await guest.send(b"GET http://a.test/ HTTP/1.1\r\nHost: a\r\n\r\n")
    assert await guest.rest() == b""
    assert one.counters.pop("contained") == 1 and "contained: http proxy: KeyError" in caplog.text
    monkeypatch.undo()
    assert (await other.ask("GET http://a.test/ HTTP/1.1", "Host: a"))[0] == 503


def test_the_list_of_spellings_is_long_enough() -> None:
    """Threats G25: at least 60 spellings and 6 ways, with the names that lead there."""
    assert len(set(SPELLINGS)) + len(REBOUND) >= 60 and len(requests("a", 1)) == 6
