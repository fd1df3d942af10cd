"""Fragments a guest sends, and the packet we see (I03 to I07, G14, Z4)."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet import fragment as scapy_fragment

from netstack.ip.fragments import Reassembler
from netstack.observe.metrics import Counters, Drop
from netstack.wire import ipv4
from tests.support import packets as wire

GUEST = wire.ip("192.168.65.3")
OTHER = wire.ip("192.168.65.4")
REMOTE = wire.ip("1.1.1.1")
TIMEOUT_S = 30.0


class Receiver:
    """A reassembler that is handed packets as the interface does: parsed, as views, with some padding."""

    def __init__(self, max_datagrams: int = 64, max_octets: int = 4 << 20) -> None:
        self.counters = Counters()
        self.engine = Reassembler(max_datagrams, max_octets, TIMEOUT_S, self.counters)

    def add(self, packet: bytes, now: float = 0.0) -> bytes | None:
        view = memoryview(bytearray(packet + bytes(6)))
        header = ipv4.parse(view)
        whole = self.engine.add(header, view, now)
        view[:] = bytes(len(view))  # the views are valid during the call only
        return whole

    def add_all(self, packets: list[bytes], now: float = 0.0) -> list[bytes]:
        return [whole for packet in packets if (whole := self.add(packet, now)) is not None]

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.counters.drops)


def piece(
    offset: int, payload: bytes, mf: bool, *, ident: int = 1, source: bytes = GUEST, protocol: int = 17, ttl: int = 64
) -> bytes:
    return wire.ipv4(source, REMOTE, protocol, payload, ident=ident, offset=offset, mf=mf, ttl=ttl)


def datagram(octets: int, ident: int = 1, source: bytes = GUEST) -> tuple[bytes, list[bytes]]:
    """A whole packet with `octets` of payload and its fragments of 64 octets each."""
    payload = random.Random(octets * 65536 + ident).randbytes(octets)
    whole = wire.ipv4(source, REMOTE, 17, payload, ident=ident)
    return whole, wire.fragments(whole, 64, ident)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_fragments_in_any_order_make_the_packet(order: tuple[int, ...]) -> None:  # I03
    whole, parts = datagram(3 * 64 + 5)
    receiver = Receiver()
    assert receiver.add_all([parts[at] for at in order]) == [whole]
    assert receiver.counters.fragments_reassembled == 1
    assert receiver.drops == {}
    assert (len(receiver.engine), receiver.engine.octets, receiver.engine.deadline()) == (0, 0, None)


def test_duplicated_fragments_do_no_harm() -> None:  # I03
    whole, parts = datagram(5 * 64 - 3)
    receiver = Receiver()
    twice = [part for part in parts[:-1] for _ in range(2)]
    assert receiver.add_all([*twice, *reversed(twice), parts[-1]]) == [whole]
    receiver = Receiver()
    assert receiver.add_all([parts[-1], parts[-1], *twice[:-1]]) == [whole]
    assert receiver.drops == {}


def test_a_subset_of_the_fragments_makes_nothing() -> None:  # I03
    _whole, parts = datagram(4 * 64)
    for missing in range(len(parts)):
        receiver = Receiver()
        assert receiver.add_all(parts[:missing] + parts[missing + 1 :]) == []
        assert len(receiver.engine) == 1


@pytest.mark.parametrize("octets", [1473, 9000, 65515])
def test_what_scapy_fragments_is_put_together(octets: int) -> None:  # C01, U01
    golden = IP(src="192.168.65.3", dst="1.1.1.1", id=4711, ttl=9, tos=4) / ICMP(id=1, seq=2) / bytes(octets - 8)
    parts = [bytes(part) for part in scapy_fragment(golden, 1480)]
    parts.reverse()
    assert Receiver().add_all(parts) == [bytes(golden)]


def test_the_packet_has_the_first_fragments_header() -> None:
    first = wire.ipv4(GUEST, REMOTE, 17, bytes(8), ident=1, mf=True, df=True, ttl=5, tos=8, options=b"\x94\4\0\0")
    last = piece(8, b"end", False, ttl=63)
    receiver = Receiver()
    receiver.add(last)
    whole = receiver.add(first)
    assert whole == wire.ipv4(GUEST, REMOTE, 17, bytes(8) + b"end", ident=1, ttl=5, tos=8, options=b"\x94\4\0\0")


OVERLAPS = [
    pytest.param([(0, 16, True), (8, 16, True)], id="tail over head"),
    pytest.param([(8, 16, True), (0, 16, True)], id="head over tail"),
    pytest.param([(0, 24, True), (8, 8, True)], id="teardrop: inside another"),
    pytest.param([(8, 8, True), (0, 24, True)], id="around another"),
    pytest.param([(0, 16, True), (0, 8, True)], id="same begin, shorter"),
    pytest.param([(0, 8, True), (0, 16, True)], id="same begin, longer"),
    pytest.param([(0, 8, True), (16, 8, True), (8, 16, True)], id="hole filled too well"),
    pytest.param([(0, 16, True), (8, 16, False)], id="last over head"),
    pytest.param([(8, 16, False), (8, 16, True)], id="same octets, last or not"),
    pytest.param([(8, 16, True), (8, 16, False)], id="same octets, not last or last"),
]


@pytest.mark.parametrize("spans", OVERLAPS)
def test_an_overlap_discards_the_datagram_whatever_follows(spans: list[tuple[int, int, bool]]) -> None:  # I04, G14
    receiver = Receiver()
    source = random.Random(1).randbytes(64)
    for start, length, mf in spans:
        assert receiver.add(piece(start, source[start : start + length], mf)) is None
    assert receiver.drops == {Drop.FRAGMENT_OVERLAP: 1}
    assert receiver.engine.octets == 0
    whole = [piece(at, source[at : at + 8], at < 56) for at in range(0, 64, 8)]
    assert receiver.add_all(whole) == []
    assert receiver.engine.expire(TIMEOUT_S) == []
    assert receiver.add_all(whole, TIMEOUT_S)  # the identification may be used again


def test_the_same_span_with_other_octets_discards_the_datagram() -> None:  # I04
    receiver = Receiver()
    assert (
        receiver.add_all([piece(0, b"harmless", True), piece(0, b"evil\0\0\0\0", True), piece(8, b"end", False)]) == []
    )
    assert receiver.drops == {Drop.FRAGMENT_OVERLAP: 2}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([piece(16, b"end", False), piece(24, bytes(8), True)], id="behind the end"),
        pytest.param([piece(24, bytes(8), True), piece(16, b"end", False)], id="an end before what is held"),
        pytest.param([piece(16, b"end", False), piece(24, b"end", False)], id="two ends"),
    ],
)
def test_fragments_that_contradict_each_other_discard_the_datagram(parts: list[bytes]) -> None:  # I04, G14
    receiver = Receiver()
    assert receiver.add_all([*parts, piece(0, bytes(16), True)]) == []
    assert receiver.drops[Drop.FRAGMENT_INVALID] == 1


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(piece(8, bytes(9), True), id="MF and not a multiple of 8"),
        pytest.param(piece(65528, bytes(100), False), id="ping of death"),
        pytest.param(piece(65512, bytes(16), False), id="payload fits, header and payload do not"),
        pytest.param(piece(8, b"", True), id="empty, not last"),
        pytest.param(piece(8, b"", False), id="empty, last"),
    ],
)
def test_an_invalid_fragment_alone_is_dropped(bad: bytes) -> None:  # I07, G14
    receiver = Receiver()
    assert receiver.add_all([piece(0, bytes(8), True), bad]) == []
    assert receiver.drops == {Drop.FRAGMENT_INVALID: 1}
    assert receiver.add(piece(8, b"end", False)) is not None


def test_a_packet_made_too_long_by_the_first_fragments_options_is_dropped() -> None:  # I07
    receiver = Receiver()
    last = piece(65504, bytes(11), False)  # 20 + 65,515: the longest there is
    first = wire.ipv4(GUEST, REMOTE, 17, bytes(65496), ident=1, mf=True, options=b"\1" * 4)
    assert receiver.add_all([last, piece(65496, bytes(8), True), first]) == []
    assert receiver.drops == {Drop.FRAGMENT_INVALID: 1}
    assert receiver.engine.octets == 0


def test_the_longest_packet_in_the_shortest_fragments_takes_no_quadratic_time() -> None:  # G14
    payload = random.Random(2).randbytes(65515)
    whole = wire.ipv4(GUEST, REMOTE, 17, payload, ident=1)
    parts = wire.fragments(whole, 8)
    random.Random(3).shuffle(parts)
    views = [(ipv4.parse(memoryview(part)), memoryview(part)) for part in parts]
    assert len(views) == 8190
    receiver = Receiver()
    began = time.process_time()
    made = [receiver.engine.add(header, view, 0.0) for header, view in views]
    assert time.process_time() - began < 1.0  # about 0.02 s; comparing each with each would take over 3 s
    assert made[-1] == whole


def test_after_30_seconds_the_first_fragment_comes_back_to_be_reported() -> None:  # I05
    receiver = Receiver()
    with_first = wire.ipv4(GUEST, REMOTE, 17, b"12345678", ident=1, mf=True, options=b"\1" * 4)
    receiver.add(with_first, 1.0)
    receiver.add(piece(8, bytes(8), True, ident=2), 2.0)  # no first
    receiver.add(piece(64, bytes(8), True, ident=1), 20.0)  # does not prolong
    assert receiver.engine.deadline() == 31.0
    assert receiver.engine.expire(30.9) == []
    assert receiver.engine.expire(31.0) == [with_first]
    assert receiver.engine.deadline() == 32.0
    assert receiver.engine.expire(32.0) == []
    assert receiver.engine.deadline() is None
    assert receiver.drops == {Drop.FRAGMENT_TIMEOUT: 2}
    assert receiver.engine.octets == 0


def test_datagrams_that_differ_in_one_field_are_put_together_apart() -> None:  # I06
    def parts(source: bytes, ident: int, protocol: int) -> list[bytes]:
        text = repr((source, ident, protocol)).encode().ljust(64, b".")
        return wire.fragments(wire.ipv4(source, REMOTE, protocol, text, ident=ident), 32, ident)

    kinds = [(GUEST, 1, 17), (OTHER, 1, 17), (GUEST, 2, 17), (GUEST, 1, 1)]
    receiver = Receiver()
    assert receiver.add_all([parts(*kind)[0] for kind in kinds]) == []
    made = receiver.add_all([parts(*kind)[1] for kind in kinds])
    assert [whole[20:].rstrip(b".") for whole in made] == [repr(kind).encode() for kind in kinds]


def test_an_overlap_in_one_datagram_leaves_the_others_alone() -> None:  # I06
    receiver = Receiver()
    whole, parts = datagram(200, ident=9)
    receiver.add_all(parts[:2])
    receiver.add_all([piece(0, bytes(16), True), piece(8, bytes(16), True)])
    assert receiver.add_all(parts[2:]) == [whole]


def test_beyond_the_number_of_datagrams_the_oldest_goes() -> None:  # I06, G14
    receiver = Receiver(max_datagrams=3)
    wholes, parts = zip(*(datagram(100, ident) for ident in range(4)), strict=True)
    for first, _second in parts:
        receiver.add(first)
    assert len(receiver.engine) == 3
    assert receiver.drops == {Drop.FRAGMENT_LIMIT: 1}
    assert receiver.add_all([second for _first, second in parts[1:]]) == list(wholes[1:])
    assert receiver.add(parts[0][1]) is None


def test_beyond_the_octets_the_oldest_goes() -> None:  # I06, G14
    receiver = Receiver(max_octets=10_000)
    for ident in range(20):
        receiver.add(piece(8, bytes(2000), True, ident=ident))
        assert receiver.engine.octets <= 10_000
    assert len(receiver.engine) == 4
    assert receiver.drops == {Drop.FRAGMENT_LIMIT: 16}
    whole, parts = datagram(200, ident=99)
    assert receiver.add_all(parts) == [whole]


def test_a_datagram_larger_than_the_limit_gives_way_to_none_but_itself() -> None:  # I06
    receiver = Receiver(max_octets=1000)
    assert receiver.add_all([piece(at, bytes(400), True) for at in range(0, 1600, 400)]) == []
    assert receiver.add(piece(0, bytes(1200), True, ident=2)) is None
    assert len(receiver.engine) == 0
    assert receiver.engine.octets == 0


def test_thirty_thousand_incomplete_datagrams_stay_within_the_memory_allowed() -> None:  # G14, R3
    receiver = Receiver(max_datagrams=64, max_octets=1 << 20)
    tiny = [(ipv4.parse(memoryview(part)), memoryview(part)) for part in wire.fragments(bytes(20) + bytes(65000), 8)]
    tracemalloc.start()
    try:
        for number in range(30_000):
            header, view = tiny[1 + number % 8000]
            header.identification = number % 7
            receiver.engine.add(header, view, 0.0)
        held, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 900_000 < receiver.engine.octets <= 1 << 20
    assert held < 1.1 * (1 << 20)
    for number in range(30_000):
        header, view = tiny[1 + number % 8000]
        header.identification = number & 0xFFFF
        receiver.engine.add(header, view, 0.0)
    assert len(receiver.engine) == 64


class Oracle:
    """Brute force: a mark for every octet of every datagram, and everything that was ever said about it."""

    def __init__(self) -> None:
        self.marks: dict[int, dict[int, tuple[int, int]]] = {}  # identification -> octet -> (fragment, value)
        self.spans: dict[int, list[tuple[int, bytes, bool]]] = {}
        self.broken: set[int] = set()

    def add(self, ident: int, offset: int, mf: bool, data: bytes) -> bytes | None:
        if not data or (mf and len(data) % 8) or offset + len(data) > 65515:
            return None
        if ident in self.broken:
            return None
        spans = self.spans.setdefault(ident, [])
        marks = self.marks.setdefault(ident, {})
        if (offset, data, mf) in spans:
            return None
        spans.append((offset, data, mf))
        taken = [at in marks for at in range(offset, offset + len(data))]
        ends = {start + len(octets) for start, octets, more in spans if not more}
        reach = max(start + len(octets) for start, octets, _more in spans)
        if any(taken) or len(ends) > 1 or (ends and reach > min(ends)):
            self.broken.add(ident)
            return None
        for at, octet in enumerate(data, offset):
            marks[at] = (len(spans), octet)
        if not ends or len(marks) < min(ends):
            return None
        payload = bytes(marks[at][1] for at in range(min(ends)))
        del self.spans[ident], self.marks[ident]
        return payload


oracle_fragments = st.tuples(
    st.integers(1, 3),  # identification
    st.integers(0, 6).map(lambda units: units * 8),
    st.booleans(),
    st.one_of(
        st.integers(0, 4).map(lambda units: units * 8),
        st.integers(0, 20),
    ),
    st.integers(0, 1),  # content of another colour
)


def colour(offset: int, length: int, variant: int) -> bytes:
    return bytes((at * 7 + 1) & 0x7F | variant << 7 for at in range(offset, offset + length))


@settings(max_examples=400, deadline=None)
@given(st.lists(oracle_fragments, max_size=25))
def test_any_fragments_give_what_a_brute_force_oracle_gives(
    fragments: list[tuple[int, int, bool, int, int]],
) -> None:  # Z4
    receiver, oracle = Receiver(), Oracle()
    for ident, offset, mf, length, variant in fragments:
        data = colour(offset, length, variant)
        made = receiver.add(piece(offset, data, mf, ident=ident)) if mf or offset else None
        expected = oracle.add(ident, offset, mf, data) if mf or offset else None
        assert (made[20:] if made else None) == expected
        if made:
            assert made[:20] == wire.ipv4(GUEST, REMOTE, 17, made[20:], ident=ident)[:20]
    receiver.engine.expire(TIMEOUT_S)
    assert (len(receiver.engine), receiver.engine.octets) == (0, 0)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(min_size=65, max_size=1500),
    st.integers(1, 12).map(lambda units: units * 8),
    st.randoms(use_true_random=False),
    st.lists(st.integers(0, 1000), max_size=8),
)
def test_a_datagram_cut_shuffled_and_partly_repeated_comes_back(
    payload: bytes, size: int, chance: random.Random, repeated: list[int]
) -> None:  # I03
    whole = wire.ipv4(GUEST, REMOTE, 17, payload, ident=1)
    parts = wire.fragments(whole, size)
    parts += [parts[at % len(parts)] for at in repeated]
    chance.shuffle(parts)
    made = Receiver().add_all(parts)
    assert made[:1] == [whole]
    assert all(again == whole for again in made)


@given(st.lists(st.tuples(st.binary(min_size=12, max_size=12), st.binary(max_size=30)), max_size=20))
def test_no_header_breaks_it(raw: list[tuple[bytes, bytes]]) -> None:  # G14
    receiver = Receiver(max_datagrams=4, max_octets=500)
    for head, payload in raw:
        identification, flags_offset = struct.unpack_from("!HH", head)
        packet = wire.ipv4(
            head[4:8],
            head[8:12],
            head[3],
            payload,
            ident=identification & 1,
            mf=bool(flags_offset & 0x2000),
            offset=(flags_offset & 0x1FFF) << 3,
        )
        receiver.add(packet)
        assert len(receiver.engine) <= 4
        assert receiver.engine.octets <= 500


def test_scapys_reassembly_of_an_exact_multiple_agrees() -> None:
    golden = IP(src="192.168.65.3", dst="1.1.1.1", id=5) / UDP(sport=1, dport=2) / bytes(range(200))
    parts = [bytes(part) for part in scapy_fragment(golden, 104)]
    assert [len(part) for part in parts] == [124, 124]
    assert Receiver().add_all(parts) == [bytes(golden)]
