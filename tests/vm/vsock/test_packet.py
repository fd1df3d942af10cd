"""Headers of vsock packets, and the lines of the host's conventions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import Malformed
from vm.vsock import packet
from vm.vsock.packet import Header
from vm.vsock.unix import parse_hybrid, parse_hyperkit

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
HEADERS = st.builds(Header, U64, U64, U32, U32, U32, U16, U16, U32, U32, U32)


def test_a_header_as_linux_writes_it() -> None:
    """RW of 5 octets from guest 3, port 1024, to the host's port 5000; buf_alloc 256 KiB, fwd_cnt 7 (virtio 1.2, 5.10.6)."""
    octets = bytes.fromhex("0300000000000000020000000000000000040000881300000500000001000500000000000000040007000000")
    header = packet.parse(octets)
    assert header == Header(3, 2, 1024, 5000, 5, packet.STREAM, packet.RW, 0, 256 << 10, 7)
    assert packet.emit(header) == octets


@given(HEADERS, st.binary(max_size=20))
def test_what_is_emitted_parses_back(header: Header, payload: bytes) -> None:
    assert packet.parse(packet.emit(header) + payload) == header


@given(st.binary(max_size=60))
def test_any_octets_parse_or_are_malformed(octets: bytes) -> None:
    if len(octets) < packet.SIZE:
        with pytest.raises(Malformed):
            packet.parse(octets)
    else:
        assert packet.emit(packet.parse(octets)) == octets[: packet.SIZE]


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFE))
def test_lines_that_name_a_port(cid: int, port: int) -> None:
    assert parse_hyperkit(b"%08x.%08x\n" % (cid, port)) == (cid, port)
    assert parse_hybrid(b"CONNECT %d\n" % port) == port


@given(st.binary(max_size=30))
def test_any_line_names_a_port_or_is_malformed(line: bytes) -> None:
    for parse in (parse_hyperkit, parse_hybrid):
        with pytest.raises(Malformed):
            parse(line)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"00000003.0000094\n0", id="a newline where a digit belongs"),
        pytest.param(b"00000003.ffffffff\n", id="the port that stands for any"),
        pytest.param(b"0x000003.00000948\n", id="a prefix"),
        pytest.param(b"00000003.00000948 ", id="no newline"),
    ],
)
def test_hyperkit_lines_that_are_wrong(line: bytes) -> None:
    with pytest.raises(Malformed):
        parse_hyperkit(line)


@pytest.mark.parametrize("line", [b"CONNECT\n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"connect 1\n", b"CONNECT 1"])
def test_hybrid_lines_that_are_wrong(line: bytes) -> None:
    with pytest.raises(Malformed):
        parse_hybrid(line)
