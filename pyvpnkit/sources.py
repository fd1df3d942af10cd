"""What VPNKit's introspection tree tells of a network (spec vpnkit 8.2), from the tables that the control API shows too."""

from __future__ import annotations

import time

from netstack.api import Endpoint
from netstack.flow.records import FlowRecord
from netstack.stack import Stack
from portfwd.ninep.introspect import Sources, connection_line, endpoint_line, flow_line, port_line

_CLOSED = frozenset({"CLOSED", "TIME-WAIT"})


def sources(stack: Stack) -> Sources:
    """Suppliers of the four text files. Times are wall-clock; TCP keeps none, so an open connection was active just now."""

    def flows(protocol: str) -> list[FlowRecord]:
        return [flow for flow in stack.flow_table() if flow.protocol == protocol]

    def active(flow: FlowRecord) -> float:
        return time.time() - (flow.idle_s or 0.0)

    def connections() -> str:
        tcp = (connection_line("tcp", flow.host_remote or flow.remote) for flow in flows("tcp"))
        udp = (connection_line("udp", flow.host_local, f"{flow.guest}-{flow.remote}") for flow in flows("udp"))
        return "".join((*tcp, *udp))

    def tcp_flows() -> str:
        return "".join(
            flow_line(flow.guest, flow.remote, is_open=flow.state not in _CLOSED, last_active=active(flow))
            for flow in flows("tcp")
        )

    def endpoints() -> str:
        latest: dict[tuple[str, str], float] = {}
        for flow in stack.flow_table():
            ends = _address(flow.remote), _address(flow.guest)
            latest[ends] = max(latest.get(ends, 0.0), active(flow))
        return "".join(endpoint_line(remote, guest, when) for (remote, guest), when in latest.items())

    def ports() -> str:
        now = time.time()
        guests = (Endpoint(neighbour.ip, 0).text for neighbour in stack.neighbours.all() if neighbour.port is not None)
        return "".join(port_line(address, now) for address in guests)

    return Sources(connections=connections, flows=tcp_flows, endpoints=endpoints, ports=ports)


def _address(end: str) -> str:
    return end.rpartition(":")[0] or end
