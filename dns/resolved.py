"""systemd-resolved's resolvers: which servers each link has, and for which domains (resolvectl(1), systemd-resolved.service(8)).

Where /etc/resolv.conf points at 127.0.0.53, resolved could be asked for everything. The servers of its links are asked instead:
DNSSEC bits and single labels pass untouched, it can be said who answered, and the cache is flushed when a VPN comes.

The rules are resolved's own. A link's servers are asked for the names under its domains (`corp.example` and `~corp.example`).
For all other names those of links with `~.` are; where no link has that, the global ones and those of links that are a
default route. A domain that two links have is asked of both. Its fallback servers, which it asks when it has none, are left to
its stub (`dns.follow`).

`resolvectl` is asked, not D-Bus: it is there where resolved is, and speaks to the bus without 3,000 lines of ours. Since
version 259 its status is to be had in JSON; before, its short commands print a line for each link, the same since 240. It
takes 15 ms of another process, some 60 ms for the short commands, and only when resolved has written its state.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dns import codec
from dns.servers import MAX_SERVERS, Resolvers, Server, Upstream
from netstack.errors import ConfigError, HostError, Malformed

log = logging.getLogger("pyvpnkit.dns")

STUBS: Final = frozenset({"127.0.0.53", "127.0.0.54"})
"""Where resolved listens itself: not a server that it may be said to have."""
STATE: Final = ("/run/systemd/resolve", "/run/systemd/resolve/netif", "/run/systemd/netif/links")
"""Directories in which resolved and networkd rename a file into place with each change; anyone may look at their time."""
WITHIN_S: Final = 5.0
MAX_LINKS: Final = 256
MAX_DOMAINS: Final = 1024
"""Of one link."""
_COMMANDS: Final = ("dns", "domain", "default-route", "dnsovertls")

_LINE: Final = re.compile(r"(?:Global|Link (?P<index>\d+) \((?P<name>[^)]*)\)):(?P<rest>.*)")

Run = Callable[[tuple[str, ...]], str]
"""What `resolvectl` prints with these arguments; raises `HostError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What resolved knows of one link; the index 0 is its global configuration."""

    index: int = 0
    servers: tuple[str, ...] = ()
    """Each with port, interface and name for TLS as resolved writes them: `10.8.0.3:5353%tun0#dns.corp.example`."""
    domains: tuple[str, ...] = ()
    """`corp.example`, also searched in, or `~corp.example`."""
    default_route: bool = True
    over_tls: bool = False
    """Strictly: `opportunistic` is asked in clear."""


