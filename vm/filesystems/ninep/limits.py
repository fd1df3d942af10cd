"""What clients may have of us: each bound beside its counters, and the descriptors of this process shared out."""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOLCK, ENOMEM
from typing import Final

from netstack.errors import ConfigError

MAX_MSIZE: Final = 1 << 20
MSIZE: Final = 512 << 10
MIN_MSIZE: Final = 4096
"""Octets of the longest message: the most that can be set, what is set, and the least that a client may ask for (Linux: 4096)."""
LEAST_DESCRIPTORS: Final = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one share; those with `session` are of each connection. Beyond them a request gets the errno that is named."""

    msize: int = MSIZE
    connections: int = 16
    """At a time; one more is closed at once."""
    workers: int = 16
    """Threads for calls that may block."""
    session_running: int = 4
    """Requests of one connection that have a thread; so one that waits for a slow disk leaves threads to the others."""
    session_requests: int = 64
    """Requests of one connection that were read and not answered; what comes behind them stays in the socket."""
    session_fids: int = 1 << 16
    """EMFILE. Linux keeps one for each name in its cache."""
    session_octets: int = 64 << 20
    """ENOMEM. Listings of opened directories (about 24 octets an entry and its name), and attributes in transfer."""
    session_locks: int = 4096
    """ENOLCK."""
    nodes: int = 1 << 18
    """ENFILE. Files that all fids stand for, and the directories they are in."""
    descriptors: int = 4096
    """Opened files have at most half of them (ENFILE), those of one connection a quarter (EMFILE); the others are for `nodes`."""

    def __post_init__(self) -> None:
        if not MIN_MSIZE <= self.msize <= MAX_MSIZE:
            raise ConfigError(f"--msize: {self.msize} octets; from {MIN_MSIZE} to {MAX_MSIZE} are possible")
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; at least 1")

    def share_of_descriptors(self) -> int:
        """`descriptors`, or half of what this process may have (RLIMIT_NOFILE). Raises `ConfigError` when that is too few."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = self.descriptors if soft == resource.RLIM_INFINITY else min(self.descriptors, soft // 2)
        if most < LEAST_DESCRIPTORS:
            raise ConfigError(
                f"descriptors: half of RLIMIT_NOFILE ({soft}), but no more than {self.descriptors}, can be had for a folder;"
                f" that must be at least {LEAST_DESCRIPTORS} (`ulimit -n`)"
            )
        return most


class Allowance:
    """So many of something, for any thread."""

    def __init__(self, limit: int, errno: int) -> None:
        self.limit = limit
        self._errno = errno
        self._lock = threading.Lock()
        self.used = 0
        self.refused = 0
        """How often it was not enough."""

    def take(self, count: int = 1) -> None:
        """Raises `OSError`."""
        with self._lock:
            if self.used + count > self.limit:
                self.refused += 1
                raise OSError(self._errno, os.strerror(self._errno))
            self.used += count

    def give(self, count: int = 1) -> None:
        with self._lock:
            self.used -= count


class SessionAllowances:
    """Those of one connection."""

    def __init__(self, limits: Limits, descriptors: int) -> None:
        self.fids = Allowance(limits.session_fids, EMFILE)
        self.opened = Allowance(descriptors // 4, EMFILE)
        self.octets = Allowance(limits.session_octets, ENOMEM)
        self.locks = Allowance(limits.session_locks, ENOLCK)


def of_share(descriptors: int) -> Allowance:
    """Files that all connections have opened."""
    return Allowance(descriptors // 2, ENFILE)
