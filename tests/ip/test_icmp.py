"""The ICMP errors a guest gets, what they quote, and which are never sent (C04 to C08, U07)."""

from __future__ import annotations

import random

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, ICMPerror, IPerror, IPOption_RR, UDPerror
from scapy.layers.inet import fragment as scapy_fragment

from netstack.errors import Malformed
from netstack.ip import icmp as ip_icmp
from netstack.ip.icmp import RateLimit, echo_reply, error, quoted_flow, rewrite_quoted
from netstack.wire import icmp
from tests.support import packets as wire

GUEST = wire.ip("192.168.65.3")
ALIAS = wire.ip("192.168.65.2")
REMOTE = wire.ip("1.1.1.1")
HOST = wire.ip("10.0.0.7")
BROADCAST = wire.ip("192.168.65.255")


def about(kind: int, code: int, original: bytes, **more: int) -> bytes | None:
    return error(kind, code, memoryview(original), subnet_broadcast=BROADCAST, **more)  # type: ignore[arg-type]


def udp_packet(payload: bytes = b"data", source: bytes = GUEST, destination: bytes = REMOTE, **more: int) -> bytes:
    return wire.ipv4(source, destination, 17, wire.udp(source, destination, 4000, 53, payload), **more)


def sound(packet: bytes) -> bool:
    """Whether IP header and UDP or ICMP checksum of a whole packet are right, by the tests' own sums."""
    head = (packet[0] & 15) * 4
    upper = packet[head:]
    if wire.checksum(packet[:head]):
        return False
    if packet[9] == 1:
        return wire.checksum(upper) == 0
    lead = wire.pseudo(packet[12:16], packet[16:20], 17, len(upper))
    return upper[6:8] == bytes(2) or wire.checksum(lead + upper) == 0


# --- errors of our own -------------------------------------------------------------------------------------------


def test_port_unreachable_quotes_the_guests_packet_as_scapy_and_dpkt_read_it() -> None:  # C05
    original = udp_packet()
    message = about(icmp.UNREACHABLE, icmp.PORT_UNREACHABLE, original)
    assert message == bytes(ICMP(type=3, code=3) / original)
    read = IP(bytes(IP(src="192.168.65.1", dst="192.168.65.3", proto=1) / message))
    assert (read[ICMP].type, read[ICMP].code) == (3, 3)
    assert (read[IPerror].src, read[IPerror].dst) == ("192.168.65.3", "1.1.1.1")
    assert (read[UDPerror].sport, read[UDPerror].dport) == (4000, 53)
    quoted = dpkt.icmp.ICMP(message).data.data
    assert (quoted.src, quoted.dst, quoted.data.sport, quoted.data.dport) == (GUEST, REMOTE, 4000, 53)


@pytest.mark.parametrize("payload", [0, 1, 519, 520, 521, 1400, 65507])
def test_as_much_is_quoted_as_fits_into_576_octets(payload: int) -> None:  # C06
    original = udp_packet(bytes(payload))
    message = about(icmp.UNREACHABLE, icmp.PORT_UNREACHABLE, original)
    assert message is not None
    assert 20 + len(message) == min(576, 20 + 8 + len(original))
    assert original.startswith(icmp.parse(memoryview(message)).body)


def test_a_packet_without_payload_is_quoted_whole_and_padding_is_not() -> None:  # C06
    original = wire.ipv4(GUEST, REMOTE, 132, b"")
    message = about(icmp.UNREACHABLE, icmp.PROTOCOL_UNREACHABLE, original + bytes(26))
    assert message == bytes(ICMP(type=3, code=2) / original)


