"""A whole stack with guests on shared rings: the model guest of TCP behind a `Nic`, a played host or the real one outside.

    world = World()
    guest = world.plug(FULL)
    sock, far = world.connect(guest)                 # a flow to the played host, in virtual time
    sock.send(data, world.now); world.run(lambda: far.received == data)

Time is virtual unless `real`: then host sockets are the kernel's and `run` waits for them. Back-end, guests and host share one
thread. A guest sees a frame only after its eventfd was written to, so an interrupt that is not sent shows as a transfer that stops.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from netstack.host.io import native_io
from netstack.iface.switch import Port
from netstack.link.vhost_user.link import VhostUserLink
from netstack.link.vhost_user.server import VhostUserPeer
from netstack.observe.events import Event, EventBus
from netstack.settings import Network
from netstack.stack import Stack
from tests.support import packets
from tests.support.clock import VirtualClock
from tests.support.drill import EPSILON, GATEWAY_MAC, SERVER
from tests.support.fake_host import Address, FakeHostIO, Peer
from tests.support.guest_memory import GuestMemory
from tests.support.link import MemoryLink
from tests.support.model_guest import ModelGuest, ModelSocket
from tests.support.oracle import Oracle
from tests.support.vhost_front import FrontEnd
from tests.support.virtio_net import FULL, Feature, Header
from tests.support.virtio_nic import Nic
from tests.support.virtqueue import QueueFull

EDGES = select.EPOLLIN | select.EPOLLET


class MixedIO(FakeHostIO):
    """The played host, with descriptors of the kernel's (eventfds) watched besides."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self._epoll = select.epoll()
        self._real: dict[int, Callable[[int], None]] = {}
        self._seen: list[tuple[Callable[[int], None], int]] = []
        self.wakes = 0
        """How often a real descriptor was found ready."""

    def watch(self, fd: int, ready: Callable[[int], None], *, edge: bool = True, write: bool = False) -> None:
        if fd in self.objects:
            super().watch(fd, ready, edge=edge, write=write)
            return
        self._epoll.register(fd, EDGES if edge else select.EPOLLIN)
        self._real[fd] = ready

    def unwatch(self, fd: int) -> None:
        if self._real.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        else:
            super().unwatch(fd)

    def _look(self) -> None:
        found = [(self._real[fd], mask) for fd, mask in self._epoll.poll(0)]
        self.wakes += len(found)
        self._seen += found

    def poll(self) -> list[tuple[Callable[[int], None], int]]:
        self._look()
        seen, self._seen = self._seen, []
        return super().poll() + [(ready, mask) for ready, mask in seen if ready in self._real.values()]

    def idle(self) -> bool:
        self._look()
        return not self._seen and super().idle()

    def close(self) -> None:
        super().close()
        self._epoll.close()


