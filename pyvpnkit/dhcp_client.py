"""A DHCP client of a few lines (RFC 2131) for the guest of `pyvpnkit shell`: blocking, one interface, one lease.

It speaks over a packet socket, as every DHCP client does on Linux: while the interface has no address, the kernel's
reverse path filter (`rp_filter`, on in most distributions) would keep the answers from a UDP socket. The socket is open
during an exchange only, because the kernel copies every packet of the interface to it.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from netstack.errors import HostError, Malformed
from netstack.wire import dhcp, ipv4, udp
from netstack.wire.dhcp import Message, Option, Type

FIRST_WAIT_S: Final = 0.5
TRIES: Final = 5
"""Requests sent, each wait twice as long as the one before: 15.5 s in all. RFC 2131 4.1 begins at 4 s, for shared networks."""
RENEW_TRIES: Final = 2

_CLIENT_PORT: Final = 68
_SERVER_PORT: Final = 67
_ETH_P_IP: Final = 0x0800
_BROADCAST_MAC: Final = b"\xff" * 6
_EVERYBODY: Final = b"\xff" * 4
_NOBODY: Final = bytes(4)
_WANTED: Final = (
    Option.SUBNET_MASK,
    Option.ROUTER,
    Option.DNS_SERVER,
    Option.DOMAIN_NAME,
    Option.INTERFACE_MTU,
    Option.NTP_SERVER,
    Option.DOMAIN_SEARCH,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What the server gave; addresses as text."""

    address: str
    prefix: int
    router: str | None
    dns: tuple[str, ...]
    ntp: tuple[str, ...]
    domain: str | None
    search: tuple[str, ...]
    mtu: int | None
    lease_s: int
    server: str

    @property
    def interface(self) -> IPv4Interface:
        """Address and network."""
        return IPv4Interface((self.address, self.prefix))


class GaveUp(Exception):
    """Whoever wanted the lease does not want it any more."""


