"""DHCP messages against scapy and dpkt, and the three properties of a wire module (D03, D04)."""

from __future__ import annotations

import struct
from ipaddress import IPv4Network
from typing import Any

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from netstack.errors import Malformed
from netstack.wire import dhcp

MAC = bytes.fromhex("025000000001")
COOKIE = b"\x63\x82\x53\x63"

addresses = st.binary(min_size=4, max_size=4)
text_fields = st.binary(max_size=64).map(lambda octets: octets.replace(b"\x00", b""))
codes = st.integers(1, 254).filter(lambda code: code != 52)
messages = st.builds(
    dhcp.Message,
    op=st.integers(0, 255),
    xid=st.integers(0, 2**32 - 1),
    htype=st.integers(0, 255),
    hops=st.integers(0, 255),
    secs=st.integers(0, 65535),
    flags=st.integers(0, 65535),
    ciaddr=addresses,
    yiaddr=addresses,
    siaddr=addresses,
    giaddr=addresses,
    chaddr=st.binary(max_size=16),
    sname=text_fields,
    file=text_fields,
    options=st.dictionaries(codes, st.binary(max_size=700), max_size=8),
)
labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=12)
names = st.lists(st.lists(labels, min_size=1, max_size=5).map(".".join), max_size=12)


def raw(options: bytes, *, file: bytes = b"", sname: bytes = b"", hlen: int = 6, cookie: bytes = COOKIE) -> bytes:
    """A request put together by hand, so that broken ones can be made."""
    head = struct.pack("!BBBBIHH16x16s64s128s", 1, 1, hlen, 0, 7, 0, 0, MAC, sname, file)
    return head + cookie + options


@given(messages)
def test_what_is_emitted_parses_back(message: dhcp.Message) -> None:
    assert dhcp.parse(dhcp.emit(message)) == message


@given(st.binary(max_size=700))
def test_any_bytes_parse_or_are_malformed(data: bytes) -> None:
    for candidate in (data, raw(data), raw(b"\x34\x01\x03" + data[:60], file=data[:128], sname=data[:64])):
        try:
            message = dhcp.parse(candidate)
        except Malformed:
            continue
        assert not {0, 52, 255} & set(message.options)


@given(messages, st.data())
def test_a_message_cut_anywhere_is_malformed_or_lacks_options(message: dhcp.Message, data: Any) -> None:
    octets = dhcp.emit(message)
    cut = octets[: data.draw(st.integers(0, len(octets) - 1))]
    try:
        short = dhcp.parse(memoryview(cut))
    except Malformed:
        return
    assert all(message.options[code].startswith(value) for code, value in short.options.items())


@given(st.binary(max_size=300))
def test_option_values_parse_or_are_malformed(data: bytes) -> None:
    try:
        dhcp.decode_names(data)
    except Malformed:
        return


def test_scapy_reads_what_we_emit_and_we_read_what_scapy_builds() -> None:
    ours = dhcp.emit(
        dhcp.Message(
            op=dhcp.BOOTREPLY,
            xid=0x3903F326,
            flags=dhcp.BROADCAST,
            yiaddr=bytes((192, 168, 65, 3)),
            siaddr=bytes((192, 168, 65, 1)),
            chaddr=MAC,
            options={53: b"\x02", 1: b"\xff\xff\xff\x00", 51: struct.pack("!I", 86400), 12: b"box", 26: b"\x05\xdc"},
        )
    )
    assert len(ours) == 300
    theirs = BOOTP(ours)
    assert (theirs.op, theirs.xid, theirs.yiaddr, theirs.siaddr) == (2, 0x3903F326, "192.168.65.3", "192.168.65.1")
    options = dict(option for option in theirs[DHCP].options if isinstance(option, tuple))
    assert options["message-type"] == 2
    assert options["subnet_mask"] == "255.255.255.0"
    assert options["lease_time"] == 86400
    assert options["interface-mtu"] == 1500

    built = bytes(
        BOOTP(op=1, chaddr=MAC, xid=99, ciaddr="192.168.65.9", flags=0x8000)
        / DHCP(options=[("message-type", "request"), ("requested_addr", "192.168.65.9"), ("hostname", b"vm"), "end"])
    )
    message = dhcp.parse(built)
    assert (message.op, message.xid, message.flags, message.chaddr) == (1, 99, 0x8000, MAC)
    assert message.ciaddr == bytes((192, 168, 65, 9))
    assert message.options == {53: b"\x03", 50: bytes((192, 168, 65, 9)), 12: b"vm"}


