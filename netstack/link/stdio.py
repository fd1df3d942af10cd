"""gvproxy's framing of `/connect` and of standard input and output: u16 little-endian length, then the frame (spec gvproxy 1.4).

The peer is gvforwarder, whose interface has an MTU of its own (`-mtu`, 4000 when not given) that it tells nobody. It ends on a
frame longer than that + 14, so no longer one is sent than it surely takes; and until its guest has heard our MTU by DHCP it
may send frames as long as its interface makes them, so these are taken.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import Any, Final

from netstack.errors import LinkDown
from netstack.link.attach import Attachments
from netstack.link.common import ETHERNET_HEADER, VLAN_TAG
from netstack.link.stream import StreamLink
from netstack.observe.metrics import Counters

GVFORWARDER_MTU: Final = 4000


class StdioLink(StreamLink):
    """`mtu` is the network's. `peer_mtu` is that of the peer's interface, where it is known."""

    headroom = 2
    _length = Struct("<H")

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        mtu: int,
        *,
        counters: Counters | None = None,
        peer_mtu: int | None = None,
    ) -> None:
        theirs = GVFORWARDER_MTU if peer_mtu is None else peer_mtu
        largest = max(mtu, theirs) + ETHERNET_HEADER + VLAN_TAG
        super().__init__(sock, name, min(mtu, theirs), counters=counters, max_frame=largest)


def adopt(
    attachments: Attachments,
    sock: socket.socket,
    *,
    mtu: int,
    counters: Counters | None = None,
    peer_mtu: int | None = None,
) -> None:
    """A connection that `/connect` took over becomes a link, named `connect#N`.

    Owns `sock`, whatever comes of it. Raises `LinkDown`, and `ConfigError` when the network does not take it.
    """
    taken = {link.name for link in attachments.links}
    number = 1
    while (name := f"connect#{number}") in taken:
        number += 1
    try:
        link: Any = StdioLink(sock, name, mtu, counters=counters, peer_mtu=peer_mtu)
    except OSError as error:
        sock.close()
        raise LinkDown(f"{name}: {error.strerror}") from None
    attachments.adopt(link)
