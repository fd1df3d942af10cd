"""YAML whose values know the line they stand on, so that every complaint can be made at once and with its place.

Nothing is converted: a scalar keeps its text, and who reads it says what it wants. YAML 1.1's own ideas (`22:22` is 1342) get no
say; what Go's libraries would take for a number, a truth value or nothing (`meaning`) is told apart from text, because other
programs read the same files.

A file is bounded in octets, and what aliases make of it in values, depth and characters: nine lines of aliases of aliases are a
billion values otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from netstack.errors import ConfigError

MAX_OCTETS: Final = 8 << 20
"""Of a file; files are written into LinuxKit's YAML by their contents."""
MAX_VALUES: Final = 100_000
"""Of a document with its aliases followed."""
MAX_CHARACTERS: Final = 32 << 20
"""Of all texts of a document with its aliases followed."""
MAX_DEPTH: Final = 64
MAX_COMPLAINTS: Final = 100

_INT: Final = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", re.ASCII)
_FLOAT: Final = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII
)
_NULL: Final = ("", "~", "null", "Null", "NULL")
TRUTH: Final[Mapping[str, bool]] = {
    spelling: value
    for value, words in ((True, ("y", "yes", "on", "true")), (False, ("n", "no", "off", "false")))
    for word in words
    for spelling in (word, word.title(), word.upper())
}
"""What Go's yaml.v2 takes for a truth value where it stands without quotes."""


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in a file; without a line where the value never stood in one."""

    name: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar as it is written; `plain` without quotes, where it may mean more than text."""

    text: str
    mark: Mark
    plain: bool = True

    @property
    def meaning(self) -> str:
        """`text`, or what it is to other programs: `number`, `truth`, `nothing`."""
        if not self.plain:
            return "text"
        if self.text in _NULL:
            return "nothing"
        if self.text in TRUTH:
            return "truth"
        return "number" if _INT.fullmatch(self.text) or _FLOAT.fullmatch(self.text) else "text"


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence."""

    values: tuple[Value, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping, in the order of the file; each key once."""

    entries: tuple[tuple[Text, Value], ...]
    mark: Mark


Value: TypeAlias = Text | Items | Table


class ConfigErrors(ConfigError):
    """All complaints about a file, one line each."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = tuple(complaints)


class Complaints:
    """Gathers what is wrong, each with its place."""

    def __init__(self) -> None:
        self._found: list[tuple[Mark, str]] = []

    def add(self, mark: Mark, text: str) -> None:
        self._found.append((mark, text))

    def __len__(self) -> int:
        return len(self._found)

    def lines(self) -> list[str]:
        """`file:line:column: what is wrong; what would be accepted`, in the order of the file."""
        lines = [f"{mark}: {text}" for mark, text in sorted(set(self._found))]
        left = len(lines) - MAX_COMPLAINTS
        return lines if left <= 0 else [*lines[:MAX_COMPLAINTS], f"and {left} more"]

    def raise_any(self) -> None:
        """Raises `ConfigErrors` if there is anything to complain about."""
        if self._found:
            raise ConfigErrors(self.lines())


def meant(word: str, known: Iterable[str]) -> str:
    """A question for who wrote `word`, or all that is known."""
    choices = sorted(known)
    close = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(choices)}"


def quoted(text: str) -> str:
    """`text` in a complaint, bounded."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def read(path: Path) -> str:
    """The text of a file; raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            octets = file.read(MAX_OCTETS + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a YAML file that can be read") from None
    if len(octets) > MAX_OCTETS:
        raise ConfigError(f"{path}: is longer than {MAX_OCTETS >> 20} MiB; keep what is large in files of its own")
    try:
        return octets.decode()
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not YAML: an octet that is no UTF-8; save it as UTF-8") from None


def parse(text: str, name: str, complaints: Complaints) -> Value | None:
    """The one document of `text`; `None` when it is empty or is no YAML, which is complained about. `name` stands in marks."""
    if len(text) > MAX_OCTETS:
        complaints.add(Mark(name), f"is longer than {MAX_OCTETS >> 20} MiB; keep what is large in files of its own")
        return None
    loader: Any = None  # its stubs lack what a node is
    try:
        loader = _Loader(text, name)
        if not loader.check_node():
            return None
        node = loader.get_node()
        if loader.check_node():
            second = loader.get_node()
            complaints.add(_mark(name, second.start_mark), "a second document begins; give a file for each")
        return _Converter(name, complaints).value(node, 0)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        complaints.add(_mark(name, at) if at else Mark(name), f"not YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        complaints.add(Mark(name, line, column), f"not YAML: {error.reason}")
    except (ValueError, OverflowError):  # of chr() and int(): "\UFFFFFFFF", or %YAML with 5000 digits
        at = loader.get_mark() if loader is not None else None
        complaints.add(_mark(name, at) if at else Mark(name), "not YAML: a number beyond what there is")
    except RecursionError:
        complaints.add(Mark(name), f"not YAML: nested deeper than {MAX_DEPTH}")
    except _TooMuch as error:
        complaints.add(error.mark, str(error))
    return None


def of_plain(document: Any, where: str, depth: int = 0) -> Value:
    """What JSON decodes to, as values without a line. Raises `ConfigError`."""
    mark = Mark(where)
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}")
    match document:
        case Mapping():
            entries = (
                (Text(str(key), mark, False), of_plain(value, where, depth + 1)) for key, value in document.items()
            )
            return Table(tuple(entries), mark)
        case list() | tuple():
            return Items(tuple(of_plain(value, where, depth + 1) for value in document), mark)
        case bool() | None:
            return Text({True: "true", False: "false", None: "null"}[document], mark)
        case int() | float():
            return Text(str(document), mark)
        case str():
            return Text(document, mark, False)
    raise ConfigError(f"{where}: {document!r:.80} is nothing that JSON has")


def _mark(name: str, at: Any) -> Mark:
    return Mark(name, at.line + 1, at.column + 1)


class _TooMuch(Exception):
    def __init__(self, mark: Mark, text: str) -> None:
        super().__init__(text)
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """Stops before there are too many nodes to hold; each is half a kilobyte, and two octets of YAML make one."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._name = name
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        self._depth += 1
        if self._nodes > 2 * MAX_VALUES:  # keys count here
            raise self._too_much(f"more than {MAX_VALUES} values; split the file")
        if self._depth > MAX_DEPTH + 1:
            raise self._too_much(f"nested deeper than {MAX_DEPTH}")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _too_much(self, text: str) -> _TooMuch:
        events: Any = self  # whose types are not written
        return _TooMuch(_mark(self._name, events.peek_event().start_mark), text)


