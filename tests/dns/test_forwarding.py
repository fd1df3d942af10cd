"""Relaying over UDP: what goes out, what is believed, and what the guest gets when resolvers fail (Q01-Q03, G23, N1, N2, F12)."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from dnslib import EDNS0, QTYPE, RR, A, DNSHeader, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from dns import codec, tries
from dns.forwarder import Forwarder
from dns.server import Server
from dns.servers import OFFLINE_AFTER, Resolvers, Upstream
from dns.servers import Server as Known
from tests.dns.support import GUEST, a_reply, ask, code_reply, free_port, parse, query, upstream

CLOSED = f"127.0.0.1#{free_port()}"


def make(*upstreams: str, max_in_flight: int = 512) -> Server:
    return Server(hosts_path=None, resolv_conf=None, upstreams=upstreams, max_in_flight=max_in_flight)


def quick(
    *servers: str, retry_s: float = 0.1, total_s: float = 0.5, timeout_s: float = 5.0, together: bool = False
) -> tuple[Forwarder, Counter[str]]:
    counters: Counter[str] = Counter()
    known = tuple(
        Known(Upstream.parse(server), order=0 if together else place, timeout_s=timeout_s)
        for place, server in enumerate(servers)
    )
    resolvers = Resolvers(servers=known)
    return Forwarder(lambda: resolvers, counters, total_s=total_s, retry_s=retry_s), counters


async def ask_quick(forwarder: Forwarder, message: bytes) -> bytes:
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    forwarder.ask(message, codec.question_end(message), lambda answer, by: answered.set_result(answer))
    async with asyncio.timeout(5):
        return await answered


def addresses(message: bytes) -> list[str]:
    return [str(rr.rdata) for rr in parse(message).rr]


def mute(asked: bytes) -> Sequence[bytes]:
    return []


def one(asked: bytes) -> Sequence[bytes]:
    return [a_reply(asked, "10.0.0.1")]


# Verbatim


@settings(max_examples=40, deadline=None)
@given(
    st.binary(min_size=6, max_size=6),
    st.binary(max_size=300),
    st.binary(max_size=400),
    st.integers(0, 255),
    st.integers(0, 15),
)
def test_only_the_id_changes_on_the_way(
    counts: bytes, asked_tail: bytes, tail: bytes, bits: int, code: int
) -> None:  # Q01, Z9
    if code in (codec.SERVFAIL, codec.REFUSED):
        code = codec.NXDOMAIN  # those two are about the server, see below
    message = b"\x12\x34" + bytes([bits & 0x07, bits & 0xF0]) + b"\0\1" + counts
    message += b"\x03wWw\x07eXample\0\xff\x01\0\1" + asked_tail
    end = len(message) - len(asked_tail)
    replies: list[bytes] = []

    def answer(asked: bytes) -> Sequence[bytes]:
        replies.append(
            asked[:2] + bytes([0x80 | bits & 7, bits & 0xF0 | code]) + b"\0\1" + counts + asked[12:end] + tail
        )
        return replies

    async def play() -> tuple[bytes, bytes]:
        async with upstream(answer) as resolver:
            forwarder, _ = quick(resolver.spec, total_s=5)
            return await ask_quick(forwarder, message), resolver.asked[0]

    got, sent = asyncio.run(play())
    assert sent[2:] == message[2:]
    assert got == message[:2] + replies[0][2:]


async def test_each_query_has_a_fresh_port_and_id() -> None:  # N1
    async with upstream(one) as resolver:
        server = make(resolver.spec)
        for n in range(100):
            await ask(server, query(f"{n}.example", query_id=7))
        ids = {int.from_bytes(asked[:2], "big") for asked in resolver.asked}
        ports = {port for _, port in resolver.peers}
        assert len(ids) > 95 and max(ids) - min(ids) > 20000
        assert len(ports) > 95 and max(ports) - min(ports) > 5000
        server.close()


# What is believed


def forgeries(asked: bytes) -> list[bytes]:
    good = a_reply(asked, "6.6.6.6")
    other_id = bytes([asked[0] ^ 0x55]) + good[1:]
    return [
        b"\0",
        good[:11],
        other_id,
        other_id[:12],
        a_reply(asked[:12] + asked[12:].replace(b"bank", b"bonk"), "6.6.6.6"),
        a_reply(asked[:12] + asked[12:].replace(b"bank", b"BANK"), "6.6.6.6"),
        a_reply(asked[:-3] + b"\x1c" + asked[-2:], "6.6.6.6"),
        a_reply(asked[:-1] + b"\x03", "6.6.6.6"),
        good[:2] + bytes([good[2] & 0x7F]) + good[3:],
        good[:2] + bytes([good[2] | 0x10]) + good[3:],
        good[:4] + b"\0\2" + good[6:],
        good[:4] + bytes(8),
        good[: codec.question_end(asked) - 1],
    ]


async def test_replies_that_do_not_match_are_not_delivered() -> None:  # N1
    async with upstream(lambda asked: [*forgeries(asked), a_reply(asked, "10.0.0.1")]) as resolver:
        server = make(resolver.spec)
        assert addresses(await ask(server, query("bank.example"))) == ["10.0.0.1"]
        assert server.counters["upstream_mismatch"] == len(forgeries(query("bank.example")))
        server.close()


async def test_replies_from_another_address_or_port_are_not_delivered() -> None:  # N1
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as same_host,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        other.bind(("127.0.0.2", 0))
        async with upstream(mute) as resolver:
            forwarder, counters = quick(resolver.spec, retry_s=5, total_s=5)
            answer = asyncio.ensure_future(ask_quick(forwarder, query("bank.example")))
            asked, peer = await resolver.arrivals.get()
            for _ in range(1000):
                same_host.sendto(a_reply(asked, "6.6.6.6"), peer)
                other.sendto(a_reply(asked, "6.6.6.6"), peer)
            assert resolver.transport is not None
            resolver.transport.sendto(a_reply(asked, "10.0.0.1"), peer)
            assert addresses(await answer) == ["10.0.0.1"]
            assert counters["upstream_mismatch"] == 0, "the kernel kept them away"


async def test_a_flood_of_guessed_ids_delivers_nothing() -> None:  # N1, in small
    def flood(asked: bytes) -> Sequence[bytes]:
        right = a_reply(asked, "6.6.6.6")
        return [guess.to_bytes(2, "big") + right[2:] for guess in range(2000) if guess.to_bytes(2, "big") != asked[:2]]

    async with upstream(flood) as resolver:
        forwarder, counters = quick(resolver.spec)
        assert parse(await ask_quick(forwarder, query("bank.example"))).header.rcode == codec.SERVFAIL
        assert counters["upstream_mismatch"] > 100


# Servers that fail


@pytest.mark.parametrize("failing", [codec.SERVFAIL, codec.REFUSED])
async def test_a_server_that_cannot_is_passed_over(failing: int) -> None:  # F12
    async with upstream(lambda asked: [code_reply(asked, failing)]) as bad, upstream(one) as good:
        server = make(bad.spec, good.spec)
        assert addresses(await ask(server, query("a.example"), within_s=1)) == ["10.0.0.1"]
        server.close()


@pytest.mark.parametrize("failing", [codec.SERVFAIL, codec.REFUSED])
async def test_what_every_server_says_is_passed_on(failing: int) -> None:  # Q03
    async with upstream(lambda asked: [code_reply(asked, failing) + b"why"]) as bad:
        server = make(bad.spec, CLOSED)
        answer = await ask(server, query("a.example"), within_s=1)
        assert codec.rcode(answer) == failing
        assert answer.endswith(b"why"), "as it was written"
        assert len(bad.asked) == 1
        server.close()


async def test_nxdomain_is_an_answer_and_nobody_else_is_asked() -> None:  # Q03
    async with upstream(lambda asked: [code_reply(asked, codec.NXDOMAIN)]) as first, upstream(one) as second:
        server = make(first.spec, second.spec)
        assert parse(await ask(server, query("a.example"))).header.rcode == codec.NXDOMAIN
        assert second.asked == []
        server.close()


async def test_a_closed_port_costs_no_time() -> None:  # F12
    async with upstream(one) as good:
        server = make(CLOSED, good.spec)
        begun = time.monotonic()
        assert addresses(await ask(server, query("a.example"))) == ["10.0.0.1"]
        assert time.monotonic() - begun < 1.0
        assert server.counters["upstream_error"] == 1
        server.close()


async def test_only_closed_ports_are_servfail_at_once() -> None:
    server = make(CLOSED)
    begun = time.monotonic()
    assert parse(await ask(server, query("a.example"))).header.rcode == codec.SERVFAIL
    assert time.monotonic() - begun < 1.0
    server.close()


async def test_the_next_server_answers_within_two_seconds_of_a_dead_one() -> None:  # F12, N2
    async with upstream(mute) as dead, upstream(one) as good:
        server = make(dead.spec, good.spec)
        begun = time.monotonic()
        answers = await asyncio.gather(*(ask(server, query(f"n{n}.example")) for n in range(128)))
        assert time.monotonic() - begun < 2.0
        assert [addresses(answer) for answer in answers] == [["10.0.0.1"]] * 128
        assert [known["offline"] for known in server.upstreams()] == [True, False]
        begun = time.monotonic()
        await ask(server, query("later.example"))
        assert time.monotonic() - begun < 1.0, "the dead one is not waited for"
        server.network_changed()
        again = asyncio.ensure_future(ask(server, query("again.example")))
        while b"again" not in (await dead.arrivals.get())[0]:
            pass
        await again  # after a change of the network the dead one had another chance
        server.close()


async def test_one_slow_name_does_not_make_a_server_offline() -> None:
    def answer(asked: bytes) -> Sequence[bytes]:
        return [] if b"slow" in asked else one(asked)

    async with upstream(answer) as first, upstream(one) as second:
        forwarder, _ = quick(first.spec, second.spec, retry_s=0.05)
        for n in range(OFFLINE_AFTER + 1):
            await ask_quick(forwarder, query(f"slow{n}.example"))
            await ask_quick(forwarder, query(f"quick{n}.example"))
            assert len(second.asked) == n + 1


async def test_nobody_answers_is_servfail_when_the_time_is_over() -> None:  # N2
    async with upstream(mute) as dead:
        forwarder, counters = quick(dead.spec, retry_s=0.1, total_s=0.35)
        begun = time.monotonic()
        assert parse(await ask_quick(forwarder, query("a.example"))).header.rcode == codec.SERVFAIL
        assert 0.3 < time.monotonic() - begun < 1.0
        assert len(dead.asked) == 4, "asked again and again in that time"
        assert len({asked[:2] for asked in dead.asked}) > 1, "under fresh ids"
        assert counters["servfail"] == 1
        assert forwarder.in_flight == 0


async def test_a_servers_own_timeout_ends_a_query_early() -> None:
    async with upstream(mute) as dead:
        forwarder, _ = quick(dead.spec, retry_s=0.05, total_s=5, timeout_s=0.12)
        begun = time.monotonic()
        assert parse(await ask_quick(forwarder, query("a.example"))).header.rcode == codec.SERVFAIL
        assert time.monotonic() - begun < 1.0
        assert len(dead.asked) == 3


async def test_a_timeout_of_nothing_is_one_query_and_an_error_at_once() -> None:  # vpnkit per-server timeout 0
    async with upstream(mute) as dead:
        forwarder, _ = quick(dead.spec, total_s=5, timeout_s=0)
        begun = time.monotonic()
        assert parse(await ask_quick(forwarder, query("a.example"))).header.rcode == codec.SERVFAIL
        assert time.monotonic() - begun < 1.0
        await dead.arrivals.get()
        assert len(dead.asked) == 1


async def test_a_late_answer_is_as_good_as_a_quick_one() -> None:
    async with upstream(mute) as slow:
        forwarder, _ = quick(slow.spec, retry_s=0.05, total_s=5)
        answer = asyncio.ensure_future(ask_quick(forwarder, query("a.example")))
        for _ in range(3):
            await slow.arrivals.get()
        assert slow.transport is not None
        slow.transport.sendto(a_reply(slow.asked[0], "10.0.0.7"), slow.peers[0])
        assert addresses(await answer) == ["10.0.0.7"]


async def test_a_server_that_knows_no_edns_and_sends_a_bare_header_is_heard() -> None:
    def bare(asked: bytes) -> Sequence[bytes]:
        return [asked[:2] + b"\x81\x81" + bytes(8)]

    async with upstream(bare) as old:
        server = make(old.spec)
        answer = parse(await ask(server, query("a.example"), within_s=1))
        assert (answer.header.rcode, str(answer.q.qname)) == (codec.FORMERR, "a.example.")
        server.close()


# Bounds


async def test_beyond_the_limit_in_flight_is_servfail_and_room_comes_back() -> None:  # G23
    release = asyncio.Event()
    async with upstream(lambda asked: one(asked) if release.is_set() else []) as resolver:
        server = make(resolver.spec, max_in_flight=8)
        waiting = [asyncio.ensure_future(ask(server, query(f"n{n}.example"))) for n in range(20)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert server.counters["in_flight"] == 8
        assert server.counters["over_limit"] == 12
        release.set()
        answers = [parse(answer).header.rcode for answer in await asyncio.gather(*waiting)]
        assert answers == [codec.NOERROR] * 8 + [codec.SERVFAIL] * 12
        assert addresses(await ask(server, query("more.example"))) == ["10.0.0.1"]
        assert server.counters["in_flight"] == 0
        server.close()


async def test_ten_thousand_queries_leave_no_descriptor_behind() -> None:
    async with upstream(one) as resolver:
        server = make(resolver.spec)
        await ask(server, query("first.example"))
        before = len(os.listdir("/dev/fd"))
        for n in range(100):
            await asyncio.gather(*(ask(server, query(f"n{n}.{m}.example")) for m in range(100)))
        assert len(os.listdir("/dev/fd")) <= before
        server.close()


async def test_repetitions_use_no_more_sockets_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:  # G23
    monkeypatch.setattr(tries, "MAX_SOCKETS", 40)
    async with upstream(mute) as dead:
        forwarder, counters = quick(dead.spec, retry_s=0.02, total_s=0.5)
        before = len(os.listdir("/dev/fd"))
        waiting = [asyncio.ensure_future(ask_quick(forwarder, query(f"n{n}.example"))) for n in range(30)]
        while counters["socket_limit"] < 100:
            await asyncio.sleep(0.01)
            assert len(os.listdir("/dev/fd")) - before <= 42
        assert {parse(answer).header.rcode for answer in await asyncio.gather(*waiting)} == {codec.SERVFAIL}
        assert len(os.listdir("/dev/fd")) - before <= 2
        forwarder.close()


async def test_close_drops_what_is_on_its_way() -> None:
    async with upstream(mute) as dead:
        before = len(os.listdir("/dev/fd"))
        server = make(dead.spec)
        answers: list[bytes] = []
        for _ in range(10):
            server.datagram(query("a.example"), GUEST, answers.append)
        server.close()
        server.datagram(query("a.example"), GUEST, answers.append)
        assert len(os.listdir("/dev/fd")) == before
        await asyncio.sleep(0.01)
        assert answers == []
        assert server.counters["in_flight"] == 0


# Sizes


def big_reply(asked: bytes, edns: bool) -> bytes:
    """64 A records of `anything`, as VPNKit's own test has them."""
    parsed = parse(asked)
    reply = DNSRecord(DNSHeader(id=parsed.header.id, qr=1, rd=1, ra=1), q=parsed.q)
    for n in range(64):
        reply.add_answer(RR("anything", QTYPE.A, rdata=A(f"10.0.0.{n}"), ttl=1))
    if edns:
        reply.add_ar(EDNS0(udp_len=1232, flags="do"))
    return bytes(reply.pack())


