"""`pyvpnkit run`: a service with signals, readiness, files and a log.

start:   limits, log, pid file, published ports -> another user -> state directory, capture, links -> ready
HUP:     settings again; a mistake in them changes nothing
USR1:    a summary on standard error
TERM:    stop accepting -> wait for flows, at most `grace_s` -> reset the rest -> sockets and files removed -> exit 0
again:   the same without waiting
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from netstack.errors import ConfigError
from pyvpnkit import process
from pyvpnkit.config import Option, Settings
from pyvpnkit.service import Service

log = logging.getLogger("pyvpnkit")

MAX_LISTED: Final = 50
"""Flows written out in a summary; the rest is counted."""

Reload = Callable[[], Settings]
"""Reads the settings again; raises `ConfigError`."""

Beside = Callable[[Service], contextlib.AbstractAsyncContextManager[object]]
"""What a program that we stand in for has besides: called before anything is open, entered before it is said to be ready."""


def main(
    settings: Settings, *, ready_fd: int | None = None, reload: Reload | None = None, beside: Beside | None = None
) -> int:
    """Serve until told to stop; returns the exit status. Raises `ConfigError` and `HostError` for what prevents a start."""
    if not settings.links and not settings.control.listen:  # there guests may come by gvproxy's /connect
        raise ConfigError(
            "links: there is none, so no guest could attach; give --link, for example --link qemu:/tmp/net.sock"
        )
    start_log(settings.log_level)
    limit = process.raise_descriptor_limit()
    log.debug("up to %d descriptors", limit)
    with contextlib.ExitStack() as files:
        if settings.pid_file is not None:
            files.callback(process.PidFile(settings.pid_file).close)
        return run(lambda: _serve(settings, ready_fd, reload, beside))


def run(main: Callable[[], Any]) -> int:
    """Run the coroutine `main()` in the best loop there is, and return what it returns."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return int(runner.run(main()))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def start_log(level: str) -> None:
    """Log to standard error; without the time where a journal adds its own. A log that cannot be written is dropped (R8)."""
    when = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    logging.basicConfig(format=f"{when}%(levelname)s %(message)s", stream=sys.stderr)
    logging.raiseExceptions = False
    set_log_level(level)


def set_log_level(level: str) -> None:
    """For our own modules; libraries keep to warnings."""
    log.setLevel(level.upper())


@contextlib.contextmanager
def _state(settings: Settings) -> Iterator[Path | None]:
    """The directory where what outlives this process is kept, ours alone; `None` for none."""
    if settings.state_dir is None:
        yield None
        return
    try:
        directory = process.StateDirectory(
            process.StateDirectory.default() if settings.state_dir == "auto" else Path(settings.state_dir)
        )
    except ConfigError as error:
        if settings.state_dir != "auto":
            raise
        # Nobody asked for that very directory: a second daemon of one user should still run.
        log.warning("%s; leases and forwards are kept in memory only, and there is no control socket", error)
        yield None
        return
    try:
        yield directory.path
    finally:
        directory.close()


async def _serve(settings: Settings, ready_fd: int | None, reload: Reload | None, beside: Beside | None = None) -> int:
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    stop = _Stop()
    service = Service(settings)
    around = beside(service) if beside is not None else contextlib.nullcontext()
    loop.set_exception_handler(lambda _loop, context: uncaught(service, context))
    service.publish()
    if settings.user is not None:
        process.become(settings.user)
    handlers = {
        signal.SIGTERM: stop.asked,
        signal.SIGINT: stop.asked,
        signal.SIGHUP: lambda: reload_settings(service, reload),
        signal.SIGUSR1: lambda: print_status(service, time.monotonic() - began),
    }
    # Before the links are there: who sees a socket may already ask for the summary, which must not end the process.
    with _state(settings) as service.state_directory, _signals(loop, handlers):
        async with service, around:
            await _until_stopped(service, stop, ready_fd)
    log.info("stopped")
    return 0


