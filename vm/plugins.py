"""Companions by their names: ours, imported when they are wanted, and those of others by entry points.

    [project.entry-points."pyvpnkit.companions"]
    bhyve = "their_package.driver:Bhyve"        # an object, or a class that is made without arguments

Ours come first: what is installed besides cannot change what a name of ours means.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Generic, TypeVar

from netstack.errors import ConfigError

T = TypeVar("T")


class Plugins(Generic[T]):
    """The companions of one kind. `ours` is `module:NAME` by name; `wanted` are the attributes that one of theirs has to have."""

    def __init__(self, what: str, group: str, ours: Mapping[str, str], wanted: Sequence[str]) -> None:
        self.what: Final = what
        self.group: Final = group
        self._ours = ours
        self._wanted = wanted

    def names(self) -> list[str]:
        """Those there are; nothing is imported for it."""
        return sorted({*self._ours, *(point.name for point in entry_points(group=self.group))})

    def load(self, name: str) -> T:
        """Raises `ConfigError`: there is no such companion (with those there are), or that of another package is broken."""
        if name in self._ours:
            module, _, attribute = self._ours[name].partition(":")
            found: T = getattr(importlib.import_module(module), attribute)
            return found
        points = {point.value: point for point in entry_points(group=self.group, name=name)}
        if not points:
            raise ConfigError(self._unknown(name))
        if len(points) > 1:
            packages = " and ".join(sorted(_package(point) for point in points.values()))
            raise ConfigError(f"{self.what} {name!r}: both {packages} have one of that name; uninstall one of them")
        return self._theirs(next(iter(points.values())))

    def _unknown(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name.lower(), names, 1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        return f"{self.what} {name!r}: there is none of that name{meant} (there are {', '.join(names)})"

    def _theirs(self, point: EntryPoint) -> T:
        broken = f"{self.what} {point.name!r} of {_package(point)} ({point.value})"
        try:
            found = point.load()
            if isinstance(found, type):
                found = found()
        except (Exception, SystemExit) as error:  # another's code: whatever goes wrong in it is told
            raise ConfigError(f"{broken} cannot be loaded: {type(error).__name__}: {error}") from error
        missing = [attribute for attribute in self._wanted if not hasattr(found, attribute)]
        if missing:
            raise ConfigError(f"{broken} is no {self.what}: it has no {', '.join(missing)}")
        loaded: T = found
        return loaded


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"
