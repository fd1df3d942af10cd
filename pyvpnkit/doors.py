"""The doors of a running network: who may look in and change things, and by which protocol.

control.sock, control.listen    /v1, VPNKit's /forwards, gvproxy's /services     (pyvpnkit.api)
vpnkit.port                     VPNKit's 9P port control; of HTTP only /forwards, for guests reach it (portfwd.ninep)
vpnkit.introspection, ...       VPNKit's debug tree, a tar of it, live pcap
port 80 of the gateway          gvproxy's forwarder API for guests, if switched on
vpnkit.*forwards                ports of the gateway and tunnels that lead elsewhere (portfwd.outgoing)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from netstack.api import Endpoint
from netstack.errors import ConfigError
from netstack.link.listening import UnixSocket
from pyvpnkit.later import Later

if TYPE_CHECKING:
    from portfwd.gvproxy_api import Suppliers
    from portfwd.gvproxy_forwards import Forwards as GvproxyForwards
    from portfwd.ninep.listen import SocketServer
    from pyvpnkit.later import Accepts
    from pyvpnkit.service import Service

HTTP_PORT: Final = 80
CONTROL_SOCKET: Final = "control.sock"
MAX_TOKEN: Final = 4096


class Doors:
    """Opens what the settings of `service` ask for; an async context manager. Raises `ConfigError` and `HostError`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings = service.settings
        self._all = contextlib.AsyncExitStack()
        self._open = contextlib.AsyncExitStack()
        """Servers that were made when their first client came."""
        self._control: Any = None
        self._forwards: GvproxyForwards | None = None
        self.where: list[str] = []
        """Sockets that are listened on, for people."""

    async def __aenter__(self) -> Doors:
        async with contextlib.AsyncExitStack() as undo:
            self._outgoing(undo)
            await self._open_control(undo)
            await self._open_to_guests(undo)
            await self._open_ports(undo)
            await self._open_debug(undo)
            await self._open_http_proxy(undo)
            # What is made later ends first.
            undo.push_async_callback(self._open.aclose)
            self._all = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._all.aclose()

    def stop_accepting(self) -> None:
        """No new clients; those there are go on."""
        if self._control is not None:
            self._control.stop_accepting()

    # -- ways out of the network

    def _outgoing(self, undo: contextlib.AsyncExitStack) -> None:
        vpnkit = self._settings.vpnkit
        if not (vpnkit.tcpv4_forwards or vpnkit.udpv4_forwards or vpnkit.gateway_forwards or vpnkit.forwards):
            return
        from portfwd.outgoing import Outgoing, parse_static

        static = (
            *parse_static("tcp", ",".join(vpnkit.tcpv4_forwards)),
            *parse_static("udp", ",".join(vpnkit.udpv4_forwards)),
        )
        outgoing = Outgoing(
            self._service.stack, static=static, gateway_file=vpnkit.gateway_forwards, tunnels_file=vpnkit.forwards
        )
        undo.callback(outgoing.close)
        outgoing.start(asyncio.get_running_loop())

    # -- the control API

    def _control_path(self) -> str | None:
        wanted = self._settings.control.socket
        if wanted != "auto":
            return wanted
        directory = self._service.state_directory
        return None if directory is None else str(directory / CONTROL_SOCKET)

    async def _open_control(self, undo: contextlib.AsyncExitStack) -> None:
        control = self._settings.control
        path = self._control_path()
        unix = [where.removeprefix("unix:").removeprefix("//") for where in control.listen if where.startswith("unix:")]
        tcp = [where for where in control.listen if not where.startswith("unix:")]
        token = None if control.token_file is None else read_token(control.token_file)

        async def make() -> Accepts:
            from portfwd import gvproxy_api, vpnkit_api
            from pyvpnkit.api.server import ControlServer, mount_routes

            foreign = (
                vpnkit_api.routes(self._service.registry, via=self.via, dump=self.dump),
                gvproxy_api.routes(self.gvproxy_forwards(), self._gvproxy_suppliers()),
            )
            server = ControlServer(
                self._service,
                listen=tcp,
                token=token,
                allowed_uids=control.users,
                mounts=map(mount_routes, foreign),
                hijacked=gvproxy_api.HIJACKED,
                began=self._service.began,
            )
            self._control = await self._open.enter_async_context(server)
            self.where += server.addresses
            return server

        later = Later(make, ("pyvpnkit.api.server", "portfwd.gvproxy_api", "portfwd.vpnkit_api"))
        undo.push_async_callback(later.close)
        if tcp:
            await later.server()
        for where, setting in [(path, "control.socket")] * (path is not None) + [
            (one, "control.listen") for one in unix
        ]:
            assert where is not None
            await self._serve_unix(undo, where, setting, lambda listener: _handing_on(listener, later.accept))

    # -- gvproxy's API

    def gvproxy_forwards(self) -> GvproxyForwards:
        """One for the host's clients and guests, so that they see each other's."""
        if self._forwards is None:
            from portfwd.gvproxy_forwards import Forwards, as_asked, loopback_only

            policy = as_asked if self._settings.control.guest_bind == "any" else loopback_only
            self._forwards = Forwards(self._service.registry, policy=policy)
        return self._forwards

    def _gvproxy_suppliers(self) -> Suppliers:
        from netstack.link import stdio
        from portfwd.gvproxy_api import Suppliers

        service, stack, network = self._service, self._service.stack, self._settings.network

        def leases() -> dict[str, str]:
            return {network.gateway: network.gateway_mac, **{one.address: one.mac for one in stack.lease_table()}}

        def state(guest: Endpoint, source: Endpoint) -> str | None:
            ends = str(guest), str(source)
            return next((flow.state for flow in stack.flows() if (flow.guest, flow.remote) == ends), None)

        def attach(sock: socket.socket, peer_mtu: int | None) -> None:
            stdio.adopt(service.attachments, sock, mtu=network.mtu, counters=stack.counters, peer_mtu=peer_mtu)

        return Suppliers(
            zones=service.zones,
            leases=leases,
            cam=stack.cam,
            stats=stack.stats,
            dialer=stack,
            gateway=network.gateway_bytes,
            state=state,
            attach=attach,
        )

    async def _open_to_guests(self, undo: contextlib.AsyncExitStack) -> None:
        if not self._settings.control.guest_api:
            return
        from portfwd.gvproxy_guest import GuestDoor

        door = GuestDoor(self.gvproxy_forwards())
        await door.start()
        undo.push_async_callback(door.close)
        self._service.stack.serve_sockets(self._settings.network.gateway_bytes, HTTP_PORT, door.serve)

    # -- VPNKit's sockets

    def via(self, address: str) -> str:
        """How a forward made by a program in the VM gets to `address`: straight if it is a guest's, else by the forwarder."""
        if self._service.plane is None or self._service.is_guest(address):
            return "stack"
        return "forwarder"

    def dump(self) -> str | None:
        """The multiplexer's last events; `None` while there is none."""
        return self._service.plane.dump() or None if self._service.plane is not None else "no forwarder is configured\n"

    async def _open_ports(self, undo: contextlib.AsyncExitStack) -> None:
        sockets = self._settings.vpnkit.port
        if not sockets:
            return
        from portfwd.ninep.listen import port_server
        from portfwd.ninep.ports import PortTable

        table = PortTable(self._service.registry, via=self.via)

        async def serve(path: str, name: str) -> None:
            later = Later(lambda: self._port_http(path), ("pyvpnkit.api.http", "portfwd.vpnkit_api"))
            undo.push_async_callback(later.close)
            await self._serve_unix(
                undo,
                path,
                "vpnkit.port",
                lambda listener: port_server(listener, table.connect, later.accept, name=name),
            )

        for number, path in enumerate(sockets):
            await serve(path, f"port{number}")

    async def _port_http(self, path: str) -> Accepts:
        """VPNKit's HTTP API for one port socket. A guest may be behind it, which sees what was made through that socket."""
        from aiohttp import web

        from portfwd.owners import Owner
        from portfwd.vpnkit_api import routes
        from pyvpnkit.api.http import HttpServer, Peer

        app = web.Application()
        app.add_routes(
            routes(
                self._service.registry,
                via=self.via,
                dump=self.dump,
                owner=Owner("vpnkit", path),
                own=True,
            )
        )
        server = await self._open.enter_async_context(HttpServer(app))

        class Door:
            def accept(self, sock: socket.socket) -> None:
                server.accept(sock, Peer("guest", path))

        return Door()

    async def _open_http_proxy(self, undo: contextlib.AsyncExitStack) -> None:
        """Sockets where the HTTP proxy's document is had and set, as VPNKit's `--http-api-path`."""

        async def make() -> Accepts:
            from aiohttp import web

            from pyvpnkit.api.http import HttpServer, Peer
            from pyvpnkit.proxy.api import routes

            app = web.Application()
            app.add_routes(routes(self._service.host.start_proxy()))
            server = await self._open.enter_async_context(HttpServer(app))

            class Door:
                def accept(self, sock: socket.socket) -> None:
                    server.accept(sock, Peer("unix", "http_proxy.json"))

            return Door()

        later = Later(make, ("pyvpnkit.api.http", "pyvpnkit.proxy.api"))
        undo.push_async_callback(later.close)
        for path in self._settings.vpnkit.http_api:
            await self._serve_unix(undo, path, "vpnkit.http_api", lambda listener: _handing_on(listener, later.accept))

    async def _open_debug(self, undo: contextlib.AsyncExitStack) -> None:
        vpnkit = self._settings.vpnkit
        if not (vpnkit.introspection or vpnkit.diagnostics or vpnkit.pcap):
            return
        from netstack.observe.classic import Rings
        from portfwd.ninep.diagnostics import diagnostics_server, pcap_server
        from portfwd.ninep.introspect import TreeFiles, network_tree
        from portfwd.ninep.listen import tree_server
        from pyvpnkit.sources import sources

        rings = Rings(snaplen=vpnkit.pcap_snaplen)
        undo.callback(self._service.stack.live.tap(rings.feed))
        tree = network_tree(sources(self._service.stack), rings)
        for path in vpnkit.introspection:
            await self._serve_unix(
                undo, path, "vpnkit.introspection", lambda listener: tree_server(listener, lambda: TreeFiles(tree))
            )
        for path in vpnkit.diagnostics:
            await self._serve_unix(
                undo, path, "vpnkit.diagnostics", lambda listener: diagnostics_server(listener, tree)
            )
        for path in vpnkit.pcap:
            await self._serve_unix(
                undo, path, "vpnkit.pcap", lambda listener: pcap_server(listener, rings.rings["all"])
            )

    async def _serve_unix(
        self,
        undo: contextlib.AsyncExitStack,
        where: str,
        setting: str,
        server: Callable[[socket.socket], SocketServer],
    ) -> None:
        """Listen at a path, or on the inherited `fd:N`."""
        if where.startswith("fd:"):
            listener = inherited(where, setting)
        else:
            bound = UnixSocket(where, socket.SOCK_STREAM, setting=setting)
            undo.callback(bound.close)
            listener = bound.sock
        await undo.enter_async_context(server(listener))
        self.where.append(where)


