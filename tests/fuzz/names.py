"""Z9: DNS. Whatever is asked, every query has at most one answer, and what is relayed is the same but for its id."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from typing import Any
from unittest import mock

import dnslib

from dns import codec, tries
from dns.server import Server
from dns.system import Upstream
from dns.upstream import accept
from netstack.api import Endpoint
from netstack.errors import HostError
from tests.fuzz.bend import split, spoil

SOURCE = Endpoint(bytes((192, 168, 65, 3)), 5353)
LABELS = [
    b"gateway",
    b"INTERNAL",
    b"a",
    b"x" * 63,
    b"1",
    b"65",
    b"168",
    b"192",
    b"in-addr",
    b"arpa",
    b"ip6",
    b"\0\xff.",
    b"box",
]
TYPES = [1, 2, 5, 6, 12, 15, 16, 28, 33, 41, 64, 65, 251, 252, 255, 0, 65535]


def name(rng: random.Random) -> bytes:
    known = rng.random()
    if known < 0.2:
        return b"\7gateway\x08internal\0"
    if known < 0.3:
        return b"\3box\x08Internal\0"
    if known < 0.4:
        return b"\1" + rng.choice([b"1", b"3"]) + b"\x0265\x03168\x03192\7in-addr\4arpa\0"
    labels = [rng.choice(LABELS) for _ in range(rng.randrange(6))]
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def record(rng: random.Random) -> bytes:
    owner = rng.choice([b"\xc0\x0c", b"\0", name(rng), b"\xc0\xff"])
    rdata = rng.randbytes(rng.choice([0, 4, 16, 100, 300]))
    return owner + struct.pack("!HHIH", rng.choice(TYPES), 1, rng.getrandbits(32), len(rdata)) + rdata


def message(rng: random.Random, head: bytes, question: bytes, most: int) -> bytes:
    """A message with such a header (id and flags) and question, and records of all sections."""
    counts = [rng.randrange(most + 1) for _ in range(3)]
    records = b"".join(record(rng) for _ in range(sum(counts)))
    if rng.random() < 0.5:
        counts[2] += 1
        octets = rng.choice([0, 511, 512, 1232, 4096, 65535])
        records += b"\0" + struct.pack("!HHIH", codec.OPT, octets, rng.choice([0, 0x8000, 1 << 16]), 0)
    return head + struct.pack("!HHHH", 1, *counts) + question + records


def query(rng: random.Random) -> bytes:
    question = name(rng) + struct.pack("!HH", rng.choice(TYPES), rng.choice([1, 1, 1, 3, 255]))
    flags = rng.choice([0x0100, 0x0100, 0x0100, 0x0110, 0, 0x2800, 0x8180])
    made = message(rng, rng.randbytes(2) + flags.to_bytes(2, "big"), question, rng.choice([0, 0, 0, 1, 3]))
    return spoil(rng, made) if rng.random() < 0.4 else made


def answer_to(rng: random.Random, asked: bytes) -> bytes:
    """What a resolver may say to `asked`."""
    flags = bytes((asked[2] | 0x80, 0x80 | rng.choice([0, 0, 0, 2, 3, 5])))
    if rng.random() < 0.1:
        return asked[:2] + flags + bytes(8)
    try:
        question = asked[codec.HEADER : codec.question_end(asked)]
    except Exception:
        question = b""
    made = message(rng, asked[:2] + flags, question, rng.choice([1, 4, 12]))
    return spoil(rng, made) if rng.random() < 0.3 else made


class Loop:
    """What the forwarder wants of an event loop: timers that never fire."""

    def call_later(self, after_s: float, call: Callable[[], object]) -> mock.Mock:
        return mock.Mock()


class Readers:
    """In place of `dns.readers.Readers`: called by hand."""

    def __init__(self) -> None:
        self.owners: dict[int, Any] = {}
        self.readable: Callable[[Any, int], None] = lambda owner, fd: None

    def __call__(self, loop: object, readable: Callable[[Any, int], None]) -> Readers:
        self.readable = readable
        return self

    def __len__(self) -> int:
        return len(self.owners)

    def add(self, fd: int, owner: Any) -> None:
        self.owners[fd] = owner

    def remove(self, fd: int) -> None:
        del self.owners[fd]

    def close(self) -> None: ...


class Resolver:
    """A resolver's end of the forwarder's sockets."""

    def __init__(self) -> None:
        self.sockets: list[Resolver.Socket] = []

    class Socket:
        def __init__(self, number: int) -> None:
            self.number = number
            self.asked = b""
            self.answer = b""
            self.closed = False

        def fileno(self) -> int:
            return self.number

        def send(self, data: bytes) -> int:
            self.asked = bytes(data)
            return len(data)

        def recv_into(self, view: memoryview) -> int:
            view[: len(self.answer)] = self.answer
            return len(self.answer)

        def close(self) -> None:
            self.closed = True

    def open(self, server: Upstream) -> Socket:
        self.sockets.append(self.Socket(100 + len(self.sockets)))
        return self.sockets[-1]


def _server(**more: Any) -> Server:
    return Server(
        names={"gateway.internal": [bytes((192, 168, 65, 1))], "host.internal": [bytes((192, 168, 65, 2)), bytes(16)]},
        domain="internal",
        lease_address=lambda label: bytes((192, 168, 65, 3)) if label == "box" else None,
        lease_name=lambda address: "box" if address == bytes((192, 168, 65, 3)) else None,
        hosts_path=None,
        resolv_conf=None,
        **more,
    )


def _fits(asked: bytes, answer: bytes) -> None:
    """Every answer over UDP: the id of the query, a response, no longer than the asker takes."""
    assert answer[:2] == asked[:2] and answer[2] & 0x80, (asked.hex(), answer.hex())
    if len(answer) > 512:
        assert len(answer) <= codec.udp_limit(asked, codec.question_end(asked))


def _own(rng: random.Random) -> None:
    """Without a resolver: what we answer ourselves can be read by another library wherever the query can."""
    server = _server()
    asked = query(rng)
    answers: list[bytes] = []
    server.datagram(asked, SOURCE, answers.append)
    assert len(answers) == (len(asked) >= codec.HEADER and asked[2] < 0x80)
    for answer in answers:
        _fits(asked, answer)
        read = dnslib.DNSHeader.parse(dnslib.DNSBuffer(answer))
        assert (read.qr, read.opcode, read.rd) == (1, asked[2] >> 3 & 15, asked[2] & 1)
        try:
            dnslib.DNSRecord.parse(asked)
        except (dnslib.DNSError, ValueError):  # it also reads what is in records, as text
            continue
        dnslib.DNSRecord.parse(answer)


def _relayed(rng: random.Random) -> None:
    """Over UDP: the resolver sees the query and the guest the answer, with nothing but the id changed."""
    servers = rng.choice([["192.0.2.1"], ["192.0.2.1", "192.0.2.2"]])
    resolver, readers = Resolver(), Readers()
    with (
        mock.patch.object(tries, "open_udp", resolver.open),
        mock.patch.object(tries, "Readers", readers),
    ):
        server = _server(upstreams=servers)
        server._forwarder._loop = Loop()  # type: ignore[assignment]
        asked = query(rng)
        answers: list[bytes] = []
        server.datagram(asked, SOURCE, answers.append)
        said: list[bytes] = []
        for _ in range(6):
            if not readers.owners:
                break
            number = rng.choice(list(readers.owners))
            sock = resolver.sockets[number - 100]
            assert sock.asked[2:] == asked[2:]
            sock.answer = answer_to(rng, sock.asked)
            if rng.random() < 0.1:
                sock.answer = rng.randbytes(2) + sock.answer[2:]
            said.append(sock.answer)
            readers.readable(readers.owners[number], number)
            if answers:
                break
        if not readers.owners:
            assert server.counters["in_flight"] == 0 and all(sock.closed for sock in resolver.sockets)
        assert len(answers) <= 1
        for answer in answers:
            _fits(asked, answer)
            if resolver.sockets and len(answer) > codec.HEADER:
                own = codec.question_end(asked)
                assert answer[codec.HEADER : own] == asked[codec.HEADER : own]
                if answer[2] & codec.TC:
                    whole = [one for one in said if one[codec.HEADER : own] == asked[codec.HEADER : own]]
                    assert any(_truncated(answer, one) for one in whole)
                elif answer[6:12] != bytes(6):  # with records, so not ours
                    assert answer[2:] in [one[2:] for one in said] or len(said[-1]) == codec.HEADER
        if answers:  # again, under another id: what is remembered is the same answer, but for times to live
            again = rng.randbytes(2) + asked[2:]
            more: list[bytes] = []
            server.datagram(again, SOURCE, more.append)
            for answer in more:
                _fits(again, answer)
                assert len(answer) == len(answers[0])
        server.close()
        assert not readers.owners


def _truncated(answer: bytes, whole: bytes) -> bool:
    """Whether `answer` is the beginning of `whole`, perhaps with its OPT record behind."""
    same = 0
    while same < min(len(answer), len(whole)) and (answer[same] == whole[same] or same in (0, 1, 2, *range(4, 12))):
        same += 1
    return answer[same:] in whole


class Writer:
    """What the server wants of an `asyncio.StreamWriter`."""

    def __init__(self) -> None:
        self.written = b""
        self.closing = False
        self.transport = mock.Mock()

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True


def messages(stream: bytes) -> list[bytes]:
    found = []
    while len(stream) >= 2 and len(stream) >= 2 + (octets := int.from_bytes(stream[:2], "big")):
        found.append(stream[2 : 2 + octets])
        stream = stream[2 + octets :]
    return found


async def _stream(rng: random.Random) -> None:
    """Over TCP: the same answers for any pieces the queries come in, each whole behind its length."""
    queries = [query(rng) for _ in range(rng.randrange(1, 6))]
    said = b"".join(len(each).to_bytes(2, "big") + each for each in queries)
    if rng.random() < 0.3:
        said = spoil(rng, said)
    wanted = []

    class Asker:
        """In place of the connection to a resolver."""

        def __init__(self, server: Upstream, new_id: object) -> None: ...

        async def ask(self, asked: bytes, end: int) -> bytes:
            answer = accept(asked, end, asked[:2], answer_to(random.Random(asked), asked))
            if answer is None:
                raise HostError("dns: no answer")
            return answer

        def close(self) -> None: ...

    with mock.patch.object(tries, "StreamAsker", Asker):
        server = _server(upstreams=["192.0.2.1"])
        for asked in messages(said):
            own, end, _by = server._own_answer(asked)
            if own is None:
                own, _by = await server._forwarder.ask_stream(asked, end)
            if own:
                wanted.append(own)
        reader, writer = asyncio.StreamReader(), Writer()
        serving = asyncio.create_task(server.stream(reader, writer, SOURCE))  # type: ignore[arg-type]
        for piece in split(rng, said):
            reader.feed_data(piece)
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        reader.feed_eof()
        await serving
    assert sorted(messages(writer.written)) == sorted(wanted)
    assert writer.closing and server.counters["open_streams"] == 0 == server.counters["in_flight"]


def z9_names(rng: random.Random) -> None:
    """Queries we answer ourselves, queries relayed over UDP, and streams of queries."""
    _own(rng)
    _relayed(rng)
    if rng.random() < 0.2:
        with asyncio.Runner() as runner:
            runner.run(_stream(rng))
