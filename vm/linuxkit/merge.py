"""What an image's label adds to its entry in the YAML, and the numbers that stand for names (spec companions 3.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final, TypeVar

from netstack.errors import ConfigError
from vm.linuxkit.fields import Reader, known
from vm.linuxkit.schema import BindNamespaces, Image, ImageConfig, LinuxKit, Runtime
from vm.linuxkit.values import ALL, CAPABILITIES, NONE
from vm.yaml_lines import Complaints, of_plain

LABEL: Final = "org.mobyproject.config"
FIRST_ID: Final = 100
"""Of the first container; each one after it has the next."""

C = TypeVar("C", Runtime, BindNamespaces)


def ids(machine: LinuxKit) -> dict[str, int]:
    """Container name -> the uid and gid that its name stands for; `root` is 0."""
    return {"root": 0, **{image.name: FIRST_ID + number for number, image in enumerate(machine.containers)}}


def number(identity: int | str | None, names: Mapping[str, int]) -> int:
    """A uid or gid of the YAML as a number; 0 when not given. Raises `ConfigError`."""
    if isinstance(identity, str):
        if identity not in names:
            raise ConfigError(f"no container is named {identity!r}, so it is no uid or gid; give its number")
        return names[identity]
    return identity or 0


def label(text: str | Mapping[str, Any], where: str) -> ImageConfig:
    """The value of an image's label (JSON, or what it decodes to). `where` names the image. Raises `ConfigErrors`."""
    where = f"{where}: label {LABEL}"
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: is no JSON ({error}); build the image anew") from None
    complaints = Complaints()
    found = Reader(complaints, foreign=True).build(ImageConfig, of_plain(text, where), LABEL)
    complaints.raise_any()
    assert found is not None
    return found


def merged(image: Image, defaults: ImageConfig) -> Image:
    """`image` with the label's fields where it gives none, and with what both add; nothing is left to add.

    `runtime` and its `bindNS` are merged field by field, all others as a whole.
    """
    left = {
        field.name: theirs
        for field in known(ImageConfig).values()
        if getattr(image, field.name) is None and (theirs := getattr(defaults, field.name)) is not None
    }
    if image.runtime is not None and defaults.runtime is not None:
        left["runtime"] = _runtime(image.runtime, defaults.runtime)
    whole = replace(image, **left)
    return replace(
        whole,
        capabilities=_added(whole.capabilities, defaults.capabilities_add, image.capabilities_add),
        capabilities_add=None,
        binds=_added(whole.binds, defaults.binds_add, image.binds_add),
        binds_add=None,
    )


def capabilities(given: tuple[str, ...] | None) -> tuple[str, ...]:
    """Their names, with `all` and `none` taken at their word."""
    names = tuple(one for one in given or () if one != NONE)
    return CAPABILITIES if ALL in names else names


def _added(base: tuple[str, ...] | None, *more: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """In the order given, each once."""
    if base is None and not any(more):
        return None
    return tuple(dict.fromkeys(one for some in (base, *more) for one in some or ()))


def _runtime(ours: Runtime, theirs: Runtime) -> Runtime:
    whole = _over(ours, theirs)
    if ours.bind_ns is not None and theirs.bind_ns is not None:
        whole = replace(whole, bind_ns=_over(ours.bind_ns, theirs.bind_ns))
    return whole


def _over(ours: C, theirs: C) -> C:
    return replace(
        theirs, **{field.name: one for field in fields(ours) if (one := getattr(ours, field.name)) is not None}
    )
