"""Regular expressions over names, in time that grows with the name only.

gvproxy's zone records may hold a pattern of Go's (RE2 syntax), and guests choose the names it is tried on: Python's `re`, which
backtracks, would let one of them stop the network with a good pair. Here a pattern is a program of the machine of Thompson and
Pike, run on all paths at once, and sets of places that came up are remembered (a DFA made by need).

Understood: literals, `.`, classes with ranges and `\\d \\w \\s` and their opposites, `[[:alpha:]]` and its like, all groups,
alternatives, `* + ? {m} {m,} {m,n}` also with `?` behind them (whether a match is short or long is not asked here), `^ $ \\A \\z`,
and `(?i)`, which holds anyway: names have no case. Anything else is a `ConfigError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from netstack.errors import ConfigError

MAX_PATTERN: Final = 256
"""Characters."""
MAX_PROGRAM: Final = 1024
"""Instructions."""
MAX_REPEAT: Final = 1000  # RE2's own bound for {m,n}
MAX_DEPTH: Final = 24
"""Groups within groups."""
MAX_REMEMBERED: Final = 1024
"""Steps of a pattern's DFA that are kept; then it forgets all and begins again."""

_ALL: Final = (1 << 256) - 1


def _of(*ranges: str) -> int:
    """The set of characters (a bit for each code below 256) of ranges such as `az` and characters such as `_`."""
    found = 0
    for one in ranges:
        for code in range(ord(one[0]), ord(one[-1]) + 1):
            found |= 1 << code
    return found


_DIGIT: Final = _of("09")
_WORD: Final = _of("09", "az", "AZ", "_")
_SPACE: Final = _of(" ", "\t", "\n", "\f", "\r")
_ESCAPES: Final = {
    "d": _DIGIT,
    "D": _ALL & ~_DIGIT,
    "w": _WORD,
    "W": _ALL & ~_WORD,
    "s": _SPACE,
    "S": _ALL & ~_SPACE,
    "t": _of("\t"),
    "n": _of("\n"),
    "r": _of("\r"),
    "f": _of("\f"),
    "v": _of("\v"),
}
_NAMED: Final = {
    "alpha": _of("az", "AZ"),
    "digit": _DIGIT,
    "alnum": _of("09", "az", "AZ"),
    "upper": _of("AZ"),
    "lower": _of("az"),
    "xdigit": _of("09", "af", "AF"),
    "word": _WORD,
    "space": _SPACE | _of("\v"),
    "punct": _of("!/", ":@", "[`", "{~"),
}


def _folded(characters: int) -> int:
    """With both cases of each letter, as names are compared."""
    upper, lower = _of("AZ"), _of("az")
    return characters | (characters & upper) << 32 | (characters & lower) >> 32


@dataclass(frozen=True, slots=True)
class _One:
    """Any character of a set."""

    characters: int


@dataclass(frozen=True, slots=True)
class _Edge:
    """The beginning or the end of the name."""

    end: bool


@dataclass(frozen=True, slots=True)
class _Row:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Either:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: _Node
    least: int
    most: int | None


_Node: TypeAlias = _One | _Edge | _Row | _Either | _Repeat


