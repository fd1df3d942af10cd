"""What a guest sees of the DHCP server: D01 to D04 of conformance.md, vpnkit.md section 3.3."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from netstack.dhcp.leases import Leases
from netstack.dhcp.server import Server
from netstack.errors import ConfigError
from netstack.observe.events import LeaseGiven, LeaseReleased
from netstack.observe.metrics import Counters, Drop
from netstack.settings import Limits, Network, parse_ipv4
from netstack.wire import dhcp
from netstack.wire.dhcp import Option, Type

BROADCAST = ("255.255.255.255", b"\xff" * 6)
MakeLan = Callable[..., Any]


def four(*addresses: str) -> bytes:
    return b"".join(map(parse_ipv4, addresses))


# D01: the exchange and its options.


def test_guest_is_offered_the_first_address_and_gets_it(lan: Any) -> None:
    guest = lan.guest(hostname=b"web-1")
    offer = guest.discover()
    assert offer.kind is Type.OFFER
    assert offer.address == "192.168.65.3"
    assert offer.message.siaddr == four("192.168.65.1")
    ack = guest.select("192.168.65.3")
    assert ack.kind is Type.ACK and ack.address == "192.168.65.3"
    lease = lan.leases.at(four("192.168.65.3"), lan.now)
    assert (lease.mac, lease.hostname, lease.expires) == (guest.mac, "web-1", lan.now + 86400)
    assert [str(event) for event in lan.told(LeaseGiven)] == [
        "LeaseGiven address=192.168.65.3 mac=02:00:00:00:00:01 hostname=web-1 lease_s=86400"
    ]


def test_guest_that_lists_parameters_gets_exactly_those(lan: Any) -> None:
    guest = lan.guest(options={Option.PARAMETER_LIST: bytes((1, 3, 6, 15, 26, 28, 42, 43, 66, 51, 51))})
    options = guest.discover().message.options
    assert options == {
        1: four("255.255.255.0"),
        3: four("192.168.65.1"),
        6: four("192.168.65.1"),
        15: b"internal",
        26: struct.pack("!H", 1500),
        28: four("192.168.65.255"),
        42: four("192.168.65.1"),
        51: struct.pack("!I", 86400),
        53: b"\x02",
        54: four("192.168.65.1"),
        58: struct.pack("!I", 43200),
        59: struct.pack("!I", 75600),
    }
    guest.options = {Option.PARAMETER_LIST: b"\x03"}
    assert set(guest.select("192.168.65.3").message.options) == {3, 51, 53, 54, 58, 59}


def test_guest_without_parameter_list_gets_a_sensible_set(make_lan: MakeLan) -> None:
    """vpnkit.md appendix E: the Go vmnet client's DISCOVER of 244 octets, cookie and message type only."""
    lan = make_lan(search=("corp.example", "eng.corp.example"))
    mac = bytes.fromhex("025000000001")
    discover = bytes.fromhex("0101060001000000") + b"\x00\x00\x80\x00" + bytes(16) + mac + bytes(202)
    discover += bytes.fromhex("63825363 350101 ff")
    assert len(discover) == 244
    reply = lan.server.handle(
        discover,
        source_mac=mac,
        source=bytes(4),
        destination=b"\xff" * 4,
        port=1,
        now=0.0,
    )
    assert (reply.destination, reply.destination_mac) == (b"\xff" * 4, b"\xff" * 6)
    assert reply.payload[0] == 2 and reply.payload[4:8] == b"\x01\x00\x00\x00"
    assert reply.payload[16:20] == four("192.168.65.3")
    assert set(dhcp.parse(reply.payload).options) == {1, 3, 6, 15, 26, 28, 42, 51, 53, 54, 58, 59, 119}


def test_scapy_reads_the_offer_and_its_request_is_understood(lan: Any) -> None:
    mac = bytes.fromhex("020000000009")

    def exchange(*options: Any) -> Any:
        payload = bytes(BOOTP(op=1, chaddr=mac, xid=0xABCD, flags=0x8000) / DHCP(options=[*options, "end"]))
        reply = lan.server.handle(
            payload, source_mac=mac, source=bytes(4), destination=b"\xff" * 4, port=1, now=lan.now
        )
        answer = BOOTP(reply.payload)
        return answer, {option[0]: option[1] for option in answer[DHCP].options if isinstance(option, tuple)}

    offer, options = exchange(("message-type", "discover"), ("param_req_list", [1, 3, 6, 15, 26, 51]))
    assert (offer.op, offer.xid, offer.yiaddr, options["message-type"]) == (2, 0xABCD, "192.168.65.3", 2)
    assert (options["subnet_mask"], options["router"], options["name_server"]) == (
        "255.255.255.0",
        "192.168.65.1",
        "192.168.65.1",
    )
    assert (options["domain"], options["interface-mtu"], options["lease_time"]) == (b"internal", 1500, 86400)
    ack, options = exchange(
        ("message-type", "request"), ("server_id", options["server_id"]), ("requested_addr", offer.yiaddr)
    )
    assert (ack.yiaddr, options["message-type"]) == ("192.168.65.3", 5)


