"""Counters and gauges in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_NAME: Final = re.compile(r"[^a-zA-Z0-9_]")

Labels = Mapping[str, str]


_GAUGES: Final = frozenset({"cache_entries", "cache_octets", "in_flight"})
"""Numbers of this moment among those of the services."""


class Page:
    """The lines of one scrape, samples of a name together under its type."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, str, list[str]]] = {}

    def add(self, name: str, kind: str, help: str, value: float, labels: Labels | None = None) -> None:
        """One sample of `pyvpnkit_NAME`; `kind` is `counter` or `gauge`."""
        full = f"pyvpnkit_{_NAME.sub('_', name)}"
        if kind == "counter" and not full.endswith("_total"):
            full += "_total"
        _, _, samples = self._families.setdefault(full, (kind, help, []))
        words = ",".join(f'{key}="{_escape(text)}"' for key, text in (labels or {}).items())
        samples.append(f"{full}{{{words}}} {value}" if words else f"{full} {value}")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, (kind, help, samples) in self._families.items():
            yield f"# HELP {name} {help}"
            yield f"# TYPE {name} {kind}"
            yield from samples


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def render(status: Mapping[str, Any], forwards: Sequence[Mapping[str, Any]]) -> str:
    """The page, from what `/v1/status` and `/v1/forwards` say."""
    page = Page()
    page.add("info", "gauge", "Always 1; the version is a label.", 1, {"version": str(status["version"])})
    page.add("uptime_seconds", "gauge", "Since the control server started.", status["uptime_s"])
    counters = status["counters"]
    for name, value in counters.items():
        if isinstance(value, int):
            page.add(name, "counter", "See netstack.observe.metrics.", value)
    for reason, value in counters.get("drops", {}).items():
        page.add("drops", "counter", "Frames and packets discarded.", value, {"reason": str(reason)})
    for protocol in ("tcp", "udp"):
        page.add("flows", "gauge", "What guests have open.", status[f"{protocol}_flows"], {"protocol": protocol})
    page.add("guests", "gauge", "Guests that are known.", len(status["guests"]))
    page.add("leases", "gauge", "Leases that hold.", len(status.get("leases", ())))
    page.add("forwards", "gauge", "Published ports and sockets.", status["forwards"])
    for link in status["links"]:
        name = str(link["name"])
        for direction, key in (("in", "frames_in"), ("out", "frames_out")):
            labels = {"link": name, "direction": direction}
            page.add("link_frames", "counter", "Frames from (in) and to (out) guests.", link[key], labels)
        page.add("link_congested", "gauge", "Whether the peer does not read.", int(link["congested"]), {"link": name})
    for one in forwards:
        labels = {"id": str(one["id"]), "forward": str(one["spec"]), "owner": str(one["owner"])}
        page.add("forward_accepted", "counter", "Connections taken.", one["accepted"], labels)
        page.add("forward_pauses", "counter", "Rests for want of descriptors.", one["pauses"], labels)
    for part in ("dns", "ntp", "control"):
        for name, value in status.get(part, {}).items():
            if isinstance(value, int):
                kind = "gauge" if name.startswith("open_") or name in _GAUGES else "counter"
                page.add(f"{part}_{name}", kind, f"Of the {part} server.", value)
    return str(page)
