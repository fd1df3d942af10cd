"""Where the host's resolvers come from, and following them while they change: the `dns.servers.Source` of a network.

| mode | resolvers |
|---|---|
| `auto` | `file` if a file is given; on macOS `scutil`; `resolved` where resolv.conf names only its stub; else `resolv.conf` |
| `resolv.conf` | of /etc/resolv.conf |
| `resolved` | of systemd-resolved's links with their domains (`dns.resolved`) |
| `scutil` | of macOS (`dns.scutil`) |
| `file` | of a file such as VPNKit's `--dns` (`dns.vpnkit_file`) |
| `getaddrinfo` | none: the host's library is asked (`dns.host_mode`) |

Theory of operation. Once in `every_s` the files are looked at (a `stat` each), so a change holds within 2 s, replaced files
and ones that come later too. Programs are asked in a thread: `resolvectl` when resolved has written its state, when somebody
knows of a change of the network, and each `ASK_AGAIN_S`; `scutil`, which tells no changes, each time. Until a program has answered,
and while it fails, resolv.conf holds: resolved's stub there divides names among links as well. `changed` is told what is
different from before: to give search domains to DHCP, say. Nothing waits for a thread, and no resolver at all is fine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Final

from dns import resolved, scutil, system, vpnkit_file
from dns.servers import HOST, Resolvers, Server
from dns.watch import WatchedFile
from netstack.api import Clock
from netstack.errors import ConfigError, HostError

log = logging.getLogger("pyvpnkit.dns")

EVERY_S: Final = 1.0
ASK_AGAIN_S: Final = 30.0
"""When resolved is asked though nothing seems to have changed."""
RETRY_S: Final = 5.0
"""When a program that failed is run again."""


class Mode(StrEnum):
    """See the module."""

    AUTO = "auto"
    RESOLV_CONF = "resolv.conf"
    RESOLVED = "resolved"
    SCUTIL = "scutil"
    FILE = "file"
    GETADDRINFO = "getaddrinfo"

    @classmethod
    def parse(cls, text: str) -> Mode:
        """Raises `ConfigError`."""
        try:
            return cls(text)
        except ValueError:
            raise ConfigError(f"host resolvers {text!r}: write one of {', '.join(cls)}") from None


class _Program:
    """A program that is run in a thread, one run at a time; `found` is what it said last, `None` when it failed."""

    def __init__(self, name: str, run: Callable[[], Resolvers], told: Callable[[], None]) -> None:
        self.name = name
        self.found: Resolvers | None = None
        self.failures = 0
        self.runs = 0
        self._run = run
        self._told = told
        self._running: asyncio.Future[Resolvers] | None = None

    def ask(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Begin a run; `False` when one is going on."""
        if self._running is not None:
            return False
        self.runs += 1
        self._running = loop.run_in_executor(None, self._run)
        self._running.add_done_callback(self._done)
        return True

    def close(self) -> None:
        """What a run still says is not told."""
        self._told = lambda: None

    def _done(self, run: asyncio.Future[Resolvers]) -> None:
        self._running = None
        if run.cancelled():
            return
        error = run.exception()
        if error is None:
            self.failures = 0
            self.found = run.result()
        else:
            self.failures += 1
            self.found = None
            if self.failures == 1:
                log.warning("host resolvers: %s; following resolv.conf instead", error)
            if not isinstance(error, HostError):
                log.error("host resolvers: %s", self.name, exc_info=error)
        self._told()


