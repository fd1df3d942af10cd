"""The objects of `/v1` as JSON: their schemas, and how they are made of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from netstack.dhcp.statics import LeaseRecord
from netstack.flow.records import FlowRecord
from portfwd.registry import Forward
from portfwd.spec import PublishSpec
from pyvpnkit.api.routing import MAX_ID
from pyvpnkit.api.schema import Schema, array, count, integer, record, text

SPEC_FIELDS: Final[Mapping[str, Schema]] = {
    "protocol": text(enum=["tcp", "udp", "unix"], description="Of the host side."),
    "bind": text(maxLength=64, description="Host address to listen on; 127.0.0.1 unless given."),
    "port": integer(0, 65535, description="Host port; 0 lets the operating system choose."),
    "path": text(maxLength=1024, description="Host path of a `unix` one, absolute."),
    "guest": {"type": ["string", "null"], "maxLength": 64, "description": "Guest address; null is the default guest."},
    "guest_port": integer(0, 65535, description="Guest port."),
    "guest_path": text(maxLength=1024, description="A Unix socket in the guest instead, by the forwarder."),
    "count": integer(1, 65536, description="Consecutive ports, counted from `port` and `guest_port`."),
    "via": text(enum=["stack", "forwarder"], description="Our own TCP and UDP, or VPNKit's forwarder in the guest."),
    "source": text(enum=["gateway", "client"], description="Whom the guest sees as the client."),
    "proxy": integer(0, 2, description="Version of the PROXY protocol; 0 for none."),
    "annotation": text(maxLength=256, description="For people."),
}
"""The members of a forward that make it; `portfwd.spec.PublishSpec` says what goes together."""

FORWARD: Final[Schema] = record(
    {
        "id": integer(0, MAX_ID, description="Never used again while the daemon runs."),
        "spec": text(description="The text form, with the real host port."),
        "asked": text(description="The text form as it was asked for."),
        **SPEC_FIELDS,
        "owner": text(description="Who made it: settings, hand, vpnkit, gvproxy, 9p NAME, guest ADDRESS."),
        "accepted": count("Connections taken so far; UDP has none."),
        "pauses": count("Times its listeners rested for want of descriptors or memory."),
    },
    description="A published port or socket.",
)
FAILED: Final[Schema] = record(
    {"spec": text(description="The text form."), "message": text(description="What stands in its way.")},
    description="Published by hand before a restart, and not to be had since; tried again when it is published once more, "
    "and at a reload.",
)
NEW_FORWARD: Final[Schema] = {
    "anyOf": [
        record(
            {"spec": text(minLength=1, maxLength=4096, description="`8080:80`, the text form of the command line.")},
            description="As text.",
        ),
        record(SPEC_FIELDS, optional=tuple(SPEC_FIELDS), description="By its members."),
    ],
    "description": "What to publish.",
}

FLOW: Final[Schema] = record(
    {
        "id": text(),
        "protocol": text(enum=["tcp", "udp", "icmp"]),
        "direction": text(enum=["outbound", "inbound"], description="`outbound`: the guest began."),
        "guest": text(description="The guest's end."),
        "remote": text(description="The other end as the guest sees it."),
        "remotes": count("Other ends of a UDP mapping."),
        "host_local": text(description="Our end of the host's socket; empty where it has none."),
        "host_remote": text(description="The other end of the host's socket; empty where it has none."),
        "state": text(),
        "octets_outbound": count("From the guest."),
        "octets_inbound": count("To the guest."),
        "age_s": {"type": "number"},
        "idle_s": {"type": ["number", "null"]},
    },
    description="A TCP connection, a UDP mapping or a guest's ping.",
)

_FLOW_FIELDS: Final = tuple(FLOW["properties"])

MAC: Final[Schema] = text(
    pattern=r"^[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(\1[0-9A-Fa-f]{2}){4}$", examples=["02:00:00:00:00:07"], maxLength=17
)
IPV4: Final[Schema] = text(
    pattern=r"^[0-9]{1,3}(\.[0-9]{1,3}){3}$",
    examples=["192.168.65.7"],
    maxLength=15,
    description="An address of the pool.",
)
NEW_LEASE: Final[Schema] = record({"mac": MAC, "address": IPV4}, description="A static lease.")
LEASE: Final[Schema] = record(
    {
        "address": text(),
        "mac": text(),
        "hostname": text(description="As the guest calls itself; may be empty."),
        "static": {"type": "boolean", "description": "Whether the address is fixed for this MAC."},
        "expires_in_s": {"type": ["number", "null"], "description": "null for a fixed one that is not leased now."},
        "link": {"type": ["string", "null"], "description": "Where the guest was heard; null while it was not."},
    },
    description="An address and whose it is.",
)

STATUS: Final[Schema] = {
    "type": "object",
    "properties": {
        "pid": count("Process id of the daemon."),
        "version": text(),
        "uptime_s": {"type": "number"},
        "forwards": count("Published ports and sockets."),
        "links": array({"type": "object"}),
        "guests": array({"type": "object"}),
        "leases": array({"type": "object"}),
        "tcp_flows": count("Connections."),
        "udp_flows": count("Mappings."),
        "counters": {"type": "object"},
        "control": {"type": "object", "additionalProperties": {"type": "integer"}, "description": "Of this API."},
    },
    "required": [
        "pid",
        "version",
        "uptime_s",
        "forwards",
        "links",
        "guests",
        "tcp_flows",
        "udp_flows",
        "counters",
        "control",
    ],
    "description": "What a person wants to know at a glance; more members may be added.",
}

SCHEMAS: Final[Mapping[str, Schema]] = {
    "Forward": FORWARD,
    "FailedForward": FAILED,
    "NewForward": NEW_FORWARD,
    "Flow": FLOW,
    "Lease": LEASE,
    "NewLease": NEW_LEASE,
    "Status": STATUS,
}


def forward(one: Forward) -> dict[str, Any]:
    """A forward as `FORWARD` says."""
    # The real one is made anew, and checked, each time it is asked for.
    spec = one.spec if not one.asked.port and one.asked.protocol != "unix" else one.asked
    asked = str(one.asked)
    return {
        "id": one.id,
        "spec": asked if spec is one.asked else str(spec),
        "asked": asked,
        **{name: getattr(spec, name) for name in SPEC_FIELDS},
        "owner": str(one.owner),
        "accepted": one.accepted,
        "pauses": sum(getattr(listener, "pauses", 0) for listener in one.listeners),
    }


def spec_of(body: Mapping[str, Any]) -> PublishSpec:
    """What a `NEW_FORWARD` asks for; raises `ConfigError`."""
    return PublishSpec.parse(body["spec"]) if "spec" in body else PublishSpec(**body)


def flow(one: FlowRecord) -> dict[str, Any]:
    """A flow as `FLOW` says."""
    found = {name: getattr(one, name) for name in _FLOW_FIELDS}  # `asdict` copies, which takes 20 times as long
    found["age_s"] = round(one.age_s, 3)
    found["idle_s"] = None if one.idle_s is None else round(one.idle_s, 3)
    return found


def lease(one: LeaseRecord) -> dict[str, Any]:
    """A lease as `LEASE` says."""
    expires = one.expires_in_s
    return {**dataclasses.asdict(one), "expires_in_s": None if expires is None else round(expires, 3)}
