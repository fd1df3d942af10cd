"""The played hypervisor and driver against a back-end of the plainest kind: what other tests rely on is true."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support.guest_memory import SMALL, GuestMemory
from tests.support.vhost_front import BadReply, Disconnected, FrontEnd, NoReply, Refused, Request
from tests.support.virtio_net import CHECKSUMS, FULL, PLAIN, SUPER_FRAMES, Feature
from tests.support.virtio_nic import Nic
from tests.support.virtqueue import DeviceFault, DriverQueue, Piece, QueueFull

from .conftest import SUBSETS
from .loopback import Loopback

Make = Callable[..., tuple[Nic, Loopback]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[Nic, Loopback]] = []

    def start(features: int = FULL, *, sabotage: str = "", **options: object) -> tuple[Nic, Loopback]:
        ours, theirs = socket.socketpair()
        device = Loopback(theirs, sabotage)
        options.setdefault("buffers", 64)
        nic = Nic(FrontEnd(ours, device.turn), GuestMemory(), features=features, **options)  # type: ignore[arg-type]
        nic.start()
        made.append((nic, device))
        return nic, device

    yield start
    for nic, device in made:
        nic.close()
        device.close()


def there_and_back(nic: Nic, device: Loopback, frames: list[bytes], rng: random.Random) -> int:
    """Send frames in random pieces, compare what comes back; chains that were used."""
    before = sum(queue.completed for pair in nic.pairs for queue in pair.queues)
    for frame in frames:
        cuts = [rng.randrange(1, len(frame)) for _ in range(rng.randrange(5))]
        nic.send(frame, pieces=None if rng.random() < 0.3 else cuts)
        device.turn()
        (received,) = nic.receive(called=True)
        assert received.frame == frame
        if nic.has(Feature.MRG_RXBUF):
            assert received.header.num_buffers == received.buffers
    for pair in nic.pairs:
        pair.reclaim()
    return sum(queue.completed for pair in nic.pairs for queue in pair.queues) - before


@pytest.mark.parametrize("features", SUBSETS.values(), ids=SUBSETS)
def test_frames_come_back_as_they_were_sent(make: Make, features: int) -> None:
    rng = random.Random(1)
    nic, device = make(features)
    frames = [rng.randbytes(rng.choice([14, 60, 61, 1514, rng.randrange(14, 1515)])) for _ in range(700)]
    assert there_and_back(nic, device, frames, rng) == 2 * len(frames)
    assert device.rings[0].chains == device.rings[1].chains == len(frames)


def test_long_frames_fill_several_buffers(make: Make) -> None:
    nic, device = make(buffer=1526)
    nic.mtu = 65000
    frame = random.Random(2).randbytes(60_000)
    nic.send(frame)
    device.turn()
    (received,) = nic.receive()
    assert received.frame == frame
    assert received.buffers == -(-60_012 // 1526)


def test_indexes_wrap(make: Make) -> None:
    nic, device = make(size=4, buffers=4, first=65_000)
    for number in range(1000):
        nic.send(number.to_bytes(4, "big") * 5, pieces=())
        device.turn()
        assert nic.receive()[0].frame[:4] == number.to_bytes(4, "big")
    assert nic.pairs[0].tx.published == nic.pairs[0].rx.used_index == 66_000 & 0xFFFF


def test_every_pair_has_frames_of_its_own(make: Make) -> None:
    nic, device = make(FULL | Feature.MQ.mask, pairs=3, size=16, buffers=16)
    for number in range(3):
        nic.send(bytes((number,)) * 60, pair=number)
    device.turn()
    assert [nic.receive(number)[0].frame[0] for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_quiet_driver_is_not_called(make: Make, event_idx: bool) -> None:
    nic, device = make(PLAIN | (Feature.EVENT_IDX.mask if event_idx else 0))
    pair = nic.pairs[0]
    pair.rx.want_calls(False)
    for _ in range(10):
        nic.send(bytes(60))
        device.turn()
        assert pair.called(0) == 0
        assert len(nic.receive()) == 1
    pair.rx.want_calls(True)
    nic.send(bytes(60))
    device.turn()
    assert pair.called(0) == 1


def test_a_device_that_looks_itself_is_not_kicked(make: Make) -> None:
    memory = GuestMemory()
    for event_idx in (False, True):
        queue: DriverQueue[int] = DriverQueue(memory, 8, event_idx=event_idx)
        queue.add([Piece(memory.allocate(60), 60, False)], 1)
        assert queue.publish()
        memory.pack("<H", queue.used if not event_idx else queue.used + 4 + 64, 1 if not event_idx else 5)
        queue.add([Piece(memory.allocate(60), 60, False)], 2)
        assert not queue.publish()
        for token in range(3, 7):
            queue.add([Piece(memory.allocate(60), 60, False)], token)
        assert queue.publish() is event_idx, "the mark at 5 was passed"
    memory.close()


def test_a_full_ring_says_so(make: Make) -> None:
    nic, device = make(PLAIN, size=8, buffers=8)
    for _ in range(8):
        nic.send(bytes(60), pieces=())
    with pytest.raises(QueueFull):
        nic.send(bytes(60), pieces=())
    device.turn()
    nic.send(bytes(60), pieces=())


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        ("completes what it was not given", "does not have"),
        ("completes twice", "does not have|were outstanding"),
        ("says it wrote to a chain to be sent", "octets written"),
        ("num_buffers is 0", "num_buffers is 0"),
        ("writes more than fits", "octets written to chain"),
        ("shows half a frame", "num_buffers"),
        ("jumps", "used.idx moved"),
    ],
)
def test_driver_notices_a_device_that(make: Make, sabotage: str, said: str) -> None:
    nic, device = make(FULL & ~CHECKSUMS & ~SUPER_FRAMES, sabotage=sabotage, buffer=512)
    nic.send(bytes(1500))
    nic.send(bytes(1500))
    device.turn()
    with pytest.raises(DeviceFault, match=said):
        nic.receive()
        nic.pairs[0].reclaim()


def test_driver_notices_offloads_it_did_not_agree_to(make: Make) -> None:
    nic, device = make(PLAIN, sabotage="asks for checksums nobody negotiated")
    nic.send(bytes(60))
    device.turn()
    with pytest.raises(DeviceFault, match="GUEST_CSUM"):
        nic.receive()


def test_driver_notices_a_changed_octet_a_missing_call_and_a_chain_that_stays_away(make: Make) -> None:
    nic, device = make(sabotage="changes an octet")
    with pytest.raises(AssertionError):
        there_and_back(nic, device, [bytes(60)], random.Random(1))
    nic, device = make(sabotage="never calls")
    with pytest.raises(ValueError):
        there_and_back(nic, device, [bytes(60)], random.Random(1))
    nic, device = make(sabotage="forgets a chain")
    there_and_back(nic, device, [bytes(60)], random.Random(1))
    assert len(nic.pairs[0].tx.outstanding) == 1


def test_stopped_and_started_again_nothing_is_lost(make: Make) -> None:
    rng = random.Random(3)
    nic, device = make()
    for _ in range(10):
        there_and_back(nic, device, [rng.randbytes(100) for _ in range(50)], rng)
        assert nic.stop() == [nic.pairs[0].rx.used_index, nic.pairs[0].tx.used_index]
        nic.start()


def test_a_guest_that_reboots_may_want_other_features(make: Make) -> None:
    rng = random.Random(4)
    nic, device = make()
    for features in SUBSETS.values():
        nic.reboot(features)
        there_and_back(nic, device, [rng.randbytes(100) for _ in range(50)], rng)


@pytest.mark.parametrize("slots", [False, True])
def test_memory_is_told_at_once_or_region_by_region(make: Make, slots: bool) -> None:
    nic, device = make(slots=slots)
    there_and_back(nic, device, [bytes(60)], random.Random(1))
    assert [(one.guest, one.user, one.size) for one in device.regions] == [
        (region.guest_address, region.user_address, region.size) for region in nic.memory.regions()
    ]


def test_after_a_new_connection_as_qemu_does_it_nothing_is_lost(make: Make) -> None:
    nic, old = make()
    nic.send(b"before" * 10)
    old.sock.close()
    ours, theirs = socket.socketpair()
    device = Loopback(theirs)
    nic.reconnect(FrontEnd(ours, device.turn), "qemu")
    device.turn()
    assert nic.receive()[0].frame == b"before" * 10
    device.close()


def test_front_end_tells_a_refusal_from_silence_and_from_a_hang_up(make: Make) -> None:
    nic, device = make()
    with pytest.raises(Refused):
        nic.front.set_vring_endian(0, True)
    assert nic.front.silent() and not nic.front.hung_up()
    nic.front.need_reply = False
    nic.front.set_vring_endian(0, True)
    assert nic.front.silent()
    with pytest.raises(NoReply):
        nic.front.ask(99)
    device.sock.send(bytes(12))
    with pytest.raises(BadReply):
        nic.front.get_features()
    device.sock.close()
    with pytest.raises(Disconnected):
        while True:
            nic.front.send(Request.SET_OWNER)
    assert nic.front.hung_up()


def test_memory_lies_where_it_is_said_to_lie() -> None:
    for one_file in (False, True):
        memory = GuestMemory(SMALL, one_file=one_file)
        for region in memory.regions():
            memory.write(region.guest_address, b"begin")
            assert os.pread(region.fd, 5, region.offset) == b"begin"
            assert memory.user(region.guest_address + 7) == region.user_address + 7
        addresses = {memory.allocate(1000) for _ in range(400)}
        assert len(addresses) == 400
        assert all(
            any(r.guest_address <= a and a + 1000 <= r.guest_address + r.size for r in memory.regions())
            for a in addresses
        )
        with pytest.raises(IndexError):
            memory.view(memory.regions()[0].guest_address + memory.regions()[0].size - 1, 2)
        memory.seal()
        with pytest.raises(PermissionError):
            memory.truncate(0, 4096)
        memory.close()
