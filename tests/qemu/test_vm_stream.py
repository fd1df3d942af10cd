"""A supervised machine of QEMU whose card hangs on a stream, which QEMU 7.2 cannot dial again (spec companions 1.1)."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from pyvpnkit.boot import Parts
from tests.support.vm_house import House, house
from vm.hypervisors import qemu
from vm.supervisor.lifecycle import State
from vm.supervisor.status import status

pytestmark = pytest.mark.qemu

BOOT_S = 180.0
CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on cryptomgr.notests"
TEXT = """\
boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: "{cmdline}"}}
memory: 256M
network: qemu-stream
publish: ['0:80']
docker_socket: {{tcp: 80}}
ready: {{probe: lease, limit: 3m}}
restart: {{backoff: 0.1}}
stop: {{grace: 0}}
"""


async def until(made: House, kind: str, text: str = "", times: int = 1) -> None:
    """Until so many events of a kind were told with that text."""
    async with asyncio.timeout(BOOT_S):
        while (
            sum(entry["kind"] == kind and text in entry["text"] for entry in made.entries) < times
        ):  # it happens in another process
            assert not made.task.done(), made.said
            await asyncio.sleep(0.1)


async def typed(made: House, command: str) -> None:
    """Run a command in the guest, by its console; returns when it is done (`pyvpnkit.boot`)."""
    machine = made.supervisor._machine
    assert machine is not None
    assert machine.console is not None
    reader, writer = await machine.console.attach()
    try:
        async with asyncio.timeout(BOOT_S):
            writer.write(f"1 {command}\n".encode())
            while b"@1 0" not in await reader.readline():
                pass
    finally:
        writer.close()


async def fetched(made: House) -> bytes:
    """What the guest's server says at the published port."""
    host, port = made.supervisor.published.held["0:80"].removeprefix("tcp:").split(":")[:2]
    return await answer(*await asyncio.open_connection(host, int(port)))


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    async with asyncio.timeout(BOOT_S):
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        found = await reader.read()
        writer.close()
    return found


async def test_up_served_lost_its_network_up_again_and_down_by_its_guest(parts: Parts) -> None:
    text = TEXT.format(kernel=parts.kernel, initrd=parts.initrd, cmdline=CMDLINE)
    async with house(text, driver=qemu.DRIVER) as made:
        await until(made, "state", "ready")
        (address,) = (await status(made.supervisor))["addresses"]
        assert address["mac"] == made.home.identity().mac
        await typed(made, "httpd -p 80 -h /www")
        assert (await fetched(made)).startswith(b"HTTP/1.")
        assert (await answer(*await asyncio.open_unix_connection(made.home.state.docker))).startswith(b"HTTP/1.")

        os.kill(made.pid("network"), signal.SIGKILL)
        await until(made, "state", "the network was lost, and qemu cannot join it again")
        await until(made, "state", "ready", times=2)
        (again,) = (await status(made.supervisor))["addresses"]
        assert again["address"] == address["address"]
        await typed(made, "httpd -p 80 -h /www")
        assert (await fetched(made)).startswith(b"HTTP/1.")

        machine = made.supervisor._machine
        assert machine is not None
        assert machine.console is not None
        _, writer = await machine.console.attach()
        writer.write(b"2 poweroff -f\n")
        await writer.drain()
        assert await made.over() is State.STOPPED
        writer.close()
        assert made.supervisor.reason == "the guest powered off"
