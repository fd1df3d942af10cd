"""Two ends over a bad link in virtual time: the model guest on one side, the whole stack and a scripted host on the other.

Everything is drawn from one seed, so a run can be repeated (testing.md P7). Loss, duplication, reordering, delay, one-bit
corruption and a limited rate apply to both directions; each emitted frame also goes through the oracle. A frame with a
virtio-net header is made whole (segmented, checksums filled in) before it is impaired, as a relay behind a kernel would see
it, except that a super-frame towards the stack goes as one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from netstack.api import Endpoint
from netstack.observe.events import Event, EventBus
from netstack.settings import Network
from netstack.stack import Stack
from tests.support import packets
from tests.support.clock import VirtualClock
from tests.support.drill import EPSILON, GATEWAY_MAC, GUEST, GUEST_MAC, SERVER, write_pcap
from tests.support.fake_host import Address, FakeHostIO, Peer
from tests.support.link import make_link
from tests.support.model_guest import ModelGuest, ModelSocket, is_super_frame
from tests.support.oracle import Oracle, Violation


@dataclass(frozen=True)
class Faults:
    """Probabilities per frame; `delay_s` one way, `jitter_s` added at random; `rate` octets per second, 0 for no limit."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0005
    jitter_s: float = 0.0
    rate: float = 0.0
    queue: int = 1000
    """Frames that wait for the rate; more are dropped at the tail."""


CLEAN = Faults()


