"""What a process tree costs: CPU seconds and resident memory, read from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")


class Cpu(NamedTuple):
    """Seconds of processor time."""

    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system

    def since(self, before: Cpu) -> Cpu:
        return Cpu(self.user - before.user, self.system - before.system)


def tree(root: int) -> list[int]:
    """`root` and its living descendants."""
    found, rest = [], [root]
    while rest:
        pid = rest.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                rest.extend(int(text) for text in children.read_text().split())
            except OSError:
                continue
    return found


def cpu_seconds(pid: int) -> Cpu:
    """Time of one process, with that of children it has waited for. Raises `ProcessLookupError`."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(f"process {pid} has ended") from None
    user, system, of_children, system_of_children = (int(text) / _TICKS for text in fields[11:15])
    return Cpu(user + of_children, system + system_of_children)


def tree_cpu_seconds(root: int) -> Cpu:
    """Time of `root` and all processes under it; raises `ProcessLookupError` when `root` has ended."""
    spent = [cpu_seconds(root)]
    for pid in tree(root)[1:]:
        with contextlib.suppress(ProcessLookupError):
            spent.append(cpu_seconds(pid))
    return Cpu(sum(one.user for one in spent), sum(one.system for one in spent))


def tree_rss_mib(root: int) -> float:
    """Resident memory of `root` and all processes under it, MiB. Shared pages count in each of them."""
    total = 0
    for pid in tree(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return total / 1024


def end(process: subprocess.Popen[str], grace_s: float = 5.0) -> None:
    """SIGTERM, then SIGKILL; only for a process we started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
