"""Command lines as programs with OCaml's cmdliner have them: `--opt VAL`, `--opt=VAL`, and beginnings that fit one option only.

A word that begins with `-` is no value but after `=`, negative numbers apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pyvpnkit.values import meant

Options: TypeAlias = Mapping[str, tuple[str, str]]
"""Name without dashes -> (what its value is, "" for none; what it does)."""


@dataclass(slots=True, kw_only=True)
class Line:
    """A command line taken apart, cmdliner's way."""

    values: dict[str, list[str]] = field(default_factory=dict)
    """Option -> values; that of one without a value is empty text."""
    complaints: list[str] = field(default_factory=list)

    def last(self, name: str) -> str | None:
        """The value of an option that is given once."""
        return self.values[name][-1] if name in self.values else None


def parse(argv: Sequence[str], options: Options, repeatable: Collection[str]) -> Line:
    """The words of `argv` by these options. Never raises."""
    line = Line()
    words = iter(argv)
    waiting: str | None = None
    for word in words:
        if waiting is not None:
            known, waiting = waiting, None
            if not word.startswith("-") or word == "-" or re.fullmatch(r"-\d+", word):
                if known:
                    line.values.setdefault(known, []).append(word)
                continue
            line.complaints += [_wants(known, options)] * bool(known)
        if word == "--":
            line.complaints += [f"{rest!r}: only options are wanted" for rest in words]
            break
        waiting = _option(word, options, line)
    if waiting:
        line.complaints.append(_wants(waiting, options))
    for name, values in line.values.items():
        if len(values) > 1 and name not in repeatable:
            line.complaints.append(f"--{name}: is given {len(values)} times; give it once")
    return line


def _wants(name: str, options: Options) -> str:
    return f"--{name}: needs a value; write --{name} {options[name][0]}"


def _option(word: str, options: Options, line: Line) -> str | None:
    """Take one word that begins an option; returns whose value the next word is: an option's, "" for one that is not known."""
    text, equals, value = word.partition("=")
    if not text.startswith("--"):
        line.complaints.append(f"{word!r}: only options are wanted, which begin with --; --help lists them")
        return None
    fitting = [text[2:]] if text[2:] in options else [name for name in options if name.startswith(text[2:])]
    if len(fitting) != 1:
        guess = meant(text, [f"--{name}" for name in options])
        why = f"is short for any of {', '.join(f'--{name}' for name in fitting)}" if fitting else f"is unknown{guess}"
        line.complaints.append(f"{text}: {why}; --help lists the options")
        return None if equals else ""
    (name,) = fitting
    if not options[name][0]:
        if equals and name != "help":
            line.complaints.append(f"--{name}: takes no value")
        line.values.setdefault(name, []).append("")
        return None
    if not equals:
        return name
    line.values.setdefault(name, []).append(value)
    return None
