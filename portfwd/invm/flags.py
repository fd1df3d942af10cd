"""Flags as Go's tools take them: `-x V`, `-x=V`, `--x V`, `--x=V`; a switch is `-x`, `-x=true` or `-x=false` (spec vpnkit 1.2).

The first word that is no flag, or `--`, ends them. A flag given twice has its last value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from netstack.errors import ConfigError

_TRUE: Final = frozenset({"1", "t", "true"})
_FALSE: Final = frozenset({"0", "f", "false"})

HELP: Final = frozenset({"h", "help"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag; `value` is what it stands for in the help text, empty for a switch."""

    value: str = ""
    default: str = ""
    help: str


@dataclass(slots=True)
class Given:
    """What a command line said."""

    texts: dict[str, str] = field(default_factory=dict)
    every: dict[str, list[str]] = field(default_factory=dict)
    """All values of each flag that was given, in order."""
    switches: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    """Flags nobody knows, as written."""
    rest: list[str] = field(default_factory=list)
    help: bool = False

    def text(self, name: str) -> str:
        """The value of a flag, its default when it was not given."""
        return self.texts[name]

    def on(self, name: str) -> bool:
        return name in self.switches


def parse(argv: Sequence[str], flags: Mapping[str, Flag], *, tolerant: bool = False) -> Given:
    """Take a command line apart; raises `ConfigError`.

    `tolerant`: an unknown flag is kept in `unknown` instead, and the word behind it, if it is no flag, passes for its value.
    """
    given = Given(texts={name: flag.default for name, flag in flags.items() if flag.value})
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--" or len(word) < 2 or not word.startswith("-"):
            given.rest = words if word == "--" else [word, *words]
            break
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        flag = flags.get(name)
        if flag is None:
            if name in HELP:
                given.help = True
            elif not tolerant or not name:
                raise ConfigError(f"unknown flag {word}; known are {', '.join('-' + known for known in sorted(flags))}")
            else:
                given.unknown.append(word)
                if not equals and words and not words[0].startswith("-"):
                    words.pop(0)
        elif not flag.value:
            _switch(given, name, value if equals else "true")
        elif equals or words:
            given.texts[name] = value if equals else words.pop(0)
            given.every.setdefault(name, []).append(given.texts[name])
        else:
            raise ConfigError(f"flag -{name} needs a value: -{name} {flag.value}")
    return given


def _switch(given: Given, name: str, value: str) -> None:
    if value.lower() in _TRUE:
        given.switches.add(name)
    elif value.lower() in _FALSE:
        given.switches.discard(name)
    else:
        raise ConfigError(f"flag -{name}: {value!r} is neither true nor false")


def number(given: Given, name: str, *, least: int, most: int) -> int:
    """The value of a flag as a whole number; raises `ConfigError` that says what would be accepted."""
    text = given.text(name)
    try:
        found = int(text)
    except ValueError:
        found = least - 1
    if not least <= found <= most:
        raise ConfigError(f"flag -{name}: {text!r} is no number from {least} to {most}")
    return found


def usage(program: str, what: str, flags: Mapping[str, Flag], more: str = "") -> str:
    """The help text."""
    lines = [f"usage: {program} [FLAG]...", "", what, "", "flags (-x V, -x=V and --x=V are the same):"]
    for name, flag in flags.items():
        head = f"  -{name} {flag.value}".rstrip()
        default = f" [{flag.default}]" if flag.default else ""
        lines.append(f"{head:<28} {flag.help}{default}")
    return "\n".join([*lines, *(["", more] if more else [])])
