"""The ways to ask the host for a port: VPNKit's HTTP API, its 9P tree, and that tree mounted by the kernel (spec vpnkit 7.1, 7.2).

    ADDRESS        HTTP over vsock, a unix socket, TCP or an inherited socket (`transport`)
    9p:ADDRESS     the 9P tree over the same
    DIRECTORY      the 9P tree where it is mounted, `/port` by convention

Over HTTP the port lasts until it is unexposed. On the 9P ways the host ends it with the descriptor or the connection, however
this process dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from netstack.errors import HostError, Malformed
from portfwd.invm import http
from portfwd.invm.ports import Port
from portfwd.invm.transport import Address

if TYPE_CHECKING:
    from portfwd.ninep.client import Exposed

FORMS: Final = "ADDRESS (HTTP), 9p:ADDRESS, or the directory where the 9P tree is mounted"
READ_OCTETS: Final = 8192


class Control(Protocol):
    """One way to the host."""

    async def expose(self, port: Port) -> Port:
        """Ask for `port`; what is returned has the real host port. Raises `HostError` with the host's own words, `ConfigError`."""
        ...

    async def unexpose(self) -> None:
        """Give back what `expose` got, or may have got. Raises `HostError`."""
        ...

    async def lost(self) -> str:
        """Return, with the reason, when the host is known to have ended the port; never, where that cannot be known."""
        ...


async def _never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


class _NoAnswer(HostError):
    """What was asked may have been done all the same."""


def control(text: str) -> Control:
    """The way `text` names; raises `ConfigError`."""
    if text.startswith("9p:"):
        return NinePControl(Address.parse(text.removeprefix("9p:")))
    if os.path.isdir(text) and not text.isdigit():  # a number is a vsock's, whatever lies about here
        return MountedControl(text)
    return HttpControl(Address.parse(text))


class HttpControl:
    """VPNKit's HTTP API: a connection for each request, or the one that was inherited for all."""

    def __init__(self, address: Address, *, timeout_s: float = http.TIMEOUT_S) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._inherited: socket.socket | None = None
        self._port: Port | None = None

    async def expose(self, port: Port) -> Port:
        before = await self.list() if port.proto != "unix" and not port.out_port else []
        self._port = port  # before the answer: a signal in the middle gives it back
        try:
            await self._ask("PUT", f"/forwards/expose/{self._kind(port)}", port.json())
        except _NoAnswer:
            raise
        except HostError:
            self._port = None
            raise
        if port.proto != "unix" and not port.out_port:
            # The answer is empty, the real port is in the list only, and only that is understood when it is given back.
            for listed in await self.list():
                if replace(listed, out_port=0) == port and listed not in before:
                    self._port = listed
        return self._port

    async def unexpose(self) -> None:
        port, self._port = self._port, None
        if port is not None:
            await self.remove(port)

    async def remove(self, port: Port) -> None:
        """Unexpose `port` as `list` describes it, whoever exposed it."""
        await self._ask("DELETE", f"/forwards/unexpose/{self._kind(port)}", port.json())

    async def list(self) -> list[Port]:
        """Everything exposed, by whomever."""
        body = await self._ask("GET", "/forwards/list")
        try:
            return [Port.of(one) for one in json.loads(body or b"null") or ()]
        except (ValueError, TypeError, Malformed) as error:
            raise HostError(f"the control server at {self.address} answered with no list of ports: {error}") from None

    async def dump(self) -> str:
        """The host's account of its multiplexer."""
        return (await self._ask("GET", "/forwards/dump")).decode(errors="replace")

    async def lost(self) -> str:
        return await _never()

    @staticmethod
    def _kind(port: Port) -> str:
        return "pipe" if port.proto == "unix" else "port"

    async def _ask(self, method: str, path: str, document: Any = None) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s), self._socket() as sock:
                keep = self.address.kind == "fd"
                status, body = await http.request(sock, method, path, document, keep=keep)
        except TimeoutError:
            raise HostError(
                f"the control server at {self.address} does not answer within {self._timeout_s:g} s"
            ) from None
        except OSError as error:
            raise HostError(f"cannot reach the control server at {self.address}: {error.strerror or error}") from None
        if status != 200:
            raise HostError(
                _words(body) or f"the control server at {self.address} answered {status} to {method} {path}"
            )
        return body

    @asynccontextmanager
    async def _socket(self) -> AsyncIterator[socket.socket]:
        if self.address.kind == "fd":
            if self._inherited is None:
                self._inherited = await self.address.connect()
            yield self._inherited
            return
        sock = await self.address.connect()
        try:
            yield sock
        finally:
            sock.close()