class Simulation:
    """See the module. `opened_by` is "guest" or "host" (a published port)."""

    def __init__(
        self,
        *,
        seed: int = 0,
        faults: Faults = CLEAN,
        mtu: int = 1500,
        link: str = "plain",
        peek_off: bool = True,
        guest_buffer: int = 256 << 10,
        check: bool = True,
        keep_frames: bool = False,
        on_frame: Callable[[float, bytes], None] | None = None,
        **settings: object,
    ) -> None:
        self.clock = VirtualClock()
        self.random = random.Random(seed)
        self.faults = faults
        self.io = FakeHostIO(self.clock, peek_off=peek_off)
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.network = Network(mtu=mtu, **settings)  # type: ignore[arg-type]
        self.stack = Stack(self.network, clock=self.clock, rng=random.Random(seed + 1), io=self.io, events=bus)
        self.link = make_link(link, mtu)
        offload = self.link.partial_checksums
        self.link.on_send = self._from_stack
        self.io.adopt(self.link)
        self.oracle = Oracle(mtu=mtu, tso=self.link.tso, headroom=self.link.headroom, vnet=offload) if check else None
        self.guest = ModelGuest(
            self._from_guest,
            mac=GUEST_MAC,
            address=GUEST,
            gateway_mac=GATEWAY_MAC,
            mtu=mtu,
            super_frames=offload,
        )
        self.guest.buffer = guest_buffer
        self.guest.random_isn = lambda: self.random.getrandbits(32)
        self._in_flight: list[tuple[float, int, bool, bytes, bytes]] = []
        self._ties = itertools.count()
        self._free_at = {True: 0.0, False: 0.0}
        self._queued = {True: 0, False: 0}
        self.violations: list[Violation] = []
        self.frames: list[tuple[float, bytes]] = []
        self.keep_frames = keep_frames
        self.on_frame = on_frame
        self.digest = sha256()
        self.emitted = 0
        self.lost = 0
        self.stack.attach(self.link)
        self._impaired = False
        self.guest.announce()
        self.run(until=lambda: False, limit_s=0.01)
        self._impaired = True

    # the link

    def _from_stack(self, raw: bytes) -> None:
        self.emitted += 1
        headroom = self.link.headroom
        if self.oracle is not None:
            try:
                self.oracle.stack_sent(raw)
            except Violation as violation:  # the stack would contain it; `run` raises it
                self.violations.append(violation)
        self.digest.update(raw)
        for frame in packets.finish(raw[headroom:], raw[:headroom]) if self.link.tso else [raw[headroom:]]:
            if self.on_frame is not None:
                self.on_frame(self.clock.now, frame)
            self._travel(True, frame, b"")

    def _from_guest(self, frame: bytes, header: bytes) -> None:
        if self.oracle is not None:
            self.oracle.guest_sent(frame)
        if header and not is_super_frame(header):
            # The checksum is filled in, so that corruption shows.
            frame, header = packets.finish(frame, header)[0], b""
        self._travel(False, frame, header)

    def _travel(self, to_guest: bool, frame: bytes, header: bytes) -> None:
        faults, chance = self.faults, self.random.random
        if self.keep_frames:
            self.frames.append((self.clock.now, frame))
        if not self._impaired:
            self._put(self.clock.now + faults.delay_s, to_guest, frame, header)
            return
        if chance() < faults.loss:
            self.lost += 1
            return
        when = self.clock.now
        if faults.rate:
            if self._queued[to_guest] >= faults.queue:
                self.lost += 1
                return
            self._queued[to_guest] += 1
            when = max(self._free_at[to_guest], when) + len(frame) / faults.rate
            self._free_at[to_guest] = when
        when += faults.delay_s + faults.jitter_s * chance()
        if chance() < faults.reorder:
            when += 0.001 + 0.01 * chance()
        if chance() < faults.corrupt and not header:
            bit = self.random.randrange(14 * 8, len(frame) * 8)
            spoilt = bytearray(frame)
            spoilt[bit >> 3] ^= 1 << (bit & 7)
            frame = bytes(spoilt)
        self._put(when, to_guest, frame, header)
        if chance() < faults.duplicate:
            self._put(when + 0.003 * chance(), to_guest, frame, header)

    def _put(self, when: float, to_guest: bool, frame: bytes, header: bytes) -> None:
        heapq.heappush(self._in_flight, (when, next(self._ties), to_guest, frame, header))

    # time

    def run(self, until: Callable[[], bool], limit_s: float = 3600.0) -> bool:
        """Go on until the condition holds (True), or nothing more will happen or the time is over (False)."""
        end = self.clock.now + limit_s
        while True:
            self._settle()
            if self.violations:
                raise self.violations[0]
            if until():
                return True
            times = [
                when
                for when in (
                    self._in_flight[0][0] if self._in_flight else None,
                    self.stack.deadline(),
                    self.guest.deadline(),
                    self.clock.deadline(),
                )
                if when is not None
            ]
            following = min(times, default=end)
            if following >= end:
                self.clock.now = end
                return until()
            self.clock.now = max(following + (EPSILON if following > self.clock.now else 0), self.clock.now + 1e-9)
            self._deliver()
            self.guest.timeout(self.clock.now)

    def _deliver(self) -> None:
        now = self.clock.now
        while self._in_flight and self._in_flight[0][0] <= now:
            _when, _tie, to_guest, frame, header = heapq.heappop(self._in_flight)
            if self.faults.rate:
                self._queued[to_guest] = max(self._queued[to_guest] - 1, 0)
            if to_guest:
                self.guest.input(frame, now)
            else:
                self.link.feed(frame, header or None)

    def _settle(self) -> None:
        for _ in range(10_000):
            self.clock.fire()
            more = self.stack.turn()
            deadline = self.stack.deadline()
            if not more and self.io.idle() and not (deadline is not None and deadline <= self.clock.now):
                return
        raise AssertionError("the stack is never done (it spins)")

    # a connection

    def connect(
        self, opened_by: str = "guest", *, remote: Address = SERVER, buffer: int | None = None, limit_s: float = 600.0
    ) -> tuple[ModelSocket, Peer]:
        """Both ends of a new flow, handshake complete for the guest (and for the host, as its kernel sees it)."""
        if opened_by == "guest":
            before = len(self.io.connects)
            sock = self.guest.connect(packets.ip(remote[0]), remote[1], self.clock.now, buffer=buffer)
            assert self.run(lambda: sock.state == "ESTABLISHED", limit_s), f"no connection: {sock.state}"
            return sock, self.io.connects[before].peer
        accepted: list[ModelSocket] = []
        if buffer is not None:
            self.guest.buffer = buffer
        self.guest.listening[8000] = accepted.append
        host_sock, far = self.io.connected()
        self.stack.dial(Endpoint(GUEST, 8000), host_sock)
        assert self.run(lambda: bool(accepted) and accepted[-1].state == "ESTABLISHED", limit_s), "no connection"
        return accepted[-1], far

    def assert_quiet(self) -> None:
        """All ended: nothing is left but the link (P6), and no bug was contained (P1)."""
        # TIME-WAIT and FIN-WAIT-2 pass; TIME-WAIT of a peer that lost our last ACK too.
        self.run(until=lambda: not self.stack.flows() and not self.io.sockets, limit_s=1200.0)
        flows = list(self.stack.flows())
        assert not flows, f"{len(flows)} flows are left, the first: {flows[0]}"
        assert not self.io.sockets, f"{len(self.io.sockets)} host sockets are left"
        self.assert_sane()

    def assert_sane(self) -> None:
        contained = [event for event in self.events if event.name == "Contained"]
        assert not contained and not self.stack.counters.contained, f"a bug was contained: {contained}"
        assert not self.io.misuse, f"misuse of host sockets: {self.io.misuse}"

    def save(self, path: object) -> None:
        from pathlib import Path

        write_pcap(Path(str(path)), self.frames)
