"""VPNKit's dhcp.json: the domains that guests are told (spec vpnkit 3.3), and a thread that follows it.

Who follows it once a second sends this process SIGHUP when it has changed, which makes a daemon read its settings again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from netstack.errors import ConfigError, Malformed

FOLLOW_S: Final = 1.0
MAX_OCTETS: Final = 1 << 20
_FORM: Final = 'write {"searchDomains": ["corp.example"], "domainName": "example"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Domains:
    """What the file says."""

    search: tuple[str, ...] = ()
    domain: str | None = None


def read(path: str) -> Domains:
    """The file at `path`; keys that are not known are passed over. Raises `ConfigError`."""
    try:
        with open(path, "rb") as file:
            octets = file.read(MAX_OCTETS + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file that can be read") from None
    try:
        found = json.loads(octets) if len(octets) <= MAX_OCTETS else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {_FORM}")
    search, domain = found.get("searchDomains"), found.get("domainName")
    search = [] if search is None else search
    listed = isinstance(search, list) and all(isinstance(one, str) for one in search)
    if not listed or not isinstance(domain, str | None):
        raise ConfigError(f"{path}: {_FORM}")
    try:
        check_names([*search, *([domain] if domain else [])])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Domains(search=tuple(search), domain=domain)


def check_names(names: Sequence[str]) -> None:
    """Raises `ConfigError` when one is no domain name."""
    from netstack.wire import dhcp

    for name in names:
        try:
            dhcp.encode_names((name,))
            if "," in name:
                raise ValueError("a comma")
        except (Malformed, ValueError) as error:
            raise ConfigError(f"{name!r} is no domain ({error}); write one such as corp.example") from None


@contextlib.contextmanager
def following(path: str | None) -> Iterator[None]:
    """Have this process reload, as by SIGHUP, when the file at `path` changes."""
    if path is None:
        yield
        return
    over = threading.Event()
    # Taken now, before the file is read: a change in between counts.
    thread = threading.Thread(target=_follow, args=(path, _version(path), over), name="dhcp.json", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(path: str, seen: Any, over: threading.Event) -> None:
    while not over.wait(FOLLOW_S):
        now = _version(path)
        # While nobody handles the signal (it is early, or late) it would end the process: the next look may find better.
        if now != seen and signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, None):
            seen = now
            os.kill(os.getpid(), signal.SIGHUP)


def _version(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
