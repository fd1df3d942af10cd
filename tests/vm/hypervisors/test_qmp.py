"""QMP as QEMU speaks it, and as something that only has QEMU's socket does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import HostError, Malformed
from vm.hypervisors.qmp import MAX_LINE, MAX_WORDS, Greeting, Qmp, QmpEvent, Reply, Session, parse

GREETING = (  # of QEMU 7.2.22, Debian
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7+deb12u18"},'
    b' "capabilities": ["oob"]}}\r\n'
)
STOP = b'{"timestamp": {"seconds": 1764178, "microseconds": 5}, "event": "STOP"}\r\n'
SHUTDOWN = b'{"timestamp": {}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}\r\n'


def test_a_conversation_cut_anywhere() -> None:
    said = GREETING + b'{"return": {}, "id": 1}\r\n' + STOP + SHUTDOWN + b'{"return": [1], "id": 2}\r\n'
    expected = [
        Greeting((7, 2, 22)),
        Reply(1, {}),
        QmpEvent("STOP"),
        QmpEvent("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
        Reply(2, [1]),
    ]
    for size in (1, 7, 64, len(said)):
        session = Session()
        pieces = (said[at : at + size] for at in range(0, len(said), size))
        assert [message for piece in pieces for message in session.feed(piece)] == expected


def test_commands_have_ids_of_their_own() -> None:
    session = Session()
    assert session.command("query-status") == (1, b'{"execute": "query-status", "id": 1}\r\n')
    number, octets = session.command("set", {"a": "\n"})
    assert json.loads(octets) == {"execute": "set", "id": 2, "arguments": {"a": "\n"}} and number == 2
    assert octets.count(b"\n") == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b'{"id": 3, "error": {"class": "CommandNotFound", "desc": "The command x is not there"}}',
            Reply(3, error="The command x is not there"),
        ),
        (
            b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}',
            Reply(0, error="JSON parse error"),
        ),
        pytest.param(
            b'{"id": 1, "error": {"desc": "%s"}}' % (b"x" * 100_000), Reply(1, error="x" * MAX_WORDS), id="many words"
        ),
        (b'{"event": "X", "data": 5}', QmpEvent("X")),
    ],
)
def test_a_line(line: bytes, expected: Any) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b"{",
        b"[]",
        b"{}",
        b'{"return": {}}',
        b'{"return": {}, "id": "1"}',
        b'{"QMP": {}}',
        b'{"event": 5}',
        b"[" * 100_000,
        b"9" * 5000,
        b"\xff\xfe",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_qmp(line: bytes) -> None:
    with pytest.raises(Malformed):
        parse(line)


@given(st.binary(max_size=200))
def test_any_octets_parse_or_are_malformed(octets: bytes) -> None:
    with contextlib.suppress(Malformed):
        list(Session().feed(octets + b"\n"))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_has_a_bound(end: bytes) -> None:
    with pytest.raises(Malformed, match="a line of more than"):
        list(Session().feed(b'"' + b"x" * MAX_LINE + end))


# With a socket.

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="qmp"))
    yield directory / "monitor.sock"
    shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def monitor(path: Path, talk: Talk) -> AsyncIterator[None]:
    """Somebody at QEMU's place."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()
            ended.set()

    server = await asyncio.start_unix_server(serve, str(path), limit=1 << 22)
    yield
    server.close()
    await asyncio.wait_for(ended.wait(), 20)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    assert json.loads(await reader.readline())["execute"] == "qmp_capabilities"
    writer.write(b'{"return": {}, "id": 1}\r\n')


async def test_answers_reach_who_asked_in_any_order_with_events_between(path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        asked = [json.loads(await reader.readline()) for _ in range(3)]
        writer.write(b'{"return": "nobody asked", "id": 99}\r\n' + STOP)
        for command in reversed(asked):
            answer = {"id": command["id"]} | (
                {"error": {"class": "GenericError", "desc": "cannot"}}
                if command["execute"] == "bad"
                else {"return": command["execute"]}
            )
            writer.write(json.dumps(answer).encode() + b"\n")
        await reader.read()

    events: list[QmpEvent] = []
    async with monitor(path, talk), await Qmp.connect(path, events.append) as qmp:
        assert qmp.version == (7, 2, 22)
        answers = await asyncio.gather(*map(qmp.execute, ("first", "bad", "last")), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["first", "qemu: bad: cannot", "last"]
        assert isinstance(answers[1], HostError)
        assert events == [QmpEvent("STOP")]


async def test_who_waits_hears_that_it_is_gone(path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await reader.readline()

    async with monitor(path, talk), await Qmp.connect(path) as qmp:
        with pytest.raises(HostError, match="qemu's monitor: it is gone"):
            await qmp.execute("query-status")
        with pytest.raises(HostError, match="it is gone"):
            await qmp.execute("query-status")


async def test_an_answer_that_does_not_come(path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        slow = json.loads(await reader.readline())
        late = json.loads(await reader.readline())
        writer.write(b'{"return": "late", "id": %d}\n{"return": "now", "id": %d}\n' % (slow["id"], late["id"]))
        await reader.read()

    async with monitor(path, talk), await Qmp.connect(path) as qmp:
        with pytest.raises(HostError, match="slow: no answer within 0 s"):
            await qmp.execute("slow", limit_s=0.01)
        assert await qmp.execute("next") == "now"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "not JSON"),
        (b"x" * (MAX_LINE + 65536), "a line of more than"),
        (b"", "it is gone"),
    ],
    ids=["another protocol", "no end", "nothing"],
)
async def test_who_is_no_qemu(path: Path, said: bytes, why: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()

    async with monitor(path, talk):
        with pytest.raises(HostError, match=why):
            await Qmp.connect(path)


async def test_no_greeting(path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with monitor(path, talk):
        with pytest.raises(HostError, match="no greeting within 0 s"):
            await Qmp.connect(path, limit_s=0.02)


async def test_nobody_is_there(path: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory"):
        await Qmp.connect(path)
