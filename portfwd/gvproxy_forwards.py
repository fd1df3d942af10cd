"""gvproxy's words for forwards: `local`, `remote`, `protocol` (spec gvproxy 1.3), on the one registry of forwards.

`local` is kept to the letter as the name of a forward (`:9090` is not `0.0.0.0:9090`); forwards that other doors made are named
`ADDRESS:PORT`. `remote` is where it leads in the network, `:PORT` the caller's own address; `ssh-tunnel://` is listed without
its passphrase. A caller on the host sees all and
may remove all but those of the settings. A guest sees and removes what it made itself, leads to itself only, with TCP and UDP, at
host addresses that a policy grants it, and makes at most `MAX_PER_GUEST`.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from netstack.api import Endpoint
from netstack.errors import ConfigError, NetstackError
from portfwd.errors import AlreadyPublished, BindFailed, NotAllowed, TooMany
from portfwd.owners import GVPROXY, Owner
from portfwd.registry import Forward, Registry
from portfwd.spec import MAX_ANNOTATION, PublishSpec
from portfwd.ssh_target import Target, is_tunnel, masked
from portfwd.ssh_tunnel import Tunnel
from portfwd.vpnkit_api import listen_error

MAX_PER_GUEST: Final = 64

Policy: TypeAlias = Callable[[PublishSpec], PublishSpec]
"""What a guest gets of the host side it asks for, as it is or changed; raises `NotAllowed`."""


class Refused(Exception):
    """The text of the answer, and its HTTP status: 400 for what cannot be understood, 500 for what cannot be done."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, order=True)
class Proxy:
    """A forward as gvproxy lists it; sorted by `local`, then `protocol`."""

    local: str
    protocol: str
    remote: str

    def document(self) -> dict[str, str]:
        return {"local": self.local, "remote": self.remote, "protocol": self.protocol}


def loopback_only(spec: PublishSpec) -> PublishSpec:
    """The policy for guests that nobody gave more: the host's loopback; who asks for every address gets that instead.

    podman in a guest asks for every address where its user names none. Ports below 1024 are the host's own.
    """
    address = ipaddress.ip_address(spec.bind)
    if address.is_unspecified:
        spec = replace(spec, bind="127.0.0.1" if address.version == 4 else "::1")
    elif not address.is_loopback:
        raise NotAllowed(spec, "a guest may publish on this host's loopback only; ask for 127.0.0.1")
    if 0 < spec.port < 1024:
        raise NotAllowed(spec, "a guest may not publish ports below 1024; choose a higher one")
    return spec


def as_asked(spec: PublishSpec) -> PublishSpec:
    """The policy for guests that are trusted as the host's users are: gvproxy's own."""
    return spec


