"""Datagrams inside a channel: the UDP encapsulation (spec vpnkit 7.3.4). All integers are little-endian.

record length u16 (itself included) | address length u16 (0, 4, 16) | address | port u16 | zone length u16 | zone
    | payload length u16 | payload
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from portfwd.mux.channel import Channel, Ending

MAX_PAYLOAD = 65507


@dataclass(frozen=True, slots=True)
class Record:
    """A datagram and whose it is: the external client's address in generations 1 and 2, nothing in 3."""

    payload: bytes
    address: bytes = b""
    """4 or 16 octets in network order, or none."""
    port: int = 0
    zone: str = ""


def emit(record: Record) -> bytes:
    """The record's octets; raises `Malformed` where it does not fit."""
    raise NotImplementedError


class RecordDecoder:
    """Fed octets in any pieces, returns records. Keeps less than one."""

    def feed(self, octets: memoryview) -> Iterator[Record]:
        """Whole records, in order; raises `Malformed` after which the stream cannot be read further."""
        raise NotImplementedError


class RecordChannel:
    """Records over a channel; a `Receiver` that attaches itself."""

    def __init__(
        self,
        channel: Channel,
        on_record: Callable[[Record], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        """`on_end(why)` is called once when the peer ended or broke it; then the channel is closed already."""
        raise NotImplementedError

    def send(self, record: Record) -> bool:
        """Send, or drop and count (`dropped`) when the peer is behind by more than 256 KiB; False: dropped."""
        raise NotImplementedError

    dropped: int

    def close(self) -> None:
        """Close the channel; `on_end` is not called. Harmless twice."""
        raise NotImplementedError
