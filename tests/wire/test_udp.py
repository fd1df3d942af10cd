"""UDP datagrams; golden ones by scapy and dpkt (U01, U02, U03)."""

from __future__ import annotations

import struct

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from netstack.errors import Malformed
from netstack.wire import udp
from tests.support import packets as wire

GUEST = wire.ip("192.168.65.3")
REMOTE = wire.ip("1.1.1.1")

ports = st.integers(0, 65535)
addresses = st.one_of(
    st.tuples(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4)),
    st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
)


@given(ports, ports, st.binary(max_size=300), addresses, st.binary(max_size=20))
@example(0, 0, b"", (GUEST, REMOTE), b"")
def test_what_is_emitted_parses_back_and_verifies(
    src_port: int, dst_port: int, payload: bytes, addresses: tuple[bytes, bytes], padding: bytes
) -> None:
    datagram = memoryview(udp.emit(src_port, dst_port, payload, *addresses) + padding)
    assert udp.parse(datagram) == (src_port, dst_port, payload)
    assert udp.verify(datagram, *addresses)


@given(st.binary(max_size=60))
def test_any_octets_parse_or_are_malformed(octets: bytes) -> None:
    udp.verify(memoryview(octets), GUEST, REMOTE)
    try:
        src_port, dst_port, payload = udp.parse(memoryview(octets))
    except Malformed:
        return
    assert struct.pack("!HH", src_port, dst_port) + payload == octets[:4] + octets[8 : 8 + len(payload)]


@given(st.binary(max_size=60), st.data())
def test_a_datagram_cut_anywhere_is_malformed(payload: bytes, data: st.DataObject) -> None:  # U03
    datagram = udp.emit(53, 1053, payload, REMOTE, GUEST)
    with pytest.raises(Malformed):
        udp.parse(memoryview(datagram)[: data.draw(st.integers(0, len(datagram) - 1))])


@pytest.mark.parametrize("length", [0, 1, 7, 13, 65535])
def test_a_length_field_that_lies_is_malformed(length: int) -> None:  # U03
    with pytest.raises(Malformed, match="length"):
        udp.parse(memoryview(struct.pack("!HHHH", 1, 2, length, 0) + b"data"))


def test_a_length_field_below_the_ip_payload_cuts_the_rest_off() -> None:
    datagram = memoryview(wire.udp(GUEST, REMOTE, 1, 2, b"data") + b"trailer")
    assert udp.parse(datagram)[2] == b"data"
    assert udp.verify(datagram, GUEST, REMOTE)


def test_no_checksum_is_right_over_ipv4_and_wrong_over_ipv6() -> None:  # U02
    datagram = memoryview(wire.udp(GUEST, REMOTE, 1, 2, b"data", check=0))
    assert udp.verify(datagram, GUEST, REMOTE)
    assert not udp.verify(datagram, bytes(16), bytes(16))


@given(st.integers(0, 8 * 20 - 1))
def test_a_flipped_bit_is_seen(bit: int) -> None:  # U02
    datagram = bytearray(udp.emit(53, 1053, b"twelve bytes", REMOTE, GUEST))
    datagram[bit // 8] ^= 1 << bit % 8
    try:
        udp.parse(memoryview(datagram))
    except Malformed:
        return
    assert not udp.verify(memoryview(datagram), REMOTE, GUEST)


def test_a_datagram_meant_for_another_address_is_seen() -> None:  # U02
    datagram = memoryview(udp.emit(53, 1053, b"data", REMOTE, GUEST))
    assert not udp.verify(datagram, REMOTE, wire.ip("192.168.65.4"))


def test_a_checksum_of_zero_is_sent_as_ffff() -> None:  # U02
    bare = udp.emit(1, 2, bytes(2), GUEST, REMOTE)
    payload = bare[6:8]  # its sum goes up by what was missing to 0xFFFF
    datagram = udp.emit(1, 2, payload, GUEST, REMOTE)
    assert datagram[6:8] == b"\xff\xff"
    assert udp.verify(memoryview(datagram), GUEST, REMOTE)


@pytest.mark.parametrize("payload", [b"", b"x", b"odd", bytes(1472), b"\xff" * udp.MAX_PAYLOAD])
def test_scapy_and_dpkt_agree(payload: bytes) -> None:  # U01
    ours = udp.emit(5353, 53, payload, GUEST, REMOTE)
    golden = bytes(IP(src="192.168.65.3", dst="1.1.1.1") / UDP(sport=5353, dport=53) / payload)[20:]
    assert ours == golden
    packet = dpkt.ip.IP(
        src=GUEST, dst=REMOTE, p=17, data=dpkt.udp.UDP(sport=5353, dport=53, ulen=len(ours), data=payload)
    )
    assert bytes(packet)[20:] == ours


def test_scapy_agrees_over_ipv6() -> None:
    source, destination = bytes(range(16)), bytes(range(32, 48))
    golden = IPv6(src="1:203:405:607:809:a0b:c0d:e0f", dst="2021:2223:2425:2627:2829:2a2b:2c2d:2e2f")
    golden /= UDP(sport=1, dport=2) / b"data"
    assert udp.emit(1, 2, b"data", source, destination) == bytes(golden)[40:]
