"""ICMP messages; golden ones by scapy and dpkt (C03, C09)."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP

from netstack.errors import Malformed
from netstack.wire import icmp
from netstack.wire.checksum import BadChecksum


def summed(message: bytes) -> bytes:
    head = message[:2] + bytes(2) + message[4:]
    total = sum(octet << (0 if at & 1 else 8) for at, octet in enumerate(head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:2] + (0xFFFF ^ total).to_bytes(2, "big") + head[4:]


@given(st.integers(1, 255), st.integers(0, 255), st.binary(min_size=4, max_size=4), st.binary(max_size=200))
def test_what_is_emitted_parses_back(kind: int, code: int, rest: bytes, body: bytes) -> None:
    message = icmp.parse(memoryview(icmp.emit(kind, code, rest, body)))
    assert (message.type, message.code, message.rest, message.body) == (kind, code, rest, body)


@given(st.one_of(st.binary(max_size=60), st.binary(min_size=8, max_size=60).map(summed)))
def test_any_octets_parse_or_are_malformed(octets: bytes) -> None:
    try:
        message = icmp.parse(memoryview(octets))
    except Malformed:
        return
    assert icmp.emit(message.type, message.code, message.rest, message.body) == octets


@given(st.binary(max_size=80), st.integers(0, 7))
def test_a_message_cut_in_its_header_is_malformed(body: bytes, length: int) -> None:  # C09
    with pytest.raises(Malformed, match="truncated"):
        icmp.parse(memoryview(icmp.emit(icmp.ECHO_REQUEST, 0, icmp.echo_rest(1, 2), body))[:length])


@given(st.binary(min_size=1, max_size=80), st.data())
def test_a_message_cut_in_its_body_has_a_bad_checksum_or_lost_only_zeros(body: bytes, data: st.DataObject) -> None:
    whole = icmp.emit(icmp.ECHO_REQUEST, 0, icmp.echo_rest(1, 2), body)
    cut = whole[: data.draw(st.integers(8, len(whole) - 1))]
    try:
        icmp.parse(memoryview(cut))
    except BadChecksum:
        return
    assert summed(cut) == cut


@given(st.integers(0, 8 * 40 - 1))
def test_a_flipped_bit_is_told_as_bad_checksum(bit: int) -> None:  # C03
    message = bytearray(icmp.emit(icmp.ECHO_REQUEST, 0, icmp.echo_rest(77, 1), bytes(range(32))))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadChecksum):
        icmp.parse(memoryview(message))


@pytest.mark.parametrize("data", [b"", b"x", bytes(56), b"\xff" * 65507])
def test_scapy_and_dpkt_agree_on_an_echo(data: bytes) -> None:
    golden = bytes(ICMP(type=8, id=0x1234, seq=9) / data)
    assert icmp.emit(icmp.ECHO_REQUEST, 0, icmp.echo_rest(0x1234, 9), data) == golden
    message = icmp.parse(memoryview(golden))
    assert (message.type, message.echo, message.body) == (icmp.ECHO_REQUEST, (0x1234, 9), data)
    read = dpkt.icmp.ICMP(icmp.emit(icmp.ECHO_REPLY, 0, icmp.echo_rest(0x1234, 9), data))
    assert (read.type, read.data.id, read.data.seq, read.data.data) == (0, 0x1234, 9, data)


def test_scapy_agrees_on_errors() -> None:
    quoted = bytes(IP(src="192.168.65.3", dst="1.1.1.1", id=7) / UDP(sport=1000, dport=33434))
    port = icmp.emit(icmp.UNREACHABLE, icmp.PORT_UNREACHABLE, icmp.NO_REST, quoted)
    assert port == bytes(ICMP(type=3, code=3) / quoted)
    too_big = icmp.emit(icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, icmp.mtu_rest(1400), quoted)
    assert too_big == bytes(ICMP(type=3, code=4, nexthopmtu=1400) / quoted)
    assert icmp.parse(memoryview(too_big)).mtu == 1400
    assert icmp.emit(11, icmp.REASSEMBLY_EXCEEDED, icmp.NO_REST, quoted) == bytes(ICMP(type=11, code=1) / quoted)
    assert icmp.mtu_rest(70000) == b"\0\0\xff\xff"
