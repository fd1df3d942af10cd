"""A machine that is none: a program that behaves as a hypervisor with a guest, for tests of those who look after machines.

    python -m vm.hypervisors.fake_machine --state DIR [--vsock DIR --cid N] [--name NAME] [WORD ...]

Pids, logs, exit statuses, signals and the death of a parent are real; so are the console (a pty) and the sockets of vsock. The
words, which stand in `VmSpec.extra`, say how it behaves (`Behaviour`). More can be done to it while it runs, by any process, by
orders on `DIR/monitor.sock`: a JSON object a line, each answered by a line `{"return": ...}` or `{"error": "..."}`; what happens
is told to all who are connected as `{"event": "..."}`.

    cont            let it go: it is started held
    pause, resume   nothing is said, and nobody is served, in between
    powerdown       the power button
    console         the path of the pty
    boot            for `boot=signal`, as SIGUSR1 does
    poweroff, reboot, panic     what a guest does by itself
    crash           {"order": "crash", "status": 3}; negative for a signal
    dial            {"order": "dial", "port": 4098, "send": "..."}: what the guest dials at CID 2 answers until it closes

On the console, `poweroff`, `reboot` and `panic` do the same, and any other line comes back with `echo: ` before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
import tty
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError

LINE: Final = 65536
MAX_CLIENTS: Final = 64
SERVICES: Final = ("echo", "docker", "eof", "hold")
"""What a port of the guest may have: octets come back; `GET /_ping` has Docker's answer; the end of file at once (as of the time
synchronisation); nothing ever."""
_PING: Final = b"HTTP/1.1 200 OK\r\nServer: Docker/27.0 (fake)\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK"


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What the words say, each `name=value`; times are seconds."""

    start: str = "works"
    """`works`, `fails` (it says why and ends with status 1), `hangs` (there is never a monitor)."""
    boot: str = "now"
    """`now`, after so many seconds, `signal` (or the order `boot`), `never`. Before, nobody listens at the guest's ports."""
    powerdown: str = "obeyed"
    """`obeyed`, `ignore`."""
    shutdown: float = 0.0
    """How long the guest takes to power down."""
    crash_after: float | None = None
    """It crashes so long after it was let go."""
    crash_status: int = 1
    """With this exit status; negative: by this signal."""
    crash_times: int | None = None
    """Only in its first so many lives in this state directory."""
    serve: Mapping[int, str] = field(default_factory=dict)
    """`serve=PORT:SERVICE`, any number of times."""

    @classmethod
    def parse(cls, words: Sequence[str]) -> Behaviour:
        """Raises `ConfigError`."""
        found: dict[str, Any] = {}
        serve: dict[int, str] = {}
        for word in words:
            name, _, value = word.partition("=")
            try:
                if name == "serve":
                    port, _, service = value.partition(":")
                    serve[int(port)] = _one_of(service, SERVICES)
                else:
                    found[name.replace("-", "_")] = _WORDS[name](value)
            except (KeyError, ValueError):
                raise ConfigError(
                    f"fake: {word!r} is unknown; there are {', '.join(_WORDS)} and serve=PORT:SERVICE"
                ) from None
        return cls(**found, serve=serve)


