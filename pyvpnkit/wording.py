"""What the log says of an event: a line for people, where the event's own text is for programs."""

from __future__ import annotations

from netstack.observe.events import (
    Event,
    FlowClosed,
    FlowOpened,
    FlowRefused,
    ForwardAdded,
    ForwardRemoved,
    LeaseGiven,
    LeaseReleased,
)


def line(event: Event) -> str:
    """One line; the event's own text for those that no log shows."""
    match event:
        case LeaseGiven():
            name = f" ({event.hostname})" if event.hostname else ""
            return f"lease {event.address} for {event.mac}{name}"
        case LeaseReleased():
            return f"lease {event.address} for {event.mac} has ended"
        case ForwardAdded():
            return f"published {event.forward}{_by(event.owner)}"
        case ForwardRemoved():
            return f"no longer published {event.forward}{_by(event.owner)}"
        case FlowOpened(direction="inbound"):
            return f"{event.protocol} {event.guest} <- {event.remote} opened"
        case FlowOpened():
            return f"{event.protocol} {event.guest} -> {event.remote} opened"
        case FlowClosed():
            octets = f"{event.octets_outbound} octets out, {event.octets_inbound} in"
            return f"{event.protocol} {event.guest} - {event.remote} closed: {event.reason}; {octets}, {event.duration_s:.3g} s"
        case FlowRefused():
            return f"{event.protocol} {event.guest} -> {event.remote} refused: {event.reason}"
        case _:
            return str(event)


def _by(owner: str) -> str:
    return "" if owner in ("", "settings") else f" (by {owner})"
