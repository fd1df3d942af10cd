"""A small Linux to boot: Debian's kernel and a busybox, for the demo with a machine and for the tests (x86-64).

Both are Debian's packages, as is ethtool; they are downloaded once, unpacked and never installed, and what is wanted of them stays
in a cache: no root is needed. The busybox installed here is not asked: it may be linked to libraries that the machine lacks.
The initramfs is written anew each time. `init` (below) loads the modules, takes a lease, says so in a line that begins with
`@up`, and then runs what comes in over the serial port, a line at a time (`pyvpnkit.machine` types there):

    we:      7 cat /proc/uptime
    machine: 3.21 2.90
             @7 0                  the tag, and the exit status
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError, HostError
from vm.build import archive, cpio, debian, kernel
from vm.build.build import default_cache
from vm.build.debian import Wanted
from vm.build.tree import Entry, Tree
from vm.linuxkit.schema import Kernel

PACKAGES: Final = ("busybox-static", "ethtool", "libmnl0", "libc6")
PROGRAMS: Final = {
    "busybox": "bin/busybox",
    "ethtool": "bin/ethtool",
    "ld-linux-x86-64.so.2": "lib64/ld-linux-x86-64.so.2",
    "libc.so.6": "lib/x86_64-linux-gnu/libc.so.6",
    "libm.so.6": "lib/x86_64-linux-gnu/libm.so.6",
    "libmnl.so.0": "lib/x86_64-linux-gnu/libmnl.so.0",
}
"""What is kept of the packages besides the kernel, and where the machine has it."""

INIT: Final = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /run
stty -echo
dmesg -n 1
for module in $(cat /modules/order); do insmod /modules/$module; done
ip link set lo up
tries=0
until [ -e /sys/class/net/eth0 ] || [ $tries = 50 ]; do usleep 20000; tries=$((tries + 1)); done
udhcpc -s /etc/udhcpc.script -i eth0 -n -q -t 8 -T 1
echo "@up $(cut -d ' ' -f 1 /proc/uptime) $(ip -4 -o addr show dev eth0 | awk '{ print $4 }')"
while read -r tag line; do
	(eval "$line") </dev/null 2>&1
	echo "@$tag $?"
done
"""
UDHCPC_SCRIPT: Final = Path(__file__).with_name("udhcpc.script")
"""What udhcpc calls to have its lease put to use."""


class NotHere(HostError):
    """There cannot be a machine on this kind of host, whatever is installed."""


@dataclass(frozen=True)
class Kind:
    """Which of Debian's kernels, and what is wanted of it."""

    kernel: str
    """The package that depends on the newest one of this release."""
    modules: tuple[str, ...]
    """Besides those that they depend on."""
    stored: str
    """Its directory in the cache: another number where something else is to be kept of the packages."""
    packages: tuple[str, ...] = ()
    """More of Debian's packages, for programs besides `PROGRAMS`."""
    files: tuple[str, ...] = ()
    """What is kept of those: files, and directories with all that is in them, by their paths in the package and in the machine."""


SMALL: Final = Kind("linux-image-cloud-amd64", ("virtio_pci", "virtio_net"), "machine-3")
NINEP: Final = Kind("linux-image-amd64", (*SMALL.modules, "9p", "9pnet_fd"), "machine-9p-1")
"""With 9P, which the cloud kernel lacks; 71 MB to download instead of 27."""


@dataclass(frozen=True)
class Parts:
    """What a machine is started from."""

    kernel: Path
    initrd: Path


