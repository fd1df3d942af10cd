"""Messages of 9P2000.L: octets against values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import Malformed
from portfwd.ninep.wire import Qid
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep import wire

# Written down by hand from the protocol's description; spaces are between fields.
GOLDEN = [
    (m.Tversion(m.NOTAG, 65536, b"9P2000.L"), "15000000 64 ffff 00000100 0800 3950323030302e4c"),
    (m.Tattach(1, 0, m.NOFID, b"", b"/x", 1000), "19000000 68 0100 00000000 ffffffff 0000 0200 2f78 e8030000"),
    (m.Rlerror(2, 13), "0b000000 07 0200 0d000000"),
    (m.Tlopen(3, 1, 0o101001), "0f000000 0c 0300 01000000 01820000"),
    (m.Rlopen(3, Qid(0, 1, 2), 0), "18000000 0d 0300 00 01000000 0200000000000000 00000000"),
    (m.Tlcreate(4, 1, b"a", 2, 0o644, 5), "1a000000 0e 0400 01000000 0100 61 02000000 a4010000 05000000"),
    (m.Tgetattr(5, 1, 0x7FF), "13000000 18 0500 01000000 ff07000000000000"),
    (
        m.Rgetattr(5, 0x7FF, Qid(0x80, 1, 2), 0o40755, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        "a0000000 19 0500 ff07000000000000 80 01000000 0200000000000000 ed410000 03000000 04000000"
        + "".join(f"{number:02x}00000000000000" for number in range(5, 16))
        + "00" * 32,
    ),
    (m.Treaddir(6, 1, 2, 4096), "17000000 28 0600 01000000 0200000000000000 00100000"),
    (m.Tfsync(7, 1, 1), "0f000000 32 0700 01000000 01000000"),
    (
        m.Tlock(8, 1, 1, 0, 2, 3, 4, b"me"),
        "28000000 34 0800 01000000 01 00000000 0200000000000000 0300000000000000 04000000 0200 6d65",
    ),
    (m.Tmknod(9, 1, b"f", 0o10600, 1, 3, 0), "1e000000 12 0900 01000000 0100 66 80110000 01000000 03000000 00000000"),
    (m.Trenameat(10, 1, b"a", 2, b"b"), "15000000 4a 0a00 01000000 0100 61 02000000 0100 62"),
    (m.Tunlinkat(11, 1, b"a", 0x200), "12000000 4c 0b00 01000000 0100 61 00020000"),
    (m.Txattrwalk(12, 1, 2, b"user.x"), "17000000 1e 0c00 01000000 02000000 0600 757365722e78"),
    (m.Twalk(13, 1, 2, (b"\xff", b"b")), "17000000 6e 0d00 01000000 02000000 0200 0100 ff 0100 62"),
]


@pytest.mark.parametrize(("message", "octets"), GOLDEN)
def test_golden_octets(message: m.Message, octets: str) -> None:
    assert wire.emit(message).hex() == octets.replace(" ", "")
    assert wire.parse(bytes.fromhex(octets)) == message


def test_fsync_before_it_had_a_second_field() -> None:
    assert wire.parse(bytes.fromhex("0b000000 32 0700 01000000")) == m.Tfsync(7, 1, 0)


BITS = {octets: st.integers(0, (1 << 8 * int(octets)) - 1) for octets in "1248"}
NAMES = st.binary(max_size=30)
QIDS = st.builds(Qid, BITS["1"], BITS["4"], BITS["8"])
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "b": NAMES,
    "B": st.lists(NAMES, max_size=16).map(tuple),
    "q": QIDS,
    "Q": st.lists(QIDS, max_size=16).map(tuple),
    "d": st.binary(max_size=300),
    "o": BITS["4"],
    **BITS,
}
MESSAGES = st.sampled_from(sorted(wire.LAYOUTS)).flatmap(
    lambda number: st.builds(wire.LAYOUTS[number][0], BITS["2"], *(KINDS[kind] for kind in wire.LAYOUTS[number][1]))
)


def test_each_layout_is_as_long_as_its_message() -> None:
    for kind, layout in wire.LAYOUTS.values():
        assert len(layout) == len(fields(kind)) - 1, kind
    requests = {kind.__name__ for kind, _ in wire.LAYOUTS.values() if kind.__name__.startswith("T")}
    replies = {kind.__name__ for kind, _ in wire.LAYOUTS.values()} - requests
    assert {"R" + name[1:] for name in requests} - replies == {"Rauth"}, "which we never send"


@given(MESSAGES)
def test_what_is_emitted_parses_back(message: m.Message) -> None:
    octets = wire.emit(message)
    assert wire.parse(octets) == message
    assert wire.emit(wire.parse(memoryview(octets))) == octets


@given(MESSAGES, st.data())
def test_a_message_cut_anywhere_is_malformed(message: m.Message, data: st.DataObject) -> None:
    octets = wire.emit(message)
    cut = bytearray(octets[: data.draw(st.integers(0, len(octets) - 1))])
    if len(cut) >= 4:
        cut[:4] = len(cut).to_bytes(4, "little")
    if isinstance(message, m.Tfsync) and len(cut) == 11:
        return
    with pytest.raises(Malformed):
        wire.parse(bytes(cut))


@given(st.sampled_from(sorted(wire.LAYOUTS)) | BITS["1"], st.binary(max_size=100))
def test_any_octets_parse_or_are_malformed(number: int, body: bytes) -> None:
    octets = (len(body) + 7).to_bytes(4, "little") + bytes([number, 1, 0]) + body
    try:
        message = wire.parse(octets)
    except Malformed:
        return
    assert wire.emit(message)[:7] == octets[:7] or isinstance(message, m.Tfsync)


@given(st.lists(st.tuples(QIDS, BITS["8"], BITS["1"], NAMES), max_size=10))
def test_entries_parse_back(entries: list[tuple[Qid, int, int, bytes]]) -> None:
    octets = b"".join(wire.emit_entry(*entry) for entry in entries)
    assert len(octets) == sum(wire.entry_octets(name) for *_, name in entries)
    assert list(wire.parse_entries(octets)) == entries
    if octets:
        with pytest.raises(Malformed):
            list(wire.parse_entries(octets[:-1]))


def test_data_are_not_copied() -> None:
    octets = wire.emit(m.Twrite(1, 2, 3, b"data"))
    parsed = wire.parse(memoryview(octets))
    assert isinstance(parsed, m.Twrite) and isinstance(parsed.data, memoryview) and parsed.data.obj is octets
