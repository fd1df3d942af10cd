"""What the host's programs get of a machine that is ready: published ports and docker.sock. Taken back before it goes.

The network keeps forwards over its own restarts, so what was published is written down: a supervisor that was killed leaves them to
its successor, who takes them back before the machine is there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from netstack.errors import ConfigError, HostError, NetstackError
from vm.supervisor.home import Home
from vm.supervisor.journal import Journal
from vm.supervisor.network import Network

_KEPT: Final = "published"


class Published:
    """Forwards by what the file says; the values are what became of it."""

    def __init__(self, home: Home, network: Network, journal: Journal, degraded: dict[str, str]) -> None:
        self._home = home
        self._network = network
        self._journal = journal
        self._degraded = degraded
        self._held: dict[str, str] = {}

    @property
    def held(self) -> Mapping[str, str]:
        """Those that are published, with their real ports."""
        return self._held

    async def publish(self, specs: tuple[str, ...]) -> None:
        """Publish all; what cannot be had is degraded, and says why. Harmless when repeated: after a restart of the network."""
        for spec in specs:
            label = f"publish {spec}"
            try:
                self._held[spec] = await self._network.publish(self._held.get(spec, spec))
            except NetstackError as error:
                if self._degraded.get(label) != str(error):
                    self._journal.add("degraded", f"{label}: {error}", level=logging.WARNING)
                self._degraded[label] = str(error)
                continue
            self._degraded.pop(label, None)
            self._journal.add("published", f"published {self._held[spec]}", spec=self._held[spec])
        self._keep()

    async def withdraw(self) -> None:
        """Take everything back, as far as the network still answers."""
        kept = self._home.read(_KEPT).get("specs", [])
        specs = (
            {*self._held.values(), *(one for one in kept if isinstance(one, str))} if isinstance(kept, list) else set()
        )
        for label in [label for label in self._degraded if label.startswith("publish ")]:
            del self._degraded[label]
        self._held.clear()
        if not specs:
            return
        try:
            for spec in sorted(specs):
                try:
                    await self._network.unpublish(spec)
                except ConfigError:
                    continue  # nothing that it could have published
        except NetstackError:
            return  # it is gone, and asked again when it comes back
        self._keep()

    def _keep(self) -> None:
        """For a successor. What cannot be written is no reason to lose a machine."""
        try:
            self._home.write(_KEPT, {"specs": list(self._held.values())})
        except HostError as error:
            self._journal.add("warning", f"what is published is not noted: {error}", level=logging.WARNING)
