"""`pyvpnkit demo --vpn`: a VPN of the host comes up and goes while a guest works, all in namespaces, without root (Linux).

    guest ---- the stack, in a namespace that plays the host ----+---- home: home.example, a web server
                                                                 +==== office, while the VPN is up: route, corp.example, a proxy

What a VPN client does is done here by hand: an interface and a route, resolvers for a zone in the file of `--dns`, a proxy in
that of `--http`. The guest is told nothing of it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from netstack.settings import Network
from pyvpnkit import guest as namespaces
from pyvpnkit.config import DnsSettings, Settings, VpnkitSettings
from pyvpnkit.demo import Asked, Failed, HostWorker, Steps, Worker, console_here
from pyvpnkit.guest import Guest, need_linux

if TYPE_CHECKING:
    from rich.console import Console

    from pyvpnkit.service import Service

HERE: Final = "10.99.0.2"
OFFICE: Final = "10.99.0.1"
INTRANET: Final = "10.99.0.80"
PARTNER: Final = "198.51.100.80"
"""A host that only the office's proxy reaches."""
HOME: Final = "203.0.113.5"
HOME_RESOLVER: Final = 5353
PROXY_PORT: Final = 8888
SOON_S: Final = 2.0


class OfficeWorker(HostWorker):
    """A worker in a network namespace of its own."""

    def work(self) -> int:
        namespaces.unshare_network()
        namespaces.run_ip("link set lo up")
        return super().work()

    @property
    def pid(self) -> int:
        return self._pid


def main() -> int:
    """Give the tour; 0 if all of it worked. Raises `HostError` where there cannot be namespaces."""
    need_linux()
    namespaces.enter_namespaces()
    namespaces.run_ip("link set lo up", f"address add {HOME}/32 dev lo")
    with tempfile.TemporaryDirectory(prefix="pyvpnkit-demo-") as directory:
        place = Path(directory)
        settings = Settings(
            network=Network(),
            dns=DnsSettings(file=str(place / "dns"), hosts_file=None),
            vpnkit=VpnkitSettings(http=str(place / "http_proxy.json")),
        )
        worker = Worker()
        try:
            with OfficeWorker() as office, HostWorker() as host:
                with Guest.start(worker.work, mtu=settings.network.mtu, grace_s=1.0) as guest:
                    worker.forked()
                    from pyvpnkit import daemon

                    daemon.start_log("error")
                    return daemon.run(lambda: _run(settings, place, host, office, worker, guest))
        finally:
            worker.close()


async def _run(
    settings: Settings, place: Path, host: HostWorker, office: OfficeWorker, worker: Worker, guest: Guest
) -> int:
    from pyvpnkit.service import Service

    async with Service(settings) as service:
        service.attach(guest.link)
        tour = VpnTour(console_here(), service, place, host, office, worker, guest)
        await tour.run()
    return tour.conclusion("pyvpnkit doctor")