def test_dpkt_reads_what_we_emit_and_we_read_what_dpkt_builds() -> None:
    options = {53: b"\x05", 54: bytes((192, 168, 65, 1)), 61: b"\x01" + MAC}
    theirs = dpkt.dhcp.DHCP(dhcp.emit(dhcp.Message(op=2, xid=5, chaddr=MAC, options=options)))
    assert theirs.chaddr[:6] == MAC and theirs.xid == 5
    assert dict(theirs.opts) == options

    built = bytes(dpkt.dhcp.DHCP(op=1, hln=6, xid=77, chaddr=MAC, opts=((53, b"\x01"), (55, b"\x01\x03\x06"))))
    message = dhcp.parse(built)
    assert (message.xid, message.chaddr, message.options) == (77, MAC, {53: b"\x01", 55: b"\x01\x03\x06"})


def test_discover_of_the_go_vmnet_client_is_read() -> None:
    """vpnkit.md appendix E: 244 octets, no padding, no parameter list."""
    data = (
        bytes.fromhex("0101060001000000")
        + b"\x00\x00\x80\x00"
        + bytes(16)
        + MAC
        + bytes(202)
        + COOKIE
        + b"\x35\x01\x01\xff"
    )
    assert len(data) == 244
    message = dhcp.parse(data)
    assert (message.xid, message.flags, message.chaddr) == (0x01000000, dhcp.BROADCAST, MAC)
    assert message.options == {53: b"\x01"}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(raw(b"\x35\x01\x01\xff")[:239], id="cut before the options"),
        pytest.param(raw(b"\x35\x01\x01\xff", cookie=b"\x00\x00\x00\x00"), id="no cookie"),
        pytest.param(raw(b"\x35\x01\x01\xff", hlen=17), id="hlen over 16"),
        pytest.param(raw(b"\x35\x02\x01"), id="option longer than the message"),
        pytest.param(raw(b"\x35\x01\x01\x0c"), id="option without length"),
        pytest.param(raw(b"\x34\x01\x04\xff"), id="overload of an unknown field"),
        pytest.param(raw(b"\x34\x02\x01\x01\xff"), id="overload of two octets"),
        pytest.param(raw(b"\x34\x01\x01\x34\x01\x02\xff"), id="overload given twice"),
        pytest.param(raw(b"\x34\x01\x01\xff", file=b"\x0c\xff" + b"x" * 126), id="overrun inside the file field"),
        pytest.param(raw(b"\x34\x01\x02\xff", sname=b"\x00" * 63 + b"\x0c"), id="option cut at the end of sname"),
    ],
)
def test_broken_messages_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        dhcp.parse(data)


def test_options_are_found_in_overloaded_fields_and_pieces_joined_in_order() -> None:
    """RFC 2131 section 4.1, RFC 3396 section 5: the options field, then file, then sname; no overload inside those."""
    message = dhcp.parse(
        raw(
            b"\x34\x01\x03\x35\x01\x01\x0c\x02ab\xff\x0c\x01z",
            file=b"\x0c\x02cd\x34\x01\x00\xff\x0c\x01z",
            sname=b"\x0c\x01e\xff",
        )
    )
    assert message.options == {53: b"\x01", 12: b"abcde"}
    assert message.file == message.sname == b""
    plain = dhcp.parse(raw(b"\x35\x01\x01\xff", file=b"boot.img\x00rest", sname=b"server"))
    assert (plain.file, plain.sname) == (b"boot.img", b"server")


