"""gvproxy's HTTP API (spec gvproxy 1.3, 1.4, 7): forwards, DNS zones, leases, numbers, and `/tunnel` and `/connect`.

As Go's `net/http` answers: errors are a line of plain text, JSON ends in a newline and is sniffed as plain text by its writer, a
success without words is an empty 200. Data comes from callables, so that this module knows neither stack nor DNS. `/tunnel` and
`/connect` need a listener behind `portfwd.hijack.Doorway(server, HIJACKED)`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from aiohttp import web

from netstack.api import Dialer, Endpoint
from netstack.errors import NetstackError
from portfwd import bodies
from portfwd.bodies import BadBody
from portfwd.gvproxy_forwards import Forwards, Proxy, Refused
from portfwd.hijack import NotTaken, Taken, hijack

log = logging.getLogger("pyvpnkit.portfwd")

HIJACKED: Final = frozenset({"/connect", "/tunnel"})
MAX_BODY: Final = 256 * 1024
"""A zone may be long; all else is a line."""
WAIT_S: Final = 10
"""Of `/extension/wait_port` without `timeout`."""
MAX_WAIT_S: Final = 600
MAX_WAITS: Final = 64
"""Of `/extension/wait_port` at once."""
AGAIN_S: Final = 0.25
LOOK_S: Final = 0.05
_ACCEPTED: Final = ("ESTABLISHED", "CLOSE-WAIT")
_HAD_ACCEPTED: Final = ("closed", "reset by guest")

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Asking: TypeAlias = Callable[[web.Request], Endpoint | None]
"""Which guest sent a request; `None` is a user of the host."""


class ZoneTable(Protocol):
    """The DNS zones (`dns.zones.Zones`)."""

    def add_document(self, document: Any) -> None:
        """A zone as gvproxy writes it; raises `ConfigError`."""
        ...

    def documents(self) -> list[dict[str, Any]]:
        """All of them, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppliers:
    """Where the answers come from."""

    zones: ZoneTable
    leases: Callable[[], Mapping[str, str]]
    """Address -> MAC, the gateway's and fixed ones too."""
    cam: Callable[[], Mapping[str, int]]
    """MAC -> number of the port of the switch behind which it was seen."""
    stats: Callable[[], Mapping[str, Any]]
    """Counters; among them `BytesSent` and `BytesReceived`."""
    dialer: Dialer
    gateway: bytes
    """Our address in the network, from which guests' ports are tried."""
    state: Callable[[Endpoint, Endpoint], str | None]
    """State of the connection between a guest's endpoint and one of the gateway; `None` when there is no such connection."""
    attach: Callable[[socket.socket, int | None], None]
    """Own a stream socket that carries u16 little-endian lengths and frames, none sent longer than the given MTU + 14; raises a
    `NetstackError` when it becomes no link, and has closed it then."""


def answer(document: Any) -> web.Response:
    """JSON as Go's encoder and sniffer send it."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False) + "\n"
    return web.Response(text=text, content_type="text/plain", charset="utf-8")


def failure(status: int, message: str) -> web.Response:
    """As Go's `http.Error`."""
    headers = {"X-Content-Type-Options": "nosniff"}
    return web.Response(status=status, text=f"{message}\n", content_type="text/plain", charset="utf-8", headers=headers)


