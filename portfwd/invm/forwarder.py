"""`pyvpnkit forwarder`: VPNKit's `vpnkit-forwarder`, the VM's end of published ports (spec vpnkit 1.2, 7.9).

The host opens flows over data connections, which either side may dial; each flow is carried to a TCP port, UDP port or unix socket
that this VM reaches. The generation of the protocol is found by what the host says first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final

from netstack.errors import ConfigError, NetstackError
from portfwd.invm import flags
from portfwd.invm.data import Data, Flows
from portfwd.invm.limits import Budget, descriptors
from portfwd.invm.transport import FORMS, Address
from portfwd.invm.waiting import unless

log = logging.getLogger("pyvpnkit.forwarder")

PROGRAM: Final = "pyvpnkit forwarder"
FLAGS: Final = {
    "data-listen": flags.Flag(value="ADDRESS", help="accept data connections of the host here"),
    "data-connect": flags.Flag(value="ADDRESS", help="dial the host here, again and again"),
    "control-listen": flags.Flag(value="ADDRESS", help="serve the HTTP control API here"),
    "generation": flags.Flag(value="1|2|3|auto", help="of the protocol [auto for -data-listen, 3 for -data-connect]"),
    "debug": flags.Flag(help="log each flow"),
}
WHAT: Final = f"""\
Carry what the host sends on published ports to TCP ports, UDP ports and unix sockets that this VM reaches.
At least one of -data-listen and -data-connect is needed. ADDRESS: {FORMS}.
SIGHUP writes a status file into the temporary directory, SIGINT and SIGTERM end it."""


def main(argv: Sequence[str]) -> int:
    """Run until a signal ends it; returns the exit status: 0, 1 where something outside failed, 2 for the command line."""
    try:
        given = flags.parse(argv, FLAGS)
        if given.help:
            print(flags.usage(PROGRAM, WHAT, FLAGS))
            return 0
        listen, connect, control = (
            Address.parse(text) if (text := given.text(name)) else None
            for name in ("data-listen", "data-connect", "control-listen")
        )
        generation = given.text("generation")
        _generation(generation, None)
        if given.rest:
            raise ConfigError(f"{given.rest[0]!r} is no flag; addresses follow one, as in -data-listen {given.rest[0]}")
        if listen is None and connect is None:
            raise ConfigError(
                "give -data-listen ADDRESS or -data-connect ADDRESS (or both): where the host's data comes in"
            )
        if control is not None and control.public:
            raise ConfigError(
                f"-control-listen {control}: whoever reaches it opens ports; use a unix socket or tcp:127.0.0.1:PORT"
            )
    except ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if given.on("debug") else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(listen, connect, control, generation))


def _generation(text: str, default: int | None) -> int | None:
    """What the flag says; `None` is found out by what the host says first."""
    match text:
        case "":
            return default
        case "auto":
            return None
        case "1" | "2" | "3":
            return int(text)
    raise ConfigError(f"flag -generation: {text!r} is none of 1, 2, 3 and auto")


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: type[asyncio.AbstractEventLoop] = uvloop.Loop
    return factory


async def _run(listen: Address | None, connect: Address | None, control: Address | None, generation: str) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    most = descriptors()
    data = Data(Flows(Budget(most)), most_connections=most)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, write_status, data)
    try:
        async with AsyncExitStack() as open_doors:
            if control is not None:
                await open_doors.enter_async_context(_control_server(control, data))
            if listen is not None:
                data.listen(listen, generation=_generation(generation, None))
                if listen.public:
                    log.warning(
                        "%s is open to other machines: whoever connects reaches whatever this VM reaches", listen
                    )
            if connect is not None:
                await unless(stop, data.keep_connected(connect, generation=_generation(generation, 3)))
            if listen is not None:
                await stop.wait()
    except NetstackError as error:
        log.error("%s", error)
        return 1
    finally:
        await data.close()
    return 0


def _control_server(address: Address, data: Data) -> AbstractAsyncContextManager[object]:
    try:
        from portfwd.invm.reverse import control_server
    except ImportError as error:
        raise ConfigError(
            f"-control-listen needs what is not installed here: {error}; leave it out, or install it"
        ) from None
    return control_server(address, data)


def write_status(data: Data) -> str:
    """Write what is known of flows and multiplexers to a new file, for people, and return its path."""
    try:
        descriptor, path = tempfile.mkstemp(prefix=f"pyvpnkit-forwarder-{os.getpid()}-", suffix=".status")
        with os.fdopen(descriptor, "w") as file:
            file.write(data.dump())
    except OSError as error:
        log.warning("SIGHUP: the status cannot be written: %s", error)
        return ""
    log.info("SIGHUP: status is in %s", path)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
