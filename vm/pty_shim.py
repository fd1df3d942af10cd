"""A pty of ours between a hypervisor that has none to offer, or keeps no log, and whoever opens the console.

    machine --says--> log
                  +-> our pty, while somebody has it open          (what nobody takes is only in the log, and counted)
    machine <-hears-- our pty

Theory of operation. The kernel tells by POLLHUP on our end whether the other end is open, so we do not keep that open ourselves.
Nothing tells when it is opened: that is looked at each `LOOK_S`, and with each piece that the machine says. Who reads slowly holds
the machine up, as a serial line would; who has read nothing for `STALL_S` (a stopped terminal, a forgotten program) counts as
absent until there is room again. What is typed and not heard waits in the kernel, but for `MAX_TYPED` octets. When the machine
ends, our pty stays until its last words are read, for at most `LAST_WORDS_S`: closing our end throws away what is unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import sys
import termios
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from netstack.errors import HostError
from vm.console import LinkedConsole, link_to, make_private, open_pty
from vm.console_log import MOST, ConsoleLog

LOOK_S: Final = 0.2
STALL_S: Final = 1.0
LAST_WORDS_S: Final = 1.0
_LAST_WORDS_LOOK_S: Final = 0.02
CHUNK: Final = 16 << 10
MAX_TYPED: Final = 4096


@dataclass(frozen=True, slots=True)
class ChildEnds:
    """The descriptors that a hypervisor has as stdin and stdout; close ours when it is started (`with`)."""

    stdin: int
    stdout: int

    def __enter__(self) -> ChildEnds:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.stdin)
        os.close(self.stdout)


class PtyShim(LinkedConsole):
    """See the module; a `vm.api.Console`."""

    def __init__(self, path: Path, log: Path, says: int, hears: int, *, most: int = MOST) -> None:
        """Takes the descriptors over; they may be the same. Wants a running loop. Raises `HostError`."""
        super().__init__(path, log)
        self.said = 0
        """Octets from the machine."""
        self.unseen = 0
        """Of them those that nobody took from the pty."""
        self.typed = 0
        """Octets to the machine."""
        self._says = says
        self._hears = hears
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._present = False
        self._stalled = False
        self._unshown = b""
        self._untyped = b""
        self._looking: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._parting: asyncio.TimerHandle | None = None
        self._slave_fd = -1
        """The other end of our pty, only while its last words are waited for."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._close_machine)
            try:
                self._log = ConsoleLog(log, most)
                undo.callback(self._log.close)
                self._master, slave = os.openpty()
                undo.callback(os.close, self._master)
            except OSError as error:
                raise HostError(f"console: {log}, or a pty for it: {error.strerror}") from None
            with os.fdopen(slave):
                tty.setraw(slave)  # it stays so while our end is open
                self._slave = Path(os.ttyname(slave))
                link_to(path, self._slave)
            undo.pop_all()
        for fd in (self._master, says, hears):
            os.set_blocking(fd, False)
        self._poll = select.poll()
        self._poll.register(self._master, select.POLLIN)
        self._loop.add_reader(says, self._hear_machine)
        self._look()

    @classmethod
    def over_pipes(cls, path: Path, log: Path, *, most: int = MOST) -> tuple[PtyShim, ChildEnds]:
        """For a hypervisor with the console on its stdin and stdout, which are to be the second value. Raises `HostError`."""
        child_in, hears = os.pipe()
        says, child_out = os.pipe()
        ends = ChildEnds(child_in, child_out)
        try:
            return cls(path, log, says, hears, most=most), ends
        except HostError:
            with ends:
                raise

    @classmethod
    def over_pty(cls, path: Path, log: Path, pty: Path, *, most: int = MOST) -> PtyShim:
        """For a pty of the hypervisor. Raises `HostError`."""
        make_private(pty)
        fd = open_pty(pty)
        return cls(path, log, fd, fd, most=most)

    async def ended(self) -> None:
        """Until the machine has closed its side."""
        await self._ended.wait()

    async def close(self) -> None:
        """Harmless when repeated."""
        self._end()
        self._part()
        await super().close()

    # The machine's side.

    def _hear_machine(self) -> None:
        try:
            data = os.read(self._says, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # of a pty that is closed: EIO
            data = b""
        if not data:
            self._end()
            return
        self.said += len(data)
        self._log.write(data)
        if not self._present and not self._nobody():
            self._look()
        if not self._present or self._stalled:
            self.unseen += len(data)
            return
        self._unshown = data
        self._show()

    def _tell_machine(self) -> None:
        """Pass on what is typed; no more of it is read before that is taken."""
        try:
            taken = os.write(self._hears, self._untyped)
        except BlockingIOError:
            taken = 0
        except OSError:  # it hears no more, and may go on talking
            self._untyped = b""
            taken = 0
        self.typed += taken
        self._untyped = self._untyped[taken:]
        if self._untyped:
            self._loop.remove_reader(self._master)
            self._loop.add_writer(self._hears, self._tell_machine)
        else:
            self._loop.remove_writer(self._hears)
            self._loop.add_reader(self._master, self._hear_person)

    # The person's side.

    def _look(self) -> None:
        """Whether somebody has our pty open, or has left something in it."""
        if self._looking is not None:
            self._looking.cancel()
        self._looking = None
        if self._nobody():
            self._looking = self._loop.call_later(LOOK_S, self._look)
        else:
            self._present = True
            self._loop.add_reader(self._master, self._hear_person)

    def _nobody(self) -> bool:
        return any(events & select.POLLHUP and not events & select.POLLIN for _, events in self._poll.poll(0))

    def _hear_person(self) -> None:
        try:
            self._untyped = os.read(self._master, MAX_TYPED)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last who had it open has closed it
            self._forget_person()
            return
        self._tell_machine()

    def _forget_person(self) -> None:
        self._loop.remove_reader(self._master)
        self._present = False
        self._drop()
        self._resume()
        with contextlib.suppress(HostError, termios.error):  # what is unread is not for who comes next
            with os.fdopen(open_pty(self._slave)) as slave:
                termios.tcflush(slave, termios.TCIFLUSH)
        self._look()

    def _show(self) -> None:
        """Pass on what is said; the machine waits while that is not taken, but not for longer than `STALL_S`."""
        try:
            taken = os.write(self._master, self._unshown) if self._unshown else 0
        except BlockingIOError:
            taken = 0
        except OSError:
            self._drop()
            taken = 0
        self._unshown = self._unshown[taken:]
        if not self._unshown:
            self._resume()
            return
        if taken and self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._stall is None:
            self._stall = self._loop.call_later(STALL_S, self._give_up)
        self._loop.remove_reader(self._says)
        self._loop.add_writer(self._master, self._show)

    def _resume(self) -> None:
        """There is room in our pty, and nothing waits for it."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        self._stalled = False
        self._loop.remove_writer(self._master)
        self._loop.add_reader(self._says, self._hear_machine)

    def _give_up(self) -> None:
        """Nobody reads: the machine goes on, and our pty is only watched for room."""
        self._stall = None
        self._stalled = True
        self._drop()
        self._loop.add_reader(self._says, self._hear_machine)

    def _drop(self) -> None:
        self.unseen += len(self._unshown)
        self._unshown = b""

    # The end.

    def _end(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        for timer in (self._looking, self._stall):
            if timer is not None:
                timer.cancel()
        for fd in (self._master, self._hears, self._says):
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
        self._close_machine()
        self._log.close()
        with contextlib.suppress(HostError):
            self._slave_fd = open_pty(self._slave)
        self._wait_for_reader(self._loop.time() + LAST_WORDS_S)

    def _close_machine(self) -> None:
        for fd in {self._says, self._hears}:
            os.close(fd)

    def _wait_for_reader(self, until: float) -> None:
        unread = 0
        if self._present and self._slave_fd >= 0 and self._loop.time() < until:
            unread = int.from_bytes(fcntl.ioctl(self._slave_fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        if unread:
            self._parting = self._loop.call_later(_LAST_WORDS_LOOK_S, self._wait_for_reader, until)
        else:
            self._part()

    def _part(self) -> None:
        """Close our pty: whoever has it open reads the end of the file."""
        if self._parting is not None:
            self._parting.cancel()
        for fd in (self._master, self._slave_fd):
            if fd >= 0:
                os.close(fd)
        self._master = self._slave_fd = -1
