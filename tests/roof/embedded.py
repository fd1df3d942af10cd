"""`pyvpnkit shell` and `pyvpnkit demo` as users of this machine run them: root, an ordinary user, over each kind of link.

A test process that is root becomes `nobody` for the ordinary user; where `nobody` may not read the checkout it is bound to
a place where he may, in a mount namespace. One that is not root is the ordinary user itself.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
ORDINARY = "setpriv --reuid=65534 --regid=65534 --clear-groups"
OWN_TUN = (
    "mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200",
    "a TAP device for everybody, as many distributions have it",
)


@dataclass(frozen=True)
class World:
    """Who runs it where: the words before and around the command."""

    user: str = "root"
    """`root` or `ordinary`."""
    link: str = "auto"
    prepare: str = ""
    """Shell commands of root in a mount namespace made for it."""

    def argv(self, *arguments: str) -> list[str]:
        """`pyvpnkit` with `arguments`; skips where this world cannot be."""
        need("ip", "setpriv", "unshare")
        am_root = os.geteuid() == 0
        if (self.user == "root" or self.prepare) and not am_root:
            pytest.skip("expected: the tests do not run as root")
        if self.user == "root":
            python, tree, prepare = sys.executable, str(ROOT), self.prepare
        else:
            python, tree, reach = readable()
            prepare = " && ".join(filter(None, (reach, self.prepare)))
        become = ORDINARY.split() if am_root and self.user == "ordinary" else []
        command = [*become, "env", f"PYTHONPATH={tree}", python, "-m", "pyvpnkit", *arguments]
        if prepare:
            script = f"set -e; {prepare}; exec {shlex.join(command)}"
            return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        return command

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("SHELL", "PYTHONPATH")}
        return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "PYVPNKIT_SHELL_LINK": self.link, **more}

    def run(self, *arguments: str, limit_s: float = LIMIT_S, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*arguments),
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            cwd="/",
        )

    def run_words(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        """Any command line."""
        return subprocess.run(
            argv, env=self.environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd="/"
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(*arguments),
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )


WORLDS = {
    "root-tap": World(link="tap"),
    "root-packet": World(link="packet"),
    "ordinary-tap": World(user="ordinary", link="tap", prepare=OWN_TUN[0]),
    "ordinary-packet": World(user="ordinary", link="packet"),
}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed; packages.txt names what the tests use")


def _can(prefix: Sequence[str], *command: str) -> bool:
    return subprocess.run([*prefix, *command], capture_output=True, check=False, cwd="/").returncode == 0


@functools.cache
def readable() -> tuple[str, str, str]:
    """For the ordinary user: an interpreter, a tree, and what root does before so that they can be read."""
    become = ORDINARY.split() if os.geteuid() == 0 else []
    if not _can(become, "unshare", "-Urn", "true"):
        pytest.skip("expected: this system does not permit user namespaces to ordinary users")
    imports = ("-c", "import pyvpnkit.cli, pyvpnkit.service, rich")
    if _can(become, "env", f"PYTHONPATH={ROOT}", sys.executable, *imports):
        return sys.executable, str(ROOT), ""
    if not become:
        pytest.skip("expected: an interpreter without the dependencies")
    place = Path(tempfile.gettempdir(), f"pyvpnkit-readable-{os.getpid()}")
    python = str(place / Path(sys.executable).relative_to(ROOT)) if sys.executable.startswith(f"{ROOT}/") else ""
    # The directory exists in the mount namespace only.
    reach = f"mount -t tmpfs tmpfs /mnt && mkdir /mnt/tree && mount --bind {shlex.quote(str(ROOT))} /mnt/tree"
    python = python.replace(str(place), "/mnt/tree") or sys.executable
    inside = shlex.join([*become, "env", "PYTHONPATH=/mnt/tree", python, *imports])
    if not _can((), "unshare", "--mount", "--propagation", "private", "sh", "-c", f"{reach} && {inside}"):
        pytest.skip("expected: an ordinary user may not read this interpreter")
    return python, "/mnt/tree", reach


def processes_with(marker: str) -> list[str]:
    """Command lines of the processes that mention `marker`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in line:
            found.append(line)
    return found
