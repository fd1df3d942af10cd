"""The multiplexer without I/O (being written)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from netstack.errors import HostError


class TooManyChannels(HostError):
    """One more channel would exceed `Limits.channels`."""


class Role(Enum):
    """Who takes which channel ids, so that both sides may open at the same time (spec vpnkit 7.3.3)."""

    LISTENER = "listener"
    """Go, the side that accepted the connection: 0, 1, 2 ..."""
    CONNECTOR = "connector"
    """Go, the side that connected: 0xffffffff, 0xfffffffe ..."""
    OCAML = "ocaml"
    """VPNKit in OCaml (the host of generation 2): 0x7fffffff, 0x80000000 ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer can make us hold."""

    channels: int = 4096
    window: int = 1 << 20


DEFAULT: Final = Limits()
