"""The DHCP server on the gateway (RFC 2131 section 4.3; vpnkit.md section 3.3), without I/O, clock or chance.

Theory of operation. The stack hands over the payload of each UDP datagram to port 67 (`handle`), sends the `Reply`, if any,
from the gateway's port 67 to port 68, and calls `timeout` at `deadline`. The server reads the message, asks
`netstack.dhcp.leases` for an address, and writes the answer; it remembers nothing itself.

    DISCOVER            -> OFFER of the client's own address, or silence when its port or the pool has none
    REQUEST             -> ACK when the address is the client's to have, else NAK; silence when another server was chosen
    DECLINE, RELEASE    -> no answer; the address is set aside or free again
    INFORM              -> ACK with settings and without a lease

We are the only server of the network, so a REQUEST for an address we cannot give is refused at once (section 4.3.2), also
when it begins a reboot or a renewal: a guest that comes from another network learns it in one round trip.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from netstack.dhcp.leases import Leases
from netstack.dhcp.records import MAX_CLIENT_ID, clean_hostname
from netstack.errors import ConfigError, Malformed
from netstack.observe.events import EventBus, LeaseGiven, LeaseReleased
from netstack.observe.metrics import Counters, Drop
from netstack.settings import Network, format_mac, parse_ipv4
from netstack.wire import dhcp
from netstack.wire.dhcp import Message, Option, Type

SERVER_PORT = 67
CLIENT_PORT = 68

MIN_LEASE_S = 120
"""A client may ask for a shorter lease than ours, but not for one whose renewals are a load."""
MAX_LEASE_S = 0x7FFFFFFF
"""68 years, VPNKit's lease time; the next value but one would mean for ever."""

_BROADCAST_IP = b"\xff\xff\xff\xff"
_BROADCAST_MAC = b"\xff" * 6
_NO_ADDRESS = bytes(4)

_WITHOUT_REQUEST = (
    Option.SUBNET_MASK,
    Option.ROUTER,
    Option.DNS_SERVER,
    Option.DOMAIN_NAME,
    Option.INTERFACE_MTU,
    Option.BROADCAST_ADDRESS,
    Option.NTP_SERVER,
    Option.DOMAIN_SEARCH,
    Option.CLASSLESS_ROUTES,
)
"""What a client gets that sends no parameter list (option 55), such as the Go vmnet client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A UDP payload for port 68 of `destination`, in a frame to `destination_mac`, from port 67 of `source` (the gateway)."""

    payload: bytes
    destination: bytes
    destination_mac: bytes
    source: bytes
    leased: bytes | None = None
    """The address that this answer gives to the client (a DHCPACK of a lease)."""


class _Ignored(Exception):
    """A well-formed message that gets no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A message with what `handle` was told about it."""

    message: Message
    kind: Type
    source_mac: bytes
    port: Hashable
    mtu: int | None
    now: float

    @property
    def mac(self) -> bytes:
        return self.message.chaddr

    @property
    def client_id(self) -> bytes:
        """Option 61 as far as it identifies anyone (RFC 2132 section 9.14: at least 2 octets)."""
        value = self.message.options.get(Option.CLIENT_ID, b"")
        return value if 2 <= len(value) <= MAX_CLIENT_ID else b""

    @property
    def hostname(self) -> str:
        """The client's name from option 12, else from option 81 (RFC 4702), cleaned; empty without."""
        name = clean_hostname(self.message.options.get(Option.HOST_NAME, b""))
        fqdn = self.message.options.get(Option.CLIENT_FQDN, b"")
        if name or len(fqdn) < 4:
            return name
        in_wire_form = fqdn[0] & 0x04
        return clean_hostname(fqdn[4 : 4 + fqdn[3]] if in_wire_form else fqdn[3:])


