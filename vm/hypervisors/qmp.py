"""QMP, the monitor protocol of QEMU: JSON objects a line each (QEMU's docs/interop/qmp-spec).

    QEMU -> us    {"QMP": {"version": ..., "capabilities": [...]}}          the greeting
    us -> QEMU    {"execute": "qmp_capabilities", "id": 1}                  nothing else is taken before
    QEMU -> us    {"return": {}, "id": 1}                                   or {"error": {"class": ..., "desc": ...}, "id": 1}
    QEMU -> us    {"event": "SHUTDOWN", "data": {...}, "timestamp": ...}    at any time

`Session` is the protocol without I/O; `Qmp` has the socket, and one reader that hands answers to those who wait, and events on.
QEMU is trusted no more than its guest is, which may have taken it over: a line has at most `MAX_LINE` octets, and what
is no QMP ends the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

from netstack.errors import HostError, Malformed

MAX_LINE: Final = 1 << 20
MAX_WORDS: Final = 1000
"""Characters of an error of QEMU's that are passed on."""
_TOO_LONG: Final = f"qmp: a line of more than {MAX_LINE} octets"
LIMIT_S: Final = 10.0
Version: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Greeting:
    version: Version


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to the command `id`; `error` is QEMU's own words."""

    id: int
    value: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class QmpEvent:
    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


Message: TypeAlias = Greeting | Reply | QmpEvent


class Session:
    """One connection's protocol."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._kept = bytearray()

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Its id, and what is to be sent."""
        id = next(self._ids)
        said: dict[str, Any] = {"execute": name, "id": id}
        if arguments:
            said["arguments"] = arguments
        return id, json.dumps(said).encode() + b"\r\n"

    def feed(self, octets: bytes) -> Iterator[Message]:
        """What QEMU said with these octets, as it is iterated over. Raises `Malformed`, after which nothing may be fed any more."""
        self._kept += octets
        *lines, rest = self._kept.split(b"\n")
        self._kept = rest
        for line in lines:
            if len(line) > MAX_LINE:
                raise Malformed(_TOO_LONG)
            if line.strip():
                yield parse(line)
        if len(rest) > MAX_LINE:
            raise Malformed(_TOO_LONG)


def parse(line: bytes | bytearray) -> Message:
    """One line. Raises `Malformed`."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise Malformed("qmp: not JSON") from None
    match said:
        case {"QMP": {"version": {"qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}}}}:
            return Greeting((major, minor, micro))
        case {"event": str(name), **more}:
            data = more.get("data", {})
            return QmpEvent(name, data if isinstance(data, dict) else {})
        case {"return": value, "id": int(id)}:
            return Reply(id, value)
        case {"error": {"desc": str(words)}, **more}:
            known = more.get("id")  # without one: the line was no command to it
            return Reply(known if isinstance(known, int) else 0, error=words[:MAX_WORDS])
    raise Malformed("qmp: neither greeting, answer nor event")


class Qmp:
    """A connection to a monitor. `on_event` is called from the loop, and must not raise; close it with `async with`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_event: Callable[[QmpEvent], None]
    ) -> None:
        self._session = Session()
        self._reader, self._writer = reader, writer
        self._on_event = on_event
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._greeting: asyncio.Future[Version] = asyncio.get_running_loop().create_future()
        self._over: HostError | None = None
        self._task = asyncio.create_task(self._read())
        self.version: Version = (0, 0, 0)

    @classmethod
    async def connect(
        cls, path: Path, on_event: Callable[[QmpEvent], None] = lambda _: None, *, limit_s: float = LIMIT_S
    ) -> Qmp:
        """With the capabilities negotiated. Raises `HostError`."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError as error:
            raise HostError(f"qemu's monitor at {path}: {error.strerror or error}") from None
        made = cls(reader, writer, on_event)
        try:
            async with asyncio.timeout(limit_s):
                made.version = await asyncio.shield(made._greeting)
            await made.execute("qmp_capabilities", limit_s=limit_s)
        except TimeoutError:
            await made.close()
            raise HostError(f"qemu's monitor at {path}: no greeting within {limit_s:.0f} s") from None
        except BaseException:
            await made.close()
            raise
        return made

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None, *, limit_s: float = LIMIT_S) -> Any:
        """What it returns. Raises `HostError`: QEMU refuses (with its words), is slow, or is gone."""
        if self._over is not None:
            raise self._over
        id, octets = self._session.command(name, arguments)
        waiting = self._waiting[id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(limit_s):
                self._writer.write(octets)
                with contextlib.suppress(ConnectionError):  # the reader says it
                    await self._writer.drain()
                reply: Reply = await waiting
        except TimeoutError:
            raise HostError(f"qemu: {name}: no answer within {limit_s:.0f} s") from None
        finally:
            del self._waiting[id]
        if reply.error is not None:
            raise HostError(f"qemu: {name}: {reply.error}")
        return reply.value

    async def over(self, limit_s: float = 1.0) -> None:
        """Until all that a QEMU which has ended said was heard; not for ever, since a child of its may have the socket."""
        await asyncio.wait([self._task], timeout=limit_s)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._end("closed")
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Qmp:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self) -> None:
        why = "it is gone"
        try:
            while octets := await self._reader.read(65536):
                for message in self._session.feed(octets):
                    self._take(message)
        except Malformed as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or why
        self._end(why)

    def _take(self, message: Message) -> None:
        match message:
            case Greeting(version):
                if not self._greeting.done():
                    self._greeting.set_result(version)
            case Reply(id):
                waiting = self._waiting.get(id)  # nobody, where it came too late
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case QmpEvent():
                self._on_event(message)

    def _end(self, why: str) -> None:
        if self._over is not None:
            return
        self._over = HostError(f"qemu's monitor: {why}")
        for waiting in [*self._waiting.values(), self._greeting]:
            if not waiting.done():
                waiting.set_exception(self._over)
        if self._greeting.done() and not self._greeting.cancelled():
            self._greeting.exception()  # it may be that nobody asks
