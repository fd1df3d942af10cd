"""Messages read in place and answers of our own, judged by dnslib (Q05, G23)."""

from __future__ import annotations

import pytest
from dnslib import EDNS0, QTYPE, RR, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from dns import codec
from netstack.errors import Malformed
from tests.dns.support import a_reply, parse, query

HEADER = bytes.fromhex("123401000001000000000000")
TAIL = b"\x00\x01\x00\x01"

labels = st.lists(st.text("abcDEF-_0129", min_size=1, max_size=63), min_size=0, max_size=3)


@given(labels, st.sampled_from(["A", "AAAA", "TXT", "PTR", "SRV", "HTTPS"]))
def test_the_question_of_a_good_query_is_found(parts: list[str], qtype: str) -> None:
    message = query(".".join(parts) or ".", qtype)
    end = codec.question_end(message)
    assert end == len(message)
    assert codec.question(message, end) == (getattr(QTYPE, qtype), 1)
    assert codec.key(message, end) == codec.wire_name(".".join(parts))


@given(st.binary(min_size=codec.HEADER, max_size=600))
def test_any_octets_have_a_question_or_are_malformed(message: bytes) -> None:
    try:
        end = codec.question_end(message)
    except Malformed:
        return
    assert codec.HEADER < end <= len(message)
    codec.edns(message, end)
    answer = codec.answer(message, end, [codec.Record(codec.A, 0, bytes(4))])
    assert answer[:2] == message[:2]
    assert codec.is_response(answer)
    assert answer[codec.HEADER : end] == message[codec.HEADER : end]


@given(st.integers(0, 40))
def test_a_good_query_cut_anywhere_is_malformed(cut: int) -> None:
    message = query("very.long.example.internal", "AAAA")
    with pytest.raises(Malformed):
        codec.question_end(message[: max(codec.HEADER, len(message) - 1 - cut)])


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(HEADER[:4] + b"\0\0" + HEADER[6:] + b"\x01a\0" + TAIL, id="QDCOUNT 0"),
        pytest.param(HEADER[:4] + b"\0\2" + HEADER[6:] + (b"\x01a\0" + TAIL) * 2, id="QDCOUNT 2"),
        pytest.param(HEADER[:4] + b"\1\1" + HEADER[6:] + b"\x01a\0" + TAIL, id="QDCOUNT 257"),
        pytest.param(HEADER + b"\xc0\x0c" + TAIL, id="pointer to itself"),
        pytest.param(HEADER + b"\x01a\xc0\x0c" + TAIL, id="pointer to its own beginning"),
        pytest.param(HEADER + b"\x01a\xc0\x1e" + TAIL + bytes(30), id="pointer forward"),
        pytest.param(HEADER + b"\x01a\xc0\x04" + TAIL, id="pointer into the header"),
        pytest.param(HEADER + b"\x40" + b"a" * 64 + b"\0" + TAIL, id="label of 64"),
        pytest.param(HEADER + b"\x80a\0" + TAIL, id="unknown label type"),
        pytest.param(HEADER + (b"\x3f" + b"a" * 63) * 4 + b"\0" + TAIL, id="name of 257"),
        pytest.param(HEADER + b"\x01a" * 200 + b"\0" + TAIL, id="200 labels"),
        pytest.param(HEADER + b"\x01a", id="no end of the name"),
        pytest.param(HEADER + b"\x01a\0\0\1\0", id="class cut short"),
        pytest.param(HEADER, id="header alone"),
    ],
)
def test_a_question_that_cannot_be_read_is_malformed(message: bytes) -> None:  # Q05
    with pytest.raises(Malformed):
        codec.question_end(message)


def test_the_longest_name_is_a_name() -> None:
    name = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"b" * 61 + b"\0"
    assert len(name) == 255
    assert codec.question_end(HEADER + name + TAIL) == codec.HEADER + 255 + 4


