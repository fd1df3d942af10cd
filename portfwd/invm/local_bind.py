"""The host's side of a port, bound in the VM as well, for programs in the VM that expect it there (spec vpnkit 1.3).

What reaches it is carried straight to the container. (VPNKit binds TCP for UDP forwards too; here each protocol binds its own.)
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
from typing import Final

from netstack.errors import ConfigError, HostError
from portfwd.carriers import Destination
from portfwd.invm.limits import Budget, Counts
from portfwd.invm.ports import Port
from portfwd.invm.relay import relay
from portfwd.invm.targets import UDP_BATCH, Client, Patience, UdpTarget, dial

log = logging.getLogger("pyvpnkit.expose-port")

MODES: Final = ("best-effort", "always", "never")
BACKLOG: Final = 1024
REST_S: Final = 0.25


def bind(port: Port, mode: str, lent: socket.socket | None = None) -> socket.socket | None:
    """A bound socket for the host side of `port`, or `None` where there is to be none; raises `HostError`.

    `mode`: `never`; `always`, which fails but for an address that only the host has; `best-effort`, which never fails.
    `lent` is a socket that is bound there already (`-use-listen-fd`).
    """
    if mode == "never" or port.proto == "unix" or not (port.out_port or lent):
        if lent is not None:
            lent.close()
        return None
    if lent is None and _leads_here(port):
        log.debug("not bound in the VM: %s:%d leads to the VM itself", port.in_ip, port.in_port)
        return None
    sock = lent
    try:
        if sock is None:
            sock = _bound(port)
        sock.setblocking(False)
        if port.proto == "tcp":
            sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRNOTAVAIL or mode == "best-effort":
            log.debug("not bound in the VM: %s", error.strerror)
            return None
        where = f"[{port.out_ip}]" if ":" in port.out_ip else port.out_ip
        why = (error.strerror or "failed").lower()
        raise HostError(f"listen {port.proto} {where}:{port.out_port}: bind: {why}") from None
    return sock


def _leads_here(port: Port) -> bool:
    """Whether what is bound would be its own target: what connects to it would be carried round and round."""
    outer, inner = ipaddress.ip_address(port.out_ip), ipaddress.ip_address(port.in_ip)
    if port.out_port != port.in_port or outer.version != inner.version or not (outer.is_unspecified or outer == inner):
        return False
    with socket.socket(socket.AF_INET6 if inner.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((port.in_ip, 0))
        except OSError:
            return False  # no address of this VM
    return True


def _bound(port: Port) -> socket.socket:
    family = socket.AF_INET6 if ":" in port.out_ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if port.proto == "tcp" else socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port.proto == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((port.out_ip, port.out_port))
    except BaseException:
        sock.close()
        raise
    return sock


def lent_socket(descriptor: int, proto: str) -> socket.socket:
    """The socket a newer dockerd bound and hands down (`-use-listen-fd`: descriptor 4); raises `ConfigError`."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(f"-use-listen-fd: descriptor {descriptor} is no socket: {error.strerror}") from None
    if sock.type != (socket.SOCK_DGRAM if proto == "udp" else socket.SOCK_STREAM):
        sock.detach()
        raise ConfigError(f"-use-listen-fd: descriptor {descriptor} is no {proto} socket")
    os.set_inheritable(descriptor, False)
    return sock


class LocalBind:
    """Serves a socket of `bind`. `close` ends it and what goes through it."""

    def __init__(self, sock: socket.socket, port: Port, *, budget: Budget, patience: Patience | None = None) -> None:
        self._sock = sock
        self._patience = patience or Patience()
        self._budget = budget
        self._counts = Counts()
        self._loop = asyncio.get_running_loop()
        self._relays: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None
        family = socket.AF_INET6 if ":" in port.in_ip else socket.AF_INET
        self._target = Destination(port.proto, socket.inet_pton(family, port.in_ip), port.in_port)
        self._udp: UdpTarget | None = None
        if port.proto == "udp":
            self._v6 = sock.family == socket.AF_INET6
            self._udp = UdpTarget(self._target, self._answer, budget=budget, counts=self._counts)
        self._ready = self._accept if self._udp is None else self._datagrams
        self._loop.add_reader(sock.fileno(), self._ready)

    def _accept(self) -> None:
        for _ in range(UDP_BATCH):
            if not self._budget.take():
                self._pause()
                return
            try:
                client, _peer = self._sock.accept()
            except BlockingIOError:
                self._budget.give()
                return
            except OSError as error:
                self._budget.give()
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                    return
                continue
            client.setblocking(False)
            task = self._loop.create_task(self._carry(client))
            self._relays.add(task)
            task.add_done_callback(self._relays.discard)

    def _pause(self) -> None:
        """Clients wait in the kernel's queue for a quarter of a second."""
        self._loop.remove_reader(self._sock.fileno())
        self._rest = self._loop.call_later(REST_S, self._resume)

    def _resume(self) -> None:
        self._rest = None
        self._loop.add_reader(self._sock.fileno(), self._ready)

    async def _carry(self, client: socket.socket) -> None:
        try:
            target = await dial(self._target, self._patience)
        except OSError:
            return  # the container refuses: so do we
        else:
            await relay(client, target)
        finally:
            client.close()
            self._budget.give()

    def _datagrams(self) -> None:
        assert self._udp is not None
        for _ in range(UDP_BATCH):
            try:
                payload, (host, port, *_more) = self._sock.recvfrom(65535)
            except ConnectionRefusedError:
                continue
            except OSError:
                return
            self._udp.datagram(Client(socket.inet_pton(self._sock.family, host.partition("%")[0]), port, ""), payload)

    def _answer(self, client: Client, payload: bytes) -> None:
        try:
            self._sock.sendto(payload, (socket.inet_ntop(self._sock.family, client.address), client.port))
        except OSError:
            self._counts["udp datagrams dropped"] += 1

    async def close(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self._udp is not None:
            self._udp.close()
        for task in tuple(self._relays):
            task.cancel()
        if self._relays:
            await asyncio.wait(self._relays)
