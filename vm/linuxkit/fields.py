"""Between a frozen dataclass and its YAML: the dataclass is the one definition of keys, shapes and checks.

A field's key is its name in camel case unless `key` says otherwise. A field that is not given is `None`, which is something else
than an empty list: the first leaves the image's own value, the second takes it away. `mark` is where the value stands.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Any, Final, TypeVar

import yaml

from netstack.errors import ConfigError
from vm.yaml_lines import TRUTH, Complaints, Items, Mark, Table, Text, Value, meant, quoted

T = TypeVar("T")
Check = Callable[[Any], Any]
"""Returns the value, maybe in its usual spelling, or raises `ConfigError`."""

_HIDDEN: Final = "mark"
NO_KEY: Final = "-"
"""Of a field that a file cannot say."""
_BAD: Final = object()
"""Stands for a value that was complained about."""


def key(name: str = "", *, check: Check | None = None, required: bool = False, default: Any = None) -> Any:
    """A field; `check` is asked about each scalar of it."""
    metadata = {"key": name, "check": check}
    return dataclasses.field(metadata=metadata) if required else dataclasses.field(default=default, metadata=metadata)


def place() -> Any:
    """The field that keeps where a value stands."""
    return dataclasses.field(default=Mark(""), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Known:
    """A field as it is read."""

    name: str
    key: str
    hint: Any
    check: Check | None
    default: Any

    @property
    def required(self) -> bool:
        return self.default is MISSING


def known(cls: type) -> Mapping[str, Known]:
    """The fields of a dataclass by their keys; what must be given comes first."""
    return _known_of(cls)


@functools.cache
def _known_of(cls: Any) -> Mapping[str, Known]:
    hints = typing.get_type_hints(cls)
    shown = [
        field for field in dataclasses.fields(cls) if field.name != _HIDDEN and field.metadata.get("key") != NO_KEY
    ]
    found = [_known(field, hints[field.name]) for field in shown]
    return {one.key: one for one in sorted(found, key=lambda one: not one.required)}


def _known(field: Field[Any], hint: Any) -> Known:
    first, *rest = field.name.split("_")
    name = field.metadata.get("key") or first + "".join(word.title() for word in rest)
    return Known(field.name, name, _given(hint), field.metadata.get("check"), field.default)


def _given(hint: Any) -> Any:
    """`hint` without `None`."""
    if isinstance(hint, types.UnionType):
        left = [one for one in typing.get_args(hint) if one is not types.NoneType]
        return left[0] if len(left) == 1 else int | str
    return hint


class Reader:
    """Values to dataclasses; what is wrong goes to `complaints`, and the rest is read on."""

    def __init__(self, complaints: Complaints, *, foreign: bool = False) -> None:
        """`foreign`: unknown keys are passed over, in what somebody else wrote."""
        self._complaints = complaints
        self._foreign = foreign

    def build(self, cls: type[T], value: Value, what: str) -> T | None:
        """The dataclass, or `None` after a complaint without which it cannot be."""
        if not isinstance(value, Table):
            self._complaints.add(value.mark, f"{what or 'the file'}: a mapping of keys to values is wanted")
            return None
        fields = known(cls)
        given: dict[str, Any] = {}
        tried = set()
        for name, inner in value.entries:
            field = fields.get(name.text)
            if field is None:
                if not self._foreign:
                    where = f"in {what!r}" if what else "at the top"
                    self._complaints.add(
                        name.mark, f"unknown key {quoted(name.text)} {where}{meant(name.text, fields)}"
                    )
                continue
            if isinstance(inner, Text) and inner.meaning == "nothing":
                continue  # `key:` with nothing behind it
            tried.add(field.name)
            found = self._value(field.hint, inner, f"{what}.{field.key}" if what else field.key, field.check)
            if found is not _BAD:
                given[field.name] = found
        whole = True
        for field in fields.values():
            if field.required and field.name not in given:
                whole = False
                if field.name not in tried:
                    self._complaints.add(value.mark, f"{what}: {field.key} is missing")
        if not whole:
            return None
        if any(field.name == _HIDDEN for field in dataclasses.fields(cls)):  # type: ignore[arg-type]
            given[_HIDDEN] = value.mark
        try:
            return cls(**given)
        except ConfigError as error:
            if tried == given.keys() - {_HIDDEN}:  # else it may be for want of what was complained about
                self._complaints.add(value.mark, f"{what}: {error}")
            return None

    def _value(self, hint: Any, value: Value, what: str, check: Check | None) -> Any:
        origin = typing.get_origin(hint)
        if origin is tuple:
            return self._items(typing.get_args(hint)[0], value, what, check)
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(value, what, check)
        if dataclasses.is_dataclass(hint):
            found = self.build(typing.cast(type, hint), value, what)
            return _BAD if found is None else found
        return self._scalar(hint, value, what, check)

    def _items(self, hint: Any, value: Value, what: str, check: Check | None) -> Any:
        if not isinstance(value, Items):
            self._complaints.add(value.mark, f"{what}: a list is wanted, such as [...] or lines that begin with -")
            return _BAD
        found = [self._value(hint, item, what, check) for item in value.values]
        return tuple(one for one in found if one is not _BAD)

    def _mapping(self, value: Value, what: str, check: Check | None) -> Any:
        if not isinstance(value, Table):
            self._complaints.add(value.mark, f"{what}: a mapping of names to texts is wanted")
            return _BAD
        found = {name.text: self._scalar(str, inner, f"{what}.{name.text}", check) for name, inner in value.entries}
        return types.MappingProxyType({name: one for name, one in found.items() if one is not _BAD})

    def _scalar(self, hint: Any, value: Value, what: str, check: Check | None) -> Any:
        if not isinstance(value, Text):
            self._complaints.add(value.mark, f"{what}: a single value is wanted, not a list or a mapping")
            return _BAD
        try:
            found = self._converted(hint, value)
            return found if check is None else check(found)
        except ConfigError as error:
            self._complaints.add(value.mark, f"{what}: {error}")
            return _BAD

    @staticmethod
    def _converted(hint: Any, value: Text) -> Any:
        text, meaning = value.text, value.meaning
        if hint is bool:
            if meaning != "truth":
                raise ConfigError(f"{quoted(text)} is neither true nor false")
            return TRUTH[text]
        if hint is int or (hint == int | str and meaning == "number"):
            return _integer(text, meaning)
        if meaning != "text":
            raise ConfigError(f'{quoted(text)} without quotes is no text but {_MEANS[meaning]}; write "{text}"')
        return text


_MEANS: Final = {"number": "a number", "truth": "a truth value", "nothing": "nothing"}


def _integer(text: str, meaning: str) -> int:
    if meaning == "number" and len(text) <= 32:
        bare = text.replace("_", "")
        digits = bare.lstrip("+-")
        octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
        try:
            return int(bare, 8 if octal else 0)
        except ValueError:
            pass
    raise ConfigError(f"{quoted(text)} is no whole number")


class _Dumper(yaml.SafeDumper):
    """What would be read back as something else than text stands in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    style = '"' if Text(data, Mark("")).meaning != "text" or data == "<<" else "|" if "\n" in data else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _text)


def plain(value: Any) -> Any:
    """A dataclass of fields as dicts, lists and scalars, without what was not given."""
    if dataclasses.is_dataclass(value):
        pairs = ((one, getattr(value, one.name)) for one in known(type(value)).values())
        return {one.key: plain(inner) for one, inner in pairs if inner != one.default}
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def render(value: Any) -> str:
    """The YAML that is read back as the same dataclass."""
    return yaml.dump(plain(value), Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
