"""What can be wrong with a forward, each with what a front door needs to say it in its own protocol's words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from netstack.errors import ConfigError, HostError

if TYPE_CHECKING:
    from portfwd.registry import Forward
    from portfwd.spec import PublishSpec


class AlreadyPublished(ConfigError):
    """The host side of a wanted forward is taken by `forward`, one of ours."""

    def __init__(self, spec: PublishSpec, forward: Forward) -> None:
        super().__init__(
            f"publish: {spec} is published already, as {forward} by {forward.owner}; remove that one first"
        )
        self.spec = spec
        self.forward = forward


class NotAllowed(ConfigError):
    """The settings forbid the host side of a wanted forward, or its owner."""

    def __init__(self, spec: PublishSpec, why: str) -> None:
        super().__init__(f"publish: {spec}: {why}")
        self.spec = spec


class TooMany(ConfigError):
    """One more would exceed a bound."""


class BindFailed(HostError):
    """The operating system refused the host side; `number` is its errno."""

    def __init__(self, spec: PublishSpec, why: str, number: int) -> None:
        super().__init__(f"cannot publish {spec}: {why}")
        self.spec = spec
        self.number = number

    @property
    def strerror(self) -> str:
        """The operating system's words alone, in lower case as Go and VPNKit write them."""
        text = os.strerror(self.number)
        return text[:1].lower() + text[1:]
