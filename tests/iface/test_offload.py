"""Super-frames are cut as the guest's own kernel would have cut them; scapy reads the pieces."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from netstack.iface.offload import make_plain, split_datagrams

TCPV4, UDP_SUM, TCPV6, UDP_L4 = 1, 3, 4, 5
ECN = 0x80
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def header(kind: int, gso_size: int, start: int, offset: int, octets: int = 12) -> bytes:
    packed = struct.pack("<BBHHHHH", 1, kind, start + offset + 4, gso_size, start, offset, 1)
    return packed[:octets]


def ip(version: int) -> Any:
    if version == 4:
        return IP(src="192.168.65.3", dst="192.168.65.4", id=0xFFFE)
    return IPv6(src="fd00::3", dst="fd00::4")


def right_sums(frame: bytes) -> bool:
    """What scapy makes of the frame with its checksums taken out is the frame."""
    packet = Ether(frame)
    for layer in (IP, TCP, UDP):
        if layer in packet:
            del packet[layer].chksum
    return bytes(packet) == frame


@pytest.mark.parametrize("headroom", [12, 10])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ecn", [0, ECN])
def test_a_tcp_super_frame_becomes_segments(version: int, headroom: int, ecn: int) -> None:
    payload = random.Random(1).randbytes(10_000)
    flags = "PAFC" if ecn else "PAF"
    frame = bytes(ETHER / ip(version) / TCP(sport=1, dport=2, seq=0xFFFFF000, ack=7, flags=flags) / payload)
    start = 14 + (20 if version == 4 else 40)
    kind = (TCPV4 if version == 4 else TCPV6) | ecn
    cut = make_plain(memoryview(header(kind, 1400, start, 16, headroom) + frame), headroom, 1500)
    assert len(cut) == 8 and b"".join(bytes(Ether(one)[TCP].payload) for one in cut) == payload
    for number, one in enumerate(cut):
        packet = Ether(one)
        assert right_sums(one)
        assert packet[TCP].seq == (0xFFFFF000 + 1400 * number) & 0xFFFFFFFF
        assert ("F" in packet[TCP].flags) == ("P" in packet[TCP].flags) == (number == 7)
        assert ("C" in packet[TCP].flags) == (bool(ecn) and number == 0)
        if version == 4:
            assert packet[IP].id == (0xFFFE + number) & 0xFFFF


def test_segments_are_no_longer_than_the_other_link_takes() -> None:
    frame = bytes(ETHER / ip(4) / TCP(flags="A") / bytes(5000))
    cut = make_plain(memoryview(header(TCPV4, 1460, 34, 16) + frame), 12, 600)
    assert [len(one) for one in cut] == [614] * 8 + [54 + 5000 - 8 * 560]


@pytest.mark.parametrize("version", [4, 6])
def test_a_burst_of_datagrams_becomes_datagrams(version: int) -> None:
    payload = random.Random(2).randbytes(3000)
    frame = bytes(ETHER / ip(version) / UDP(sport=5, dport=6) / payload)
    start = 14 + (20 if version == 4 else 40)
    whole = memoryview(header(UDP_L4, 1200, start, 6) + frame)
    cut = make_plain(whole, 12, 1500)
    assert [len(Ether(one)[UDP].payload) for one in cut] == [1200, 1200, 600]
    assert all(right_sums(one) for one in cut)
    assert b"".join(bytes(Ether(one)[UDP].payload) for one in cut) == payload
    assert [bytes(one) for one in split_datagrams(whole, 12)] == [bytes(12) + one for one in cut]


def test_a_partial_checksum_is_filled_in() -> None:
    complete = bytes(ETHER / ip(4) / TCP(sport=1, dport=2, flags="A") / b"some octets")
    partial = bytearray(complete)
    pseudo = IP(complete[14:])
    total = sum(struct.unpack("!4H", bytes(pseudo)[12:20])) + 6 + len(complete) - 34
    partial[50:52] = ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big")
    assert make_plain(memoryview(header(0, 0, 34, 16) + bytes(partial)), 12, 1500) == [complete]


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(header(0, 0, 13, 0), id="checksum begins in the Ethernet header"),
        pytest.param(header(0, 0, 34, 5000), id="checksum behind the frame"),
        pytest.param(header(UDP_SUM, 1400, 34, 16), id="fragmentation of datagrams, not offered"),
        pytest.param(header(TCPV6, 1400, 34, 16), id="IPv6 and the frame is IPv4"),
        pytest.param(header(0x7F, 1400, 34, 16), id="unknown segmentation"),
        pytest.param(header(UDP_L4, 0, 34, 6), id="datagrams of no octets"),
    ],
)
def test_offload_fields_that_make_no_sense_give_nothing(head: bytes) -> None:
    frame = bytes(ETHER / ip(4) / TCP(flags="A") / bytes(4000))
    assert make_plain(memoryview(head + frame), 12, 1500) == []


@given(octets=binary(max_size=300), mtu=integers(68, 9000))
def test_any_octets_give_frames_or_none(octets: bytes, mtu: int) -> None:
    for headroom in (10, 12):
        for frame in make_plain(memoryview(octets), headroom, mtu):
            assert len(frame) >= 14