def test_settings_of_the_network_reach_the_guest(make_lan: MakeLan) -> None:
    lan = make_lan(
        {"routes": [("10.1.0.0/16", "192.168.65.7")]},
        subnet="192.168.64.0/22",
        mtu=9000,
        domain="corp.example",
        search=("a.example", "b.example"),
        dns_servers=("192.168.65.1", "9.9.9.9"),
        ntp_servers=("192.168.65.5",),
        lease_s=3600,
        pool_first="192.168.66.10",
    )
    guest = lan.guest(options={Option.PARAMETER_LIST: bytes((1, 6, 15, 26, 28, 42, 119, 121))})
    offer = guest.discover()
    options = offer.message.options
    assert offer.address == "192.168.66.10"
    assert (options[1], options[28]) == (four("255.255.252.0"), four("192.168.67.255"))
    assert options[6] == four("192.168.65.1", "9.9.9.9")
    assert options[42] == four("192.168.65.5")
    assert (options[15], options[26]) == (b"corp.example", struct.pack("!H", 9000))
    assert dhcp.decode_names(options[119]) == ("a.example", "b.example")
    assert options[121] == bytes((16, 10, 1)) + four("192.168.65.7") + bytes(1) + four("192.168.65.1")  # RFC 3442
    assert offer.seconds(51) == 3600


def test_domain_and_search_list_that_are_not_set_are_left_out(make_lan: MakeLan) -> None:
    """Lesson of vpnkit.md section 10: an empty option is invalid."""
    lan = make_lan(domain=None)
    offer = lan.guest(options={Option.PARAMETER_LIST: bytes((1, 12, 15, 119, 121))}).discover()
    assert set(offer.message.options) == {1, 51, 53, 54, 58, 59}


def test_a_long_search_list_is_shortened_to_what_the_guest_can_take(make_lan: MakeLan) -> None:
    search = tuple(f"department-{number}.example-{number}.com" for number in range(40))
    lan = make_lan(search=search)
    small = lan.guest().discover()
    assert len(small.reply.payload) <= 576 - 28
    names = dhcp.decode_names(small.message.options[119])
    assert names == search[: len(names)] and len(names) > 3
    assert {1, 3, 6, 15, 26} <= set(small.message.options)
    large = lan.guest(2, options={Option.MAX_SIZE: struct.pack("!H", 1500)}).discover()
    assert len(large.reply.payload) <= 1500 - 28
    assert len(dhcp.decode_names(large.message.options[119])) > len(names)
    with_nonsense = lan.guest(3, options={Option.MAX_SIZE: struct.pack("!H", 20)}).discover()
    assert len(with_nonsense.reply.payload) <= 576 - 28


def test_guest_may_ask_for_a_shorter_lease_but_not_for_a_longer_or_a_tiny_one(lan: Any) -> None:
    guest = lan.guest()

    def offered(seconds: int) -> int:
        return int(guest.send(Type.DISCOVER, {Option.LEASE_TIME: struct.pack("!I", seconds)}).seconds(51))

    assert offered(7) == 120
    assert offered(0xFFFFFFFF) == 86400
    assert offered(600) == 600
    # The REQUEST need not repeat it.
    ack = guest.select("192.168.65.3")
    assert (ack.seconds(51), ack.seconds(58), ack.seconds(59)) == (600, 300, 525)
    assert guest.renew("192.168.65.3").seconds(51) == 86400


def test_a_short_lease_in_the_settings_is_kept_below_the_floor(make_lan: MakeLan) -> None:
    lan = make_lan(lease_s=10)
    asked = lan.guest().send(Type.DISCOVER, {Option.LEASE_TIME: struct.pack("!I", 1)})
    assert asked.seconds(51) == 10


