"""VPNKit's own list of DNS tests, each by its name and in both of its modes (spec vpnkit 9.1).

`hosts/*` is in `test_local_names`, the grammar of `--dns` files in `test_vpnkit_file`, lookups of many at once in `test_selection`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from dnslib import DNSRecord

from dns import codec
from dns.host_mode import HostMode
from dns.server import Server as DnsServer
from dns.servers import HOST, Resolvers, Server
from tests.dns.support import ask, dnsmasq, needs_dnsmasq, parse, query

ALIAS = socket.inet_aton("192.168.65.2")
WORLD = {"www.google.com": "192.0.2.7", "a-only.example": "192.0.2.8"}


def library(name: str, family: int) -> list[bytes]:
    """What the host's getaddrinfo(3) says where the internet is `WORLD`; it is asked for full names, with their last dot."""
    name = name.removesuffix(".")
    if name not in WORLD:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if family == socket.AF_INET6:
        raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
    return [socket.inet_aton(WORLD[name])]


class House:
    """One server in one of the modes; its hosts file and its clock are the test's."""

    def __init__(self, hosts: Path) -> None:
        self.hosts = hosts
        self.now = 100.0
        self.server: DnsServer

    def clock(self) -> float:
        return self.now

    def add(self, line: str) -> None:
        """To the hosts file, and so much later that it is looked at."""
        with self.hosts.open("a") as file:
            file.write(f"{line}\n")
        self.now += 1.0

    async def look_up(self, name: str, qtype: str = "A") -> DNSRecord:
        return parse(await ask(self.server, query(name, qtype)))

    async def found(self, name: str, qtype: str = "A") -> list[str]:
        return [str(rr.rdata) for rr in (await self.look_up(name, qtype)).rr]


@pytest.fixture(params=["host", pytest.param("upstream", marks=needs_dnsmasq)])
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    (tmp_path / "hosts").write_text("")
    made = House(tmp_path / "hosts")
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "host":
            of_host = HostMode(addresses_of=library)
            resolvers = Resolvers(servers=(Server(HOST),))
        else:  # two resolvers, as upstream has 8.8.8.8 and 8.8.4.4
            records = [f"--host-record={name},{address}" for name, address in WORLD.items()]
            ports = []
            for which in ("one", "two"):
                (tmp_path / which).mkdir()
                ports.append(await stack.enter_async_context(dnsmasq(tmp_path / which, "--local=/#/", *records)))
            of_host = None
            resolvers = Resolvers.of([f"127.0.0.1#{port}" for port in ports])
        made.server = DnsServer(
            names={"host.internal": [ALIAS]},
            hosts_path=str(made.hosts),
            source=lambda: resolvers,
            asker_for=lambda server: of_host if server.upstream == HOST else None,
            clock=made.clock,
        )
        yield made
        made.server.close()


async def test_lookup(house: House) -> None:
    assert await house.found("www.google.com") == ["192.0.2.7"]


async def test_builtins(house: House) -> None:
    assert await house.found("host.internal") == ["192.168.65.2"]


async def test_etc_hosts(house: House) -> None:
    assert await house.found("added.example") == []
    house.add("10.1.2.3 added.example")
    assert await house.found("added.example") == ["10.1.2.3"]


async def test_etc_hosts_priority(house: House) -> None:
    house.add("10.1.2.3 host.internal")
    assert await house.found("host.internal") == ["192.168.65.2"]


async def test_noerror_empty(house: House) -> None:
    answer = await house.look_up("a-only.example", "AAAA")
    assert (answer.header.rcode, answer.rr) == (codec.NOERROR, [])


async def test_nxdomain(house: House) -> None:
    answer = await house.look_up("nonexistent.example.com")
    assert (answer.header.rcode, answer.rr) == (codec.NXDOMAIN, [])
