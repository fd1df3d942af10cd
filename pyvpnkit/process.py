"""What a daemon owes its surroundings: descriptors, pid file, state directory, readiness, another user's rights.

Paths that others could have prepared are opened without following a symbolic link, and refused unless they are a plain
file of ours (threats-and-faults L2).
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import socket
import stat
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError

GC_THRESHOLD: Final = 50_000
"""Young objects between two passes of the collector: flows come and go without cycles, so a pass finds next to nothing."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard one; returns what holds from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS calls its hard limit infinite and refuses more than OPEN_MAX.
    for wanted in (hard, 65536, 10240):
        if wanted != resource.RLIM_INFINITY and soft != resource.RLIM_INFINITY and wanted > soft:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return wanted
            except (OSError, ValueError):
                continue
    return soft


def settle_memory() -> None:
    """After start-up: what is alive now stays alive, so the collector need never look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 50, 100)


def open_own_file(path: str, flags: int, mode: int = 0o600) -> int:
    """Open or create a plain file of ours; raises `ConfigError` for a link, a directory, or somebody else's file."""
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        why = "is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror).lower()
        raise ConfigError(f"{path}: {why}; choose another path") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(fd)
        raise ConfigError(f"{path}: is not a plain file of this user; remove it or choose another path")
    return fd


class PidFile:
    """A locked file with our process id and `end`, removed by `close`."""

    def __init__(self, path: str, end: bytes = b"\n") -> None:
        """Raises `ConfigError` when a living process holds it or the path cannot be used."""
        self._path = path
        self._fd = open_own_file(path, os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise ConfigError(
                f"pid_file: {path} is held by process {holder or 'unknown'}; stop that one first"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, b"%d" % os.getpid() + end)

    def close(self) -> None:
        if self._fd < 0:
            return
        try:
            if os.path.samestat(os.fstat(self._fd), os.lstat(self._path)):
                os.unlink(self._path)
        except OSError:
            pass  # somebody removed it, or we may no longer: nothing depends on it
        os.close(self._fd)
        self._fd = -1


class StateDirectory:
    """A directory of ours, held by one daemon at a time."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` when it cannot be made, is writable by others, or another daemon uses it."""
        self.path = path
        self._lock = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.stat()
        except OSError as error:
            raise ConfigError(f"state_dir: {path}: {str(error.strerror).lower()}; choose another, or `off`") from None
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
            raise ConfigError(f"state_dir: {path} can be written by others; choose a directory of this user")
        self._lock = open_own_file(str(path / "lock"), os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"state_dir: {path} is in use by another pyvpnkit; give this one its own --state-dir"
            ) from None

    @staticmethod
    def default() -> Path:
        """Where state goes when nobody says: systemd's choice, else the user's state directory."""
        if given := os.environ.get("STATE_DIRECTORY"):
            return Path(given.partition(":")[0])
        base = os.environ.get("XDG_STATE_HOME", "")
        try:
            return (Path(base) if base.startswith("/") else Path("~/.local/state").expanduser()) / "pyvpnkit"
        except RuntimeError:
            raise ConfigError("state_dir: this user has no home directory; give --state-dir DIR, or `off`") from None

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def notify(*words: str) -> bool:
    """Tell a service manager (sd_notify(3)): `notify("READY=1")`. False when nobody asked or listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto("\n".join(words).encode(), address)
        except OSError:
            return False
    return True


def say_ready(fd: int) -> None:
    """Write `1` to the descriptor a parent waits on, and close it (slirp4netns' `--ready-fd`)."""
    try:
        os.write(fd, b"1")
        os.close(fd)
    except OSError as error:
        raise ConfigError(
            f"--ready-fd {fd}: {str(error.strerror).lower()}; give an open descriptor that can be written"
        ) from None


def become(user: str) -> None:
    """Give up root for `user`, for good. Raises `ConfigError` when that cannot be done."""
    import importlib
    import pwd

    for late in ("concurrent.futures.thread", "encodings.idna"):
        # What is imported late must be there already: the user may not be able to read where we are installed.
        importlib.import_module(late)
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"user: {user!r} does not exist on this host") from None
    if os.geteuid() == entry.pw_uid:
        return
    try:
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except PermissionError:
        raise ConfigError(f"user: only root may become {user!r}; start as root or leave it out") from None
