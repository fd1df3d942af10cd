"""Open the kernel's network devices that a link URL names: TAP and one end of a veth (Linux)."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from netstack.api import Link
from netstack.errors import ConfigError
from netstack.link.spec import LinkSpec
from netstack.settings import parse_mac

DEFAULT_IFNAME = "eth0"


def open_device(spec: LinkSpec, mtu: int) -> Link:
    """The open `tap` or `packet` link of `spec`; `mtu` holds where the URL gives none. Raises `ConfigError`."""
    if sys.platform != "linux":
        raise ConfigError(f"link {spec}: {spec.kind} links need Linux; here there are qemu, vmnet, unixgram and fd")
    # Imported by need: these modules are Linux only, and a start without such a link is faster.
    module: Any = importlib.import_module(f"netstack.link.{spec.kind}")
    wanted: dict[str, Any] = {"name": spec.label, "mtu": spec.mtu or mtu, "offload": spec.offload}
    if spec.how == "inherited":
        if spec.kind != "tap":
            raise ConfigError(f"link {spec}: only TAP devices and sockets of guests can be inherited")
        adopted: Link = module.adopt_tap(spec.descriptor, **wanted)
        return adopted
    namespaces: list[tuple[str, int]] = []
    if spec.how in ("netns", "pid", "fd"):
        from netstack.link.namespace import namespace_paths

        target = f"/proc/self/fd/{spec.where}" if spec.how == "fd" else spec.where
        try:
            namespaces = namespace_paths("pid" if spec.how == "pid" else "netns", target, spec.userns)
            for path, _kind in namespaces:
                os.stat(path)
        except OSError as error:
            raise ConfigError(f"link {spec}: {_no_namespace(spec, error)}") from None
    ifname = spec.where if spec.how == "device" else spec.ifname or DEFAULT_IFNAME
    mac = None if spec.mac is None else parse_mac(spec.mac)
    opener = module.open_tap if spec.kind == "tap" else module.open_packet
    opened: Link = opener(ifname, namespaces=namespaces, mac=mac, **wanted)
    return opened


def _no_namespace(spec: LinkSpec, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{error.strerror}; give a namespace that this user may enter, as a rule one of the user's own"
    match spec.how:
        case "pid":
            return f"there is no process {spec.where}; give a process that runs"
        case "fd":
            return f"descriptor {spec.where} is not open; the parent must leave it open across exec"
        case _:
            return f"there is no network namespace {spec.where!r}; `ip netns list` shows those there are"
