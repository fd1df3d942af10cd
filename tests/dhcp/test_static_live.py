"""Static leases that come and go while the network runs, and what the lease table shows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from netstack.dhcp.leases import Leases, PreferredInUse
from netstack.dhcp.statics import MAX_STATICS, LeaseRecord
from netstack.dhcp.store import Store
from netstack.errors import ConfigError
from netstack.settings import Network, parse_ipv4
from netstack.wire.dhcp import Type

MakeLan = Callable[..., Any]
UUID = "d1d9cd61-d0dc-4715-9bc3-4c11dad7ad01"


def four(address: str) -> bytes:
    return parse_ipv4(address)


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 0, number))


def table(lan: Any) -> dict[str, LeaseRecord]:
    return {record.address: record for record in lan.leases.records(lan.now, lambda address, mac, port: None)}


# What guests see.


def test_a_new_guest_gets_the_address_kept_for_it(lan: Any) -> None:
    lan.leases.add_static(lan.guest(1).mac, four("192.168.65.77"))
    assert lan.guest(1).join() == "192.168.65.77"
    assert lan.guest(2).join("192.168.65.77") == "192.168.65.3"


def test_an_address_outside_of_the_pool_may_be_kept(make_lan: MakeLan) -> None:
    lan = make_lan(pool_first="192.168.65.100", pool_last="192.168.65.110")
    lan.leases.add_static(lan.guest(1).mac, four("192.168.65.10"))
    assert lan.guest(1).join() == "192.168.65.10"


def test_a_guest_with_another_address_is_moved_when_it_renews(lan: Any) -> None:
    guest = lan.guest(1)
    assert guest.join() == "192.168.65.3"
    lan.leases.add_static(guest.mac, four("192.168.65.77"))
    assert lan.leases.at(four("192.168.65.3"), lan.now) is None
    assert guest.renew("192.168.65.3").kind is Type.NAK
    assert guest.join() == "192.168.65.77"
    assert lan.guest(2).join() == "192.168.65.3", "the old one is free again"


def test_an_address_that_was_offered_to_another_goes_to_whom_it_is_given(lan: Any) -> None:
    assert lan.guest(1).discover().address == "192.168.65.3"
    lan.leases.add_static(lan.guest(2).mac, four("192.168.65.3"))
    assert lan.guest(2).join() == "192.168.65.3"
    assert lan.guest(1).join() == "192.168.65.4"


def test_an_address_that_was_set_aside_or_left_by_another_can_be_kept(lan: Any) -> None:
    first, second = lan.guest(1), lan.guest(2)
    first.join()
    first.decline("192.168.65.3")
    lan.leases.add_static(lan.guest(9).mac, four("192.168.65.3"))
    assert lan.guest(9).join() == "192.168.65.3"
    address = second.join()
    second.release(address)
    lan.leases.add_static(lan.guest(8).mac, four(address))
    assert lan.guest(8).join() == address


def test_after_it_is_taken_back_the_lease_goes_on_as_any_other(lan: Any) -> None:
    guest = lan.guest(1)
    lan.leases.add_static(guest.mac, four("192.168.65.77"))
    guest.join()
    assert lan.leases.held(guest.port) == 0
    assert lan.leases.remove_static(guest.mac)
    assert lan.leases.held(guest.port) == 1, "it counts against the guest's link now"
    assert not table(lan)["192.168.65.77"].static
    assert lan.leases.at(four("192.168.65.77"), lan.now) is not None
    assert lan.guest(2).join("192.168.65.77") == "192.168.65.3", "it is still the first guest's"
    guest.release("192.168.65.77")
    assert lan.guest(3).join() == "192.168.65.4"
    assert not lan.leases.remove_static(guest.mac), "there is none any more"


def test_after_it_is_taken_back_an_address_outside_of_the_pool_is_lost_at_the_renewal(make_lan: MakeLan) -> None:
    lan = make_lan(pool_first="192.168.65.100", pool_last="192.168.65.110")
    guest = lan.guest(1)
    lan.leases.add_static(guest.mac, four("192.168.65.10"))
    guest.join()
    assert lan.leases.remove_static(guest.mac)
    assert lan.leases.at(four("192.168.65.10"), lan.now) is None
    assert guest.renew("192.168.65.10").kind is Type.NAK
    assert guest.join("192.168.65.10") == "192.168.65.100"


def test_one_that_was_never_used_leaves_nothing(lan: Any) -> None:
    lan.leases.add_static(mac(99), four("192.168.65.3"))
    assert lan.guest(1).join() == "192.168.65.4"
    assert lan.leases.remove_static(mac(99))
    assert lan.guest(2).join() == "192.168.65.3"
    assert not lan.leases.remove_static(mac(99))


# What is refused.


@pytest.mark.parametrize(
    ("address", "words"),
    [
        pytest.param("10.0.0.1", "not in 192.168.65.0/24", id="another network"),
        pytest.param("192.168.65.1", "the network's own", id="the gateway"),
        pytest.param("192.168.65.2", "the network's own", id="the host alias"),
        pytest.param("192.168.65.0", "the network's own", id="the network"),
        pytest.param("192.168.65.255", "the network's own", id="the broadcast address"),
        pytest.param(
            "192.168.65.50", "02:00:00:00:00:32 has the address by a static lease", id="another's static lease"
        ),
        pytest.param("192.168.65.3", "leased to {holder} (builder); choose another, or wait", id="another's lease"),
    ],
)
def test_an_address_that_cannot_be_the_guests_is_refused_with_the_reason(lan: Any, address: str, words: str) -> None:
    holder = lan.guest(1, hostname=b"builder")
    assert holder.join() == "192.168.65.3"
    lan.leases.add_static(mac(50), four("192.168.65.50"))
    before = lan.leases.snapshot(now=lan.now, now_wall=0.0)
    with pytest.raises(ConfigError) as caught:
        lan.leases.add_static(mac(9), four(address))
    assert words.format(holder=holder.mac.hex(":")) in str(caught.value)
    assert lan.leases.snapshot(now=lan.now, now_wall=0.0) == before


@pytest.mark.parametrize(
    "bad", [bytes(6), b"\xff" * 6, bytes.fromhex("01005e000001")], ids=["zero", "broadcast", "multicast"]
)
def test_a_mac_that_no_guest_has_is_refused(lan: Any, bad: bytes) -> None:
    with pytest.raises(ConfigError, match="no guest has that MAC"):
        lan.leases.add_static(bad, four("192.168.65.50"))


def test_one_mac_has_one_address(lan: Any) -> None:
    lan.leases.add_static(mac(9), four("192.168.65.50"))
    lan.leases.add_static(mac(9), four("192.168.65.50"))
    with pytest.raises(ConfigError, match=r"the MAC has 192\.168\.65\.50 by a static lease; remove that first"):
        lan.leases.add_static(mac(9), four("192.168.65.51"))


def test_those_of_the_settings_are_not_taken_back(make_lan: MakeLan) -> None:
    lan = make_lan(static_leases={"02:00:00:00:00:09": "192.168.65.50"})
    lan.leases.add_static(mac(9), four("192.168.65.50"))
    with pytest.raises(ConfigError, match=r"in the settings \(static_leases\); remove it there"):
        lan.leases.remove_static(mac(9))


def test_there_is_a_limit(make_lan: MakeLan) -> None:
    lan = make_lan(subnet="10.0.0.0/16", gateway="10.0.0.1", host_alias="10.0.0.2")
    for number in range(MAX_STATICS):
        lan.leases.add_static(b"\2\0\0\0" + number.to_bytes(2, "big"), (0x0A000100 + number).to_bytes(4, "big"))
    with pytest.raises(ConfigError, match=f"there are {MAX_STATICS} already"):
        lan.leases.add_static(b"\2\0\0\1\0\0", four("10.0.200.1"))


def test_vmnet_clients_keep_what_their_uuid_has(lan: Any) -> None:
    reserved = lan.leases.reserve(UUID, None, None, lan.now)
    with pytest.raises(ConfigError, match=r"02:50:00:00:00:01 has the address by its UUID"):
        lan.leases.add_static(mac(9), reserved.address)
    with pytest.raises(ConfigError, match=r"the MAC has 192\.168\.65\.3 by its UUID"):
        lan.leases.add_static(reserved.mac, four("192.168.65.50"))
    lan.leases.add_static(reserved.mac, reserved.address)
    assert lan.leases.remove_static(reserved.mac)
    assert lan.leases.reserved(reserved.mac) == reserved.address, "still by its UUID"
    lan.leases.add_static(mac(9), four("192.168.65.50"))
    with pytest.raises(PreferredInUse):
        lan.leases.reserve(UUID[:-1] + "2", four("192.168.65.50"), None, lan.now)


# What is shown.


def test_the_table_shows_leases_and_kept_addresses(lan: Any) -> None:
    lan.guest(1, hostname=b"builder").join()
    lan.leases.add_static(mac(9), four("192.168.65.50"))
    lan.wait(100)
    records = lan.leases.records(lan.now, lambda address, mac, port: port)
    assert [(r.address, r.mac, r.hostname, r.static, r.link) for r in records] == [
        ("192.168.65.3", lan.guest(1).mac.hex(":"), "builder", False, "link 1"),
        ("192.168.65.50", "02:00:00:00:00:09", "", True, None),
    ]
    assert records[0].expires_in_s == 86400 - 100 and records[1].expires_in_s is None
    lan.wait(86400)
    assert list(table(lan)) == ["192.168.65.50"]


# Across a restart.


def test_what_was_given_is_saved_and_told(tmp_path: Path) -> None:
    network = Network(static_leases={"02:00:00:00:00:07": "192.168.65.7"})
    leases = Leases(network)
    told: list[int] = []
    leases.on_static = lambda: told.append(1)
    leases.add_static(mac(9), four("192.168.65.50"))
    leases.add_static(mac(9), four("192.168.65.50"))
    leases.add_static(mac(7), four("192.168.65.7"))
    assert leases.dirty and len(told) == 1, "what is kept already changes nothing"
    store = Store(tmp_path / "leases.json")
    assert store.save(leases, now=10.0, now_wall=1e9)
    assert json.loads((tmp_path / "leases.json").read_text())["statics"] == [
        {"address": "192.168.65.50", "mac": "02:00:00:00:00:09"}
    ], "those of the settings are the settings'"
    fresh = Leases(Network())
    assert store.load(fresh, now=0.0, now_wall=1e9)
    assert fresh.reserved(mac(9)) == four("192.168.65.50")
    fresh.on_static = lambda: told.append(2)
    assert fresh.remove_static(mac(9)) and fresh.dirty and told == [1, 2]
    assert store.save(fresh, now=0.0, now_wall=1e9)
    third = Leases(Network())
    assert store.load(third, now=0.0, now_wall=1e9)
    assert third.reserved(mac(9)) is None


def test_a_file_from_before_there_were_any_is_read() -> None:
    document = Leases(Network()).snapshot(now=0.0, now_wall=0.0)
    del document["statics"]
    Leases(Network()).restore(document, now=0.0, now_wall=0.0)


def test_what_the_settings_no_longer_allow_is_left_out() -> None:
    leases = Leases(Network())
    for number, address in enumerate(
        ("192.168.65.50", "192.168.65.51", "192.168.65.52", "192.168.65.53", "192.168.65.54")
    ):
        leases.add_static(mac(number), four(address))
    network = Network(
        host_alias="192.168.65.50",
        static_leases={"02:00:00:00:00:01": "192.168.65.99", "02:00:00:00:00:aa": "192.168.65.52"},
    )
    fresh = Leases(network)
    fresh.restore(leases.snapshot(now=0.0, now_wall=0.0), now=0.0, now_wall=0.0)
    kept = {number: fresh.reserved(mac(number)) for number in range(5)}
    expected = {0: None, 1: four("192.168.65.99"), 2: None, 3: four("192.168.65.53"), 4: four("192.168.65.54")}
    assert kept == expected
    moved = Leases(Network(subnet="10.0.0.0/24", gateway="10.0.0.1", host_alias="10.0.0.2"))
    moved.restore(leases.snapshot(now=0.0, now_wall=0.0), now=0.0, now_wall=0.0)
    assert all(moved.reserved(mac(number)) is None for number in range(5))


# Whatever happens.


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("add", "remove", "allot", "commit", "release", "time")),
            st.integers(1, 5),
            st.integers(1, 12),
        ),
        max_size=60,
    )
)
def test_an_address_is_never_two_guests(steps: list[tuple[str, int, int]]) -> None:
    leases = Leases(Network(subnet="10.0.0.0/28", gateway="10.0.0.1", host_alias="10.0.0.2", pool_last="10.0.0.9"))
    now = 0.0
    static: dict[bytes, bytes] = {}
    for what, who, where in steps:
        owner, address = mac(who), bytes((10, 0, 0, where + 1))
        match what:
            case "add":
                try:
                    leases.add_static(owner, address)
                except ConfigError:
                    continue
                static[owner] = address
            case "remove":
                assert leases.remove_static(owner) == (owner in static)
                static.pop(owner, None)
            case "allot":
                leases.allot(owner, client_id=b"", requested=address, port=who, lease_s=50, now=now)
            case "commit":
                lease = leases.commit(owner, address, port=who, lease_s=50, now=now)
                assert lease is None or (lease.address, lease.mac) == (address, owner)
            case "release":
                leases.release(owner, address, port=who, now=now)
            case _:
                now += 10 * where
                leases.expire(now)
        active = list(leases.active(now))
        for one, other in itertools.combinations(active, 2):
            assert one.address != other.address and one.mac != other.mac
        for kept, at in static.items():
            assert leases.reserved(kept) == at
            assert all(lease.mac == kept for lease in active if lease.address == at)
            assert all(lease.address == at for lease in active if lease.mac == kept)
        again = Leases(Network(subnet="10.0.0.0/28", gateway="10.0.0.1", host_alias="10.0.0.2", pool_last="10.0.0.9"))
        again.restore(leases.snapshot(now=now, now_wall=now), now=now, now_wall=now)
        assert {kept: again.reserved(kept) for kept in static} == static
