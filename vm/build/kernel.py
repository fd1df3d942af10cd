"""The kernel and its modules, out of an image: Debian's package, or LinuxKit's `kernel` and `kernel.tar`.

    deb:linux-image-amd64                       the modules that a virtual machine wants (`LOADED`, `KEPT`)
    deb:linux-image-amd64?modules=9p,virtio_net those and what they depend on
    deb:linux-image-amd64?modules=all           every one: a large initramfs

`LOADED`, or the chosen ones, are loaded at boot, in the order of `lib/modules/RELEASE/load`; the others are there for modprobe,
with `modules.dep` and `modules.alias` as depmod would write them: the package is not installed, so nobody has run depmod.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from vm.build import debian
from vm.build.archive import Cache, plain, unpack, whole
from vm.build.sources import Sources, add_directory
from vm.build.tree import MAX_READ, Entry, Slice, Tree
from vm.linuxkit.schema import Kernel

LOADED: Final = tuple(
    "virtio_pci virtio_mmio virtio_net virtio_blk virtio_console virtio_rng 9pnet_virtio 9pnet_fd 9p fuse virtiofs vsock "
    "vmw_vsock_virtio_transport button evdev overlay".split()
)
"""What a hypervisor's devices, shares, the power button and images in two places want."""
KEPT: Final = tuple("ext4 loop isofs sr_mod vfat tun vsock_loopback".split())
ALL: Final = "all"
MAX_MODULE: Final = 64 << 20
_FORMAT: Final = 1
"""Of what is kept in the cache."""
_RELEASE: Final = re.compile(r"(?:usr/)?lib/modules/([^/]+)/(.*)")
_MODULE: Final = re.compile(r"([^/]+)\.ko(\.xz|\.gz)?")


@dataclass(frozen=True, slots=True)
class Picked:
    """The kernel's file, and `lib/modules` with what was chosen."""

    binary: Entry
    modules: Tree
    release: str
    """Empty where there are no modules."""
    microcode: Entry | None = None
    """An archive that goes before everything else."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A module, decompressed."""

    path: str
    """Under the release's directory."""
    octets: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def pick(wanted: Kernel, sources: Sources) -> Picked:
    """The kernel of a YAML. Raises `ConfigError` and `HostError`."""
    if wanted.image is None:
        raise ConfigError("kernel.image is not given: deb:linux-image-amd64 would do")
    reference, question, query = wanted.image.partition("?")
    key, _, chosen = query.partition("=")
    if question and (key != "modules" or not chosen):
        raise ConfigError(
            f"kernel.image {wanted.image!r}: after `?`, modules=all or modules=NAME,NAME would be accepted"
        )
    modules = tuple(chosen.split(",")) if chosen else ()
    if reference.startswith("deb:"):
        if wanted.binary or wanted.tar or wanted.ucode:
            raise ConfigError(f"kernel: binary, tar and ucode are of other images than {reference}; leave them out")
        sources.tell(reference)
        return from_package(reference.removeprefix("deb:"), modules, sources.cache)
    tree = sources.image(reference).tree
    return pick_from(tree, wanted, modules, sources.cache)


def from_package(package: str, modules: tuple[str, ...], cache: Cache) -> Picked:
    """Of a Debian package `linux-image-*`, or of the one that it depends on. What is picked is kept; 0.4 GB are not."""
    choice = replace(debian.Wanted.parse(package), only="linux-image-")
    packages = debian.packages(choice, cache)
    digests = [one.sha256 for one, _ in packages]
    key = hashlib.sha256(json.dumps([_FORMAT, digests, modules, LOADED, KEPT]).encode()).hexdigest()
    kept = cache.directory / "kernel" / key
    if not kept.is_dir():
        with cache.scratch() as scratch:
            tree = Tree()
            for one, deb in packages:
                what = f"deb:{one.name}"
                unpack(plain(debian.data(deb, what), Cache(scratch), what, one.sha256), tree, what)
            picked = pick_from(tree, Kernel(image=f"deb:{package}"), modules, cache)
            _store(picked, scratch / "picked")
            cache.move(scratch / "picked", f"kernel/{key}")
    tree = Tree()
    add_directory(tree, kept / "tree", package)
    return Picked(_file(kept / "kernel"), tree, (kept / "release").read_text())


def _store(picked: Picked, directory: Path) -> None:
    """For `from_package`: plain files of names that `_chosen` made, in a new directory."""
    (directory / "tree").mkdir(parents=True)
    (directory / "kernel").write_bytes(picked.binary.read(MAX_MODULE))
    (directory / "release").write_text(picked.release)
    for path, entry in picked.modules.walk():
        if entry.is_dir():
            (directory / "tree" / path).mkdir(mode=0o755)
        else:
            (directory / "tree" / path).write_bytes(entry.read(MAX_MODULE))
            (directory / "tree" / path).chmod(0o644)


def _file(path: Path) -> Entry:
    return Entry(mode=stat.S_IFREG | 0o644, content=whole(path))