class Server:
    """The DHCP server of one network.

    `routes` are further destinations (`10.0.0.0/8`, router) for option 121. `rng` spreads the renewal times of guests that
    were started together (RFC 2131 section 4.4.5); without it they are exact. Raises `ConfigError` for a lease time below
    1 s and for names and addresses in `network` that no option can carry.
    """

    def __init__(
        self,
        network: Network,
        leases: Leases,
        *,
        counters: Counters | None = None,
        events: EventBus | None = None,
        rng: random.Random | None = None,
        routes: Iterable[tuple[str, str]] = (),
    ) -> None:
        if network.lease_s < 1:
            raise ConfigError(f"lease_s: {network.lease_s} is no lease time; give seconds, such as 86400 for a day")
        self._leases = leases
        self._counters = counters if counters is not None else Counters()
        self._events = events if events is not None else EventBus()
        self._rng = rng
        self._network = network.network
        self._gateway = network.gateway_bytes
        self._gateway_mac = network.gateway_mac_bytes
        self._lease_s = min(network.lease_s, MAX_LEASE_S)
        self._to_us = {self._gateway, _BROADCAST_IP, network.network.broadcast_address.packed}
        self._search = network.search
        self._settings = _settings(network, routes)
        self._mtu = network.mtu
        self.highest_mtu: int | None = None
        """No guest is told more, where there is such a limit: it may change while leases run, and counts at their renewal."""

    @property
    def search(self) -> tuple[str, ...]:
        """Domains that guests are told to search; those set here count at their next renewal. What is no name is left out."""
        return self._search

    @search.setter
    def search(self, names: Iterable[str]) -> None:
        self._search = tuple(filter(_is_name, names))

    def rename(self, network: Network) -> None:
        """Tell domain and search list of `network` from the next renewal on. Raises `ConfigError`, and those before hold on."""
        self._settings |= _names(network)
        self._search = network.search

    def handle(
        self,
        payload: bytes | memoryview,
        *,
        source_mac: bytes,
        source: bytes,
        destination: bytes,
        port: Hashable,
        now: float,
        mtu: int | None = None,
    ) -> Reply | None:
        """Answer one datagram that came from `source` to port 67 of `destination`. Never raises for what a guest sent.

        `payload` is the UDP payload, `source_mac` the sender of the frame, `port` the link it came in on, `mtu` that
        link's where it is not the network's.
        """
        self._leases.expire(now)
        try:
            message = dhcp.parse(payload)
            request = self._check(message, source_mac, destination, port, mtu, now)
            reply = self._answer(request, source)
        except Malformed:
            self._counters.drops[Drop.DHCP_MALFORMED] += 1
            reply = None
        except _Ignored:
            self._counters.drops[Drop.DHCP_IGNORED] += 1
            reply = None
        self._tell_ended(now)
        return reply

    def deadline(self) -> float | None:
        """When `timeout` is next wanted; `None` when nothing will end."""
        return self._leases.deadline()

    def timeout(self, now: float) -> None:
        """End leases, offers and set-aside addresses that are over; harmless when called early."""
        self._leases.expire(now)
        self._tell_ended(now)

    def forget_port(self, port: Hashable) -> None:
        """A link is gone: its guest keeps its leases and may come back on another one."""
        self._leases.forget_port(port)

    def _check(
        self, message: Message, source_mac: bytes, destination: bytes, port: Hashable, mtu: int | None, now: float
    ) -> _Request:
        """What every message must be (D03); raises `Malformed` or `_Ignored`."""
        if message.op != dhcp.BOOTREQUEST or destination not in self._to_us:
            raise _Ignored
        if message.htype != dhcp.ETHERNET or len(message.chaddr) != 6:
            raise Malformed("dhcp: no Ethernet address")
        if message.chaddr[0] & 1 or message.chaddr in (bytes(6), self._gateway_mac):
            raise Malformed("dhcp: chaddr is no guest's")
        if message.giaddr != _NO_ADDRESS:
            raise _Ignored  # no relay agent has business on this network, and it would choose where we send to
        for code in (Option.REQUESTED_ADDRESS, Option.LEASE_TIME, Option.SERVER_ID):
            message.option(code, 4)
        message.option(Option.MAX_SIZE, 2)  # all are looked at before anything is changed
        kind = message.option(Option.MESSAGE_TYPE, 1)
        if kind is None:
            raise Malformed("dhcp: no message type (plain BOOTP)")
        try:
            return _Request(message=message, kind=Type(kind[0]), source_mac=source_mac, port=port, mtu=mtu, now=now)
        except ValueError:
            raise Malformed("dhcp: unknown message type") from None

    def _answer(self, request: _Request, source: bytes) -> Reply | None:
        chosen = request.message.option(Option.SERVER_ID, 4)
        requested = request.message.option(Option.REQUESTED_ADDRESS, 4)
        ours = chosen in (None, self._gateway)
        match request.kind:
            case Type.DISCOVER:
                return self._discover(request, requested)
            case Type.REQUEST if not ours:
                self._leases.refuse(request.mac)  # section 4.3.2: "the server is free to offer it to another client"
                raise _Ignored
            case Type.REQUEST:
                return self._request(request, requested)
            case Type.DECLINE if ours and requested is not None:
                if not self._leases.decline(request.mac, requested, port=request.port, now=request.now):
                    raise _Ignored
            case Type.RELEASE if ours:
                if not self._leases.release(request.mac, request.message.ciaddr, port=request.port, now=request.now):
                    raise _Ignored
            case Type.INFORM:
                return self._inform(request, source)
            case _:  # a reply, or for another server
                raise _Ignored
        return None

    def _discover(self, request: _Request, requested: bytes | None) -> Reply:
        lease_s = self._lease_time(request) or self._lease_s
        address = self._leases.allot(
            request.mac,
            client_id=request.client_id,
            requested=requested,
            port=request.port,
            lease_s=lease_s,
            now=request.now,
        )
        if address is None:
            raise _Ignored
        return self._reply(request, Type.OFFER, yiaddr=address, lease_s=lease_s)

    def _request(self, request: _Request, requested: bytes | None) -> Reply:
        """SELECTING and INIT-REBOOT name the address in option 50, RENEWING and REBINDING in ciaddr (section 4.3.2).

        Some clients repeat our server id when they renew, so it is the option that tells them apart, not the id.
        """
        address = requested if requested is not None else request.message.ciaddr
        if address == _NO_ADDRESS:
            raise Malformed("dhcp: REQUEST for no address")
        before = self._leases.at(address, request.now)
        renewal = requested is None and before is not None
        lease_s = self._lease_time(request) or self._leases.offered_s(request.mac) or self._lease_s
        lease = self._leases.commit(
            request.mac,
            address,
            client_id=request.client_id,
            hostname=request.hostname,
            port=request.port,
            lease_s=lease_s,
            now=request.now,
        )
        if lease is None:
            return self._reply(request, Type.NAK)
        if not renewal:  # a renewal is no news; a guest that starts anew is, even with the address it had
            self._events.emit(
                LeaseGiven(
                    time=request.now,
                    address=str(IPv4Address(address)),
                    mac=format_mac(request.mac),
                    hostname=lease.hostname,
                    lease_s=lease_s,
                )
            )
        return self._reply(request, Type.ACK, yiaddr=address, lease_s=lease_s, hostname=lease.hostname)

    def _inform(self, request: _Request, source: bytes) -> Reply:
        """Settings for a guest that has its address from elsewhere; some leave ciaddr empty, so the packet's source counts too."""
        address = request.message.ciaddr if request.message.ciaddr != _NO_ADDRESS else source
        if IPv4Address(address) not in self._network or address in self._to_us:
            raise _Ignored
        lease = self._leases.at(address, request.now)
        hostname = lease.hostname if lease is not None and lease.mac == request.mac else ""
        return self._reply(request, Type.ACK, hostname=hostname, inform=address)

    def _lease_time(self, request: _Request) -> int | None:
        """The lease time a client asks for, within our bounds."""
        wanted = request.message.option(Option.LEASE_TIME, 4)
        if wanted is None:
            return None
        return min(max(int.from_bytes(wanted, "big"), MIN_LEASE_S), self._lease_s)

    def _reply(
        self,
        request: _Request,
        kind: Type,
        *,
        yiaddr: bytes = _NO_ADDRESS,
        lease_s: int = 0,
        hostname: str = "",
        inform: bytes = _NO_ADDRESS,
    ) -> Reply:
        message = request.message
        options: dict[int, bytes] = {Option.MESSAGE_TYPE: bytes((kind,)), Option.SERVER_ID: self._gateway}
        if client_id := message.options.get(Option.CLIENT_ID, b"")[:MAX_CLIENT_ID]:
            options[Option.CLIENT_ID] = client_id  # RFC 6842 section 3: "the server MUST return it unaltered"
        if kind is Type.NAK:
            options[Option.MESSAGE] = b"requested address not available"
        if lease_s:
            options |= self._lease_options(lease_s)
        if kind is not Type.NAK:
            self._add_settings(options, request, hostname)
        octets = dhcp.emit(
            Message(
                op=dhcp.BOOTREPLY,
                xid=message.xid,
                flags=message.flags,
                ciaddr=message.ciaddr if kind is Type.ACK else _NO_ADDRESS,
                yiaddr=yiaddr,
                siaddr=_NO_ADDRESS if kind is Type.NAK else self._gateway,
                chaddr=message.chaddr,
                options=options,
            )
        )
        destination, mac = self._where_to(request, kind, yiaddr, inform)
        leased = yiaddr if kind is Type.ACK and yiaddr != _NO_ADDRESS else None
        return Reply(payload=octets, destination=destination, destination_mac=mac, source=self._gateway, leased=leased)

    def _where_to(self, request: _Request, kind: Type, yiaddr: bytes, inform: bytes) -> tuple[bytes, bytes]:
        """Address and MAC of the answer (RFC 2131 section 4.1)."""
        message = request.message
        if kind is Type.NAK:  # "In all cases, when 'giaddr' is zero, the server broadcasts any DHCPNAK messages"
            return _BROADCAST_IP, _BROADCAST_MAC
        if inform != _NO_ADDRESS:
            return inform, request.source_mac
        if kind is Type.ACK and message.ciaddr == yiaddr:
            return yiaddr, request.source_mac
        if message.flags & dhcp.BROADCAST or message.chaddr != request.source_mac:
            # Behind a bridge that puts its own MAC in our frames, the client's MAC may be unreachable; broadcast is not.
            return _BROADCAST_IP, _BROADCAST_MAC
        return yiaddr, message.chaddr

    def _lease_options(self, lease_s: int) -> dict[int, bytes]:
        """Options 51, 58 and 59: T1 and T2 are 0.5 and 0.875 of the lease (section 4.4.5), with some fuzz around them."""
        fuzz = self._rng.uniform(-0.02, 0.02) if self._rng is not None else 0.0
        times = {
            Option.LEASE_TIME: lease_s,
            Option.RENEWAL_TIME: int(lease_s * (0.5 + fuzz)),
            Option.REBINDING_TIME: int(lease_s * (0.875 + fuzz)),
        }
        return {code: struct.pack("!I", seconds) for code, seconds in times.items()}

    def _add_settings(self, options: dict[int, bytes], request: _Request, hostname: str) -> None:
        """Add the settings that the client wants, the most wanted first, as long as the message has room for them.

        A client takes 576 octets, or what its option 57 says. Of a search list that is too long the first names are sent.
        """
        message = request.message
        listed = message.options.get(Option.PARAMETER_LIST)
        size = message.option(Option.MAX_SIZE, 2)
        room = dhcp.OPTIONS_ROOM
        if size is not None:
            room += max(0, int.from_bytes(size, "big") - dhcp.MAX_MESSAGE)
        room -= sum(dhcp.option_octets(value) for value in options.values())
        for code in _WITHOUT_REQUEST if listed is None else dict.fromkeys(listed):
            value = hostname.encode() if code == Option.HOST_NAME else self._settings.get(code, b"")
            if code == Option.DOMAIN_SEARCH:
                value = self._search_list(room)
            elif code == Option.INTERFACE_MTU:
                value = struct.pack("!H", self._mtu_for(request))
            if not value or code in options or dhcp.option_octets(value) > room:
                continue  # an option without value is invalid, so what is not set is left out
            options[code] = value
            room -= dhcp.option_octets(value)

    def _mtu_for(self, request: _Request) -> int:
        mtu = self._mtu if request.mtu is None else request.mtu
        return mtu if self.highest_mtu is None else min(mtu, self.highest_mtu)

    def _search_list(self, room: int) -> bytes:
        for count in range(len(self._search), 0, -1):
            value = dhcp.encode_names(self._search[:count])
            if dhcp.option_octets(value) <= room:
                return value
        return b""

    def _tell_ended(self, now: float) -> None:
        for lease in self._leases.ended():
            self._events.emit(
                LeaseReleased(time=now, address=str(IPv4Address(lease.address)), mac=format_mac(lease.mac))
            )


