"""A network with a DHCP server in virtual time, and guests that speak to it in octets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest

from netstack.dhcp.leases import Leases
from netstack.dhcp.server import Reply, Server
from netstack.observe.events import Event, EventBus
from netstack.observe.metrics import Counters
from netstack.settings import Network, parse_ipv4
from netstack.wire import dhcp
from netstack.wire.dhcp import Message, Option, Type

GATEWAY = "192.168.65.1"
BROADCAST_MAC = b"\xff" * 6
_xids = itertools.count(1)


def octets(text: str) -> bytes:
    return parse_ipv4(text)


@dataclass
class Answer:
    """A reply of the server, read back."""

    reply: Reply
    message: Message

    @property
    def kind(self) -> Type:
        return Type(self.message.options[Option.MESSAGE_TYPE][0])

    @property
    def address(self) -> str:
        return ".".join(map(str, self.message.yiaddr))

    @property
    def to(self) -> tuple[str, bytes]:
        return ".".join(map(str, self.reply.destination)), self.reply.destination_mac

    def seconds(self, code: int) -> int:
        return int.from_bytes(self.message.options[code], "big")


class Lan:
    """The server, its clock, and what it told the world."""

    def __init__(self, network: Network | None = None, **server: Any) -> None:
        self.network = network or Network()
        self.now = 1000.0
        self.events: list[Event] = []
        self.counters = Counters()
        self.leases = Leases(self.network)
        self._server_options = server
        self._serve()

    def _serve(self) -> None:
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.server = Server(self.network, self.leases, counters=self.counters, events=bus, **self._server_options)

    def restart(self, *, away_s: float = 0.0, network: Network | None = None, wall_jump_s: float = 0.0) -> None:
        """End the daemon and start it again on what its snapshot holds; its monotonic clock begins anew."""
        document = self.leases.snapshot(now=self.now, now_wall=1.7e9)
        self.network = network or self.network
        self.now = 5.0
        self.leases = Leases(self.network)
        self.leases.restore(document, now=self.now, now_wall=1.7e9 + away_s + wall_jump_s)
        self._serve()

    def wait(self, seconds: float) -> None:
        """Let time pass, with the stack's timer."""
        until = self.now + seconds
        while (deadline := self.server.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            self.server.timeout(self.now)
        self.now = until

    def guest(self, number: int = 1, **fields: Any) -> Guest:
        return Guest(self, bytes((2, 0, 0, 0, number >> 8, number & 255)), **fields)

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class Guest:
    lan: Lan
    mac: bytes
    port: Hashable = "link 1"
    client_id: bytes = b""
    hostname: bytes = b""
    flags: int = 0
    mtu: int | None = None
    options: dict[int, bytes] = field(default_factory=dict)

    def send(
        self,
        kind: int,
        options: dict[int, bytes] | None = None,
        *,
        ciaddr: str = "0.0.0.0",
        destination: str = "255.255.255.255",
        source: str | None = None,
        source_mac: bytes | None = None,
        **fields: Any,
    ) -> Answer | None:
        own = dict(self.options)
        if self.client_id:
            own[Option.CLIENT_ID] = self.client_id
        if self.hostname:
            own[Option.HOST_NAME] = self.hostname
        message = Message(
            **{
                "op": dhcp.BOOTREQUEST,
                "xid": next(_xids),
                "flags": self.flags,
                "ciaddr": octets(ciaddr),
                "chaddr": self.mac,
                "options": {Option.MESSAGE_TYPE: bytes((kind,)), **own, **(options or {})},
                **fields,
            }
        )
        reply = self.lan.server.handle(
            dhcp.emit(message),
            source_mac=self.mac if source_mac is None else source_mac,
            source=octets(source or ciaddr),
            destination=octets(destination),
            port=self.port,
            mtu=self.mtu,
            now=self.lan.now,
        )
        if reply is None:
            return None
        answer = Answer(reply, dhcp.parse(reply.payload))
        assert answer.message.op == dhcp.BOOTREPLY
        assert (answer.message.xid, answer.message.chaddr) == (message.xid, self.mac)
        assert answer.message.options[Option.SERVER_ID] == reply.source == octets(self.lan.network.gateway)
        assert len(reply.payload) >= 300
        return answer

    def discover(self, want: str | None = None, **options: Any) -> Answer | None:
        return self.send(Type.DISCOVER, {Option.REQUESTED_ADDRESS: octets(want)} if want else {}, **options)

    def select(self, address: str, server: str | None = None, **more: Any) -> Answer | None:
        server = server or self.lan.network.gateway
        return self.send(
            Type.REQUEST, {Option.SERVER_ID: octets(server), Option.REQUESTED_ADDRESS: octets(address)}, **more
        )

    def reboot(self, address: str) -> Answer | None:
        return self.send(Type.REQUEST, {Option.REQUESTED_ADDRESS: octets(address)})

    def renew(self, address: str, *, rebind: bool = False, **more: Any) -> Answer | None:
        destination = "255.255.255.255" if rebind else self.lan.network.gateway
        return self.send(Type.REQUEST, ciaddr=address, destination=destination, **more)

    def release(self, address: str) -> Answer | None:
        return self.send(
            Type.RELEASE,
            {Option.SERVER_ID: octets(self.lan.network.gateway)},
            ciaddr=address,
            destination=self.lan.network.gateway,
        )

    def decline(self, address: str) -> Answer | None:
        server = octets(self.lan.network.gateway)
        return self.send(Type.DECLINE, {Option.SERVER_ID: server, Option.REQUESTED_ADDRESS: octets(address)})

    def join(self, want: str | None = None) -> str | None:
        """The whole exchange; the address, `None` when there was no offer."""
        offer = self.discover(want)
        if offer is None:
            return None
        assert offer.kind is Type.OFFER
        ack = self.select(offer.address)
        assert ack is not None and ack.kind is Type.ACK and ack.address == offer.address
        return ack.address


@pytest.fixture
def lan() -> Lan:
    """The default network."""
    return Lan()


@pytest.fixture
def make_lan() -> Callable[..., Lan]:
    """`make_lan(server options, **network settings)`."""

    def make(server: dict[str, Any] | None = None, **settings: Any) -> Lan:
        return Lan(Network(**settings), **(server or {}))

    return make
