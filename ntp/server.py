"""Answers NTP clients with the host's own time (RFC 5905, RFC 4330; conformance P01, P02).

The wall clock is read for each packet, and no time is kept but in one place: what else an answer says of the host's clock is
asked of the kernel at most once in a second of that same clock, so it is asked anew when the clock was set or the host slept,
and the first answer after is right at once (threats F8, F9).

* The guest follows the host, whatever the host follows. A host that is not synchronised, or does not say, is stratum 10 as a
  local clock is to chrony and ntpd, without the alarm in the leap indicator: all clients refuse that, and the guest's clock
  would go its own way. A guest that has better servers too prefers them for the stratum.
* The kernel's bound of the error is told as root dispersion, within what clients take: timesyncd lets it grow to seconds, and
  RFC 5905 clients refuse a second.
* The receive timestamp is taken first of all. A frame that waited before the daemon read it waited unseen; clients tell such an
  answer by its delay.
* Of the modes, a client's is answered as a server, and a symmetric active one as passive, which is how Windows asks; control,
  private and broadcast packets, and answers, are dropped. No answer is longer than its question.
* Keys are not known here: extension fields and a MAC are not looked at, and the answer is without (a client that insists drops it).
* Who asks too often is told so now and then (kiss-o'-death RATE), else not answered (`ntp.limit`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from netstack.api import Clock, Endpoint, Reply
from netstack.errors import Malformed
from ntp import hostclock, packet
from ntp.hostclock import ClockState
from ntp.limit import RateLimit, Verdict
from ntp.packet import Packet

STRATUM: Final = 3
"""Of a synchronised host: a client of public servers, which mostly are stratum 2. The kernel does not know."""
REFID: Final = bytes((127, 0, 0, 1))
"""Above stratum 1 this is an address: the host. No client has it as its own address, which would look like a loop."""
LOCAL_STRATUM: Final = 10
LOCAL_REFID: Final = bytes((127, 127, 1, 1))
"""Of a clock that follows nothing, as chrony has it."""
PRECISION: Final = -20  # log2 s: reading the clock takes under a microsecond
MIN_DISPERSION_S: Final = 0.001
"""timesyncd says 0 right after it set the clock."""
MAX_DISPERSION_S: Final = 0.25
"""A quarter of what RFC 5905 clients take (MAXDIST, a second), so that after six samples they are content."""
REFERENCE_S: Final = 64
"""The reference timestamp (when the clock was last set) is given as the last full 64 s: past, and never stale."""
STATE_S: Final = 1.0
"""How long what the kernel said of its clock is believed."""
MIN_POLL: Final = 6  # log2 s: what a kiss-o'-death asks for at least

_ANSWERS: Final = {packet.CLIENT: packet.SERVER, packet.SYMMETRIC_ACTIVE: packet.SYMMETRIC_PASSIVE}


class Server:
    """`wall()` is the time in Unix seconds, `clock()` only says how fast a guest asks, `host_state()` is asked when needed.

    `datagram` is a `netstack.api.DatagramHandler`.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        *,
        clock: Clock = time.monotonic,
        host_state: Callable[[], ClockState | None] = hostclock.read,
    ) -> None:
        self._wall = wall
        self._clock = clock
        self._host_state = host_state
        self._state: ClockState | None = None
        self._state_at: float | None = None
        """On the wall clock."""
        self._limit = RateLimit()
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> dict[str, int]:
        """`answered`; what was dropped: `malformed`, `ignored` (a mode or version that is not served), `limited`; of those,
        `kisses` were told; `forgotten` guests had asked longest ago when the table was full."""
        names = ("answered", "malformed", "ignored", "limited", "kisses")
        return {name: self._counters[name] for name in names} | {"forgotten": self._limit.forgotten}

    def datagram(self, payload: bytes, source: Endpoint, reply: Reply) -> None:
        """Answer one request at once with 48 octets of the version it came in (RFC 5905 9.2), or drop it."""
        received = self._wall()
        try:
            request = packet.parse(payload)
        except Malformed:
            self._counters["malformed"] += 1
            return
        if len(payload) % 4:  # RFC 5905 7.5: extension fields and MACs are whole words
            self._counters["malformed"] += 1
            return
        mode = _ANSWERS.get(request.mode)
        if request.version == 1 and request.mode == 0:  # RFC 1059 knew no modes
            mode = packet.SERVER
        if mode is None or not 1 <= request.version <= 4:
            self._counters["ignored"] += 1
            return
        verdict = self._limit.asked(source.address, self._clock())
        if verdict is not Verdict.ANSWER:
            self._counters["limited"] += 1
            if verdict is Verdict.KISS:
                self._counters["kisses"] += 1
                reply(packet.emit(_kiss(request, mode)))
            return
        self._counters["answered"] += 1
        state = self._known(received)
        synchronised = state is not None and state.synchronised
        max_error_s = state.max_error_s if state is not None and synchronised else MAX_DISPERSION_S
        receive = packet.timestamp(received)
        now = self._wall()
        reply(
            packet.emit(
                Packet(
                    leap=state.leap if state is not None else 0,
                    version=request.version,
                    mode=mode,
                    stratum=STRATUM if synchronised else LOCAL_STRATUM,
                    poll=min(max(request.poll, 0), 17),  # RFC 5905 7.2 MAXPOLL
                    precision=PRECISION,
                    root_delay=0,  # what the kernel bounds is delay/2 and dispersion together
                    root_dispersion=int(min(max(max_error_s, MIN_DISPERSION_S), MAX_DISPERSION_S) * 2**16),
                    refid=REFID if synchronised else LOCAL_REFID,
                    reference=packet.timestamp(now - now % REFERENCE_S),
                    origin=request.transmit,
                    receive=receive,
                    transmit=packet.timestamp(now),
                )
            )
        )

    def _known(self, now: float) -> ClockState | None:
        if self._state_at is None or not 0 <= now - self._state_at < STATE_S:
            self._state_at = now
            self._state = self._host_state()
        return self._state

    def close(self) -> None:
        """Nothing is held."""


def _kiss(request: Packet, mode: int) -> Packet:
    """ "Ask less often" (RFC 5905 7.4). To who overlooks that, it says by the question's own time that the clock is right."""
    return Packet(
        leap=packet.ALARM,
        version=request.version,
        mode=mode,
        stratum=0,
        poll=min(max(request.poll, MIN_POLL), 17),
        precision=PRECISION,
        refid=packet.KISS_RATE,
        reference=request.transmit,
        origin=request.transmit,
        receive=request.transmit,
        transmit=request.transmit,
    )
