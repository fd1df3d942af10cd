"""A person at a machine's console: the terminal is raw, all keys but one go to the machine, and afterwards it is as it was before.

It works without a terminal too (`echo poweroff | ...`): then there is no key to leave by, and it is over when the input has ended
and the console has been quiet for a while.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, Final

from vm.console import holders, open_pty
from vm.console_log import last_lines

ESCAPE: Final = b"\x1d"
"""Ctrl-]"""
QUIET_S: Final = 1.0
CHUNK: Final = 4096
MAX_TYPED: Final = 4096
"""Keys that the machine has not taken."""

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


class Left(Enum):
    """Why `interact` returned."""

    ESCAPE = "the key to leave was pressed"
    CONSOLE_ENDED = "the machine's console has ended"
    INPUT_ENDED = "the input has ended"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def interact(
    path: Path,
    *,
    escape: bytes = ESCAPE,
    log: Path | None = None,
    lines: int = 0,
    quiet_s: float = QUIET_S,
    stdin: int = 0,
    stdout: int = 1,
    say: Callable[[str], None] = _say,
) -> Left:
    """Join `stdin` and `stdout` with the console at `path` until one of them ends, or `escape` (one octet) is pressed.

    First the last `lines` of `log` are shown. `say` gets what is for the person and not of the machine. Raises `HostError` where
    there is no console. A signal that would end this process does so after the terminal is restored.
    """
    others = holders(path)
    with os.fdopen(open_pty(path), "rb", 0) as console:
        at_terminal = os.isatty(stdin)
        if others:
            say(f"{path} is open in {', '.join(others)} too; each gets a part of what the machine says")
        if at_terminal:
            say(f"{path}: press {_name(escape)} to leave")
        with _raw(stdin) if at_terminal else contextlib.nullcontext():
            if log is not None and lines:
                _write(stdout, last_lines(log, lines))
            left = _carry(console.fileno(), stdin, stdout, escape if at_terminal else b"", quiet_s)
    if at_terminal:
        say(f"\r\n{left.value}")
    return left


def _carry(console: int, stdin: int, stdout: int, escape: bytes, quiet_s: float) -> Left:
    typed = b""
    more = True
    poll = select.poll()
    poll.register(stdin, select.POLLIN)
    while True:
        poll.register(console, select.POLLIN | (select.POLLOUT if typed else 0))
        ready = dict(poll.poll(None if more or typed else quiet_s * 1000))
        if not ready:
            return Left.INPUT_ENDED
        happened = ready.get(console, 0)
        if typed and happened & select.POLLOUT:
            typed = typed[_put(console, typed) :]
        if happened & ~select.POLLOUT:
            said = _read(console)
            if said == b"":
                return Left.CONSOLE_ENDED
            _write(stdout, said or b"")
        if stdin in ready and (keys := _read(stdin)) is not None:
            if escape and escape in keys:
                return Left.ESCAPE
            more = bool(keys)
            typed += keys
        # At a terminal keys are read even when the machine takes none, for one may be that to leave by; too many are lost.
        if escape:
            typed = typed[:MAX_TYPED]
        if more and (escape or not typed):
            poll.register(stdin, select.POLLIN)
        else:
            with contextlib.suppress(KeyError):
                poll.unregister(stdin)


def _read(fd: int) -> bytes | None:
    """What `poll` said is there, `None` if another reader had it; empty at the end, which of a terminal is an error (EIO)."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _put(console: int, typed: bytes) -> int:
    try:
        return os.write(console, typed)
    except OSError:  # no room after all; or the end, which reading finds too
        return 0


def _write(fd: int, octets: bytes) -> None:
    while octets:
        octets = octets[os.write(fd, octets) :]


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """The terminal raw, and as it was afterwards, also when a signal ends this process."""
    before = termios.tcgetattr(terminal)
    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, _raise) for number in _ENDING} if here else {}
    ended_by = 0
    try:
        tty.setraw(terminal, termios.TCSADRAIN)  # what is typed already is not thrown away
        yield
    except _Ended as ended:
        ended_by = ended.number
    finally:
        # What the terminal answers to questions of the machine must not become words of a shell: it is thrown away.
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ended_by:
        signal.raise_signal(ended_by)
        raise KeyboardInterrupt  # for a handler that returned: this is over all the same


class _Ended(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _raise(number: int, frame: FrameType | None) -> Any:
    raise _Ended(number)


def _name(key: bytes) -> str:
    return f"Ctrl-{chr(key[0] + 64)}" if key[0] < 32 else repr(chr(key[0]))
