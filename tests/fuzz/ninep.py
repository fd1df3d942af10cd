"""Z13: a 9P server is asked anything, in any order, in any pieces: one answer each, and nothing is left behind."""

from __future__ import annotations

import random
import struct
from typing import Any

from netstack.errors import Malformed
from netstack.observe.classic import Rings, classify
from portfwd.errors import BindFailed
from portfwd.ninep.files import Filesystem
from portfwd.ninep.introspect import Sources, TreeFiles, network_tree
from portfwd.ninep.messages import (
    DMDIR,
    NOFID,
    NOTAG,
    Message,
    Qid,
    Rerror,
    Rversion,
    Stat,
    Tattach,
    Tauth,
    Tclunk,
    Tcreate,
    Tflush,
    Topen,
    Tread,
    Tremove,
    Tstat,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
)
from portfwd.ninep.ports import PortTable
from portfwd.ninep.requests import PortRequest
from portfwd.ninep.server import MAX_HELD, MAX_MSIZE, MIN_MSIZE, Session
from portfwd.ninep.wire import HEADER, Decoder, emit, parse
from portfwd.owners import Owner
from portfwd.spec import PublishSpec
from tests.fuzz.bend import split, spoil

MAX_FIDS = 7
MAX_ENTRIES = 6
NAMES = ["a", "b", "ctl", "README", "..", ".", "", "x/y", "flows", "capture", "all.pcap", "é" * 200]
REQUESTS = [
    b"tcp:127.0.0.1:0:tcp:192.168.65.3:80",
    b"udp:127.0.0.1:53:udp:192.168.65.3:53\n",
    b"unix:L3J1bi9h:tcp:192.168.65.3:80",
    b"tcp:0.0.0.0:80:unix:L3J1bi9h",
    b"tcp:0.0.0.0:80",
    b"",
]


class Forward:
    def __init__(self, number: int, spec: PublishSpec, owner: Owner) -> None:
        self.id, self.spec, self.owner = number, spec, owner


