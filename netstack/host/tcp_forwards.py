"""TCP from the host into the guest: published ports, and whoever else was given `dial`.

An accepted socket becomes a flow that opens towards the guest. Where the guest's MAC is not known it is asked for first, and
the flow waits (row L06); what the client says meanwhile stays in its socket. The source is the gateway, with a port that no
connection of the guest's has, or what the caller asks for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from netstack.api import Endpoint
from netstack.host.tcp_flow import TcpFlow
from netstack.iface.neighbours import Neighbour
from netstack.observe.metrics import Drop
from netstack.tcp.connection import Connection

if TYPE_CHECKING:
    from netstack.host.tcp_proxy import TcpProxy


class Forwards:
    """See the module. `port` is where the search for free ports of the gateway begins."""

    def __init__(self, proxy: TcpProxy, gateway: bytes, port: int) -> None:
        self._proxy = proxy
        self._gateway = gateway
        self._last_port = port
        self._resolving: dict[bytes, list[tuple[TcpFlow, bytes]]] = {}

    def dial(
        self,
        guest: Endpoint,
        sock: Any,
        source: Endpoint | None,
        on_close: Callable[[str], None] | None,
        preface: bytes,
        now: float,
    ) -> None:
        """`netstack.api.Dialer.dial`."""
        proxy = self._proxy
        proxy.now = now
        sock.setblocking(False)
        neighbour = proxy.output.neighbour(guest.address)
        if neighbour is None:
            neighbour = Neighbour(guest.address, bytes(6), None)
        if not proxy.accepting or len(proxy.flows) >= proxy.limits.max_flows:
            proxy.counters.drops[Drop.TCP_LIMIT] += 1
            reset(sock)
            if on_close is not None:
                on_close("too many flows")
            return
        try:
            proxy.io.admit(sock)
        except OSError as error:
            proxy.counters.drops[Drop.DESCRIPTORS] += 1
            if on_close is not None:
                on_close(f"no socket: {error.strerror}")
            return
        key = self._free_key(guest, source)
        if key is None:
            reset(sock)
            if on_close is not None:
                on_close("no free port towards the guest")
            return
        flow = TcpFlow(proxy, key, neighbour, sock, inbound=True, now=now)
        flow.on_close = on_close
        proxy.flows[key] = flow
        try:
            if getattr(sock, "family", socket.AF_INET) != socket.AF_UNIX:
                prepare(sock)
            proxy.io.watch(sock.fileno(), flow.ready)
        except OSError as error:
            flow.finish(f"host: {error.strerror}", reset_host=True)
            return
        flow.watched = True
        if neighbour.port is None:
            self._resolving.setdefault(guest.address, []).append((flow, preface))
            proxy.output.resolve(guest.address, now)
            return
        self._dialled(flow, preface)

    def _free_key(self, guest: Endpoint, source: Endpoint | None) -> bytes | None:
        """The name of a connection that does not exist yet, from `source` if that is free, or a free port of the gateway."""
        proxy = self._proxy
        if source is not None:
            key = guest.address + source.address + guest.port.to_bytes(2, "big") + source.port.to_bytes(2, "big")
            if key not in proxy.flows:
                proxy.time_wait.remove(key)
                return key
        for _ in range(16384):
            self._last_port = 49152 if self._last_port >= 65535 else self._last_port + 1
            ports = guest.port.to_bytes(2, "big") + self._last_port.to_bytes(2, "big")
            key = guest.address + self._gateway + ports
            if key not in proxy.flows:
                proxy.time_wait.remove(key)
                return key
        return None

    def _dialled(self, flow: TcpFlow, preface: bytes) -> None:
        proxy = self._proxy
        flow.begin(Connection.active(proxy.isn(flow.key), proxy.capacity(flow), proxy.mss(flow)), preface)

    def learnt(self, neighbour: Neighbour) -> None:
        """A guest showed itself: forwards that waited for it begin."""
        for flow, preface in self._resolving.pop(neighbour.ip, ()):
            if not flow.end:
                flow.neighbour = neighbour
                flow.port = neighbour.port
                self._dialled(flow, preface)

    def unresolved(self, ip: bytes) -> None:
        """Nobody answered for `ip`: who waited is reset (L06)."""
        for flow, _preface in self._resolving.pop(ip, ()):
            if not flow.end:
                flow.finish("no such guest", reset_host=True)


def prepare(sock: Any) -> None:
    """No Nagle, since the guest did its own; urgent octets stay in the stream (RFC 6093), where peeking needs them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def reset(sock: Any) -> None:
    """Close a socket so that its peer sees RST."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    except OSError:
        pass
    sock.close()
