"""One connection of a guest with the proxy: request after request, each passed on, answered or refused (spec vpnkit 6.2-6.5).

    guest -- Wire (server) --> who is meant? --> allowed? --> by whom? --> Wire (client) -- its server, or the upstream proxy
          <------------------------- the answer, piece by piece ---------------------------

Bodies go both ways at once, for a server may answer before it has read all. CONNECT, and an upgrade that the server agrees to
(101), turn both connections into a `Relay`.

A connection to a server or proxy is kept for the guest's next request to the same one, and shared with no other guest
connection: what a server binds to a connection (NTLM) stays with whom it is bound to. Where it ended meanwhile, a request
without a body is sent once more on a new one.

Time-outs: `IDLE_S` for the next request, `HEAD_S` for the rest of its head, `BODY_S` for each piece of its body. A server may
take as long as it likes as long as the guest waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import h11

from netstack.api import Endpoint
from pyvpnkit.proxy.config import Config, Upstream
from pyvpnkit.proxy.errors import Gone, Refusal
from pyvpnkit.proxy.http1 import Headers, Place, Wire, has_body, passed_on, target_of, values
from pyvpnkit.proxy.pages import page, reason
from pyvpnkit.proxy.relay import Relay, unless_gone
from pyvpnkit.proxy.through import FAULTS, ask_tunnel

if TYPE_CHECKING:
    from pyvpnkit.proxy.service import HttpProxy

log = logging.getLogger("pyvpnkit.proxy")

IDLE_S: Final = 60.0
HEAD_S: Final = 20.0
BODY_S: Final = 300.0
_SAFE: Final = (b"GET", b"HEAD", b"OPTIONS", b"TRACE")


class _Stale(Exception):
    """A kept connection had ended before any of the answer came."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: to the server itself, or to a proxy."""

    place: Place
    upstream: Upstream | None


