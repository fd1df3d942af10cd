"""Z14: VPNKit's multiplexer and its datagrams, whatever a peer says and however it is cut: bounded, in step, never an exception.

Two models: a script of good frames is bent, and what comes out of the engine is compared between cuttings; two engines talk over a
wire of pieces while their users open, send, shut and close at random, and every stream is a prefix of what was sent.
"""

from __future__ import annotations

import random

from netstack.errors import ConfigError, Malformed
from portfwd.carriers import Destination
from portfwd.mux.engine import (
    CLOSED,
    CREDIT,
    ENDED,
    HIGH_WATER,
    OCTETS,
    OPENED,
    OVERRUN,
    Flow,
    Limits,
    Multiplexer,
    Role,
)
from portfwd.mux.frames import (
    HANDSHAKE,
    MAX_OPEN,
    Close,
    Data,
    Frame,
    MuxError,
    Open,
    Shutdown,
    Window,
    destination_size,
    detect,
    emit,
    parse_destination,
)
from portfwd.mux.records import Record, RecordDecoder
from portfwd.mux.records import emit as emit_record
from portfwd.mux.where import Where
from tests.fuzz.bend import split, spoil

LIMITS = Limits(channels=6, window=20_000, windows=60_000, overrun=5000, overruns=8000, queued=60_000)


def _target(rng: random.Random) -> Destination:
    if rng.random() < 0.3:
        return Destination("unix", path="/" + "x" * rng.randrange(1, 300))
    return Destination(rng.choice(["tcp", "udp"]), rng.randbytes(rng.choice([4, 16])), rng.randrange(65536))


def _script(rng: random.Random) -> bytes:
    """Frames of a few channels, most of them sensible."""
    stream = b""
    for _ in range(rng.randrange(1, 25)):
        id = rng.choice([0, 1, 2, 3, 7, 0xFFFFFFFF, rng.getrandbits(32)])
        frame: Frame = rng.choice(
            [
                Open(id, _target(rng)),
                Close(id),
                Shutdown(id),
                Window(id, rng.choice([0, 10, 65536, rng.getrandbits(64)])),
                Data(id, size := rng.choice([0, 1, 100, 100, 3000, rng.randrange(30_000)])),
            ]
        )
        stream += emit(frame)
        if isinstance(frame, Data):
            stream += rng.randbytes(size)
    return stream


class _User:
    """Answers events by a seeded mood; keeps what a peer makes us hold, and checks the bounds."""

    def __init__(self, seed: int, handshake: bool) -> None:
        self.rng = random.Random(seed)
        self.mux = Multiplexer(role=Role.LISTENER, handshake=handshake, limits=LIMITS)
        self.heard: dict[int, bytes] = {}
        self.failure = ""

    def hear(self, octets: bytes) -> None:
        if self.failure:
            return
        try:
            for event, flow, view in self.mux.receive(memoryview(octets)):
                self._event(event, flow, view)
        except MuxError as error:
            self.failure = str(error)
        self._check()

    def _event(self, event: int, flow: Flow, view: memoryview) -> None:
        mux = self.mux
        if event == OPENED:
            if flow.id % 4:
                mux.accept(flow)
            if flow.id % 5 == 3:
                mux.close(flow)
        elif event == OCTETS:
            self.heard[flow.id] = self.heard.get(flow.id, b"") + bytes(view)
            if flow.id % 3:
                mux.consumed(flow, len(view))
        elif event == CREDIT:
            assert mux.sendable(flow) or mux.queued >= HIGH_WATER
        elif event in (ENDED, OVERRUN):
            mux.shutdown(flow)
        else:
            assert event == CLOSED
            mux.close(flow)

    def _check(self) -> None:
        mux = self.mux
        assert len(mux.flows) <= LIMITS.channels
        assert mux.queued <= LIMITS.queued + MAX_OPEN
        assert len(mux._decoder._kept) < MAX_OPEN
        assert 0 <= mux._windows <= LIMITS.windows + LIMITS.channels * 8192
        assert 0 <= mux._overruns <= LIMITS.overruns
        assert mux._overruns == sum(max(0, one.received - one.granted) for one in mux.flows.values() if not one.closed)
        for flow in mux.flows.values():
            held = flow.received - flow.consumed
            assert flow.closed or held <= LIMITS.window + LIMITS.overrun


