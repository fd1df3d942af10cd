"""A whole network with gvproxy's API on a Unix socket and for guests at port 80 of the gateway, and a played gvforwarder."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import netstack  # noqa: F401  # first: it makes our `dns` importable beside dnspython's
from dns.server import Server
from dns.zones import Zones
from netstack.api import Endpoint
from netstack.link import stdio
from netstack.link.attach import Attachments
from netstack.link.spec import LinkSpec
from netstack.settings import Network
from netstack.stack import Stack
from portfwd.carriers import Carriers
from portfwd.gvproxy_api import HIJACKED, Suppliers, routes
from portfwd.gvproxy_forwards import Forwards
from portfwd.gvproxy_guest import GuestDoor
from portfwd.registry import Registry
from pyvpnkit.driver import Driver
from tests.roof.guest import GATEWAY, LIMIT_S, StreamGuest
from tests.support import packets
from tests.support.http_house import serving


class GvForwarder(StreamGuest):
    """As gvproxy's program in the guest: a POST whose answer it never reads, and frames with u16 little-endian lengths."""

    def __init__(
        self, path: str, mac: bytes = b"\x5a\x94\xef\xe4\x0c\xee", *, query: str = "", early: bytes = b""
    ) -> None:
        super().__init__(path, mac)
        head = f"POST /connect{query} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n\r\n"
        self._sock.sendall(head.encode() + early)
        self.received: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self._sock.sendall(framed(frame))

    def frames(self, limit_s: float = LIMIT_S) -> Iterator[bytes]:
        self._sock.settimeout(limit_s)
        while True:
            (length,) = struct.unpack("<H", self._exactly(2))
            frame = self._exactly(length)
            self.received.append(frame)
            self._answer_arp(frame)
            yield frame

    def _exactly(self, octets: int) -> bytes:
        found = b""
        while len(found) < octets:
            some = self._sock.recv(octets - len(found))
            if not some:
                raise EOFError
            found += some
        return found

    def ping(self, octets: int = 56) -> bytes:
        """An echo of the gateway; what it sends back."""
        self.send_ip(GATEWAY, packets.ICMP, packets.echo(7, 1, bytes(octets)))
        return next(packet.payload for packet in self.packets(packets.ICMP))


def framed(frame: bytes) -> bytes:
    return struct.pack("<H", len(frame)) + frame


@dataclass
class World:
    """A network, its API and who plays guests in it."""

    path: Path
    stack: Stack
    attachments: Attachments
    registry: Registry
    zones: Zones
    guests: list[StreamGuest] = field(default_factory=list)

    async def gvforwarder(self, mac: bytes = b"\x5a\x94\xef\xe4\x0c\xee", **more: str) -> GvForwarder:
        """One with a lease."""
        guest = GvForwarder(str(self.path), mac, **more)  # type: ignore[arg-type]
        self.guests.append(guest)
        await asyncio.to_thread(guest.lease)
        return guest


@contextlib.asynccontextmanager
async def world(directory: Path, *links: str) -> AsyncIterator[World]:
    network = Network()
    stack = Stack(network)
    driver = Driver(stack, asyncio.get_running_loop())
    stack.on_work = driver.wake
    registry = Registry(carriers=Carriers(lambda: socket.inet_aton("192.168.65.3")))
    attachments = Attachments(
        [LinkSpec.parse(link) for link in links],
        mtu=network.mtu,
        attach=stack.attach,
        detach=stack.detach,
        counters=stack.counters,
    )
    stack.on_detached = attachments.detached
    zones = Zones()
    dns = Server(zones=zones, hosts_path=None, resolv_conf=None)
    stack.serve_datagrams(network.gateway_bytes, 53, dns.datagram)

    def state(guest: Endpoint, source: Endpoint) -> str | None:
        ends = str(guest), str(source)
        return next((flow.state for flow in stack.flows() if (flow.guest, flow.remote) == ends), None)

    def attach(sock: socket.socket, mtu: int | None) -> None:
        stdio.adopt(attachments, sock, mtu=network.mtu, counters=stack.counters, peer_mtu=mtu)

    suppliers = Suppliers(
        zones=zones,
        leases=lambda: {
            "192.168.65.1": network.gateway_mac,
            **{record.address: record.mac for record in stack.lease_table()},
        },
        cam=stack.cam,
        stats=stack.stats,
        dialer=stack,
        gateway=network.gateway_bytes,
        state=state,
        attach=attach,
    )
    made = World(directory / "api.sock", stack, attachments, registry, zones)
    forwards = Forwards(registry)
    guests = GuestDoor(forwards)
    stack.serve_sockets(network.gateway_bytes, 80, guests.serve)
    async with attachments, serving(made.path, routes(forwards, suppliers), HIJACKED):
        await guests.start()
        driver.start()
        registry.start(stack, asyncio.get_running_loop())
        try:
            yield made
        finally:
            registry.close()
            await guests.close()
            dns.close()
            for guest in made.guests:
                guest.close()
            driver.close()
            stack.close()
    assert stack.counters.contained == 0
