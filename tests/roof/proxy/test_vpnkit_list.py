"""VPNKit's own list of what its HTTP proxy must do (spec vpnkit 9.1), row by row, and what it learnt (10, HTTP)."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import pytest

from tests.roof.proxy.house import GATEWAY, House, Make, Script, Servers, echo, head_of

SITE = "www.mobyproject.org"
OUTSIDE = "203.0.113.80"

PROXIES = [
    pytest.param("http://127.0.0.1:{}", None, id="address"),
    pytest.param("http://user:password@127.0.0.1:{}", "user:password", id="with credentials"),
    pytest.param("http://localhost:{}", None, id="localhost"),
    pytest.param("http://name1.for.localhost:{}", None, id="first host name"),
    pytest.param("http://name2.for.localhost:{}", None, id="second host name"),
]
named = pytest.mark.parametrize(
    "house", [{"host_names": ("name1.for.localhost", "name2.for.localhost"), "allow": ()}], indirect=True
)
five = pytest.mark.parametrize(("url", "credentials"), PROXIES)


async def test_interception(house: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    proxy({"http": f"127.0.0.1:{await server(echo(seen))}"})
    guest = house.connect(80, OUTSIDE)
    status, _, _ = await guest.ask("GET / HTTP/1.1", f"Host: {SITE}", "X-Test: kept", "User-Agent: ocaml")
    assert status == 200
    first, headers = head_of(seen[0])
    assert first == f"GET http://{SITE}:80/ HTTP/1.1"
    assert headers == {"host": [SITE], "x-test": ["kept"], "user-agent": ["ocaml"]}


# HTTP proxy/...


async def test_connect(house: House, proxy: Make, server: Servers) -> None:
    async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(4))[::-1])
        await writer.drain()

    house.names["server.test"] = ["127.0.0.1"]
    proxy({"allow_enabled": True, "allow": ["server.test"]})
    port = await server(ping)
    guest = house.connect()
    await guest.send(f"CONNECT server.test:{port} HTTP/1.1\r\nHost: server.test:{port}\r\n\r\nping")
    assert await guest.until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
    assert await guest.rest() == b"gnip"


async def test_connect_rejected(house: House, proxy: Make) -> None:
    proxy({"allow_enabled": True, "allow": ["server.test"]})
    guest = house.connect()
    await guest.send(f"CONNECT {SITE}:443 HTTP/1.1\r\nHost: {SITE}:443\r\n\r\n")
    answer = (await guest.rest()).decode()
    words = f"Connections to {SITE} are forbidden by policy. Please contact your IT administrator."
    assert answer.startswith(f"HTTP/1.1 403 {words}\r\n")
    assert words in answer.partition("\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["CONNECT", "GET"])
async def test_connect_fails(house: House, proxy: Make, method: str, closed_port: int) -> None:
    proxy({})
    guest = house.connect()
    target = f"host.internal:{closed_port}"
    status, _, body = await guest.ask(
        f"{method} {'' if method == 'CONNECT' else 'http://'}{target} HTTP/1.1", f"Host: {target}"
    )
    assert status == 503
    assert f"unable to connect to 127.0.0.1:{closed_port}. Do you need an HTTP proxy?".encode() in body


async def test_get_bad_host(house: House, proxy: Make) -> None:
    proxy({})
    status, _, body = await house.connect().ask("GET http://nobody.test/ HTTP/1.1", "Host: nobody.test")
    assert status == 503 and b"Failed to lookup host: nobody.test" in body


async def test_get_good_host_and_headers(house: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    port = await server(echo(seen))
    house.names["good.test"] = ["127.0.0.1"]
    proxy({})
    status, _, _ = await house.connect().ask(f"GET http://good.test:{port}/a?b HTTP/1.1", f"Host: good.test:{port}")
    assert status == 200
    assert seen == [f"GET /a?b HTTP/1.1\r\nHost: good.test:{port}\r\n\r\n".encode()]


@named
@pytest.mark.parametrize("host", ["192.168.65.2", "name1.for.localhost", "name2.for.localhost", "NAME1.For.LocalHost."])
async def test_get_to_localhost_via_ip_and_hostname(house: House, proxy: Make, server: Servers, host: str) -> None:
    seen: list[bytes] = []
    port = await server(echo(seen))
    proxy({"http": "127.0.0.1:1"})
    status, _, _ = await house.connect().ask(f"GET http://{host}:{port}/ HTTP/1.1", f"Host: {host}:{port}")
    assert status == 200 and len(seen) == 1
    assert house.asked == []


async def test_transparent_excludes(house: House, proxy: Make, server: Servers, closed_port: int) -> None:
    seen: list[bytes] = []
    port = await server(echo(seen))
    house.names["direct.test"] = ["127.0.0.1"]
    proxy({"http": f"127.0.0.1:{closed_port}", "exclude": "direct.test", "transparent_http_ports": [port]})
    guest = house.connect(port, OUTSIDE)
    assert (await guest.ask("GET / HTTP/1.1", "Host: direct.test"))[0] == 200
    assert head_of(seen[0])[0] == "GET / HTTP/1.1"
    status, _, body = await guest.ask("GET / HTTP/1.1", "Host: other.test")
    assert status == 503 and f"unable to connect to HTTP proxy 127.0.0.1:{closed_port}".encode() in body


@pytest.mark.parametrize("headers", [b"Connection: close\r\n", b""], ids=["connection close", "implicit close"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("asked", ["1.0", "1.1"])
async def test_a_body_until_the_end(
    house: House, proxy: Make, server: Servers, headers: bytes, version: bytes, asked: str
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/%s 200 OK\r\n%s\r\nhello " % (version, headers))
        await writer.drain()
        writer.write(b"there")

    port = await server(script)
    house.names["s.test"] = ["127.0.0.1"]
    proxy({})
    guest = house.connect()
    await guest.send(f"GET http://s.test:{port}/ HTTP/{asked}\r\nHost: s.test\r\nConnection: close\r\n\r\n")
    answer = await guest.rest()
    if asked == "1.0":
        assert b"chunked" not in answer and answer.endswith(b"\r\n\r\nhello there")
    else:
        assert answer.endswith(b"\r\n0\r\n\r\n"), "an end that can be told from a broken connection"


# HTTP x5 proxy URLs/...


@five
@named
async def test_uri_and_headers(house: House, proxy: Make, server: Servers, url: str, credentials: str | None) -> None:
    """Relative becomes absolute, absolute stays so; X-..., User-Agent and Authorization are kept, credentials added."""
    seen: list[bytes] = []
    proxy({"http": url.format(await server(echo(seen)))})
    headers = [
        "User-Agent: whatever",
        "Authorization: Basic c2VjcmV0",
        "X-Hello: World",
        "Proxy-Authorization: Basic eA==",
    ]
    for guest, target in (
        (house.connect(80, OUTSIDE), "/path"),
        (house.connect(80, OUTSIDE), f"http://{SITE}/path"),
        (house.connect(), f"http://{SITE}/path"),
    ):
        assert (await guest.ask(f"GET {target} HTTP/1.1", f"Host: {SITE}", *headers))[0] == 200
    expected = {"host": [SITE], "user-agent": ["whatever"], "authorization": ["Basic c2VjcmV0"], "x-hello": ["World"]}
    if credentials is not None:
        expected["proxy-authorization"] = ["Basic " + base64.b64encode(credentials.encode()).decode()]
    assert [head_of(head) for head in seen] == [(f"GET http://{SITE}:80/path HTTP/1.1", expected)] * 3


def tunnel_server(seen: list[bytes], answer: bytes = b"HTTP/1.1 200 OK\r\n\r\nhello") -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        while octets := await reader.read(1000):
            writer.write(octets)
            await writer.drain()

    return script


@five
@named
async def test_connect_tunnel_and_connect_forwarded(
    house: House, proxy: Make, server: Servers, url: str, credentials: str | None
) -> None:
    seen: list[bytes] = []
    proxy({"https": url.format(await server(tunnel_server(seen)))})
    through = house.connect(443, "1.2.3.4")
    await through.send(b"TLS")
    assert await through.exactly(8) == b"helloTLS"
    guest = house.connect(3129)
    await guest.send(b"CONNECT 1.2.3.4:443 HTTP/1.1\r\nHost: 1.2.3.4:443\r\n\r\nTLS")
    assert await guest.until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
    assert await guest.exactly(8) == b"helloTLS"
    expected = {"host": ["1.2.3.4:443"]}
    if credentials is not None:
        expected["proxy-authorization"] = ["Basic " + base64.b64encode(credentials.encode()).decode()]
    assert [head_of(head) for head in seen] == [("CONNECT 1.2.3.4:443 HTTP/1.1", expected)] * 2


async def test_head_then_get_on_one_connection(house: House, proxy: Make, server: Servers) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for body in (b"", b"hello"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)
            await writer.drain()

    port = await server(script)
    proxy({"http": f"127.0.0.1:{port}"})
    guest = house.connect(80, OUTSIDE)
    status, headers, _ = await guest.ask("HEAD / HTTP/1.1", "Host: s.test")
    assert status == 200 and headers["content-length"] == "5"
    assert await guest.ask("GET / HTTP/1.1", "Host: s.test") == (200, {"content-length": "5"}, b"hello")


# What VPNKit learnt (spec vpnkit 10), and its [Q] marks.


@pytest.mark.parametrize("status", ["403 Forbidden", "502 Bad Gateway", "301 Moved"])
async def test_a_tunnel_is_only_what_the_proxy_says_2xx_to(
    house: House, proxy: Make, server: Servers, status: str
) -> None:
    seen: list[bytes] = []
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 4\r\n\r\nnope".encode()
    one = proxy({"https": f"127.0.0.1:{await server(tunnel_server(seen, answer))}"})
    guest = house.connect(443, "1.2.3.4")
    await guest.send(b"client hello")
    with pytest.raises(ConnectionResetError):
        await guest.rest()
    assert one.counters["tunnels_failed"] == 1
    explicit = house.connect(3129)
    found, _, body = await explicit.ask("CONNECT 1.2.3.4:443 HTTP/1.1", "Host: 1.2.3.4:443")
    assert (found, body) == (int(status[:3]), b"nope")


async def test_intercepted_tls_goes_to_the_port_it_was_meant_for(house: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    upstream = await server(tunnel_server(seen))
    proxy({"https": f"127.0.0.1:{upstream}", "transparent_https_ports": [8443], "exclude": "1.2.3.0/24 .x"})
    await house.connect(8443, "1.2.4.4").exactly(5)
    assert seen[0].startswith(b"CONNECT 1.2.4.4:8443 HTTP/1.1\r\n")
    assert house.handler("1.2.3.4", 8443) is None and house.handler("1.2.4.4", 443) is None


async def test_a_request_without_host_is_for_the_address_it_went_to(house: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    proxy({"http": f"127.0.0.1:{await server(echo(seen))}"})
    guest = house.connect(80, OUTSIDE)
    await guest.send(b"GET /x HTTP/1.0\r\n\r\n")
    assert (await guest.rest()).startswith(b"HTTP/1.1 200 OK\r\n")
    assert head_of(seen[0]) == (f"GET http://{OUTSIDE}:80/x HTTP/1.1", {"host": [OUTSIDE]})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["GET http://a.test:8080/x HTTP/1.1", "Host: liar.test"], ("http://a.test:8080/x", "a.test:8080")),
        (["GET http://u:p@a.test HTTP/1.1", "Host: a.test"], ("http://a.test:80/", "a.test")),
        (["GET HTTP://a.test?q=1#f HTTP/1.1", "Host: a.test"], ("http://a.test:80/?q=1", "a.test")),
        (["GET http://[2001:db8::1]:81/ HTTP/1.1", "Host: x"], ("http://[2001:db8::1]:81/", "[2001:db8::1]:81")),
        (["OPTIONS * HTTP/1.1", "Host: a.test:81"], ("http://a.test:81", "a.test:81")),
        (["GET / HTTP/1.1", "Host: a.test:"], ("http://a.test:80/", "a.test")),
    ],
)
async def test_how_a_proxy_is_asked(
    house: House, proxy: Make, server: Servers, given: Sequence[str], expected: tuple[str, str]
) -> None:
    seen: list[bytes] = []
    proxy({"http": f"127.0.0.1:{await server(echo(seen))}"})
    assert (await house.connect().ask(*given))[0] == 200
    first, headers = head_of(seen[0])
    assert (first.split()[1], headers["host"]) == (expected[0], [expected[1]])


async def test_nobody_serves_the_ports_until_there_is_a_document(house: House, proxy: Make) -> None:
    one = proxy()
    assert house.handler(GATEWAY, 3128) is None
    one.post(b"{}")
    assert house.handler(GATEWAY, 3128) is not None and house.handler(GATEWAY, 3129) is not None
    assert house.handler(OUTSIDE, 80) is None and house.handler(OUTSIDE, 443) is None