class DhcpClient:
    """Asks on `ifname`, which must be up. `give_up` is a descriptor that becomes readable when to raise `GaveUp`."""

    def __init__(self, ifname: str, *, hostname: str, give_up: int | None = None) -> None:
        self._ifname = ifname
        self._hostname = hostname.encode()
        self._give_up = give_up

    def acquire(self) -> Lease:
        """DISCOVER, OFFER, REQUEST, ACK. Raises `HostError` when nobody answers."""
        with self._socket() as sock:
            offer = self._ask(sock, Type.DISCOVER, {}, (Type.OFFER,), TRIES)
            chosen: dict[int, bytes] = {
                Option.REQUESTED_ADDRESS: offer.yiaddr,
                Option.SERVER_ID: offer.options.get(Option.SERVER_ID, _NOBODY),
            }
            answer = self._ask(sock, Type.REQUEST, chosen, (Type.ACK, Type.NAK), TRIES)
        return self._lease(answer)

    def renew(self, lease: Lease) -> Lease:
        """REQUEST for the address in use, to whom it may concern (RFC 2131 4.4.5, as if rebinding). Raises `HostError`."""
        with self._socket() as sock:
            address = IPv4Address(lease.address).packed
            answer = self._ask(sock, Type.REQUEST, {}, (Type.ACK, Type.NAK), RENEW_TRIES, address)
        return self._lease(answer)

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        try:
            sock.bind((self._ifname, _ETH_P_IP))
        except OSError:
            sock.close()
            raise
        return sock

    def _ask(
        self,
        sock: socket.socket,
        kind: Type,
        options: Mapping[int, bytes],
        wanted: Sequence[Type],
        tries: int,
        ciaddr: bytes = _NOBODY,
    ) -> Message:
        mac = sock.getsockname()[4]
        xid = random.getrandbits(32)
        message = Message(
            op=dhcp.BOOTREQUEST,
            xid=xid,
            flags=dhcp.BROADCAST,
            ciaddr=ciaddr,
            chaddr=mac,
            options={
                Option.MESSAGE_TYPE: bytes((kind,)),
                Option.HOST_NAME: self._hostname,
                Option.PARAMETER_LIST: bytes(_WANTED),
                **options,
            },
        )
        datagram = udp.emit(_CLIENT_PORT, _SERVER_PORT, dhcp.emit(message), ciaddr, _EVERYBODY)
        packet = ipv4.header(ciaddr, _EVERYBODY, ipv4.PROTOCOL_UDP, len(datagram)) + datagram
        wait_s = FIRST_WAIT_S
        for _ in range(tries):
            sock.sendto(packet, (self._ifname, _ETH_P_IP, 0, 0, _BROADCAST_MAC))
            answer = self._answer(sock, xid, wanted, time.monotonic() + wait_s)
            if answer is not None:
                return answer
            wait_s *= 2
        raise HostError(f"dhcp: no answer to {kind.name} on {self._ifname}")

    def _answer(self, sock: socket.socket, xid: int, wanted: Sequence[Type], until: float) -> Message | None:
        inputs = [sock.fileno()] if self._give_up is None else [sock.fileno(), self._give_up]
        while True:
            readable, _, _ = select.select(inputs, [], [], max(until - time.monotonic(), 0))
            if self._give_up in readable:
                raise GaveUp
            if not readable:
                return None
            message = _read(memoryview(sock.recv(65535)))
            if (
                message is not None
                and message.op == dhcp.BOOTREPLY
                and message.xid == xid
                and message.options.get(Option.MESSAGE_TYPE) in {bytes((kind,)) for kind in wanted}
            ):
                return message

    @staticmethod
    def _lease(message: Message) -> Lease:
        if message.options[Option.MESSAGE_TYPE] == bytes((Type.NAK,)):
            raise HostError(f"dhcp: refused: {message.options.get(Option.MESSAGE, b'').decode(errors='replace')}")
        try:
            return _lease_of(message)
        except Malformed as error:
            raise HostError(f"dhcp: an answer that cannot be used: {error}") from None


def _read(packet: memoryview) -> Message | None:
    """The DHCP message in an IPv4 packet, if that is what it is. The UDP checksum may be missing: the link has offloads."""
    try:
        header = ipv4.parse(packet)
        if header.protocol != ipv4.PROTOCOL_UDP or header.fragment:
            return None
        _source, port, payload = udp.parse(packet[header.header_length : header.total_length])
        return dhcp.parse(payload) if port == _CLIENT_PORT else None
    except Malformed:
        return None


def _addresses(value: bytes | None) -> tuple[str, ...]:
    value = value or b""
    return tuple(socket.inet_ntoa(value[at : at + 4]) for at in range(0, len(value) // 4 * 4, 4))


def _lease_of(message: Message) -> Lease:
    mask = message.option(Option.SUBNET_MASK, 4) or b"\xff\xff\xff\0"
    mtu = message.option(Option.INTERFACE_MTU, 2)
    lease_s = message.option(Option.LEASE_TIME, 4)
    domain = message.options.get(Option.DOMAIN_NAME, b"").rstrip(b"\0").decode("latin-1")
    routers = _addresses(message.options.get(Option.ROUTER))
    return Lease(
        address=socket.inet_ntoa(message.yiaddr),
        prefix=int.from_bytes(mask, "big").bit_count(),
        router=routers[0] if routers else None,
        dns=_addresses(message.options.get(Option.DNS_SERVER)),
        ntp=_addresses(message.options.get(Option.NTP_SERVER)),
        domain=domain or None,
        search=dhcp.decode_names(message.options.get(Option.DOMAIN_SEARCH, b"")),
        mtu=None if mtu is None else int.from_bytes(mtu, "big"),
        lease_s=0xFFFFFFFF if lease_s is None else int.from_bytes(lease_s, "big"),
        server=socket.inet_ntoa(message.option(Option.SERVER_ID, 4) or _NOBODY),
    )