def _hostile(rng: random.Random) -> None:
    handshake = rng.random() < 0.5
    stream = (HANDSHAKE if handshake else b"") + _script(rng)
    if rng.random() < 0.7:
        stream = spoil(rng, stream)
    seed = rng.getrandbits(32)
    whole = _User(seed, handshake)
    whole.hear(stream)
    assert len(whole.mux.dump().splitlines()) <= 500
    for _ in range(2):
        cut = _User(seed, handshake)
        for piece in split(rng, stream):
            cut.hear(piece)
        # An overrun is judged piece by piece, so how much of it is heard, and what is said about it, depends on the pieces.
        if not whole.mux.overran and not cut.mux.overran:
            assert (cut.heard, cut.failure) == (whole.heard, whole.failure)


def _conversation(rng: random.Random) -> None:
    """Two of us: nothing is ever unknown, dropped or out of order, whatever the users do."""
    ends = [Multiplexer(role=role, handshake=True, limits=LIMITS) for role in (Role.CONNECTOR, Role.LISTENER)]
    sent: dict[tuple[int, int], bytes] = {}
    heard: dict[tuple[int, int], bytes] = {}
    names: list[dict[int, int]] = [{}, {}]
    serial = 0

    def carry(at: int) -> None:
        octets = b"".join(ends[at].gather(1000))
        take = rng.choice([len(octets), rng.randrange(len(octets) + 1)])
        ends[at].sent(take)
        there = ends[1 - at]
        for event, flow, view in there.receive(memoryview(octets[:take])):
            if event == OPENED:
                names[1 - at][flow.id] = names[at][flow.id]
                there.accept(flow)
            elif event == OCTETS:
                key = (1 - at, names[1 - at][flow.id])
                heard[key] = heard.get(key, b"") + bytes(view)
                assert sent[(at, key[1])].startswith(heard[key])
                there.consumed(flow, len(view))
            elif event == CLOSED:
                there.close(flow)
            else:
                assert event in (ENDED, CREDIT)
        while there.next_in_line():
            pass

    for _ in range(rng.randrange(5, 150)):
        at = rng.randrange(2)
        mux = ends[at]
        choice = rng.random()
        flow = rng.choice(list(mux.flows.values())) if mux.flows else None
        if choice < 0.1 and len(mux.flows) < LIMITS.channels // 3:
            names[at][mux.open(_target(rng)).id] = serial
            serial += 1
        elif choice < 0.5 or flow is None:
            carry(at)
        elif choice < 0.9:
            octets = rng.randbytes(min(mux.sendable(flow), rng.choice([1, 100, 30_000])))
            if octets:
                key = (at, names[at][flow.id])
                sent[key] = sent.get(key, b"") + octets
                mux.send(flow, memoryview(octets))
        elif choice < 0.95:
            mux.shutdown(flow)
        else:
            mux.close(flow)
    while ends[0].queued or ends[1].queued:
        carry(rng.randrange(2))
    assert not any(mux.unknown or mux.overran or mux._overruns for mux in ends)


def _records(rng: random.Random) -> None:
    stream = b"".join(
        emit_record(Record(rng.randbytes(rng.choice([0, 9, 3000])), rng.randbytes(rng.choice([0, 4, 16])), 5, "eth0"))
        for _ in range(rng.randrange(8))
    )
    if rng.random() < 0.7:
        stream = spoil(rng, stream)

    def decoded(pieces: list[bytes]) -> tuple[list[Record], bool]:
        decoder, found = RecordDecoder(), list[Record]()
        try:
            for piece in pieces:
                found.extend(decoder.feed(memoryview(piece)))  # what was found before an error is lost with the channel
        except Malformed:
            return found, False
        assert len(decoder._kept) < 65535
        return found, True

    whole, good = decoded([stream])
    cut, still_good = decoded(split(rng, stream))
    assert good == still_good
    assert cut == whole if good else cut[: len(whole)] == whole or whole[: len(cut)] == cut


def _texts(rng: random.Random) -> None:
    octets = spoil(rng, emit(Open(1, _target(rng)))[8:])
    try:
        size = destination_size(octets)
        if size is not None and size <= len(octets):
            str(parse_destination(octets[:size]))
    except Malformed:
        pass
    try:
        assert detect(octets) in (1, 2, 3, None)
    except MuxError:
        pass
    text = spoil(rng, rng.choice([b"hyperkit:/a/b,cid=3,port=62373,generation=2", b"fd:3", b"connect:/x,port=1"]))
    try:
        where = Where.parse(text.decode("latin-1"))
        assert Where.parse(str(where)) == where
    except ConfigError:
        pass


def z14_mux(rng: random.Random) -> None:
    """Hostile frames, two engines at random, records, destinations and ways as text."""
    _hostile(rng)
    _conversation(rng)
    _records(rng)
    _texts(rng)
