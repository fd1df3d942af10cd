"""Which servers are asked, and whose answer counts: rules, zones, order, several at once, offline (Q03, F12; spec vpnkit 4.4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import pytest

from dns import codec
from dns.codec import wire_name
from dns.rules import Rules
from dns.server import Server
from dns.servers import Resolvers, Upstream
from dns.servers import Server as Known
from netstack.errors import ConfigError
from tests.dns.support import GUEST, a_reply, ask, ask_now, code_reply, parse, query, upstream
from tests.dns.support import Upstream as Scripted


def known(at: Scripted, *zones: str, order: int = 0, timeout_s: float = 5.0) -> Known:
    return Known(Upstream.parse(at.spec), tuple(map(wire_name, zones)), order, timeout_s)


class Host:
    """Resolvers that a test may replace, and the server that follows them."""

    def __init__(
        self,
        *servers: Known,
        rules: Mapping[str, str | Sequence[str]] | None = None,
        offline_after: int = 5,
    ) -> None:
        self.resolvers = Resolvers(servers=servers, offline_after=offline_after)
        self.dns = Server(hosts_path=None, source=lambda: self.resolvers, rules=Rules.parse(rules or {}))

    async def __aenter__(self) -> Host:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.dns.close()

    def become(self, *servers: Known) -> None:
        self.resolvers = Resolvers(servers=servers)

    async def lookup(self, name: str, qtype: str = "A") -> list[str] | int:
        """Addresses, or the response code when there are none."""
        answer = parse(await ask(self.dns, query(name, qtype)))
        return [str(rr.rdata) for rr in answer.rr] or int(answer.header.rcode)


def one(address: str) -> AbstractAsyncContextManager[Scripted]:
    return upstream(lambda asked: [a_reply(asked, address)])


def coded(code: int) -> AbstractAsyncContextManager[Scripted]:
    return upstream(lambda asked: [code_reply(asked, code)])


def mute() -> AbstractAsyncContextManager[Scripted]:
    return upstream(lambda asked: [])


def names(asked: Sequence[bytes]) -> set[str]:
    return {str(parse(message).q.qname) for message in asked}


# Zones


async def test_names_of_a_zone_go_to_its_server_and_no_others_do() -> None:  # vpnkit dns_forward/zone
    async with one("10.0.0.1") as vpn, one("192.0.2.1") as home, Host(known(vpn, "corp.example"), known(home)) as host:
        assert await host.lookup("a.corp.example") == ["10.0.0.1"]
        assert await host.lookup("CORP.Example") == ["10.0.0.1"]
        assert await host.lookup("xcorp.example") == ["192.0.2.1"], "compared by labels"
        assert await host.lookup("corp.example.org") == ["192.0.2.1"]
        assert names(vpn.asked) == {"a.corp.example.", "CORP.Example."}
        assert names(home.asked) == {"xcorp.example.", "corp.example.org."}


@pytest.mark.parametrize("failure", [codec.SERVFAIL, codec.REFUSED, codec.NXDOMAIN, codec.NOERROR])
async def test_names_of_a_zone_go_nowhere_else_when_its_server_fails(failure: int) -> None:
    async with (
        coded(failure) as vpn,
        one("192.0.2.1") as home,
        Host(known(vpn, "corp.example"), known(home), known(home, order=7)) as host,
    ):
        assert await host.lookup("a.corp.example") == failure
        assert home.asked == []


async def test_the_longest_zone_decides() -> None:
    async with (
        one("10.0.0.1") as corp,
        one("10.0.0.2") as lab,
        one("10.0.0.3") as world,
        Host(known(corp, "example", "corp.example"), known(lab, "lab.corp.example"), known(world, ".")) as host,
    ):
        assert await host.lookup("a.lab.corp.example") == ["10.0.0.2"]
        assert await host.lookup("b.corp.example") == ["10.0.0.1"]
        assert await host.lookup("c.example") == ["10.0.0.1"]
        assert await host.lookup("d.org") == ["10.0.0.3"]


async def test_without_a_server_for_other_names_they_fail_at_once() -> None:
    async with one("10.0.0.1") as vpn, Host(known(vpn, "corp.example")) as host:
        (answer,) = ask_now(host.dns, query("a.org"))
        assert parse(answer).header.rcode == codec.SERVFAIL
        assert host.dns.counters["no_resolver"] == 1
        assert vpn.asked == []


# Rules


async def test_rules_come_before_zones_and_other_servers() -> None:
    async with one("10.0.0.1") as rule, one("10.0.0.2") as vpn, one("10.0.0.3") as home:
        rules = {"corp.example": [rule.spec], "*.ads.example": "refuse", "deep.ads.example": rule.spec}
        async with Host(known(vpn, "a.corp.example"), known(home), rules=rules) as host:
            assert await host.lookup("a.corp.example") == ["10.0.0.1"]
            assert await host.lookup("tracker.ads.example") == codec.REFUSED
            assert await host.lookup("ads.example") == codec.REFUSED
            assert await host.lookup("x.deep.ads.example") == ["10.0.0.1"], "the longest domain decides"
            assert await host.lookup("example") == ["10.0.0.3"]
            assert vpn.asked == [] and len(home.asked) == 1
            assert host.dns.counters["refused"] == 2


async def test_servers_of_a_rule_are_asked_in_turn() -> None:
    async with coded(codec.SERVFAIL) as first, one("10.0.0.2") as second, one("10.0.0.3") as home:
        async with Host(known(home), rules={"corp.example": [first.spec, second.spec]}) as host:
            assert await host.lookup("a.corp.example") == ["10.0.0.2"]
            assert home.asked == []


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"corp.example": ["ns.corp.example"]}, "corp.example.*192.0.2.53"),
        ({"corp.example": []}, "no server"),
        ({"a..b": ["10.0.0.1"]}, "no domain"),
        ({"a.example": "refuse", "A.example.": "refuse"}, "twice"),
        ({f"d{n}.example": "refuse" for n in range(1025)}, "more than 1024"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_in_words(rules: Mapping[str, Sequence[str] | str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rules.parse(rules)


# Order, and several servers at once


async def test_a_lower_order_is_chosen_and_the_next_not_asked() -> None:  # vpnkit dns_forward/order
    async with one("10.0.0.1") as first, one("10.0.0.2") as second:
        async with Host(known(second, order=1), known(first)) as host:
            assert await host.lookup("a.example") == ["10.0.0.1"]
            assert second.asked == []


async def test_servers_of_one_order_are_asked_together_and_the_first_good_answer_wins() -> None:
    async with mute() as slow, one("10.0.0.2") as quick, Host(known(slow), known(quick)) as host:
        began = time.monotonic()
        assert await host.lookup("a.example") == ["10.0.0.2"]
        assert time.monotonic() - began < 0.9
        await slow.arrivals.get()


@pytest.mark.parametrize("early", [codec.NXDOMAIN, codec.NOERROR, codec.SERVFAIL, codec.REFUSED, codec.FORMERR])
async def test_a_worse_answer_does_not_beat_a_slower_good_one(early: int) -> None:  # vpnkit dns_forward/tolerate bad
    async with coded(early) as bad, mute() as slow, Host(known(bad), known(slow)) as host:
        answer = asyncio.ensure_future(host.lookup("a.example"))
        message, peer = await slow.arrivals.get()
        await asyncio.sleep(0.1)
        assert slow.transport is not None
        slow.transport.sendto(a_reply(message, "10.0.0.2"), peer)
        assert await answer == ["10.0.0.2"]


@pytest.mark.parametrize("early", [codec.NXDOMAIN, codec.NOERROR])
async def test_a_denial_is_held_for_a_second_at_most(early: int) -> None:
    async with coded(early) as denying, mute() as dead, Host(known(denying), known(dead)) as host:
        began = time.monotonic()
        assert await host.lookup("a.example") == early
        assert 0.9 < time.monotonic() - began < 3.0


async def test_what_denies_is_told_when_all_have_answered_or_failed() -> None:
    async with coded(codec.NXDOMAIN) as denying, coded(codec.SERVFAIL) as failing, coded(codec.NOERROR) as empty:
        async with Host(known(denying), known(failing)) as host:
            began = time.monotonic()
            assert await host.lookup("a.example") == codec.NXDOMAIN
            assert time.monotonic() - began < 0.9
        async with Host(known(denying), known(empty)) as host:
            assert await host.lookup("b.example") == codec.NOERROR, "that the name exists says more"


async def test_a_live_and_a_closed_server_are_no_early_error() -> None:  # vpnkit dns_forward/bad server
    closed = Known(Upstream.parse("127.0.0.1#1"))
    async with one("10.0.0.1") as good, Host(closed, known(good)) as host:
        assert await host.lookup("a.example") == ["10.0.0.1"]


async def test_the_next_order_is_for_failures_not_for_other_opinions() -> None:
    async with (
        coded(codec.NXDOMAIN) as first,
        one("10.0.0.2") as second,
        Host(known(first), known(second, order=1)) as host,
    ):
        assert await host.lookup("a.example") == codec.NXDOMAIN
        assert second.asked == []
    async with (
        coded(codec.SERVFAIL) as first,
        one("10.0.0.2") as second,
        Host(known(first), known(second, order=1)) as host,
    ):
        assert await host.lookup("a.example") == ["10.0.0.2"]


async def test_a_denial_of_a_second_order_does_not_wait_for_a_dead_first() -> None:
    async with mute() as dead, coded(codec.NXDOMAIN) as second, Host(known(dead), known(second, order=1)) as host:
        began = time.monotonic()
        assert await host.lookup("a.example") == codec.NXDOMAIN
        assert time.monotonic() - began < 1.9


# Offline


async def test_a_silent_server_is_not_waited_for_until_it_answers() -> None:  # vpnkit dns_forward/tolerate broken
    speaks = False

    def answer(asked: bytes) -> list[bytes]:
        return [code_reply(asked, codec.NXDOMAIN)] if speaks else []

    async with upstream(answer) as broken, coded(codec.NXDOMAIN) as good:
        async with Host(known(broken), known(good), offline_after=1) as host:
            assert await host.lookup("a.example") == codec.NXDOMAIN, "after a second, for the silent one"
            assert [one["offline"] for one in host.dns.upstreams()] == [True, False]
            began = time.monotonic()
            assert await host.lookup("b.example") == codec.NXDOMAIN
            assert time.monotonic() - began < 0.9
            speaks = True
            while host.dns.upstreams()[0]["offline"]:
                assert time.monotonic() - began < 20
                await host.lookup("c.example")
                await asyncio.sleep(0.05)
            asked = names(broken.asked)
            assert "c.example." in asked and "b.example." not in asked, "one query in a second is sent to see"


async def test_servers_that_are_all_offline_are_asked_as_usual() -> None:
    speaks = False

    def answer(asked: bytes) -> list[bytes]:
        return [a_reply(asked, "10.0.0.1")] if speaks else []

    async with upstream(answer) as only:
        async with Host(known(only, timeout_s=0.1), offline_after=1) as host:
            assert await host.lookup("a.example") == codec.SERVFAIL
            assert host.dns.upstreams()[0]["offline"]
            speaks = True
            assert await host.lookup("b.example") == ["10.0.0.1"]
            assert not host.dns.upstreams()[0]["offline"]


@pytest.mark.parametrize("together", [True, False], ids=["one order", "two orders"])
async def test_128_lookups_beside_a_dead_server_are_answered_within_two_seconds(together: bool) -> None:
    async with mute() as dead, one("10.0.0.2") as good:
        async with Host(known(dead), known(good, order=0 if together else 1)) as host:
            began = time.monotonic()
            found = await asyncio.gather(*(host.lookup(f"n{n}.example") for n in range(128)))
            assert time.monotonic() - began < 2.0
            assert found == [["10.0.0.2"]] * 128


# The network changes while a query waits


async def test_a_query_for_a_zone_that_is_gone_is_not_asked_elsewhere() -> None:
    async with mute() as vpn, one("192.0.2.1") as home, Host(known(vpn, "corp.example"), known(home)) as host:
        answer = asyncio.ensure_future(host.lookup("secret.corp.example"))
        await vpn.arrivals.get()
        host.become(known(home))
        host.dns.network_changed()
        assert await answer == codec.SERVFAIL
        assert home.asked == []


async def test_a_query_on_its_way_follows_a_zone_that_comes_up() -> None:
    async with mute() as home, one("10.0.0.1") as vpn, Host(known(home)) as host:
        answer = asyncio.ensure_future(host.lookup("a.corp.example"))
        message, peer = await home.arrivals.get()
        host.become(known(home), known(vpn, "corp.example"))
        host.dns.network_changed()
        assert await answer == ["10.0.0.1"]
        assert len(home.asked) == 1
        assert home.transport is not None
        home.transport.sendto(code_reply(message, codec.NXDOMAIN), peer)  # too late, and nobody listens


async def test_a_change_counts_against_no_server() -> None:
    async with mute() as slow, Host(known(slow), offline_after=1) as host:
        answer = asyncio.ensure_future(host.lookup("a.example"))
        await slow.arrivals.get()
        host.dns.network_changed()
        message, peer = await slow.arrivals.get()
        assert not host.dns.upstreams()[0]["offline"]
        assert host.dns.counters["upstream_timeout"] == 0
        assert slow.transport is not None
        slow.transport.sendto(a_reply(message, "10.0.0.1"), peer)
        assert await answer == ["10.0.0.1"]


# Equal questions


async def test_a_question_on_its_way_is_not_asked_twice() -> None:
    async with mute() as slow, Host(known(slow)) as host:
        asked = [query("a.Example", query_id=1), query("A.example", query_id=2), query("a.example", "AAAA", query_id=3)]
        waiting = [asyncio.ensure_future(ask(host.dns, message)) for message in asked]
        for _ in range(2):
            message, peer = await slow.arrivals.get()
            assert slow.transport is not None
            slow.transport.sendto(a_reply(message, "10.0.0.1"), peer)
        answers = await asyncio.gather(*waiting)
        for message, answer in zip(asked, answers, strict=True):
            end = codec.question_end(message)
            assert answer[:2] == message[:2] and answer[12:end] == message[12:end], "its id, its letters"
        assert len(slow.asked) == 2
        assert host.dns.counters["coalesced"] == 1
        assert host.dns.counters["in_flight"] == 0


async def test_askers_of_one_question_are_bounded_too() -> None:  # G23
    async with mute() as slow:
        resolvers = Resolvers(servers=(known(slow),))
        server = Server(hosts_path=None, source=lambda: resolvers, max_in_flight=8)
        answers: list[bytes] = []
        for n in range(20):
            server.datagram(query("a.example", query_id=n), GUEST, answers.append)
        assert server.counters["in_flight"] == 8
        assert [parse(answer).header.rcode for answer in answers] == [codec.SERVFAIL] * 12
        server.close()
        assert server.counters["in_flight"] == 0


# IPv6 addresses


@pytest.mark.parametrize(
    ("aaaa", "route", "name", "relayed"),
    [
        ("on", False, "a.example", True),
        ("off", True, "a.example", False),
        ("auto", True, "a.example", True),
        ("auto", False, "a.example", False),
        ("auto", False, "a.corp.example", True),
    ],
)
async def test_ipv6_addresses_are_answered_only_when_there_is_a_way(
    aaaa: str, route: bool, name: str, relayed: bool
) -> None:
    async with coded(codec.NXDOMAIN) as home:
        resolvers = Resolvers(servers=(known(home), known(home, "corp.example")))
        server = Server(hosts_path=None, source=lambda: resolvers, aaaa=aaaa, ipv6_route=lambda: route)  # type: ignore[arg-type]
        answer = parse(await ask(server, query(name, "AAAA")))
        assert answer.header.rcode == (codec.NXDOMAIN if relayed else codec.NOERROR)
        assert len(home.asked) == relayed
        assert server.counters["aaaa_filtered"] == (not relayed)
        await ask(server, query(name, "A"))
        assert len(home.asked) == 1 + relayed
        server.close()