def _words(body: bytes) -> str:
    """What a refusal says: `{"message": ...}`, or a bare JSON string as VPNKit sends for a wrong protocol."""
    try:
        document = json.loads(body)
    except ValueError:
        return body.decode(errors="replace").strip()[:1000]
    if isinstance(document, dict):
        document = document.get("message", "")
    return document if isinstance(document, str) else ""


class MountedControl:
    """The 9P tree where the kernel has mounted it. The files are on the host's answer: they are used in a thread."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._file = -1

    async def expose(self, port: Port) -> Port:
        granted = await asyncio.to_thread(self._expose, port.request())
        return port.granted(granted)

    def _expose(self, request: str) -> str:
        place = os.path.join(self.directory, request)
        try:
            with suppress(FileExistsError):
                os.mkdir(place)
            self._file = os.open(os.path.join(place, "ctl"), os.O_RDWR | os.O_CLOEXEC)
            os.write(self._file, request.encode())
            os.lseek(self._file, 0, os.SEEK_SET)
            answer = os.read(self._file, READ_OCTETS).decode(errors="replace")
        except OSError as error:
            self._close()
            raise HostError(
                f"{self.directory}: {error.strerror or error}; is the 9P tree of the host mounted there?"
            ) from None
        try:
            return answered(answer)
        except HostError:
            self._close()
            raise

    def _close(self) -> None:
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            with suppress(OSError):
                os.close(descriptor)

    async def unexpose(self) -> None:
        await asyncio.to_thread(self._close)

    async def lost(self) -> str:
        return await _never()


def answered(text: str) -> str:
    """The canonical request out of `OK ...`; raises `HostError` with the words of `ERROR ...`."""
    if text.startswith("OK "):
        return text.removeprefix("OK ").strip()
    raise HostError(text.removeprefix("ERROR ").strip() or "the host answered nothing")


class NinePControl:
    """The 9P tree over a connection of our own, which is kept while the port is. The client blocks: it is used in a thread."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._sock: socket.socket | None = None
        self._exposed: Exposed | None = None

    async def expose(self, port: Port) -> Port:
        request = port.request()
        try:
            self._sock = await self.address.connect()
        except OSError as error:
            raise HostError(f"cannot reach the 9P server at {self.address}: {error.strerror or error}") from None
        try:
            self._exposed = await asyncio.to_thread(self._expose, self._sock, request)
        except HostError:
            self._hang_up()
            raise
        return port.granted(self._exposed.request)

    @staticmethod
    def _expose(sock: socket.socket, request: str) -> Exposed:
        from portfwd.ninep import client  # takes longer to import than all the rest, and only this way needs it

        return client.expose(client.Client(sock), request)

    def _hang_up(self) -> None:
        """The host ends what came over this connection with it; a thread that waits for an answer is woken."""
        sock, self._sock = self._sock, None
        self._exposed = None
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    async def unexpose(self) -> None:
        try:
            if self._exposed is not None:
                await asyncio.to_thread(self._exposed.close)
        finally:
            self._hang_up()

    async def lost(self) -> str:
        if self._sock is None:
            return await _never()
        loop, descriptor, ended = asyncio.get_running_loop(), self._sock.fileno(), asyncio.Event()
        loop.add_reader(descriptor, ended.set)  # nothing is asked, so nothing but the end can come
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
        self._hang_up()
        return "the connection to the 9P server ended"