def test_renewal_times_are_spread_a_little(make_lan: MakeLan) -> None:
    """RFC 2131 section 4.4.5."""
    lan = make_lan({"rng": random.Random(4)})
    renewals = {lan.guest(number).discover().seconds(58) for number in range(1, 9)}
    assert len(renewals) == 8
    assert all(0.47 * 86400 < seconds < 0.53 * 86400 for seconds in renewals)


def test_client_identifier_is_returned_unaltered(lan: Any) -> None:
    """RFC 6842, also in a NAK."""
    guest = lan.guest(client_id=b"\xff\x01\x02duid")
    assert guest.discover().message.options[61] == b"\xff\x01\x02duid"
    nak = guest.reboot("10.0.0.1")
    assert nak.kind is Type.NAK and nak.message.options[61] == b"\xff\x01\x02duid"
    assert 61 not in lan.guest(2).discover().message.options


# D01: broadcast and unicast, RFC 2131 section 4.1.


def test_answers_are_unicast_to_the_new_address_unless_the_guest_asks_for_broadcast(lan: Any) -> None:
    plain, deaf = lan.guest(1), lan.guest(2, flags=dhcp.BROADCAST)
    assert plain.discover().to == ("192.168.65.3", plain.mac)
    assert plain.select("192.168.65.3").to == ("192.168.65.3", plain.mac)
    assert deaf.discover().to == BROADCAST
    ack = deaf.select("192.168.65.4")
    assert ack.to == BROADCAST and ack.message.flags == dhcp.BROADCAST


def test_renewal_is_answered_to_the_address_in_use_whatever_the_flag_says(lan: Any) -> None:
    guest = lan.guest(flags=dhcp.BROADCAST)
    guest.join()
    for rebind in (False, True):
        ack = guest.renew("192.168.65.3", rebind=rebind)
        assert (ack.kind, ack.to) == (Type.ACK, ("192.168.65.3", guest.mac))
        assert ack.message.ciaddr == ack.message.yiaddr == four("192.168.65.3")


def test_refusal_is_broadcast(lan: Any) -> None:
    guest = lan.guest()
    guest.join()
    for nak in (guest.renew("192.168.65.9"), guest.reboot("192.168.65.9")):
        assert (nak.kind, nak.to) == (Type.NAK, BROADCAST)
        assert nak.message.yiaddr == nak.message.ciaddr == bytes(4)
        assert set(nak.message.options) == {53, 54, 56}


def test_guest_behind_a_bridge_that_hides_its_mac_is_answered_by_broadcast(lan: Any) -> None:
    assert lan.guest().discover(source_mac=b"\x02\x00\x00\x00\x00\x99").to == BROADCAST


# D02: the rest of the protocol.


def test_renewal_extends_the_lease(lan: Any) -> None:
    guest = lan.guest()
    guest.join()
    lan.wait(43200)
    assert guest.renew("192.168.65.3").kind is Type.ACK
    lan.wait(86399)
    assert lan.leases.at(four("192.168.65.3"), lan.now) is not None
    lan.wait(2)
    assert lan.leases.at(four("192.168.65.3"), lan.now) is None
    assert len(lan.told(LeaseGiven)) == len(lan.told(LeaseReleased)) == 1


def test_renewal_of_a_client_that_names_the_server_too_is_a_renewal(lan: Any) -> None:
    guest = lan.guest()
    guest.join()
    ack = guest.send(
        Type.REQUEST, {Option.SERVER_ID: four("192.168.65.1")}, ciaddr="192.168.65.3", destination="192.168.65.1"
    )
    assert (ack.kind, ack.address) == (Type.ACK, "192.168.65.3")


def test_guest_that_reboots_confirms_its_address(lan: Any) -> None:
    guest = lan.guest()
    guest.join()
    ack = guest.reboot("192.168.65.3")
    assert (ack.kind, ack.address) == (Type.ACK, "192.168.65.3")
    assert len(lan.told(LeaseGiven)) == 2  # the stack learns that the guest began anew


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("10.0.2.15", id="of another network"),
        pytest.param("192.168.65.1", id="the gateway's"),
        pytest.param("192.168.65.2", id="the host alias"),
        pytest.param("192.168.65.0", id="the network's"),
        pytest.param("192.168.65.255", id="broadcast"),
        pytest.param("192.168.65.3", id="another guest's"),
    ],
)
def test_guest_that_asks_for_an_address_it_cannot_have_is_refused(lan: Any, address: str) -> None:
    lan.guest(1).join()
    stranger = lan.guest(2)
    assert stranger.reboot(address).kind is Type.NAK
    assert stranger.renew(address).kind is Type.NAK
    assert stranger.select(address).kind is Type.NAK
    assert stranger.join() == "192.168.65.4"


