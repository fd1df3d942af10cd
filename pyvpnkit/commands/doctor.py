"""`pyvpnkit doctor`: what may be in a network's way on this host, and what to do about it. Needs no daemon, and no root."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netstack  # noqa: F401  # first: it makes our `dns` importable beside dnspython's
from dns import resolved
from dns.follow import HostResolvers, Mode
from dns.servers import HOST, Resolvers, Upstream
from netstack.errors import ConfigError, HostError, NetstackError
from pyvpnkit import loader
from pyvpnkit.commands.client import Client, control_path
from pyvpnkit.commands.table import clean, print_json
from pyvpnkit.config import Settings
from pyvpnkit.hostnet import checks, routes
from pyvpnkit.hostnet.checks import Result

RESOLVER_S = 2.0
_STUB = Upstream("127.0.0.53")


def doctor(parsed: argparse.Namespace) -> int:
    """Run every check; 0 when none failed."""
    settings = loader.load(parsed.config, {"network.subnet": [parsed.subnet]} if parsed.subnet else {})
    found = list(examine(settings, parsed.control))
    well = not any(result.state == "fail" for result in found)
    if parsed.json:
        print_json({"ok": well, "checks": [dataclasses.asdict(result) for result in found]})
    else:
        width = max(len(result.name) for result in found)
        lines = []
        for result in found:
            lines.append(f"{result.state:4}  {result.name:{width}}  {clean(result.text)}")
            if result.advice:
                lines.append(f"{'':4}  {'':{width}}  -> {clean(result.advice)}")
        print("\n".join(lines))
    return 0 if well else 1


def examine(settings: Settings, control: str | None) -> Iterator[Result]:
    """All checks, in the order of what people ask first."""
    yield from _resolvers(settings)
    try:
        now = routes.snapshot()
    except HostError as error:
        yield Result(name="routes", state="warn", text=str(error), advice="subnet and MTU cannot be checked")
    else:
        yield checks.subnet(settings.network, now)
        yield checks.egress(settings.network, now)
    yield checks.ping()
    yield checks.descriptors(settings.network)
    yield from checks.ports(settings.publish)
    yield checks.clock()
    yield from _state(settings)
    yield checks.tun()
    yield checks.namespaces()
    yield daemon(control)


def _resolvers(settings: Settings) -> Iterator[Result]:
    dns = settings.dns
    if dns.servers:
        found, source = Resolvers.of(dns.servers), "the setting dns.servers"
    else:
        host = HostResolvers(dns.resolvers, resolv_conf=dns.resolv_conf, dns_file=dns.file)
        found, source = host(), (dns.file if host.origin is Mode.FILE else dns.resolv_conf) or "nobody"
        if host.mode is Mode.RESOLVED or (host.mode is Mode.AUTO and _STUB in (one.upstream for one in found.servers)):
            with contextlib.suppress(HostError):  # the stub answers whether the servers behind it do or not
                found, source = resolved.resolvers(resolved.ask()), "systemd-resolved"
    if any(server.upstream == HOST for server in found.servers):
        yield Result(name="resolvers", state="ok", text="the host's own library is asked (getaddrinfo)")
        return
    plain = [server.upstream for server in found.servers if server.tls is None]
    if plain or not found.servers:
        yield from checks.resolvers(plain, source, RESOLVER_S)
    for server in found.servers:
        if server.tls is not None:
            yield Result(name="resolvers", state="ok", text=f"{server}: not asked here")


def _state(settings: Settings) -> Iterator[Result]:
    if settings.state_dir is None:
        yield Result(name="state", state="ok", text="leases and forwards are kept in memory, as the settings want it")
        return
    from pyvpnkit.process import StateDirectory

    try:
        path = StateDirectory.default() if settings.state_dir == "auto" else Path(settings.state_dir)
        yield checks.state_directory(path)
    except (ConfigError, OSError) as error:
        yield Result(name="state", state="fail", text=str(error))


def daemon(control: str | None) -> Result:
    """What a daemon says of itself, if one runs."""
    try:
        path = control_path(control)
        found: Any = Client(path).get("/v1/status")
        drops = sum(found["counters"].get("drops", {}).values())
        text = (
            f"process {found['pid']} behind {path}: {len(found['guests'])} guests, {found['tcp_flows']} TCP and "
            f"{found['udp_flows']} UDP flows, {drops} frames dropped"
        )
        if found["counters"].get("contained") or found["control"].get("contained"):
            advice = "its log has faults of pyvpnkit's own; please report them"
            return Result(name="daemon", state="warn", text=text, advice=advice)
        return Result(name="daemon", state="ok", text=text)
    except NetstackError as error:
        running = not str(error).startswith("no daemon is running")
        return Result(name="daemon", state="warn" if running or control else "ok", text=str(error).partition(";")[0])
    except (KeyError, TypeError, AttributeError):
        return Result(name="daemon", state="warn", text="what answers at the control socket is another version's")
