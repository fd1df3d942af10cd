"""Messages of 9P: octets against values (spec vpnkit, appendix D)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import Malformed
from portfwd.ninep import messages
from portfwd.ninep.messages import (
    MAX_WALK,
    NOFID,
    NOTAG,
    Message,
    Qid,
    Rattach,
    Rerror,
    Rread,
    Rstat,
    Rversion,
    Rwalk,
    Stat,
    Tattach,
    Tclunk,
    Tcreate,
    Topen,
    Tread,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
)
from portfwd.ninep.wire import Decoder, emit, emit_stat, names_fit, parse, parse_stats

ROOT = Qid(0x80, 1, 2)
STAT = Stat(0xFFFF, 0xFFFFFFFF, Qid(0, 0, 5), 0o444, 1146711721, 1146711721, 0, "ctl", "uid", "gid", "uid", "", 0, 0, 0)

# Written down by hand from the table of appendix D; spaces are between fields.
GOLDEN = [
    (Tversion(NOTAG, 8192, "9P2000"), "13000000 64 ffff 00200000 0600 395032303030"),
    (Tversion(NOTAG, 8192, "9P2000.u"), "15000000 64 ffff 00200000 0800 3950323030302e75"),
    (Rversion(NOTAG, 4096, "unknown"), "14000000 65 ffff 00100000 0700 756e6b6e6f776e"),
    (Tattach(1, 0, NOFID, "nobody", ""), "19000000 68 0100 00000000 ffffffff 0600 6e6f626f6479 0000"),
    (Rattach(1, ROOT), "14000000 69 0100 80 01000000 0200000000000000"),
    (Rerror(2, "file not found"), "17000000 6b 0200 0e00 66696c65206e6f7420666f756e64"),
    (Twalk(3, 1, 2, ("a", "ctl")), "19000000 6e 0300 01000000 02000000 0200 0100 61 0300 63746c"),
    (Rwalk(3, ()), "09000000 6f 0300 0000"),
    (Topen(4, 2, 0x12), "0c000000 70 0400 02000000 12"),
    (Tcreate(5, 2, "a", 0x800001ED, 0), "13000000 72 0500 02000000 0100 61 ed010080 00"),
    (Tread(6, 2, 1 << 33, 100), "17000000 74 0600 02000000 0000000002000000 64000000"),
    (Rread(6, b"OK"), "0d000000 75 0600 02000000 4f4b"),
    (Twrite(7, 2, 0, b"x"), "18000000 76 0700 02000000 0000000000000000 01000000 78"),
    (Tclunk(8, 2), "0b000000 78 0800 02000000"),
    (
        Rstat(9, Stat(0xFFFF, 0xFFFFFFFF, Qid(0, 0, 5), 0o444, 1, 2, 3, "ctl", "uid", "gid", "")),
        "43000000 7d 0900 3a00 3800 ffff ffffffff 00 00000000 0500000000000000 24010000 01000000 02000000"
        " 0300000000000000 0300 63746c 0300 756964 0300 676964 0000",
    ),
]
GOLDEN_UNIX = [
    (Tattach(1, 0, NOFID, "", "", 1001), "17000000 68 0100 00000000 ffffffff 0000 0000 e9030000"),
    (Rerror(2, "no", 2), "0f000000 6b 0200 0200 6e6f 02000000"),
    (Tcreate(5, 2, "a", 0, 0, "x"), "16000000 72 0500 02000000 0100 61 00000000 00 0100 78"),
    (
        Twstat(9, 1, Stat()),
        "4c000000 7e 0900 01000000 3f00 3d00" + " ff" * 39 + "0000" * 4 + " 0000 ffffffff ffffffff ffffffff",
    ),
]


@pytest.mark.parametrize(("message", "octets"), GOLDEN)
def test_golden_octets_of_9p2000(message: Message, octets: str) -> None:
    assert emit(message) == bytes.fromhex(octets)
    assert parse(bytes.fromhex(octets)) == message


@pytest.mark.parametrize(("message", "octets"), GOLDEN_UNIX)
def test_golden_octets_of_9p2000_u(message: Message, octets: str) -> None:
    assert emit(message, unix=True) == bytes.fromhex(octets)
    assert parse(bytes.fromhex(octets), unix=True) == message


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
QIDS = st.builds(Qid, st.integers(0, 255), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1))
BITS = {bits: st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64)}
STATS = st.builds(Stat, BITS[16], BITS[32], QIDS, *[BITS[32]] * 3, BITS[64], *[NAMES] * 4, NAMES, *[BITS[32]] * 3)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "tag": BITS[16],
    "oldtag": BITS[16],
    "mode": BITS[8],
    "offset": BITS[64],
    "version": NAMES,
    "uname": NAMES,
    "aname": NAMES,
    "ename": NAMES,
    "name": NAMES,
    "extension": NAMES,
    "names": st.lists(NAMES, max_size=MAX_WALK).map(tuple),
    "qids": st.lists(QIDS, max_size=MAX_WALK).map(tuple),
    "qid": QIDS,
    "aqid": QIDS,
    "data": st.binary(max_size=300),
    "stat": STATS,
}
KINDS = [kind for name, kind in vars(messages).items() if name[:1] in "TR" and name[1:].islower() and name != "Reply"]
MESSAGES = st.sampled_from([kind for kind in KINDS if kind is not messages.Request]).flatmap(
    lambda kind: st.builds(kind, **{field.name: FIELDS.get(field.name, BITS[32]) for field in fields(kind)})
)


def test_there_are_all_of_them() -> None:
    assert len([kind for kind in KINDS if isinstance(kind, type)]) == 27


@given(MESSAGES)
def test_what_is_emitted_parses_back(message: Message) -> None:
    assert parse(emit(message, unix=True), unix=True) == message
    plain = parse(emit(message))
    assert emit(plain) == emit(message)


@given(st.binary(max_size=200), st.booleans())
def test_any_octets_parse_or_are_malformed(octets: bytes, unix: bool) -> None:
    framed = (len(octets) + 4).to_bytes(4, "little") + octets
    for tried in (octets, framed):
        try:
            message = parse(tried, unix=unix)
        except Malformed:
            continue
        assert emit(message, unix=unix) == tried


@given(MESSAGES, st.data())
def test_a_message_cut_anywhere_is_malformed(message: Message, data: st.DataObject) -> None:
    octets = emit(message)
    cut = octets[: data.draw(st.integers(0, len(octets) - 1))]
    with pytest.raises(Malformed):
        parse(cut)
    with pytest.raises(Malformed):
        parse(len(cut).to_bytes(4, "little") + cut[4:])


@given(st.lists(STATS, max_size=4), st.booleans())
def test_directory_entries_parse_back(stats: list[Stat], unix: bool) -> None:
    octets = b"".join(emit_stat(stat, unix=unix) for stat in stats)
    found = parse_stats(octets, unix=unix)
    assert [(one.name, one.qid, one.length) for one in found] == [(one.name, one.qid, one.length) for one in stats]
    assert not unix or found == stats


@given(st.lists(MESSAGES, max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_the_pieces_of_a_stream_do_not_matter(said: list[Message], sizes: list[int]) -> None:
    octets = b"".join(emit(message) for message in said)
    decoder, found, at = Decoder(1 << 20), [], 0
    while at < len(octets):
        size = sizes[at % len(sizes)]
        decoder.feed(octets[at : at + size])
        at += size
        while (message := decoder.next()) is not None:
            found.append(message)
    assert found == [emit(message) for message in said]
    assert len(decoder) == 0


@pytest.mark.parametrize("size", [0, 6, 4097, 0xFFFFFFFF])
def test_a_size_that_cannot_be_believed_ends_the_stream(size: int) -> None:
    decoder = Decoder(4096)
    decoder.feed(emit(Tclunk(1, 1)) + size.to_bytes(4, "little"))
    assert decoder.next() == emit(Tclunk(1, 1))
    for _ in range(2):
        with pytest.raises(Malformed, match=f"{size} octets"):
            decoder.next()


@pytest.mark.parametrize(
    ("octets", "why"),
    [
        ("07000000 6a 0100", "no message of type 106"),
        ("0c000000 78 0100 02000000 00", "1 octets behind a Tclunk"),
        ("0b000000 65 0100 00000000", "beyond"),
        ("0f000000 6e 0100 01000000 02000000", "beyond"),
        ("11000000 6e 0100 01000000 02000000 1100", "17 names"),
        ("0b000000 6b 0100 0200 ff fe", "UTF-8"),
    ],
)
def test_what_is_wrong_is_said(octets: str, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        parse(bytes.fromhex(octets))


def test_a_stat_that_lies_about_its_length_is_malformed() -> None:
    good = bytearray(emit(Rstat(1, STAT)))
    for at in (7, 9):  # n, and size
        for change in (1, -1):
            octets = bytearray(good)
            octets[at] += change
            with pytest.raises(Malformed):
                parse(bytes(octets))


def test_names_of_files() -> None:
    assert names_fit(["tcp:0.0.0.0:80:tcp:172.17.0.2:80", "é"], 40)
    for wrong in ("", "a/b", "a\0", "x" * 41, "é" * 21):
        assert not names_fit(["a", wrong], 40)
