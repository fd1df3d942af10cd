"""Where a guest may not go, in every notation an address has (threats G25, G26, G27; rows I10, U08; DESIGN 9)."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Endpoint, GatewayForward
from netstack.errors import ConfigError
from netstack.policy.egress import ALLOW, Answer, Deny, Egress, Rewrite, embedded_ipv4
from netstack.settings import Network

TCP, UDP, ICMP = 6, 17, 1


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


LOOPBACK = [
    "127.0.0.1", "127.0.0.2", "127.0.0.53", "127.0.1.1", "127.1.2.3", "127.255.255.254", "127.255.255.255", "127.0.0.0",
    "0.0.0.0", "0.0.0.1", "0.1.2.3", "0.255.255.255",
    "::1", "::", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:0.0.0.0", "::ffff:127.8.9.10",
    "::ffff:0:127.0.0.1", "::ffff:0:0.0.0.0", "::127.0.0.1", "::127.255.0.1",
    "64:ff9b::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::0.0.0.0", "64:ff9b:1::7f00:1", "64:ff9b:1:7f00:0:100::",
    "2002:7f00:1::", "2002:7f00:1::1", "2002:7fff:ffff:1:2:3:4:5", "2002::1", "2002:0:1::",
    "2001:0:7f00:1::", "2001:0:808:808:0:0:80ff:fffe", "2001:0:808:808::ffff:ffff",
    "2001:db8::5efe:127.0.0.1", "2001:db8::200:5efe:127.0.0.1",
]  # fmt: skip
METADATA = [
    "169.254.169.254", "169.254.170.2", "169.254.0.1", "169.254.1.1", "169.254.255.255", "168.63.129.16",
    "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254",
    "::ffff:169.254.169.254", "::ffff:a9fe:a9fe", "::169.254.169.254", "64:ff9b::169.254.169.254", "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::", "2002:a9fe:a9fe::1", "::ffff:0:169.254.169.254", "::ffff:168.63.129.16",
    "64:ff9b::100.100.100.200", "2002:c000:c0::", "2001:db8::5efe:169.254.169.254",
    "fe80::1", "fe80::a9fe:a9fe", "febf::1", "fec0::1",
]  # fmt: skip
RESERVED = ["240.0.0.1", "241.2.3.4", "255.255.255.254", "255.0.0.0", "::ffff:240.0.0.1"]
NOBODY = [
    "224.0.0.1", "224.0.0.251", "239.255.255.250", "232.1.1.1", "255.255.255.255", "192.168.65.255",
    "ff02::1", "ff02::fb", "ff05::1:3", "ff0e::1", "::ffff:224.0.0.1", "::ffff:255.255.255.255", "64:ff9b::224.0.0.1",
    "2002:efff:fffa::",
]  # fmt: skip


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
@pytest.mark.parametrize("address", LOOPBACK + METADATA + RESERVED)
def test_no_spelling_of_the_hosts_own_or_metadata_addresses_is_reached(address: str, protocol: int) -> None:
    verdict = Egress(Network()).decide(protocol, packed(address), 80)
    assert isinstance(verdict, Deny), address
    assert verdict.answer is Answer.PROHIBITED


def test_the_table_is_as_long_as_the_acceptance_asks() -> None:  # G25: at least 60 spellings
    assert len(set(LOOPBACK + METADATA)) >= 60


@pytest.mark.parametrize("address", NOBODY)
def test_broadcast_and_multicast_are_refused_in_silence(address: str) -> None:  # I10, U08, C04
    verdict = Egress(Network()).decide(UDP, packed(address), 1900)
    assert isinstance(verdict, Deny)
    assert verdict.answer is Answer.SILENT


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "10.1.2.3", "172.17.0.1", "192.168.1.1", "192.168.64.255", "100.64.0.1", "1.0.0.0", "128.0.0.1",
     "223.255.255.255", "168.63.129.15", "169.253.255.255", "192.0.0.191", "2606:4700::1111", "fd12::1",
     "64:ff9b::8.8.8.8", "2002:808:808::1", "::ffff:8.8.8.8", "2001:0:808:808::f7f7:f7f7"],
)  # fmt: skip
def test_everybody_else_is_reached(address: str) -> None:
    assert Egress(Network()).decide(TCP, packed(address), 443) is ALLOW


def test_the_host_alias_means_the_hosts_loopback_at_the_same_port() -> None:
    egress = Egress(Network())
    for port in (80, 8080):
        assert egress.decide(TCP, packed("192.168.65.2"), port) == Rewrite(Endpoint.of("127.0.0.1", port))


def test_the_host_alias_has_one_spelling() -> None:
    for address in ("::ffff:192.168.65.2", "64:ff9b::192.168.65.2", "2002:c0a8:4102::1"):
        assert isinstance(Egress(Network()).decide(TCP, packed(address), 80), Deny), address


def test_with_the_alias_off_its_address_is_nobody() -> None:
    verdict = Egress(Network(host_alias=None)).decide(TCP, packed("192.168.65.2"), 80)
    assert isinstance(verdict, Deny)
    assert verdict.answer is Answer.UNREACHABLE


def test_a_gateway_port_without_a_service_is_refused_and_never_proxied() -> None:
    verdict = Egress(Network()).decide(TCP, packed("192.168.65.1"), 8888)
    assert isinstance(verdict, Deny)
    assert verdict.answer is Answer.REFUSED


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_gateway_that_is_the_host_alias_too_leads_to_the_host_after_its_forwards(protocol: int) -> None:
    egress = Egress(Network(host_alias="192.168.65.1"))
    egress.gateway_forwards.replace(
        [GatewayForward("tcp" if protocol == TCP else "udp", 53, Endpoint(packed("10.0.0.1"), 5353))]
    )
    assert egress.decide(protocol, packed("192.168.65.1"), 53) == Rewrite(Endpoint(packed("10.0.0.1"), 5353))
    assert egress.decide(protocol, packed("192.168.65.1"), 80) == Rewrite(Endpoint(packed("127.0.0.1"), 80))
    assert egress.decide(protocol, packed("::ffff:192.168.65.1"), 80) != ALLOW


def test_another_address_of_the_gateway_has_its_services_and_nothing_else() -> None:
    network = Network(gateway_aliases=("192.168.65.250",))
    assert Egress(network).decide(TCP, packed("192.168.65.250"), 80) == Egress(network).decide(
        TCP, packed("192.168.65.1"), 80
    )
    assert network.own_addresses == {packed(f"192.168.65.{last}") for last in (1, 2, 250)}
    for wrong in ("192.168.65.1", "192.168.65.2", "10.0.0.1", "192.168.65.255"):
        with pytest.raises(ConfigError, match="gateway_aliases: "):
            Network(gateway_aliases=(wrong,))


def test_other_addresses_of_the_virtual_network_do_not_lead_to_the_hosts_network() -> None:
    egress = Egress(Network(routed=("10.88.0.0/16",)))
    for address in ("192.168.65.3", "192.168.65.254", "192.168.65.0", "10.88.3.4", "::ffff:192.168.65.1"):
        assert isinstance(egress.decide(UDP, packed(address), 53), Deny), address


def test_a_prefix_in_allow_is_exempt_from_the_built_in_refusals() -> None:
    egress = Egress(Network(allow=("169.254.169.254/32", "239.1.0.0/16", "127.0.0.53/32", "fe80::/10")))
    for address in ("169.254.169.254", "239.1.2.3", "127.0.0.53", "fe80::1"):
        assert egress.decide(TCP, packed(address), 80) is ALLOW, address
    for address in ("169.254.169.253", "239.2.0.1", "127.0.0.1", "255.255.255.255", "192.168.65.9", "::1"):
        assert isinstance(egress.decide(TCP, packed(address), 80), Deny), address


def test_allowing_everything_still_keeps_the_virtual_networks_own_addresses() -> None:
    egress = Egress(Network(allow=("0.0.0.0/0",)))
    assert egress.decide(TCP, packed("127.0.0.1"), 1) is ALLOW
    for address in ("192.168.65.1", "192.168.65.77", "192.168.65.255"):
        assert isinstance(egress.decide(TCP, packed(address), 1), Deny), address


def test_the_hosts_own_addresses_can_be_refused_later_and_admitted_again() -> None:
    egress = Egress(Network())
    lan = packed("192.168.1.7")
    assert egress.decide(TCP, lan, 22) is ALLOW
    egress.refuse([lan])
    assert isinstance(egress.decide(TCP, lan, 22), Deny)
    assert isinstance(egress.decide(TCP, packed("::ffff:192.168.1.7"), 22), Deny)
    egress.refuse([])
    assert egress.decide(TCP, lan, 22) is ALLOW


def test_a_scan_does_not_grow_the_memory_of_verdicts() -> None:
    egress = Egress(Network())
    for number in range(3 * Egress.CACHE):
        egress.decide(TCP, (0x08000000 + number).to_bytes(4, "big"), 80)
    assert len(egress._verdicts) <= Egress.CACHE


def test_a_prefix_that_is_none_is_named_in_the_complaint() -> None:
    with pytest.raises(ConfigError, match=r"allow: '10.0.0.1/8'"):
        Egress(Network(allow=("10.0.0.1/8",)))


@given(st.binary(min_size=4, max_size=4))
def test_wrapping_an_address_never_gets_it_past_a_refusal(address: bytes) -> None:
    egress = Egress(Network())
    plain = egress.decide(TCP, address, 80)
    if plain is ALLOW:
        return
    for text in ("::", "::ffff:0:0", "::ffff:0:0:0", "64:ff9b::", "64:ff9b:1::"):
        wrapped = packed(text)[:12] + address
        if embedded_ipv4(wrapped):
            assert isinstance(egress.decide(TCP, wrapped, 80), Deny)
    assert isinstance(egress.decide(TCP, b"\x20\x02" + address + bytes(10), 80), Deny)


@given(st.binary(max_size=20), st.integers(0, 65535))
def test_any_octets_get_a_verdict(address: bytes, port: int) -> None:
    Egress(Network()).decide(TCP, address, port)