def _settings(network: Network, routes: Iterable[tuple[str, str]]) -> dict[int, bytes]:
    """Options that are the same for every client; empty values for what is not set. Raises `ConfigError`."""
    gateway = network.gateway_bytes
    further = []
    for destination, router in routes:
        try:
            further.append((IPv4Network(destination), parse_ipv4(router, "routes")))
        except ValueError as error:
            raise ConfigError(f"routes: {destination!r} ({error}); give a network such as 10.0.0.0/8") from None
    if further:  # RFC 3442: who takes option 121 ignores option 3
        further.append((IPv4Network("0.0.0.0/0"), gateway))
    return {
        Option.SUBNET_MASK: network.network.netmask.packed,
        Option.ROUTER: gateway,
        Option.DNS_SERVER: b"".join(parse_ipv4(text, "dns_servers") for text in network.dns_servers) or gateway,
        **_names(network),
        Option.INTERFACE_MTU: struct.pack("!H", network.mtu),
        Option.BROADCAST_ADDRESS: network.network.broadcast_address.packed,
        Option.NTP_SERVER: b"".join(parse_ipv4(text, "ntp_servers") for text in network.ntp_servers) or gateway,
        Option.CLASSLESS_ROUTES: dhcp.encode_routes(further),
    }


def _names(network: Network) -> dict[int, bytes]:
    """The domain's option, and a look at the search list. Raises `ConfigError`."""
    try:
        dhcp.encode_names(network.search)
    except ValueError as error:
        raise ConfigError(f"search: {error}; give names such as corp.example") from None
    try:
        return {Option.DOMAIN_NAME: dhcp.check_name(network.domain) if network.domain else b""}
    except ValueError as error:
        raise ConfigError(f"domain: {error}; give a name such as internal") from None


def _is_name(name: str) -> bool:
    try:
        dhcp.encode_names((name,))
    except (Malformed, ValueError):
        return False
    return True
