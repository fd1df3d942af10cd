"""The Internet checksum against a loop over words, scapy and dpkt (I01, C03 and U02 hang on it)."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.utils import checksum as scapy_checksum

from netstack.wire import checksum


def word_loop(data: bytes) -> int:
    """RFC 1071 word by word, with end-around carry after each addition."""
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | (data[at + 1] if at + 1 < len(data) else 0)
        total = (total & 0xFFFF) + (total >> 16)
    return total


edges = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from([b"\x00", b"\xff", b"\x00\x00", b"\xff\xff", b"\x01", b"\xfe"]), max_size=40).map(
        b"".join
    ),
)


@given(edges)
@example(b"")
@example(b"\x00")
@example(b"\xff")
@example(b"\x00\x01\xff\xfe")
@example(b"\xff\xff")
@example(b"\xff\xff\x00")
def test_the_sum_is_that_of_a_loop_over_words(data: bytes) -> None:
    assert checksum.partial(data) == word_loop(data)
    assert checksum.partial(memoryview(data)) == word_loop(data)
    assert checksum.partial(bytearray(data)) == word_loop(data)
    assert checksum.internet(data) == 0xFFFF - word_loop(data)


@given(edges.filter(len))
def test_scapy_and_dpkt_store_the_same(data: bytes) -> None:
    assert checksum.internet(data) == scapy_checksum(data)
    assert checksum.internet(data) == dpkt.in_cksum(data)


def test_only_zeros_sum_to_zero() -> None:
    assert checksum.partial(bytes(1501)) == 0
    assert checksum.partial(b"\xff" * 1500) == 0xFFFF
    assert checksum.partial(b"\x80\x00" * 2 + b"\xff\xfe") == 0xFFFF
    assert checksum.fold(0) == 0
    assert checksum.fold(0xFFFF) == 0xFFFF
    assert checksum.fold(0x1FFFE) == 0xFFFF
    assert checksum.fold(0x10000) == 1


@given(st.lists(st.binary(max_size=60).filter(lambda part: len(part) % 2 == 0), max_size=6), st.binary(max_size=61))
def test_sums_of_even_parts_add_up_to_the_sum_of_the_whole(parts: list[bytes], last: bytes) -> None:
    assert checksum.fold(sum(map(checksum.partial, [*parts, last]))) == word_loop(b"".join(parts) + last)


@given(st.binary(min_size=2, max_size=200), st.integers(0, 0x3FFFFF))
def test_what_is_stored_verifies_and_a_flipped_bit_does_not(data: bytes, bit: int) -> None:
    data = bytes(2) + data
    packet = bytearray(checksum.internet(data).to_bytes(2, "big") + data[2:])
    assert checksum.verify(packet)
    packet[bit // 8 % len(packet)] ^= 1 << bit % 8
    assert not checksum.verify(packet)


@pytest.mark.parametrize(
    ("source", "destination", "length"),
    [
        pytest.param(bytes([192, 168, 65, 3]), bytes([8, 8, 8, 8]), 1480, id="IPv4"),
        pytest.param(bytes(range(16)), bytes(range(16, 32)), 1440, id="IPv6"),
        pytest.param(bytes(range(16)), bytes(range(16, 32)), 0x12345, id="IPv6 jumbo"),
        pytest.param(b"\xff" * 4, b"\xff" * 4, 0, id="multiple of 0xFFFF"),
    ],
)
def test_a_pseudo_header_sums_as_its_octets(source: bytes, destination: bytes, length: int) -> None:
    if len(source) == 4:
        octets = source + destination + struct.pack("!BBH", 0, 17, length)  # RFC 768
    else:
        octets = source + destination + struct.pack("!II", length, 17)  # RFC 8200 8.1
    assert checksum.fold(checksum.pseudo(source, destination, 17, length)) == word_loop(octets)


@given(
    st.binary(min_size=8, max_size=80).filter(lambda data: len(data) % 2 == 0),
    st.integers(0, 30),
    st.binary(min_size=2, max_size=2),
)
def test_an_adjusted_checksum_is_right_for_the_new_octets(data: bytes, at: int, new: bytes) -> None:
    at = 2 + at * 2 % (len(data) - 2)
    data = bytes(2) + data[2:]
    stored = checksum.internet(data)
    changed = data[:at] + new + data[at + 2 :]
    adjusted = checksum.adjust(stored, data[at : at + 2], new)
    if any(changed):
        assert checksum.verify(adjusted.to_bytes(2, "big") + changed[2:])


@pytest.fixture
def with_numpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checksum, "_words", None)
    assert checksum.use_numpy()
    assert checksum.use_numpy()  # again does no harm
    assert checksum._words is not None
    yield


def long_buffers() -> Iterator[bytes]:
    for size in (0, 1, 765, 766, 767, 768, 769, 770, 771, 1448, 1460, 1480, 1500, 8191, 65507, 65535):
        yield random.Random(size).randbytes(size)
        yield bytes(size)
        yield b"\xff" * size
        yield bytes(max(size - 1, 0)) + b"\x01" * min(size, 1)
    yield b"\x80\x00\x00\x00" * 400 + b"\x7f\xff" + bytes(3)  # folds to 0xFFFF
    yield b"\xff\xff" + bytes(1500)


@pytest.mark.usefixtures("with_numpy")
def test_numpy_sums_as_the_loop_over_words() -> None:
    for data in long_buffers():
        assert checksum.partial(data) == word_loop(data)
        for start in (1, 2, 3):  # as a payload lies in a frame, at any address
            view = memoryview(bytearray(bytes(start) + data))[start:]
            assert checksum.partial(view) == word_loop(data)
        if any(data):
            assert checksum.internet(data) == scapy_checksum(data)
