"""How often a guest is answered: the bucket per address, and how many addresses are kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ntp.limit import BURST, KISS_S, MAX_GUESTS, RATE_PER_S, RateLimit, Verdict


def test_a_patient_guest_is_always_answered() -> None:
    limit = RateLimit()
    assert all(limit.asked(b"a", n / 64) is Verdict.ANSWER for n in range(10_000)), "chrony's shortest interval"


@given(st.lists(st.floats(0, 0.1), max_size=600))
def test_no_guest_gets_more_than_a_burst_and_its_rate(gaps: list[float]) -> None:
    limit, now, answered, kisses = RateLimit(), 0.0, 0, 0
    for gap in gaps:
        now += gap
        verdict = limit.asked(b"a", now)
        answered += verdict is Verdict.ANSWER
        kisses += verdict is Verdict.KISS
        assert answered <= BURST + now * RATE_PER_S + 1e-6
        assert kisses <= 1 + now / KISS_S
    assert len(gaps) > BURST or answered == len(gaps)


def test_silence_fills_the_bucket_and_no_more() -> None:
    limit = RateLimit()
    for start in (0.0, 1e6):
        verdicts = [limit.asked(b"a", start) for _ in range(BURST + 2)]
        assert verdicts == [Verdict.ANSWER] * BURST + [Verdict.KISS, Verdict.DROP]


def test_a_thousand_sources_and_more_are_a_bounded_table() -> None:
    limit = RateLimit()
    for n in range(100_000):
        assert limit.asked(n.to_bytes(4, "big"), n / 1e6) is Verdict.ANSWER
    assert len(limit) == MAX_GUESTS and limit.forgotten == 100_000 - MAX_GUESTS


def test_who_asked_longest_ago_is_forgotten_first() -> None:
    limit = RateLimit(max_guests=2)
    for _ in range(BURST):
        limit.asked(b"busy", 0.0)
    limit.asked(b"b", 0.0)
    assert limit.asked(b"busy", 0.0) is Verdict.KISS
    limit.asked(b"c", 0.0)  # in place of b
    assert limit.asked(b"busy", 0.0) is Verdict.DROP
    limit.asked(b"d", 0.0)
    limit.asked(b"e", 0.0)  # in place of busy
    assert limit.asked(b"busy", 0.0) is Verdict.ANSWER
    assert len(limit) == 2