def run_resolvectl(arguments: tuple[str, ...]) -> str:
    """The output of `resolvectl` on PATH. Blocks, at most `WITHIN_S`. Raises `HostError`."""
    environment = os.environ | {"LC_ALL": "C", "COLUMNS": "65535", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
    try:
        done = subprocess.run(
            ("resolvectl", "--no-pager", *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=WITHIN_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip()
        raise HostError(f"resolvectl {' '.join(arguments)}: {said[:200] or error}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"resolvectl {' '.join(arguments)}: {error}") from None
    return done.stdout.decode("utf-8", "replace")


def ask(run: Run = run_resolvectl) -> list[Link]:
    """What resolved knows now. Blocks. Raises `HostError` when resolved or its tool is not there, or cannot be understood."""
    try:
        text = run(("--json=short", "status"))
    except HostError:
        text = ""  # before version 247 an unknown option; whether resolved answers shows in the next
    if text.lstrip().startswith("["):
        try:
            return of_json(text)
        except Malformed as error:
            log.warning("%s; asking for its text", error)
    return of_text(run(("dns",)), run(("domain",)), *(_or_nothing(run, command) for command in _COMMANDS[2:]))


def _or_nothing(run: Run, command: str) -> str:
    try:
        return run((command,))
    except HostError:  # of a version without it: its default holds
        return ""


def of_json(text: str) -> list[Link]:
    """Links of `resolvectl --json=short status`. Raises `Malformed`."""
    try:
        found = json.loads(text)
        return [_link(one) for one in found[:MAX_LINKS] if not one.get("delegate")]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Malformed(f"resolvectl: its JSON cannot be understood ({error})") from None


def _link(one: Mapping[str, Any]) -> Link:
    servers = []
    for server in one.get("servers") or ():
        address, port = str(server["addressString"]), int(server.get("port") or 53)
        name = f"#{server['name']}" if server.get("name") else ""
        address = f"[{address}]" if ":" in address else address
        servers.append(f"{address}:{port}{name}")
    return Link(
        index=int(one.get("ifindex") or 0),
        servers=tuple(servers),
        domains=tuple(
            ("~" if domain["routeOnly"] else "") + str(domain["name"])
            for domain in (one.get("searchDomains") or ())[:MAX_DOMAINS]
        ),
        default_route=bool(one.get("defaultRoute", True)),
        over_tls=one.get("dnsOverTLS") == "yes",
    )


def of_text(dns: str, domain: str, default_route: str = "", over_tls: str = "") -> list[Link]:
    """Links of what `resolvectl dns`, `domain`, `default-route` and `dnsovertls` print. Never raises.

    Without an answer to the third, a link is a default route if none of its domains is for routing only (systemd.network(5),
    DNSDefaultRoute=).
    """
    servers, domains, routes, tls = (_lines(text) for text in (dns, domain, default_route, over_tls))
    links = []
    for index, found in list(servers.items())[:MAX_LINKS]:
        its_domains = tuple(domains.get(index, ()))[:MAX_DOMAINS]
        route_only = any(name.startswith("~") for name in its_domains) and "~." not in its_domains
        said = routes.get(index)
        links.append(
            Link(
                index=index,
                servers=tuple(found),
                domains=its_domains,
                default_route=said == ["yes"] if said else not route_only,
                over_tls=tls.get(index) == ["yes"],
            )
        )
    return links


def _lines(text: str) -> dict[int, list[str]]:
    """Values by index of link; a line that begins with a space goes on with the one before."""
    found: dict[int, list[str]] = {}
    last: list[str] | None = None
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match:
            last = found.setdefault(int(match["index"] or 0), [])
            last += match["rest"].split()
        elif line.startswith(" ") and last is not None:
            last += line.split()
        else:
            last = None
    return found


def resolvers(links: Iterable[Link]) -> Resolvers:
    """Whom resolved would ask for what."""
    links = [link for link in links if link.servers]
    everything = [link for link in links if "~." in link.domains]
    search: list[str] = []
    zoned: list[Server] = []
    default: list[Server] = []
    for link in sorted(links, key=lambda link: link.index):
        zones = []
        for text in link.domains:
            name = text.removeprefix("~").rstrip(".")
            if name and not text.startswith("~") and name not in search:
                search.append(name)
            try:
                zones.append(codec.wire_name(name))
            except Malformed as error:
                log.warning("resolved: domain %r: %s", text, error)
        zones = [zone for zone in dict.fromkeys(zones) if zone != b"\0"]
        upstreams = [upstream for text in link.servers for upstream in _upstreams(text, link)]
        if zones:
            zoned += (Server(one, tuple(zones), order, tls=tls) for order, (one, tls) in enumerate(upstreams))
        if link in everything or (not everything and link.default_route):
            default += (Server(one, (), order, tls=tls) for order, (one, tls) in enumerate(upstreams))
    return Resolvers(servers=tuple(dict.fromkeys((*zoned, *default)))[:MAX_SERVERS], search=tuple(search))


def _upstreams(text: str, link: Link) -> list[tuple[Upstream, str | None]]:
    """The server and its name for TLS; none for one that cannot be asked."""
    address, _, name = text.partition("#")
    address, _, interface = address.partition("%")
    try:
        upstream = Upstream.parse(address)
        if upstream.address.lower().startswith("fe80:"):
            scope = interface or str(link.index)
            upstream = Upstream(upstream.address, upstream.port, Upstream.parse(f"fe80::%{scope}").scope)
    except ConfigError as error:
        log.warning("resolved: %s", error)
        return []
    if upstream.address in STUBS:
        return []
    if not link.over_tls:
        return [(upstream, None)]
    port = 853 if upstream.port == 53 else upstream.port
    return [(Upstream(upstream.address, port, upstream.scope), name or upstream.address)]
