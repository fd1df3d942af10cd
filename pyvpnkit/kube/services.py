"""A Service of Kubernetes (core/v1) in the little that matters for its ports, and which ports of the host it wants.

    LoadBalancer   port      -> ClusterIP:port
    NodePort       nodePort  -> ClusterIP:port; one that is 0 has not been given yet
    others         nothing

Spec vpnkit 7.8. TCP and UDP only. Without a ClusterIP there is nowhere to lead to. A Service with a `loadBalancerClass` belongs to
the implementation of that name, as Kubernetes has it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from netstack.errors import Malformed
from portfwd.invm.ports import Port

LOAD_BALANCER: Final = "LoadBalancer"
NODE_PORT: Final = "NodePort"
PROTOCOLS: Final = ("TCP", "UDP")
MAX_PORTS: Final = 1000
"""Of one Service; more are left out. Those that are served together in one range are far fewer."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """`port` at the ClusterIP; `node_port` at each node, 0 for none."""

    protocol: str
    port: int
    node_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One Service; `created` is the API's own time, which sorts as text."""

    namespace: str
    name: str
    uid: str = ""
    version: str = ""
    """`resourceVersion`."""
    created: str = ""
    kind: str = ""
    cluster_ip: str = ""
    load_balancer_class: str = ""
    ports: tuple[ServicePort, ...] = ()
    hostnames: tuple[str, ...] = ()
    """Of `status.loadBalancer.ingress`."""

    @property
    def key(self) -> str:
        """`namespace/name`, as Kubernetes' programs write it."""
        return f"{self.namespace}/{self.name}"

    @property
    def is_load_balancer(self) -> bool:
        """Whether its ports are served here, so that its status may say so."""
        return self.kind == LOAD_BALANCER and not self.load_balancer_class

    def wanted(self, annotation: str, bind: str) -> tuple[Port, ...]:
        """The host's ports that it wants, each once."""
        if self.kind not in (LOAD_BALANCER, NODE_PORT) or not self.cluster_ip or self.load_balancer_class:
            return ()
        found = []
        for port in self.ports:
            out_port = port.port if self.kind == LOAD_BALANCER else port.node_port
            if out_port and port.protocol in PROTOCOLS:
                found.append(
                    Port(
                        proto=port.protocol.lower(),
                        out_ip=bind,
                        out_port=out_port,
                        in_ip=self.cluster_ip,
                        in_port=port.port,
                        annotation=annotation,
                    )
                )
        return tuple(dict.fromkeys(found))


def parse(document: Any) -> Service:
    """A Service of the API's JSON. Raises `Malformed` where it has no name; what else is odd is left out."""
    metadata, spec, status = (_table(document, name) for name in ("metadata", "spec", "status"))
    namespace, name = _text(metadata, "namespace"), _text(metadata, "name")
    if not namespace or not name:
        raise Malformed("a Service without namespace or name")
    ingress = _list(_table(status, "loadBalancer"), "ingress")
    return Service(
        namespace=namespace,
        name=name,
        uid=_text(metadata, "uid"),
        version=_text(metadata, "resourceVersion"),
        created=_text(metadata, "creationTimestamp"),
        kind=_text(spec, "type"),
        cluster_ip=_ip(_text(spec, "clusterIP")),
        load_balancer_class=_text(spec, "loadBalancerClass"),
        ports=tuple(found for one in _list(spec, "ports")[:MAX_PORTS] if (found := _port(one)) is not None),
        hostnames=tuple(_text(one, "hostname") for one in ingress if isinstance(one, Mapping)),
    )


def _port(document: Any) -> ServicePort | None:
    if not isinstance(document, Mapping):
        return None
    port, node_port = document.get("port"), document.get("nodePort", 0)
    if not _is_port(port) or not port or not _is_port(node_port):
        return None
    return ServicePort(_text(document, "protocol") or "TCP", port, node_port)


def _is_port(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535


def _ip(text: str) -> str:
    """Empty for `None`, which a Service has that wants no address."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def _table(document: Any, name: str) -> Mapping[str, Any]:
    found = document.get(name) if isinstance(document, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    found = document.get(name)
    return found if isinstance(found, list) else []


def _text(document: Mapping[str, Any], name: str) -> str:
    found = document.get(name)
    return found if isinstance(found, str) else ""
