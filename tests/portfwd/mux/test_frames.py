"""Frames on the wire: VPNKit's own test vectors (spec vpnkit 7.3.5), and what is no frame."""

from __future__ import annotations

import random
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import Malformed
from portfwd.carriers import Destination
from portfwd.mux.frames import (
    CLOSE,
    DATA,
    DEDICATED,
    HANDSHAKE,
    MAX_OPEN,
    MAX_PATH,
    OPEN,
    SHUTDOWN,
    WINDOW,
    Close,
    Data,
    Decoder,
    Frame,
    MuxError,
    Open,
    Shutdown,
    Window,
    destination_size,
    detect,
    emit,
    emit_destination,
    parse,
    parse_destination,
)

LOOPBACK_6 = socket.inet_pton(socket.AF_INET6, "::1")

VECTORS = {
    "close": ("0700 02 06000000", Close(6)),
    "data": ("0b00 04 08000000 80000000", Data(8, 128)),
    "open_dedicated_connection": (
        "1100 01 04000000 01 01 0400 7f000001 901f",
        Open(4, Destination("tcp", bytes((127, 0, 0, 1)), 8080), DEDICATED),
    ),
    "open_multiplexed_connection": (
        "1d00 01 05000000 02 02 1000 00000000000000000000000000000001 901f",
        Open(5, Destination("udp", LOOPBACK_6, 8080)),
    ),
    "open_multiplexed_unix_connection": (
        "1300 01 05000000 02 03 0800 2f746d702f666f6f",
        Open(5, Destination("unix", path="/tmp/foo")),
    ),
    "shutdown": ("0700 03 07000000", Shutdown(7)),
    "window": ("0f00 05 09000000 38a2870000000000", Window(9, 8888888)),
}


@pytest.mark.parametrize(("text", "frame"), VECTORS.values(), ids=VECTORS)
def test_the_vectors_of_vpnkit(text: str, frame: Frame) -> None:
    octets = bytes.fromhex(text)
    assert emit(frame) == octets
    assert parse(octets) == frame


def test_the_handshake() -> None:
    assert HANDSHAKE == b"https://github.com/moby/vpnkit multiplexer protocol\n\0\0"
    assert len(HANDSHAKE) == 54


def test_an_ipv4_address_of_go_is_one() -> None:
    mapped = bytes.fromhex("01 1000 00000000000000000000ffff7f000001 901f")
    assert parse_destination(mapped) == Destination("tcp", bytes((127, 0, 0, 1)), 8080)
    assert str(parse_destination(mapped)) == "tcp:127.0.0.1:8080"


def test_a_path_that_is_no_utf_8_survives() -> None:
    target = parse_destination(b"\3\4\0/\xff\xfea")
    assert emit_destination(target) == b"\3\4\0/\xff\xfea"


destinations = st.one_of(
    st.builds(
        Destination,
        st.sampled_from(["tcp", "udp"]),
        st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)),
        st.integers(0, 65535),
    ).filter(lambda one: not one.address.startswith(bytes(10) + b"\xff\xff")),
    st.builds(
        Destination,
        st.just("unix"),
        path=st.text(min_size=1, max_size=200).filter(
            lambda text: "\0" not in text and text.isprintable() and len(text.encode(errors="ignore")) > 0
        ),
    ),
)
ids = st.integers(0, 0xFFFFFFFF)
frames = st.one_of(
    st.builds(Open, ids, destinations),
    st.builds(Close, ids),
    st.builds(Shutdown, ids),
    st.builds(Window, ids, st.integers(0, (1 << 64) - 1)),
    st.builds(Data, ids, st.integers(0, 300)),
)


@given(frames)
def test_what_is_emitted_parses_back(frame: Frame) -> None:
    assert parse(emit(frame)) == frame


@given(st.binary(max_size=80))
def test_any_octets_parse_or_are_wrong(octets: bytes) -> None:
    try:
        frame = parse(octets)
    except MuxError:
        return
    if not (isinstance(frame, Open) and len(frame.destination.address) == 4):
        assert emit(frame) == octets


@given(destinations)
def test_a_destination_knows_its_length(target: Destination) -> None:
    octets = emit_destination(target)
    assert destination_size(octets + b"more") == len(octets)
    assert all(destination_size(octets[:cut]) in (None, len(octets)) for cut in range(len(octets)))
    assert parse_destination(octets) == target


@pytest.mark.parametrize(
    "octets",
    [b"\0\4\0abcd\0\0", b"\4\4\0abcd\0\0", b"\1\5\0abcde\0\0", b"\1\0\0\0\0", b"\3\0\0", b"\3\1\0\0", b"\3\xff\xff"],
    ids=["protocol 0", "protocol 4", "5 octets of address", "no address", "no path", "path of NUL", "path too long"],
)
def test_destinations_that_lead_nowhere(octets: bytes) -> None:
    with pytest.raises(Malformed):
        parse_destination(octets)