@pytest.mark.parametrize(
    "original",
    [
        pytest.param(
            bytes(IP(src="192.168.65.3", dst="1.1.1.1") / ICMP(type=kind) / bytes(28)), id=f"ICMP error {kind}"
        )
        for kind in (3, 4, 5, 11, 12)
    ]
    + [
        pytest.param(wire.ipv4(GUEST, REMOTE, 1, b""), id="ICMP of unknown type"),
        pytest.param(
            bytes(IP(src="192.168.65.3", dst="1.1.1.1", options=[IPOption_RR()]) / ICMP(type=3)),
            id="error behind options",
        ),
        pytest.param(udp_packet(destination=b"\xff" * 4), id="limited broadcast"),
        pytest.param(udp_packet(destination=bytes(4)), id="broadcast of zeros"),
        pytest.param(udp_packet(destination=BROADCAST), id="broadcast of the subnet"),
        pytest.param(udp_packet(destination=wire.ip("224.0.0.251")), id="multicast"),
        pytest.param(udp_packet(destination=wire.ip("239.255.255.250")), id="administrative multicast"),
        pytest.param(udp_packet(destination=wire.ip("240.0.0.1")), id="class E"),
        pytest.param(udp_packet(offset=8), id="last fragment"),
        pytest.param(udp_packet(offset=1480, mf=True), id="middle fragment"),
        pytest.param(udp_packet(source=bytes(4)), id="source zero"),
        pytest.param(udp_packet(source=wire.ip("0.1.2.3")), id="source in 0/8"),
        pytest.param(udp_packet(source=wire.ip("127.0.0.1")), id="source loopback"),
        pytest.param(udp_packet(source=wire.ip("224.0.0.1")), id="source multicast"),
        pytest.param(udp_packet(source=wire.ip("255.255.255.255")), id="source broadcast"),
        pytest.param(udp_packet(source=BROADCAST), id="source broadcast of the subnet"),
        pytest.param(udp_packet()[:19], id="no header"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "code"), [(icmp.UNREACHABLE, icmp.PORT_UNREACHABLE), (icmp.TIME_EXCEEDED, icmp.TTL_EXCEEDED)]
)
def test_no_error_is_sent_about(kind: int, code: int, original: bytes) -> None:  # C04
    assert about(kind, code, original) is None


@pytest.mark.parametrize(
    "original",
    [
        pytest.param(udp_packet(mf=True), id="first fragment"),
        pytest.param(wire.ipv4(GUEST, REMOTE, 1, wire.echo(1, 1)), id="echo request"),
        pytest.param(wire.ipv4(GUEST, REMOTE, 1, wire.echo(1, 1, kind=0)), id="echo reply"),
        pytest.param(bytes(IP(src="192.168.65.3", dst="1.1.1.1") / TCP()), id="TCP"),
    ],
)
def test_an_error_is_sent_about(original: bytes) -> None:  # C04
    message = about(icmp.TIME_EXCEEDED, icmp.REASSEMBLY_EXCEEDED, original)
    assert message == bytes(ICMP(type=11, code=1) / original)


@pytest.mark.parametrize(
    ("octets", "mtu", "told"),
    [
        pytest.param(1500, 1400, 1400, id="known"),
        pytest.param(1500, 0, 1492, id="unknown"),
        pytest.param(1492, 0, 1006, id="the plateau is below the packet"),
        pytest.param(60, 0, 68, id="never below the smallest"),
        pytest.param(60000, 0, 32000, id="unknown, long"),
        pytest.param(1500, 70000, 65535, id="beyond the field"),
        pytest.param(1500, -1, 1492, id="nonsense"),
    ],
)
def test_fragmentation_needed_never_tells_an_mtu_of_0(octets: int, mtu: int, told: int) -> None:  # C07
    message = about(icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, udp_packet(bytes(octets - 28), df=True), mtu=mtu)
    assert message is not None
    assert icmp.parse(memoryview(message)).mtu == told
    assert ICMP(message).nexthopmtu == told


@given(st.binary(max_size=80))
def test_no_original_breaks_it(original: bytes) -> None:
    message = error(icmp.UNREACHABLE, icmp.PORT_UNREACHABLE, original)
    assert message is None or original.startswith(icmp.parse(memoryview(message)).body)


@pytest.mark.parametrize("data", [b"", b"abc", bytes(56), random.Random(1).randbytes(65507)])
def test_an_echo_reply_gives_back_identifier_number_and_data(data: bytes) -> None:  # C01
    request = icmp.parse(memoryview(bytes(ICMP(type=8, id=0xABCD, seq=65535) / data)))
    assert echo_reply(request) == bytes(ICMP(type=0, id=0xABCD, seq=65535) / data)


# --- errors from outside -----------------------------------------------------------------------------------------

HOST_UDP = bytes(IP(src="10.0.0.7", dst="1.1.1.1", ttl=1, id=99) / UDP(sport=51000, dport=53) / b"question")
GUEST_UDP = bytes(IP(src="192.168.65.3", dst="1.1.1.1", ttl=1, id=99) / UDP(sport=4000, dport=53) / b"question")
HOST_ECHO = bytes(IP(src="10.0.0.7", dst="1.1.1.1", ttl=1) / ICMP(type=8, id=33, seq=7) / bytes(56))
GUEST_ECHO = bytes(IP(src="192.168.65.3", dst="1.1.1.1", ttl=1) / ICMP(type=8, id=4242, seq=7) / bytes(56))


def arrived(quoted: bytes, kind: int = 11, code: int = 0, rest: bytes = bytes(4)) -> icmp.Message:
    return icmp.parse(memoryview(wire.icmp(kind, code, rest, quoted)))


@pytest.mark.parametrize(("kind", "code"), [(11, 0), (3, 0), (3, 1), (3, 3), (3, 13)])
def test_a_guest_sees_its_own_datagram_quoted(kind: int, code: int) -> None:  # U07
    message = rewrite_quoted(arrived(HOST_UDP, kind, code), source=GUEST, port=4000, destination=REMOTE)
    assert message == bytes(ICMP(type=kind, code=code) / GUEST_UDP)


def test_a_guest_sees_its_own_echo_request_quoted() -> None:  # C02, U07
    message = rewrite_quoted(arrived(HOST_ECHO), source=GUEST, port=4242, destination=REMOTE)
    assert message == bytes(ICMP(type=11, code=0) / GUEST_ECHO)
    read = ICMP(message)
    assert (read[ICMPerror].id, read[ICMPerror].seq) == (4242, 7)


def test_the_host_alias_comes_back_where_the_host_sent_to_its_loopback() -> None:  # U07
    quoted = bytes(IP(src="127.0.0.1", dst="127.0.0.1") / UDP(sport=51000, dport=8053) / b"odd")
    message = rewrite_quoted(arrived(quoted, 3, 3), source=GUEST, port=4000, destination=ALIAS, destination_port=53)
    expected = bytes(IP(src="192.168.65.3", dst="192.168.65.2") / UDP(sport=4000, dport=53) / b"odd")
    assert message == bytes(ICMP(type=3, code=3) / expected)


@pytest.mark.parametrize("length", [28, 29, 32])
def test_a_quotation_of_8_octets_is_enough(length: int) -> None:  # U07
    for host, guest, port in ((HOST_UDP, GUEST_UDP, 4000), (HOST_ECHO, GUEST_ECHO, 4242)):
        message = rewrite_quoted(arrived(host[:length]), source=GUEST, port=port, destination=REMOTE)
        assert message == bytes(ICMP(type=11, code=0) / guest[:length])


def test_a_quoted_udp_checksum_of_0_stays() -> None:
    quoted = wire.ipv4(HOST, REMOTE, 17, wire.udp(HOST, REMOTE, 1, 2, b"data", check=0))
    message = rewrite_quoted(arrived(quoted), source=GUEST, port=4000, destination=REMOTE)
    assert message is not None
    assert message[8:] == wire.ipv4(GUEST, REMOTE, 17, wire.udp(GUEST, REMOTE, 4000, 2, b"data", check=0))


def test_a_quoted_udp_checksum_that_becomes_0_is_written_as_ffff() -> None:
    payload = wire.udp(GUEST, REMOTE, 4000, 2, bytes(2))[6:8]  # what the sum lacked to 0xFFFF
    quoted = wire.ipv4(HOST, REMOTE, 17, wire.udp(HOST, REMOTE, 1, 2, payload))
    message = rewrite_quoted(arrived(quoted), source=GUEST, port=4000, destination=REMOTE)
    assert message is not None
    assert message[8 + 26 : 8 + 28] == b"\xff\xff"
    assert sound(message[8:])


def test_quoted_options_stay_and_a_quoted_header_checksum_is_not_trusted() -> None:
    quoted = bytearray(bytes(IP(src="10.0.0.7", dst="1.1.1.1", options=[IPOption_RR()]) / UDP(sport=9, dport=53)))
    quoted[8] -= 3  # a router counted TTL down and left the checksum
    message = rewrite_quoted(arrived(bytes(quoted)), source=GUEST, port=4000, destination=REMOTE)
    assert message is not None
    body = message[8:]
    assert sound(body)
    assert body[20:24] == quoted[20:24]
    assert quoted_flow(icmp.parse(memoryview(message))) == (17, GUEST, 4000, REMOTE, 53)


def test_the_path_mtu_crosses_and_0_becomes_a_plateau() -> None:  # C07
    for told, expected in ((1300, 1300), (0, 1492)):
        quoted = wire.ipv4(HOST, REMOTE, 17, wire.udp(HOST, REMOTE, 51000, 53, bytes(1472)), df=True)
        message = rewrite_quoted(
            arrived(quoted[:200], 3, 4, icmp.mtu_rest(told)), source=GUEST, port=4000, destination=REMOTE
        )
        assert message is not None
        assert ICMP(message).nexthopmtu == expected
        assert len(message) == 208


def test_extensions_behind_the_quotation_are_left_out() -> None:  # RFC 4884: 32 words of datagram, then an extension
    quoted = wire.ipv4(HOST, REMOTE, 17, wire.udp(HOST, REMOTE, 51000, 53, bytes(500)))[:128]
    extension = bytes.fromhex("2000dfff00080101deadbeef")
    message = rewrite_quoted(
        arrived(quoted + extension, 11, 0, bytes((0, 32, 0, 0))), source=GUEST, port=4000, destination=REMOTE
    )
    assert message is not None
    assert len(message) == 8 + 128
    assert message[4:8] == bytes(4)


def test_the_pointer_of_a_parameter_problem_crosses() -> None:
    message = rewrite_quoted(arrived(HOST_UDP, 12, 0, bytes((20, 0, 0, 0))), source=GUEST, port=1, destination=REMOTE)
    assert message is not None
    assert ICMP(message).ptr == 20


@pytest.mark.parametrize("kind", [4, 5, 8, 0, 13])
def test_what_concerns_the_host_alone_is_not_passed_on(kind: int) -> None:
    assert rewrite_quoted(arrived(HOST_UDP, kind), source=GUEST, port=1, destination=REMOTE) is None


@pytest.mark.parametrize(
    "quoted",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(HOST_UDP[:19], id="half a header"),
        pytest.param(HOST_UDP[:27], id="seven octets of UDP"),
        pytest.param(b"\x60" + HOST_UDP[1:], id="version 6"),
        pytest.param(b"\x44" + HOST_UDP[1:], id="IHL below five words"),
        pytest.param(b"\x4f" + HOST_UDP[1:40], id="IHL beyond the quotation"),
        pytest.param(HOST_UDP[:2] + b"\0\x14" + HOST_UDP[4:], id="total length without UDP"),
        pytest.param(wire.ipv4(HOST, REMOTE, 17, bytes(16), offset=8), id="fragment without ports"),
        pytest.param(wire.ipv4(HOST, REMOTE, 1, wire.icmp(3, 3, body=HOST_UDP)), id="an error"),
        pytest.param(wire.ipv4(HOST, REMOTE, 132, bytes(16)), id="SCTP"),
    ],
)
def test_a_quotation_that_leads_to_no_flow_is_malformed(quoted: bytes) -> None:
    with pytest.raises(Malformed):
        rewrite_quoted(arrived(quoted), source=GUEST, port=1, destination=REMOTE)


