"""A machine's directory between two runs and during one: its lock, its identity, the processes of it, what became of it.

    lock           held by the supervisor as long as it lives; says its pid
    machine.json   the name, and the file it was last started from
    identity.json  uuid and MAC address, the same each time
    result.json    what became of it
    run/NAME.pid   the processes, each with the time of its start
    log/           what they say
    *.sock vsock/  sockets

Who finds the lock free finds whatever a killed supervisor has left, and `reclaim` removes it: processes that are recorded and are
still those that were recorded, and sockets. Nothing else is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from vm.api import StateDir
from vm.hypervisors.process import Record

REAP_S: Final = 2.0
"""How long a process of a killed supervisor may take to end before it is killed."""
KILL_S: Final = 10.0
"""And how long after that."""
MADE: Final = frozenset({"boot", "efi-variables", "hyperkit.pid", "log", "network", "run", "vsock"}) | {
    f"{name}.json{new}" for name in ("machine", "identity", "result", "published", "fake-lives") for new in ("", ".new")
}
"""What else than the lock, the console's log and sockets is made here."""
_ULA: Final = uuid.UUID("6f2b8a5e-0d0c-5c55-9d44-4f6d2b6f0a11")
"""Our own namespace for `uuid5`."""


def base() -> Path:
    """Where machines have their directories: `$XDG_STATE_HOME/pyvpnkit/vm`, or that of `~/.local/state`."""
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        root = Path(given) if given.startswith("/") else Path("~/.local/state").expanduser()
    except RuntimeError:
        raise ConfigError("this user has no home directory; give --state-dir DIR") from None
    return root / "pyvpnkit" / "vm"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a machine is known by to its network."""

    uuid: uuid.UUID
    mac: str


class Lock:
    """Held until `close`, or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Let go; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Home:
    """The directory of one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.state = StateDir(self.path)

    @property
    def exists(self) -> bool:
        """Whether there ever was a machine."""
        return bool(self.read("machine"))

    def prepare(self) -> None:
        """Make the directories. Raises `ConfigError` where that cannot be done, or others could write there."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self.path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise ConfigError(f"state directory: {self.path} is not this user's; choose another with --state-dir")
            if (there := set(os.listdir(self.path))) and not there & {"lock", "run"}:
                # Nobody else may look into it afterwards, and links and sockets in it are taken for ours.
                raise ConfigError(
                    f"state directory: {self.path} has other things in it, such as {min(there)!r}; "
                    "name one that is empty or not there, with --state-dir"
                )
            # Sockets and a console are in it: nobody else may even look.
            self.path.chmod(0o700)
            for inner in ("log", "run", "vsock"):
                (self.path / inner).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            why = str(error.strerror).lower()
            raise ConfigError(f"state directory: {self.path}: {why}; choose another with --state-dir") from None

    def lock(self) -> Lock | None:
        """`None` where a supervisor holds it, or somebody removes the machine. Raises `HostError`."""
        path = self.state.lock
        with _host(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        if not os.fstat(descriptor).st_nlink:
            os.close(descriptor)
            return None
        with _host(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, b"%d\n" % os.getpid())
        return Lock(descriptor)

    def holder(self) -> int:
        """The pid of the supervisor that runs; 0 where none does."""
        try:
            descriptor = os.open(self.state.lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return 0
        except OSError:
            words = os.read(descriptor, 32).split()
            return int(words[0]) if words and words[0].isdigit() else -1
        finally:
            os.close(descriptor)

    # What is kept.

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object of ours; empty where there is none, or it makes no sense."""
        try:
            found = json.loads((self.path / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Replace it as a whole. Raises `HostError`, and what was there is still there: a disk may be full."""
        path = self.path / f"{name}.json"
        scratch = path.with_name(f"{path.name}.new")
        with _host(path):
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(value, file)
            scratch.replace(path)

    def identity(self) -> Identity:
        """What is kept, or what will be: it follows from the path, so a plan shows it before there is anything."""
        kept = self.read("identity")
        try:
            known = uuid.UUID(str(kept.get("uuid")))
        except ValueError:
            known = uuid.uuid5(_ULA, str(self.path))
        mac = kept.get("mac")
        return Identity(known, mac if isinstance(mac, str) and mac else mac_of(known))

    def keep(self, identity: Identity) -> None:
        """From now on it is this."""
        self.write("identity", {"uuid": str(identity.uuid), "mac": identity.mac})

    # Processes.

    def record(self, name: str, pid: int) -> None:
        """A process was started. Raises `HostError`."""
        found = Record.of(pid)
        path = self.path / "run" / f"{name}.pid"
        if found is not None:
            with _host(path):
                found.write(path)

    def forget(self, name: str) -> None:
        """It is gone."""
        (self.path / "run" / f"{name}.pid").unlink(missing_ok=True)

    def reclaim(self) -> list[str]:
        """End and remove what a killed supervisor left; the names of the processes that still ran. Call it with the lock held.

        Raises `HostError` where one does not end, as those that wait for a dead disk do not.
        """
        paths = sorted((self.path / "run").glob("*.pid"))
        records = {path: Record.read(path) for path in paths}
        left = {path: record for path, record in records.items() if record is not None and record.runs()}
        for record in left.values():
            record.signal(signal.SIGTERM)
        until = time.monotonic() + REAP_S
        while any(record.runs() for record in left.values()):
            if time.monotonic() > until + KILL_S:
                pids = ", ".join(str(record.pid) for record in left.values() if record.runs())
                raise HostError(f"what a killed supervisor left does not end (process {pids}); see why, and end it")
            if time.monotonic() > until:
                for record in left.values():
                    record.signal(signal.SIGKILL)
            time.sleep(0.02)
        for path in paths:
            path.unlink(missing_ok=True)
        self.sweep()
        return [path.stem for path in left]

    def sweep(self, *, served: Path | None = None) -> None:
        """Remove sockets and the console's link, when nobody runs; all but one that is `served`."""
        for directory in (self.path, self.path / "vsock"):
            for path in _entries(directory):
                with contextlib.suppress(OSError):
                    mode = os.lstat(path).st_mode
                    if path != served and (stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)):
                        path.unlink()

    def remove(self) -> list[str]:
        """Delete what was made here, and the directory if nothing else is in it; the names of what is not ours and stays.

        Call it with the lock held, after `reclaim`. Raises `HostError`.
        """
        with _host(self.path):
            for path in _entries(self.path):
                if path.is_dir() and not path.is_symlink():
                    if path.name in MADE:
                        shutil.rmtree(path)
                elif path.name in MADE or path.name.startswith("console.log"):
                    path.unlink()
            left = sorted(path.name for path in _entries(self.path) if path != self.state.lock)
            self.state.lock.unlink(missing_ok=True)
            if not left:
                self.path.rmdir()
        return left


@contextlib.contextmanager
def _host(path: Path) -> Iterator[None]:
    """The host's refusals in words."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from None


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def mac_of(known: uuid.UUID) -> str:
    """The MAC address of a machine: locally administered, and as good as nobody else's."""
    octets = hashlib.sha256(known.bytes).digest()[:5]
    return ":".join(f"{one:02x}" for one in (0x5A, *octets))


def find(word: str, state_dir: Path | None, name_of: Callable[[Path], str]) -> tuple[Home, Path | None]:
    """The directory of the machine that somebody calls `word`, which is its name or its file, and the file.

    `name_of` reads the name out of a file.
    """
    as_file = Path(word)
    is_file = "/" in word or as_file.suffix in (".yml", ".yaml")
    if is_file:
        return Home(state_dir or base() / name_of(as_file)), as_file.absolute()
    home = Home(state_dir or base() / word)
    kept = home.read("machine").get("file")
    return home, Path(kept) if isinstance(kept, str) else None
