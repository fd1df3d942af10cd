"""Keeps the guest's processes: starts the one that matters, passes signals on, and leaves none behind (Linux).

    pyvpnkit shell (the network) ── keeper (in the namespaces) ── command ── whatever it starts

The keeper lives in the guest's namespaces, so they exist as long as it does: what the command still had to send when it
ended is sent before the network goes. It is a subreaper, so daemons that detach from the command become its children and
are found. The control channel tells it of the parent's end: it is then at its end of file, and the kernel sends SIGTERM.

SIGTERM, SIGHUP  passed on to the command; after `grace_s`, or the second time, everything is killed
SIGINT, SIGQUIT  the terminal sends them to the command as well, so they are ignored here
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

LEFT_S: Final = 0.5
"""How long what the command left running may take to end before it is killed."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_WATCHED: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)
_LEFT_ALONE: Final = (signal.SIGINT, signal.SIGQUIT)


def die_with_parent(number: signal.Signals) -> None:
    """The kernel sends us `number` when the process that made us ends (prctl(2)). A change of user forgets it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def keep(
    task: Callable[[], int],
    channel: socket.socket,
    *,
    grace_s: float,
    renew_after_s: float,
    renew: Callable[[], float],
) -> int:
    """Run `task` in a child and return its status, 128+n when a signal ended it, once nothing of it is left.

    `renew` is called `renew_after_s` from now and returns when it is to be called again, in seconds.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _LEFT_ALONE}
    child = os.fork()
    if child == 0:
        status = 125
        try:
            die_with_parent(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if handler == signal.SIG_IGN else signal.SIG_DFL)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec would hand that on
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            channel.close()
            status = task()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    return _Keeper(child, channel, grace_s).run(renew_after_s, renew)


class _Keeper:
    def __init__(self, child: int, channel: socket.socket, grace_s: float) -> None:
        self._child = child
        self._channel = channel
        self._grace_s = grace_s
        self._status: int | None = None

    def run(self, renew_after_s: float, renew: Callable[[], float]) -> int:
        kill_at: float | None = None
        renew_at = time.monotonic() + renew_after_s
        while self._status is None:
            event_at = renew_at if kill_at is None else min(renew_at, kill_at)
            # A wait of weeks (an endless lease) is more than some kernels' timers take.
            info = signal.sigtimedwait(_WATCHED, min(max(event_at - time.monotonic(), 0), 86400.0))
            if info is not None and info.si_signo in (signal.SIGTERM, signal.SIGHUP):
                if kill_at is not None or self._abandoned():
                    _signal_all(signal.SIGKILL)
                else:
                    kill_at = time.monotonic() + self._grace_s
                    for number in (info.si_signo, signal.SIGCONT):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(self._child, number)
            self._reap()
            now = time.monotonic()
            if kill_at is not None and now >= kill_at:
                _signal_all(signal.SIGKILL)
                kill_at = now + 1.0
            elif now >= renew_at and self._status is None:
                renew_at = now + renew()
        self._sweep()
        return self._status

    def _abandoned(self) -> bool:
        """Whether the parent has closed its end of the channel, or died."""
        try:
            return not self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _reap(self) -> bool:
        """Collect whoever has ended; False when no child is left at all."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._child:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code

    def _sweep(self) -> None:
        """End what is left of the command."""
        if not self._reap():
            return
        _signal_all(signal.SIGTERM, signal.SIGHUP, signal.SIGCONT)
        until = time.monotonic() + LEFT_S
        while self._reap():
            left_s = until - time.monotonic()
            if left_s <= 0:
                _signal_all(signal.SIGKILL)
                left_s = 0.05
            signal.sigtimedwait((signal.SIGCHLD,), left_s)


def _signal_all(*numbers: int) -> None:
    """Signal every process below this one, until a look around finds no new one (they may be forking).

    Parents first: a shell that sees its child killed would say so.
    """
    told: set[int] = set()
    while new := [pid for pid in descendants(os.getpid()) if pid not in told]:
        for pid in new:
            for number in numbers:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        told.update(new)


def descendants(pid: int) -> list[int]:
    """The living processes below `pid`, as /proc tells; parents before their children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name before may hold anything
                if state not in (b"Z", b"X"):
                    children.setdefault(int(parent), []).append(int(name))
    found: dict[int, None] = {}  # in order; a number may have been given out again while we looked
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def execute(command: Sequence[str]) -> int:
    """Become `command`; returns, with the status a shell would give, only when that fails."""
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        # A directory of PATH that may not be read would hide that there is no such program anywhere.
        missing = isinstance(error, FileNotFoundError) or shutil.which(command[0], os.F_OK) is None
        why = "not found" if missing else error.strerror
        print(f"pyvpnkit shell: {command[0]}: {why}", file=sys.stderr)
        return 127 if missing else 126
