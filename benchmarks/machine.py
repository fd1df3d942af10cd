"""On what the figures were measured: a figure without this says little."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any


def interpreter() -> dict[str, Any]:
    """The running interpreter and how it was built; `pgo` is None where that cannot be told."""
    configured = sysconfig.get_config_var("CONFIG_ARGS") or ""
    flags = " ".join(
        str(sysconfig.get_config_var(name) or "")
        for name in ("PY_CORE_CFLAGS", "CONFIGURE_CFLAGS", "CFLAGS", "LDFLAGS", "PY_CORE_LDFLAGS")
    )
    # Debian builds its profile in debian/rules, without --enable-optimizations: the flags of the link tell.
    pgo = "--enable-optimizations" in configured or "-fprofile-use" in flags or "-fprofile-instr-use" in flags
    debian = sys.prefix == "/usr" or sys.base_prefix == "/usr"
    return {
        "version": sys.version.replace("\n", " "),
        "executable": sys.executable,
        "config_args": configured,
        "pgo": True if pgo else (None if debian else False),
        "lto": "--with-lto" in configured or "-flto" in flags,
        "distribution": debian,
    }


def _first(pattern: str, path: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else "unknown"


def _version(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line and "syslog" not in line]
    return lines[0] if lines else "unknown"


def describe() -> dict[str, Any]:
    """Interpreter, machine, kernel and the peers' versions."""
    return {
        "interpreter": interpreter(),
        "cpu": _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_kib": _first(r"^MemTotal:\s*(\d+)", "/proc/meminfo"),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "iperf3": _version("iperf3", "--version"),
        "pasta": _version("pasta", "--version"),
        "slirp4netns": _version("slirp4netns", "--version"),
        "gvproxy": _version("gvproxy", "-version"),
        "qemu": _version("qemu-system-x86_64", "--version"),
    }


def text(about: dict[str, Any]) -> str:
    """The same in a few lines."""
    build = about["interpreter"]
    pgo = {True: "PGO", False: "no PGO", None: "PGO not recorded in the build's settings (distributions use it)"}[
        build["pgo"]
    ]
    lto = ", LTO" if build["lto"] else ""
    peers = ", ".join(
        f"{name} {about[name]}" for name in ("pasta", "slirp4netns", "gvproxy", "iperf3", "qemu") if about[name]
    )
    return (
        f"Python {build['version']} ({pgo}{lto})\n"
        f"  {build['executable']}; configured with: {build['config_args'] or 'unknown'}\n"
        f"{about['cpu']} x {about['cpus']}, kernel {about['kernel']}, load {about['load']:.1f}\n"
        f"{peers}"
    )


def fingerprint() -> str:
    """What two runs must have in common for their figures to be compared."""
    cpu = _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo")
    return f"{cpu}; {platform.system()} {platform.machine()}; {sys.version.split()[0]} {platform.python_build()[1]}"