def _handing_on(listener: socket.socket, accept: Callable[[socket.socket], None]) -> SocketServer:
    from portfwd.ninep.listen import SocketServer

    async def serve(sock: socket.socket) -> bool:
        accept(sock)
        return True

    return SocketServer(listener, serve, name="control")


def inherited(where: str, setting: str) -> socket.socket:
    """The listening socket of `fd:N`; raises `ConfigError`."""
    number = where.removeprefix("fd:")
    try:
        os.set_inheritable(int(number), False)
        sock = socket.socket(fileno=int(number))
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {where}: {error}; give the number of an inherited, listening socket") from None
    if not listens:
        sock.detach()
        raise ConfigError(f"{setting}: {where}: is not a listening socket")
    return sock


def read_token(path: str) -> str:
    """The one line of a token file; raises `ConfigError` when it is not this user's secret."""
    try:
        with open(path, encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            text = file.read(MAX_TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"control.token_file: {path}: {error}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
        raise ConfigError(f"control.token_file: {path}: can be read by others; run `chmod 600 {path}`")
    return text.strip()


def default_socket() -> Path:
    """Where the control socket of a daemon is that was told nothing. Raises `ConfigError`."""
    from pyvpnkit.process import StateDirectory

    return StateDirectory.default() / CONTROL_SOCKET
