"""IPv4 datagrams on their way to the guest: identification (RFC 6864) and fragmentation (RFC 791 3.2)."""

from __future__ import annotations

import random
from typing import Final

from netstack.errors import NetstackError
from netstack.wire import ipv4
from netstack.wire.checksum import Buffer

MIN_MTU: Final = 68  # RFC 791 3.2: every link carries 68 octets without further fragmentation


class FragmentationNeeded(NetstackError):
    """A datagram with DF does not fit; `mtu` is what would (octets, with IP header)."""

    def __init__(self, mtu: int) -> None:
        super().__init__(f"ipv4: DF set and longer than the MTU of {mtu}")
        self.mtu = mtu


class Identifications:
    """Values for the identification field of datagrams that are not atomic.

    RFC 6864 4.3: no value may come again while fragments of its predecessor are about; a neighbour that guesses the next
    could put pieces of his own into a datagram. So: all 65,536 values, none twice before all were used, in an order that
    hangs on `rng`: a counter sent through four Feistel rounds, each with its own random table.
    """

    def __init__(self, rng: random.Random) -> None:
        self._count = rng.getrandbits(16)
        self._tables = [rng.randbytes(256) for _ in range(4)]

    def __call__(self) -> int:
        self._count = (self._count + 1) & 0xFFFF
        left, right = self._count >> 8, self._count & 0xFF
        for table in self._tables:
            left, right = right, left ^ table[right]
        return left << 8 | right


def fragment(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload: Buffer,
    mtu: int,
    *,
    identification: int = 0,
    ttl: int = 64,
    tos: int = 0,
    dont_fragment: bool = False,
) -> list[tuple[bytes, memoryview]]:
    """Return `(header, part of the payload)` for each packet that carries `payload` over a link of `mtu` octets.

    One pair when it fits. The parts are views of `payload`; all but the last are a multiple of 8 octets long. Raises
    `FragmentationNeeded` when it does not fit and `dont_fragment` is set, `ValueError` for a payload that no IPv4 datagram
    can hold (more than 65,515 octets) or an MTU below 68.
    """
    octets = memoryview(payload)
    length = len(octets)
    if length > ipv4.MAX_TOTAL_LENGTH - ipv4.HEADER_LENGTH:
        raise ValueError(f"{length} octets do not fit into an IPv4 datagram")
    if mtu < MIN_MTU:
        raise ValueError(f"an MTU of {mtu} octets is below the {MIN_MTU} of IPv4")
    if ipv4.HEADER_LENGTH + length <= mtu:
        header = ipv4.header(
            source,
            destination,
            protocol,
            length,
            ttl=ttl,
            tos=tos,
            identification=identification,
            dont_fragment=dont_fragment,
        )
        return [(header, octets)]
    if dont_fragment:
        raise FragmentationNeeded(mtu)
    room = (mtu - ipv4.HEADER_LENGTH) & ~7
    packets = []
    for offset in range(0, length, room):
        part = octets[offset : offset + room]
        header = ipv4.header(
            source,
            destination,
            protocol,
            len(part),
            ttl=ttl,
            tos=tos,
            identification=identification,
            dont_fragment=False,
            more_fragments=offset + room < length,
            offset=offset,
        )
        packets.append((header, part))
    return packets
