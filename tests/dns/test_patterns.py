"""Patterns of zone records: what they find is what Python's `re` finds, and no name makes one slow."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dns.patterns import MAX_PATTERN, Pattern
from netstack.errors import ConfigError

_ATOMS = ["a", "b", "1", "-", ".", r"\.", r"\d", r"\w", "[a-c]", "[^b]", "[-a]", "[]a]", "^", "$"]
_QUANTIFIERS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,}", "*?"]


@st.composite
def patterns(draw: st.DrawFn, depth: int = 2) -> str:
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        if depth and draw(st.booleans()):
            inside = [draw(patterns(depth - 1)) for _ in range(draw(st.integers(1, 2)))]
            atom = draw(st.sampled_from(["(", "(?:", "(?P<n>"])) + "|".join(inside) + ")"
        else:
            atom = draw(st.sampled_from(_ATOMS))
        parts.append(atom + ("" if atom in "^$" else draw(st.sampled_from(_QUANTIFIERS))))
    return "".join(parts)


@given(pattern=patterns(), name=st.text("abB1-.", max_size=8))
@example(pattern="", name="")
@example(pattern="^$", name="")
@example(pattern="(a|ab)(c|bcd)$", name="abcd")
@example(pattern="a{2}b{0}", name="aa")
def test_it_finds_what_python_finds(pattern: str, name: str) -> None:
    if pattern.count("?P<n>") > 1:
        pattern = pattern.replace("?P<n>", "?:")
    # Python's $ also stands before a last newline; no name has one.
    expected = re.search(pattern, name, re.IGNORECASE) is not None
    assert Pattern(pattern).search(name.lower()) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("crc-(.*?)-master-0", "crc-abcde-master-0", True),  # CRC's own
        (r".*\.apps", "console.apps", True),
        (r"^host$", "ghost", False),
        (r"\Ahost\z", "host", True),
        ("(?i)HOST", "host", True),
        ("HOST", "host", True),
        ("[[:alpha:]]+[[:digit:]]", "node7", True),
        ("[[:digit:]]", "node", False),
        ("a{,2}", "a{,2}", True),  # in Go's syntax these braces are letters
        ("[A-C]x", "bx", True),
        ("[^B]x", "bx", False),
        (r"\bhost", "host", None),
        ("(?=x)", "x", None),
        (r"(a)\1", "aa", None),
        ("a**", "a", None),
        ("*a", "a", None),
        ("(a", "a", None),
        ("a)", "a", None),
        ("[a", "a", None),
        ("[c-a]", "a", None),
        ("[[:no:]]", "a", None),
        ("a\\", "a", None),
        ("a{3,2}", "a", None),
        ("a{2000}", "a", None),
        ("(?P<1>a)", "a", None),
        ("(((a{100}){100}){100})", "a", None),
        ("(" * 30 + ")" * 30, "a", None),
        ("a" * (MAX_PATTERN + 1), "a", None),
    ],
)
def test_the_syntax_is_gos_and_what_is_not_understood_is_said(pattern: str, name: str, found: bool | None) -> None:
    if found is None:
        with pytest.raises(ConfigError, match="regexp"):
            Pattern(pattern)
    else:
        assert Pattern(pattern).search(name) is found


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|aa)+$x", "(.*)(.*)(.*)(.*)x", "(a?){60}a{60}b", "((a+)+)+b"])
def test_no_name_takes_long(pattern: str) -> None:
    """Backtracking takes years for each of these."""
    made = Pattern(pattern)
    began = time.process_time()
    assert not made.search("a" * 253)
    assert time.process_time() - began < 2


def test_what_is_remembered_is_bounded() -> None:
    made = Pattern("(a|b)*a(a|b){12}x")  # its DFA has thousands of states
    for number in range(300):
        made.search(f"{number:016b}".replace("0", "a").replace("1", "b") * 15)
    assert len(made._known) <= 1024