class Conversation:
    """See the module. `destination` is where an intercepted connection was to go; `explicit` is the proxy's own port otherwise."""

    def __init__(self, house: HttpProxy, sock: socket.socket, destination: Endpoint | None, scheme: str) -> None:
        self._house = house
        self._guest = Wire(sock, h11.SERVER)
        self._destination = destination
        self._scheme = scheme
        self._method = b""
        self._gone = False
        self._server: Wire | None = None
        self._kept: object = None
        """Whom `_server` is connected to."""

    async def run(self) -> None:
        """Until either side has enough. The sockets are closed in the end."""
        guest = self._guest
        try:
            while await self._one():
                pass
            await self._finish()
        except Gone:
            pass
        except OSError as error:  # the guest's socket: nobody is there to be told
            log.debug("proxy: a guest went away: %s", error)
        finally:
            self._drop()
            guest.close()

    async def _finish(self) -> None:
        if self._guest.sock.fileno() >= 0:
            self._drop()
            await self._guest.linger()

    def _drop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _one(self) -> bool:
        """One request; whether another may come."""
        guest = self._guest
        self._method = b""
        try:
            request = await guest.request(self._house.idle_s, HEAD_S)
            if request is None:
                return False
            self._method = request.method
            self._house.counters["requests"] += 1
            config = self._house.config
            if config is None:
                if self._destination is None:
                    raise Refusal(503, "the proxy has been switched off")
                config = Config()
            if request.method == b"CONNECT":
                return await self._connect(request, config)
            return await self._pass_on(request, config)
        except Refusal as refusal:
            return await self._refuse(refusal)

    async def _refuse(self, refusal: Refusal) -> bool:
        self._house.counters[f"refused_{refusal.status}"] += 1
        guest = self._guest
        if guest.may_answer:
            body = page(refusal.status, str(refusal))
            said = reason(refusal.status, str(refusal) if refusal.status == 403 else "")
            headers = [
                (b"Content-Type", b"text/html; charset=utf-8"),
                (b"Content-Length", b"%d" % len(body)),
                (b"Cache-Control", b"no-store"),
                (b"Connection", b"close"),
            ]
            await guest.send(h11.Response(status_code=refusal.status, headers=headers, reason=said))
            if self._method != b"HEAD":
                await guest.send(h11.Data(data=body))
            await guest.send(h11.EndOfMessage())
        return False

    # Whom it is for.

    def _place(self, request: h11.Request) -> tuple[Place, bytes]:
        """Whom the request means and what of it; raises `Refusal` 400."""
        place, path = target_of(request.target)
        if place is not None:
            return place, path
        host = next((value for name, value in request.headers if name == b"host"), b"")
        port = 80 if self._destination is None else self._destination.port
        if host:
            return Place.parse(host, port), path
        if self._destination is None:
            raise Refusal(400, "the request names no host")
        return Place(self._destination.text, port), path

    async def _route(self, place: Place, config: Config) -> Route:
        """By whom it goes; raises `Refusal` 403."""
        if not config.allows(place.host, place.port):
            raise Refusal(403, config.refusal(place.host))
        upstream = config.https if self._scheme == "https" else config.http
        outside = self._house.outside
        if upstream is None or outside.is_own(place.host) or config.exclude.matches(place.host, place.port):
            return Route(place, None)
        await outside.judge(place.host, place.port, upstream)
        return Route(place, upstream)

    async def _to(self, route: Route) -> tuple[Wire, bool]:
        """A connection for a request, and whether it was used before. Raises `Refusal`."""
        key = route.upstream or route.place
        if self._server is not None:
            if self._kept == key and not self._server.is_stale():
                return self._server, True
            self._drop()
        outside = self._house.outside
        opening = (
            outside.server(route.place.host, route.place.port)
            if route.upstream is None
            else outside.proxy(route.upstream)
        )
        self._server = Wire(await self._while_guest_waits(opening), h11.CLIENT)
        self._kept = key
        return self._server, False

    async def _while_guest_waits(self, opening: Coroutine[Any, Any, socket.socket]) -> socket.socket:
        """Give up when the guest does."""
        task = asyncio.get_running_loop().create_task(opening)
        self._guest.watch(task.cancel)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refusal):
                (await task).close()
            raise
        finally:
            self._guest.unwatch()
        if task.cancelled():
            raise Gone("the guest did not wait")
        return task.result()

    # CONNECT.

    async def _connect(self, request: h11.Request, config: Config) -> bool:
        if has_body(request):
            raise Refusal(400, "CONNECT with a body")
        place = Place.parse(request.target, 0)
        route = await self._route(place, config)
        if not isinstance(await self._next_from_guest(), h11.EndOfMessage):
            raise Gone("the guest has ended")
        self._drop()
        server, _ = await self._to(route)
        self._house.counters["tunnels"] += 1
        if route.upstream is not None:
            with unless_gone(self._guest.sock, self._left):
                answer = await ask_tunnel(server, place, route.upstream, passed_on(request.headers, b"host"))
            if not 200 <= answer.status_code < 300:
                self._no_credentials_wanted(answer, route.upstream)
                try:
                    return await self._answer(server, answer)
                except FAULTS as error:
                    raise Gone(f"the answer broke off: {error}") from None
        else:
            answer = h11.Response(status_code=200, headers=[], reason=b"OK")
        await self._guest.send(h11.Response(status_code=answer.status_code, headers=[], reason=answer.reason or b"OK"))
        await self._become_tunnel(server)
        return False

    async def _become_tunnel(self, server: Wire) -> None:
        guest = self._guest
        guest.unwatch()
        self._server = None
        await self._house.relay(
            Relay(guest.sock, server.sock, to_one=server.h11.trailing_data[0], to_other=guest.h11.trailing_data[0])
        )

    # Everything else.

    async def _pass_on(self, request: h11.Request, config: Config) -> bool:
        place, path = self._place(request)
        route = await self._route(place, config)
        head = self._head(request, route, path)
        body = has_body(request)
        if not body:
            await self._next_from_guest()  # the end of the request, which h11 has already
        while True:
            server, used = await self._to(route)
            try:
                return await self._exchange(server, head, body, route, used and not body and request.method in _SAFE)
            except _Stale:
                self._drop()

    def _head(self, request: h11.Request, route: Route, path: bytes) -> h11.Request:
        """The request as it is passed on (spec vpnkit 6.5)."""
        place = route.place
        target = path
        headers: Headers = [(b"Host", place.short.encode())]
        if route.upstream is not None:
            target = b"http://" + place.full.encode() + (b"" if path == b"*" else path)
            authorization = route.upstream.authorization
            if authorization is not None:
                headers.append((b"Proxy-Authorization", authorization))
        elif path == b"/" and request.method == b"OPTIONS" and request.target[-1:] != b"/":
            target = b"*"  # RFC 9112 3.2.4
        headers += passed_on(request.headers, b"host")
        hop = []
        upgrade = values(request.headers, b"upgrade")
        if upgrade and b"upgrade" in values(request.headers, b"connection") and b"h2c" not in upgrade:
            hop.append(b"Upgrade")
            headers += [item for item in request.headers.raw_items() if item[0].lower() == b"upgrade"]
        if b"trailers" in values(request.headers, b"te"):
            hop.append(b"TE")
            headers.append((b"TE", b"trailers"))
        if hop:
            headers.append((b"Connection", b", ".join(hop)))
        return h11.Request(method=request.method, target=target, headers=headers)

    async def _exchange(self, server: Wire, head: h11.Request, body: bool, route: Route, again: bool) -> bool:
        guest = self._guest
        upload: asyncio.Task[None] | None = None
        faults: list[BaseException] = []
        try:
            try:
                await server.send(head)
                if body:
                    upload = asyncio.get_running_loop().create_task(self._upload(server, faults))
                else:
                    await server.send(h11.EndOfMessage())
                    guest.watch(self._left)
                answer = await self._final(server)
            except FAULTS as error:
                if again:
                    raise _Stale from error
                raise
            if answer is None:
                await self._become_tunnel(server)
                return False
            if route.upstream is not None:
                self._no_credentials_wanted(answer, route.upstream)
            return await self._answer(server, answer)
        except FAULTS as error:
            if faults:
                raise faults[0] from None
            if self._gone or not guest.may_answer:
                raise Gone(f"the answer broke off: {error}") from None
            what = f"HTTP proxy {route.upstream}" if route.upstream is not None else route.place.full
            raise Refusal(502, f"{what} did not answer: {error or 'it closed the connection'}") from None
        finally:
            guest.unwatch()
            if upload is not None:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)

    def _left(self) -> None:
        """The guest is gone while a server thinks: whoever waits for that server need not."""
        self._gone = True
        if self._server is not None:
            self._server.abort()

    async def _upload(self, server: Wire, faults: list[BaseException]) -> None:
        """The body of a request; then whether the guest waits. What goes wrong with the guest ends the exchange."""
        try:
            while True:
                event = await self._next_from_guest()
                if isinstance(event, h11.Data):
                    out: h11.Event = h11.Data(data=event.data)
                elif isinstance(event, h11.EndOfMessage):
                    out = h11.EndOfMessage(headers=event.headers.raw_items())
                else:
                    raise Gone("the guest has ended")
                try:
                    await server.send(out)
                except OSError:
                    return  # it reads no more; its answer may be there
                if isinstance(event, h11.EndOfMessage):
                    self._guest.watch(self._left)
                    return
        except (Refusal, Gone, OSError, h11.LocalProtocolError) as error:
            faults.append(error if isinstance(error, Refusal | Gone) else Gone(str(error)))
            server.abort()

    async def _next_from_guest(self) -> h11.Event:
        try:
            async with asyncio.timeout(BODY_S):
                return await self._guest.next()
        except TimeoutError:
            raise Refusal(408, "the request did not go on") from None
        except h11.RemoteProtocolError as error:
            raise Refusal(error.error_status_hint, f"not acceptable: {error}") from None
        except OSError as error:
            raise Gone(str(error)) from None

    async def _final(self, server: Wire) -> h11.Response | None:
        """The head of the answer, interim ones passed on; `None` when the protocol was switched, which the guest was told."""
        while True:
            event = await server.next()
            if isinstance(event, h11.InformationalResponse):
                headers = passed_on(event.headers)
                if event.status_code == 101:
                    headers += [item for item in event.headers.raw_items() if item[0].lower() == b"upgrade"]
                    headers.append((b"Connection", b"Upgrade"))
                elif self._guest.h11.their_http_version == b"1.0":
                    continue
                await self._to_guest(
                    h11.InformationalResponse(status_code=event.status_code, headers=headers, reason=event.reason)
                )
                if event.status_code == 101:
                    return None
            elif isinstance(event, h11.Response):
                return event
            else:
                raise h11.RemoteProtocolError("it closed the connection")

    async def _answer(self, server: Wire, answer: h11.Response) -> bool:
        """Pass an answer on; whether both ends are ready for another request."""
        headers = passed_on(answer.headers)
        await self._to_guest(h11.Response(status_code=answer.status_code, headers=headers, reason=answer.reason))
        chunked = (b"transfer-encoding", b"chunked") in answer.headers and (
            self._guest.h11.their_http_version == b"1.1"
        )
        while True:
            event = await server.next()
            if isinstance(event, h11.Data):
                await self._to_guest(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                trailers = event.headers.raw_items() if chunked else []
                await self._to_guest(h11.EndOfMessage(headers=trailers))
                break
            else:
                raise h11.RemoteProtocolError("it closed the connection")
        self._guest.unwatch()
        if not server.reusable():
            self._drop()
        return self._guest.reusable()

    async def _to_guest(self, event: h11.Event) -> None:
        try:
            await self._guest.send(event)
        except OSError as error:
            raise Gone(str(error)) from None
        except h11.LocalProtocolError as error:
            raise h11.RemoteProtocolError(f"an answer that does not belong there: {error}") from None

    def _no_credentials_wanted(self, answer: h11.Response, upstream: Upstream) -> None:
        """A proxy's 407 is about the host's credentials, with which a guest can do nothing. Raises `Refusal` 502."""
        if answer.status_code == 407:
            self._drop()
            has = "does not accept the user and password" if upstream.credentials else "asks for a user and password"
            raise Refusal(502, f"HTTP proxy {upstream} {has} that http_proxy.json has for it")
