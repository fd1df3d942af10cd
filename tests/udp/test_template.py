"""Frames of replies, checked by an independent parser (conformance U01, I09)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.udp.quote import udp_datagram
from netstack.udp.template import LEAD, TRAIL, Template
from tests.udp.support import ALIAS, GATEWAY_MAC, GUEST, GUEST_MAC, FakeLink, ones_sum, parse_frame


def template(link: FakeLink, source: bytes = ALIAS, source_port: int = 53, port: int = 4000) -> Template:
    return Template(
        ethernet_header=GUEST_MAC + GATEWAY_MAC + b"\x08\x00",
        source=source,
        source_port=source_port,
        destination=GUEST,
        destination_port=port,
        prefix=link.prefix,
        offload=link.partial_checksums,
        mtu=link.mtu,
    )


@pytest.mark.parametrize("headroom", [0, 2, 4, 12])
@pytest.mark.parametrize("octets", [0, 1, 17, 18, 19, 100, 511, 1471, 1472])
def test_every_length_makes_a_right_frame_on_every_kind_of_link(headroom: int, octets: int) -> None:
    link = FakeLink(headroom)
    buffer = bytearray(b"\xee" * (LEAD + 1500 + TRAIL))
    payload = bytes(number * 7 & 0xFF for number in range(octets))
    buffer[LEAD : LEAD + octets] = payload
    frame = template(link).frame(buffer, memoryview(buffer), LEAD, octets, 77)
    datagram = parse_frame(bytes(frame), link)
    assert datagram.payload == payload
    assert (datagram.source, datagram.source_port) == (ALIAS, 53)
    assert (datagram.destination, datagram.destination_port) == (GUEST, 4000)
    assert datagram.identification == 77


@given(
    st.binary(max_size=80), st.binary(min_size=4, max_size=4), st.integers(0, 65535), st.integers(0, 65535),
    st.integers(0, 65535), st.sampled_from([0, 4, 12]),
)  # fmt: skip
def test_checksums_are_right_for_any_ends_and_octets(
    payload: bytes, source: bytes, source_port: int, port: int, identification: int, headroom: int
) -> None:
    link = FakeLink(headroom)
    buffer = bytearray(LEAD) + payload + bytes(TRAIL)
    made = template(link, source, source_port, port)
    frame = made.frame(buffer, memoryview(buffer), LEAD, len(payload), identification)
    assert parse_frame(bytes(frame), link).payload == payload


def test_a_udp_checksum_that_comes_to_zero_is_sent_as_all_ones() -> None:  # RFC 768
    link = FakeLink()
    for number in range(65536):
        buffer = bytearray(LEAD) + number.to_bytes(2, "big") + bytes(TRAIL)
        frame = template(link).frame(buffer, memoryview(buffer), LEAD, 2, 0)
        assert frame[40:42] != b"\0\0"
        if frame[40:42] == b"\xff\xff":
            break
    else:
        raise AssertionError("one of all payloads has this checksum")


@given(st.binary(max_size=700), st.integers(0, 65507))
def test_a_quoted_datagram_says_what_the_guest_sent(payload: bytes, octets: int) -> None:  # C05, C06
    octets = max(octets, len(payload))
    quoted = udp_datagram(GUEST, 4000, ALIAS, 9, payload, octets)
    assert 28 <= len(quoted) <= 548
    assert ones_sum(quoted[:20]) == 0xFFFF
    assert int.from_bytes(quoted[2:4], "big") == 28 + octets
    assert (quoted[12:16], quoted[16:20]) == (GUEST, ALIAS)
    assert quoted[20:24] == (4000).to_bytes(2, "big") + (9).to_bytes(2, "big")
    assert int.from_bytes(quoted[24:26], "big") == 8 + octets
    assert payload.startswith(quoted[28:])