def test_the_flow_is_found_by_what_is_quoted() -> None:  # C02: identifiers of two processes are not confused
    assert quoted_flow(arrived(HOST_UDP)) == (17, HOST, 51000, REMOTE, 53)
    assert quoted_flow(arrived(HOST_ECHO)) == (1, HOST, 33, REMOTE, 0)


ports = st.integers(1, 65535)


@given(st.binary(max_size=600), ports, ports, ports, ports, st.booleans())
def test_whatever_is_mapped_the_quoted_checksums_are_right(
    payload: bytes, host_port: int, port: int, remote_port: int, seen_port: int, echo: bool
) -> None:
    if echo:
        quoted = wire.ipv4(HOST, REMOTE, 1, wire.echo(host_port, remote_port, payload))
        expected = wire.ipv4(GUEST, ALIAS, 1, wire.echo(port, remote_port, payload))
    else:
        quoted = wire.ipv4(HOST, REMOTE, 17, wire.udp(HOST, REMOTE, host_port, remote_port, payload))
        expected = wire.ipv4(GUEST, ALIAS, 17, wire.udp(GUEST, ALIAS, port, seen_port, payload))
    message = rewrite_quoted(arrived(quoted), source=GUEST, port=port, destination=ALIAS, destination_port=seen_port)
    assert message is not None
    assert sound(expected)
    assert message[8:] == expected[:548]


