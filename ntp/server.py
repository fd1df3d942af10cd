"""Answers NTP clients with the host's own time (conformance P01, P02).

The wall clock is read for each packet and nothing is kept, so the first answer after the host slept or its clock was set is
right at once (threats F8, F9). Of the modes, a client's is answered as a server, and a symmetric active one as passive, which
is how Windows asks; control, private and broadcast packets are dropped: no answer is ever longer than its question.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from netstack.api import Endpoint, Reply
from netstack.errors import Malformed
from ntp import packet
from ntp.packet import Packet

STRATUM: Final = 2
"""Of the host as it appears: itself a client of good servers, which is nearly always so. Clients take anything below 16."""
REFID: Final = b"HOST"
PRECISION: Final = -20  # log2 s: reading the clock takes under a microsecond
ROOT_DELAY: Final = 2**16 // 256  # 4 ms and
ROOT_DISPERSION: Final = 2**16 // 100  # 10 ms, as of a host that is synchronized over the Internet
REFERENCE_S: Final = 64
"""The reference timestamp (when the clock was last set) is given as the last full 64 s: past, and never stale."""

_ANSWERS: Final = {packet.CLIENT: packet.SERVER, packet.SYMMETRIC_ACTIVE: packet.SYMMETRIC_PASSIVE}


class Server:
    """`wall()` is the time in Unix seconds. `datagram` is a `netstack.api.DatagramHandler`."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> dict[str, int]:
        """`answered`, and what was dropped: `malformed` or `ignored` (a mode or version that is not served)."""
        return {name: self._counters[name] for name in ("answered", "malformed", "ignored")}

    def datagram(self, payload: bytes, source: Endpoint, reply: Reply) -> None:
        """Answer one request at once with 48 octets of the version it came in (RFC 5905 9.2), or drop it."""
        receive = packet.timestamp(self._wall())
        try:
            request = packet.parse(payload)
        except Malformed:
            self._counters["malformed"] += 1
            return
        mode = _ANSWERS.get(request.mode)
        if request.version == 1 and request.mode == 0:  # RFC 1059 knew no modes
            mode = packet.SERVER
        if mode is None or not 1 <= request.version <= 4:
            self._counters["ignored"] += 1
            return
        self._counters["answered"] += 1
        now = self._wall()
        reply(
            packet.emit(
                Packet(
                    version=request.version,
                    mode=mode,
                    stratum=STRATUM,
                    poll=min(max(request.poll, 0), 17),  # RFC 5905 7.2 MAXPOLL
                    precision=PRECISION,
                    root_delay=ROOT_DELAY,
                    root_dispersion=ROOT_DISPERSION,
                    refid=REFID,
                    reference=packet.timestamp(now - now % REFERENCE_S),
                    origin=request.transmit,
                    receive=receive,
                    transmit=packet.timestamp(now),
                )
            )
        )

    def close(self) -> None:
        """Nothing is held."""