def guarded(handler: Handler) -> Handler:
    """Every failure becomes its line of text."""

    async def run(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (BadBody, Refused) as error:
            return failure(error.status, str(error))
        except (NetstackError, NotTaken) as error:
            return failure(400, str(error))
        except Exception:  # a bug of ours costs this request
            log.exception("%s %s", request.method, request.path)
            return failure(500, "internal server error")

    return run


async def not_found(_request: web.Request) -> web.Response:
    """As Go's multiplexer."""
    return failure(404, "404 page not found")


async def posted(request: web.Request, limit: int = MAX_BODY) -> dict[str, Any]:
    """The JSON object of a POST; raises `BadBody`. Other methods are 400 here, and the content type is not looked at."""
    if request.method != "POST":
        raise BadBody("post only")
    return bodies.fields(await bodies.read(request, limit))


def forwarder_routes(forwards: Forwards, asking: Asking, max_body: int = MAX_BODY) -> list[web.RouteDef]:
    """`/services/forwarder/{all,expose,unexpose}`, all that a guest may have."""

    async def all_(request: web.Request) -> web.Response:
        return answer([proxy.document() for proxy in forwards.all(asking(request))])

    async def expose(request: web.Request) -> web.Response:
        found = await posted(request, max_body)
        protocol = bodies.text(found, "protocol") or "tcp"
        proxy = Proxy(bodies.text(found, "local"), protocol, bodies.text(found, "remote"))
        forwards.expose(proxy, asking(request))
        return web.Response()

    async def unexpose(request: web.Request) -> web.Response:
        found = await posted(request, max_body)
        local, protocol = bodies.text(found, "local"), bodies.text(found, "protocol") or "tcp"
        forwards.unexpose(local, protocol, asking(request))
        return web.Response()

    table = {"all": all_, "expose": expose, "unexpose": unexpose}
    return [web.route("*", f"/services/forwarder/{name}", guarded(handler)) for name, handler in table.items()]


def routes(forwards: Forwards, suppliers: Suppliers) -> list[web.RouteDef]:
    """The API for users of the host. Belongs to the loop of the registry."""
    api = _Api(suppliers)
    table: dict[str, Handler] = {
        "/services/dns/all": api.dns_all,
        "/services/dns/add": api.dns_add,
        "/services/dhcp/leases": api.leases,
        "/leases": api.leases,
        "/cam": api.cam,
        "/stats": api.stats,
        "/tunnel": api.tunnel,
        "/connect": api.connect,
        "/extension/wait_port": api.wait_port,
    }
    found = forwarder_routes(forwards, lambda request: None)
    found += [web.route("*", path, guarded(handler)) for path, handler in table.items()]
    found += [web.route("*", f"/{top}/{{rest:.*}}", not_found) for top in ("services", "extension")]
    return found


class _Api:
    def __init__(self, suppliers: Suppliers) -> None:
        self._of = suppliers
        self._waits = 0
        self._rng = random.SystemRandom()

    async def dns_all(self, _request: web.Request) -> web.Response:
        return answer(self._of.zones.documents())

    async def dns_add(self, request: web.Request) -> web.Response:
        self._of.zones.add_document(await posted(request))
        return web.Response()

    async def leases(self, _request: web.Request) -> web.Response:
        return answer(dict(sorted(self._of.leases().items())))

    async def cam(self, _request: web.Request) -> web.Response:
        return answer(dict(sorted(self._of.cam().items())))

    async def stats(self, _request: web.Request) -> web.Response:
        return answer(self._of.stats())

    async def tunnel(self, request: web.Request) -> web.StreamResponse:
        """`OK`, and then the stream into the guest; both half-closes cross."""
        guest = _guest(request.query, 500)
        sock = hijack(request)
        try:
            sock.send(b"OK")  # two octets always fit a socket nobody has written to
            self._of.dialer.dial(guest, sock)
        except OSError:  # the client is gone
            sock.close()
        return Taken()

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """The connection becomes a link; nothing is answered. `mtu` in the query is what the client's interface takes."""
        text = request.query.get("mtu")
        mtu = None if text is None else _number("mtu", text, 576, 65520, 400)
        sock = hijack(request)
        try:
            self._of.attach(sock, mtu)
        except NetstackError as error:
            log.warning("/connect: %s", error)
        return Taken()

    async def wait_port(self, request: web.Request) -> web.Response:
        guest = _guest(request.query, 400)
        seconds = _number("timeout", request.query.get("timeout") or str(WAIT_S), 0, MAX_WAIT_S, 400)
        if self._waits >= MAX_WAITS:
            return failure(503, f"{MAX_WAITS} ports are waited for already")
        self._waits += 1
        try:
            async with asyncio.timeout(seconds):
                while not await self._accepts(guest, request):  # noqa: ASYNC110  # a port of a guest tells nobody
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            return failure(408, f"{guest} did not accept a connection within {seconds} s")
        finally:
            self._waits -= 1
        return web.Response()

    async def _accepts(self, guest: Endpoint, request: web.Request) -> bool:
        """Whether a connection comes about, which is then closed with nothing sent; or whoever wants to know has left."""
        source = Endpoint(self._of.gateway, self._rng.randrange(49152, 65536))
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_close(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        ours, sock = socket.socketpair()
        with ours:
            self._of.dialer.dial(guest, sock, source=source, on_close=on_close)
            while not ended.done():
                if self._of.state(guest, source) in _ACCEPTED or request.transport is None:
                    return True
                await asyncio.wait((ended,), timeout=LOOK_S)
            return ended.result() in _HAD_ACCEPTED or request.transport is None


def _guest(query: Mapping[str, str], status: int) -> Endpoint:
    """The guest's endpoint that `ip` and `port` name; raises `Refused`."""
    for name in ("ip", "port"):
        if not query.get(name):
            raise Refused(f"{name} is mandatory", status)
    try:
        address = ipaddress.IPv4Address(query["ip"])
    except ValueError:
        raise Refused(f"ip: {query['ip'][:100]!r} is no IPv4 address", status) from None
    return Endpoint(address.packed, _number("port", query["port"], 1, 65535, status))


def _number(name: str, text: str, least: int, most: int, status: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and least <= int(text) <= most):
        raise Refused(f"{name}: {text[:100]!r} is no whole number from {least} to {most}", status)
    return int(text)
