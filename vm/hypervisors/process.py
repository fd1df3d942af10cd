"""Programs that are ours for as long as we live: hypervisors, and what runs beside them.

**Parent-death rule.** What `spawn` starts dies with us, however we die. On Linux the kernel does it (`PR_SET_PDEATHSIG`), and the
program has to ask for it itself. `preexec_fn` could, but it runs Python between fork and exec of a process that has threads, where
any lock may be held for ever; so a launcher of a few lines, a fresh interpreter, asks and then becomes the program: same pid, one
exec more (about 20 ms). It looks at its parent afterwards, lest that has ended before it asked. Two things to know of the kernel's
rule: it follows the *thread* that started the program (here the event loop's), and a set-user-id program is not bound by it.
Elsewhere there is no such rule: what outlives us is found by its record (`Record`).

**Its own session.** A Ctrl-C at our terminal is for us: we decide how a machine ends.

**What it says** (standard error, and standard output unless that is wanted) goes through us to a log of two files of at most
`MAX_LOG` octets, since a guest can make some hypervisors talk; the last of it is at hand for complaints.

**Whose modules.** Programs in Python that are started as `python -m vm...` would look for modules in the directory that a person
happens to be in, whoever wrote what is there; `SAFE` keeps them from that.

**Killing by number.** A pid in a file may long be somebody else's. A record keeps the time of the start beside it, and the
signal is sent through a descriptor of the process that was looked at (pidfd).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from netstack.errors import HostError

MAX_LOG: Final = 1 << 20
KEPT: Final = 4096
"""Octets of what it said last."""
SAFE: Final[Mapping[str, str]] = {"PYTHONSAFEPATH": "1"}
"""For the environment of what we start."""
_DRAIN_S: Final = 1.0
"""Who inherited its standard error may keep that open for longer than it lives."""

_LAUNCHER: Final = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and that would be inherited
    signal.signal(ignored, signal.SIG_DFL)
try:
    os.execv(sys.argv[2], sys.argv[3:])
except OSError as error:
    os.write(2, f"{sys.argv[2]}: {error.strerror}\\n".encode())
    os._exit(127)
"""


def find(program: str, install: str = "") -> str:
    """The path of `program`. Raises `HostError` where it is not installed; `install` says what to do about it."""
    found = shutil.which(program)
    if found is None:
        raise HostError(f"{program} is not installed" + (f"; {install}" if install else ""))
    return found


