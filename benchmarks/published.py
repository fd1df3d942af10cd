"""The way in: clients in the host's namespace, servers in the guest's, and a published port of the back-end between them.

The client connects to an address of the host that is not its loopback, and so does not come from it either: what comes from
loopback pasta splices past its TAP, socket to socket, and the guest would need a back-end no longer. That the octets
crossed the guest's interface is checked for each transfer.

All back-ends of a run listen in the same host namespace, so each guest has ports of its own.
"""

from __future__ import annotations

import itertools
import json
import socket
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.build import SetupError
from benchmarks.load import Servers
from benchmarks.namespaces import HostNamespace, Namespace

_FIRST_PORT = 6000
_ports = itertools.count(_FIRST_PORT)


def free_ports() -> Servers:
    """Ports that no other guest of this process has."""
    return Servers(netload=next(_ports), iperf3=next(_ports))


@dataclass(frozen=True, slots=True, kw_only=True)
class WayIn:
    """From the host's namespace to the servers in the guest's, by `address` and `ports`."""

    host: HostNamespace
    guest: Namespace
    interface: str
    """Of the guest, where it must arrive."""
    address: str
    ports: Servers

    def probe(self, limit_s: float) -> list[str]:
        """The command line that ends well once a client got an answer of the guest's server."""
        return self.host.inside(*load.netload("probe", self.address, self.ports.netload, limit_s))

    def bulk(self, *, streams: int, up: bool, seconds: float) -> list[str]:
        """The command line that moves octets over TCP, from the guest where `up`."""
        command = load.iperf3(self.address, self.ports.iperf3, streams=streams, from_server=up, seconds=seconds)
        return self.host.inside(*command)

    def operations(self, verb: str, *, connections: int, seconds: float) -> list[str]:
        """The command line for round trips that begin at the host."""
        return self.host.inside(*load.netload(verb, self.address, self.ports.netload, connections, seconds))

    def crossed(self, *, up: bool) -> int:
        """Octets that the guest's interface has carried so far."""
        received, sent = self.guest.octets(self.interface)
        return sent if up else received


def expose_with_slirp4netns(api: Path, ports: Servers) -> None:
    """Ask a running slirp4netns for both ports, on every address of the host; raises `SetupError`."""
    for port in (ports.netload, ports.iperf3):
        arguments = {"proto": "tcp", "host_addr": "0.0.0.0", "host_port": port, "guest_port": port}
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(5)
            asking.connect(str(api))
            asking.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
            asking.shutdown(socket.SHUT_WR)
            with asking.makefile("rb") as answer:
                told = answer.read()
        if "return" not in json.loads(told or b"{}"):
            raise SetupError(f"slirp4netns did not publish port {port}: {told.decode(errors='replace')}")