class _Converter:
    """PyYAML's nodes to values; an alias is the same node again, so what they come to is counted here."""

    def __init__(self, name: str, complaints: Complaints) -> None:
        self._name = name
        self._complaints = complaints
        self._values = 0
        self._characters = 0

    def value(self, node: Any, depth: int) -> Value:
        mark = _mark(self._name, node.start_mark)
        self._values += 1
        if self._values > MAX_VALUES:
            raise _TooMuch(mark, f"more than {MAX_VALUES} values with the aliases followed; use fewer aliases")
        if depth > MAX_DEPTH:
            raise _TooMuch(mark, f"nested deeper than {MAX_DEPTH}; an alias may not lie in what it names")
        if node.id == "scalar":
            self._characters += len(node.value)
            if self._characters > MAX_CHARACTERS:
                raise _TooMuch(
                    mark, f"more than {MAX_CHARACTERS} characters with the aliases followed; use fewer aliases"
                )
            return Text(node.value, mark, node.style is None)
        if node.id == "sequence":
            return Items(tuple(self.value(item, depth + 1) for item in node.value), mark)
        return Table(tuple(self._entries(node, depth).values()), mark)

    def _entries(self, node: Any, depth: int) -> dict[str, tuple[Text, Value]]:
        own: dict[str, tuple[Text, Value]] = {}
        merged: dict[str, tuple[Text, Value]] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar":
                self._complaints.add(_mark(self._name, key_node.start_mark), "a key must be a plain word")
                continue
            key = Text(key_node.value, _mark(self._name, key_node.start_mark), key_node.style is None)
            value = self.value(value_node, depth + 1)
            if key.plain and key.text == "<<":
                self._merge(value, merged)
            elif (first := own.get(key.text)) is not None:
                text = f"{quoted(key.text)} is given twice (first on line {first[0].mark.line}); keep one"
                self._complaints.add(key.mark, text)
            else:
                own[key.text] = (key, value)
        return {**own, **{key: entry for key, entry in merged.items() if key not in own}}

    def _merge(self, value: Value, into: dict[str, tuple[Text, Value]]) -> None:
        """YAML's merge key: the mapping's own keys go first, then those of earlier mappings."""
        for table in value.values if isinstance(value, Items) else (value,):
            if not isinstance(table, Table):
                self._complaints.add(table.mark, "<<: a mapping is wanted, or a list of them, such as <<: *defaults")
                continue
            for key, inner in table.entries:
                into.setdefault(key.text, (key, inner))
