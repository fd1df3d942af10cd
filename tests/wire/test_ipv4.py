"""IPv4 headers; golden ones by scapy and dpkt (I01, I02)."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import (
    IP,
    UDP,
    IPOption,
    IPOption_LSRR,
    IPOption_MTU_Probe,
    IPOption_Router_Alert,
    IPOption_RR,
    IPOption_SSRR,
    IPOption_Timestamp,
)

from netstack.errors import Malformed
from netstack.wire import ipv4
from netstack.wire.checksum import BadChecksum
from tests.support import packets as wire

GUEST = wire.ip("192.168.65.3")
REMOTE = wire.ip("93.184.216.34")

addresses = st.binary(min_size=4, max_size=4)
fields = st.fixed_dictionaries(
    {
        "source": addresses,
        "destination": addresses,
        "protocol": st.integers(0, 255),
        "ttl": st.integers(0, 255),
        "identification": st.integers(0, 0xFFFF),
        "dont_fragment": st.booleans(),
        "more_fragments": st.booleans(),
        "offset": st.integers(0, 0x1FFF).map(lambda units: units * 8),
        "tos": st.integers(0, 255),
    }
)


def summed(header: bytes) -> bytes:
    """`header` with its checksum made right, by the tests' own loop."""
    header = header[:10] + bytes(2) + header[12:]
    return header[:10] + wire.checksum(header).to_bytes(2, "big") + header[12:]


@given(fields, st.binary(max_size=60), st.binary(max_size=20))
def test_what_is_emitted_parses_back_also_with_padding(
    fields: dict[str, object], payload: bytes, padding: bytes
) -> None:
    header = ipv4.header(payload_length=len(payload), **fields)  # type: ignore[arg-type]
    parsed = ipv4.parse(memoryview(header + payload + padding))
    assert parsed == ipv4.Header(header_length=20, total_length=20 + len(payload), **fields)  # type: ignore[arg-type]
    assert parsed.fragment == (bool(fields["more_fragments"]) or fields["offset"] != 0)


nearly_right = st.builds(
    lambda head, rest: summed(bytes([head]) + rest)[: len(rest) + 1],
    st.integers(0x44, 0x4F),
    st.binary(min_size=19, max_size=59),
)


@given(st.one_of(st.binary(max_size=80), nearly_right))
def test_any_octets_parse_or_are_malformed(packet: bytes) -> None:
    try:
        header = ipv4.parse(memoryview(packet))
    except Malformed:
        return
    assert 20 <= header.header_length <= header.total_length <= len(packet)


@given(fields, st.binary(min_size=1, max_size=60), st.data())
def test_a_packet_cut_anywhere_is_malformed(fields: dict[str, object], payload: bytes, data: st.DataObject) -> None:
    packet = ipv4.header(payload_length=len(payload), **fields) + payload  # type: ignore[arg-type]
    with pytest.raises(Malformed):
        ipv4.parse(memoryview(packet)[: data.draw(st.integers(0, len(packet) - 1))])


def test_scapy_makes_the_same_packet_and_dpkt_reads_it() -> None:
    ours = ipv4.header(
        GUEST,
        REMOTE,
        17,
        12,
        ttl=7,
        identification=0xBEEF,
        dont_fragment=False,
        more_fragments=True,
        offset=1480,
        tos=0xB8,
    )
    golden = IP(
        src="192.168.65.3", dst="93.184.216.34", proto=17, ttl=7, id=0xBEEF, flags="MF", frag=185, tos=0xB8, len=32
    )
    assert ours == bytes(golden)
    read = dpkt.ip.IP(ours + bytes(12))
    assert (read.src, read.dst, read.p, read.ttl, read.id) == (GUEST, REMOTE, 17, 7, 0xBEEF)
    assert (read.df, read.mf, read.offset) == (0, 1, 1480 // 8)
    atomic = ipv4.header(GUEST, REMOTE, 6, 0)
    assert atomic == bytes(IP(src="192.168.65.3", dst="93.184.216.34", proto=6, id=0, flags="DF", ttl=64, len=20))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(0, 0x65, id="version 6"),
        pytest.param(0, 0x05, id="version 0"),
        pytest.param(0, 0x44, id="IHL below five words"),
        pytest.param(0, 0x4F, id="IHL beyond the packet"),
        pytest.param(3, 19, id="total length below the header length"),
        pytest.param(3, 29, id="total length beyond the frame"),
        pytest.param(2, 0xFF, id="total length far beyond the frame"),
    ],
)
def test_a_header_that_lies_is_malformed_although_its_checksum_is_right(at: int, value: int) -> None:  # I01
    packet = bytearray(ipv4.header(GUEST, REMOTE, 17, 8) + bytes(8))
    ipv4.parse(memoryview(packet))
    packet[at] = value
    with pytest.raises(Malformed, match=r"^ipv4: ") as caught:
        ipv4.parse(memoryview(summed(bytes(packet[:20])) + packet[20:]))
    assert not isinstance(caught.value, BadChecksum)