def test_a_message_without_end_option_is_taken() -> None:
    assert dhcp.parse(raw(b"\x35\x01\x01")).options == {53: b"\x01"}


def test_options_of_a_wrong_length_are_malformed_when_asked_for() -> None:
    message = dhcp.parse(raw(b"\x32\x03\x01\x02\x03\x33\x04\x00\x00\x00\x3c"))
    assert message.option(51, 4) == b"\x00\x00\x00\x3c"
    assert message.option(54, 4) is None
    with pytest.raises(Malformed):
        message.option(50, 4)


@pytest.mark.parametrize(
    "message",
    [
        dhcp.Message(op=2, xid=1, chaddr=bytes(17)),
        dhcp.Message(op=2, xid=1, sname=bytes(65)),
        dhcp.Message(op=2, xid=1, options={52: b"\x01"}),
        dhcp.Message(op=2, xid=1, options={0: b""}),
        dhcp.Message(op=2, xid=1, options={255: b""}),
    ],
)
def test_what_the_format_cannot_carry_is_refused(message: dhcp.Message) -> None:
    with pytest.raises(ValueError):
        dhcp.emit(message)


@given(st.binary(max_size=1200))
def test_the_room_an_option_takes_is_told(value: bytes) -> None:
    without = len(dhcp.emit(dhcp.Message(op=2, xid=1, options={1: bytes(255), 2: bytes(255)})))
    with_it = len(dhcp.emit(dhcp.Message(op=2, xid=1, options={1: bytes(255), 2: bytes(255), 12: value})))
    assert with_it - without == dhcp.option_octets(value)


@given(names)
def test_search_list_decodes_to_what_was_encoded(search: list[str]) -> None:
    assert list(dhcp.decode_names(dhcp.encode_names(search))) == search


def test_search_list_is_compressed_as_in_the_example_of_the_rfc() -> None:
    """RFC 3397 section 2: eng.apple.com and marketing.apple.com."""
    value = dhcp.encode_names(["eng.apple.com", "marketing.apple.com"])
    assert value == b"\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04"


@pytest.mark.parametrize("name", ["", ".", "a..b", "a" * 64, ".".join(["abcdefgh"] * 29), "a b", "a\n.b", "a.\x00"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        dhcp.encode_names([name])
    with pytest.raises(ValueError):
        dhcp.check_name(name)


def test_other_scripts_are_sent_as_idna() -> None:
    assert dhcp.decode_names(dhcp.encode_names(["bücher.example."])) == ("xn--bcher-kva.example",)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"\xc0\x00", id="pointer to itself"),
        pytest.param(b"\x01a\xc0\x00", id="label and pointer go round"),
        pytest.param(b"\x01a\xc0\x04\x00", id="pointer forwards"),
        pytest.param(b"\x03ab", id="label cut off"),
        pytest.param(b"\x01a\xc0", id="pointer cut off"),
        pytest.param(b"\x40" + b"a" * 64 + b"\x00", id="reserved label type"),
        pytest.param((b"\x3f" + b"a" * 63) * 4 + b"\x00", id="name over 255"),
    ],
)
def test_broken_search_lists_are_malformed(value: bytes) -> None:
    with pytest.raises(Malformed):
        dhcp.decode_names(value)


def test_routes_are_encoded_as_in_the_examples_of_the_rfc() -> None:
    """RFC 3442: only the significant octets of a destination are sent."""
    router = bytes((192, 168, 65, 1))
    routes = [
        (IPv4Network("0.0.0.0/0"), router),
        (IPv4Network("10.0.0.0/8"), router),
        (IPv4Network("10.17.0.0/16"), router),
        (IPv4Network("10.27.129.0/24"), router),
        (IPv4Network("10.229.0.128/25"), router),
        (IPv4Network("10.198.122.47/32"), router),
    ]
    value = dhcp.encode_routes(routes)
    expected = ["00", "080a", "100a11", "180a1b81", "190ae50080", "200ac67a2f"]
    assert value == b"".join(bytes.fromhex(text) + router for text in expected)
