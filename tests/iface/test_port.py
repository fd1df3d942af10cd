"""One link's place in the network: what waits while its peer does not read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netstack.api import Frame
from netstack.iface.switch import Port
from netstack.observe.metrics import Counters


class Narrow:
    """A link that takes `room` frames."""

    headroom = tso = 0
    mtu = 1500
    max_frame = 1518
    partial_checksums = False
    name = "narrow"

    def __init__(self) -> None:
        self.room = 0
        self.sent: list[bytes] = []

    def send(self, frames: Sequence[Frame]) -> int:
        taken = frames[: self.room]
        self.room -= len(taken)
        self.sent += [b"".join(frame) for frame in taken]
        return len(taken)

    def flush(self) -> bool:
        return True


class Flow:
    resumed = 0

    def resume(self) -> None:
        self.resumed += 1


def test_a_peer_that_reads_a_little_is_watched_and_one_that_reads_nothing_is_not() -> None:
    link: Any = Narrow()
    port = Port(link, 0, Counters())
    blocked: list[Port] = []
    port.on_blocked = blocked.append
    flow = Flow()
    port.waiting.append(flow)
    frames = [bytes((number,)) * 60 for number in range(25)]
    port.send([(frame,) for frame in frames])
    assert blocked == [port]
    assert not port.drain(), "nothing was taken: it is asked again a little later"
    for watched in (2, 3):
        link.room = 10
        assert port.drain()
        port.resume()
        assert len(blocked) == watched, "there is more: room is watched for again"
        assert (port.congested, flow.resumed) == (True, 0)
    link.room = 10
    assert port.drain()
    port.resume()
    assert (port.congested, flow.resumed, len(blocked)) == (False, 1, 3)
    assert link.sent == frames