class Guest:
    """A machine in a `World`: a model guest of TCP, its network card, and the back-end of that."""

    def __init__(self, world: World, number: int, features: int, options: dict[str, Any]) -> None:
        self.world = world
        self.name = f"vhost-user:{number}"
        mtu = world.mtu
        memory = options.pop("memory", None) or GuestMemory(spread=options.pop("spread", True))
        options.setdefault("buffers", 256)
        self.links: list[VhostUserLink] = []
        """Those that the stack has, at most one."""
        self.reasons: list[str] = []
        self.port: Port | None = None
        self.peer: VhostUserPeer
        self.nic = Nic(self.connection(), memory, features=features, mtu=mtu, **options)
        self.model = ModelGuest(
            self._transmit,
            mac=bytes((2, 0, 0, 0, 0xAA, number)),
            address=packets.ip(f"192.168.65.{number}"),
            gateway_mac=GATEWAY_MAC,
            mtu=mtu,
            super_frames=self.nic.has(Feature.CSUM) and self.nic.has(Feature.HOST_TSO4),
        )
        self.model.random_isn = lambda: world.random.getrandbits(32)
        self.waiting: deque[tuple[bytes, Header]] = deque()
        """For room in the transmit ring."""
        self.pair = 0
        """By which the guest sends; a function of nothing here, so a test may change it."""
        self.heard: list[bytes] | None = None
        """Frames as they came, for whoever sets it to a list."""
        self.paused = False
        self.super_frames = 0
        self.received = 0
        self._oracle()

    def _oracle(self) -> None:
        tso = 65160 if self.nic.has(Feature.GUEST_TSO4) and self.nic.has(Feature.GUEST_CSUM) else 0
        self.oracle = Oracle(mtu=self.nic.mtu, tso=tso, headroom=12, vnet=True)

    def connection(self) -> FrontEnd:
        ours, theirs = socket.socketpair()
        self.peer = VhostUserPeer(
            theirs,
            self.name,
            self.world.mtu,
            appeared=self._appeared,
            gone=self._gone,
            closed=self.reasons.append,
            counters=self.world.stack.counters,
        )
        return FrontEnd(ours, self.peer.readable)

    def _appeared(self, link: VhostUserLink) -> None:
        self.links.append(link)
        self.port = self.world.stack.attach(link, self.name)

    def _gone(self, link: VhostUserLink, reason: str) -> None:
        assert self.port is not None and link in self.links
        self.reasons.append(reason)
        self.world.stack.detach(self.port, reason)

    def detached(self, link: Any, reason: str) -> None:
        """The stack let go of a link."""
        if link in self.links:
            self.links.remove(link)
            if reason not in self.reasons:
                self.reasons.append(reason)

    # frames

    def _transmit(self, frame: bytes, header: bytes) -> None:
        self.oracle.guest_sent(frame)
        self.waiting.append((frame, Header.unpack(header) if header else Header()))
        self._send()

    def _send(self) -> None:
        if self.paused or not self.nic.running:
            return
        rng = self.world.random
        while self.waiting:
            frame, header = self.waiting[0]
            cuts = rng.choice([None, [], [self.nic.header_size + 54]])
            try:
                self.nic.send(frame, header, pieces=cuts, pair=self.pair)
            except QueueFull:
                self.nic.pairs[self.pair].tx.want_calls(True)
                return
            self.waiting.popleft()

    def pump(self) -> bool:
        """Take what arrived, whether something did."""
        if self.paused or not self.nic.running:
            return False
        moved = False
        for number in range(len(self.nic.pairs)):
            for received in self.nic.receive(number, called=True):
                moved = True
                self.received += 1
                self.super_frames += bool(received.header.gso_type)
                vnet = received.header.pack()
                if received.frame[6:12] == GATEWAY_MAC:  # otherwise it is another guest's
                    self.oracle.stack_sent(vnet + received.frame)
                if self.heard is not None:
                    self.heard.append(received.frame)
                for frame in packets.finish(received.frame, vnet):
                    self.model.input(frame, self.world.now)
        if self.waiting and self.nic.pairs[self.pair].called(1):
            self._send()
        return moved

    # the machine

    def reboot(self, features: int) -> None:
        """Nothing of before is known to it."""
        self.waiting.clear()
        self.nic.reboot(features)
        self.model.sockets.clear()
        self.model.super_frames = self.nic.has(Feature.CSUM) and self.nic.has(Feature.HOST_TSO4)
        self._oracle()
        self.model.announce()

    def reconnect(self, like: Literal["qemu", "cloud-hypervisor"]) -> None:
        """The back-end is started anew under the running guest."""
        self.nic.front.close()
        self.peer.readable()
        self.nic.reconnect(self.connection(), like)

    def close(self) -> None:
        self.nic.close()
        self.peer.readable()
        self.peer.close()


