"""Datagrams inside a channel: the UDP encapsulation (spec vpnkit 7.3.4). All integers are little-endian.

record length u16 (itself included) | address length u16 (0, 4, 16) | address | port u16 | zone length u16 | zone
    | payload length u16 | payload
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from netstack.errors import Malformed
from portfwd.mux.channel import Channel, Ending
from portfwd.mux.frames import plain_address

MAX_PAYLOAD: Final = 65507
"""The most a datagram of IPv4 can carry."""
BEHIND: Final = 1 << 17
"""Octets that wait until the peer takes them; datagrams beyond are dropped, as a full socket buffer would."""

_U16: Final = struct.Struct("<H")
_LEAST: Final = 10


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
    zone = record.zone.encode()
    length = _LEAST + len(record.address) + len(zone) + len(record.payload)
    if length > 65535 or len(record.payload) > MAX_PAYLOAD or len(record.address) not in (0, 4, 16):
        raise Malformed(f"mux: a datagram of {len(record.payload)} octets is too long for a record")
    return b"".join(
        (
            struct.pack("<HH", length, len(record.address)),
            record.address,
            struct.pack("<HH", record.port, len(zone)),
            zone,
            _U16.pack(len(record.payload)),
            record.payload,
        )
    )


def parse(record: bytes | memoryview) -> Record:
    """One whole record; an IPv4 address written in 16 octets becomes one of 4. Raises `Malformed`."""
    size = len(record)
    if size < _LEAST or _U16.unpack_from(record)[0] != size:
        raise Malformed("mux: a record with a wrong length")
    (address_size,) = _U16.unpack_from(record, 2)
    if address_size not in (0, 4, 16) or size < _LEAST + address_size:
        raise Malformed(f"mux: a record with an address of {address_size} octets")
    at = 4 + address_size
    port, zone_size = struct.unpack_from("<HH", record, at)
    if size < _LEAST + address_size + zone_size:
        raise Malformed("mux: a record with a zone that is too long")
    begin = at + 4 + zone_size + 2
    (payload_size,) = _U16.unpack_from(record, begin - 2)
    if begin + payload_size != size:
        raise Malformed("mux: a record whose lengths disagree")
    zone = bytes(record[at + 4 : begin - 2]).decode(errors="replace")
    return Record(bytes(record[begin:]), plain_address(bytes(record[4:at])), port, zone)


class RecordDecoder:
    """Fed octets in any pieces, returns records. Keeps less than one, 65,535 octets."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, octets: memoryview) -> Iterator[Record]:
        """Whole records, in order; raises `Malformed` after which the stream cannot be read further."""
        kept = self._kept
        kept += octets
        at = 0
        try:
            while len(kept) - at >= 2:
                (length,) = _U16.unpack_from(kept, at)
                if length < _LEAST:
                    raise Malformed("mux: a record with a wrong length")
                if len(kept) - at < length:
                    break
                record = bytes(kept[at : at + length])
                at += length
                yield parse(record)
        finally:
            del kept[:at]


class RecordChannel:
    """Records over a channel; a `Receiver` that attaches itself."""

    def __init__(
        self,
        channel: Channel,
        on_record: Callable[[Record], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        """`on_end(why)` is called once when the peer ended or broke it; then the channel is closed already."""
        self._channel = channel
        self._on_record = on_record
        self._on_end = on_end
        self._decoder = RecordDecoder()
        self._waiting: deque[bytes | memoryview] = deque()
        self._behind = 0
        self._over = False
        self.dropped = 0
        channel.attach(self)

    def send(self, record: Record) -> bool:
        """Send, or drop and count (`dropped`) when the peer is behind by more than 128 KiB, or the datagram is longer than a
        record can be (IPv6 has some); False: dropped."""
        try:
            octets = emit(record)
        except Malformed:
            self.dropped += 1
            return False
        if self._over or self._behind + len(octets) > BEHIND:
            self.dropped += 1
            return False
        self._waiting.append(octets)
        self._behind += len(octets)
        if len(self._waiting) == 1:
            self.room()
        return True

    def close(self) -> None:
        """Close the channel; `on_end` is not called. Harmless twice."""
        if not self._over:
            self._over = True
            self._waiting.clear()
            self._channel.close()

    # Called by the channel.

    def data(self, octets: memoryview) -> None:
        size = len(octets)
        try:
            for record in self._decoder.feed(octets):
                if self._over:
                    return
                self._on_record(record)
        except Malformed:
            self.closed(Ending.LOST)
            return
        if not self._over:
            self._channel.consumed(size)

    def ended(self) -> None:
        """Half a datagram service is none. CloseWrite on such a channel is a no-op in VPNKit, so it is not sent back either."""
        self.closed(Ending.CLOSED)

    def closed(self, why: Ending) -> None:
        if not self._over:
            self.close()
            self._on_end(why)

    def room(self) -> None:
        while self._waiting and not self._over and (limit := self._channel.sendable()):
            first = memoryview(self._waiting[0])
            self._channel.send(first[:limit])
            self._behind -= min(limit, len(first))
            if len(first) > limit:
                self._waiting[0] = first[limit:]
            else:
                self._waiting.popleft()
