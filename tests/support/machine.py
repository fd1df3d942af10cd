"""A machine that is not ours: Debian's kernel under QEMU's TCG, a busybox, and a console that tests type at.

The kernel and the busybox are Debian's packages, downloaded once, unpacked and never installed; what is wanted of them
stays in `PYVPNKIT_TEST_CACHE` (or ~/.cache/pyvpnkit-tests). The busybox installed here is not asked: it may be linked to
libraries that the machine lacks. The initramfs is written anew each time. `init` (below) loads the modules, takes a
lease, says so in a line that begins with `@up`, and then runs what comes in over the serial port, a line at a time:

    test:    7 cat /proc/uptime
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
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import LIMIT_S, Namespace

KERNEL = "linux-image-cloud-amd64"
"""The package that depends on the newest kernel of this release."""
WANTED = ("virtio_pci", "virtio_net")
"""Modules, besides those that they depend on."""
STORED = "machine-1"
"""Another number where something else is to be kept of the packages."""
BOOT_LIMIT_S = 90.0
"""Three or four seconds, where nothing else runs."""
MAC = "5a:94:ef:e4:0c:ee"

INIT = """\
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


@dataclass(frozen=True)
class Parts:
    """What a machine is started from."""

    kernel: Path
    initrd: Path


def parts(directory: Path) -> Parts:
    """The kernel, and an initramfs in `directory`; skips where there is none to be had."""
    if platform.machine() != "x86_64":
        pytest.skip(f"expected: Debian's cloud-amd64 kernel is for x86-64, this is {platform.machine()}")
    cache = Path(os.environ.get("PYVPNKIT_TEST_CACHE") or Path.home() / ".cache" / "pyvpnkit-tests")
    stored = cache / STORED
    if not (stored / "vmlinuz").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = _store(Path(scratch))
            with contextlib.suppress(OSError):  # another run was first
                made.rename(stored)
    modules = [(name, (stored / name).read_bytes()) for name in (stored / "order").read_text().split()]
    files = [(name, 0o040755, b"") for name in ("bin", "dev", "etc", "modules", "proc", "run", "sys", "tmp", "www")]
    files += [
        ("init", 0o100755, INIT.encode()),
        ("bin/busybox", 0o100755, (stored / "busybox").read_bytes()),
        ("etc/udhcpc.script", 0o100755, Path(__file__).with_name("udhcpc.script").read_bytes()),
        ("modules/order", 0o100644, "\n".join(name for name, _ in modules).encode()),
    ]
    files += [(f"modules/{name}", 0o100644, octets) for name, octets in modules]
    initrd = directory / "initrd.cpio"
    initrd.write_bytes(b"".join(newc(files)))
    return Parts(stored / "vmlinuz", initrd)


def _store(scratch: Path) -> Path:
    """Download and unpack in `scratch`; the directory of what is worth keeping."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("expected: the kernel comes by apt, and there is none here")
    names = [_newest_kernel(), "busybox-static"]
    if _apt("apt-get", "download", *names, cwd=scratch) is None and (
        _apt("apt-get", "update") is None or _apt("apt-get", "download", *names, cwd=scratch) is None
    ):
        pytest.skip(f"could not be downloaded: {' '.join(names)}")
    tree, kept = scratch / "tree", scratch / "machine"
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
    kept.mkdir()
    order: list[str] = []
    for name in WANTED:
        _keep(name, tree, kept, order)
    (kept / "order").write_text("\n".join(order))
    shutil.copy(next(path for path in tree.rglob("busybox") if path.is_file() and path.parent.name == "bin"), kept)
    shutil.copy(next(tree.glob("boot/vmlinuz-*")), kept / "vmlinuz")
    return kept


def _newest_kernel() -> str:
    """The name of a package that has a kernel in it."""
    words = ("apt-cache", "depends", KERNEL)
    said = _apt(*words)
    if said is None:
        if _apt("apt-get", "update") is None:
            pytest.skip(f"{KERNEL} is unknown to apt, and `apt-get update` failed")
        said = _apt(*words)
    found = re.search(r"Depends: (linux-image-\S+)", said or "")
    if found is None:
        pytest.skip(f"expected: this distribution has no {KERNEL}")
    return found[1]


def _apt(*words: str, cwd: Path | None = None) -> str | None:
    """What it said, or None where it failed."""
    command = [words[0], "-q", "-o", "APT::Sandbox::User=root", *words[1:]]
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout if done.returncode == 0 else None


def _keep(name: str, tree: Path, kept: Path, order: list[str]) -> None:
    """Module `name` and, before it, all that it depends on; one that is not there is part of the kernel."""
    spelling = re.sub("[-_]", "[-_]", name)
    found = next(tree.rglob(f"{spelling}.ko*"), None)
    if found is None or f"{name}.ko" in order:
        return
    octets = lzma.decompress(found.read_bytes()) if found.suffix == ".xz" else found.read_bytes()
    assert octets.startswith(b"\x7fELF"), f"{found}: neither a module nor one in an .xz"
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


@dataclass(frozen=True)
class Card:
    """A network card: what QEMU is told of its other end (`netdev`), of the card (`options`), and besides (`words`)."""

    netdev: str
    options: str = ""
    words: tuple[str, ...] = ()


def stream(path: str) -> Card:
    """The network card's other end: a `qemu:` link."""
    return Card(f"stream,id=n,server=off,addr.type=unix,addr.path={path}")