def test_guest_unknown_to_us_keeps_an_address_that_was_never_given(lan: Any) -> None:
    """As after the loss of the lease file: its connections live on."""
    guest = lan.guest()
    ack = guest.renew("192.168.65.77")
    assert (ack.kind, ack.address) == (Type.ACK, "192.168.65.77")
    assert lan.guest(2).reboot("192.168.65.77").kind is Type.NAK


def test_guest_that_chooses_another_server_is_left_alone_and_its_offer_is_free(lan: Any) -> None:
    first = lan.guest(1)
    first.discover()
    assert first.select("10.0.0.7", server="10.0.0.1") is None
    assert lan.guest(2).discover().address == "192.168.65.3"
    assert lan.counters.drops == {Drop.DHCP_IGNORED: 1}


def test_released_address_is_free_and_still_the_guests_when_it_returns(lan: Any) -> None:
    guest = lan.guest()
    guest.join()
    assert guest.release("192.168.65.3") is None
    assert lan.leases.at(four("192.168.65.3"), lan.now) is None
    assert [str(event) for event in lan.told(LeaseReleased)] == [
        "LeaseReleased address=192.168.65.3 mac=02:00:00:00:00:01"
    ]
    assert lan.guest(2).join() == "192.168.65.4"
    lan.wait(10_000_000)
    assert guest.join() == "192.168.65.3"


def test_release_of_what_is_not_ones_own_is_ignored(lan: Any) -> None:
    owner, other = lan.guest(1), lan.guest(2)
    owner.join()
    other.release("192.168.65.3")
    owner.send(Type.RELEASE, {Option.SERVER_ID: four("10.0.0.1")}, ciaddr="192.168.65.3")
    lan.guest(1, port="another link").release("192.168.65.3")
    assert lan.leases.at(four("192.168.65.3"), lan.now) is not None
    assert lan.counters.drops == {Drop.DHCP_IGNORED: 3}


def test_declined_address_is_set_aside_for_ten_minutes(lan: Any) -> None:
    guest = lan.guest()
    guest.join()
    assert guest.decline("192.168.65.3") is None
    assert len(lan.told(LeaseReleased)) == 1
    assert guest.join("192.168.65.3") == "192.168.65.4"
    lan.wait(599)
    assert lan.guest(2).join("192.168.65.3") == "192.168.65.5"
    lan.wait(2)
    assert lan.guest(3).join() == "192.168.65.3"


def test_decline_of_what_is_not_ones_own_is_ignored(lan: Any) -> None:
    lan.guest(1).join()
    lan.guest(2).decline("192.168.65.3")
    lan.guest(1, port="another link").decline("192.168.65.3")
    lan.guest(2).decline("192.168.65.9")
    assert lan.guest(1).renew("192.168.65.3").kind is Type.ACK
    assert lan.guest(3).join("192.168.65.9") == "192.168.65.9"


def test_inform_is_answered_with_settings_and_without_a_lease(lan: Any) -> None:
    guest = lan.guest(options={Option.PARAMETER_LIST: bytes((1, 3, 6, 51, 58, 59))})
    ack = guest.send(Type.INFORM, ciaddr="192.168.65.50", destination="192.168.65.1")
    assert (ack.kind, ack.address, ack.to) == (Type.ACK, "0.0.0.0", ("192.168.65.50", guest.mac))
    assert ack.message.ciaddr == four("192.168.65.50")
    assert set(ack.message.options) == {1, 3, 6, 53, 54}
    without_ciaddr = guest.send(Type.INFORM, source="192.168.65.51")
    assert without_ciaddr.to == ("192.168.65.51", guest.mac)
    assert not list(lan.leases.active(lan.now))


@pytest.mark.parametrize("address", ["0.0.0.0", "8.8.8.8", "192.168.65.1", "192.168.65.255"])
def test_inform_from_nowhere_is_ignored(lan: Any, address: str) -> None:
    assert lan.guest().send(Type.INFORM, ciaddr=address) is None
    assert lan.counters.drops == {Drop.DHCP_IGNORED: 1}


# D03: what is dropped.


