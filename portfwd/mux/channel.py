"""A channel as its user sees it, whatever carries it: a multiplexer's session, or a connection of its own (generation 1).

    peer -> Receiver.data(view) ... consumed(octets)      what was passed on may be sent again by the peer
    peer -> Receiver.ended()                              no more octets from the peer
    peer -> Receiver.closed(Ending)                       the channel is over; only what is kept can still be passed on
    sendable() -> octets; send(view)                      up to so many; after 0, Receiver.room() is called
    shutdown(); close()                                   our half; all of it

All calls happen in the event loop's thread. A channel that was opened by the peer hears nothing until `attach`, which also
tells the peer that it may send.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from portfwd.carriers import Destination


class Ending(Enum):
    """Why a channel is over."""

    CLOSED = "closed"
    """The peer closed it, after octets or a shutdown; nothing more can be sent."""
    REFUSED = "refused"
    """The peer closed it before it said anything: what it was to reach refused."""
    LOST = "lost"
    """The connection to the peer broke; octets may be missing."""
    OVERRUN = "overrun"
    """The peer sent far more than it may; the channel alone was closed."""


class Receiver(Protocol):
    """Who uses a channel. No method may raise."""

    def data(self, octets: memoryview) -> None:
        """Octets from the peer, valid during the call only. `Channel.consumed` is told when they went on, or were dropped."""
        ...

    def ended(self) -> None:
        """No more octets will come. Called at most once, before `closed`, and not at all when the channel is lost."""
        ...

    def closed(self, why: Ending) -> None:
        """Nothing more can be sent. Called at most once, and never after `Channel.close`.

        What was received and not passed on yet may still be; then `Channel.close` is called (now or later).
        """
        ...

    def room(self) -> None:
        """`sendable` returned 0 and would return more now."""
        ...


class Channel(Protocol):
    """One stream to the peer."""

    @property
    def destination(self) -> Destination:
        """Where the side that opened it wants to go."""
        ...

    @property
    def scratch(self) -> memoryview:
        """Room to read into, for octets that are handed to `send` at once; shared by all channels of a connection."""
        ...

    def attach(self, receiver: Receiver) -> None:
        """Begin: the peer may send. Once; the receiver hears nothing before the next turn of the loop."""
        ...

    def sendable(self) -> int:
        """Octets that `send` takes now. After 0, `room` is called once there is some (or `closed`)."""
        ...

    def send(self, octets: memoryview) -> None:
        """Send all of them; at most `sendable()`. The view may be used again after the call."""
        ...

    def consumed(self, octets: int) -> None:
        """So many of the octets received went on; the peer may send as many more."""
        ...

    def shutdown(self) -> None:
        """No more will be sent. Harmless twice and after `closed`."""
        ...

    def close(self) -> None:
        """Done with it, both ways. Harmless twice. The receiver hears nothing any more."""
        ...