@given(st.integers(8, 159))
def test_a_flipped_bit_is_told_as_bad_checksum(bit: int) -> None:  # I01
    packet = bytearray(ipv4.header(GUEST, REMOTE, 17, 8) + bytes(8))
    packet[bit // 8] ^= 1 << bit % 8
    if bit // 8 not in (2, 3):  # there the length speaks first
        with pytest.raises(BadChecksum):
            ipv4.parse(memoryview(packet))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(bytes(IPOption_RR(routers=["1.2.3.4"])) + b"\0", id="record route"),
        pytest.param(bytes(IPOption_Timestamp()), id="timestamp"),
        pytest.param(bytes(IPOption_Router_Alert()), id="router alert"),
        pytest.param(b"\1\1" + bytes(IPOption_MTU_Probe()) + b"\1\1", id="no-operations around"),
        pytest.param(b"\0\x83\3\4", id="whatever follows the end of the list"),
    ],
)
def test_options_are_ignored_and_the_payload_is_found_behind_them(options: bytes) -> None:  # I02
    packet = memoryview(wire.ipv4(GUEST, REMOTE, 17, wire.udp(GUEST, REMOTE, 5, 6, b"data"), options=options))
    header = ipv4.parse(packet)
    assert header.header_length == 20 + len(options)
    assert packet[header.header_length : header.total_length][8:] == b"data"


def test_scapys_packet_with_options_parses() -> None:  # I02
    golden = IP(src="192.168.65.3", dst="1.1.1.1", options=[IPOption_RR(routers=["1.2.3.4"])]) / UDP() / b"data"
    packet = memoryview(bytes(golden))
    header = ipv4.parse(packet)
    assert packet[header.header_length :][8:] == b"data"


@pytest.mark.parametrize("option", [IPOption_LSRR(routers=["1.2.3.4"]), IPOption_SSRR(routers=["1.2.3.4"])])
def test_source_routes_are_told_apart(option: IPOption) -> None:  # I02
    scapys = bytes(IP(src="192.168.65.3", dst="1.1.1.1", options=[option]) / UDP())
    behind_another = wire.ipv4(GUEST, REMOTE, 17, bytes(8), options=b"\1" + bytes(option))
    for packet in (scapys, behind_another):
        with pytest.raises(ipv4.SourceRouted):
            ipv4.parse(memoryview(packet))


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"\x07\x00\x00\x00", id="length 0"),
        pytest.param(b"\x07\x01\x00\x00", id="length 1"),
        pytest.param(b"\x07\x05\x00\x00", id="beyond the header"),
        pytest.param(b"\x01\x01\x01\x07", id="cut before the length"),
    ],
)
def test_an_option_whose_length_lies_makes_the_packet_malformed(octets: bytes) -> None:
    packet = wire.ipv4(GUEST, REMOTE, 17, bytes(8), options=octets)
    with pytest.raises(Malformed, match="option"):
        ipv4.parse(memoryview(packet))


@given(st.binary(max_size=40))
def test_the_walk_over_any_options_ends(octets: bytes) -> None:
    try:
        ipv4.check_options(octets)
    except Malformed:
        pass