class HostResolvers:
    """The host's resolvers at this moment: call it (see the module). Used from one event loop.

    `dns_file` belongs to the modes `file` and `auto`. `changed` must not raise; it is first called with what `start` finds if
    that is not nothing. Not started, it follows the files alone, when it is called. Raises `ConfigError`.
    """

    def __init__(
        self,
        mode: Mode | str = Mode.AUTO,
        *,
        resolv_conf: str | None = "/etc/resolv.conf",
        dns_file: str | None = None,
        changed: Callable[[Resolvers], None] | None = None,
        clock: Clock = time.monotonic,
        every_s: float = EVERY_S,
        platform: str = sys.platform,
        resolvectl: resolved.Run = resolved.run_resolvectl,
        run_scutil: Callable[[], str] = scutil.run_scutil,
        state: tuple[str, ...] = resolved.STATE,
    ) -> None:
        mode = Mode.parse(mode)
        if mode is Mode.FILE and not dns_file:
            raise ConfigError("host resolvers 'file': say which file, in VPNKit's form")
        if mode is Mode.AUTO and dns_file:
            mode = Mode.FILE
        elif mode is Mode.AUTO and platform == "darwin":
            mode = Mode.SCUTIL
        self.mode = mode
        """`auto` only where it depends on resolv.conf."""
        self._changed = changed
        self._clock = clock
        self._every_s = every_s
        self._state_paths = state
        self._conf: WatchedFile[Resolvers] = WatchedFile(resolv_conf, system.parse_resolv_conf, clock, 0.0)
        self._file: WatchedFile[Resolvers] = WatchedFile(dns_file, vpnkit_file.parse_or_none, clock, 0.0)
        self._resolved = _Program("resolvectl", lambda: resolved.resolvers(resolved.ask(resolvectl)), self._look)
        self._scutil = _Program("scutil", lambda: scutil.parse(run_scutil()), self._look)
        self._asked_at = float("-inf")
        self._state: tuple[int, ...] | None = None
        self._look_at = float("-inf")
        self._now = Resolvers()
        self._origin = Mode.RESOLV_CONF
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> Resolvers:
        """Whom to ask now: the same object until something changes. Cheap."""
        if self._loop is None and (now := self._clock()) >= self._look_at:
            self._look_at = now + self._every_s
            self._look()
        return self._now

    @property
    def origin(self) -> Mode:
        """Where the resolvers of this moment come from; never `auto`."""
        self()
        return self._origin

    @property
    def needs_start(self) -> bool:
        """Whether programs are to be run, which only happens from `start` on. Files are looked at when somebody asks, too."""
        return self.mode in (Mode.RESOLVED, Mode.SCUTIL) or (self.mode is Mode.AUTO and _is_stub(self._conf.current()))

    @property
    def search(self) -> tuple[str, ...]:
        """The host's search domains."""
        return self().search

    def resolv_conf(self) -> Resolvers:
        """What resolv.conf says, whatever the mode: whom to ask for what getaddrinfo cannot be asked."""
        return self._conf.current()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look now, and from now on."""
        self._loop = loop
        self._again()

    def close(self) -> None:
        """Look no more. Harmless when repeated."""
        self._loop = None
        self._look_at = float("inf")
        self._resolved.close()
        self._scutil.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def network_changed(self) -> None:
        """Look now, at everything: somebody knows that the network has changed."""
        self._state = None
        self._conf.expire()
        self._file.expire()
        self._look_at = float("-inf")
        if self._loop is not None:
            self._look()

    def _again(self) -> None:
        self._look()
        if self._loop is not None:
            self._timer = self._loop.call_later(self._every_s, self._again)

    def _look(self) -> None:
        found = self._find()
        if found != self._now:
            self._now = found
            if self._changed is not None:
                self._changed(found)

    def _find(self) -> Resolvers:
        if self.mode is Mode.FILE:
            self._origin = Mode.FILE
            return self._file.current()
        conf = self._conf.current()
        if self.mode is Mode.GETADDRINFO:
            self._origin = Mode.GETADDRINFO
            return Resolvers(servers=(Server(HOST),), search=conf.search)
        program = None
        if self.mode is Mode.SCUTIL:
            program = self._scutil
            self._ask(program, self._every_s)
        elif self.mode is Mode.RESOLVED or (self.mode is Mode.AUTO and _is_stub(conf)):
            program = self._resolved
            state = tuple(map(_time, self._state_paths))
            if state != self._state:
                if self._ask(program, self._every_s):
                    self._state = state
            else:
                self._ask(program, ASK_AGAIN_S)
        if program is None:  # when it is asked again, what it said before does not hold any more
            self._resolved.found = self._state = None
        if program is None or program.found is None:
            self._origin = Mode.RESOLV_CONF
            return conf
        self._origin = Mode.SCUTIL if program is self._scutil else Mode.RESOLVED
        if program is self._resolved and all(server.zones for server in program.found.servers):
            # No link is for all names: the stub asks resolved's fallback servers.
            return replace(program.found, servers=(*program.found.servers, *conf.servers))
        return program.found

    def _ask(self, program: _Program, not_before_s: float) -> bool:
        """Run it unless it ran so recently; a run that is going on may have seen what was before."""
        if program.failures:
            not_before_s = max(self._every_s, RETRY_S)
        now = self._clock()
        # The loop's timer may fire a hair early.
        if self._loop is None or now < self._asked_at + not_before_s - 0.01 or not program.ask(self._loop):
            return False
        self._asked_at = now
        return True


def _is_stub(conf: Resolvers) -> bool:
    return bool(conf.servers) and all(server.upstream.address in resolved.STUBS for server in conf.servers)


def _time(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