def _one_of(value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(value)
    return value


def _boot(value: str) -> str:
    return value if value in ("now", "signal", "never") else str(float(value))


_WORDS: Final[Mapping[str, Callable[[str], Any]]] = {
    "start": lambda value: _one_of(value, ("works", "fails", "hangs")),
    "boot": _boot,
    "powerdown": lambda value: _one_of(value, ("obeyed", "ignore")),
    "shutdown": float,
    "crash-after": float,
    "crash-status": int,
    "crash-times": int,
}


class FakeMachine:
    """The program's state: held, running or paused; booted or not."""

    def __init__(self, name: str, state: Path, behaviour: Behaviour, vsock: Path | None, cid: int) -> None:
        self.name = name
        self.state = state
        self.behaviour = behaviour
        self.vsock = vsock
        self.cid = cid
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.running = asyncio.Event()
        self.booted = asyncio.Event()
        self._master, self._slave = pty.openpty()
        self._line = b""
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._powering_down = False

    async def run(self) -> int:
        """Until it ends; the exit status, negative for the signal by which it is to end."""
        loop = asyncio.get_running_loop()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        loop.add_reader(self._master, self._typed)
        loop.add_signal_handler(signal.SIGUSR1, self.booted.set)
        os.umask(0o177)
        await asyncio.start_unix_server(self._monitor, self.state / "monitor.sock", limit=LINE)
        if self.vsock is not None:
            await asyncio.start_unix_server(self._connect, self.vsock / "connect", limit=LINE)
            await asyncio.start_unix_server(self._hybrid, self.vsock / "vsock", limit=LINE)
        return await self.status

    # What can be done to it.

    async def order(self, order: Mapping[str, Any]) -> Any:
        """The answer. Raises `ValueError` for what is no order."""
        match order.get("order"):
            case "cont":
                if not self.running.is_set():
                    self.running.set()
                    self._later(self._live())
            case "pause":
                self.running.clear()
                asyncio.get_running_loop().remove_reader(self._master)
            case "resume":
                self.running.set()
                asyncio.get_running_loop().add_reader(self._master, self._typed)
            case "powerdown":
                self._later(self._power_down(by_guest=False))
            case "console":
                return os.ttyname(self._slave)
            case "boot":
                self.booted.set()
            case "poweroff" | "reboot" | "panic" as what:
                self._by_itself(what)
            case "crash":
                self._end(int(order.get("status", self.behaviour.crash_status)))
            case "dial":
                return await self._dial(int(order["port"]), str(order.get("send", "")))
            case unknown:
                raise ValueError(f"there is no order {unknown!r}")
        return None

    def _by_itself(self, what: str) -> None:
        match what:
            case "poweroff":
                self._later(self._power_down(by_guest=True))
            case "reboot":
                self._tell(event="reset", by_guest=True)
                self._say(f"{self.name} restarts")
            case "panic":
                self._say("Kernel panic - not syncing")
                self._tell(event="panic")

    async def _live(self) -> None:
        lives = self._count_lives()
        self._say(f"{self.name} boots")
        crash = self.behaviour.crash_after
        if crash is not None and (self.behaviour.crash_times is None or lives <= self.behaviour.crash_times):
            self._later(self._crash(crash))
        match self.behaviour.boot:
            case "now":
                self.booted.set()
            case "never" | "signal":
                pass
            case seconds:
                await asyncio.sleep(float(seconds))
                self.booted.set()
        await self.booted.wait()
        await self.running.wait()
        self._say(f"{self.name} login: ", end="")

    def _count_lives(self) -> int:
        path = self.state / "fake-lives.json"
        with contextlib.suppress(OSError, ValueError):
            lives = int(path.read_text()) + 1
            path.write_text(str(lives))
            return lives
        path.write_text("1")
        return 1

    async def _crash(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        print("the fake machine crashes, as it was told", file=sys.stderr, flush=True)
        self._end(self.behaviour.crash_status)

    async def _power_down(self, *, by_guest: bool) -> None:
        self._tell(event="powerdown")
        if self._powering_down or (self.behaviour.powerdown == "ignore" and not by_guest):
            return
        self._powering_down = True
        await self.running.wait()
        self._say(f"{self.name} goes down")
        await asyncio.sleep(self.behaviour.shutdown)
        self._tell(event="shutdown", by_guest=by_guest)
        self._end(0)

    def _end(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)

    # Its console.

    def _typed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._line += os.read(self._master, 4096)
        *lines, self._line = self._line.replace(b"\r", b"\n").split(b"\n")
        self._line = self._line[-LINE:]
        for line in lines:
            if (word := line.decode(errors="replace")) in ("poweroff", "reboot", "panic"):
                self._by_itself(word)
            else:
                self._say(f"echo: {word}")

    def _say(self, text: str, end: str = "\r\n") -> None:
        with contextlib.suppress(BlockingIOError):  # nobody has read for long: lost, as on a serial line
            os.write(self._master, (text + end).encode())

    # Its sockets.

    async def _monitor(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            writer.close()
            return
        self._clients.add(writer)
        try:
            while line := await reader.readline():
                try:
                    answer: dict[str, Any] = {"return": await self.order(json.loads(line))}
                except (ValueError, KeyError, AttributeError, OSError) as error:
                    answer = {"error": str(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    def _tell(self, **event: Any) -> None:
        for client in self._clients:
            client.write(json.dumps(event).encode() + b"\n")

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """HyperKit's: `CID.PORT` in hexadecimal, unanswered (spec companions 1.2)."""
        with contextlib.suppress(OSError, EOFError, ValueError):
            cid, port = (int(part, 16) for part in (await reader.readexactly(18)).split(b"."))
            if cid == self.cid and self.booted.is_set() and port in self.behaviour.serve:
                await self._serve(port, reader, writer)
        writer.close()

    async def _hybrid(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Firecracker's: CONNECT and OK (spec companions 1.2)."""
        with contextlib.suppress(OSError, EOFError, ValueError):
            word, port = (await reader.readline()).split()
            if word == b"CONNECT" and self.booted.is_set() and int(port) in self.behaviour.serve:
                writer.write(b"OK 1073741824\n")
                await self._serve(int(port), reader, writer)
        writer.close()

    async def _serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.running.wait()
        match self.behaviour.serve[port]:
            case "echo":
                while octets := await reader.read(LINE):
                    await self.running.wait()
                    writer.write(octets)
                    await writer.drain()
                writer.write_eof()
            case "docker":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(_PING)
                await writer.drain()
            case "hold":
                await reader.read()

    async def _dial(self, port: int, send: str) -> str:
        if self.vsock is None:
            raise ValueError("it has no vsock")
        path = self.vsock / f"{2:08x}.{port:08x}"
        reader, writer = await asyncio.open_unix_connection(path if path.exists() else self.vsock / f"vsock_{port}")
        try:
            writer.write(send.encode())
            writer.write_eof()
            return (await reader.read(LINE)).decode(errors="replace")
        finally:
            writer.close()

    def _later(self, task: Any) -> None:
        kept = asyncio.create_task(task)
        self._tasks.add(kept)
        kept.add_done_callback(self._tasks.discard)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m vm.hypervisors.fake_machine", description="A machine for tests.")
    options.add_argument("--state", type=Path, required=True, help="the machine's directory")
    options.add_argument("--name", default="fake")
    options.add_argument("--vsock", type=Path, help="the directory of vsock's sockets")
    options.add_argument("--cid", type=int, default=3)
    options.add_argument("words", nargs="*")
    chosen = options.parse_args(argv)
    behaviour = Behaviour.parse(chosen.words)
    if behaviour.start == "fails":
        print("the fake machine does not start, as it was told", file=sys.stderr)
        return 1
    if behaviour.start == "hangs":
        while True:
            signal.pause()

    async def live() -> int:
        return await FakeMachine(chosen.name, chosen.state, behaviour, chosen.vsock, chosen.cid).run()

    status = asyncio.run(live())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
