"""VPNKit's HTTP API for ports, `/forwards/...` (spec vpnkit 7.2, Appendix B).

What VPNKit calls a port is a forward of the registry, whoever made it; "out" is the host's side and "in" the VM's. A forward is
named by its whole description: exposing what is there is no error, and unexposing finds it by that. The host port in it is the
real one, so 0 always makes a new forward. Who may use this API is a user of the host: it may remove every forward but those
of the settings, which a reload would bring back.

Errors are what the Go client decodes: 400 `{"message": ...}` with the words of Go's `net.Listen`; `detail` says what to do.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeAlias

from aiohttp import web

from netstack.errors import NetstackError
from portfwd import bodies
from portfwd.bodies import BadBody
from portfwd.errors import AlreadyPublished, BindFailed
from portfwd.invm.ports import Port
from portfwd.owners import VPNKIT, Owner
from portfwd.registry import Forward, Registry
from portfwd.spec import DEFAULT_BIND, PublishSpec

log = logging.getLogger("pyvpnkit.portfwd")

MAX_BODY: Final = 64 * 1024
DUMP_S: Final = 30.0
"""How long a dump waits for a multiplexer; VPNKit waits for ever."""
MAX_DUMPS: Final = 16
"""Dumps that wait at once."""
_ANY: Final = "0.0.0.0"

Via: TypeAlias = Callable[[str], str]
"""How a forward made here gets to an address of the VM's side (empty for the default guest): `stack` or `forwarder`. Paths in the
VM are the forwarder's in any case."""

Dump: TypeAlias = Callable[[], str | None]
"""What the multiplexer did last, for people; `None` while there is none."""

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def parse(body: bytes) -> Port:
    """The port of a request's body, in the one spelling that makes equal names equal. Raises `BadBody`."""
    found = bodies.fields(body)
    proto = bodies.text(found, "proto").lower()
    out_ip = bodies.address(found, "out_ip")
    return Port(
        proto=proto,
        out_ip=out_ip or ("" if proto == "unix" else _ANY),
        out_port=bodies.port(found, "out_port"),
        out_path=bodies.text(found, "out_path"),
        in_ip=bodies.address(found, "in_ip"),
        in_port=bodies.port(found, "in_port"),
        in_path=bodies.text(found, "in_path"),
        annotation=bodies.text(found, "annotation"),
    )


def described(spec: PublishSpec) -> Port:
    """A published port or socket (one of a range) as VPNKit describes it."""
    return Port(
        proto=spec.protocol,
        out_ip="" if spec.protocol == "unix" else spec.bind,
        out_port=spec.port,
        out_path=spec.path,
        in_ip=spec.guest or "",
        in_port=spec.guest_port,
        in_path=spec.guest_path,
        annotation=spec.annotation,
    )


def wanted(port: Port, via: Via) -> PublishSpec:
    """What is to be published for `port`; raises `ConfigError`."""
    return PublishSpec(
        protocol=port.proto,
        bind=port.out_ip or DEFAULT_BIND,
        port=port.out_port,
        path=port.out_path,
        guest=port.in_ip or None,
        guest_port=port.in_port,
        guest_path=port.in_path,
        via="forwarder" if port.in_path else via(port.in_ip),
        annotation=port.annotation,
    )


def listen_error(spec: PublishSpec, number: int) -> str:
    """What Go's `net.Listen` says: `listen tcp 127.0.0.1:80: bind: address already in use`."""
    address = f"[{spec.bind}]:{spec.port}" if ":" in spec.bind else f"{spec.bind}:{spec.port}"
    words = os.strerror(number)
    where = spec.path if spec.protocol == "unix" else address
    return f"listen {spec.protocol} {where}: bind: {words[:1].lower()}{words[1:]}"


