"""QEMU with a small Linux (`pyvpnkit.boot`): its command line, and its console to type commands at.

TCG, so that it runs everywhere; no KVM is needed. There is no `-no-reboot`: a machine may start again by itself, with the same
QEMU. One that panics goes round until somebody's limit.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from netstack.errors import HostError
from pyvpnkit.boot import Parts

QEMU: Final = "qemu-system-x86_64"
BOOT_LIMIT_S: Final = 90.0
"""Three or four seconds, where nothing else runs."""
ANSWER_S: Final = 20.0
MAC: Final = "5a:94:ef:e4:0c:ee"


class MachineError(HostError):
    """The machine did not do what it was asked to; the text has what it said instead."""


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


def command(made_of: Parts, card: Card, *, mac: str = MAC, processors: int = 1) -> list[str]:
    """QEMU's command line."""
    words = [QEMU, "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-m", "256", "-serial", "stdio"]
    words += ["-kernel", str(made_of.kernel), "-initrd", str(made_of.initrd), "-append"]
    words += ["console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on cryptomgr.notests"]
    words += [*card.words, "-smp", str(processors)]
    words += ["-netdev", card.netdev, "-device", f"virtio-net-pci,netdev=n,romfile=,mac={mac}{card.options}"]
    return words


class Machine:
    """A machine that `words` start. It ends at the latest with the thread that made it."""

    def __init__(self, words: Sequence[str]) -> None:
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
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
        self.up_s = 0.0
        """When it said that it is up, in seconds of its own clock."""

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
        """The next line that is `pattern`, and the lines before it that nobody has read. Raises `MachineError`."""
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
                if self._ended:
                    raise MachineError(f"the machine ended before it said {pattern!r}\n{self.said()}")
                left = end - time.monotonic()
                if left <= 0:
                    raise MachineError(f"{pattern!r} was not said within {limit_s:.0f} s\n{self.said()}")
                self._news.wait(left)

    def wait_up(self) -> None:
        """Until it has booted, at the start or again; its address, if there is one, is in `address`."""
        # The firmware may have left something on the line.
        _, found = self.wait_line(r".*@up (\S+) ?([\d.]*)(?:/\d+)?", BOOT_LIMIT_S)
        self.up_s, self.address = float(found[1]), found[2]

    def send(self, line: str) -> int:
        """Have a line of shell run, and do not wait for it; its tag."""
        tag = next(self._tags)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tag} {line}\n")
        self.process.stdin.flush()
        return tag

    def answer(self, tag: int, limit_s: float = ANSWER_S) -> tuple[str, int]:
        """What the line of shell with this tag printed, and its exit status."""
        before, found = self.wait_line(rf"(.*)@{tag} (\d+)", limit_s)
        return "\n".join([*before, found[1]] if found[1] else before), int(found[2])

    def run(self, command: str, *, limit_s: float = ANSWER_S, check: bool = True) -> str:
        """What the line of shell prints. Raises `MachineError` where it fails, unless that is not to be checked."""
        said, status = self.answer(self.send(command), limit_s)
        if check and status:
            raise MachineError(f"{command}: status {status}\n{said}")
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