def pick_from(tree: Tree, wanted: Kernel, modules: tuple[str, ...], cache: Cache) -> Picked:
    """The kernel in a tree, with the modules that are named, or those that a virtual machine wants. Raises `ConfigError`."""
    binary = tree.get(wanted.binary or "kernel")
    if binary is None and wanted.binary is None:
        found = [entry for path, entry in tree.walk() if re.fullmatch(r"boot/vmlinuz-[^/]+", path) and entry.is_file()]
        if len(found) > 1:
            raise ConfigError(f"{wanted.image}: {len(found)} kernels in /boot; say with kernel.binary which")
        binary = found[0] if found else None
    if binary is None or not binary.is_file():
        raise ConfigError(f"{wanted.image}: no kernel: neither {wanted.binary or 'kernel'} nor boot/vmlinuz-*")
    microcode = tree.get(wanted.ucode) if wanted.ucode else None
    if wanted.ucode and (microcode is None or not microcode.is_file()):
        raise ConfigError(f"{wanted.image}: has no {wanted.ucode}, which kernel.ucode names")
    tar = None if wanted.tar == "none" else tree.get(wanted.tar or "kernel.tar")
    if tar is None and wanted.tar not in (None, "none"):
        raise ConfigError(f"{wanted.image}: has no {wanted.tar}, which kernel.tar names")
    if tar is not None:
        tree = Tree()
        content = tar.content
        if not isinstance(content, Slice):
            raise ConfigError(f"{wanted.image}: {wanted.tar or 'kernel.tar'} is not a tar")
        unpack(plain(content, cache, f"{wanted.image}: kernel.tar"), tree, f"{wanted.image}: kernel.tar")
    if wanted.tar == "none":
        return Picked(binary, Tree(), "", microcode)
    return Picked(binary, *_chosen(tree, modules, str(wanted.image)), microcode)


def _chosen(tree: Tree, names: tuple[str, ...], what: str) -> tuple[Tree, str]:
    """`lib/modules` with the modules `names` and what they depend on."""
    files: dict[str, tuple[str, Entry]] = {}
    made = Tree()
    release = ""
    for path, entry in tree.walk():
        if not (matched := _RELEASE.fullmatch(path)) or not entry.is_file():
            continue
        if release and matched[1] != release:
            raise ConfigError(f"{what}: modules of two kernels, {release} and {matched[1]}; leave one out")
        release = matched[1]
        if named := _MODULE.fullmatch(matched[2].rpartition("/")[2]):
            files[_same(named[1])] = (matched[2], entry)
        elif matched[2] in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            made.add(f"lib/modules/{release}/{matched[2]}", entry)
    if not release:
        return made, ""
    everything = names == (ALL,)
    first = LOADED if everything or not names else names
    also: Iterable[str] = sorted(files) if everything else () if names else KEPT
    found: dict[str, _Found] = {}
    for name in (*first, *also):
        if name in names and _same(name) not in files and not _builtin(made, release, name):
            raise ConfigError(f"{what}: there is no module {name}")
        _follow(_same(name), files, found, what)
    for module in found.values():
        made.file(f"lib/modules/{release}/{module.path}", module.octets)
    load = [name for name in found if name in _closure([_same(name) for name in first], found)]
    made.file(f"lib/modules/{release}/load", "".join(f"{found[name].path}\n" for name in load))
    made.file(f"lib/modules/{release}/modules.dep", "".join(_dependencies(name, found) for name in found))
    aliases = (f"alias {alias} {name}\n" for name, module in found.items() for alias in module.aliases)
    made.file(f"lib/modules/{release}/modules.alias", "".join(aliases))
    return made, release


def _follow(name: str, files: dict[str, tuple[str, Entry]], found: dict[str, _Found], what: str) -> None:
    """Add to `found` the module and, before it, all that it depends on; what has no file is part of the kernel."""
    if name in found or name not in files:
        return
    path, entry = files.pop(name)  # so that modules that depend on each other end
    octets = _decompressed(path, entry, what)
    fields = re.findall(rb"\0(depends|alias)=([^\0]*)", octets)
    depends = [
        _same(other)
        for key, text in fields
        if key == b"depends"
        for other in text.decode(errors="replace").split(",")
        if other
    ]
    aliases = tuple(text.decode(errors="replace") for key, text in fields if key == b"alias")
    for other in depends:
        _follow(other, files, found, what)
    bare = re.sub(r"\.(xz|gz)$", "", path)
    found[name] = _Found(bare, octets, tuple(depends), aliases)


def _decompressed(path: str, entry: Entry, what: str) -> bytes:
    octets = entry.read(MAX_MODULE)
    try:
        if path.endswith(".xz"):
            octets = lzma.LZMADecompressor().decompress(octets, MAX_MODULE)
        elif path.endswith(".gz"):
            octets = gzip.GzipFile(fileobj=io.BytesIO(octets)).read(MAX_MODULE)
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise ConfigError(f"{what}: {path}: {error}") from None
    if not octets.startswith(b"\x7fELF"):
        raise ConfigError(f"{what}: {path}: neither a module nor one in an .xz or .gz")
    return octets


def _closure(names: Iterable[str], found: dict[str, _Found]) -> set[str]:
    wanted, todo = set(), list(names)
    while todo:
        if (name := todo.pop()) in found and name not in wanted:
            wanted.add(name)
            todo += found[name].depends
    return wanted


def _dependencies(name: str, found: dict[str, _Found]) -> str:
    """A line of modules.dep: the nearest first, as modprobe reads it from the end."""
    needed = _closure(found[name].depends, found)
    others = [found[other].path for other in reversed(list(found)) if other in needed]
    return f"{found[name].path}:{''.join(f' {path}' for path in others)}\n"


def _builtin(made: Tree, release: str, name: str) -> bool:
    entry = made.get(f"lib/modules/{release}/modules.builtin")
    if entry is None:
        return False
    paths = entry.read(MAX_READ).decode().split()
    return any(_same(path.rpartition("/")[2].removesuffix(".ko")) == _same(name) for path in paths)


def _same(name: str) -> str:
    """Modules are spelled with `-` or `_`."""
    return name.replace("-", "_")