def routes(registry: Registry, *, via: Via, dump: Dump, owner: Owner = VPNKIT, own: bool = False) -> list[web.RouteDef]:
    """All of `/forwards/...`. Belongs to the loop of the registry.

    What is made belongs to `owner`. With `own` nothing else is seen or removed here: for a door that guests can reach.
    """
    api = _Api(registry, via, dump, owner if own else None, owner)
    port, pipe = ("tcp", "udp"), ("unix",)
    table: list[tuple[str, tuple[str, ...], Handler]] = [
        ("/forwards/expose/port", ("PUT", "POST"), api.exposing(port, "exposed ports can only be TCP or UDP")),
        ("/forwards/expose/pipe", ("PUT", "POST"), api.exposing(pipe, "exposed pipes can only have proto=Unix")),
        ("/forwards/unexpose/port", ("DELETE", "POST"), api.unexposing(port, "exposed ports can only be TCP or UDP")),
        ("/forwards/unexpose/pipe", ("DELETE", "POST"), api.unexposing(pipe, "exposed pipes can only have proto=Unix")),
        ("/forwards/list", ("GET", "HEAD"), api.list),
        ("/forwards/dump", ("GET", "HEAD"), api.dump),
    ]
    found = []
    for path, methods, handler in table:
        # With GET aiohttp adds HEAD.
        found += [web.route(method, path, _guarded(handler)) for method in methods if method != "HEAD"]
        found.append(web.route("*", path, _wrong_method(methods)))
    found.append(web.route("*", "/forwards/{rest:.*}", _not_found))
    return found


def _answer(document: Any, status: int = 200, **more: Any) -> web.Response:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False) + "\n"
    return web.Response(status=status, text=text, content_type="application/json", charset="UTF-8", **more)


def _failure(status: int, message: str, **more: str) -> web.Response:
    return _answer({"message": message, **more}, status)


def _wrong_method(methods: tuple[str, ...]) -> Handler:
    async def handler(_request: web.Request) -> web.Response:
        return _answer({"message": "Method Not Allowed"}, 405, headers={"Allow": ", ".join(methods)})

    return handler


async def _not_found(_request: web.Request) -> web.Response:
    return _failure(404, "Not Found")


def _guarded(handler: Handler) -> Handler:
    """Every failure becomes its JSON."""

    async def run(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadBody as error:
            return _failure(error.status, str(error))
        except AlreadyPublished as error:
            return _failure(400, listen_error(error.spec, errno.EADDRINUSE), detail=str(error))
        except BindFailed as error:
            return _failure(400, listen_error(error.spec, error.number), detail=str(error))
        except NetstackError as error:
            return _failure(400, str(error))
        except Exception:  # a bug of ours costs this request
            log.exception("%s %s", request.method, request.path)
            return _failure(500, "Internal Server Error")

    return run


class _Api:
    def __init__(self, registry: Registry, via: Via, dump: Dump, only: Owner | None, owner: Owner) -> None:
        self._registry = registry
        self._only = only
        self._owner = owner
        self._via = via
        self._dump = dump
        self._dumps = 0

    async def _port(self, request: web.Request, protocols: tuple[str, ...], complaint: str) -> Port:
        body = await bodies.read(request, MAX_BODY)
        if body and request.content_type.lower() != "application/json":
            raise BadBody("Unsupported Media Type", 415)
        port = parse(body or b"null")
        if port.proto not in protocols:
            raise BadBody(complaint)
        return port

    def _ports(self) -> Iterator[tuple[Forward, Port]]:
        """Every published port by itself, those of a range too."""
        for forward in self._registry if self._only is None else self._registry.of(self._only):
            for spec in forward.spec.each():
                yield forward, described(spec)

    def exposing(self, protocols: tuple[str, ...], complaint: str) -> Handler:
        async def expose(request: web.Request) -> web.Response:
            asked = await self._port(request, protocols, complaint)
            if not any(port == asked for _, port in self._ports()):
                self._registry.add(wanted(asked, self._via), self._owner)
            return web.Response()

        return expose

    def unexposing(self, protocols: tuple[str, ...], complaint: str) -> Handler:
        async def unexpose(request: web.Request) -> web.Response:
            asked = await self._port(request, protocols, complaint)
            for forward, port in self._ports():
                if port != asked:
                    continue
                self._registry.remove_named(forward, str(port))
            return web.Response()

        return unexpose

    async def list(self, _request: web.Request) -> web.Response:
        return _answer([port.json() for _, port in self._ports()] or None)

    async def dump(self, request: web.Request) -> web.Response:
        if self._dumps >= MAX_DUMPS:
            return _failure(503, f"{MAX_DUMPS} dumps wait for a multiplexer already")
        self._dumps += 1
        try:
            async with asyncio.timeout(DUMP_S):
                while (found := self._dump()) is None and request.transport is not None:  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return _failure(
                504, f"no multiplexer was connected within {DUMP_S:.0f} s; is vpnkit-forwarder running in the VM?"
            )
        finally:
            self._dumps -= 1
        return web.Response(text=found, content_type="text/plain", charset="UTF-8")
