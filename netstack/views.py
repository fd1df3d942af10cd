"""What a network shows of itself: flows, leases, guests, numbers; and how a flow is ended by hand. A part of `netstack.stack`."""

from __future__ import annotations

from collections.abc import Mapping

from netstack.api import Clock, Endpoint
from netstack.dhcp.leases import LeaseRecord, Leases
from netstack.flow.records import FlowRecord
from netstack.host.icmp_proxy import IcmpProxy
from netstack.host.tcp_proxy import TcpProxy
from netstack.host.udp_proxy import UdpProxy
from netstack.iface.neighbours import Neighbours
from netstack.iface.switch import Port, Switch
from netstack.link.common import bare
from netstack.observe.metrics import Counters
from netstack.settings import Network


class Views:
    """Plain values for people, files and the control API; nothing is kept for them while nobody asks."""

    network: Network
    clock: Clock
    counters: Counters
    switch: Switch
    leases: Leases
    neighbours: Neighbours
    tcp: TcpProxy
    udp: UdpProxy
    icmp: IcmpProxy

    def _work(self) -> None:
        """There is something to send."""
        raise NotImplementedError

    def flows(self) -> list[FlowRecord]:
        """Every TCP flow and UDP mapping, without asking the host's sockets for their names."""
        now = self.clock()
        return self.tcp.records(now) + self.udp.records(now)

    def flow_table(self) -> list[FlowRecord]:
        """Everything guests have open, pings too, with the names of the host's sockets."""
        now = self.clock()
        parts = (self.tcp, self.udp, self.icmp)
        return [record for part in parts for record in part.records(now, ends=True)]

    def reset_flow(self, id: str) -> bool:
        """End the flow of that name (`FlowRecord.id`): RST to both ends of a TCP connection, a UDP mapping or ping socket is
        closed. False when there is none."""
        self.tcp.now = self.clock()
        done = self.tcp.reset(id) or self.udp.reset(id) or self.icmp.reset(id)
        self._work()
        return done

    def lease_table(self) -> list[LeaseRecord]:
        """Who has which address: leases that hold, and addresses fixed for a MAC."""

        def link_of(address: bytes, mac: bytes, port: object) -> str | None:
            neighbour = self.neighbours.get(address)
            if neighbour is not None and neighbour.mac == mac and neighbour.port is not None:
                port = neighbour.port
            return port.name if isinstance(port, Port) else None

        return self.leases.records(self.clock(), link_of)

    def cam(self) -> dict[str, int]:
        """The switch's table: MAC address to number of port. The gateway, which is on every port, has 0."""
        learnt = {mac.hex(":"): port.number for mac, port in self.switch.table().items()}
        return {self.network.gateway_mac_bytes.hex(":"): 0, **learnt}

    def stats(self) -> Mapping[str, int]:
        """Every counter by its name, drops as `drops.REASON`; and as gvproxy has them `BytesSent` and `BytesReceived`, octets of
        frames towards the guests and from them."""
        counters = self.counters
        numbers = {name: value for name, value in counters.as_dict().items() if isinstance(value, int)}
        drops = {f"drops.{reason}": count for reason, count in counters.drops.items()}
        return {"BytesSent": counters.octets_out, "BytesReceived": counters.octets_in, **numbers, **drops}

    def status(self) -> dict[str, object]:
        """A summary for status pages; plain values."""
        now = self.clock()
        return {
            "links": [
                {
                    "name": port.name,
                    "frames_in": port.frames_in,
                    "frames_out": port.frames_out,
                    "congested": port.congested,
                    **getattr(bare(port.link), "details", dict)(),
                }
                for port in self.switch.ports
            ],
            "guests": [
                {
                    "address": Endpoint(neighbour.ip, 0).text,
                    "mac": neighbour.mac.hex(":"),
                    "link": neighbour.port.name if neighbour.port is not None else None,
                }
                for neighbour in self.neighbours.all()
            ],
            "leases": [
                {"address": Endpoint(lease.address, 0).text, "mac": lease.mac.hex(":"), "hostname": lease.hostname}
                for lease in self.leases.active(now)
            ],
            "tcp_flows": len(self.tcp.flows),
            "udp_flows": len(self.udp.flows()),
            "counters": self.counters.as_dict(),
        }
