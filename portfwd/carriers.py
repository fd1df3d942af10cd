"""How what arrives on the host side of a forward gets into the guest.

a listener --connected socket--> Carriers --+--> our own TCP and UDP (`netstack.api.Dialer`): addresses of guests
                                            +--> a `DataPlane`: VPNKit's forwarder in the VM, for what only the VM reaches
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from netstack.api import Datagrams, Dialer, Endpoint
from netstack.errors import ConfigError
from portfwd import proxy_protocol
from portfwd.spec import PublishSpec

FindGuest = Callable[[], bytes]
"""The address of the guest meant by a spec without GUESTIP, in network order."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a forwarder in the VM is to go (spec vpnkit 7.3.1): `tcp` and `udp` with address and port, `unix` with a path."""

    protocol: str
    """`tcp`, `udp` or `unix`."""
    address: bytes = b""
    """4 or 16 octets in network order; empty for `unix`."""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.protocol == "unix":
            return f"unix:{self.path}"
        return f"{self.protocol}:{Endpoint(self.address, self.port)}"


class DataPlane(Protocol):
    """The way to VPNKit's forwarder (`portfwd.mux.plane`)."""

    def stream(self, target: Destination, sock: socket.socket, *, preface: bytes = b"") -> None:
        """Own a connected, non-blocking stream socket of the host and carry its octets to `target` and back.

        `preface` goes to the target in front of them. Half-close crosses both ways. When the forwarder refuses, or cannot be
        reached, the socket is reset. Never raises.
        """
        ...

    def datagrams(self, target: Destination, sock: socket.socket) -> Datagrams:
        """Carry what arrives at the bound, non-blocking UDP socket to `target`, and answers back to each peer.

        Owns `sock`; `close` of what is returned ends it.
        """
        ...

    def dump(self) -> str:
        """The last events of the multiplexer, one a line, for people."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Plain values: how it is reached, whether it is connected, channels, counters."""
        ...

    async def close(self) -> None:
        """End every connection and task."""
        ...


class Way(Protocol):
    """A way of its own for one forward (`portfwd.ssh_tunnel`)."""

    def stream(self, spec: PublishSpec, sock: socket.socket, client: Any) -> None:
        """As `Carriers.stream`."""
        ...

    def close(self) -> None:
        """The forward is removed, no more will come; what is carried goes on."""
        ...


class Carriers:
    """The ways there are, for the listeners of one registry.

    `may_show(address)` says whether the guest may see a client under its own IPv4 address (4 octets): not one of the virtual
    network's, nor the host's loopback. `is_guest(text)` says whether our own TCP and UDP get to an address.
    """

    def __init__(
        self,
        find_guest: FindGuest,
        *,
        plane: DataPlane | None = None,
        may_show: Callable[[bytes], bool] = lambda address: True,
        is_guest: Callable[[str], bool] = lambda address: True,
    ) -> None:
        self.find_guest = find_guest
        self.plane = plane
        self._may_show = may_show
        self._is_guest = is_guest
        self.dialer: Dialer | None = None
        """There from the moment that the stack runs."""

    def check(self, spec: PublishSpec) -> None:
        """Raise `ConfigError` for a spec that needs a way there is none of."""
        if spec.via == "forwarder" and self.plane is None:
            raise ConfigError(
                f"publish: {spec}: there is no forwarder to go by; set `forwarder`, such as "
                "--forwarder hyperkit:/PATH/connect, or publish a port of the guest itself"
            )
        if spec.via == "stack" and spec.guest is not None and not self._is_guest(spec.guest):
            raise ConfigError(
                f"publish: {spec}: {spec.guest} is no address of this network; name a guest's, or leave it out, or have a "
                "forwarder in the VM go there (setting `forwarder`, and via=forwarder)"
            )

    def guest(self, spec: PublishSpec) -> bytes:
        """The address meant by `spec`, 4 octets."""
        return self.find_guest() if spec.guest is None else socket.inet_aton(spec.guest)

    def stream(self, spec: PublishSpec, sock: socket.socket, client: Any) -> None:
        """Carry an accepted connection; `client` is what `accept` said of its other end. Takes over `sock`."""
        preface = proxy_protocol.header(spec.proxy, client, sock.getsockname()) if spec.proxy else b""
        if spec.via == "forwarder":
            assert self.plane is not None
            self.plane.stream(_destination(spec), sock, preface=preface)
            return
        assert self.dialer is not None
        source = self._seen(client) if spec.source == "client" else None
        self.dialer.dial(Endpoint(self.guest(spec), spec.guest_port), sock, source=source, preface=preface)

    def datagrams(self, spec: PublishSpec, sock: socket.socket) -> Datagrams:
        """Carry what arrives at a bound UDP socket, which is taken over. Raises `OSError`."""
        if spec.via == "forwarder":
            assert self.plane is not None
            return self.plane.datagrams(_destination(spec), sock)
        assert self.dialer is not None
        guest = Endpoint(self.guest(spec), spec.guest_port)
        return self.dialer.datagrams(guest, sock, show_client=spec.source == "client")

    def _seen(self, client: Any) -> Endpoint | None:
        text = client[0].removeprefix("::ffff:")
        if ":" in text:
            return None  # an IPv6 client cannot be a peer of an IPv4 guest
        address = socket.inet_aton(text)
        return Endpoint(address, client[1]) if address[0] != 127 and self._may_show(address) else None


def _destination(spec: PublishSpec) -> Destination:
    if spec.guest_path:
        return Destination("unix", path=spec.guest_path)
    assert spec.guest is not None
    end = Endpoint.of(spec.guest, spec.guest_port)
    return Destination("udp" if spec.protocol == "udp" else "tcp", end.address, end.port)
