"""Forwards made by hand, in a file, so that they are there again after a restart of the daemon.

A port that the operating system chose is asked for by its number the next time, so that who was told it finds it again. What
cannot be published again is not forgotten: it is named in the log and by `failed`, and tried again whenever somebody asks.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from netstack.jsonfile import JsonFile
from portfwd.owners import HAND
from portfwd.registry import Registry
from portfwd.spec import PublishSpec

log = logging.getLogger("pyvpnkit.portfwd")

FORMAT: Final = "pyvpnkit forwards 1"


class ForwardStore(JsonFile):
    """One file of forwards. The caller decides when to write `snapshot`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "forwards", "those made by hand end with this daemon")
        self.failed: dict[PublishSpec, str] = {}
        """What was made by hand once and cannot be had now, with the reason."""

    def restore(self, registry: Registry) -> None:
        """Publish what the file names."""
        document = self.read()
        if document is None:
            return
        try:
            specs = _specs(document)
        except ValueError as error:
            self.set_aside(error)
            return
        self.failed = dict.fromkeys(specs, "")
        self.retry(registry)

    def retry(self, registry: Registry) -> None:
        """Publish what failed, if it can be had by now."""
        for spec in tuple(self.failed):
            try:
                registry.add(spec, HAND)
            except (HostError, ConfigError) as error:
                if self.failed[spec] != str(error):
                    log.error("%s", error)
                self.failed[spec] = str(error)
            else:
                del self.failed[spec]

    def forget(self, spec: PublishSpec) -> bool:
        """Give up what failed; whether it was there."""
        return self.failed.pop(spec, None) is not None

    def snapshot(self, registry: Registry) -> dict[str, object]:
        """The document: what is published by hand, and what failed."""
        made = [str(forward.spec) for forward in registry.of(HAND)]
        return {"format": FORMAT, "forwards": made + [str(spec) for spec in self.failed if str(spec) not in made]}


def _specs(document: Any) -> list[PublishSpec]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"not a file of format {FORMAT!r}")
    texts = document.get("forwards")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("`forwards` is no list of texts")
    found = []
    for text in texts:
        try:
            found.append(PublishSpec.parse(text))
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return found
