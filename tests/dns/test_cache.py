"""What is remembered of answers, for how long, and when it is forgotten (Q06; RFC 2181 5.2, RFC 2308)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import pytest
from dnslib import AAAA, CNAME, EDNS0, QTYPE, RR, SOA, A, DNSHeader, DNSRecord, EDNSOption
from hypothesis import given
from hypothesis import strategies as st

from dns import cache, codec
from dns.cache import MAX_NEGATIVE_S, MAX_TTL_S, Cache
from dns.codec import wire_name
from dns.server import Server
from dns.servers import Resolvers, Upstream
from dns.servers import Server as Known
from netstack.errors import Malformed
from tests.dns.support import Upstream as Scripted
from tests.dns.support import a_reply, ask, code_reply, parse, query, upstream


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def reply(message: bytes, *records: RR, rcode: int = 0, soa: tuple[int, int] | None = None, aa: int = 0) -> bytes:
    """An answer with these records, and an SOA record of `(ttl, minimum)`."""
    asked = parse(message)
    made = DNSRecord(DNSHeader(id=asked.header.id, qr=1, rd=1, ra=1, aa=aa, rcode=rcode), q=asked.q)
    for record in records:
        made.add_answer(record)
    if soa is not None:
        times = (1, 3600, 600, 86400, soa[1])
        made.add_auth(RR("example", QTYPE.SOA, ttl=soa[0], rdata=SOA("ns.example", "root.example", times)))
    return bytes(made.pack())


def address(name: str, ttl: int) -> RR:
    return RR(name, QTYPE.A, ttl=ttl, rdata=A("10.0.0.1"))


class Asked:
    """A server with a resolver behind it, in time of our own."""

    def __init__(self, resolver: Scripted) -> None:
        self.resolver = resolver
        self.clock = Clock()
        self.resolvers = Resolvers(servers=(Known(Upstream.parse(resolver.spec)),))
        self.server = Server(hosts_path=None, source=lambda: self.resolvers, clock=self.clock)

    async def ask(self, message: bytes) -> DNSRecord:
        return parse(await ask(self.server, message))

    async def relayed(self, message: bytes) -> bool:
        """Whether the question went to the resolver."""
        before = len(self.resolver.asked)
        await ask(self.server, message)
        return len(self.resolver.asked) > before


def answers(*made: Callable[[bytes], bytes]) -> Callable[[bytes], Sequence[bytes]]:
    """A resolver that answers the first question by the first, and so on; the last again and again."""
    left: Iterator[Callable[[bytes], bytes]] = iter(made[:-1])
    return lambda asked: [next(left, made[-1])(asked)]


async def test_the_second_lookup_is_answered_when_the_server_has_stopped() -> None:  # vpnkit dns_forward/caching
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as resolver:
        host = Asked(resolver)
        first = await host.ask(query("a.example", query_id=1))
        assert resolver.transport is not None
        resolver.transport.close()
        second = await host.ask(query("A.eXample", query_id=2))
        assert (str(first.rr[0].rdata), str(second.rr[0].rdata)) == ("10.0.0.1", "10.0.0.1")
        assert (second.header.id, str(second.q.qname)) == (2, "A.eXample."), "its id, its letters"
        assert len(resolver.asked) == 1
        assert host.server.counters["cached"] == 1 and host.server.counters["cache_entries"] == 1
        host.server.close()


async def test_times_to_live_go_down_and_the_shortest_ends_it() -> None:
    def answer(asked: bytes) -> bytes:
        alias = RR("a.example", QTYPE.CNAME, ttl=300, rdata=CNAME("b.example"))
        return reply(asked, alias, address("b.example", 60), aa=1)

    async with upstream(answers(answer)) as resolver:
        host = Asked(resolver)
        first = await host.ask(query("a.example"))
        assert ([rr.ttl for rr in first.rr], first.header.aa) == ([300, 60], 1)
        host.clock.now += 20.9
        again = await host.ask(query("a.example"))
        assert ([rr.ttl for rr in again.rr], again.header.aa) == ([280, 40], 0), (
            "what is remembered is not authoritative"
        )
        host.clock.now += 10
        assert [rr.ttl for rr in (await host.ask(query("a.example"))).rr] == [270, 30]
        host.clock.now += 29.2
        assert await host.relayed(query("a.example"))
        host.server.close()


@pytest.mark.parametrize(
    ("made", "seconds"),
    [
        pytest.param(lambda asked: reply(asked, address("a.example", 0)), 0, id="no time to live"),
        pytest.param(lambda asked: reply(asked, address("a.example", 7)), 7, id="a short one"),
        pytest.param(lambda asked: reply(asked, address("a.example", 1 << 30)), MAX_TTL_S, id="a long one is cut"),
        pytest.param(lambda asked: reply(asked, address("a.example", 1 << 31)), 0, id="a negative one is none"),
        pytest.param(lambda asked: reply(asked, rcode=3, soa=(100, 20)), 20, id="no such name: the SOA's minimum"),
        pytest.param(lambda asked: reply(asked, rcode=3, soa=(15, 20)), 15, id="no such name: the SOA's own"),
        pytest.param(lambda asked: reply(asked, soa=(100, 20)), 20, id="no such records"),
        pytest.param(
            lambda asked: reply(asked, rcode=3, soa=(86400, 86400)), MAX_NEGATIVE_S, id="a long denial is cut"
        ),
        pytest.param(lambda asked: reply(asked, rcode=3), 0, id="a denial without an SOA record"),
        pytest.param(lambda asked: code_reply(asked, codec.SERVFAIL), 0, id="SERVFAIL"),
        pytest.param(lambda asked: code_reply(asked, codec.REFUSED), 0, id="REFUSED"),
        pytest.param(lambda asked: code_reply(asked, codec.FORMERR), 0, id="FORMERR"),
        pytest.param(lambda asked: a_reply(asked, "10.0.0.1")[:-1], 0, id="cut short"),
        pytest.param(lambda asked: a_reply(asked, "10.0.0.1") + b"x", 0, id="with something behind"),
    ],
)
async def test_an_answer_is_kept_as_long_as_it_says(made: Callable[[bytes], bytes], seconds: int) -> None:
    async with upstream(lambda asked: [made(asked)]) as resolver:
        host = Asked(resolver)
        assert await host.relayed(query("a.example"))
        host.clock.now += max(0, seconds - 0.5)
        assert await host.relayed(query("a.example")) == (seconds == 0)
        host.clock.now += 1
        assert await host.relayed(query("a.example"))
        host.server.close()


async def test_a_truncated_answer_is_not_kept() -> None:
    def cut(asked: bytes) -> bytes:
        message = bytearray(a_reply(asked, "10.0.0.1"))
        message[2] |= codec.TC
        return bytes(message)

    async with upstream(answers(cut)) as resolver:
        host = Asked(resolver)
        assert await host.relayed(query("a.example")) and await host.relayed(query("a.example"))
        host.server.close()


def edns(name: str = "a.example", qtype: str = "A", octets: int = 1232, flags: str = "", **header: int) -> bytes:
    asked = DNSRecord.question(name, qtype)
    for bit, value in header.items():
        setattr(asked.header, bit, value)
    asked.add_ar(EDNS0(udp_len=octets, flags=flags))
    return bytes(asked.pack())


def bits(**header: int) -> bytes:
    asked = DNSRecord.question("a.example")
    for bit, value in header.items():
        setattr(asked.header, bit, value)
    return bytes(asked.pack())


async def test_questions_that_may_have_other_answers_are_kept_apart() -> None:
    apart = [
        query("a.example"),
        query("a.example", "AAAA"),
        query("b.example"),
        edns(),
        edns(flags="do"),
        edns(flags="do", cd=1),
        bits(cd=1),
        bits(ad=1),
        bits(rd=0),
    ]
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as resolver:
        host = Asked(resolver)
        assert [await host.relayed(message) for message in apart] == [True] * len(apart)
        assert [await host.relayed(message) for message in apart] == [False] * len(apart)
        assert not await host.relayed(edns(octets=4096)), "the size only matters on the way to the guest"
        host.server.close()


async def test_type_65_and_type_97_are_not_one() -> None:
    """Their octets are the letters A and a."""
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as resolver:
        host = Asked(resolver)
        message = query("a.example")
        https, other = message[:-3] + b"A" + message[-2:], message[:-3] + b"a" + message[-2:]
        assert await host.relayed(https) and await host.relayed(other)
        host.server.close()


async def test_questions_with_options_or_records_are_for_the_server_alone() -> None:
    asked = DNSRecord.question("a.example")
    asked.add_ar(EDNS0(udp_len=1232, opts=[EDNSOption(10, b"12345678")]))
    cookie = bytes(asked.pack())
    signed = DNSRecord.question("a.example")
    signed.add_ar(address("key.example", 1))
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as resolver:
        host = Asked(resolver)
        for message in (cookie, bytes(signed.pack()), query("a.example") + b"more"):
            assert await host.relayed(message) and await host.relayed(message)
        assert host.server.counters["cache_entries"] == 0
        host.server.close()


async def test_a_remembered_answer_is_cut_to_what_the_asker_takes() -> None:
    async with upstream(lambda asked: [a_reply(asked, *(f"10.0.0.{n}" for n in range(64)))]) as resolver:
        host = Asked(resolver)
        assert len((await host.ask(edns(octets=4096))).rr) == 64
        small = await host.ask(edns(octets=600))
        assert small.header.tc == 1 and 0 < len(small.rr) < 64
        assert len(resolver.asked) == 1
        host.server.close()


# Forgotten


async def test_a_change_of_the_network_empties_it() -> None:  # F11
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as resolver:
        host = Asked(resolver)
        await host.ask(query("a.example"))
        host.server.network_changed()
        assert await host.relayed(query("a.example"))
        assert host.server.counters["cache_flushes"] > 0
        host.server.close()


async def test_other_resolvers_empty_it_and_equal_ones_do_not() -> None:  # Q06: nothing crosses zones or servers
    async with (
        upstream(lambda asked: [a_reply(asked, "192.0.2.1")]) as home,
        upstream(lambda asked: [a_reply(asked, "10.0.0.2")]) as vpn,
    ):
        host = Asked(home)
        await host.ask(query("a.corp.example"))
        host.resolvers = Resolvers(servers=(Known(Upstream.parse(home.spec)),))
        assert not await host.relayed(query("a.corp.example")), "written anew with the same in it"
        zone = Known(Upstream.parse(vpn.spec), (wire_name("corp.example"),))
        host.resolvers = Resolvers(servers=(*host.resolvers.servers, zone))
        assert str((await host.ask(query("a.corp.example"))).rr[0].rdata) == "10.0.0.2"
        host.resolvers = Resolvers(servers=host.resolvers.servers[:1])
        assert str((await host.ask(query("a.corp.example"))).rr[0].rdata) == "192.0.2.1"
        host.server.close()


async def test_an_answer_that_comes_after_a_change_is_not_kept() -> None:
    async with upstream(lambda asked: []) as resolver:
        host = Asked(resolver)
        answer = asyncio.ensure_future(host.ask(query("a.example")))
        message, peer = await resolver.arrivals.get()
        host.server.network_changed()
        assert resolver.transport is not None
        resolver.transport.sendto(a_reply(message, "10.0.0.1"), peer)
        await answer
        assert host.server.counters["cache_entries"] == 0
        host.server.close()


# Bounds


def kept(store: Cache, name: str, octets: int = 0, now: float = 0) -> bytes:
    message = query(name)
    end = codec.question_end(message)
    key = cache.key(message, end)
    assert key is not None
    store.keep(key, end, reply(message, *(address(name, 60) for _ in range(1 + octets // 16))), now, "somebody")
    return message


def has(store: Cache, message: bytes, now: float = 1) -> bool:
    end = codec.question_end(message)
    key = cache.key(message, end)
    assert key is not None
    return store.find(key, message, end, now) is not None


def test_it_holds_so_many_questions_and_what_was_not_used_goes_first() -> None:
    store = Cache(max_questions=100)
    first, second = kept(store, "first.example"), kept(store, "second.example")
    for n in range(98):
        kept(store, f"n{n}.example")
    assert has(store, first)
    kept(store, "one.more.example")
    assert has(store, first) and not has(store, second)
    assert (len(store), store.evicted) == (100, 1)


def test_it_holds_so_many_octets() -> None:
    store = Cache(max_octets=100_000)
    messages = [kept(store, f"n{n}.example", octets=3000) for n in range(200)]
    assert store.octets <= 100_000
    assert 5 < len(store) < 40
    assert has(store, messages[-1]) and not has(store, messages[0])
    store.flush()
    assert (len(store), store.octets) == (0, 0)


def test_what_is_replaced_or_runs_out_is_counted_off() -> None:
    store = Cache()
    message = kept(store, "a.example")
    one = store.octets
    kept(store, "a.example")
    assert store.octets == one
    assert has(store, message, now=59) and not has(store, message, now=60)
    assert (len(store), store.octets) == (0, 0)


# Anything


@given(st.binary(max_size=200), st.integers(0, 12), st.binary(min_size=2, max_size=2), st.floats(0, 1e6))
def test_any_octets_can_be_kept_and_looked_up(tail: bytes, records: int, flags: bytes, later: float) -> None:
    message = query("a.example")
    end = codec.question_end(message)
    key = cache.key(message, end)
    assert key is not None
    store = Cache()
    answer = message[:2] + bytes((flags[0] | 0x80, flags[1])) + b"\0\1\0" + bytes((records,)) + bytes(4)
    answer += message[12:end] + tail
    store.keep(key, end, answer, 0.0, "somebody")
    found = store.find(key, message, end, later)
    if found is not None:
        assert len(found) == len(answer) and found[:2] == message[:2] and found[12:end] == message[12:end]
        assert sum(1 for _ in codec.records(found, end)) == records
    assert 0 <= len(store) <= 1 and (store.octets > 0) == (len(store) == 1)


@given(st.binary(min_size=12, max_size=300))
def test_any_query_has_a_key_or_none(message: bytes) -> None:
    message = message[:4] + b"\0\1" + message[6:]
    try:
        end = codec.question_end(message)
    except Malformed:
        return
    key = cache.key(message, end)
    if key is not None:
        assert message[6:10] == bytes(4)
        assert cache.key(message[:2] + bytes((message[2] & 1,)) + message[3:], end) == key


def test_aaaa_of_the_same_name_has_its_own_entry() -> None:
    message = query("a.example", "AAAA")
    end = codec.question_end(message)
    key = cache.key(message, end)
    assert key is not None and key != cache.key(query("a.example"), end)
    store = Cache()
    record = RR("a.example", QTYPE.AAAA, ttl=60, rdata=AAAA("2001:db8::1"))
    store.keep(key, end, reply(message, record), 0.0, "somebody")
    assert has(store, message) and not has(store, query("a.example"))
