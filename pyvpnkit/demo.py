"""`pyvpnkit demo`: everything a guest gets, shown live in less than a minute, without a machine and without root (Linux).

    host worker (a web server, a sink, a source)      this process: the stack, the capture, what is shown      guest worker
                    └────── JSON over a socket pair ──────┘                └────── JSON over a socket pair ──────┘

Three processes, as in real life: what the ends do does not slow the stack down. Each step either says what it found or ends
as failed; the exit status is 0 only if every step worked. With no terminal the same comes as plain lines. `--vm` shows the same
with a machine (`pyvpnkit.demo_vm`), `--vpn` what a VPN of the host does to a guest (`pyvpnkit.demo_vpn`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from netstack.errors import HostError, NetstackError
from netstack.link.spec import LinkSpec
from netstack.settings import Network
from portfwd.mux.where import Where
from portfwd.spec import PublishSpec
from pyvpnkit.config import CaptureSettings, Settings, VpnkitSettings
from pyvpnkit.demo_worker import MAX_MESSAGE, work
from pyvpnkit.dhcp_client import Lease
from pyvpnkit.guest import Guest, need_linux
from pyvpnkit.keeper import die_with_parent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pyvpnkit.service import Service

THROUGHPUT_S: Final = 3.0
STEP_S: Final = 8.0
"""Time limit of one step."""
REFRESH_S: Final = 0.25
GUEST_PORT: Final = 8000
SNAPLEN: Final = 128
CAPTURE_LIMIT: Final = 128 << 20
DATA_SOCKET: Final = "data.sock"
PORT_SOCKET: Final = "port.sock"
LINKS: Final = {"tap": "TAP with offloads", "packet": "veth and packet socket with offloads"}


class Failed(Exception):
    """A step did not show what it should; the text says what it showed."""


class Asked(Protocol):
    """Who carries out the commands of `pyvpnkit.demo_worker`."""

    async def __call__(self, do: str, **arguments: Any) -> Any: ...


class Worker:
    """This process's end of a worker. `work` is its own end, to be called in the process that is to be it."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work(self) -> int:
        self._ours.close()
        return work(self._theirs)

    def forked(self) -> None:
        """The other process has its end now."""
        self._theirs.close()
        self._ours.setblocking(False)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    async def __call__(self, do: str, **arguments: Any) -> Any:
        """Have a command carried out; raises `Failed` with what went wrong."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._ours, json.dumps({"do": do, **arguments}).encode())
        data = await loop.sock_recv(self._ours, MAX_MESSAGE)
        if not data:
            raise Failed(f"who should {do} has died")
        message = json.loads(data)
        if "error" in message:
            raise Failed(message["error"])
        return message["answer"]


class HostWorker(Worker):
    """A worker in a process of its own, on the host. A context manager."""

    def __enter__(self) -> Self:
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                die_with_parent(signal.SIGKILL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                status = self.work()
            finally:
                os._exit(status)
        self.forked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def main(parsed: argparse.Namespace) -> int:
    """Give the tour; 0 if all of it worked. Raises `HostError` where there cannot be a guest."""
    if parsed.vm:
        from pyvpnkit import demo_vm

        return demo_vm.main()
    if parsed.vpn:
        from pyvpnkit import demo_vpn

        return demo_vpn.main()
    need_linux()
    capture = capture_file()
    sockets = tempfile.TemporaryDirectory(prefix="pyvpnkit-demo-")
    settings = with_ports(settings_for(capture), sockets.name)
    worker = Worker()
    try:
        with HostWorker() as host:
            with Guest.start(worker.work, mtu=settings.network.mtu, grace_s=1.0) as guest:
                worker.forked()
                from pyvpnkit import daemon

                daemon.start_log("warning")
                return daemon.run(lambda: _run(settings, host, worker, guest))
    except NetstackError:
        os.unlink(capture)
        raise
    finally:
        worker.close()
        sockets.cleanup()


def with_ports(settings: Settings, directory: str) -> Settings:
    """`settings` with VPNKit's way for programs in the guest to publish ports; its sockets are in `directory`."""
    return dataclasses.replace(
        settings,
        forwarder=str(Where.parse(f"unix:{directory}/{DATA_SOCKET}")),
        vpnkit=VpnkitSettings(port=(f"{directory}/{PORT_SOCKET}",)),
    )


def capture_file() -> str:
    """A new file for the capture. Raises `HostError`."""
    try:
        fd, capture = tempfile.mkstemp(prefix="pyvpnkit-demo-", suffix=".pcapng")
    except OSError as error:
        raise HostError(
            f"the capture cannot be written: {error.strerror}; set TMPDIR to a directory that can"
        ) from None
    os.close(fd)
    return capture


