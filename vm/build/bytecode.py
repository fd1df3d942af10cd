"""Python's sources of an image, compiled beforehand: Debian's packages do that as they are installed, and here nobody does.

Without it a Python program compiles the standard library at each start of the machine, which takes seconds under emulation. It
is done by this Python, so only for images with the same version. A process of its own does it, with what would make a difference
from one time to the next (random order of sets, times) switched off; what comes out is kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from netstack.errors import HostError
from vm.build.archive import Cache, unpack, whole
from vm.build.tree import Entry, Tree

LIBRARY: Final = f"usr/lib/python3.{sys.version_info.minor}"
_PLACES: Final = (f"{LIBRARY}/", "usr/lib/python3/dist-packages/")
MAX_FILES: Final = 5_000
MAX_SOURCE: Final = 1 << 20
COMPILE_S: Final = 600
_FORMAT: Final = 1
_COMPILE: Final = """\
import compileall, py_compile, sys
compileall.compile_dir(sys.argv[1], maxlevels=20, quiet=2, force=True, stripdir=sys.argv[1], prependdir="/",
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


def add(tree: Tree, cache: Cache) -> Tree:
    """`tree` with its Python modules compiled; itself where it has no Python of our version."""
    if tree.get(LIBRARY) is None:
        return tree
    sources = list(_sources(tree))
    key = hashlib.sha256(f"{_FORMAT} {sys.version}".encode())
    for path, entry in sources:
        key.update(f"{path}\0{hashlib.sha256(entry.read(MAX_SOURCE)).hexdigest()}\0".encode(errors="surrogateescape"))

    def fill(out: BinaryIO) -> None:
        with cache.scratch() as scratch:
            _compile(sources, scratch / "tree")
            with tarfile.open(fileobj=out, mode="w") as tar:
                for found in sorted(scratch.glob("tree/**/*.pyc")):
                    tar.add(found, str(found.relative_to(scratch / "tree")), filter=_plain)

    kept = cache.keep(f"bytecode/{key.hexdigest()}.tar", fill)
    made = Tree()
    made.merge(tree)
    unpack(whole(kept), made, "compiled Python")
    return made


def _sources(tree: Tree) -> Iterator[tuple[str, Entry]]:
    count = 0
    for path, entry in tree.walk():
        if path.startswith(_PLACES) and path.endswith(".py") and entry.is_file() and entry.size <= MAX_SOURCE:
            count += 1
            if count > MAX_FILES:
                return
            yield path, entry


def _compile(sources: list[tuple[str, Entry]], directory: Path) -> None:
    for path, entry in sources:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(entry.read(MAX_SOURCE))
    environment = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-P", "-S", "-c", _COMPILE, str(directory)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"Python modules could not be compiled: {error}") from None
    if done.returncode:
        raise HostError(f"Python modules could not be compiled: {done.stderr.strip()[-200:]}")


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mode, info.mtime, info.uid, info.gid, info.uname, info.gname = 0o644, 0, 0, 0, "", ""
    return info
