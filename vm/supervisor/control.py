"""The supervisor's own API on `STATE/vm.sock` (0600): HTTP/1.1 and JSON, for the command line and whoever is this user.

    GET  /v1/status             everything at a glance
    GET  /v1/events?after=N     a JSON object a line, without end: those that are kept with an id above N, and those that come
    POST /v1/down {"kill": true}
    POST /v1/restart | /v1/pause | /v1/resume

Errors are `{"message": "..."}`: 400 what was asked is wrong, 409 it cannot be done now, 503 there are too many readers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from netstack.errors import ConfigError, NetstackError
from netstack.link.listening import UnixSocket, peer_pid, peer_uid
from vm.api import Unsupported
from vm.supervisor.status import status
from vm.supervisor.supervisor import Supervisor

MAX_BODY: Final = 64 << 10
log = logging.getLogger("vm.supervisor")

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(supervisor: Supervisor) -> AsyncIterator[None]:
    """Serve until the end of the block. Raises `ConfigError` where the socket cannot be had."""
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_guard])
    routes = _Routes(supervisor)
    app.add_routes(
        [
            web.get("/v1/status", routes.status),
            web.get("/v1/events", routes.events),
            web.post("/v1/down", routes.down),
            web.post("/v1/restart", routes.restart),
            web.post("/v1/pause", routes.pause),
            web.post("/v1/resume", routes.resume),
        ]
    )
    bound = UnixSocket(str(supervisor.home.state.control), socket.SOCK_STREAM, setting="control socket")
    # Readers of events are let go by the journal's end; nobody else has anything to wait for.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    try:
        await runner.setup()
        await web.SockSite(runner, bound.sock).start()
        yield
    finally:
        await runner.cleanup()
        bound.close()


def _complaint(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)


@web.middleware
async def _guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    if sock is not None and peer_uid(sock) not in (
        None,
        0,
        os.geteuid(),
    ):  # the mode of the socket says so too (threat L1)
        return _complaint(403, "this is for the user who runs the machine")
    try:
        return await handler(request)
    except Unsupported as error:
        return _complaint(409, str(error))
    except ConfigError as error:
        return _complaint(400, str(error))
    except NetstackError as error:
        return _complaint(409, str(error))
    except web.HTTPException as error:
        return _complaint(
            error.status,
            f"{request.method} {request.path}: {error.reason}; there are /v1/status, events, down, restart, pause and resume",
        )
    except ConnectionError:
        raise
    except Exception:
        log.exception("%s %s failed by a fault of ours", request.method, request.path)
        return _complaint(500, "a fault of the supervisor's; its log says how")


class _Routes:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def status(self, _request: web.Request) -> web.Response:
        return web.json_response(await status(self._supervisor))

    async def events(self, request: web.Request) -> web.StreamResponse:
        after = request.query.get("after", "0")
        if not after.isdigit() or len(after) > 15:
            raise ConfigError(f"after: {after!r} is no id of an event; leave it out for all that are kept")
        journal = self._supervisor.journal
        if journal.full:
            return _complaint(503, "there are too many readers of events; end one")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the reader has left
            async with contextlib.aclosing(journal.read(int(after))) as entries:
                async for entry in entries:
                    await response.write(json.dumps(entry).encode() + b"\n")
        return response

    async def down(self, request: web.Request) -> web.Response:
        body = await _body(request)
        kill = body.get("kill", False)
        if not isinstance(kill, bool):
            raise ConfigError(f"kill: {kill!r} is neither true nor false")
        log.info("asked to go down by process %s", _peer(request))
        self._supervisor.down(kill=kill)
        return web.json_response({"state": self._supervisor.state.value}, status=202)

    async def restart(self, _request: web.Request) -> web.Response:
        self._supervisor.restart()
        return web.json_response({"state": self._supervisor.state.value}, status=202)

    async def pause(self, _request: web.Request) -> web.Response:
        await self._supervisor.pause()
        return web.json_response({"paused": True})

    async def resume(self, _request: web.Request) -> web.Response:
        await self._supervisor.resume()
        return web.json_response({"paused": False})


async def _body(request: web.Request) -> dict[str, Any]:
    text = await request.text()
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError("the body is no JSON object")
    return found


def _peer(request: web.Request) -> str:
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    pid = peer_pid(sock) if sock is not None else None
    return "unknown" if pid is None else str(pid)
