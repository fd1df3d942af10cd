"""Datagrams in a stream (spec vpnkit 7.3.4)."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import Malformed
from portfwd.carriers import Destination
from portfwd.mux.channel import Ending
from portfwd.mux.records import BEHIND, MAX_PAYLOAD, Record, RecordChannel, RecordDecoder, emit, parse

HELLO = b"hello world"
LOOPBACK = bytes((127, 0, 0, 1))


def test_the_examples_of_vpnkit() -> None:
    third = bytes.fromhex("15000000000000000b00 68656c6c6f20776f726c64")
    assert emit(Record(HELLO)) == third and parse(third) == Record(HELLO)
    first = bytes.fromhex("19000400 7f000001 901f 0000 0b00") + HELLO
    assert emit(Record(HELLO, LOOPBACK, 8080)) == first and parse(first) == Record(HELLO, LOOPBACK, 8080)


def test_an_ipv4_address_in_16_octets_is_one() -> None:
    mapped = bytes.fromhex("25001000 00000000000000000000ffff 7f000001 901f 0000 0b00") + HELLO
    assert parse(mapped) == Record(HELLO, LOOPBACK, 8080)


records = st.builds(
    Record,
    st.one_of(st.binary(max_size=100), st.sampled_from([bytes(9216), bytes(MAX_PAYLOAD)])),
    st.sampled_from([b"", LOOPBACK, bytes(15) + b"\1", b"\xfe\x80" + bytes(13) + b"\1"]),
    st.integers(0, 65535),
)


@given(st.lists(records, max_size=6), st.integers(0, 1 << 32), st.sampled_from([1, 3, 100, 70_000]))
def test_records_survive_any_cutting(said: list[Record], seed: int, largest: int) -> None:
    rng = random.Random(seed)
    stream = b"".join(map(emit, said))
    if len(stream) > 20_000 and largest < 100:
        largest = 5000
    decoder, found = RecordDecoder(), []
    while stream:
        cut = rng.randrange(1, largest + 1)
        found += decoder.feed(memoryview(stream[:cut]))
        stream = stream[cut:]
    assert found == said


@given(st.binary(max_size=60))
def test_any_octets_are_records_or_wrong(octets: bytes) -> None:
    decoder = RecordDecoder()
    try:
        for record in decoder.feed(memoryview(octets)):
            assert len(record.payload) < 60
    except Malformed:
        pass
    assert len(decoder._kept) <= 60


@pytest.mark.parametrize(
    "octets",
    [
        "0900 0000 0000 0000 00",
        "0000",
        "0a00 0500 0000 0000 0000",
        "0a00 1000 0000 0000 0000",
        "0a00 0000 0000 0100 0000",
        "0a00 0000 0000 0000 0100",
        "0b00 0000 0000 0000 0000 61",
    ],
    ids=["short", "empty", "5 octets of address", "address cut", "zone cut", "payload cut", "too long"],
)
def test_records_that_lie(octets: str) -> None:
    with pytest.raises(Malformed):
        list(RecordDecoder().feed(memoryview(bytes.fromhex(octets))))


def test_what_fits_no_record_is_refused() -> None:
    with pytest.raises(Malformed):
        emit(Record(bytes(MAX_PAYLOAD + 1)))
    with pytest.raises(Malformed):
        emit(Record(b"", b"abc"))


class Narrow:
    """A channel that takes a few octets at a time, when told."""

    destination = Destination("udp", LOOPBACK, 53)
    scratch = memoryview(bytearray(10))

    def __init__(self) -> None:
        self.credit = 0
        self.sent = b""
        self.consumed_octets = 0
        self.closed = 0
        self.receiver: Any = None

    def attach(self, receiver: Any) -> None:
        self.receiver = receiver

    def sendable(self) -> int:
        return self.credit

    def send(self, octets: memoryview) -> None:
        assert 0 < len(octets) <= self.credit
        self.credit -= len(octets)
        self.sent += octets

    def consumed(self, octets: int) -> None:
        self.consumed_octets += octets

    def shutdown(self) -> None:
        raise AssertionError("datagrams have no half")

    def close(self) -> None:
        self.closed += 1


def test_a_record_goes_in_parts_when_credit_is_short_and_too_many_are_dropped() -> None:
    channel, ends = Narrow(), list[Ending]()
    records = RecordChannel(channel, lambda record: None, ends.append)
    assert records.send(Record(bytes(MAX_PAYLOAD))) and records.send(Record(HELLO))
    assert records.send(Record(bytes(BEHIND - MAX_PAYLOAD - 100)))
    assert not records.send(Record(bytes(100))) and records.dropped == 1
    assert not records.send(Record(bytes(MAX_PAYLOAD + 20))) and records.dropped == 2, (
        "IPv6 can carry more than a record"
    )
    while records._waiting:
        channel.credit = 10_000
        channel.receiver.room()
    assert channel.sent.startswith(emit(Record(bytes(MAX_PAYLOAD))) + emit(Record(HELLO)))
    assert records._behind == 0 and ends == []


def test_nonsense_from_the_peer_ends_the_channel() -> None:
    channel, ends, found = Narrow(), list[Ending](), list[Record]()
    RecordChannel(channel, found.append, ends.append)
    channel.receiver.data(memoryview(emit(Record(HELLO))))
    assert found == [Record(HELLO)] and channel.consumed_octets == 21
    channel.receiver.data(memoryview(emit(Record(HELLO)) + b"\1\0"))
    assert len(found) == 2 and ends == [Ending.LOST] and channel.closed == 1
    channel.receiver.closed(Ending.LOST)
    assert ends == [Ending.LOST]