class World:
    """See the module."""

    def __init__(self, *, mtu: int = 1500, real: bool = False, seed: int = 0, **settings: Any) -> None:
        self.random = random.Random(seed)
        self.mtu = mtu
        self.real = real
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(self.events.append)
        self._clock = VirtualClock()
        self.host: FakeHostIO | None = None if real else MixedIO(self._clock)
        self.stack = Stack(
            Network(mtu=mtu, **settings),
            clock=time.monotonic if real else self._clock,
            rng=random.Random(seed + 1),
            io=native_io() if real else self.host,
            events=bus,
        )
        self.stack.on_detached = self._detached
        self.guests: list[Guest] = []
        self.bystanders: list[tuple[MemoryLink, ModelGuest]] = []
        self.longest_turn_s = 0.0

    @property
    def now(self) -> float:
        return self.stack.clock()

    def _detached(self, link: object, reason: str) -> None:
        for guest in self.guests:
            guest.detached(link, reason)

    def plug(self, features: int = FULL, *, start: bool = True, **options: Any) -> Guest:
        """A guest on rings; `options` are the `Nic`'s."""
        guest = Guest(self, 3 + len(self.guests) + len(self.bystanders), features, options)
        self.guests.append(guest)
        if start:
            guest.nic.start()
            guest.model.announce()
            self.settle()
        return guest

    def plug_bystander(self) -> ModelGuest:
        """A guest on a link of another kind."""
        assert isinstance(self.host, FakeHostIO)
        number = 3 + len(self.guests) + len(self.bystanders)
        link = MemoryLink(f"memory:{number}", mtu=self.mtu)
        guest = ModelGuest(
            lambda frame, header: link.feed(frame),
            mac=bytes((2, 0, 0, 0, 0xBB, number)),
            address=packets.ip(f"192.168.65.{number}"),
            gateway_mac=GATEWAY_MAC,
            mtu=self.mtu,
        )
        guest.random_isn = lambda: self.random.getrandbits(32)
        self.host.adopt(link)
        self.stack.attach(link)
        self.bystanders.append((link, guest))
        guest.announce()
        self.settle()
        return guest

    # time

    def turn(self) -> bool:
        """The stack's turn, then everybody else's; whether something happened."""
        begin = time.perf_counter()
        more = self.stack.turn()
        self.longest_turn_s = max(self.longest_turn_s, time.perf_counter() - begin)
        for guest in self.guests:
            more |= guest.pump()
        for link, model in self.bystanders:
            while link.sent:
                more = True
                model.input(link.sent.popleft(), self.now)
        return more

    def settle(self) -> None:
        """Until nobody has anything to do now."""
        for _ in range(50_000):
            self._clock.fire()
            more = self.turn()
            deadline = self.stack.deadline()
            due = deadline is not None and deadline <= self.now
            if not more and not due and (self.host is None or self.host.idle()):
                return
        raise AssertionError("the stack is never done (it spins)")

    def run(self, until: Callable[[], bool], limit_s: float = 600.0) -> bool:
        """Go on until the condition holds (True), or the time is over (False)."""
        end = self.now + limit_s
        while True:
            self.settle()
            if until():
                return True
            times = [self.stack.deadline(), self._clock.deadline(), *(guest.model.deadline() for guest in self.guests)]
            times += [model.deadline() for _link, model in self.bystanders]
            following = min((when for when in times if when is not None), default=end)
            if self.now >= end or (following >= end and not self.real):
                return until()
            if self.real:
                select.select([self.stack.fileno()], [], [], min(max(following - self.now, 0), 0.05))
            else:
                self._clock.now = max(following + (EPSILON if following > self.now else 0), self.now + 1e-9)
            for model in [guest.model for guest in self.guests] + [model for _link, model in self.bystanders]:
                model.timeout(self.now)

    # flows with the played host

    def connect(self, guest: Guest | ModelGuest, remote: Address = SERVER) -> tuple[ModelSocket, Peer]:
        assert self.host is not None
        model = guest.model if isinstance(guest, Guest) else guest
        before = len(self.host.connects)
        sock = model.connect(packets.ip(remote[0]), remote[1], self.now)
        assert self.run(lambda: sock.state == "ESTABLISHED", 60.0), f"no connection: {sock.state}"
        return sock, self.host.connects[before].peer

    # the end

    def assert_sane(self) -> None:
        contained = [event for event in self.events if event.name == "Contained"]
        assert not contained and not self.stack.counters.contained, f"a bug was contained: {contained}"
        if self.host is not None:
            assert not self.host.misuse, f"misuse of host sockets: {self.host.misuse}"

    def close(self) -> None:
        for guest in self.guests:
            guest.close()
        self.stack.close()
        self.assert_sane()
        for guest in self.guests:
            guest.nic.memory.close()
        self.guests.clear()
