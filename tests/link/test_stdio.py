"""gvproxy's framing, and what gvforwarder takes (spec gvproxy 1.4). What all links share is in `test_conformance.py`."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from netstack.api import Link
from netstack.errors import ConfigError
from netstack.link.attach import Attachments
from netstack.link.stdio import GVFORWARDER_MTU, StdioLink, adopt
from netstack.observe.metrics import Counters, Drop

from .conftest import frame


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_the_wire(pair: tuple[socket.socket, socket.socket]) -> None:
    link = StdioLink(pair[0], "connect#1", 1500)
    octets = frame(1, 42)
    assert link.send([(link.prefix(42), octets)]) == 1
    assert pair[1].recv(100) == b"\x2a\0" + octets
    pair[1].sendall(b"\x2a\0" + octets)
    assert [bytes(view) for view in link.receive()] == [b"\x2a\0" + octets]


@pytest.mark.parametrize(
    ("network", "peer", "longest_sent", "longest_taken"),
    [
        (1500, None, 1514, GVFORWARDER_MTU + 18),  # the network's own is less than gvforwarder's 4000
        (9000, None, GVFORWARDER_MTU + 14, 9018),
        (9000, 9000, 9014, 9018),
        (1500, 1000, 1014, 1518),
    ],
)
def test_no_frame_is_longer_than_the_peer_takes(
    pair: tuple[socket.socket, socket.socket], network: int, peer: int | None, longest_sent: int, longest_taken: int
) -> None:
    counters = Counters()
    link = StdioLink(pair[0], "connect#1", network, counters=counters, peer_mtu=peer)
    for octets in (longest_sent, longest_sent + 1):
        assert link.send([(link.prefix(octets), bytes(octets))]) == 1
    assert len(pair[1].recv(1 << 17)) == 2 + longest_sent
    assert counters.drops[Drop.FRAME_LONG] == 1
    for octets in (longest_taken, longest_taken + 1):
        pair[1].sendall(octets.to_bytes(2, "little") + frame(1, octets))
    assert [len(view) - 2 for view in link.receive()] == [longest_taken]
    assert counters.drops[Drop.FRAME_LONG] == 2


async def test_connections_are_adopted_by_number_and_refused_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attached: list[Link] = []
    pairs = [socket.socketpair() for _ in range(3)]
    async with Attachments(
        mtu=1500, attach=lambda link, _: attached.append(link), detach=lambda port, why: None
    ) as all_:
        monkeypatch.setattr("netstack.link.attach.MAX_LINKS", 2)
        for ours, _ in pairs[:2]:
            adopt(all_, ours, mtu=1500)
        assert [link.name for link in attached] == ["connect#1", "connect#2"]
        with pytest.raises(ConfigError, match="connect#3"):
            adopt(all_, pairs[2][0], mtu=1500)
        assert pairs[2][0].fileno() == -1
        all_.detached(attached[0], "gone")
        adopt(all_, pairs[2][1], mtu=1500)
        assert [link.name for link in all_.links] == ["connect#2", "connect#1"]
    for pair_ in pairs:
        for sock in pair_:
            sock.close()