class Forwards:
    """The forwards of `registry` in gvproxy's words; `policy` is for callers that are guests."""

    def __init__(
        self, registry: Registry, *, policy: Policy = loopback_only, max_per_guest: int = MAX_PER_GUEST
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._max_per_guest = max_per_guest
        self._names: dict[int, Proxy] = {}
        """How those were asked for that came through this door, by the forward's id."""
        self.refused = 0
        """Times a guest was refused one more, or a host side it may not have."""

    def _seen(self, caller: Endpoint | None) -> list[tuple[Proxy, Forward]]:
        """What a caller sees; a range is listed by its ports."""
        self._names = {number: name for number, name in self._names.items() if self._registry.by_id(number)}
        found = []
        for forward in self._registry:
            if caller is not None and forward.owner != _owner(caller):
                continue
            if (name := self._names.get(forward.id)) is not None:
                found.append((name, forward))
            else:
                found += [(_described(spec), forward) for spec in forward.spec.each()]
        return found

    def all(self, caller: Endpoint | None = None) -> list[Proxy]:
        """What `caller` (a guest, or `None` for the host) sees."""
        return sorted(proxy for proxy, _ in self._seen(caller))

    def expose(self, proxy: Proxy, caller: Endpoint | None = None) -> Forward:
        """Raises `Refused`."""
        spec = _spec(proxy, caller)
        if any((other.protocol, other.local) == (proxy.protocol, proxy.local) for other, _ in self._seen(caller)):
            raise Refused(f"proxy already running for {proxy.protocol} on {proxy.local}")
        try:
            if caller is not None:
                spec = self._granted(spec, caller)
            forward = self._registry.add(spec, _owner(caller), way=self._way(proxy))
        except AlreadyPublished as error:
            raise Refused(listen_error(error.spec, errno.EADDRINUSE)) from None
        except BindFailed as error:
            raise Refused(listen_error(error.spec, error.number)) from None
        except NetstackError as error:
            raise Refused(str(error)) from None
        if is_tunnel(proxy.remote):
            proxy = replace(proxy, remote=masked(proxy.remote))
        elif spec.guest is not None:
            proxy = replace(proxy, remote=proxy.remote if "/" in proxy.remote else f"{spec.guest}:{spec.guest_port}")
        self._names[forward.id] = proxy
        return forward

    def _way(self, proxy: Proxy) -> Tunnel | None:
        """Only for who was granted the forward: the key is looked for in the host's files. Raises `ConfigError`."""
        if not is_tunnel(proxy.remote):
            return None
        target = Target.parse(proxy.remote)
        target.check()
        return Tunnel(target, lambda: self._registry.carriers.dialer)

    def _granted(self, spec: PublishSpec, caller: Endpoint) -> PublishSpec:
        try:
            if spec.protocol == "unix":
                raise NotAllowed(spec, "a guest may not make files on the host; use tcp")
            if spec.guest != caller.text:
                raise NotAllowed(spec, f"a guest may lead to itself only; use {caller.text}:{spec.guest_port}")
            if len(self._registry.of(_owner(caller))) >= self._max_per_guest:
                raise TooMany(f"publish: a guest may have {self._max_per_guest} forwards; unexpose some first")
            return self._policy(spec)
        except ConfigError:
            self.refused += 1
            raise

    def unexpose(self, local: str, protocol: str, caller: Endpoint | None = None) -> None:
        """Raises `Refused`."""
        for proxy, forward in self._seen(caller):
            if (proxy.protocol, proxy.local) != (protocol, local):
                continue
            try:
                self._registry.remove_named(forward, local)
            except ConfigError as error:
                raise Refused(str(error)) from None
            return
        raise Refused("proxy not found")


def _owner(caller: Endpoint | None) -> Owner:
    return GVPROXY if caller is None else Owner("guest", caller.text)


def _described(spec: PublishSpec) -> Proxy:
    """A forward that another door made."""
    bind = f"[{spec.bind}]" if ":" in spec.bind else spec.bind
    guest = f"[{spec.guest}]" if spec.guest and ":" in spec.guest else spec.guest or ""
    remote = spec.guest_path or f"{guest}:{spec.guest_port}"
    if spec.protocol == "unix" and not spec.guest_path:
        remote = f"tcp://{remote}"
    return Proxy(spec.path or f"{bind}:{spec.port}", spec.protocol, remote)


def _spec(proxy: Proxy, caller: Endpoint | None) -> PublishSpec:
    """What `proxy` means; raises `Refused`."""
    match proxy.protocol:
        case "tcp" | "udp":
            guest, guest_port = _remote(proxy.remote, caller)
            bind, port = _local(proxy.local)
            return _made(protocol=proxy.protocol, bind=bind, port=port, guest=guest, guest_port=guest_port)
        case "unix":
            return _unix(proxy)
        case "npipe":
            raise Refused("npipe: named pipes are for Windows; use the protocol unix and a path")
        case _:
            raise Refused(f"unknown protocol {proxy.protocol[:40]}")


def _unix(proxy: Proxy) -> PublishSpec:
    if is_tunnel(proxy.remote):
        try:
            target = Target.parse(proxy.remote)
        except ConfigError as error:
            raise Refused(str(error), 400) from None
        end = target.guest
        label = f"by ssh to {target.path}"[:MAX_ANNOTATION]
        return _made(protocol="unix", path=proxy.local, guest=end.text, guest_port=end.port, annotation=label)
    shown = proxy.remote.partition("?")[0][:200]  # what follows may be a passphrase
    try:
        where = urlsplit(proxy.remote)
        host, port = where.hostname or "", where.port or 0
    except ValueError as error:
        raise Refused(f"remote {shown!r}: {error}; write tcp://ADDRESS:PORT", 400) from None
    if where.scheme != "tcp":
        raise Refused(f"remote {shown!r}: write tcp://ADDRESS:PORT", 400)
    return _made(protocol="unix", path=proxy.local, guest=_ipv4(host, proxy.remote), guest_port=port)


def _made(**values: object) -> PublishSpec:
    try:
        return PublishSpec(**values)  # type: ignore[arg-type]
    except ConfigError as error:
        raise Refused(str(error), 400) from None


def _split(address: str, what: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, as Go's `net.SplitHostPort`; raises `Refused`."""
    host, colon, port = address.rpartition(":")
    if not colon:
        raise Refused(f"{what}: address {address[:200]}: missing port in address", 400)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise Refused(f"{what}: address {address[:200]}: too many colons in address", 400)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise Refused(f"{what}: address {address[:200]}: invalid port, it must be a number from 0 to 65535", 400)
    return host, int(port)


def _local(local: str) -> tuple[str, int]:
    host, port = _split(local, "local")
    host = {"": "0.0.0.0", "localhost": "127.0.0.1"}.get(host, host)
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        raise Refused(f"local: {host[:200]!r} is no IP address of this host", 400) from None


def _remote(remote: str, caller: Endpoint | None) -> tuple[str, int]:
    host, port = _split(remote, "remote")
    if host:
        return _ipv4(host, remote), port
    if caller is None:
        raise Refused(f"remote: {remote} means the caller's own address, and you are no guest; write ADDRESS:PORT", 400)
    return caller.text, port


def _ipv4(host: str, remote: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise Refused(f"remote: {remote[:200]!r}: {host[:200]!r} is no IPv4 address", 400) from None