def datagrams(path: str, own: str) -> Card:
    """The network card's other end: a `unixgram:` link, reached from the path `own`."""
    return Card(f"dgram,id=n,local.type=unix,local.path={own},remote.type=unix,remote.path={path}")


def shared_ring(path: str, options: str = "", *, server: bool = False, queues: int = 1) -> Card:
    """The network card's other end: a `vhost-user:` link. The memory is shared; QEMU dials again when the daemon is gone, or
    listens itself (`server`). `vectors=0`, because QEMU 7.2 under TCG crashes on MSI-X with vhost-user."""
    memory = "memory-backend-memfd,id=mem,size=256M,share=on"
    how = "server=on,wait=off" if server else "reconnect=1"
    many = f",queues={queues}" if queues > 1 else ""
    return Card(
        f"vhost-user,id=n,chardev=c{many}",
        f",vectors=0{',mq=on' if queues > 1 else ''}{options}",
        ("-object", memory, "-machine", "memory-backend=mem", "-chardev", f"socket,id=c,path={path},{how}"),
    )


class Machine:
    """A machine that has booted, in the namespace `place` (its socket links cross namespaces, it needs only `lo`).

    There is no `-no-reboot`: it may start again by itself, with the same QEMU. One that panics goes round until the limit.
    """

    def __init__(self, place: Namespace, made_of: Parts, card: Card, *, mac: str = MAC, processors: int = 1) -> None:
        words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        words += ["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-m", "256", "-serial", "stdio"]
        words += ["-kernel", str(made_of.kernel), "-initrd", str(made_of.initrd), "-append"]
        words += ["console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on cryptomgr.notests"]
        words += [*card.words, "-smp", str(processors)]
        words += ["-netdev", card.netdev, "-device", f"virtio-net-pci,netdev=n,romfile=,mac={mac}{card.options}"]
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={place.path}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
        )
        self._lines: list[tuple[float, str]] = []
        self._next = 0
        self._ended = False
        self._news = threading.Condition()
        self._tags = itertools.count(1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = ""
        try:
            self.wait_up()
        except BaseException:
            self.kill()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._lines.append((time.monotonic() - self._began, line.strip("\r\n")))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def said(self) -> str:
        """The console so far, with the seconds since the start."""
        return "\n".join(f"{at:7.2f} {line}" for at, line in self._lines)

    def wait_line(self, pattern: str, limit_s: float) -> tuple[list[str], re.Match[str]]:
        """The next line that is `pattern`, and the lines before it that nobody has read."""
        end = time.monotonic() + limit_s
        before: list[str] = []
        with self._news:
            while True:
                while self._next < len(self._lines):
                    line = self._lines[self._next][1]
                    self._next += 1
                    if found := re.fullmatch(pattern, line):
                        return before, found
                    before.append(line)
                assert not self._ended, f"the machine ended before it said {pattern!r}\n{self.said()}"
                left = end - time.monotonic()
                assert left > 0, f"{pattern!r} was not said within {limit_s:.0f} s\n{self.said()}"
                self._news.wait(left)

    def wait_up(self) -> None:
        """Until it has booted, at the start or again; its address, if there is one, is in `address`."""
        # The firmware may have left something on the line.
        _, found = self.wait_line(r".*@up \S+ ?([\d.]*)(?:/\d+)?", BOOT_LIMIT_S)
        self.address = found[1]

    def send(self, line: str) -> int:
        """Have a line of shell run, and do not wait for it; its tag."""
        tag = next(self._tags)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tag} {line}\n")
        self.process.stdin.flush()
        return tag

    def run(self, command: str, *, limit_s: float = LIMIT_S, check: bool = True) -> str:
        """What the line of shell prints."""
        before, found = self.wait_line(rf"(.*)@{self.send(command)} (\d+)", limit_s)
        said = "\n".join([*before, found[1]] if found[1] else before)
        assert not check or found[2] == "0", f"{command}: status {found[2]}\n{said}"
        return said

    def kill(self) -> None:
        """As by a power cut."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be typed any more
                pipe.close()