async def _until_stopped(service: Service, stop: _Stop, ready_fd: int | None) -> None:
    process.settle_memory()
    doors = service.attachments.listening
    log.info("ready%s", f", listening on {', '.join(doors)}" if doors else "")
    process.notify("READY=1", f"MAINPID={os.getpid()}")
    if ready_fd is not None:
        process.say_ready(ready_fd)
    await first(stop.once.wait(), service.attachments.over.wait())
    process.notify("STOPPING=1")
    if not stop.once.is_set():
        log.info("the last link has ended and none can come any more")
        return
    grace_s = service.settings.network.timeouts.grace_s
    service.stop_accepting()
    log.info("stopping; flows have %g s to finish", grace_s)
    await first(service.drain(grace_s), stop.twice.wait())


class _Stop:
    """The first wish to stop, and the second, which is impatient."""

    def __init__(self) -> None:
        self.once = asyncio.Event()
        self.twice = asyncio.Event()

    def asked(self) -> None:
        (self.twice if self.once.is_set() else self.once).set()


async def first(*waits: Any) -> None:
    """Wait for the first of several, and end the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, handlers: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def uncaught(service: Service, context: Mapping[str, Any]) -> None:
    """Nothing of ours should come here: counted, logged, and the loop goes on."""
    service.stack.counters.contained += 1
    error = context.get("exception")
    log.error("a fault of ours, contained: %s", context.get("message"), exc_info=error if error is not None else False)


def reload_settings(service: Service, reload: Reload | None) -> None:
    """SIGHUP."""
    process.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        new = reload() if reload is not None else service.settings
    except ConfigError as error:
        log.error("settings are not reloaded, because of\n%s", error)
    else:
        found = service.reload(new)
        set_log_level(new.log_level)
        service.listen()
        if found.now or not found.failed:
            log.info("reloaded: %s", _keys(found.now) or "nothing that can change now has changed")
        if found.failed:
            log.error("not reloaded, or not all of it: %s; SIGHUP tries again", _keys(found.failed))
        if found.later:
            log.warning("these need a restart: %s", _keys(found.later))
    process.notify("READY=1")


def _keys(options: Iterable[Option]) -> str:
    return ", ".join(option.key for option in options)


def print_status(service: Service, up_s: float, out: TextIO | None = None) -> None:
    """SIGUSR1."""
    lines = [f"pyvpnkit {os.getpid()}, up {up_s:.0f} s"]
    for name, value in service.status().items():
        lines += _shown(name, value, 0)
    with contextlib.suppress(OSError):
        print("\n".join(lines), file=out or sys.stderr, flush=True)


def _shown(name: str, value: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    match value:
        case Mapping():
            # Zeros say nothing and would hide what does.
            wanted = {key: one for key, one in value.items() if not _says_nothing(one)}
            plain = {key: one for key, one in wanted.items() if not isinstance(one, Mapping | list | tuple)}
            yield f"{indent}{name}: " + (
                ", ".join(f"{key} {one}" for key, one in plain.items()) or ("" if wanted else "-")
            )
            for key, one in wanted.items():
                if key not in plain:
                    yield from _shown(str(key), one, depth + 1)
        case list() | tuple():
            yield f"{indent}{name}: {len(value) or '-'}"
            yield from (f"{indent}  {_line(one)}" for one in value[:MAX_LISTED])
            if len(value) > MAX_LISTED:
                yield f"{indent}  and {len(value) - MAX_LISTED} more"
        case _:
            yield f"{indent}{name}: {value}"


def _says_nothing(value: Any) -> bool:
    return not any(value.values()) if isinstance(value, Mapping) else not value


def _line(one: Any) -> str:
    """One entry of a list: the values of a mapping, those that are mere numbers or switches with their names."""
    if not isinstance(one, Mapping):
        return str(one)
    words = []
    for key, value in one.items():
        match value:
            case bool():
                words += [key] if value else []
            case int() | float():
                words.append(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}")
            case None | "":
                pass
            case list() | tuple():
                words.append(f"{key}={','.join(map(str, value))}")
            case _:
                words.append(str(value))
    return " ".join(words)