class Process:
    """A program that `spawn` started."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        name: str,
        log: Path,
        said: asyncio.StreamReader,
        pipe: asyncio.ReadTransport,
    ) -> None:
        self._process = process
        self._pipe = pipe
        self.name = name
        self.log = log
        self.pid = process.pid
        self._last = b""
        self._pump = asyncio.create_task(self._keep(said))

    @property
    def returncode(self) -> int | None:
        """`None` while it runs, and negative for a signal."""
        return self._process.returncode

    @property
    def stdin(self) -> asyncio.StreamWriter | None:
        return self._process.stdin

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """Where `spawn` was asked for a pipe."""
        return self._process.stdout

    async def wait(self) -> int:
        """Until it is gone and what it said is in the log; its exit status."""
        status = await self._process.wait()
        await asyncio.wait([self._pump], timeout=_DRAIN_S)
        return status

    def terminate(self) -> None:
        """SIGTERM; nothing where it is gone already, as with `kill`."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def said(self) -> str:
        """The last of what it said."""
        return self._last.decode(errors="replace").strip()

    async def close(self) -> None:
        """Kill it if it runs; afterwards nothing of it is left, nor of what it has started in its session."""
        self._kill_group()
        await self.wait()
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump
        if self.stdin is not None:
            self.stdin.close()
        self._pipe.close()

    def _kill_group(self) -> None:
        """A group keeps the number of a leader that is gone from being given to another process. One that is empty does not:
        so not where a process has that number again."""
        if self.returncode is None or (sys.platform == "linux" and not Path(f"/proc/{self.pid}").exists()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    async def _keep(self, said: asyncio.StreamReader) -> None:
        log = _open_log(self.log)
        try:
            while octets := await said.read(4096):
                self._last = (self._last + octets)[-KEPT:]
                if log.tell() + len(octets) > MAX_LOG:
                    log.close()
                    self.log.replace(self.log.with_name(f"{self.log.name}.1"))
                    log = _open_log(self.log)
                log.write(octets)
        except OSError:  # the disk is full, or the directory is gone: it must not be blocked by that
            while await said.read(4096):
                pass
        finally:
            log.close()


def _open_log(path: Path) -> IO[bytes]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    log = os.fdopen(descriptor, "ab", buffering=0)
    log.seek(0, os.SEEK_END)
    return log


async def spawn(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    log: Path,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
    install: str = "",
) -> Process:
    """Start `argv` with `env` besides our own environment. Raises `HostError` where there is no such program (`find`).

    `stdin` and `stdout` are a descriptor, or `subprocess.PIPE`; without `stdout` it goes to the log, as standard error does. The
    directory of the log is made.
    """
    words = [find(argv[0], install), *argv]
    if sys.platform == "linux":
        words = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *words]
    else:
        words = words[:1] + words[2:]
    # A pipe of our own: asyncio's `wait` waits for the end of its pipes too, and who inherited one may keep it open for ever.
    reader, writer = os.pipe()
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _open_log(log).close()
        process = await asyncio.create_subprocess_exec(
            *words,
            env={**os.environ, **SAFE, **(env or {})},
            stdin=stdin,
            stdout=writer if stdout is None else stdout,
            stderr=writer,
            pass_fds=tuple(pass_fds),
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        os.close(reader)
        raise HostError(f"{argv[0]} cannot be started: {error}") from None
    finally:
        os.close(writer)
    said = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(said), os.fdopen(reader, "rb", buffering=0)
    )
    return Process(process, Path(argv[0]).name, log, said, pipe)


async def until(true: Callable[[], bool], process: Process, limit_s: float, what: str) -> None:
    """Wait for what `process` is to do, usually a socket that is to be there. Raises `HostError` with what it said when it ends
    instead, or takes longer."""
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    while not true():
        if process.returncode is not None:
            raise await ended(process)
        if loop.time() >= end:
            raise HostError(f"{process.name}: no {what} within {limit_s:.0f} s" + _quoted(process))
        await asyncio.sleep(0.01)


async def ended(process: Process) -> HostError:
    """What to raise when it has ended before its time."""
    status = await process.wait()
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return HostError(f"{process.name} ended {how}" + _quoted(process))


def _quoted(process: Process) -> str:
    return f":\n{said}" if (said := process.said()) else f"; it said nothing ({process.log})"


# Processes of which there is only a number.


def started(pid: int) -> str | None:
    """When process `pid` was started, in words that no other process of that number ever has; `None` where there is none."""
    if sys.platform != "linux":
        said = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return "-".join(said.stdout.split()) or None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    if fields[0] in ("Z", "X"):
        return None
    return f"{boot}-{fields[19]}"  # proc(5): field 22, counted from the third


@dataclass(frozen=True, slots=True)
class Record:
    """A process as it is kept in a file."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Record | None:
        """`None` where there is no such process."""
        when = started(pid)
        return None if when is None else cls(pid, when)

    def write(self, path: Path) -> None:
        scratch = path.with_name(f"{path.name}.new")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{self.pid} {self.started}\n")
        scratch.replace(path)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """`None` where there is none, or it makes no sense."""
        try:
            pid, when = path.read_text().split()
            return cls(int(pid), when) if int(pid) > 1 else None
        except (OSError, ValueError):
            return None

    def runs(self) -> bool:
        return started(self.pid) == self.started

    def signal(self, number: int) -> bool:
        """Send it a signal; False where it is gone, whoever has its number now."""
        if sys.platform != "linux":
            if not self.runs():
                return False
            os.kill(self.pid, number)
            return True
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.runs():  # what the descriptor stands for cannot become another from here on
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True
