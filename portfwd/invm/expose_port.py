"""`pyvpnkit expose-port`: VPNKit's `vpnkit-expose-port`, dockerd's `--userland-proxy-path` (spec vpnkit 1.3, 7.5).

    bind in the VM -> ask the host -> tell the parent -> wait for SIGTERM or SIGINT -> give the port back

The parent is told on descriptor 3, where it is a pipe or a socket: `0\\n`, or `1\\n` and what went wrong. With `-i`, or on
a terminal, a person is told instead.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from netstack.errors import ConfigError, NetstackError
from portfwd.invm import flags
from portfwd.invm.control import FORMS, Control, control
from portfwd.invm.limits import Budget, descriptors
from portfwd.invm.local_bind import MODES, LocalBind, bind, lent_socket
from portfwd.invm.ports import PROTOCOLS, Port, checked_ip
from portfwd.invm.settings import ENDINGS, NAME, PLACES, control_setting
from portfwd.invm.waiting import unless

log = logging.getLogger("pyvpnkit.expose-port")

PROGRAM: Final = "pyvpnkit expose-port"
PARENT_FD: Final = 3  # spec vpnkit 7.5
LISTEN_FD: Final = 4
"""Where a dockerd that says `-use-listen-fd` puts the socket it bound itself."""
GIVE_BACK_S: Final = 10.0
"""How long the end of this process waits for the host; dockerd waits for it in turn."""
RENEW_S: Final = 1.0
"""Between attempts to get a port back that the host has lost."""

FLAGS: Final = {
    "proto": flags.Flag(value="tcp|udp|unix", default="tcp", help="what is exposed"),
    "host-ip": flags.Flag(value="IP", help="address of the host to listen on"),
    "host-port": flags.Flag(value="PORT", default="-1", help="port of the host; 0: any"),
    "host-path": flags.Flag(value="PATH", help="unix socket on the host (-proto unix)"),
    "container-ip": flags.Flag(value="IP", help="where it leads to, as seen from the VM"),
    "container-port": flags.Flag(value="PORT", default="-1", help="port there"),
    "container-path": flags.Flag(value="PATH", help="unix socket in the VM (-proto unix)"),
    "local-bind": flags.Flag(value="|".join(MODES), help="listen in the VM as well [best-effort]"),
    "no-local-ip": flags.Flag(help="the same as -local-bind never"),
    "use-listen-fd": flags.Flag(help=f"descriptor {LISTEN_FD} is bound in the VM already"),
    "control": flags.Flag(value="WHERE", help="how the host is asked; from the configuration file without it"),
    "i": flags.Flag(help="tell a person, not the parent on descriptor 3"),
    "debug": flags.Flag(help="log more"),
}
WHAT: Final = f"""\
Expose a port of this VM, or of a container in it, on the host until SIGTERM or SIGINT.
WHERE: {FORMS}.
Without -control: `control` in {NAME}.{{{",".join(ENDINGS)}}}, in {PLACES[0]} or the current directory."""


class Parent:
    """Who started this process and waits to hear how it went."""

    def __init__(self, descriptor: int | None, person: bool) -> None:
        self._descriptor = descriptor
        self._person = person

    @classmethod
    def of(cls, descriptor: int, interactive: bool) -> Parent:
        """To be called before this process opens anything: later, the number may be a descriptor of its own."""
        if interactive or (sys.stdout is not None and sys.stdout.isatty()):
            return cls(None, True)
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError:
            return cls(None, False)
        if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
            return cls(None, False)
        os.set_inheritable(descriptor, False)
        return cls(descriptor, False)

    def succeeded(self, port: Port) -> None:
        if self._person:
            print(f"{port}", flush=True)
        self._tell(b"0\n")

    def failed(self, why: str) -> None:
        if self._descriptor is None:
            print(f"{PROGRAM}: {why}", file=sys.stderr)
        self._tell(b"1\n" + why.encode(errors="replace"))

    def _tell(self, octets: bytes) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.write(descriptor, octets)
        except OSError as error:
            log.warning("the parent on descriptor %d cannot be told: %s", descriptor, error.strerror)
        with suppress(OSError):
            os.close(descriptor)


def main(argv: Sequence[str], *, parent_fd: int = PARENT_FD, places: Sequence[str] = PLACES) -> int:
    """Run until a signal; returns the exit status: 0, 1 for a failure (also of the command line: dockerd knows no other)."""
    try:
        given = flags.parse(argv, FLAGS, tolerant=True)
    except ConfigError as error:
        Parent.of(parent_fd, False).failed(str(error))
        return 1
    if given.help:
        print(flags.usage(PROGRAM, WHAT, FLAGS))
        return 0
    parent = Parent.of(parent_fd, given.on("i"))
    try:
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.DEBUG if given.on("debug") else logging.INFO,
            format=f"{PROGRAM}: %(message)s",
        )
        logging.getLogger("asyncio").setLevel(logging.WARNING)
        if given.unknown:
            log.warning("unknown flags are ignored: %s", " ".join(given.unknown))
        if given.rest:
            raise ConfigError(f"{given.rest[0]!r} is no flag")
        port = wanted(given)
        mode = "never" if given.on("no-local-ip") else given.text("local-bind") or "best-effort"
        if mode not in MODES:
            raise ConfigError(f"flag -local-bind: {mode!r} is none of {', '.join(MODES)}")
        where = given.text("control") or control_setting(places)
        if not where:
            raise ConfigError(
                f"where to ask the host is not said: give -control WHERE ({FORMS}), or write /etc/{NAME}.yaml with a line such as "
                'control: "4098" (VPNKit\'s own default, a vsock port)'
            )
        way = control(where)
        lent = lent_socket(LISTEN_FD, port.proto) if given.on("use-listen-fd") and port.proto != "unix" else None
        local = bind(port, mode, lent)
    except NetstackError as error:
        parent.failed(str(error))
        return 1
    try:
        return asyncio.run(_run(way, port, local, parent))
    finally:
        if local is not None:
            local.close()


def wanted(given: flags.Given) -> Port:
    """The port that the flags name; raises `ConfigError`."""
    proto = given.text("proto")
    if proto not in PROTOCOLS:
        raise ConfigError(f"flag -proto: {proto!r} is none of {', '.join(PROTOCOLS)}")
    if proto == "unix":
        for name in ("host-path", "container-path"):
            if not given.text(name):
                raise ConfigError(f"flag -{name} is missing: -proto unix needs it")
        return Port(proto=proto, out_path=given.text("host-path"), in_path=given.text("container-path"))
    for name in ("host-ip", "container-ip", "host-port", "container-port"):
        if given.text(name) in ("", "-1"):
            raise ConfigError(f"flag -{name} is missing: -proto {proto} needs it")
    return Port(
        proto=proto,
        out_ip=checked_ip("host-ip", given.text("host-ip")),
        out_port=flags.number(given, "host-port", least=0, most=65535),
        in_ip=checked_ip("container-ip", given.text("container-ip")),
        in_port=flags.number(given, "container-port", least=1, most=65535),
    )


async def _run(way: Control, port: Port, local: socket.socket | None, parent: Parent) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    serving = None if local is None else LocalBind(local, port, budget=Budget(descriptors()))
    try:
        return await _exposed(way, port, parent, stop)
    finally:
        if serving is not None:
            await serving.close()


async def _exposed(way: Control, port: Port, parent: Parent, stop: asyncio.Event) -> int:
    status = 0
    try:
        granted = await unless(stop, way.expose(port))
        if granted is not None:
            parent.succeeded(granted)
            log.debug("exposed: %s", granted)
            await _hold(way, granted, stop)
    except NetstackError as error:
        parent.failed(str(error))
        status = 1
    try:
        async with asyncio.timeout(GIVE_BACK_S):
            await way.unexpose()
    except TimeoutError:
        log.warning("%s cannot be given back: the host does not answer within %g s", port, GIVE_BACK_S)
    except NetstackError as error:
        log.warning("%s cannot be given back: %s", port, error)
    return status


async def _hold(way: Control, port: Port, stop: asyncio.Event) -> None:
    """Until `stop`; a port that the host lost (it was restarted, say) is asked for again."""
    while (why := await unless(stop, way.lost())) is not None:
        log.warning("%s has ended: %s; asking for it again", port, why)
        while not stop.is_set():
            try:
                if await unless(stop, way.expose(port)) is not None:
                    log.info("exposed again: %s", port)
                break
            except NetstackError as error:
                log.debug("%s", error)
                await unless(stop, asyncio.sleep(RENEW_S))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