async def test_64_records_are_cut_to_the_29_that_fit_a_plain_datagram() -> None:  # Q02; vpnkit DNS/truncate
    async with upstream(lambda asked: [big_reply(asked, False)]) as resolver:
        server = make(resolver.spec)
        octets = await ask(server, query("very.big.name"))
        answer = parse(octets)
        assert len(octets) <= 512
        assert answer.header.tc == 1
        assert [str(rr.rdata) for rr in answer.rr] == [f"10.0.0.{n}" for n in range(29)]
        assert server.counters["truncated"] == 1
        server.close()


@pytest.mark.parametrize(("said", "complete"), [(512, False), (1000, False), (1232, True), (4096, True)])
async def test_an_answer_is_as_long_as_edns_allows(said: int, complete: bool) -> None:  # Q02
    async with upstream(lambda asked: [big_reply(asked, True)]) as resolver:
        server = make(resolver.spec)
        asked = DNSRecord.question("very.big.name")
        asked.add_ar(EDNS0(udp_len=said, flags="do"))
        message = bytes(asked.pack())
        octets = await ask(server, message)
        answer = parse(octets)
        assert len(octets) <= said
        assert answer.header.tc == (not complete)
        assert (len(answer.rr) == 64) == complete
        assert [(rr.rtype, rr.edns_do) for rr in answer.ar] == [(QTYPE.OPT, 1)], "the OPT record stays"
        assert resolver.asked[0][2:] == message[2:]
        server.close()


async def test_truncation_by_the_resolver_is_passed_on() -> None:  # N2
    def cut(asked: bytes) -> Sequence[bytes]:
        reply = bytearray(a_reply(asked))
        reply[2] |= codec.TC
        return [bytes(reply)]

    async with upstream(cut) as resolver:
        server = make(resolver.spec)
        assert parse(await ask(server, query("a.example"))).header.tc == 1
        server.close()
