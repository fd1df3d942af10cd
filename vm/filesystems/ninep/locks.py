"""Advisory locks of guests on ranges of files (fcntl(2); Tlock and Tgetlock of 9P2000.L).

Guests are kept apart from each other, and processes of one guest by that guest's own kernel besides; programs of the host are not
concerned. Real locks of the host would not do: flock in a guest locks files that it has opened for reading only, and a process
may open a file twice, both of which the host takes for a conflict.

A lock belongs to a process of a client (connection, `client_id`, `proc_id`). What a process locks anew replaces what it has there.
Locks end with the fid by which they were made, and so with its connection. Nobody waits here: Linux asks again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from vm.filesystems.ninep.limits import Allowance
from vm.filesystems.ninep.messages import RDLCK, UNLCK

END: Final = 1 << 64
Key: TypeAlias = tuple[int, int]
"""Of a file."""


@dataclass(frozen=True, slots=True)
class Owner:
    session: object
    client_id: bytes
    proc_id: int


@dataclass(frozen=True, slots=True)
class Lock:
    owner: Owner
    fid: object
    """By which it was made, and with which it ends."""
    type: int
    start: int
    end: int
    """The first octet behind it."""

    @property
    def length(self) -> int:
        """As in messages: 0 is to the end."""
        return 0 if self.end == END else self.end - self.start


class Locks:
    """Those of one share. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Key, list[Lock]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._files.values()))

    def conflict(self, key: Key, wanted: Lock) -> Lock | None:
        """One that `wanted` would have to wait for."""
        with self._lock:
            return next(self._conflicts(key, wanted), None)

    def _conflicts(self, key: Key, wanted: Lock) -> Iterator[Lock]:
        for lock in self._files.get(key, ()):
            if lock.owner != wanted.owner and lock.start < wanted.end and wanted.start < lock.end:
                if lock.type != RDLCK or wanted.type != RDLCK:
                    yield lock

    def set(self, key: Key, wanted: Lock, allowance: Allowance) -> bool:
        """Lock, or unlock (UNLCK); whether nobody is in the way. Raises `OSError` when there are too many."""
        with self._lock:
            if wanted.type != UNLCK and next(self._conflicts(key, wanted), None) is not None:
                return False
            kept: list[Lock] = []
            had = 0
            for lock in self._files.get(key, ()):
                if lock.owner != wanted.owner:
                    kept.append(lock)
                    continue
                had += 1
                if lock.start < wanted.start:
                    kept.append(replace(lock, end=min(lock.end, wanted.start)))
                if lock.end > wanted.end:
                    kept.append(replace(lock, start=max(lock.start, wanted.end)))
            if wanted.type != UNLCK:
                kept.append(wanted)
            more = sum(lock.owner == wanted.owner for lock in kept) - had
            if more > 0:
                allowance.take(more)
            else:
                allowance.give(-more)
            self._store(key, kept)
            return True

    def end(self, key: Key, fid: object, allowance: Allowance) -> None:
        """A fid of the file is gone."""
        with self._lock:
            locks = self._files.get(key)
            if locks:
                kept = [lock for lock in locks if lock.fid is not fid]
                allowance.give(len(locks) - len(kept))
                self._store(key, kept)

    def _store(self, key: Key, locks: list[Lock]) -> None:
        if locks:
            self._files[key] = locks
        else:
            self._files.pop(key, None)