def raw(options: bytes, **fields: Any) -> bytes:
    message = dhcp.Message(**{"op": 1, "xid": 1, "chaddr": b"\x02\x00\x00\x00\x00\x01", **fields})
    return dhcp.emit(message)[:240] + options


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        pytest.param(b"", Drop.DHCP_MALFORMED, id="empty"),
        pytest.param(raw(b"\x35\x01\x01\xff")[:236], Drop.DHCP_MALFORMED, id="no cookie"),
        pytest.param(raw(b"\x35\x05\x01"), Drop.DHCP_MALFORMED, id="option over the end"),
        pytest.param(raw(b"\x34\x01\x09\x35\x01\x01\xff"), Drop.DHCP_MALFORMED, id="bad overload"),
        pytest.param(raw(b"\x35\x01\x01\xff", chaddr=b"\x02" * 5), Drop.DHCP_MALFORMED, id="hlen 5"),
        pytest.param(raw(b"\x35\x01\x01\xff", chaddr=b"\x02" * 16), Drop.DHCP_MALFORMED, id="hlen 16"),
        pytest.param(raw(b"\x35\x01\x01\xff", htype=6), Drop.DHCP_MALFORMED, id="no Ethernet"),
        pytest.param(raw(b"\x35\x01\x01\xff", chaddr=b"\xff" * 6), Drop.DHCP_MALFORMED, id="broadcast chaddr"),
        pytest.param(raw(b"\x35\x01\x01\xff", chaddr=bytes(6)), Drop.DHCP_MALFORMED, id="zero chaddr"),
        pytest.param(
            raw(b"\x35\x01\x01\xff", chaddr=Network().gateway_mac_bytes), Drop.DHCP_MALFORMED, id="the gateway's chaddr"
        ),
        pytest.param(raw(b"\xff"), Drop.DHCP_MALFORMED, id="no message type"),
        pytest.param(raw(b"\x35\x02\x01\x01\xff"), Drop.DHCP_MALFORMED, id="two message types"),
        pytest.param(raw(b"\x35\x01\x09\xff"), Drop.DHCP_MALFORMED, id="unknown message type"),
        pytest.param(raw(b"\x35\x01\x03\xff"), Drop.DHCP_MALFORMED, id="request for nothing"),
        pytest.param(raw(b"\x35\x01\x01\x32\x03\x01\x02\x03\xff"), Drop.DHCP_MALFORMED, id="address of three octets"),
        pytest.param(raw(b"\x35\x01\x01\x33\x01\x01\xff"), Drop.DHCP_MALFORMED, id="lease time of one octet"),
        pytest.param(raw(b"\x35\x01\x01\x39\x01\x01\xff"), Drop.DHCP_MALFORMED, id="message size of one octet"),
        pytest.param(raw(b"\x35\x01\x01\xff", giaddr=b"\x0a\x00\x00\x01"), Drop.DHCP_IGNORED, id="relayed"),
        pytest.param(raw(b"\x35\x01\x02\xff", op=2), Drop.DHCP_IGNORED, id="a server's message"),
        pytest.param(raw(b"\x35\x01\x02\xff"), Drop.DHCP_IGNORED, id="offer of a guest"),
        pytest.param(raw(b"\x35\x01\x05\xff"), Drop.DHCP_IGNORED, id="ack of a guest"),
    ],
)
def test_what_is_no_request_is_counted_and_dropped(lan: Any, payload: bytes, reason: Drop) -> None:
    reply = lan.server.handle(
        payload, source_mac=b"\x02" * 6, source=bytes(4), destination=b"\xff" * 4, port=1, now=lan.now
    )
    assert reply is None
    assert lan.counters.drops == {reason: 1}
    assert lan.guest(7).join() == "192.168.65.3"


def test_requests_to_another_address_are_not_ours(lan: Any) -> None:
    assert lan.guest().send(Type.DISCOVER, destination="192.168.65.2") is None
    assert lan.counters.drops == {Drop.DHCP_IGNORED: 1}
    assert lan.guest().send(Type.DISCOVER, destination="192.168.65.255").kind is Type.OFFER
    assert lan.guest().send(Type.DISCOVER, destination="192.168.65.1").kind is Type.OFFER