@given(st.lists(st.ip_addresses(v=4).map(lambda address: address.packed), max_size=20), st.booleans())
def test_dnslib_reads_our_answers_back(addresses: list[bytes], with_edns: bool) -> None:
    asked = DNSRecord.question("Host.Internal")
    if with_edns:
        asked.add_ar(EDNS0(flags="do", udp_len=4096))
    message = bytes(asked.pack())
    end = codec.question_end(message)
    answer = parse(codec.answer(message, end, [codec.Record(codec.A, 7, address) for address in addresses]))
    assert str(answer.q.qname) == "Host.Internal."
    assert [bytes(rr.rdata.data) for rr in answer.rr] == addresses
    assert all(rr.rname == asked.q.qname and rr.ttl == 7 for rr in answer.rr)
    assert (answer.header.qr, answer.header.aa, answer.header.rd, answer.header.ra) == (1, 1, 1, 1)
    assert [(rr.rtype, rr.edns_do) for rr in answer.ar] == ([(QTYPE.OPT, 1)] if with_edns else [])


def test_flags_of_the_query_are_kept_where_they_belong_in_an_answer() -> None:
    asked = DNSRecord.question("a.b")
    asked.header.rd = 0
    asked.header.cd = 1
    asked.header.ad = 1
    message = bytes(asked.pack())
    answer = parse(codec.failure(message, codec.SERVFAIL, codec.question_end(message)))
    assert (answer.header.rd, answer.header.cd, answer.header.ad, answer.header.tc) == (0, 1, 0, 0)
    assert answer.header.rcode == codec.SERVFAIL


@pytest.mark.parametrize(("said", "limit"), [(None, 512), (0, 512), (511, 512), (1232, 1232), (65535, 65535)])
def test_the_limit_of_an_answer_is_what_edns_says_but_at_least_512(said: int | None, limit: int) -> None:
    asked = DNSRecord.question("a.b")
    if said is not None:
        asked.add_ar(RR("a.b", QTYPE.A, rdata=A("1.2.3.4")))  # something else before the OPT record
        asked.add_ar(EDNS0(udp_len=said))
    message = bytes(asked.pack())
    assert codec.udp_limit(message, codec.question_end(message)) == limit


@given(st.integers(0, 120), st.integers(300, 1400), st.booleans())
def test_an_answer_that_is_cut_still_parses_and_says_so(count: int, limit: int, with_edns: bool) -> None:
    asked = DNSRecord.question("very.big.name")
    reply = DNSRecord.parse(a_reply(bytes(asked.pack()), *(f"10.0.0.{n}" for n in range(count))))
    if with_edns:
        reply.add_ar(EDNS0(udp_len=1232))
    whole = bytes(reply.pack())
    cut = codec.fit(whole, limit)
    assert len(cut) <= limit
    answer = parse(cut)
    assert answer.header.tc == (len(whole) > limit)
    assert answer.q == asked.q
    assert [str(rr.rdata) for rr in answer.rr] == [str(rr.rdata) for rr in reply.rr][: len(answer.rr)]
    assert len(answer.ar) == with_edns
    if len(whole) > limit:
        assert limit - len(cut) < 16, "another record would have fitted"


@given(st.binary(min_size=12, max_size=2000), st.integers(12, 600))
def test_anything_is_cut_without_a_complaint(message: bytes, limit: int) -> None:
    try:
        end = codec.question_end(message)
    except Malformed:
        end = codec.HEADER
    assert len(codec.fit(message, max(limit, end))) <= max(limit, end)


@pytest.mark.parametrize("text", ["a..b", "x" * 64, "a." * 128, ".a"])
def test_a_text_that_is_no_name_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        codec.wire_name(text)


def test_names_outside_ascii_become_idna() -> None:
    assert codec.wire_name("bücher.Example.") == b"\x0dxn--bcher-kva\x07example\0"
    assert codec.wire_name(".") == b"\0"