class VpnTour(Steps):
    """See the module."""

    title = "A guest, and a VPN of its host that comes and goes"

    def __init__(
        self,
        console: Console,
        service: Service,
        place: Path,
        host: Asked,
        office: OfficeWorker,
        worker: Asked,
        guest: Guest,
    ) -> None:
        super().__init__(console, service, host, worker)
        self._place = place
        self._office = office
        self._guest = guest

    async def run(self) -> None:
        """All steps."""
        self.begin()
        if not await self.step("lease", self._show_lease):
            return
        await self.step("home", self._show_home)
        if await self.step("vpn up", self._show_up):
            await self.step("route", self._show_route)
            await self.step("proxy", self._show_proxy)
        await self.step("vpn down", self._show_down)
        await self.step("still", self._show_still)

    async def _show_lease(self) -> str:
        lease = await self._guest.lease()
        if lease is None:
            raise Failed("the guest died before it had one")
        return f"{lease.interface}, DNS {', '.join(lease.dns)}"

    async def _show_home(self) -> str:
        await self._host("zone", address="127.0.0.1", port=HOME_RESOLVER, names={"www.home.example": HOME})
        await self._host("serve", text="Hello from home", address=HOME, port=80)
        port = await self._host("echo", address=HOME)
        self._replace("dns", self._servers())
        await self._until("www.home.example", [HOME])
        await self._worker("hold", host=HOME, port=port)
        unknown = await self._ask("intranet.corp.example")
        if unknown:
            raise Failed(f"intranet.corp.example is {unknown} before there is a VPN")
        return f"www.home.example is {HOME}; intranet.corp.example does not exist; a connection to home is open"

    async def _show_up(self) -> str:
        names = {"intranet.corp.example": INTRANET, "www.home.example": INTRANET}
        await self._host("ip", commands=[f"link add vpn0 type veth peer name vpn0 netns {self._office.pid}"])
        addresses = [f"{address}/32" for address in (INTRANET, PARTNER)]
        await self._office(
            "ip",
            commands=[
                f"address add {OFFICE}/30 dev vpn0",
                "link set vpn0 up",
                *(f"address add {address} dev lo" for address in addresses),
            ],
        )
        await self._host("ip", commands=[f"address add {HERE}/30 dev vpn0", "link set vpn0 up"])
        await self._host("ip", commands=[f"route add 10.99.0.0/16 via {OFFICE}"])
        await self._office("zone", address=OFFICE, port=53, names=names)
        await self._office("http_proxy", address=OFFICE, port=PROXY_PORT)
        await self._office("serve", text="Hello from the intranet", address=INTRANET, port=80)
        await self._office("serve", text="Hello from a partner", address=PARTNER, port=80)
        self._replace("dns", self._servers() + f"nameserver {OFFICE}#53\nzone corp.example\n")
        self._replace(
            "http_proxy.json",
            json.dumps({"http": f"http://{OFFICE}:{PROXY_PORT}", "exclude": "home.example,10.0.0.0/8"}),
        )
        took = await self._until("intranet.corp.example", [INTRANET])
        if await self._ask("www.home.example") != [HOME]:
            raise Failed("the VPN's server was asked for a name that is not of its zone")
        return f"intranet.corp.example is {INTRANET} after {took:.2f} s; www.home.example is still {HOME}"

    async def _show_route(self) -> str:
        page, ms = await self._worker("fetch", host="intranet.corp.example", port=80)
        return f"the guest fetched http://intranet.corp.example/ in {ms:.1f} ms: {page!r}"

    async def _show_proxy(self) -> str:
        wanted = "Hello from a partner (by way of the office's proxy)"
        took = await self._until_page(PARTNER, wanted)
        return f"http://{PARTNER}/, which this host has no way to: {wanted!r}, {took:.2f} s later"

    async def _show_down(self) -> str:
        await self._host("ip", commands=["link del vpn0"])
        self._replace("dns", self._servers())
        (self._place / "http_proxy.json").unlink()
        took = await self._until("intranet.corp.example", [])
        return f"intranet.corp.example does not exist again after {took:.2f} s"

    async def _show_still(self) -> str:
        wanted = "Hello from home"
        await self._until_page("www.home.example", wanted)
        said = await self._worker("held")
        if said != "still there":
            raise Failed(f"the connection from before the VPN says {said!r}")
        return f"http://www.home.example/ has {wanted!r}; the connection from before the VPN is {said}"

    # What the steps use.

    def _servers(self) -> str:
        return f"nameserver 127.0.0.1#{HOME_RESOLVER}\n"

    def _replace(self, name: str, text: str) -> None:
        """As programs write such files: a new one, renamed over the old."""
        fresh = self._place / f"{name}.new"
        fresh.write_text(text)
        fresh.rename(self._place / name)

    async def _ask(self, name: str) -> Any:
        return await self._worker("ask", name=name, server=self._network.gateway)

    async def _until(self, name: str, addresses: list[str]) -> float:
        """Ask until the guest gets these addresses; how long that took."""

        async def true() -> bool:
            return bool(await self._ask(name) == addresses)

        return await self._wait(true)

    async def _until_page(self, host: str, wanted: str) -> float:
        """Fetch until this page comes; how long that took."""

        async def true() -> bool:
            try:
                page, _ms = await self._worker("fetch", host=host, port=80)
            except Failed:
                return False
            return bool(page == wanted)

        return await self._wait(true)

    async def _wait(self, true: Callable[[], Awaitable[bool]]) -> float:
        began = time.monotonic()
        while not await true():
            if time.monotonic() - began > SOON_S:
                raise Failed(f"not within {SOON_S:g} s")
            await asyncio.sleep(0.02)
        return time.monotonic() - began
