"""The 48 octets of NTP, judged by a packet of chrony and by the arithmetic of RFC 5905."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import Malformed
from ntp import packet
from ntp.packet import Packet

octet = st.integers(0, 255)
signed = st.integers(-128, 127)
short = st.integers(0, 2**32 - 1)
long = st.integers(0, 2**64 - 1)

packets = st.builds(
    Packet,
    leap=st.integers(0, 3),
    version=st.integers(0, 7),
    mode=st.integers(0, 7),
    stratum=octet,
    poll=signed,
    precision=signed,
    root_delay=short,
    root_dispersion=short,
    refid=st.binary(min_size=4, max_size=4),
    reference=long,
    origin=long,
    receive=long,
    transmit=long,
)


@given(packets, st.binary(max_size=100))
def test_what_is_emitted_is_read_back_whatever_follows(fields: Packet, more: bytes) -> None:
    octets = packet.emit(fields)
    assert len(octets) == packet.SIZE
    assert packet.parse(octets + more) == fields


@given(st.binary(max_size=100))
def test_any_octets_are_a_packet_or_malformed(octets: bytes) -> None:
    if len(octets) < packet.SIZE:
        with pytest.raises(Malformed):
            packet.parse(octets)
    else:
        assert packet.emit(packet.parse(octets)) == octets[: packet.SIZE]


def test_a_request_of_chrony_is_read() -> None:  # chronyd 4.3
    read = packet.parse(bytes.fromhex("23000620" + "00" * 36 + "f5356493f76e0b33"))
    assert (read.leap, read.version, read.mode, read.stratum, read.poll, read.precision) == (0, 4, 3, 0, 6, 32)
    assert (read.origin, read.receive, read.transmit) == (0, 0, 0xF5356493_F76E0B33)


@pytest.mark.parametrize(
    ("unix_s", "stamp"),
    [
        pytest.param(0.0, 2_208_988_800 << 32, id="1970: RFC 5905 figure 4"),
        pytest.param(0.5, (2_208_988_800 << 32) + 2**31, id="half a second"),
        pytest.param(946_684_800.0, 3_155_673_600 << 32, id="2000: RFC 5905 figure 4"),
        pytest.param(2_085_978_495.0, 0xFFFFFFFF << 32, id="2036-02-07 06:28:15, last of era 0"),
        pytest.param(2_085_978_496.5, 2**31, id="half a second into era 1"),
        pytest.param(2_085_978_496.0, 1, id="the first instant of era 1 is not 'unknown'"),
        pytest.param(-2_208_988_800.25, (2**32 - 1 << 32) + 3 * 2**30, id="before 1900"),
    ],
)
def test_timestamps_of_every_era(unix_s: float, stamp: int) -> None:
    assert packet.timestamp(unix_s) == stamp


@given(st.floats(-1e10, 1e11))
def test_a_timestamp_always_fits_and_is_never_unknown(unix_s: float) -> None:
    assert 0 < packet.timestamp(unix_s) < 2**64
