"""`pyvpnkit shell`: a shell, or a command, in a namespace behind the stack.

The guest (`pyvpnkit.guest`) is forked first; this process then is its network and nothing else: it reads no terminal, and
what the keyboard sends (Ctrl-C, Ctrl-\\) is for the command alone. When the command has ended, its connections may finish
sending for `grace_s`, or until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Final

from netstack.observe.events import Event, LinkLost
from pyvpnkit.config import Settings
from pyvpnkit.dhcp_client import Lease
from pyvpnkit.guest import Guest
from pyvpnkit.keeper import execute

log = logging.getLogger("pyvpnkit")

DIED: Final = 128 + signal.SIGKILL
"""Status of a guest that could not even tell its own."""


def main(parsed: argparse.Namespace) -> int:
    """Run `parsed.command` and return its exit status; raises `ConfigError` and `HostError` for what prevents that."""
    settings: Settings = dataclasses.replace(parsed.settings, links=(), pid_file=None, user=None)
    command: list[str] = parsed.command or [os.environ.get("SHELL") or "/bin/sh"]
    interactive = not parsed.command
    grace_s = settings.network.timeouts.grace_s
    with _terminal_kept(), Guest.start(lambda: execute(command), mtu=settings.network.mtu, grace_s=grace_s) as guest:
        # Only now: what is imported here the guest need not have in its memory.
        from pyvpnkit import daemon, process

        daemon.start_log(settings.log_level if _log_level_given(parsed) else "warning")
        process.raise_descriptor_limit()
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTTOU, signal.SIGTTIN):
            signal.signal(number, signal.SIG_IGN)
        return daemon.run(lambda: _serve(settings, guest, interactive))


def _log_level_given(parsed: argparse.Namespace) -> bool:
    return "log_level" in parsed.given or parsed.settings.log_level != Settings().log_level


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """A shell that is killed leaves the terminal to its own, now empty, process group: take it back."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        yield
        return
    try:
        before = os.tcgetpgrp(terminal)
        yield
        if before == os.getpgrp() != os.tcgetpgrp(terminal):
            os.tcsetpgrp(terminal, before)
    except OSError:
        log.debug("the terminal is gone", exc_info=True)
    finally:
        os.close(terminal)


async def _serve(settings: Settings, guest: Guest, interactive: bool) -> int:
    from pyvpnkit import daemon, process
    from pyvpnkit.service import Service

    loop = asyncio.get_running_loop()
    began = time.monotonic()
    impatient = asyncio.Event()
    async with Service(settings) as service:
        loop.set_exception_handler(lambda _loop, context: daemon.uncaught(service, context))
        service.attach(guest.link)
        # A shell ignores SIGTERM; what tells it to leave is a hang-up.
        loop.add_signal_handler(signal.SIGTERM, guest.signal, signal.SIGHUP if interactive else signal.SIGTERM)
        loop.add_signal_handler(signal.SIGHUP, guest.signal, signal.SIGHUP)
        loop.add_signal_handler(signal.SIGUSR1, lambda: daemon.print_status(service, time.monotonic() - began))
        process.settle_memory()
        lease = await guest.lease()
        if lease is None:
            return guest.close()
        forget = service.events.subscribe(_warn, flows=False)
        if interactive and sys.stderr.isatty():
            print(_greeting(settings, lease, [str(forward) for forward in service.registry]), file=sys.stderr)
        status = await guest.task_status()
        forget()
        loop.add_signal_handler(signal.SIGINT, impatient.set)
        loop.add_signal_handler(signal.SIGTERM, impatient.set)
        await daemon.first(service.drain(settings.network.timeouts.grace_s), impatient.wait())
    return DIED if status is None else status


def _warn(event: Event) -> None:
    if isinstance(event, LinkLost):
        log.warning("%s: %s; the guest has no network any more", event.link, event.reason)


def _greeting(settings: Settings, lease: Lease, published: list[str]) -> str:
    network = settings.network
    lines = [f"This shell is {lease.address}; gateway, DNS and NTP are {network.gateway}."]
    if network.host_alias is not None:
        names = ", ".join(network.host_names)
        lines.append(f"The host's 127.0.0.1 is {network.host_alias}{f' ({names})' if names else ''} here.")
    lines += [f"Published: {forward}" for forward in published]
    return "\n".join([*lines, "'exit' ends it, and all that was started in it."])