def settings_for(capture: str, links: tuple[LinkSpec, ...] = ()) -> Settings:
    """Of the network that is shown."""
    return Settings(
        links=links,
        network=Network(),
        publish=(PublishSpec(port=0, guest_port=GUEST_PORT),),
        capture=CaptureSettings(file=capture, size=CAPTURE_LIMIT, files=1, snaplen=SNAPLEN),
    )


def console_here() -> Console:
    """A terminal's, or one for plain lines."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)


async def _run(settings: Settings, host: Worker, worker: Worker, guest: Guest) -> int:
    from pyvpnkit.service import Service

    console = console_here()
    async with Service(settings) as service:
        service.attach(guest.link)
        tour = Tour(console, service, host, worker, guest)
        await tour.run()
    return tour.conclusion("pyvpnkit shell")


class Steps:
    """The steps that there are with every guest, and what is shown of them. `host` and `worker` are asked as `Worker` is."""

    title = ""

    def __init__(self, console: Console, service: Service, host: Asked, worker: Asked) -> None:
        self._console = console
        self._service = service
        self._network = service.settings.network
        self._host = host
        self._worker = worker
        self.failed: list[str] = []
        """Names of the steps that did not work."""

    def begin(self) -> None:
        self._console.print(self.title, style="bold")
        self._console.print()

    async def all_else(self, limit_s: float | None = None) -> None:
        """The steps of a guest that has a lease."""
        await self.step("names", self._show_names, limit_s)
        await self.step("ping", self._show_ping, limit_s)
        await self.step("page", self._show_page, limit_s)
        await self.step("published", self._show_published, limit_s)
        await self.step("upload", self._show_upload, limit_s)
        await self.step("download", self._show_download, limit_s)
        await self.step("counters", self._show_counters, limit_s)
        await self.step("capture", self._show_capture, limit_s)

    def conclusion(self, next_command: str) -> int:
        """The last words, and the exit status."""
        self._console.print()
        if self.failed:
            self._console.print(f"Failed: {', '.join(self.failed)}", style="bold red")
            return 1
        self._console.print(f"All of it worked. Yours to try: {next_command}", style="bold")
        return 0

    async def step(self, name: str, show: Callable[[], Awaitable[str]], limit_s: float | None = None) -> bool:
        """One step; whether it worked."""
        limit_s = STEP_S if limit_s is None else limit_s
        try:
            async with asyncio.timeout(limit_s):
                text = await show()
        except (Failed, OSError, NetstackError) as error:  # TimeoutError is an OSError
            text = f"took more than {limit_s:g} s" if isinstance(error, TimeoutError) else str(error)
            self.failed.append(name)
            self._line("[bold red]FAILED[/]", name, text)
            return False
        self._line("[green]ok[/]", name, text)
        return True

    def _line(self, mark: str, name: str, text: str) -> None:
        from rich.markup import escape
        from rich.text import Text

        blanks = " " * (7 - len(Text.from_markup(mark)))
        self._console.print(f"{mark}{blanks}[bold]{name:<10}[/] {escape(text)}")

    # The steps.

    async def _show_names(self) -> str:
        alias = self._network.host_alias
        name = self._network.host_names[0]
        found = await self._worker("resolve", name=name)
        if found != [alias]:
            raise Failed(f"{name} is {found} instead of {alias}")
        shown = f"{name} is {alias}"
        if (entry := _hosts_entry(self._service.settings.dns.hosts_file)) is not None:
            name, expected = entry
            found = await self._worker("ask", name=name, server=self._network.gateway)
            if found != expected:
                raise Failed(f"{name} is {found} instead of {expected} as the host's own hosts file says")
            shown += f"; {name} is {', '.join(found)}, from the host's own hosts file"
        return shown

    async def _show_ping(self) -> str:
        times = {
            address: await self._worker("ping", address=address, count=5)
            for address in (self._network.gateway, self._network.host_alias)
        }
        return ", ".join(f"{address} answers in {ms:.2f} ms" for address, ms in times.items())

    async def _show_page(self) -> str:
        text = "Hello from the host's 127.0.0.1"
        port = await self._host("serve", text=text, address="127.0.0.1", port=0)
        name = self._network.host_names[0]
        page, ms = await self._worker("fetch", host=name, port=port)
        if page != text:
            raise Failed(f"http://{name}:{port}/ has {page!r} instead of {text!r}")
        return f"the guest fetched http://{name}:{port}/ in {ms:.1f} ms: {page!r}"

    async def _show_published(self) -> str:
        text = "Hello from the guest"
        await self._worker("serve", text=text, address="0.0.0.0", port=GUEST_PORT)
        forward = next(iter(self._service.registry))
        page, ms = await self._host("fetch", host=forward.spec.bind, port=forward.spec.port)
        if page != text:
            raise Failed(f"{forward.spec} has {page!r} instead of {text!r}")
        place = f"http://{forward.spec.bind}:{forward.spec.port}/"
        return f"the host fetched {place}, the guest's port {GUEST_PORT}, in {ms:.1f} ms: {page!r}"

    async def _show_upload(self) -> str:
        port = await self._host("sink")
        sent, _ = await self._watched(
            self._worker("send", host=self._network.host_names[0], port=port, seconds=THROUGHPUT_S)
        )
        return await self._compared(sent, "guest to host")

    async def _show_download(self) -> str:
        port = await self._host("source", seconds=THROUGHPUT_S)
        received, _ = await self._watched(self._worker("receive", host=self._network.host_names[0], port=port))
        return await self._compared(received, "host to guest")

    async def _compared(self, octets: int, direction: str) -> str:
        transferred = await self._host("transferred")
        if transferred is None or transferred[0] != octets:
            raise Failed(f"the guest counted {octets} octets, the host {transferred and transferred[0]}")
        seconds = transferred[1]
        return f"{octets * 8 / seconds / 1e9:.1f} Gbit/s {direction}, {octets / 1e9:.1f} GB in {seconds:.1f} s"

    async def _watched(self, transfer: Awaitable[Any]) -> Any:
        """Wait for a transfer with the table of flows in sight: live on a terminal, once elsewhere."""
        task = asyncio.ensure_future(transfer)
        flows = FlowTable(self._service)
        try:
            if self._console.is_terminal:
                from rich.live import Live

                with Live(flows.table(), console=self._console, auto_refresh=False) as live:
                    while not (await asyncio.wait([task], timeout=REFRESH_S))[0]:
                        live.update(flows.table(), refresh=True)
            elif not (await asyncio.wait([task], timeout=THROUGHPUT_S / 2))[0]:
                self._console.print(flows.table())
            return await task
        finally:
            task.cancel()

    async def _show_counters(self) -> str:
        counters = self._service.stack.counters
        if counters.contained:
            raise Failed(f"{counters.contained} faults of our own were contained; please report them")
        drops = ", ".join(f"{count} {reason}" for reason, count in sorted(counters.drops.items()) if count)
        return (
            f"{counters.frames_in} frames and {counters.octets_in / 1e9:.2f} GB from the guest,"
            f" {counters.frames_out} and {counters.octets_out / 1e9:.2f} GB to it;"
            f" {counters.tcp_opened} TCP flows, {counters.tcp_retransmitted} retransmissions; dropped: {drops or 'none'}"
        )

    async def _show_capture(self) -> str:
        capture = self._service.capture
        if capture is None or capture.stopped is not None:
            raise Failed(f"stopped: {capture and capture.stopped}")
        capture.flush()
        octets = await asyncio.to_thread(os.path.getsize, capture.path)
        inbound, outbound = await asyncio.to_thread(directions, Path(capture.path), octets)
        if not (inbound and outbound):
            raise Failed(f"{capture.path} has {inbound} frames from the guest and {outbound} to it")
        return (
            f"{capture.path}, {octets / 1e6:.1f} MB: {inbound} frames from the guest, {outbound} to it,"
            f" {SNAPLEN} octets of each; wireshark opens it"
        )


class Tour(Steps):
    """With a guest in a namespace."""

    title = "The network of a guest, all of it made by one process of this user"

    def __init__(self, console: Console, service: Service, host: Asked, worker: Asked, guest: Guest) -> None:
        super().__init__(console, service, host, worker)
        self._guest = guest
        self._lease: Lease | None = None

    async def run(self) -> None:
        """All steps."""
        self.begin()
        await self.step("guest", self._show_guest)
        if await self.step("lease", self._show_lease):
            await self.step("exposed", self._show_exposed)
            await self.all_else()

    async def _show_guest(self) -> str:
        who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}, who is root in there"
        return f"processes in network and mount namespaces of {who}; link: {LINKS[self._guest.kind]}"

    async def _show_lease(self) -> str:
        began = time.monotonic()
        lease = self._lease = await self._guest.lease()
        if lease is None:
            raise Failed("the guest died before it had one")
        return (
            f"{lease.interface} router {lease.router} DNS {', '.join(lease.dns)} MTU {lease.mtu}"
            f" domain {lease.domain}, for {lease.lease_s // 3600} h, in {(time.monotonic() - began) * 1000:.0f} ms"
        )

    async def _show_exposed(self) -> str:
        """A program in the guest publishes a port that only the guest reaches, and takes it back by ending."""
        port_socket = self._service.settings.vpnkit.port[0]
        data_socket = os.path.join(os.path.dirname(port_socket), DATA_SOCKET)
        text = "Hello from the guest's own 127.0.0.1"
        inner = await self._worker("serve", text=text, address="127.0.0.1", port=0)
        await self._worker("start", words=["forwarder", "-data-listen", data_socket], until=data_socket)
        words = ["-proto", "tcp", "-host-ip", "127.0.0.1", "-host-port", "0"]
        words += ["-container-ip", "127.0.0.1", "-container-port", str(inner), "-control", f"9p:{port_socket}"]
        before = set(self._service.registry)
        pid = await self._worker("start", words=["expose-port", *words])
        (forward,) = set(self._service.registry) - before
        page, ms = await self._host("fetch", host=forward.spec.bind, port=forward.spec.port)
        if page != text:
            raise Failed(f"{forward.spec} has {page!r} instead of {text!r}")
        await self._worker("end", pid=pid)
        while forward in set(self._service.registry):  # noqa: ASYNC110  # the step has a limit of its own
            await asyncio.sleep(0.01)
        place = f"http://{forward.spec.bind}:{forward.spec.port}/"
        return (
            f"`pyvpnkit expose-port` in the guest published its 127.0.0.1:{inner} here; the host fetched {place} in "
            f"{ms:.1f} ms: {page!r}; when the program ended, so did the port"
        )


class FlowTable:
    """The flows of this moment; rates are since the table before."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before: dict[tuple[str, ...], int] = {}
        self._at = time.monotonic()

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title="flows", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for heading in ("", "guest", "", "remote", "state"):
            table.add_column(heading, no_wrap=True)
        for heading in ("to host", "to guest", "rate"):
            table.add_column(heading, justify="right", no_wrap=True)
        now = time.monotonic()
        sums: dict[tuple[str, ...], int] = {}
        for flow in self._service.stack.flows():
            key = (flow.protocol, flow.guest, flow.remote)
            sums[key] = flow.octets_outbound + flow.octets_inbound
            seconds = min(max(now - self._at, 1e-3), max(flow.age_s, 1e-3))
            if key not in self._before:
                seconds = max(flow.age_s, 1e-3)
            rate = (sums[key] - self._before.get(key, 0)) * 8 / seconds
            table.add_row(
                flow.protocol,
                flow.guest,
                "->" if flow.direction == "outbound" else "<-",
                flow.remote,
                flow.state,
                size(flow.octets_outbound),
                size(flow.octets_inbound),
                f"{rate / 1e9:.1f} Gbit/s" if rate >= 1e8 else f"{rate / 1e6:.1f} Mbit/s",
            )
        self._before, self._at = sums, now
        return table


