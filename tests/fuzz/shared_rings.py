"""Z6, Z7: a vhost-user back-end whose guest, or whose front-end, does as it likes."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tests.support.guest_memory import GuestMemory, OutOfMemory
from tests.support.hostile_front import MESSAGES, Rogue, memory_added_again_and_again
from tests.support.hostile_inbound import INBOUND
from tests.support.hostile_nic import Hostile
from tests.support.hostile_outbound import OUTBOUND
from tests.support.vhost_bench import Bench, count_descriptors
from tests.support.vhost_front import BadReply, Disconnected, NoReply, Refused, Request
from tests.support.virtio_net import FULL, PLAIN, RINGS, Feature
from tests.support.virtqueue import DeviceFault, DriverQueue, Piece, QueueFull

LAYOUTS = (
    ((0x10000, 1 << 20), (0x200000, 1 << 20)),
    ((0x100000, 2 << 20),),
    ((0x100000, 1 << 20), (0x200000, 1 << 20)),  # they meet
)


def _features(rng: random.Random) -> int:
    """Any subset that a driver may ask for."""
    some = sum(feature.mask for feature in Feature if FULL & feature.mask and rng.random() < 0.6)
    return rng.choice([FULL, PLAIN, 0, PLAIN | RINGS, some])


@contextmanager
def _quietly() -> Iterator[None]:
    """Thousands of refusals are not news; afterwards they are again."""
    logger = logging.getLogger("pyvpnkit.link")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Rings:
    """One device whose memory is nobody's to rely on; whatever happens it raises nothing, ends, and can be started anew."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        memory = GuestMemory(rng.choice(LAYOUTS), spread=rng.random() < 0.5)
        size = rng.choice([1, 2, 4, 16, 64])
        self.b = Bench(_features(rng), memory=memory, size=size, buffers=rng.choice([0, 2, 8]), buffer=1600)
        memory.keep()

    def step(self) -> None:
        rng, nic, link = self.rng, self.b.nic, self.b.link
        hostile = Hostile(nic)
        kind = rng.randrange(12)
        if kind <= 2:
            rng.choice(OUTBOUND)(rng, hostile)
        elif kind == 3:
            rng.choice(INBOUND)(rng, hostile)
        elif kind == 4:
            frame = rng.randbytes(rng.randrange(14, 1515))
            nic.send(frame, pieces=[rng.randrange(1, 600) for _ in range(rng.randrange(4))], kick=False)
        elif kind == 5:
            self.spoil()
        elif kind == 6:
            for _ in range(rng.choice([1, 2, 40])):
                if self.b.link is not None:
                    self.give(rng.random() < 0.5)
        elif kind == 7 and link is not None:
            link.publish()
        elif kind == 8:
            self.b.take()
        elif kind == 9:
            length = rng.choice([1500, 4096])
            nic.pairs[0].rx.add([Piece(nic.memory.allocate(length), length, True)], [])
        elif kind == 10:
            queue = rng.choice(nic.pairs[0].queues)
            queue.next_available = (queue.next_available + rng.choice([-2, -1, 1, 2])) & 0xFFFF
        elif rng.random() < 0.3:
            self.start_anew()
        for queue in nic.pairs[0].queues:
            if rng.random() < 0.7:
                queue.publish()

    def give(self, publish: bool) -> None:
        rng = self.rng
        frame = rng.randbytes(rng.choice([60, 1514]))
        way = rng.randrange(4)
        if way < 2:
            self.b.give(frame, one=bool(way), publish=publish)
        else:
            self.b.give_by_room(frame, spare=rng.choice([0, 3000]), native=way == 2, publish=publish)

    def spoil(self) -> None:
        """Octets of the rings change, between two looks of the device."""
        queue: DriverQueue[list[Piece]] = self.rng.choice(self.b.nic.pairs[0].queues)
        for _ in range(self.rng.randrange(1, 9)):
            place, length = self.rng.choice(
                [
                    (queue.table, 16 * queue.size),
                    (queue.available, 6 + 2 * queue.size),
                    (queue.available, 4),
                    (queue.used, 6 + 8 * queue.size),
                ]
            )
            octet = bytes((self.rng.choice([0, 1, 2, 4, 0x7F, 0x80, 0xFF, self.rng.randrange(256)]),))
            self.b.memory.write(place + self.rng.randrange(length), octet)

    def start_anew(self) -> None:
        nic = self.b.nic
        nic.stop()
        nic.reset_rings()
        nic.pairs[0].buffers.clear()
        nic.memory.forget()
        nic.start()
        assert self.b.link is not None, f"it does not start any more: {self.b.reasons[-1:]}"

    def finish(self) -> None:
        self.start_anew()
        self.b.nic.send(bytes(60), pieces=())
        assert self.b.take() == [bytes(60)]
        assert self.b.closed == [], "the connection is not the guest's to end"
        self.b.close()
        self.b.memory.close()


@_quietly()
def z6_rings(rng: random.Random) -> None:
    """Chains, rings and headers of any kind, changed between any two looks; both directions, published or not."""
    rings = Rings(rng)
    for _ in range(50):
        try:
            rings.step()
        except (QueueFull, DeviceFault, OutOfMemory):  # the played driver trips over what it did itself
            rings.start_anew()
    rings.finish()


@_quietly()
def z7_messages(rng: random.Random) -> None:
    """Messages of any kind in any order, with any descriptors: answered or hung up on, and nothing of it is kept."""
    gc.collect()
    before = count_descriptors()
    memory = GuestMemory(((0x100000, 1 << 20), (0x300000, 1 << 20), (0x500000, 1 << 20)))
    b = Bench(_features(rng), memory=memory, size=16, buffers=2, start=False)
    attacks = [attack for attack in MESSAGES if attack is not memory_added_again_and_again or rng.random() < 0.1]
    with closing(Rogue(b.nic.front, memory)) as rogue:
        for _ in range(rng.choice([5, 40])):
            try:
                if rng.random() < 0.2:
                    b.nic.negotiate(need_reply=rng.random() < 0.7)
                elif rng.random() < 0.3:
                    b.nic.start()
                elif rng.random() < 0.1:
                    b.nic.stop()
                else:
                    rng.choice(attacks)(rng, rogue)
                while not rogue.front.silent() and not rogue.front.hung_up():
                    rogue.front.receive().close()
                if rng.random() < 0.2:
                    rogue.front.send(Request.GET_FEATURES)
                    rogue.front.settle()
            except (Disconnected, NoReply, Refused, BadReply, QueueFull, DeviceFault):
                pass
            if rogue.front.hung_up():
                rogue.front.close()
                b.peer.readable()
                assert not b.peer.open and b.link is None
                b.nic.front = rogue.front = b.connect()
                b.nic.offered = 0
    b.close()
    assert b.link is None
    memory.close()
    del b, rogue, memory
    gc.collect()
    assert count_descriptors() == before, "descriptors are left"
