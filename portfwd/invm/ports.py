"""A port to expose, as JSON, as a line of text and as VPNKit's 9P tree names it (spec vpnkit 7.1, 7.2)."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from netstack.errors import ConfigError, Malformed

PROTOCOLS: Final = ("tcp", "udp", "unix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """`out` is the host's side, `in` the VM's (or its container's)."""

    proto: str
    out_ip: str = ""
    out_port: int = 0
    out_path: str = ""
    in_ip: str = ""
    in_port: int = 0
    in_path: str = ""
    annotation: str = ""

    def json(self) -> dict[str, str | int]:
        """What is empty or 0 is left out, as VPNKit's programs do."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    @classmethod
    def of(cls, document: Any) -> Port:
        """The inverse of `json`; unknown keys are ignored. Raises `Malformed`."""
        if not isinstance(document, Mapping):
            raise Malformed(f"a port is a JSON object, not {document!r:.80}")
        known: dict[str, Any] = {}
        for field in fields(cls):
            value = document.get(field.name)
            wanted = int if field.name.endswith("_port") else str
            if value is None:
                continue
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise Malformed(f"a port's {field.name} cannot be {value!r:.80}")
            known[field.name] = value
        known.setdefault("proto", "")
        return cls(**known)

    def __str__(self) -> str:
        """VPNKit's own line."""
        first = f"{self.annotation} " if self.annotation else ""
        if self.proto == "unix":
            return f"{first}unix forward from {self.out_path} to {self.in_path}"
        return f"{first}{self.proto} forward from {self.out_ip}:{self.out_port} to {self.in_ip}:{self.in_port}"

    def request(self) -> str:
        """The request of the 9P tree, which is also the directory's name by convention; raises `ConfigError`."""
        if self.proto == "unix":
            outer, inner = (base64.b64encode(path.encode()).decode() for path in (self.out_path, self.in_path))
            return f"unix:{outer}:unix:{inner}"
        for address in (self.out_ip, self.in_ip):
            if ":" in address:
                raise ConfigError(f"the 9P tree knows no IPv6 address such as {address}; use the HTTP API")
        return f"{self.proto}:{self.out_ip}:{self.out_port}:{self.proto}:{self.in_ip}:{self.in_port}"

    def granted(self, request: str) -> Port:
        """This port, with the host port that the 9P tree's canonical answer names."""
        parts = request.split(":")
        if self.proto != "unix" and len(parts) == 6 and parts[2].isascii() and parts[2].isdigit():
            return replace(self, out_port=int(parts[2]))
        return self


def checked_ip(name: str, text: str) -> str:
    """`text` in its usual spelling, if it is an IP address; raises `ConfigError` that names the flag."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ConfigError(f"flag -{name}: {text!r} is no IP address") from None