@pytest.mark.parametrize(
    "target",
    [
        Destination("tcp"),
        Destination("tcp", b"abc", 1),
        Destination("sctp", b"abcd", 1),
        Destination("tcp", b"abcd", 65536),
        Destination("unix"),
        Destination("unix", path="/" + "a" * MAX_PATH),
        Destination("unix", path="/a\0b"),
    ],
    ids=["no address", "3 octets", "sctp", "port", "no path", "long path", "NUL"],
)
def test_destinations_that_cannot_be_said(target: Destination) -> None:
    with pytest.raises(Malformed):
        emit_destination(target)


def decoded(pieces: list[bytes]) -> tuple[list[Frame], dict[int, bytes]]:
    """Frames, and payloads by channel."""
    found: list[Frame] = []
    payloads: dict[int, bytes] = {}
    decoder = Decoder()
    for piece in pieces:
        for command, id, number, more in decoder.feed(memoryview(piece)):
            if command == DATA and isinstance(more, memoryview):
                payloads[id] = payloads.get(id, b"") + bytes(more)
            elif command == DATA:
                found.append(Data(id, number))
            elif command == WINDOW:
                found.append(Window(id, number))
            elif command == OPEN:
                assert isinstance(more, Open)
                found.append(more)
            else:
                found.append({CLOSE: Close, SHUTDOWN: Shutdown}[command](id))
    assert decoder.idle
    return found, payloads


@given(st.lists(frames, max_size=12), st.integers(0, 1 << 32), st.sampled_from([1, 2, 7, 40, 4000]))
def test_frames_survive_any_cutting(said: list[Frame], seed: int, largest: int) -> None:
    rng = random.Random(seed)
    stream, payloads = b"", {}
    for frame in said:
        stream += emit(frame)
        if isinstance(frame, Data):
            payload = rng.randbytes(frame.length)
            stream += payload
            payloads[frame.id] = payloads.get(frame.id, b"") + payload
    pieces = []
    while stream:
        cut = rng.randrange(1, largest + 1)
        pieces.append(stream[:cut])
        stream = stream[cut:]
    found, received = decoded(pieces)
    assert found == said
    assert received == {id: octets for id, octets in payloads.items() if octets}


def test_a_payload_of_four_gigabytes_is_passed_on_as_it_comes() -> None:
    decoder = Decoder()
    pieces = list(decoder.feed(memoryview(emit(Data(1, 0xFFFFFFFF)) + b"abc")))
    assert pieces[0] == (DATA, 1, 0xFFFFFFFF, None)
    assert bytes(pieces[1][3]) == b"abc"  # type: ignore[arg-type]
    block = memoryview(bytes(1 << 16))
    assert [len(piece[3]) for piece in decoder.feed(block)] == [1 << 16]  # type: ignore[arg-type]
    assert not decoder.idle


@pytest.mark.parametrize(
    "octets",
    [
        bytes.fromhex("0700 06 00000000"),
        bytes.fromhex("0700 00 00000000"),
        bytes.fromhex("0000 02 00000000"),
        bytes.fromhex("0800 02 00000000 00"),
        bytes.fromhex("0700 04 00000000"),
        bytes.fromhex("ffff 01 00000000"),
        bytes.fromhex("0b00 01 00000000 02 01 0000"),
        bytes.fromhex("1100 01 00000000 02 09 0400 7f000001 901f"),
        bytes.fromhex("1200 01 00000000 02 01 0400 7f000001 901f 00"),
    ],
    ids=["UDP", "0", "length 0", "long Close", "short Data", "endless Open", "no address", "protocol", "Open too long"],
)
@pytest.mark.parametrize("largest", [1, 100])
def test_what_is_no_frame_ends_the_connection(octets: bytes, largest: int) -> None:
    decoder = Decoder()
    with pytest.raises(MuxError):
        for at in range(0, len(octets), largest):
            list(decoder.feed(memoryview(octets[at : at + largest])))
    assert len(decoder._kept) <= MAX_OPEN


@pytest.mark.parametrize(
    ("first", "generation"),
    [
        (b"https://", 3),
        (bytes.fromhex("01 0400"), 1),
        (bytes.fromhex("02 0400"), 1),
        (bytes.fromhex("01 1000"), 1),
        (bytes.fromhex("02 1000"), 1),
        (bytes.fromhex("03 0800"), 1),
        (bytes.fromhex("1100 01"), 2),
        (bytes.fromhex("1d00 01"), 2),
        (bytes.fromhex("6800 01"), 2),
        (bytes.fromhex("0104 01"), 2),
        (bytes.fromhex("0f00 05"), 2),
        (b"", None),
        (b"ht", None),
        (b"\1\4", None),
    ],
)
def test_the_generation_shows_in_three_octets(first: bytes, generation: int | None) -> None:
    assert detect(first) == generation


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1", b"\0\0\0", b"\xff\xff\xff", b"\1\5\0", b"SSH-2.0"])
def test_strangers_are_known_as_such(first: bytes) -> None:
    with pytest.raises(MuxError, match="no generation"):
        detect(first)