class Registry:
    """Publishes without a socket, and fails now and then."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._number = 0
        self.forwards: dict[int, Forward] = {}

    def add(self, spec: PublishSpec, owner: Owner) -> Forward:
        if self._rng.random() < 0.2:
            raise BindFailed(spec, "why", self._rng.choice([98, 99, 13, 24]))
        self._number += 1
        made = self.forwards[self._number] = Forward(self._number, spec, owner)
        return made

    def by_id(self, number: int) -> Forward | None:
        return self.forwards.get(number)

    def remove(self, forward: Forward) -> None:
        self.forwards.pop(forward.id, None)

    def release(self, owner: Owner) -> None:
        for forward in [each for each in self.forwards.values() if each.owner == owner]:
            self.remove(forward)


def _request(rng: random.Random) -> Message:
    """Anything, of fids and names that may well be there."""
    tag, fid = rng.choice([0, 1, 1, NOTAG]), rng.choice([*range(MAX_FIDS + 3), NOFID])
    name = rng.choice(NAMES)
    kind = rng.randrange(30)
    if kind < 3:
        return Twalk(tag, rng.choice([0, fid]), rng.randrange(MAX_FIDS + 3), ())
    if kind < 6:
        return Twalk(
            tag, fid, rng.randrange(MAX_FIDS + 3), tuple(rng.choices(NAMES[:9], k=rng.choice([0, 0, 1, 1, 2, 16])))
        )
    if kind < 9:
        return Topen(tag, fid, rng.choice([0, 0, 0, 1, 2, 2, 3, 0x10, 0x11, 0x12, 0x40, 0xFF]))
    if kind < 12:
        return Tcreate(tag, fid, name, rng.choice([DMDIR | 0o755, DMDIR, 0]), rng.choice([0, 2, 0x40]))
    if kind < 15:
        return Tread(tag, fid, rng.choice([0, 0, 1, 200, 1 << 63]), rng.choice([0, 10, 100, 8192, 0xFFFFFFFF]))
    if kind < 18:
        return Twrite(tag, fid, rng.choice([0, 5]), rng.choice(REQUESTS))
    stat = Stat(qid=Qid(0, 0, 0), name=rng.choice(["", "y"]), length=rng.choice([0, 5, (1 << 64) - 1]))
    others: list[Message] = [
        Tclunk(tag, fid),
        Tclunk(tag, fid),
        Tremove(tag, fid),
        Tstat(tag, fid),
        Twstat(tag, fid, stat),
        Tflush(tag, rng.randrange(3)),
        Tattach(tag, fid, rng.choice([NOFID, NOFID, 3]), name, ""),
        Tauth(tag, fid, name, name),
    ]
    return rng.choice(others) if rng.random() < 0.98 else _hello(rng)


def _hello(rng: random.Random) -> Tversion:
    version = rng.choice(["9P2000", "9P2000", "9P2000.u", "9P2000.u", "9P2000.L", ""])
    return Tversion(NOTAG, rng.choice([MIN_MSIZE, 4096, 4096, 8192, 1 << 30, MIN_MSIZE - 1, 0]), version)


def _answers(session: Session, pieces: list[bytes]) -> tuple[list[bytes], bool]:
    """All answers, and whether the framing held."""
    found: list[bytes] = []
    for piece in pieces:
        session.feed(piece)
        try:
            while (answer := session.next()) is not None:
                found.append(answer)
                assert HEADER <= len(answer) <= (session.msize or MAX_MSIZE)
                assert session.fids <= MAX_FIDS
                assert 0 <= session._held <= MAX_HELD
        except Malformed:
            return found, False
    return found, True


def _files(rng: random.Random, seed: int) -> tuple[Filesystem, PortTable | None, Registry]:
    registry = Registry(random.Random(seed))
    if rng.random() < 0.75:
        table = PortTable(registry, via=lambda _: "stack", max_entries=MAX_ENTRIES)  # type: ignore[arg-type]
        return table.connect("fuzz"), table, registry
    text = "x" * rng.choice([0, 5, 20_000])
    sources = Sources(lambda: text, lambda: text, lambda: text.encode(), lambda: text)
    return TreeFiles(network_tree(sources, Rings()), wall=lambda: 0.0), None, registry


def _session(rng: random.Random) -> None:
    hello = [Tversion(NOTAG, 4096, rng.choice(["9P2000", "9P2000.u"])), Tattach(1, 0, NOFID, "", "")]
    said: list[Message] = [*hello, *(_request(rng) for _ in range(rng.choice([10, 60, 150])))]
    unix = hello[0].version == "9P2000.u"  # type: ignore[union-attr]
    messages = []
    for message in said:
        messages.append(emit(message, unix=unix))
        if isinstance(message, Tversion):
            unix = message.version == "9P2000.u"
    good = rng.random() < 0.5
    stream = b"".join(messages) if good else spoil(rng, b"".join(messages))
    kind, seed = rng.getrandbits(32), rng.getrandbits(32)
    results = []
    for pieces in ([stream], split(rng, stream)):
        files, table, registry = _files(random.Random(kind), seed)
        session = Session(files, max_fids=MAX_FIDS)
        answers, whole = _answers(session, pieces)
        if good and whole:
            assert [answer[5:7] for answer in answers] == [message[5:7] for message in messages], (
                "one answer each, in order"
            )
            for message, answer in zip(messages, answers, strict=True):
                assert answer[4] in (message[4] + 1, 107)
                assert answer[4] != 107 or b"longer than msize" not in answer or message[4] in (110, 124)
        if table is not None:
            assert len(table.entries) <= MAX_ENTRIES
            assert len(registry.forwards) <= len(table.entries)
        session.close()
        assert session.fids == 0 and session._held == 0
        assert not registry.forwards, "published for nobody"
        assert table is None or not table.entries
        results.append((answers, whole))
    assert results[0] == results[1], "pieces do not matter"


def _wire(rng: random.Random) -> None:
    unix = rng.random() < 0.5
    octets = emit(_request(rng) if rng.random() < 0.9 else _hello(rng), unix=unix)
    assert emit(parse(octets, unix=unix), unix=unix) == octets
    bent = spoil(rng, octets)
    if len(bent) >= HEADER and rng.random() < 0.8:
        bent = struct.pack("<I", len(bent)) + bent[4:]
    try:
        assert emit(parse(bent, unix=unix), unix=unix) == bent
    except Malformed:
        pass
    decoder = Decoder(200)
    decoder.feed(bent)
    try:
        message = decoder.next()
        assert message is None or message == bent[: len(message)]
    except Malformed:
        assert not HEADER <= int.from_bytes(bent[:4], "little") <= 200
    assert isinstance(parse(emit(Rerror(1, "x", 5), unix=True), unix=True), Rerror)
    assert isinstance(parse(emit(Rversion(1, 5, ""))), Rversion)


def _text(rng: random.Random) -> None:
    from netstack.errors import ConfigError

    text = spoil(rng, rng.choice(REQUESTS)).decode(errors="replace")
    try:
        request = PortRequest.parse(text)
        assert PortRequest.parse(str(request)) == request
        request.spec(lambda address: "stack")
    except ConfigError as error:
        assert "\n" not in str(error)


def _rings(rng: random.Random) -> None:
    rings = Rings(snaplen=rng.choice([64, 128, 1500]))
    reader = rings.all.follow(lambda: None)
    taken = b""
    total = rng.randrange(1, 60)
    for number in range(total):
        frame: Any = rng.randbytes(12) + rng.choice([b"\x08\0", b"\x81\0\0\1\x08\0", b"\x08\x06"])
        frame += spoil(rng, b"E\0\0\x1c\0\0\0\0\x40\x11" + rng.randbytes(10) + b"\0\x35" + bytes(rng.choice([6, 900])))
        rings.feed(memoryview(frame[: rng.randrange(len(frame) + 1)]), 1, number * 10**9)
        if rng.random() < 0.5:
            taken += reader.take(rng.choice([1, 500, 1 << 16]))
        for ring in rings.rings.values():
            assert ring.octets <= ring.limit
    while piece := reader.take():
        taken += piece
    at = count = 0
    while at < len(taken):
        at += 16 + struct.unpack_from("<I", taken, at + 8)[0]
        count += 1
    assert at == len(taken) and count + reader.lost == total
    assert classify(rng.randbytes(rng.randrange(80))) in (None, *rings.rings)


def z13_ninep(rng: random.Random) -> None:
    """9P messages and sessions, requests for ports, rings of packets."""
    _wire(rng)
    _text(rng)
    _session(rng)
    if rng.random() < 0.2:
        _rings(rng)
