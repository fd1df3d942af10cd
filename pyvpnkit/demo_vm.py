"""`pyvpnkit demo --vm`: the tour with a machine, whose network card is a ring in memory that it shares with us.

    host worker ── JSON ── this process: the stack, the capture, what is shown ══ vhost-user ══ QEMU
                                   └──────────────── its console: lines of shell ───────────────┘

Kernel and busybox are Debian's (`pyvpnkit.boot`), downloaded the first time; QEMU has to be installed (`make demo-vm` does that).
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from netstack.errors import HostError, NetstackError
from netstack.link.spec import LinkSpec
from pyvpnkit import boot, demo, machine
from pyvpnkit.boot import Parts
from pyvpnkit.config import Settings
from pyvpnkit.demo import Asked, Failed, HostWorker, Steps
from pyvpnkit.machine import QEMU, Machine, MachineError

if TYPE_CHECKING:
    from rich.console import Console

    from pyvpnkit.service import Service

STEP_S: Final = 30.0
"""Time limit of one step: the machine is slow, as one without KVM is."""
ANSWER_S: Final = STEP_S - 5
"""And of one line of shell, so that nobody waits for it any more when the step has failed."""
DOWNLOAD_S: Final = 900.0
BLOCK: Final = 1 << 20
"""Octets of one block of `dd`."""
BLOCKS_AT_ONCE: Final = 32
TELLING: Final = ("tx-checksumming", "rx-checksumming", "tcp-segmentation-offload", "rx-gro-hw")
"""Lines of `ethtool -k` that are shown."""


def main() -> int:
    """Give the tour; 0 if all of it worked. Raises `HostError` where there cannot be a machine."""
    if shutil.which(QEMU) is None:
        raise HostError(f"{QEMU} is not installed; as root: apt-get install qemu-system-x86, or `make demo-vm`")
    capture = demo.capture_file()
    with tempfile.TemporaryDirectory(prefix="pyvpnkit-demo-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        link = LinkSpec.parse(f"vhost-user:{name.replace(',', ',,')}/net.sock,config=off")
        settings = demo.settings_for(capture, (link,))
        try:
            with HostWorker() as host:
                from pyvpnkit import daemon

                daemon.start_log("warning")
                return daemon.run(lambda: _run(settings, host, directory))
        except NetstackError:
            os.unlink(capture)
            raise


async def _run(settings: Settings, host: HostWorker, directory: Path) -> int:
    from pyvpnkit.service import Service

    console = demo.console_here()
    async with Service(settings) as service:
        tour = VmTour(console, service, host, InMachine(), directory)
        try:
            await tour.run()
        finally:
            tour.power_cut()
    return tour.conclusion("pyvpnkit run --link vhost-user:/tmp/net.sock (docs/links.md)")


class InMachine:
    """Carries out the commands of `pyvpnkit.demo_worker` by busybox in a machine."""

    def __init__(self) -> None:
        self.machine: Machine | None = None

    async def __call__(self, do: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(getattr(self, f"_{do}"), **arguments)

    async def run(self, line: str) -> str:
        """What a line of shell prints."""
        return await asyncio.to_thread(self._run, line)

    def _run(self, line: str) -> str:
        assert self.machine is not None
        return self.machine.run(line, limit_s=ANSWER_S)

    def _resolve(self, name: str) -> list[str]:
        return self._addresses(f"nslookup {name}")

    def _ask(self, name: str, server: str) -> list[str]:
        return self._addresses(f"nslookup {name} {server}")

    def _addresses(self, line: str) -> list[str]:
        assert self.machine is not None
        said = self.machine.run(line, limit_s=ANSWER_S, check=False)  # it fails where there is no IPv6 address
        return sorted(re.findall(r"Address:\s*(\d+\.\d+\.\d+\.\d+)\s*$", said.partition("Name:")[2], re.MULTILINE))

    def _ping(self, address: str, count: int) -> float:
        found = re.search(r"= ([\d.]+)/", self._run(f"ping -c {count} -i 0.2 -W 3 {address}"))
        if found is None:
            raise Failed(f"{address} does not answer")
        return float(found[1])

    def _serve(self, text: str, address: str, port: int) -> int:
        page = shlex.quote(text)
        self._run(f"printf %s {page} >/www/index.html && httpd -h /www -p {address}:{port}")
        return port

    def _fetch(self, host: str, port: int) -> tuple[str, float]:
        began = time.perf_counter()
        page = self._run(f"wget -q -O - http://{host}:{port}/")
        return page, (time.perf_counter() - began) * 1000

    # The octets of both directions are counted in whole blocks; the host sends no others.

    def _send(self, host: str, port: int, seconds: float) -> tuple[int, float]:
        now = "$(cut -d . -f 1 /proc/uptime)"
        block = f"dd if=/dev/zero bs={BLOCK} count={BLOCKS_AT_ONCE} 2>/dev/null; n=$((n + {BLOCKS_AT_ONCE}))"
        script = f"n=0; end=$(({now} + {seconds:.0f})); while [ {now} -lt $end ]; do {block}; done; echo $n >&2"
        began = time.perf_counter()
        said = self._run(f"nc {host} {port} -e sh -c {shlex.quote(script)}")
        return int(said.split()[-1]) * BLOCK, time.perf_counter() - began

    def _receive(self, host: str, port: int) -> tuple[int, float]:
        began = time.perf_counter()
        said = self._run(f"nc {host} {port} -e dd of=/dev/null bs={BLOCK} iflag=fullblock")
        found = re.search(r"(\d+)\+(\d+) records in", said)
        if found is None or found[2] != "0":
            raise Failed(said)
        return int(found[1]) * BLOCK, time.perf_counter() - began


class VmTour(Steps):
    """With a machine."""

    title = "The network of a virtual machine, over a ring in its shared memory, made by one process of this user"

    def __init__(self, console: Console, service: Service, host: Asked, inside: InMachine, directory: Path) -> None:
        super().__init__(console, service, host, inside)
        self._inside = inside
        self._directory = directory
        self._parts: Parts | None = None

    async def run(self) -> None:
        """All steps."""
        self.begin()
        if (
            await self.step("parts", self._show_parts, DOWNLOAD_S)
            and await self.step("boot", self._show_boot, machine.BOOT_LIMIT_S + 5)
            and await self.step("lease", self._show_lease, STEP_S)
        ):
            await self.step("features", self._show_features, STEP_S)
            await self.all_else(STEP_S)

    def power_cut(self) -> None:
        if self._inside.machine is not None:
            self._inside.machine.kill()

    async def _show_parts(self) -> str:
        at = boot.cache()
        how = "kept in" if boot.downloaded(at) else "downloaded by apt to"
        if not boot.downloaded(at):
            self._console.print("       downloading a kernel and a busybox of Debian's, about 30 MB ...")
        self._parts = await asyncio.to_thread(boot.parts, self._directory, at)
        return f"Debian's cloud kernel, busybox and ethtool, {how} {at}; nothing of it is installed"

    async def _show_boot(self) -> str:
        assert self._parts is not None
        card = machine.shared_ring(str(self._directory / "net.sock"))
        # Made by this thread, since the machine ends with the thread that made it.
        made = self._inside.machine = Machine(machine.command(self._parts, card))
        began = time.monotonic()
        await asyncio.to_thread(made.wait_up)
        seconds = time.monotonic() - began
        version = await asyncio.to_thread(_version)
        release = await self._inside.run("uname -r")
        (link,) = self._service.attachments.listening
        return f"Linux {release} under {version} without KVM, in {seconds:.1f} s; its card is at {link}"

    async def _show_lease(self) -> str:
        made = self._inside.machine
        assert made is not None
        leases = {str(lease["address"]): lease["mac"] for lease in self._service.status()["leases"]}
        if made.address not in leases:
            raise Failed(f"the machine has {made.address or 'no address'}, given were {', '.join(leases) or 'none'}")
        route = await self._inside.run("ip route | grep default")
        server = await self._inside.run("grep nameserver /etc/resolv.conf")
        return f"{made.address} for {leases[made.address]}; in there: {route.strip()}, {server}"

    async def _show_features(self) -> str:
        (link,) = self._service.status()["links"]
        names = link.get("features") or ()
        if not names:
            raise Failed("the machine's driver agreed to nothing")
        lines = (await self._inside.run("ethtool -k eth0")).splitlines()
        shown = [line.removesuffix(" [fixed]") for line in lines if line.startswith(TELLING)]
        return f"{', '.join(names)}\n{' ' * 18}ethtool -k in there: {', '.join(shown)}"


def _version() -> str:
    try:
        said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MachineError(f"{QEMU} does not run: {error}") from None
    found = re.search(r"version ([\d.]+)", said)
    return f"QEMU {found[1]}" if found else "QEMU"
