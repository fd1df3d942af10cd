"""What a process tree costs: CPU seconds and resident memory, read from /proc."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


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


def cpu_seconds(pid: int) -> float:
    """User and system time of one process, with that of children it has waited for. Raises `ProcessLookupError`."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(f"process {pid} has ended") from None
    return sum(int(text) for text in fields[11:15]) / _TICKS


def tree_cpu_seconds(roots: list[int]) -> float:
    """CPU of all processes under `roots`; raises `ProcessLookupError` when a root has ended."""
    total = 0.0
    for root in roots:
        total += cpu_seconds(root)
        for pid in tree(root)[1:]:
            try:
                total += cpu_seconds(pid)
            except ProcessLookupError:
                continue
    return total


def tree_rss_mib(roots: list[int]) -> float:
    """Resident memory of all processes under `roots`, MiB. Shared pages count in each of them."""
    total = 0
    for pid in (pid for root in roots for pid in tree(root)):
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
