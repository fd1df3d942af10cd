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
import itertools
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from netstack.errors import HostError

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
DOWNLOAD_S: Final = 300

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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvpnkit"


def downloaded(at: Path, kind: Kind = SMALL) -> bool:
    """Whether `parts` will find all it wants in the cache `at`."""
    return (at / kind.stored / "vmlinuz").exists()


def parts(directory: Path, at: Path, kind: Kind = SMALL, added: Iterable[tuple[str, int, bytes]] = ()) -> Parts:
    """The kernel, kept in the cache `at`, and an initramfs in `directory`, with files `added` as for `newc`. Raises `HostError`
    where there is none to be had."""
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
            made = _store(Path(scratch), kind)
            with contextlib.suppress(OSError):  # somebody else was first
                made.rename(stored)
    order = (stored / "order").read_text().split()
    folders = "bin dev etc lib lib/x86_64-linux-gnu lib64 modules proc run sys tmp www".split()
    files = [(name, 0o040755, b"") for name in folders]
    files += [
        ("init", 0o100755, INIT.encode()),
        ("etc/udhcpc.script", 0o100755, UDHCPC_SCRIPT.read_bytes()),
        ("modules/order", 0o100644, "\n".join(order).encode()),
    ]
    files += [(where, 0o100755, (stored / name).read_bytes()) for name, where in PROGRAMS.items()]
    files += [(f"modules/{name}", 0o100644, (stored / name).read_bytes()) for name in order]
    files += [*_tree(stored / "tree", set(folders)), *added]
    initrd = directory / "initrd.cpio"
    initrd.write_bytes(b"".join(newc(files)))
    return Parts(stored / "vmlinuz", initrd)


def _tree(root: Path, there: set[str]) -> Iterator[tuple[str, int, bytes]]:
    """All below `root`, each directory before what is in it, without those that are `there`."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not path.is_dir():
            yield name, 0o100755, path.read_bytes()
        elif name not in there:
            yield name, 0o040755, b""


def _store(scratch: Path, kind: Kind) -> Path:
    """Download and unpack in `scratch`; the directory of what is worth keeping."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NotHere("the kernel comes by apt, and there is none here")
    names = [_newest_kernel(kind.kernel), *PACKAGES, *kind.packages]
    if _apt("apt-get", "download", *names, cwd=scratch) is None and (
        _apt("apt-get", "update") is None or _apt("apt-get", "download", *names, cwd=scratch) is None
    ):
        raise HostError(
            f"could not be downloaded: {' '.join(names)}; is there a network, and a recent `apt-get update`?"
        )
    tree, kept = scratch / "tree", scratch / "machine"
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
    kept.mkdir()
    order: list[str] = []
    for name in kind.modules:
        _keep(name, tree, kept, order)
    (kept / "order").write_text("\n".join(order))
    for name in PROGRAMS:
        # A link to a file beside it, for libraries; what only has the name (of a directory, of completions) is smaller.
        found = [path for path in tree.rglob(name) if path.is_file()]
        shutil.copy(max(found, key=lambda path: path.stat().st_size), kept / name)
    for name in kind.files:
        source, target = tree / name, kept / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    shutil.copy(next(tree.glob("boot/vmlinuz-*")), kept / "vmlinuz")
    return kept


def _newest_kernel(package: str) -> str:
    """The name of the package that has the kernel in it which `package` depends on."""
    words = ("apt-cache", "depends", package)
    said = _apt(*words)
    if said is None:
        if _apt("apt-get", "update") is None:
            raise HostError(f"{package} is unknown to apt, and `apt-get update` failed; run it as root")
        said = _apt(*words)
    found = re.search(r"Depends: (linux-image-\S+)", said or "")
    if found is None:
        raise NotHere(f"this distribution has no {package}")
    return found[1]


def _apt(*words: str, cwd: Path | None = None) -> str | None:
    """What it said, or None where it failed."""
    command = [words[0], "-q", "-o", "APT::Sandbox::User=root", *words[1:]]
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def _keep(name: str, tree: Path, kept: Path, order: list[str]) -> None:
    """Module `name` and, before it, all that it depends on; one that is not there is part of the kernel."""
    spelling = re.sub("[-_]", "[-_]", name)
    found = next(tree.rglob(f"{spelling}.ko*"), None)
    if found is None or f"{name}.ko" in order:
        return
    octets = lzma.decompress(found.read_bytes()) if found.suffix == ".xz" else found.read_bytes()
    if not octets.startswith(b"\x7fELF"):
        raise HostError(f"{found.name}: neither a module nor one in an .xz; this kernel is too new for us")
    depends = re.search(rb"\0depends=([^\0]*)\0", octets)
    for other in depends[1].decode().split(",") if depends else ():
        if other:
            _keep(other, tree, kept, order)
    (kept / f"{name}.ko").write_bytes(octets)
    order.append(f"{name}.ko")


def newc(files: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """A cpio archive ("newc") of `(name, mode, octets)`: what Linux unpacks as its first file system."""
    for number, (name, mode, octets) in enumerate(itertools.chain(files, [("TRAILER!!!", 0, b"")]), 1):
        # inode, mode, uid, gid, links, mtime, size, device, device of a node, length of the name with its NUL, sum
        fields = (number, mode, 0, 0, 1, 0, len(octets), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        yield head.ljust(-len(head) % 4 + len(head), b"\0")
        yield octets.ljust(-len(octets) % 4 + len(octets), b"\0")
