"""Every essential row of the conformance catalogue is named by a test of this project, or has a reason here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

ESSENTIAL = """
    L01 L02 L03 L04 L06 I01 I02 I03 I04 I05 I06 I07 I10 I11 I13
    C01 C02 C03 C04 C05 C06 C07 C09
    S01 S02 S03 S04 S05 S07 S08 S09 S10 S11 S14 S15
    T01 T02 T03 T04 T05 T06 T07 T08 T09 T11 T12 T13 T14 T15 T16 T17 T18 T20 T21 T22 T23
    T30 T31 T32 T33 T34 T35 T36 T37 T38 T39 T40 T41 T42 T43 T44 T55 T56 T57 T58
    T60 T61 T62 T63 T64 T65 T68 T69
    U01 U02 U03 U04 U05 U06 U07 D01 D02 D03 Q01 Q02 Q03 Q04 Q05 P01 X01 X02 X03
""".split()

LATER = {row: "IPv6 is a later issue" for row in ESSENTIAL if row.startswith("S")}
"""Rows without a test, and why."""

_ROW = re.compile(r"(?<![A-Za-z0-9])([LICSTUDQPX]\d\d)(?!\d)", re.IGNORECASE)
_IN_NAME = re.compile(r"(?<![a-z0-9])([licstudqpx]\d\d)(?![a-z0-9])")


def rows_named() -> dict[str, list[str]]:
    """Row to the tests that name it: in their name, docstring, parameters, or in a comment in or above them."""
    named: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        if path == Path(__file__):
            continue
        source = path.read_text(encoding="utf-8")
        comments = [line.partition("#")[2] for line in source.splitlines()]
        above = 0
        for node in ast.parse(source).body:
            end = node.end_lineno or node.lineno
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found = set(_IN_NAME.findall(node.name.replace("_", " ")))
                found |= set(_ROW.findall(ast.get_docstring(node) or ""))
                found |= set(_ROW.findall("\n".join(comments[above:end])))
                for decorator in node.decorator_list:
                    for part in ast.walk(decorator):
                        if isinstance(part, ast.Constant) and isinstance(part.value, str):
                            found |= set(_ROW.findall(part.value))
                for row in found:
                    named.setdefault(row.upper(), []).append(f"{path.relative_to(TESTS)}::{node.name}")
                above = end
    return named


def test_every_essential_row_has_a_test_that_names_it() -> None:
    named = rows_named()
    missing = [row for row in ESSENTIAL if row not in named and row not in LATER]
    assert not missing, f"no test names {' '.join(missing)}"


def test_no_reason_is_kept_for_a_row_that_has_its_test() -> None:
    named = rows_named()
    assert not [row for row in LATER if row in named]


def test_the_catalogue_is_complete() -> None:
    assert len(ESSENTIAL) == len(set(ESSENTIAL)) == 102
