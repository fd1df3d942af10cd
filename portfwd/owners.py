"""Whose forward it is: what made it decides what ends it, and who may remove it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Owner:
    """A front door (`kind`), and who came through it (`name`; empty where the door is one client).

    Kinds: `settings` (YAML and flags; a reload brings them in line), `hand` (the command line and `/v1`; kept across restarts),
    `vpnkit` (VPNKit's HTTP API; `name` is the port socket, where it came through one), `gvproxy` (its API on the host),
    `slirp4netns` (its API), `9p` (`name` is the connection; ends with it) and `guest` (gvproxy's API inside the network; `name` is
    the guest's address, which removes nothing but its own).
    """

    kind: str
    name: str = ""

    @property
    def is_in_vm(self) -> bool:
        """Whether a program in the VM may have made it, which is not trusted with the host's file system."""
        return self.kind in ("9p", "guest") or (self.kind == "vpnkit" and bool(self.name))

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.kind


SETTINGS: Final = Owner("settings")
HAND: Final = Owner("hand")
VPNKIT: Final = Owner("vpnkit")
GVPROXY: Final = Owner("gvproxy")
