"""Datagrams longer than the guest's MTU, and the identification of what we send (I08, I09)."""

from __future__ import annotations

import random
from itertools import pairwise

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet import fragment as scapy_fragment

from netstack.ip.fragments import Reassembler
from netstack.ip.ipv4 import FragmentationNeeded, Identifications, fragment
from netstack.observe.metrics import Counters
from netstack.wire import ipv4
from tests.support import packets as wire

GATEWAY = wire.ip("192.168.65.1")
GUEST = wire.ip("192.168.65.3")


@given(st.integers(0, 3000), st.integers(68, 600), st.booleans())
def test_what_is_fragmented_fits_and_is_put_together_again(octets: int, mtu: int, reverse: bool) -> None:  # I08
    payload = random.Random(octets).randbytes(octets)
    packets = [header + part for header, part in fragment(GATEWAY, GUEST, 17, payload, mtu, identification=7, ttl=9)]
    assert all(len(packet) <= mtu for packet in packets)
    assert len(packets) == 1 or all(len(packet) > mtu - 8 for packet in packets[:-1])  # none smaller than needed
    whole: bytes | None = None
    if len(packets) == 1:
        whole = packets[0]
    else:
        engine = Reassembler(64, 1 << 20, 30.0, Counters())
        for packet in reversed(packets) if reverse else packets:
            view = memoryview(packet)
            whole = engine.add(ipv4.parse(view), view, 0.0)
    assert whole == wire.ipv4(GATEWAY, GUEST, 17, payload, ident=7, ttl=9)


@pytest.mark.parametrize("octets", [1480, 1481, 2960, 2961, 65515])
def test_scapy_cuts_in_the_same_places_and_dpkt_reads_the_same(octets: int) -> None:  # I08, U01
    payload = random.Random(octets).randbytes(octets)
    ours = [header + part for header, part in fragment(GATEWAY, GUEST, 17, payload, 1500, identification=3)]
    golden = IP(src="192.168.65.1", dst="192.168.65.3", proto=17, id=3) / payload
    assert ours == [bytes(part) for part in scapy_fragment(golden, 1480)]
    read = [dpkt.ip.IP(packet) for packet in ours]
    assert b"".join(packet.data if isinstance(packet.data, bytes) else bytes(packet.data) for packet in read) == payload
    assert [packet.mf for packet in read] == [1] * (len(read) - 1) + [0]


def test_with_df_what_does_not_fit_is_refused_with_the_mtu() -> None:  # I08
    assert len(fragment(GATEWAY, GUEST, 17, bytes(1480), 1500, dont_fragment=True)) == 1
    with pytest.raises(FragmentationNeeded) as caught:
        fragment(GATEWAY, GUEST, 17, bytes(1481), 1500, dont_fragment=True)
    assert caught.value.mtu == 1500


def test_what_no_datagram_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="65516"):
        fragment(GATEWAY, GUEST, 17, bytes(65516), 1500)
    with pytest.raises(ValueError, match="MTU"):
        fragment(GATEWAY, GUEST, 17, bytes(100), 67)


@pytest.mark.parametrize("seed", range(3))
def test_no_identification_comes_again_before_all_were_used(seed: int) -> None:  # I09
    identify = Identifications(random.Random(seed))
    values = [identify() for _ in range(3 * 65536)]
    assert set(values[:65536]) == set(range(65536))
    assert values[:65536] == values[65536 : 2 * 65536] == values[2 * 65536 :]  # so any 65,536 in a row differ


def test_the_next_identification_cannot_be_told_from_the_last() -> None:  # I09
    identify = Identifications(random.Random(1))
    values = [identify() for _ in range(4096)]
    steps = {(after - before) & 0xFFFF for before, after in pairwise(values)}
    assert len(steps) > 2500
    other = Identifications(random.Random(2))
    assert values != [other() for _ in range(4096)]
