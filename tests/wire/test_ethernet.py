"""Ethernet headers; golden frames by scapy and dpkt (L-rows: short frames are counted, sent ones padded to 60)."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether

from netstack.errors import Malformed
from netstack.wire import ethernet

macs = st.binary(min_size=6, max_size=6)


@given(macs, macs, st.integers(0, 0xFFFF), st.binary(max_size=100))
def test_what_is_emitted_parses_back(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> None:
    frame = ethernet.header(destination, source, ethertype) + payload
    assert ethernet.parse(memoryview(frame)) == (destination, source, ethertype, payload)


@given(st.binary(max_size=60))
def test_any_octets_parse_or_are_malformed(frame: bytes) -> None:
    if len(frame) < 14:
        with pytest.raises(Malformed):
            ethernet.parse(memoryview(frame))
    else:
        destination, source, ethertype, payload = ethernet.parse(memoryview(frame))
        assert ethernet.header(destination, source, ethertype) + payload == frame


def test_scapy_and_dpkt_agree_on_a_header() -> None:
    golden = bytes(Ether(dst="02:00:00:00:00:01", src="f6:16:36:bc:f9:c6", type=0x0800) / IP())
    destination, source, ethertype, payload = ethernet.parse(memoryview(golden))
    assert (destination.hex(":"), source.hex(":")) == ("02:00:00:00:00:01", "f6:16:36:bc:f9:c6")
    assert ethertype == ethernet.ETHERTYPE_IPV4
    assert ethernet.header(destination, source, ethertype) + payload == golden
    read = dpkt.ethernet.Ethernet(ethernet.header(destination, source, ethernet.ETHERTYPE_ARP) + bytes(28))
    assert (read.dst, read.src, read.type) == (destination, source, 0x0806)


@pytest.mark.parametrize("octets", [0, 14, 42, 59, 60, 61, 1514])
def test_a_frame_is_padded_with_zeros_to_60_octets_and_never_cut(octets: int) -> None:
    frame = b"\xaa" * octets
    padded = ethernet.pad(frame)
    assert len(padded) == max(octets, 60)
    assert padded[:octets] == frame
    assert not any(padded[octets:])