@given(st.binary(max_size=120), st.sampled_from([3, 11, 12]), st.binary(min_size=4, max_size=4))
def test_no_quotation_breaks_it(quoted: bytes, kind: int, rest: bytes) -> None:
    for octets in (quoted, HOST_UDP[:10] + quoted, HOST_ECHO[:20] + quoted):
        message = icmp.Message(kind, 4, rest, memoryview(octets))
        try:
            made = rewrite_quoted(message, source=GUEST, port=1, destination=REMOTE)
        except Malformed:
            continue
        assert made is not None
        icmp.parse(memoryview(made))


def test_what_the_guest_sent_is_made_again_for_a_quotation() -> None:  # U07, through a socket's error queue
    sent = ip_icmp.datagram_sent(GUEST, 4000, REMOTE, 53, b"question", ttl=1)
    assert sent == bytes(
        IP(src="192.168.65.3", dst="1.1.1.1", ttl=1, id=0, flags="DF") / UDP(sport=4000, dport=53) / b"question"
    )
    sent = ip_icmp.echo_sent(GUEST, REMOTE, 4242, 7, bytes(56), ttl=3)
    assert sent == bytes(
        IP(src="192.168.65.3", dst="1.1.1.1", ttl=3, id=0, flags="DF") / ICMP(id=4242, seq=7) / bytes(56)
    )


