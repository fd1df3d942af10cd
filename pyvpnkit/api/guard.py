"""What every request passes before a handler sees it, and every failure before a client does.

On TCP (threats L3): the token where there is one, a `Host` that is an address of a listener and no name somebody's DNS could
point here, and no request that a browser says it makes for a web page. On every door: a body in time, within the bound, as JSON
(for our own routes; routes that are mounted have their clients' habits), and no traceback, ever. Changes are logged.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeAlias

from aiohttp import web

from netstack.errors import NetstackError
from pyvpnkit.api import errors
from pyvpnkit.api.errors import ApiError
from pyvpnkit.api.http import BODY_S, MAX_BODY, HttpServer, complaint, connection_of

log = logging.getLogger("pyvpnkit.control")

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """A middleware: `app.middlewares.append(guard.middleware)`. `own(path)` tells our routes from mounted ones."""

    def __init__(self, own: Callable[[str], bool], *, token: str | None = None, hosts: Iterable[str] = ()) -> None:
        self.server: HttpServer
        """Set before the first request."""
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self.body_s = BODY_S
        self._own = own
        self._token = token.encode() if token is not None else None

    @property
    def middleware(self) -> Any:
        """For `web.Application`."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            status = 500
            try:
                response = await self._answer(request, handler)
                status = response.status
                return response
            except web.HTTPException as raised:
                status = raised.status
                raise
            finally:
                if request.method not in _READING:
                    self._log(request, status)

        return guard

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if connection_of(request).peer.door == "tcp":
                self._admit(request)
            self._route(request)
            await self._body(request)
            return await handler(request)
        except ApiError as error:
            answer = complaint(error.status, error.message, **error.more)
            if error.status == 401:
                answer.headers["WWW-Authenticate"] = 'Bearer realm="pyvpnkit"'
            return answer
        except NetstackError as error:
            found = errors.of(error)
            return complaint(found.status, found.message, **found.more)
        except web.HTTPException:
            raise  # a mounted route's own words
        except (ConnectionError, web.RequestPayloadError):
            return complaint(400, "the request ended before its body did")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # contained: this request
            if isinstance(error, RuntimeError) and connection_of(request).transport is None:
                return complaint(400, "the client has left")  # aiohttp's word for a body that nobody sends any more
            self.server.contain(error)
            return complaint(500, "a fault of pyvpnkit's, see its log")

    def _admit(self, request: web.Request) -> None:
        refuse = self.server.counters
        host = _without_port(request.headers.get("Host", ""))
        here = _without_port(_bracketed((request.get_extra_info("sockname") or [""])[0]))
        if host not in self._hosts and host != here:
            refuse.unauthorised += 1
            accepted = ", ".join(sorted({*self._hosts, here}))
            raise ApiError(403, f"Host {host[:80]!r} is not an address of this server; use one of {accepted}")
        if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none":
            refuse.unauthorised += 1
            raise ApiError(403, "requests of web pages are not answered; use a program")
        if self._token is None:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given_octets = given.strip().encode(errors="surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given_octets, self._token):
            refuse.unauthorised += 1
            raise ApiError(401, "the token is missing or wrong; send `Authorization: Bearer TOKEN`")

    def _route(self, request: web.Request) -> None:
        nothing = request.match_info.http_exception
        if isinstance(nothing, web.HTTPMethodNotAllowed):
            allowed = ", ".join(sorted(nothing.allowed_methods))
            raise _MethodNotAllowed(request, allowed)
        if nothing is not None:
            raise ApiError(404, f"nothing is at {request.path[:200]}; GET /v1/openapi.json lists what is")

    async def _body(self, request: web.Request) -> None:
        """Read the body of a request for us; handlers find it read. What is mounted reads its own, as its clients expect."""
        if not request.can_read_body:
            return
        own = self._own(request.path)
        if own and request.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError(415, "Content-Encoding is not understood; send the body as it is")
        if (own or connection_of(request).peer.door == "tcp") and request.content_type != "application/json":
            raise ApiError(415, f"the body is {request.content_type[:80]}; send `Content-Type: application/json`")
        if not own:
            return
        try:
            async with asyncio.timeout(self.body_s):
                await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"the body has more than {MAX_BODY} octets; send less at once") from None
        except TimeoutError:
            self.server.counters.timeouts += 1
            raise ApiError(408, f"the body did not come within {self.body_s:g} s") from None

    def _log(self, request: web.Request, status: int) -> None:
        """Who changed what, for every request that may change something."""
        about = connection_of(request).audit
        log.info(
            "control: %s: %s %s: %d%s",
            connection_of(request).peer.text,
            request.method,
            _printable(request.path_qs),
            status,
            f" {about}" if about else "",
        )


class _MethodNotAllowed(web.HTTPMethodNotAllowed):
    def __init__(self, request: web.Request, allowed: str) -> None:
        answer = complaint(405, f"{request.method[:20]} is not possible on {request.path[:200]}; use {allowed}")
        super().__init__(request.method, allowed.split(", "), text=answer.text, content_type="application/json")


def _without_port(host: str) -> str:
    """`127.0.0.1:80`, `[::1]:80` or `localhost` without port and brackets; an address in its usual spelling."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)[:200]
