"""Who gets which address: D02, D04, G24, and the UUID table of vpnkit.md section 2.4."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from netstack.dhcp.leases import (
    IdentityConflict,
    Leases,
    PoolExhausted,
    PreferredInUse,
    PreferredOutOfRange,
)
from netstack.dhcp.server import Server
from netstack.errors import ConfigError, Malformed
from netstack.observe.metrics import Counters, Drop
from netstack.settings import Limits, Network, parse_ipv4
from netstack.wire import dhcp
from netstack.wire.dhcp import Option, Type

MakeLan = Callable[..., Any]
UUID = "d1d9cd61-d0dc-4715-9bc3-4c11dad7ad{:02x}"


def four(address: str) -> bytes:
    return parse_ipv4(address)


def text(address: bytes | None) -> str | None:
    return None if address is None else ".".join(map(str, address))


# Allotment.


def test_guests_get_the_lowest_free_addresses_in_order(lan: Any) -> None:
    assert [lan.guest(number).join() for number in range(1, 5)] == [f"192.168.65.{host}" for host in range(3, 7)]


def test_addresses_of_the_network_itself_are_never_given_out(make_lan: MakeLan) -> None:
    lan = make_lan(
        subnet="10.0.0.0/28", gateway="10.0.0.5", host_alias="10.0.0.9", limits=Limits(max_leases_per_port=99)
    )
    given = [lan.guest(number).join() for number in range(1, 20)]
    expected = [f"10.0.0.{host}" for host in (1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14)]
    assert given == expected + [None] * 7
    assert lan.counters.drops[Drop.DHCP_IGNORED] == 7


def test_guest_gets_the_address_it_asks_for_if_that_is_free(lan: Any) -> None:
    assert lan.guest(1).join("192.168.65.99") == "192.168.65.99"
    assert lan.guest(2).join("192.168.65.99") == "192.168.65.3"
    assert lan.guest(3).join("10.1.1.1") == "192.168.65.4"
    assert lan.guest(4).join("192.168.65.2") == "192.168.65.5"


def test_an_offer_holds_its_address_for_half_a_minute(lan: Any) -> None:
    assert lan.guest(1).discover().address == "192.168.65.3"
    assert lan.guest(2).discover().address == "192.168.65.4"
    assert lan.server.deadline() == lan.now + 30
    lan.wait(29)
    assert lan.guest(1).discover().address == "192.168.65.3"  # asked again: held anew
    assert lan.guest(3).discover().address == "192.168.65.5"
    lan.wait(2)
    assert lan.guest(4).discover().address == "192.168.65.4"
    lan.wait(31)
    assert lan.server.deadline() is None


def test_late_request_for_a_lapsed_offer_is_still_granted_while_free(lan: Any) -> None:
    guest = lan.guest(1)
    guest.discover()
    lan.wait(31)
    assert guest.select("192.168.65.3").kind is Type.ACK


def test_expired_guest_gets_its_address_back_while_others_take_new_ones(lan: Any) -> None:
    assert lan.guest(1).join() == "192.168.65.3"
    lan.wait(86400 * 30)
    assert lan.guest(2).join() == "192.168.65.4"
    assert lan.guest(1).join() == "192.168.65.3"


def test_addresses_are_reused_oldest_first_and_only_when_none_is_new(make_lan: MakeLan) -> None:
    lan = make_lan(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2")  # .3 to .6
    guests = [lan.guest(number) for number in range(1, 8)]
    assert [guest.join() for guest in guests[:3]] == ["10.0.0.3", "10.0.0.4", "10.0.0.5"]
    guests[1].release("10.0.0.4")
    lan.wait(1)
    guests[0].release("10.0.0.3")
    assert guests[3].join() == "10.0.0.6"
    assert guests[4].join() == "10.0.0.4"
    assert guests[5].join() == "10.0.0.3"
    assert guests[6].join() is None
    assert guests[2].renew("10.0.0.5").kind is Type.ACK  # nobody lost an active lease
    assert guests[0].reboot("10.0.0.3").kind is Type.NAK


def test_an_offer_to_a_newcomer_takes_no_remembered_address_away(make_lan: MakeLan) -> None:
    lan = make_lan(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2")
    guests = [lan.guest(number) for number in range(1, 6)]
    for guest in guests[:4]:
        guest.join()
    guests[0].release("10.0.0.3")
    assert guests[4].discover().address == "10.0.0.3"
    lan.wait(31)
    assert guests[0].join() == "10.0.0.3"


def test_one_remembered_address_is_offered_to_one_newcomer_only(make_lan: MakeLan) -> None:
    lan = make_lan(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2")
    guests = [lan.guest(number) for number in range(1, 7)]
    for guest in guests[:4]:
        guest.join()
    guests[0].release("10.0.0.3")
    assert guests[4].discover().address == "10.0.0.3"
    assert guests[5].discover() is None
    assert guests[0].discover() is None  # too late, though it was its own
    assert guests[0].reboot("10.0.0.3").kind is Type.NAK
    assert guests[4].select("10.0.0.3").kind is Type.ACK


def test_declined_address_is_set_aside_even_when_it_is_the_last(make_lan: MakeLan) -> None:
    lan = make_lan(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2")
    for number in range(1, 5):
        lan.guest(number).join()
    lan.guest(1).decline("10.0.0.3")
    assert lan.guest(1).join() is None
    assert lan.guest(5).join("10.0.0.3") is None
    with pytest.raises(PreferredInUse):
        lan.leases.reserve(UUID.format(1), four("10.0.0.3"), None, lan.now)
    lan.wait(601)
    assert lan.guest(5).join() == "10.0.0.3"


def test_guest_that_came_back_is_not_taken_for_a_remembered_one(make_lan: MakeLan) -> None:
    lan = make_lan(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2")
    for number in range(1, 5):
        lan.guest(number).join()
    lan.guest(1).release("10.0.0.3")
    assert lan.guest(1).join() == "10.0.0.3"
    assert lan.guest(5).join() is None
    assert lan.guest(1).renew("10.0.0.3").kind is Type.ACK


def test_one_machine_that_boots_in_stages_keeps_its_address(lan: Any) -> None:
    """Firmware sends no client identifier, the initramfs its MAC, the system a DUID."""
    assert lan.guest(1).join() == "192.168.65.3"
    assert lan.guest(1, client_id=b"\x01\x02\x00\x00\x00\x00\x01").join() == "192.168.65.3"
    assert lan.guest(1, client_id=b"\xff\x00\x00\x00\x01duid").join() == "192.168.65.3"
    assert lan.leases.held("link 1") == 1


def test_clones_with_one_client_identifier_get_an_address_each(lan: Any) -> None:
    addresses = {lan.guest(number, client_id=b"\xff\x00\x00\x00\x01same").join() for number in (1, 2, 3)}
    assert len(addresses) == 3


def test_client_that_changed_its_mac_gets_its_ended_lease_back(lan: Any) -> None:
    identifier = b"\xff\x00\x00\x00\x01duid"
    lan.guest(1, client_id=identifier).join()
    lan.guest(2).join()
    assert lan.guest(3, client_id=identifier).join() == "192.168.65.5"  # the first lease still holds
    lan.guest(1, client_id=identifier).release("192.168.65.3")
    lan.guest(3, client_id=identifier).release("192.168.65.5")
    assert lan.guest(4, client_id=identifier).join() == "192.168.65.5"
    assert lan.guest(1, client_id=b"other").join() == "192.168.65.3"


def test_address_that_someone_uses_without_a_lease_is_given_out_last() -> None:
    network = Network(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2")
    squatted = {four("10.0.0.3"): b"squatt"}
    leases = Leases(network, in_use=lambda address, mac: squatted.get(address, mac) != mac)

    def join(mac: bytes, requested: str | None = None) -> str | None:
        wanted = four(requested) if requested else None
        address = leases.allot(mac, client_id=b"", requested=wanted, port=1, lease_s=60, now=0.0)
        if address is not None:
            assert leases.commit(mac, address, port=1, lease_s=60, now=0.0) is not None
        return text(address)

    assert join(b"first.", "10.0.0.3") == "10.0.0.4"
    assert join(b"squatt", "10.0.0.3") == "10.0.0.3"
    squatted[four("10.0.0.5")] = b"nobody"
    assert [join(mac) for mac in (b"third.", b"fourth", b"fifth.")] == ["10.0.0.6", "10.0.0.5", None]


# Static leases (D04).


def test_static_lease_is_that_guests_and_nobody_elses(make_lan: MakeLan) -> None:
    lan = make_lan(static_leases={"02-00-00-00-00-05": "192.168.65.3", "02:00:00:00:00:06": "192.168.65.200"})
    assert lan.guest(1).join("192.168.65.200") == "192.168.65.4"
    assert lan.guest(2).reboot("192.168.65.3").kind is Type.NAK
    assert lan.guest(5).join("192.168.65.77") == "192.168.65.3"
    assert lan.guest(6).join() == "192.168.65.200"
    assert lan.guest(5).reboot("192.168.65.77").kind is Type.NAK
    lan.wait(86400 * 2)
    assert lan.guest(5).join() == "192.168.65.3"


def test_static_lease_outlives_a_decline(make_lan: MakeLan) -> None:
    lan = make_lan(static_leases={"02:00:00:00:00:05": "192.168.65.3"})
    lan.guest(5).join()
    lan.guest(5).decline("192.168.65.3")
    assert lan.guest(5).join() == "192.168.65.3"


def test_static_leases_do_not_count_against_a_port(make_lan: MakeLan) -> None:
    lan = make_lan(limits=Limits(max_leases_per_port=1), static_leases={"02:00:00:00:00:05": "192.168.65.50"})
    assert lan.guest(1).join() == "192.168.65.3"
    assert lan.guest(2).join() is None
    assert lan.guest(5).join() == "192.168.65.50"


@pytest.mark.parametrize(
    "static",
    [
        {"02:00:00:00:00:05": "192.168.65.1"},
        {"02:00:00:00:00:05": "192.168.65.2"},
        {"02:00:00:00:00:05": "192.168.65.255"},
        {"02:00:00:00:00:05": "192.168.65.9", "02:00:00:00:00:06": "192.168.65.9"},
        {"02:00:00:00:00:05": "192.168.65.9", "02-00-00-00-00-05": "192.168.65.8"},
    ],
)
def test_static_leases_that_contradict_are_refused_at_start(static: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="static_leases"):
        Leases(Network(static_leases=static))


# Bounds (G24).


def test_a_port_holds_so_many_leases_and_no_more(make_lan: MakeLan) -> None:
    lan = make_lan(limits=Limits(max_leases_per_port=3))
    assert [lan.guest(number).join() for number in range(1, 6)] == [
        "192.168.65.3",
        "192.168.65.4",
        "192.168.65.5",
        None,
        None,
    ]
    assert lan.guest(4).reboot("192.168.65.90").kind is Type.NAK
    assert lan.guest(2).renew("192.168.65.4").kind is Type.ACK
    assert lan.guest(9, port="link 2").join() == "192.168.65.6"
    lan.guest(2).release("192.168.65.4")
    assert lan.guest(4).join() == "192.168.65.7"


def test_declined_addresses_count_against_the_port(make_lan: MakeLan) -> None:
    """Else a guest could decline the whole pool."""
    lan = make_lan(limits=Limits(max_leases_per_port=3))
    given = []
    for number in range(1, 10):
        guest = lan.guest(number)
        if (address := guest.join()) is not None:
            given.append(address)
            guest.decline(address)
    assert len(given) == 3
    assert lan.guest(50, port="link 2").join() == "192.168.65.6"
    lan.wait(601)
    assert lan.leases.held("link 1") == 0
    assert lan.guest(1).join() == "192.168.65.3"


def test_starvation_from_one_port_harms_no_one(lan: Any) -> None:
    """G24: 100,000 random clients; those that have leases renew, new ones on other ports join, and it ends soon."""
    mine = lan.guest(1)
    mine.join()
    neighbour = lan.guest(2, port="link 2")
    neighbour.join()
    rng = random.Random(7)
    template = bytearray(dhcp.emit(dhcp.Message(op=1, xid=1, chaddr=bytes(6), options={53: b"\x01", 61: bytes(8)})))
    identifier_at = bytes(template).index(b"\x3d\x08") + 2
    begin = time.process_time()
    for number in range(100_000):
        mac = b"\x06" + rng.randbytes(5)
        template[28:34] = mac
        template[identifier_at : identifier_at + 8] = rng.randbytes(8)
        lan.server.handle(
            bytes(template), source_mac=mac, source=bytes(4), destination=b"\xff" * 4, port="link 1", now=lan.now
        )
        if number % 1000 == 0:
            lan.wait(0.01)
    took = time.process_time() - begin
    assert took < 30  # 7 s on a slow core: no step grows with what came before
    assert lan.leases.held("link 1") == 16
    begin = time.process_time()
    assert mine.renew("192.168.65.3").kind is Type.ACK
    assert time.process_time() - begin < 0.1
    assert neighbour.renew("192.168.65.4").kind is Type.ACK
    assert lan.guest(3, port="link 2").join() is not None
    assert lan.guest(4).join() is not None  # even a new one on the flooded port
    lan.wait(31)
    assert lan.leases.held("link 1") == 2
    assert len(json.dumps(lan.leases.snapshot(now=lan.now, now_wall=0.0))) < 2000


def test_leases_taken_and_released_without_end_stay_bounded(make_lan: MakeLan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netstack.dhcp.table.MAX_IDLE", 10)
    lan = make_lan(subnet="10.0.0.0/8", gateway="10.0.0.1", host_alias="10.0.0.2")
    given = set()
    for number in range(1, 200):
        guest = lan.guest(number, client_id=b"client %d" % number)
        address = guest.join()
        given.add(address)
        guest.release(address)
    assert given == {f"10.0.0.{host}" for host in range(3, 14)}  # forgotten ones are new again
    assert len(lan.leases.snapshot(now=lan.now, now_wall=0.0)["leases"]) == 10
    assert lan.guest(199).join() == address


def test_guest_that_returns_on_another_link_keeps_its_address_and_frees_the_old_link(lan: Any) -> None:
    lan.guest(1).join()
    lan.server.forget_port("link 1")
    assert lan.leases.held("link 1") == 0
    again = lan.guest(1, port="link 2")
    assert again.reboot("192.168.65.3").kind is Type.ACK
    assert lan.leases.held("link 2") == 1
    again.release("192.168.65.3")
    assert lan.leases.held("link 2") == 0


def test_guests_that_move_to_a_full_link_keep_their_leases_beyond_its_share(make_lan: MakeLan) -> None:
    lan = make_lan(limits=Limits(max_leases_per_port=1))
    lan.guest(1).join()
    lan.guest(2, port="link 2").join()
    lan.server.forget_port("link 1")
    moved = lan.guest(1, port="link 2")
    assert moved.renew("192.168.65.3").kind is Type.ACK
    assert lan.leases.held("link 2") == 1
    moved.decline("192.168.65.3")
    assert lan.leases.held("link 2") == 1
    assert moved.join() is None
    assert lan.guest(3, port="link 3").join() == "192.168.65.5"


def test_offers_of_a_link_that_is_gone_are_withdrawn(lan: Any) -> None:
    lan.guest(1).discover()
    lan.server.forget_port("link 1")
    assert lan.guest(2, port="link 2").discover().address == "192.168.65.3"


def test_two_links_with_one_mac_both_learn_the_address(lan: Any) -> None:
    """vpnkit.md section 2.3: the Go vmnet client attaches twice with one UUID."""
    lan.guest(1, port="a").join()
    assert lan.guest(1, port="b").discover().address == "192.168.65.3"
    assert lan.guest(1, port="b").select("192.168.65.3").kind is Type.ACK
    assert (lan.leases.held("a"), lan.leases.held("b")) == (1, 0)


# Reservations (vpnkit.md section 2.4).


def test_vmnet_client_gets_the_same_address_and_mac_whenever_it_comes() -> None:
    leases = Leases(Network())
    first = leases.reserve(UUID.format(1), None, None, 0.0)
    second = leases.reserve(UUID.format(2), None, None, 0.0)
    assert (text(first.address), first.mac.hex(":")) == ("192.168.65.3", "02:50:00:00:00:01")
    assert (text(second.address), second.mac.hex(":")) == ("192.168.65.4", "02:50:00:00:00:02")
    leases.detach(UUID.format(1))
    assert leases.reserve(UUID.format(1).upper(), None, None, 1e9) == first
    assert leases.reserve(UUID.format(1), four("192.168.65.3"), None, 1e9) == first


def test_dhcp_gives_a_vmnet_client_what_the_handshake_promised(lan: Any) -> None:
    lan.guest(1).join()
    reservation = lan.leases.reserve(UUID.format(1), four("192.168.65.250"), None, lan.now)
    guest = lan.guest()
    guest.mac = reservation.mac
    assert guest.discover("192.168.65.9").address == "192.168.65.250"
    assert guest.join() == "192.168.65.250"
    assert lan.guest(2).join("192.168.65.250") == "192.168.65.4"
    guest.release("192.168.65.250")
    assert lan.guest(3).join("192.168.65.250") == "192.168.65.5"
    assert guest.join() == "192.168.65.250"


def test_the_four_reasons_of_a_disconnect_are_vpnkits_own_words(lan: Any) -> None:
    leases = lan.leases
    lan.guest(1).join()
    leases.reserve(UUID.format(1), four("192.168.65.10"), None, lan.now)
    for address in ("192.168.65.1", "192.168.64.9", "8.8.8.8"):
        with pytest.raises(PreferredOutOfRange) as refused:
            leases.reserve(UUID.format(2), four(address), None, lan.now)
        assert str(refused.value) == "Preferred IP address out of range."
    for address in ("192.168.65.10", "192.168.65.3"):
        with pytest.raises(PreferredInUse) as used:
            leases.reserve(UUID.format(2), four(address), None, lan.now)
        assert str(used.value) == f"Preferred IP address {address} already used."
    with pytest.raises(IdentityConflict) as conflict:
        leases.reserve(UUID.format(1), four("192.168.65.11"), None, lan.now)
    assert str(conflict.value) == "UUID already assigned to a different IP than the IP requested by the client"
    tiny = Leases(Network(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2"))
    for number in range(4):
        tiny.reserve(UUID.format(number), None, None, 0.0)
    with pytest.raises(PoolExhausted) as exhausted:
        tiny.reserve(UUID.format(9), None, None, 0.0)
    assert str(exhausted.value) == "No IP addresses available."


def test_a_number_is_spent_even_on_a_refused_client() -> None:
    leases = Leases(Network())
    with pytest.raises(PreferredOutOfRange):
        leases.reserve(UUID.format(1), four("10.0.0.1"), None, 0.0)
    assert leases.reserve(UUID.format(1), None, None, 0.0).mac.hex(":") == "02:50:00:00:00:02"


def test_preferred_address_may_be_one_that_is_only_remembered(lan: Any) -> None:
    lan.guest(1).join()
    lan.guest(1).release("192.168.65.3")
    assert text(lan.leases.reserve(UUID.format(1), four("192.168.65.3"), None, lan.now).address) == "192.168.65.3"
    assert lan.guest(1).join() == "192.168.65.4"


def test_clients_without_uuid_do_not_use_the_pool_up() -> None:
    """HyperKit without `uuid=` invents one at each start: detached reservations go when nothing else is left."""
    leases = Leases(Network(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2"))
    for number in range(4):
        leases.reserve(UUID.format(number), None, None, 0.0)
    for number in (2, 0):
        leases.detach(UUID.format(number))
    assert text(leases.reserve(UUID.format(10), None, None, 0.0).address) == "10.0.0.5"
    assert text(leases.reserve(UUID.format(11), None, None, 0.0).address) == "10.0.0.3"
    with pytest.raises(PoolExhausted):
        leases.reserve(UUID.format(12), None, None, 0.0)
    leases.detach(UUID.format(1))
    leases.reserve(UUID.format(1), None, None, 0.0)
    with pytest.raises(PoolExhausted):
        leases.reserve(UUID.format(12), None, None, 0.0)


def test_detached_client_with_a_lease_keeps_its_reservation() -> None:
    leases = Leases(Network(subnet="10.0.0.0/29", gateway="10.0.0.1", host_alias="10.0.0.2"))
    kept = leases.reserve(UUID.format(0), None, None, 0.0)
    leases.commit(kept.mac, kept.address, port=1, lease_s=60, now=0.0)
    for number in range(1, 4):
        leases.reserve(UUID.format(number), None, None, 0.0)
    leases.detach(UUID.format(0))
    with pytest.raises(PoolExhausted):
        leases.reserve(UUID.format(9), None, None, 59.0)
    assert leases.reserve(UUID.format(9), None, None, 61.0).address == kept.address


def test_client_may_bring_its_mac_and_static_leases_hold_for_it(lan: Any) -> None:
    mac = bytes.fromhex("020000000005")
    leases = Leases(Network(static_leases={"02:00:00:00:00:05": "192.168.65.60"}))
    assert text(leases.reserve(UUID.format(1), None, mac, 0.0).address) == "192.168.65.60"
    with pytest.raises(IdentityConflict):
        leases.reserve(UUID.format(2), four("192.168.65.61"), mac, 0.0)
    lan.guest(5).join()
    assert lan.leases.reserve(UUID.format(1), None, mac, lan.now).address == four("192.168.65.3")
    assert lan.guest(5).renew("192.168.65.3").kind is Type.ACK


# Across a restart.


def test_guests_keep_their_addresses_across_a_restart(make_lan: MakeLan) -> None:
    lan = make_lan(static_leases={"02:00:00:00:00:05": "192.168.65.50"})
    lan.guest(1, hostname=b"one", client_id=b"client one").join("192.168.65.20")
    lan.guest(2).join()
    lan.guest(3).join()
    lan.guest(5).join()
    reservation = lan.leases.reserve(UUID.format(1), None, None, lan.now)
    lan.guest(2).release("192.168.65.3")
    assert lan.leases.dirty
    lan.restart(away_s=3600)
    assert lan.guest(1).renew("192.168.65.20").kind is Type.ACK
    assert lan.leases.named("one", lan.now).client_id == b"client one"
    lease = lan.leases.at(four("192.168.65.4"), lan.now)
    assert lease.expires - lan.now == pytest.approx(86400 - 3600)
    assert lan.guest(9).join() == "192.168.65.6"
    assert lan.guest(2).join() == "192.168.65.3"
    assert lan.leases.reserve(UUID.format(1), None, None, lan.now) == reservation
    assert lan.leases.reserve(UUID.format(2), None, None, lan.now).mac.hex(":") == "02:50:00:00:00:02"


def test_lease_that_ended_while_the_daemon_was_away_is_remembered(lan: Any) -> None:
    lan.guest(1).join()
    lan.restart(away_s=100_000)
    assert lan.leases.at(four("192.168.65.3"), lan.now) is None
    assert lan.guest(2).join() == "192.168.65.4"
    assert lan.guest(1).join() == "192.168.65.3"


def test_wall_clock_that_was_set_back_makes_no_lease_longer(lan: Any) -> None:
    lan.guest(1).join()
    lan.restart(wall_jump_s=-1e9)
    assert lan.leases.at(four("192.168.65.3"), lan.now).expires == lan.now + 86400


def test_what_new_settings_forbid_is_left_out_at_a_restart(lan: Any) -> None:
    for number in range(1, 6):
        lan.guest(number).join()
    lan.leases.reserve(UUID.format(1), four("192.168.65.100"), None, lan.now)
    lan.leases.reserve(UUID.format(2), four("192.168.65.101"), None, lan.now)
    lan.restart(
        network=Network(
            host_alias="192.168.65.4",
            pool_first="192.168.65.3",
            pool_last="192.168.65.100",
            static_leases={"02:00:00:00:00:03": "192.168.65.30", "02:00:00:00:00:77": "192.168.65.6"},
        )
    )
    kept = {text(lease.address): lease.mac[-1] for lease in lan.leases.active(lan.now)}
    assert kept == {"192.168.65.3": 1, "192.168.65.7": 5}
    assert lan.guest(4).renew("192.168.65.6").kind is Type.NAK
    assert lan.guest(3).join() == "192.168.65.30"
    assert text(lan.leases.reserve(UUID.format(1), None, None, lan.now).address) == "192.168.65.100"
    assert text(lan.leases.reserve(UUID.format(2), None, None, lan.now).address) == "192.168.65.5"


def _broken(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def apply(document: dict[str, Any]) -> Any:
        result = change(document)
        return document if result is None else result

    return apply


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: [], id="no object"),
        pytest.param(lambda d: d.pop("format") and d, id="foreign"),
        pytest.param(lambda d: d | {"version": 2}, id="of the future"),
        pytest.param(lambda d: d.pop("leases") and d, id="without leases"),
        pytest.param(lambda d: d | {"leases": {}}, id="leases are no list"),
        pytest.param(lambda d: d | {"leases": [7]}, id="a lease is no object"),
        pytest.param(lambda d: d | {"counter": -1}, id="negative counter"),
        pytest.param(lambda d: d | {"counter": True}, id="counter is a truth value"),
        pytest.param(lambda d: d | {"reservations": [{"identity": ""}]}, id="nameless reservation"),
        *(
            pytest.param(lambda d, key=key, value=value: d["leases"][0].update({key: value}), id=f"{key}={value!r}")
            for key, value in [
                ("address", "192.168.65"),
                ("address", 7),
                ("mac", "02:00"),
                ("mac", "zz:00:00:00:00:00"),
                ("expires", float("nan")),
                ("expires", float("inf")),
                ("expires", "soon"),
                ("expires", 10**400),
                ("active", 1),
                ("hostname", "a\x1b[31m"),
                ("hostname", None),
                ("client_id", "0"),
                ("client_id", "00" * 256),
            ]
        ),
    ],
)
def test_document_that_is_not_ours_changes_nothing(lan: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    lan.guest(1, hostname=b"one", client_id=b"client").join()
    document = json.loads(json.dumps(lan.leases.snapshot(now=lan.now, now_wall=0.0)))
    broken = _broken(change)(document)
    leases = Leases(Network())
    with pytest.raises(Malformed):
        leases.restore(broken, now=0.0, now_wall=0.0)
    assert not list(leases.active(0.0)) and not leases.dirty


# The whole engine against a model: what the guests believe.


class Guests(RuleBasedStateMachine):
    """Guests believe what an ACK says until its time is over or they give it back; two must never believe one address."""

    MACS = tuple(
        bytes((2, second, 0, 0, 0, number)) for second, count in ((0, 7), (0x50, 3)) for number in range(1, count)
    )
    hosts = st.integers(0, 15).map(lambda host: bytes((10, 0, 0, host)))
    macs = st.sampled_from(MACS)
    ports = st.sampled_from(("a", "b"))
    identifiers = st.sampled_from((b"", b"c1", b"c2"))

    @initialize(limit=st.integers(1, 8), static=st.booleans())
    def begin(self, limit: int, static: bool) -> None:
        self.network = Network(
            subnet="10.0.0.0/28",
            gateway="10.0.0.1",
            host_alias="10.0.0.2",
            pool_last="10.0.0.6",
            lease_s=600,
            limits=Limits(max_leases_per_port=limit),
            static_leases={"02:00:00:00:00:01": "10.0.0.5"} if static else {},
        )
        self.limit = limit
        self.now = 0.0
        self.believed: dict[bytes, tuple[bytes, float]] = {}
        self.set_aside: dict[bytes, float] = {}
        self.xids = itertools.count()
        self.serve(Leases(self.network))

    def serve(self, leases: Leases) -> None:
        self.leases = leases
        self.server = Server(self.network, leases, counters=Counters())

    def send(self, mac: bytes, port: str, kind: Type, options: dict[int, bytes], ciaddr: bytes = bytes(4)) -> Any:
        message = dhcp.Message(
            op=1, xid=next(self.xids), chaddr=mac, ciaddr=ciaddr, options={53: bytes((kind,)), **options}
        )
        reply = self.server.handle(
            dhcp.emit(message), source_mac=mac, source=ciaddr, destination=b"\xff" * 4, port=port, now=self.now
        )
        return None if reply is None else dhcp.parse(reply.payload)

    def take(self, mac: bytes, answer: Any) -> None:
        if answer is not None and answer.options[53][0] == Type.ACK:
            address = answer.yiaddr
            assert self.set_aside.get(address, 0.0) <= self.now or self.leases.reserved(mac) == address
            self.believed[mac] = (address, self.now + int.from_bytes(answer.options[51], "big"))
        elif answer is not None:
            self.believed.pop(mac, None)

    @rule(mac=macs, port=ports, identifier=identifiers, want=st.none() | hosts, lease_s=st.sampled_from((120, 600)))
    def joins(self, mac: bytes, port: str, identifier: bytes, want: bytes | None, lease_s: int) -> None:
        options = {Option.LEASE_TIME: lease_s.to_bytes(4, "big")} | (
            {Option.CLIENT_ID: identifier} if identifier else {}
        )
        offer = self.send(mac, port, Type.DISCOVER, options | ({Option.REQUESTED_ADDRESS: want} if want else {}))
        if offer is not None:
            choice = {Option.SERVER_ID: self.network.gateway_bytes, Option.REQUESTED_ADDRESS: offer.yiaddr}
            answer = self.send(mac, port, Type.REQUEST, options | choice)
            assert answer.options[53][0] == Type.ACK and answer.yiaddr == offer.yiaddr
            self.take(mac, answer)

    @rule(mac=macs, port=ports, identifier=identifiers)
    def only_asks(self, mac: bytes, port: str, identifier: bytes) -> None:
        self.send(mac, port, Type.DISCOVER, {Option.CLIENT_ID: identifier} if identifier else {})

    @rule(mac=macs, port=ports, address=hosts)
    def reboots(self, mac: bytes, port: str, address: bytes) -> None:
        self.take(mac, self.send(mac, port, Type.REQUEST, {Option.REQUESTED_ADDRESS: address}))

    @rule(mac=macs, port=ports)
    def renews(self, mac: bytes, port: str) -> None:
        if mac in self.believed:
            address = self.believed[mac][0]
            answer = self.send(mac, port, Type.REQUEST, {}, ciaddr=address)
            assert answer.options[53][0] == Type.ACK, "an active lease was taken away"
            self.take(mac, answer)

    @rule(mac=macs, port=ports, decline=st.booleans())
    def gives_back(self, mac: bytes, port: str, decline: bool) -> None:
        if mac not in self.believed:
            return
        address = self.believed[mac][0]
        options = {Option.SERVER_ID: self.network.gateway_bytes}
        if decline:
            self.send(mac, port, Type.DECLINE, options | {Option.REQUESTED_ADDRESS: address})
        else:
            self.send(mac, port, Type.RELEASE, options, ciaddr=address)
        if self.leases.at(address, self.now) is None:
            del self.believed[mac]
            if decline:
                self.set_aside[address] = self.now + 600

    @rule(number=st.integers(1, 5), preferred=st.none() | hosts, detach=st.booleans())
    def vmnet_client_comes(self, number: int, preferred: bytes | None, detach: bool) -> None:
        identity = UUID.format(number)
        try:
            reservation = self.leases.reserve(identity, preferred, None, self.now)
        except (PoolExhausted, PreferredInUse, PreferredOutOfRange, IdentityConflict):
            return
        assert preferred in (None, reservation.address)
        assert self.leases.reserved(reservation.mac) == reservation.address
        assert all(
            mac == reservation.mac for mac, (address, _) in self.believed.items() if address == reservation.address
        )
        if self.believed.get(reservation.mac, (reservation.address, 0))[0] != reservation.address:
            del self.believed[reservation.mac]  # the machine that had it starts anew, with what the handshake says
        if detach:
            self.leases.detach(identity)

    @rule(port=ports)
    def link_is_lost(self, port: str) -> None:
        self.server.forget_port(port)

    @rule(seconds=st.sampled_from((1.0, 31.0, 121.0, 601.0)), timer=st.booleans())
    def time_passes(self, seconds: float, timer: bool) -> None:
        self.now += seconds
        self.believed = {mac: held for mac, held in self.believed.items() if held[1] > self.now}
        if timer:
            self.server.timeout(self.now)
            deadline = self.server.deadline()
            assert deadline is None or deadline > self.now

    @rule(away_s=st.sampled_from((0.0, 130.0)))
    def daemon_is_restarted(self, away_s: float) -> None:
        document = json.loads(json.dumps(self.leases.snapshot(now=self.now, now_wall=1.7e9)))
        self.now += away_s
        self.believed = {mac: held for mac, held in self.believed.items() if held[1] > self.now}
        self.set_aside.clear()
        leases = Leases(self.network)
        leases.restore(document, now=self.now, now_wall=1.7e9 + away_s)
        self.serve(leases)

    @invariant()
    def no_address_is_leased_to_two(self) -> None:
        addresses = [address for address, _until in self.believed.values()]
        assert len(addresses) == len(set(addresses))
        own = {bytes((10, 0, 0, host)) for host in (0, 1, 2, 15)}
        assert not own & set(addresses)

    @invariant()
    def the_table_agrees_and_the_bounds_hold(self) -> None:
        table = {lease.mac: lease.address for lease in self.leases.active(self.now)}
        assert {mac: address for mac, (address, _until) in self.believed.items()}.items() <= table.items()
        assert len(set(table.values())) == len(table)
        assert all(self.leases.held(port) <= self.limit for port in ("a", "b"))


TestGuests = Guests.TestCase
TestGuests.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