def test_a_first_fragment_that_timed_out_is_reported() -> None:  # I05
    first, *_rest = scapy_fragment(IP(src="192.168.65.3", dst="1.1.1.1") / UDP() / bytes(3000), 1480)
    message = about(icmp.TIME_EXCEEDED, icmp.REASSEMBLY_EXCEEDED, bytes(first))
    assert message == bytes(ICMP(type=11, code=1) / bytes(first)[:548])


# --- rate limit --------------------------------------------------------------------------------------------------


def test_a_burst_passes_and_then_so_many_per_second() -> None:  # C08, I13
    limit = RateLimit(rate=100.0, burst=50)
    assert sum(limit.allow(1000.0) for _ in range(500)) == 50
    assert not limit.allow(1000.005)
    assert limit.allow(1000.011)
    assert sum(limit.allow(1001.0 + step / 1000) for step in range(10_000)) in range(1045, 1055)


def test_a_pause_fills_the_bucket_up_to_the_burst_only() -> None:  # C08
    limit = RateLimit(rate=100.0, burst=5)
    assert [limit.allow(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert [limit.allow(3600.0) for _ in range(6)] == [True] * 5 + [False]


@given(st.lists(st.floats(0, 2), max_size=200))
def test_in_any_interval_no_more_than_burst_and_rate_pass(steps: list[float]) -> None:  # C08
    limit = RateLimit(rate=10.0, burst=3)
    now, passed = 0.0, []
    for step in steps:
        now += step / 10
        if limit.allow(now):
            passed.append(now)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= 3 + 10.0 * (passed[last] - passed[first]) + 1e-6
