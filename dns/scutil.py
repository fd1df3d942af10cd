"""macOS's resolvers, as `scutil --dns` prints them (resolver(5), scutil(8)).

Its first part, `DNS configuration`, is how programs resolve names: each `resolver` has name servers, and a `domain` when it is
only for names under that (VPNs with split DNS, /etc/resolver). Without a domain it is for all other names. Where two have the same
domain, that of the lower `order` is asked first. `options : mdns` is multicast and no server. The second part, `for scoped
queries`, is for programs that bind their sockets to an interface, and is passed over.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from typing import Final

from dns import codec
from dns.servers import MAX_SERVERS, PORT, TIMEOUT_S, Resolvers, Server, Upstream
from netstack.errors import ConfigError, HostError, Malformed

WITHIN_S: Final = 5.0
MAX_RESOLVERS: Final = 1024

_FIELD: Final = re.compile(r"\s+(?P<name>[a-z_ ]+?)(?:\[\d+\])?\s*: ?(?P<value>.*)")


@dataclass(slots=True)
class _Resolver:
    servers: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    def number(self, name: str, default: int) -> int:
        text = self.fields.get(name, "").split(" ")[0]
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else default


def run_scutil() -> str:
    """The output of `scutil --dns`. Blocks, at most `WITHIN_S`. Raises `HostError`."""
    try:
        done = subprocess.run(
            ("scutil", "--dns"), stdin=subprocess.DEVNULL, capture_output=True, timeout=WITHIN_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"scutil --dns: {error}") from None
    return done.stdout.decode("utf-8", "replace")


def parse(text: str) -> Resolvers:
    """Whom macOS would ask for what. Never raises: what cannot be understood is passed over."""
    found = [one for one in _unscoped(text) if "mdns" not in one.fields.get("options", "").split()]
    by_domain: dict[bytes, list[_Resolver]] = {}
    search: list[str] = []
    for one in found:
        search += (name for name in one.search if name not in search)
        try:
            domain = codec.wire_name(one.fields.get("domain", ""))
        except Malformed:
            continue
        by_domain.setdefault(domain, []).append(one)
    servers: dict[Server, None] = {}
    for domain, its in by_domain.items():
        asked: dict[Upstream, Server] = {}
        for one in sorted(its, key=lambda one: one.number("order", 0)):
            timeout_s = (
                float(min(max(one.number("timeout", 0), 1), TIMEOUT_S)) if "timeout" in one.fields else TIMEOUT_S
            )
            for upstream in _upstreams(one):
                zones = () if domain == b"\0" else (domain,)
                asked.setdefault(upstream, Server(upstream, zones, len(asked), timeout_s))
        servers |= dict.fromkeys(asked.values())
    return Resolvers(servers=tuple(servers)[:MAX_SERVERS], search=tuple(search))


def _unscoped(text: str) -> list[_Resolver]:
    found: list[_Resolver] = []
    part = ""
    for line in text.splitlines():
        if line.startswith("DNS configuration"):
            part = line.strip()
        elif part != "DNS configuration":
            continue
        elif line.startswith("resolver #") and len(found) < MAX_RESOLVERS:
            found.append(_Resolver())
        elif found and (match := _FIELD.fullmatch(line)):
            value = match["value"].strip()
            match match["name"]:
                case "nameserver":
                    found[-1].servers.append(value)
                case "search domain":
                    found[-1].search.append(value.rstrip("."))
                case name:
                    found[-1].fields[name] = value
    return found


def _upstreams(one: _Resolver) -> list[Upstream]:
    port = one.number("port", PORT)
    found = []
    for text in one.servers:
        try:
            upstream = Upstream.parse(text)
        except ConfigError:
            continue
        scope = upstream.scope
        if not scope and upstream.address.lower().startswith("fe80:"):
            scope = one.number("if_index", 0)
        if 0 < port < 65536:
            found.append(Upstream(upstream.address, port, scope))
    return found
