"""slirp4netns' API socket (spec gvproxy 2): one JSON request per connection, one answer, the end.

    {"execute": "add_hostfwd", "arguments": {"proto": "tcp", "host_addr": "0.0.0.0", "host_port": 8080, "guest_port": 80}}
    {"return": {"id": 1}}

A request need not end with anything: it is complete when it is a JSON object. `list_hostfwd` is answered as the program does,
and as its manual says, in one object.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Callable
from typing import Any, Final

from netstack.errors import ConfigError, NetstackError
from portfwd.owners import Owner
from portfwd.registry import Registry
from portfwd.spec import PublishSpec

MAX_OCTETS: Final = 4095
WAIT_S: Final = 10.0
_MINE: Final = Owner("slirp4netns")


class BadRequest(Exception):
    """What `desc` says behind `bad request: `."""


class Api:
    """The requests of clients; `guest` is where forwards lead that name no address."""

    def __init__(self, registry: Registry, guest: str) -> None:
        self._registry = registry
        self._guest = guest
        self._entries: dict[int, tuple[int, dict[str, Any]]] = {}
        """Our number -> the forward's, and how it was asked for."""
        self._last = 0
        self._commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "add_hostfwd": self._add,
            "remove_hostfwd": self._remove,
            "list_hostfwd": self._list,
        }

    async def serve(self, sock: socket.socket) -> None:
        """One connection, which is closed afterwards. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        octets = b""
        async with asyncio.timeout(WAIT_S):
            while len(octets) <= MAX_OCTETS and not _complete(octets):
                more = await loop.sock_recv(sock, MAX_OCTETS + 1 - len(octets))
                if not more:
                    break
                octets += more
            await loop.sock_sendall(sock, json.dumps(self.answer(octets)).encode())

    def answer(self, octets: bytes) -> dict[str, Any]:
        """To a request as it came."""
        try:
            if len(octets) > MAX_OCTETS:
                raise BadRequest("too large message")
            return self._execute(octets)
        except BadRequest as error:
            return {"error": {"desc": f"bad request: {error}"}}

    def _execute(self, octets: bytes) -> dict[str, Any]:
        try:
            request = json.loads(octets)
        except (ValueError, RecursionError):
            raise BadRequest("cannot parse JSON") from None
        if not isinstance(request, dict):
            raise BadRequest("json_object() failed")
        command = request.get("execute")
        if not isinstance(command, str):
            raise BadRequest("no execute found")
        if command not in self._commands:
            raise BadRequest("unknown execute")
        arguments = request.get("arguments")
        return self._commands[command](arguments if isinstance(arguments, dict) else {})

    def _add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        def bad(name: str) -> BadRequest:
            return BadRequest(f"add_hostfwd: bad arguments.{name}")

        entry = {
            "proto": arguments.get("proto"),
            "host_addr": arguments.get("host_addr", "0.0.0.0"),
            "host_port": arguments.get("host_port"),
            "guest_addr": arguments.get("guest_addr", self._guest),
            "guest_port": arguments.get("guest_port"),
        }
        if entry["proto"] not in ("tcp", "udp"):
            raise bad("proto")
        for name in ("host_addr", "guest_addr"):
            try:
                ipaddress.IPv4Address(entry[name] if isinstance(entry[name], str) else "")
            except ValueError:
                raise bad(name) from None
        for name in ("host_port", "guest_port"):
            if type(entry[name]) is not int or not 0 < entry[name] <= 65535:
                raise bad(name)
        try:
            spec = PublishSpec(
                protocol=entry["proto"],
                bind=entry["host_addr"],
                port=entry["host_port"],
                guest=entry["guest_addr"],
                guest_port=entry["guest_port"],
            )
            forward = self._registry.add(spec, _MINE)
        except NetstackError:
            raise BadRequest("add_hostfwd: slirp_add_hostfwd failed") from None
        self._last += 1
        self._entries[self._last] = forward.id, {"id": self._last, **entry}
        return {"return": {"id": self._last}}

    def _remove(self, arguments: dict[str, Any]) -> dict[str, Any]:
        number = arguments.get("id")
        if type(number) is not int:
            raise BadRequest("remove_hostfwd: bad arguments.id")
        known = self._entries.pop(number, None)
        forward = None if known is None else self._registry.by_id(known[0])
        try:
            if forward is None:
                raise ConfigError("there is no such forward")
            self._registry.remove(forward)
        except NetstackError:
            raise BadRequest("remove_hostfwd: slirp_remove_hostfwd failed") from None
        return {"return": {}}

    def _list(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        entries = [entry for number, entry in self._entries.values() if self._registry.by_id(number) is not None]
        return {"return": {"entries": entries}, "entries": entries}


def _complete(octets: bytes) -> bool:
    try:
        return isinstance(json.loads(octets), dict)
    except (ValueError, RecursionError):
        return False