def cache() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/pyvpnkit`, or `~/.cache/pyvpnkit`."""
    return default_cache().parent


def downloaded(at: Path, kind: Kind = SMALL) -> bool:
    """Whether `parts` will find all it wants in the cache `at`."""
    return (at / kind.stored / "vmlinuz").exists()


def parts(directory: Path, at: Path, kind: Kind = SMALL, added: Iterable[tuple[str, int, bytes]] = ()) -> Parts:
    """The kernel, kept in the cache `at`, and an initramfs in `directory`, with files `added` (path, mode, octets). Raises
    `HostError` where there is none to be had."""
    stored = at / kind.stored
    if not downloaded(at, kind):
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            raise NotHere(f"Debian's cloud kernel is for x86-64; this is {platform.system()} on {platform.machine()}")
        try:
            at.mkdir(parents=True, exist_ok=True)
            scratch_directory = tempfile.TemporaryDirectory(dir=at)
        except OSError as error:
            raise HostError(f"nothing can be kept in {at}: {error.strerror}; set XDG_CACHE_HOME") from None
        with scratch_directory as scratch:
            made = _store(Path(scratch), kind, archive.Cache(at / "build"))
            with contextlib.suppress(OSError):  # somebody else was first
                made.rename(stored)
    order = (stored / "order").read_text().split()
    tree = Tree()
    for name in "bin dev etc lib lib/x86_64-linux-gnu lib64 modules proc run sys tmp www".split():
        tree.directory(name)
    tree.file("init", INIT, 0o755)
    tree.file("etc/udhcpc.script", UDHCPC_SCRIPT.read_bytes(), 0o755)
    tree.file("modules/order", "\n".join(order))
    for name, where in PROGRAMS.items():
        tree.add(where, _entry(stored / name, 0o755))
    for name in order:
        tree.add(f"modules/{name}", _entry(stored / name, 0o644))
    for path in sorted((stored / "tree").rglob("*")):
        if not path.is_dir():
            tree.add(str(path.relative_to(stored / "tree")), _entry(path, 0o755))
    for name, mode, octets in added:
        tree.add(name, Entry(mode=mode, content=octets))
    initrd = directory / "initrd.cpio"
    cpio.write(tree, initrd)
    return Parts(stored / "vmlinuz", initrd)


def _entry(path: Path, mode: int) -> Entry:
    return Entry(mode=stat.S_IFREG | mode, content=archive.whole(path))


def _store(scratch: Path, kind: Kind, downloads: archive.Cache) -> Path:
    """Unpack in `scratch`; the directory of what is worth keeping. Packages stay in `downloads`, where `vm build` has its own."""
    if shutil.which("apt-get") is None:
        raise NotHere("the kernel comes by apt, and there is none here")
    cache, kept = archive.Cache(scratch), scratch / "machine"
    try:
        wanted = Wanted((kind.kernel, *PACKAGES, *kind.packages), only="linux-image-")
        tree = debian.tree(wanted, cache, downloads=downloads)
        picked = kernel.pick_from(tree, Kernel(image=kind.kernel), kind.modules, cache)
    except ConfigError as error:
        raise NotHere(f"this distribution has another kernel: {error}") from None
    kept.mkdir()
    modules = f"lib/modules/{picked.release}"
    load = [f"{modules}/{path}" for path in _found(picked.modules, f"{modules}/load").read().decode().split()]
    for path in load:
        cpio.replaced(kept / Path(path).name, _found(picked.modules, path).chunks())
    (kept / "order").write_text("\n".join(Path(path).name for path in load))
    names = [path for path, entry in tree.walk() if not entry.is_dir()]
    for name in PROGRAMS:
        # A link to a file beside it, for libraries; what only has the name (of a directory, of completions) is smaller.
        found = [
            entry for path in names if path.rpartition("/")[2] == name and (entry := tree.get(path)) and entry.is_file()
        ]
        cpio.replaced(kept / name, max(found, key=lambda entry: entry.size).chunks())
    for path in names:
        if path.startswith(tuple(f"{name}/" for name in kind.files)) or path in kind.files:
            (kept / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            cpio.replaced(kept / "tree" / path, _found(tree, path).chunks())
    cpio.replaced(kept / "vmlinuz", picked.binary.chunks())
    return kept


def _found(tree: Tree, path: str) -> Entry:
    entry = tree.get(path)
    if entry is None or not entry.is_file():
        raise HostError(f"{path}: is not in the packages that it comes from")
    return entry
