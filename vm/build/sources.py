"""Image references that need no registry, and what is behind them.

    dir:PATH                         a directory; owners become root, sockets are left out
    tar:FILE                         a tar, plain or compressed by gzip, xz, bzip2 or zstd
    deb:PACKAGE[=VERSION][,...]      Debian packages with what they depend on; -PACKAGE leaves one out, -/PATTERN paths
    oci-layout:DIRECTORY[:NAME]      an image as skopeo, crane, buildah and `docker buildx build -o type=oci` write it
    docker-archive:FILE[:NAME:TAG]   an image as `docker save` writes it
    python:MODULE[,...]              Python packages or modules, as this Python finds them, for one in the image

Several joined by `;` are laid over each other. Paths are relative to where the YAML is.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from vm.build import bytecode, debian, oci
from vm.build.archive import Cache, plain, unpack, whole
from vm.build.tree import Entry, Slice, Tree

SITE: Final = "usr/lib/python3/dist-packages"
"""Where Debian's Pythons look, whichever their version."""
MAX_TOLD: Final = 72
"""Characters of a reference that is shown as progress."""
_SOURCE: Final = stat.S_IFREG | 0o644
_NO_REGISTRY: Final = (
    "image {0!r}: there is no registry here. Save it (`skopeo copy docker://{0} oci:DIR:NAME`) and write oci-layout:DIR:NAME, "
    "or `docker save` it and write docker-archive:FILE; or make it of dir:, tar: and deb: sources"
)


@dataclass(frozen=True, slots=True)
class Image:
    """What a reference leads to. Whoever changes the tree copies it first (`Tree.merge`)."""

    tree: Tree
    config: oci.Config


class Sources:
    """Images by reference, each of them found once. `base` is what relative paths start at."""

    def __init__(self, cache: Cache, base: Path, progress: Callable[[str], None] = lambda text: None) -> None:
        self.cache = cache
        self.base = base
        self.progress = progress
        self._images: dict[str, Image] = {}

    def image(self, reference: str) -> Image:
        """Raises `ConfigError` for what cannot be used, `HostError` for what cannot be had."""
        if reference not in self._images:
            self.tell(reference)
            self._images[reference] = self._made(reference)
        return self._images[reference]

    def tell(self, reference: str) -> None:
        """That this one is being looked for, in a line."""
        self.progress(reference if len(reference) <= MAX_TOLD else reference[: MAX_TOLD - 3] + "...")

    def _made(self, reference: str) -> Image:
        first, *others = [self._one(part) for part in reference.split(";")]
        tree = first.tree
        if others:
            tree = Tree()
            for image in (first, *others):
                tree.merge(image.tree)
        return Image(bytecode.add(tree, self.cache), first.config)

    def _one(self, reference: str) -> Image:
        scheme, colon, rest = reference.partition(":")
        tree, config = Tree(), oci.Config()
        match scheme if colon and rest else "":
            case "dir":
                add_directory(tree, self.base / rest, reference)
            case "tar":
                unpack(plain(whole(self.base / rest), self.cache, reference), tree, reference)
            case "deb":
                tree = debian.tree(debian.Wanted.parse(rest), self.cache)
            case "python":
                for name in rest.split(","):
                    add_module(tree, name)
            case "oci-layout":
                tree, config = oci.layout(*self._named(rest), self.cache)
            case "docker-archive":
                tree, config = oci.saved(*self._named(rest), self.cache)
            case _:
                raise ConfigError(_NO_REGISTRY.format(reference))
        return Image(tree, config)

    def _named(self, rest: str) -> tuple[Path, str]:
        """`PATH:NAME` taken apart where the path ends that is there: either may have colons."""
        words = rest.split(":")
        for count in range(len(words), 0, -1):
            path = self.base / ":".join(words[:count])
            if path.exists():
                return path, ":".join(words[count:])
        raise ConfigError(f"{self.base / rest}: there is no such file or directory")


def add_directory(tree: Tree, directory: Path, what: str) -> None:
    """What is in a directory of the host, by root. Links are taken as they are."""
    if not directory.is_dir():
        raise ConfigError(f"{what}: {directory} is not a directory")
    for path, entry in _entries(directory.resolve(), "", frozenset()):
        tree.add(path, entry)


def _entries(directory: Path, at: str, skip: frozenset[str]) -> Iterator[tuple[str, Entry]]:
    with os.scandir(directory) as scan:
        found = sorted(scan, key=lambda one: one.name)
    for one in found:
        status = one.stat(follow_symlinks=False)
        path, kind = f"{at}/{one.name}", stat.S_IFMT(status.st_mode)
        if one.name in skip or kind == stat.S_IFSOCK:
            continue
        entry = Entry(mode=status.st_mode)
        if kind == stat.S_IFREG:
            entry = replace(entry, content=Slice(Path(one.path), 0, status.st_size))
        elif kind == stat.S_IFLNK:
            entry = replace(entry, content=os.fsencode(os.readlink(one.path)))
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            entry = replace(entry, device=(os.major(status.st_rdev), os.minor(status.st_rdev)))
        yield path, entry
        if kind == stat.S_IFDIR:
            yield from _entries(Path(one.path), path, skip)


def add_module(tree: Tree, name: str) -> None:
    """A Python package that is on this interpreter's path, or a module, also one of a package (`netstack.errors`).

    None is imported. Of the packages around a module only their `__init__.py` comes along.
    """
    top, *inner = name.split(".")
    try:
        found = importlib.util.find_spec(top) if all(word.isidentifier() for word in (top, *inner)) else None
    except (ImportError, ValueError):
        found = None
    at = Path(found.origin) if found and found.origin else Path()
    path = SITE
    while inner and at.name == "__init__.py":
        path = f"{path}/{at.parent.name}"
        tree.add(f"{path}/__init__.py", Entry(mode=_SOURCE, content=whole(at)))
        package, module = at.parent / inner[0] / "__init__.py", at.parent / f"{inner.pop(0)}.py"
        at = package if package.is_file() else module
    if inner or not at.is_file():
        raise ConfigError(f"python:{name}: Python's path has no package or module of this name")
    if at.name != "__init__.py":
        tree.add(f"{path}/{at.name}", Entry(mode=_SOURCE, content=whole(at)))
        return
    for inside, entry in _entries(at.parent, f"{path}/{at.parent.name}", frozenset({"__pycache__"})):
        if entry.is_file():  # whatever modes a checkout has
            tree.add(inside, replace(entry, mode=_SOURCE))
