"""ARP packets; golden ones by scapy and dpkt (A-rows)."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import ARP

from netstack.errors import Malformed
from netstack.wire import arp

macs = st.binary(min_size=6, max_size=6)
addresses = st.binary(min_size=4, max_size=4)
packets = st.builds(arp.Packet, st.sampled_from([arp.REQUEST, arp.REPLY]), macs, addresses, macs, addresses)


@given(packets, st.binary(max_size=20))
def test_what_is_emitted_parses_back_also_with_padding(packet: arp.Packet, padding: bytes) -> None:
    assert arp.parse(arp.emit(packet)) == packet
    assert arp.parse(memoryview(arp.emit(packet) + padding)) == packet


@given(st.one_of(st.binary(max_size=40), st.binary(max_size=32).map(b"\x00\x01\x08\x00\x06\x04\x00".__add__)))
def test_any_octets_parse_or_are_malformed(octets: bytes) -> None:
    try:
        packet = arp.parse(memoryview(octets))
    except Malformed:
        return
    assert arp.emit(packet) == octets[:28]


@given(packets, st.integers(0, 27))
def test_a_packet_cut_anywhere_is_malformed(packet: arp.Packet, length: int) -> None:
    with pytest.raises(Malformed, match="truncated"):
        arp.parse(arp.emit(packet)[:length])


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(1, 6, id="another hardware"),
        pytest.param(2, 0x86, id="another protocol"),
        pytest.param(4, 8, id="hlen lies"),
        pytest.param(5, 16, id="plen lies"),
        pytest.param(7, 3, id="RARP"),
        pytest.param(7, 0, id="operation 0"),
        pytest.param(6, 1, id="operation 257"),
    ],
)
def test_anything_but_ipv4_over_ethernet_is_malformed(at: int, value: int) -> None:
    octets = bytearray(bytes(ARP(op=1, hwsrc="02:00:00:00:00:01", psrc="192.168.65.3", pdst="192.168.65.1")))
    arp.parse(octets)
    octets[at] = value
    with pytest.raises(Malformed):
        arp.parse(octets)


def test_scapy_and_dpkt_agree_on_a_reply() -> None:
    packet = arp.Packet(
        arp.REPLY, bytes.fromhex("f61636bcf9c6"), bytes([192, 168, 65, 1]), b"\2" * 6, b"\xc0\xa8\x41\x03"
    )
    golden = ARP(op=2, hwsrc="f6:16:36:bc:f9:c6", psrc="192.168.65.1", hwdst="02:02:02:02:02:02", pdst="192.168.65.3")
    assert arp.emit(packet) == bytes(golden)
    read = dpkt.arp.ARP(arp.emit(packet))
    assert (read.op, read.sha, read.spa, read.tha, read.tpa) == (2, packet.sha, packet.spa, packet.tha, packet.tpa)
