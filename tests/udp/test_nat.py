"""UDP mappings in virtual time: who stays, who goes first, and what it costs (conformance U05, U06; threats G21)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netstack.udp.nat import Entry, Table


def table(limit: int = 1024) -> Table[str]:
    return Table(limit=limit, idle_s=90.0, short_s=5.0)


def opened(nat: Table[str], number: int, now: float, *, port: int = 3478, group: bytes = b"guest") -> Entry[str]:
    entry = nat.open(number.to_bytes(4, "big"), group, f"owner {number}", now)
    nat.spoke(entry, port)
    return entry


def test_a_mapping_ends_when_both_directions_were_silent_for_the_idle_time() -> None:  # U05
    nat = table()
    entry = opened(nat, 1, 100.0)
    entry.sent = 150.0
    assert nat.expire(239.9) == []
    entry.heard = 239.9
    assert nat.expire(240.1) == []
    assert nat.expire(329.8) == []
    assert nat.expire(329.9) == [entry]
    assert len(nat) == 0 and nat.get(entry.key) is None
    assert nat.expired == 1


def test_a_dns_or_ntp_exchange_ends_five_seconds_after_the_answer() -> None:  # U06
    for port in (53, 123):
        nat = table()
        entry = opened(nat, 1, 100.0, port=port)
        entry.heard = 104.5
        deadline = nat.deadline()
        assert deadline is not None and deadline <= 109.5
        assert nat.expire(109.4) == []
        deadline = nat.deadline()
        assert deadline is not None and deadline <= 109.5
        assert nat.expire(109.5) == [entry]


def test_a_dns_question_without_an_answer_is_waited_for_as_long_as_any_other() -> None:  # U06
    nat = table()
    entry = opened(nat, 1, 0.0, port=53)
    for now in range(1, 90):
        assert nat.expire(float(now)) == []
    assert nat.expire(90.0) == [entry]


def test_a_second_question_on_the_same_mapping_is_waited_for_again() -> None:  # U06
    nat = table()
    entry = opened(nat, 1, 0.0, port=53)
    entry.heard, entry.sent = 1.0, 2.0
    assert nat.expire(80.0) == []
    entry.heard = 81.0
    assert nat.expire(86.0) == [entry]


def test_a_mapping_that_also_speaks_to_another_port_keeps_the_long_idle_time() -> None:  # U06
    nat = table()
    entry = opened(nat, 1, 0.0, port=53)
    nat.spoke(entry, 443)
    entry.heard = 1.0
    assert nat.expire(90.0) == []
    assert nat.expire(91.0) == [entry]


def test_a_full_guest_loses_those_idle_longest_and_nobody_elses() -> None:  # U05, G21
    nat = table(limit=64)
    others = [opened(nat, 1000 + number, 0.0, group=b"other") for number in range(64)]
    mine = [opened(nat, number, float(number)) for number in range(64)]
    mine[0].heard = 500.0
    mine[1].sent = 500.0
    gone = nat.make_room(b"guest")
    assert gone == mine[2:6]
    assert all(entry.closed for entry in gone)
    assert nat.evicted == 4
    assert all(not entry.closed for entry in [*others, *mine[:2], *mine[6:]])
    assert nat.make_room(b"guest") == []


def test_a_scan_of_all_ports_never_holds_more_than_the_limit() -> None:  # G21
    nat = table(limit=1024)
    evicted = 0
    for number in range(60_000):
        evicted += len(nat.make_room(b"guest"))
        opened(nat, number, number / 1000)
    assert len(nat) <= 1024
    assert evicted == 60_000 - len(nat)
    assert len(nat._heap) <= 2 * 1024 + 65, "positions of closed entries are dropped"


def test_the_deadline_is_never_later_than_the_first_end_and_none_when_empty() -> None:
    nat = table()
    assert nat.deadline() is None
    entry = opened(nat, 1, 10.0)
    assert nat.expire(15.0) == []  # it might have been a DNS question
    assert nat.deadline() == 100.0
    entry.sent = 50.0
    assert nat.deadline() == 100.0  # no work per datagram: looked at then, and put off
    assert nat.expire(100.0) == []
    assert nat.deadline() == 140.0
    nat.close(entry)
    nat.close(entry)
    assert nat.deadline() is None


def test_when_a_laptop_sleeps_everything_is_over_at_once() -> None:  # F8
    nat = table()
    entries = [opened(nat, number, float(number)) for number in range(50)]
    assert sorted(entry.key for entry in nat.expire(8 * 3600.0)) == [entry.key for entry in entries]
    assert nat.deadline() is None


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["open", "sent", "heard", "wait", "close"])), max_size=60))
def test_no_mapping_outlives_its_idle_time_and_none_ends_before(steps: list[tuple[int, str]]) -> None:
    nat = table(limit=100)
    now = 0.0
    for number, step in steps:
        now += number
        key = number.to_bytes(4, "big")
        entry = nat.get(key)
        if step == "open" and entry is None:
            opened(nat, number, now, port=53 if number % 2 else 9)
        elif entry is not None and step == "sent":
            entry.sent = now
        elif entry is not None and step == "heard":
            entry.heard = now
        elif entry is not None and step == "close":
            nat.close(entry)
        elif step == "wait":
            now += 11 * number
        for over in nat.expire(now):
            assert over.expires() <= now
        assert all(item.expires() > now for item in nat)
        deadline = nat.deadline()
        assert (deadline is None) == (len(nat) == 0)