def test_options_in_overloaded_fields_count(lan: Any) -> None:
    head = raw(b"")
    payload = bytearray(head + b"\x34\x01\x03\xff")
    payload[108:111] = b"\x35\x01\x01"  # file: DISCOVER
    payload[44:50] = b"\x32\x04" + four("192.168.65.40")  # sname: this address
    reply = lan.server.handle(
        bytes(payload), source_mac=b"\x02" * 6, source=bytes(4), destination=b"\xff" * 4, port=1, now=lan.now
    )
    assert dhcp.parse(reply.payload).yiaddr == four("192.168.65.40")


@given(data=st.binary(max_size=80), cut=st.integers(0, 330), kind=st.integers(0, 10))
def test_nothing_a_guest_sends_is_raised(data: bytes, cut: int, kind: int) -> None:
    network = Network(limits=Limits(max_leases_per_port=2))
    server = Server(network, Leases(network), counters=Counters())
    for payload in (data, raw(b"\x35\x01" + bytes((kind,)) + data), raw(b"\x35\x01\x01" + data)[:cut]):
        reply = server.handle(
            payload, source_mac=b"\x02" * 6, source=bytes(4), destination=b"\xff" * 4, port=1, now=0.0
        )
        if reply is not None:
            assert dhcp.parse(reply.payload).op == dhcp.BOOTREPLY


# Names.


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (b"web-1", "web-1"),
        (b"web_1", "web-1"),
        (b"web.corp.example", "web"),
        (b"My Laptop\x00", "My-Laptop"),
        (b"\x1b[31mred\x07\n", "31mred"),
        (b"-x-", "x"),
        (b"a" * 70, "a" * 63),
        (b"a" * 62 + b"-b", "a" * 62),
        ("höst".encode(), "hst"),
        (b"\xff\xfe", ""),
    ],
)
def test_host_names_are_kept_as_letters_digits_and_hyphens(lan: Any, said: bytes, kept: str) -> None:
    lan.guest(hostname=said).join()
    assert [lease.hostname for lease in lan.leases.active(lan.now)] == [kept]


def test_host_name_is_found_and_given_back_when_asked_for(lan: Any) -> None:
    guest = lan.guest(hostname=b"Box", options={Option.PARAMETER_LIST: b"\x0c"})
    guest.join()
    assert guest.renew("192.168.65.3").message.options[12] == b"Box"
    assert guest.send(Type.INFORM, ciaddr="192.168.65.3").message.options[12] == b"Box"
    assert lan.leases.named("box", lan.now).mac == guest.mac
    assert lan.leases.named("", lan.now) is None
    guest.hostname = b""
    guest.renew("192.168.65.3")
    assert lan.leases.named("BOX", lan.now) is not None
    guest.release("192.168.65.3")
    assert lan.leases.named("box", lan.now) is None


@pytest.mark.parametrize(
    ("fqdn", "kept"),
    [
        pytest.param(b"\x00\x00\x00win.corp.example", "win", id="text"),
        pytest.param(b"\x04\x00\x00\x03win\x04corp\x00", "win", id="wire form"),
        pytest.param(b"\x04\x00\x00\xffwin", "win", id="wire form that lies"),
        pytest.param(b"\x04\x00\x00", "", id="cut"),
    ],
)
def test_windows_guests_are_named_by_option_81(lan: Any, fqdn: bytes, kept: str) -> None:
    lan.guest(options={Option.CLIENT_FQDN: fqdn}).join()
    assert [lease.hostname for lease in lan.leases.active(lan.now)] == [kept]


# Settings that no option can carry.


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"search": ("a..b",)}, "search"),
        ({"domain": "two words"}, "domain"),
        ({"lease_s": 0}, "lease_s"),
        ({"dns_servers": ("one.one",)}, "dns_servers"),
        ({"ntp_servers": ("::1",)}, "ntp_servers"),
    ],
)
def test_settings_that_cannot_be_sent_are_named(settings: dict[str, Any], word: str) -> None:
    network = Network(**settings)
    with pytest.raises(ConfigError, match=word):
        Server(network, Leases(network))


def test_routes_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match=r"routes.*10\.0\.0\.0/8"):
        Server(Network(), Leases(Network()), routes=[("10.0.0.1/8", "192.168.65.1")])


def test_the_mtu_is_that_of_the_clients_link(lan: Any) -> None:
    told = []
    for number, mtu in enumerate((None, 1000, 65520), 1):
        guest = lan.guest(number, mtu=mtu)
        answer = guest.discover()
        assert answer is not None
        told.append(int.from_bytes(answer.message.options[Option.INTERFACE_MTU], "big"))
    assert told == [1500, 1000, 65520]
