"""The operations of `/v1`, and `/metrics`."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Final

from aiohttp import web

from netstack.dhcp.statics import LeaseRecord
from netstack.errors import ConfigError
from netstack.settings import format_mac, parse_ipv4, parse_mac
from portfwd.errors import AlreadyPublished
from portfwd.owners import HAND
from portfwd.registry import Forward
from portfwd.spec import PublishSpec
from pyvpnkit.api import metrics, openapi, shapes
from pyvpnkit.api.dns import DnsApi
from pyvpnkit.api.errors import ApiError
from pyvpnkit.api.routing import MAX_ID, Answer, Call, Operation, Reply
from pyvpnkit.api.schema import Schema, array, count, integer, record, text
from pyvpnkit.api.shapes import SCHEMAS
from pyvpnkit.api.streams import PCAPNG, Streams
from pyvpnkit.api.world import World

DEFAULT_FLOWS: Final = 1000
MAX_FLOWS: Final = 100_000
FLOWS_AT_ONCE: Final = 200
"""Flows written in one go: some milliseconds, for which the network waits."""


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def version() -> str:
    """Of this program."""
    try:
        return metadata.version("pyvpnkit")
    except metadata.PackageNotFoundError:
        return "0"


class Api:
    """All operations on one network, which began at `began`. `counts` are the numbers of the server itself."""

    def __init__(self, world: World, streams: Streams, counts: Callable[[], Mapping[str, int]], began: float) -> None:
        self._world = world
        self._streams = streams
        self._counts = counts
        self._began = began
        self._version = version()
        self.operations: tuple[Operation, ...] = (
            *self._general(),
            *self._forwards(),
            *self._leases(),
            *self._flows(),
            *DnsApi(lambda: world.dns).operations,
        )
        """In the order of the document."""

    def routes(self) -> list[web.RouteDef]:
        """For `web.Application.add_routes`."""
        return [operation.route() for operation in self.operations]

    def document(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return openapi.document(self.operations, schemas=SCHEMAS, version=self._version)

    # Status, metrics, streams.

    def _general(self) -> list[Operation]:
        streams = self._streams
        types: Schema = text(description="Names of events, separated by commas; all unless given.", maxLength=1024)
        last: Schema = text(description="The last event seen; those since then come first.", maxLength=64)
        words: Schema = text(description="In the words of tcpdump: `host 192.168.65.3 and port 80`.", maxLength=4096)
        snaplen: Schema = integer(64, 262144, description="Octets kept of each frame.")
        return [
            Operation(
                method="GET",
                path="/v1/status",
                summary="The network at a glance.",
                handler=self.status,
                replies={200: Reply("The network.", _ref("Status"))},
            ),
            Operation(
                method="GET",
                path="/metrics",
                summary="Counters and gauges in Prometheus' text format.",
                handler=self.metrics,
                replies={200: Reply("Metrics.", text(), "text/plain")},
            ),
            Operation(
                method="GET",
                path="/v1/events",
                summary="What happens, as server-sent events; `lost` tells a slow reader how many it missed.",
                handler=streams.events,
                query={"types": types},
                headers={"Last-Event-ID": last},
                replies={200: Reply("Events, without end.", text(), "text/event-stream"), 429: _TOO_MANY},
            ),
            Operation(
                method="GET",
                path="/v1/capture",
                summary="Frames of all links as pcapng, as they pass.",
                handler=streams.capture,
                query={"filter": words, "snaplen": snaplen},
                replies={200: Reply("A pcapng section, without end.", text(), PCAPNG), 429: _TOO_MANY},
            ),
            Operation(
                method="GET",
                path="/v1/openapi.json",
                summary="This document.",
                handler=self.openapi,
                replies={200: Reply("An OpenAPI document.", {"type": "object"})},
            ),
        ]

    async def status(self, call: Call) -> Answer:
        return Answer(self._status())

    def _status(self) -> dict[str, Any]:
        found = {
            key: value for key, value in self._world.status(flows=False).items() if key not in ("published", "control")
        }
        return {
            "pid": os.getpid(),
            "version": self._version,
            "uptime_s": round(time.monotonic() - self._began, 3),
            "forwards": len(self._world.registry),
            **found,
            "control": dict(self._counts()),
        }

    async def metrics(self, call: Call) -> web.StreamResponse:
        forwards = [shapes.forward(one) for one in self._world.registry]
        return web.Response(
            text=metrics.render(self._status(), forwards), headers={"Content-Type": metrics.CONTENT_TYPE}
        )

    async def openapi(self, call: Call) -> Answer:
        return Answer(self.document())

    # Forwards.

    def _forwards(self) -> list[Operation]:
        number = {"id": integer(0, MAX_ID, description="`id` of a forward.")}
        spec: Schema = text(
            minLength=1, maxLength=4096, description="The text form, with the host port asked for or the real one."
        )
        gone = Reply("There is none.", _ref("Problem"))
        taken = Reply(
            "The host side is taken; `holder` is the forward that has it, where it is one of ours.", _ref("Problem")
        )
        forward = _ref("Forward")
        return [
            Operation(
                method="GET",
                path="/v1/forwards",
                summary="Everything that is published, whoever did it.",
                handler=self.list_forwards,
                replies={
                    200: Reply(
                        "All forwards, and those of before a restart that could not be had again.",
                        record({"forwards": array(forward), "failed": array(_ref("FailedForward"))}),
                    )
                },
            ),
            Operation(
                method="POST",
                path="/v1/forwards",
                summary="Publish a port or a socket. It is kept across restarts of the daemon until it is removed.",
                handler=self.add_forward,
                body=shapes.NEW_FORWARD,
                replies={
                    201: Reply("Published.", forward),
                    200: Reply("It was published already, exactly so.", forward),
                    409: taken,
                    429: Reply("Too many ports are published.", _ref("Problem")),
                    503: Reply("Descriptors or memory are short.", _ref("Problem")),
                },
            ),
            Operation(
                method="DELETE",
                path="/v1/forwards",
                summary="Remove the forward with this text form, or give a failed one up. Connections that came through it go on.",
                handler=self.remove_spec,
                query={"spec": {**spec, "x-required": True}},
                replies={
                    200: Reply("Removed, or given up.", {"anyOf": [forward, _ref("FailedForward")]}),
                    404: gone,
                },
            ),
            Operation(
                method="GET",
                path="/v1/forwards/{id}",
                summary="One forward.",
                handler=self.get_forward,
                parameters=number,
                replies={200: Reply("The forward.", forward), 404: gone},
            ),
            Operation(
                method="DELETE",
                path="/v1/forwards/{id}",
                summary="Remove a forward. Connections that came through it go on.",
                handler=self.remove_forward,
                parameters=number,
                replies={200: Reply("Removed.", forward), 404: gone},
            ),
        ]

    async def list_forwards(self, call: Call) -> Answer:
        failed = [{"spec": str(spec), "message": why} for spec, why in self._failed().items()]
        return Answer({"forwards": [shapes.forward(one) for one in self._world.registry], "failed": failed})

    def _failed(self) -> Mapping[PublishSpec, str]:
        state = self._world.state
        return {} if state is None else state.forwards.failed

    def _forget(self, spec: PublishSpec) -> bool:
        """Give up a failed one; whether there was one."""
        state = self._world.state
        if state is None or not state.forwards.forget(spec):
            return False
        self._world.registry.changed()
        return True

    async def add_forward(self, call: Call) -> Answer:
        spec = shapes.spec_of(call.body)
        try:
            made = self._world.registry.add(spec, HAND)
        except AlreadyPublished as error:
            if spec in (error.forward.asked, error.forward.spec):
                return Answer(shapes.forward(error.forward), 200, f"{error.forward} was there")
            raise ApiError(409, str(error), holder=shapes.forward(error.forward)) from None
        self._forget(spec)
        return Answer(shapes.forward(made), 201, f"published {made}")

    def _forward(self, number: int) -> Forward:
        found = self._world.registry.by_id(number)
        if found is None:
            raise ApiError(404, f"no forward has id {number}; GET /v1/forwards lists them")
        return found

    async def get_forward(self, call: Call) -> Answer:
        return Answer(shapes.forward(self._forward(call.path["id"])))

    async def remove_forward(self, call: Call) -> Answer:
        return self._remove(self._forward(call.path["id"]))

    async def remove_spec(self, call: Call) -> Answer:
        spec = PublishSpec.parse(call.query["spec"])
        try:
            found = self._world.registry.find(spec)
        except ConfigError as error:
            why = self._failed().get(spec)
            if why is not None and self._forget(spec):
                return Answer({"spec": str(spec), "message": why}, audit=f"given up {spec}")
            raise ApiError(404, f"{error}; GET /v1/forwards lists what is") from None
        return self._remove(found)

    def _remove(self, forward: Forward) -> Answer:
        value = shapes.forward(forward)
        self._world.registry.remove(forward)
        return Answer(value, audit=f"no longer published {forward}")

    # Leases.

    def _leases(self) -> list[Operation]:
        lease = _ref("Lease")
        return [
            Operation(
                method="GET",
                path="/v1/leases",
                summary="Who has which address: leases that hold, and addresses fixed for a MAC.",
                handler=self.list_leases,
                replies={200: Reply("All leases.", record({"leases": array(lease)}))},
            ),
            Operation(
                method="POST",
                path="/v1/leases",
                summary="Fix an address for a MAC. A guest that has another one gets it when it asks next.",
                handler=self.add_lease,
                body=shapes.NEW_LEASE,
                replies={
                    201: Reply("Fixed.", lease),
                    200: Reply("It was fixed already, exactly so.", lease),
                    409: Reply("The MAC has another address, or the address another MAC.", _ref("Problem")),
                },
            ),
            Operation(
                method="DELETE",
                path="/v1/leases/{mac}",
                summary="No longer fix the address of a MAC. A lease that holds goes on.",
                handler=self.remove_lease,
                parameters={"mac": shapes.MAC},
                replies={
                    200: Reply("Done.", _ref("NewLease")),
                    404: Reply("It has none.", _ref("Problem")),
                    409: Reply("It is in the settings, and ends there.", _ref("Problem")),
                },
            ),
        ]

    def _lease(self, mac: str) -> LeaseRecord | None:
        return next((one for one in self._world.stack.lease_table() if one.mac == mac and one.static), None)

    async def list_leases(self, call: Call) -> Answer:
        return Answer({"leases": [shapes.lease(one) for one in self._world.stack.lease_table()]})

    async def add_lease(self, call: Call) -> Answer:
        mac, address = parse_mac(call.body["mac"]), parse_ipv4(call.body["address"], "address")
        wanted, name = str(ipaddress.IPv4Address(address)), format_mac(mac)
        before = self._lease(name)
        if before is not None and before.address == wanted:
            return Answer(shapes.lease(before))
        taken = before is not None or any(
            one.address == wanted and one.mac != name for one in self._world.stack.lease_table()
        )
        try:
            self._world.stack.leases.add_static(mac, address)
        except ConfigError as error:
            raise ApiError(409 if taken else 400, str(error)) from None
        made = self._lease(name)
        assert made is not None
        return Answer(shapes.lease(made), 201, f"static lease {name} -> {wanted}")

    async def remove_lease(self, call: Call) -> Answer:
        mac = parse_mac(call.path["mac"])
        before = self._lease(format_mac(mac))
        try:
            if before is None or not self._world.stack.leases.remove_static(mac):
                raise ApiError(404, f"{format_mac(mac)} has no static lease; GET /v1/leases lists them")
        except ConfigError as error:
            raise ApiError(409, str(error)) from None
        value = {"mac": before.mac, "address": before.address}
        return Answer(value, audit=f"no static lease {before.mac} -> {before.address} any more")

    # Flows.

    def _flows(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path="/v1/flows",
                summary="What guests have open, with both ends on both sides.",
                handler=self.list_flows,
                query={
                    "guest": text(maxLength=64, description="Only flows of the guest with this address."),
                    "protocol": text(enum=["tcp", "udp", "icmp"]),
                    "limit": integer(0, MAX_FLOWS, description=f"How many at most; {DEFAULT_FLOWS} unless given."),
                },
                replies={
                    200: Reply(
                        "Flows, and how many there are without `limit`.",
                        record({"flows": array(_ref("Flow")), "total": count("Flows that fit.")}),
                    )
                },
            ),
            Operation(
                method="DELETE",
                path="/v1/flows/{id}",
                summary="Reset one flow.",
                handler=self.reset_flow,
                parameters={"id": text(maxLength=64, description="`id` of a flow.", minLength=1)},
                replies={
                    200: Reply("It was reset.", record({"id": text()})),
                    404: Reply("There is none.", _ref("Problem")),
                },
            ),
        ]

    async def list_flows(self, call: Call) -> Answer | web.StreamResponse:
        guest, protocol = call.query.get("guest"), call.query.get("protocol")
        found = [
            one
            for one in self._world.stack.flow_table()
            if (protocol is None or one.protocol == protocol)
            and (guest is None or one.guest == guest or one.guest.rpartition(":")[0] == guest)
        ]
        shown = found[: call.query.get("limit", DEFAULT_FLOWS)]
        if len(shown) <= FLOWS_AT_ONCE:
            return Answer({"flows": [shapes.flow(one) for one in shown], "total": len(found)})
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(call.request)
        await response.write(b'{"total": %d, "flows": [' % len(found))
        for first in range(0, len(shown), FLOWS_AT_ONCE):
            part = json.dumps([shapes.flow(one) for one in shown[first : first + FLOWS_AT_ONCE]])[1:-1]
            await response.write((part if not first else f", {part}").encode())
            await asyncio.sleep(0)  # the network has its turn
        await response.write(b"]}\n")
        return response

    async def reset_flow(self, call: Call) -> Answer:
        name = call.path["id"]
        if not self._world.stack.reset_flow(name):
            raise ApiError(404, f"no flow has id {name!r} (any more); GET /v1/flows lists them")
        return Answer({"id": name}, audit="reset")


_TOO_MANY: Final = Reply("There are too many readers.", _ref("Problem"))