def size(octets: float) -> str:
    """Octets for people: `12.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if octets < 1000:
            return f"{octets:.0f} B" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1000
    return f"{octets:.1f} GB"


def _hosts_entry(path: str | None) -> tuple[str, list[str]] | None:
    """A name of the hosts file that is worth asking for, with its IPv4 addresses."""
    from dns import hosts

    try:
        text = Path(path or "").read_text(errors="replace")
    except OSError:
        return None
    names = [name for line in text.splitlines() for name in line.partition("#")[0].split()[1:]]
    table = hosts.parse(text)
    from dns import codec

    for name in sorted(names, key=lambda name: name != socket.gethostname()):
        if "localhost" in name or not name.isascii():
            continue
        addresses = [address for address in table.addresses.get(codec.wire_name(name), ()) if len(address) == 4]
        if addresses:
            return name, sorted(socket.inet_ntoa(address) for address in addresses)
    return None


def directions(path: Path, octets: int) -> tuple[int, int]:
    """Frames from the guest and to it in the first `octets` of a pcapng file. Raises `Failed` where it is not well-formed."""
    counts = [0, 0, 0, 0]
    with path.open("rb") as file:
        first = True
        while file.tell() < octets:
            head = file.read(8)
            kind, length = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
            body = file.read(length - 8) if 12 <= length < 1 << 20 else b""
            if len(body) != length - 8 or body[-4:] != head[4:8] or (first and kind != 0x0A0D0D0A):
                raise Failed(f"{path} is not well-formed at octet {file.tell()}")
            first = False
            if kind == 6:  # enhanced packet block: its last option is epb_flags, then the end of options
                counts[body[-12] & 3] += 1
    return counts[1], counts[2]


if __name__ == "__main__":
    sys.exit(main(argparse.Namespace(vm=False, vpn=False)))