class _Reader:
    """Recursive descent over the pattern."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def wrong(self, why: str) -> ConfigError:
        return ConfigError(f"regexp {self._text[:MAX_PATTERN]!r}: {why}")

    def _peek(self, octets: int = 1) -> str:
        return self._text[self._at : self._at + octets]

    def _accept(self, word: str) -> bool:
        if not self._text.startswith(word, self._at):
            return False
        self._at += len(word)
        return True

    def _next(self, wanted: str) -> str:
        if self._at >= len(self._text):
            raise self.wrong(f"it ends where {wanted} is expected")
        self._at += 1
        return self._text[self._at - 1]

    def whole(self) -> _Node:
        found = self._either()
        if self._at < len(self._text):
            raise self.wrong("unexpected )")
        return found

    def _either(self) -> _Node:
        parts = [self._row()]
        while self._accept("|"):
            parts.append(self._row())
        return parts[0] if len(parts) == 1 else _Either(tuple(parts))

    def _row(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return _Row(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        if self._accept("*"):
            found = _Repeat(part, 0, None)
        elif self._accept("+"):
            found = _Repeat(part, 1, None)
        elif self._accept("?"):
            found = _Repeat(part, 0, 1)
        elif self._peek() == "{" and (bounds := self._bounds()) is not None:
            found = _Repeat(part, *bounds)
        else:
            return part
        self._accept("?")
        if self._peek() in ("*", "+", "?") or (self._peek() == "{" and self._bounds() is not None):
            raise self.wrong("one repetition follows another; put the first into ( )")
        return found

    def _bounds(self) -> tuple[int, int | None] | None:
        """`{m}`, `{m,}` or `{m,n}`; other braces are literal."""
        inside, brace, _ = self._text[self._at + 1 :].partition("}")
        first, comma, last = inside.partition(",")
        if not brace or not _number(first) or not (last == "" or _number(last)):
            return None
        least = int(first)
        most = (int(last) if last else None) if comma else least
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            raise self.wrong(f"{{{inside}}} is no repetition; at most {MAX_REPEAT}, the lower number first")
        self._at += len(inside) + 2
        return least, most

    def _atom(self) -> _Node:
        match self._next("a character"):
            case ".":
                return _One(_ALL & ~_of("\n"))
            case "^":
                return _Edge(end=False)
            case "$":
                return _Edge(end=True)
            case "(":
                return self._group()
            case "[":
                return _One(self._set())
            case "\\":
                letter = self._peek()
                if letter in ("A", "z"):
                    self._at += 1
                    return _Edge(end=letter == "z")
                return _One(self._escaped())
            case "*" | "+" | "?" as character:
                raise self.wrong(f"nothing is in front of {character}")
            case character:
                return _One(_literal(character))

    def _group(self) -> _Node:
        if self._accept("?"):
            if self._accept("P<") or self._accept("<"):
                name, close, _ = self._text[self._at :].partition(">")
                if not close or not name.isidentifier():
                    raise self.wrong("a group's name is (?P<NAME>")
                self._at += len(name) + 1
            elif self._accept("i)"):
                return _Row(())
            elif not (self._accept("i:") or self._accept(":")):
                raise self.wrong("of (?... only (?: (?i) and (?P<NAME> are understood")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self.wrong(f"more than {MAX_DEPTH} groups within each other")
        found = self._either()
        self._depth -= 1
        if self._next(")") != ")":
            raise self.wrong("a group is not closed")
        return found

    def _escaped(self) -> int:
        letter = self._next("what \\ escapes")
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        if letter.isalnum():
            raise self.wrong(f"\\{letter} is not understood")
        return _literal(letter)

    def _set(self) -> int:
        negated = self._accept("^")
        found, first = 0, True
        while first or self._peek() != "]":
            first = False
            if self._accept("[:"):
                name, close, _ = self._text[self._at :].partition(":]")
                if not close or name not in _NAMED:
                    raise self.wrong(f"[:{name[:20]}:] is no class; there are {', '.join(_NAMED)}")
                self._at += len(name) + 2
                found |= _NAMED[name]
                continue
            low = self._character()
            if self._peek() == "-" and self._peek(2) not in ("-]", "-"):
                self._at += 1
                found |= self._range(low, self._character())
            else:
                found |= low
        self._at += 1
        return _ALL & ~_folded(found) if negated else found

    def _character(self) -> int:
        character = self._next("] of a class")
        return self._escaped() if character == "\\" else _literal(character)

    def _range(self, low: int, high: int) -> int:
        first, last = low.bit_length() - 1, high.bit_length() - 1
        if low.bit_count() != 1 or high.bit_count() != 1 or first > last:
            raise self.wrong("a range of a class goes from one character up to another")
        return (1 << last + 1) - (1 << first)


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _literal(character: str) -> int:
    return 1 << ord(character) if ord(character) < 256 else 0  # a name has none beyond


def _size(node: _Node) -> int:
    """Instructions that `node` becomes."""
    match node:
        case _One() | _Edge():
            return 1
        case _Row(parts):
            return sum(map(_size, parts))
        case _Either(parts):
            return sum(map(_size, parts)) + 2 * (len(parts) - 1)
        case _Repeat(part, least, most):
            return _size(part) * (least + 1 if most is None else most) + 2 * (1 if most is None else most - least)


@dataclass(slots=True)
class _Step:
    """One instruction: a set of characters to be matched, an edge to stand at, or a choice of where to go on."""

    characters: int = -1
    edge: _Edge | None = None
    targets: tuple[int, ...] = ()


class Pattern:
    """A compiled pattern. `search` is as Go's `MatchString`: anywhere in the name. Raises `ConfigError` at construction."""

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_PATTERN:
            raise ConfigError(f"regexp {text[:40]!r}...: longer than {MAX_PATTERN} characters")
        reader = _Reader(text)
        tree = reader.whole()
        if _size(tree) > MAX_PROGRAM:
            raise reader.wrong(f"its repetitions come to more than {MAX_PROGRAM} steps")
        self._program: list[_Step] = []
        self._emit(tree)
        self._match = len(self._program)
        self._first = self._reached({0}, start=True)
        self._again = self._reached({0})
        self._known: dict[tuple[frozenset[int], int], frozenset[int]] = {}

    def _emit(self, node: _Node) -> None:
        program = self._program
        match node:
            case _One(characters):
                program.append(_Step(characters=_folded(characters)))
            case _Edge():
                program.append(_Step(edge=node))
            case _Row(parts):
                for part in parts:
                    self._emit(part)
            case _Either(parts):
                ends = []
                for part in parts[:-1]:
                    fork = _Step(targets=(len(program) + 1,))
                    program.append(fork)
                    self._emit(part)
                    ends.append(_Step())
                    program.append(ends[-1])
                    fork.targets = (*fork.targets, len(program))
                self._emit(parts[-1])
                for end in ends:
                    end.targets = (len(program),)
            case _Repeat(part, least, most):
                self._emit_repeat(part, least, most)

    def _emit_repeat(self, part: _Node, least: int, most: int | None) -> None:
        program = self._program
        for _ in range(least):
            self._emit(part)
        if most is None:
            fork, at = _Step(), len(program)
            program.append(fork)
            self._emit(part)
            program.append(_Step(targets=(at,)))
            fork.targets = (at + 1, len(program))
            return
        forks = []
        for _ in range(most - least):
            forks.append(_Step(targets=(len(program) + 1,)))
            program.append(forks[-1])
            self._emit(part)
        for fork in forks:
            fork.targets = (*fork.targets, len(program))

    def _reached(self, places: set[int], *, start: bool = False, end: bool = False) -> frozenset[int]:
        """Where one can be without reading a character."""
        found: set[int] = set()
        todo = list(places)
        while todo:
            at = todo.pop()
            if at in found:
                continue
            found.add(at)
            if at == self._match:
                continue
            step = self._program[at]
            if step.edge is not None:
                if end if step.edge.end else start:
                    todo.append(at + 1)
            elif step.targets:
                todo += step.targets
        return frozenset(found)

    def _read(self, places: frozenset[int], code: int) -> frozenset[int]:
        program, match = self._program, self._match
        after = {
            at + 1
            for at in places
            if at != match and program[at].characters >= 0 and program[at].characters >> code & 1
        }
        return self._reached(after) | self._again

    def search(self, name: str) -> bool:
        """Whether the pattern matches somewhere in `name`, whose characters are below 256."""
        places, match = self._first, self._match
        for code in name.encode("latin-1", "replace"):
            if match in places:
                return True
            key = (places, code)
            after = self._known.get(key)
            if after is None:
                if len(self._known) >= MAX_REMEMBERED:
                    self._known.clear()
                after = self._known[key] = self._read(places, code)
            places = after
        return match in self._reached(set(places), start=not name, end=True)
