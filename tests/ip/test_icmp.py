"""The ICMP errors a guest gets, what they quote, and which are never sent (C04 to C08, U07)."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, IPOption_RR, UDPerror
from scapy.layers.inet import fragment as scapy_fragment

from netstack.ip.icmp import RateLimit, error
from netstack.wire import icmp
from tests.support import packets as wire

GUEST = wire.ip("192.168.65.3")
REMOTE = wire.ip("1.1.1.1")
BROADCAST = wire.ip("192.168.65.255")


def about(kind: int, code: int, original: bytes, **more: int) -> bytes | None:
    return error(kind, code, memoryview(original), subnet_broadcast=BROADCAST, **more)  # type: ignore[arg-type]


def udp_packet(payload: bytes = b"data", source: bytes = GUEST, destination: bytes = REMOTE, **more: int) -> bytes:
    return wire.ipv4(source, destination, 17, wire.udp(source, destination, 4000, 53, payload), **more)


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
