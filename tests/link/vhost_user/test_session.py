"""The life of a device as its hypervisor tells it: started, paused, reset, given more memory, abandoned, found again."""

from __future__ import annotations

import gc
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.guest_memory import GuestMemory
from tests.support.vhost_bench import Bench, count_descriptors
from tests.support.vhost_front import FrontEnd, ProtocolFeature, Refused, Region, Request
from tests.support.virtio_net import CHECKSUMS, FULL, PLAIN, SUPER_FRAMES, Feature, Header
from tests.support.virtio_nic import Nic
from tests.support.virtqueue import Piece

from .conftest import MRG, SUBSETS, MakeBench

ROOT = Path(__file__).parents[3]


def works(b: Bench, seed: int = 0) -> None:
    """Frames go both ways, in pieces and super-frames where that was agreed on."""
    frames = [random.Random(seed + number).randbytes(60 + 400 * number) for number in range(4)]
    for frame in frames:
        b.nic.send(frame)
    assert b.take() == frames
    assert b.give(*frames) == len(frames)
    assert [each.frame for each in b.nic.receive(called=True)] == frames


@pytest.mark.parametrize("need_reply", [True, False])
@pytest.mark.parametrize("slots", [True, False])
def test_the_link_is_there_once_pair_0_runs_and_as_long_as_it_does(
    bench: MakeBench, need_reply: bool, slots: bool
) -> None:
    b = bench(start=False, slots=slots)
    assert b.link is None
    b.nic.negotiate(need_reply=need_reply)
    assert b.nic.speaks(ProtocolFeature.REPLY_ACK) is need_reply
    b.nic.start()
    link = b.link
    assert link is not None and b.appeared == 1
    works(b)
    b.nic.front.set_vring_enable(0, False)
    b.nic.front.settle()
    assert b.link is None and len(b.reasons) == 1
    b.nic.front.set_vring_enable(0, True)
    b.nic.front.settle()
    works(b, 1)
    b.nic.stop()
    assert b.link is None and len(b.reasons) == 2 and b.closed == []


def test_a_front_end_without_protocol_features_enables_by_starting(bench: MakeBench) -> None:
    b = bench(PLAIN, start=False)
    b.nic.offered = b.nic.front.get_features() & ~Feature.PROTOCOL_FEATURES.mask
    b.nic.front.set_owner()
    b.nic.start()
    works(b)


def test_rings_enabled_before_they_are_set_up_run_when_they_are(bench: MakeBench) -> None:
    """As QEMU does it: SET_VRING_ENABLE first, the call descriptors early, a second time when interrupts are masked."""
    b = bench(start=False)
    b.nic.negotiate()
    for index in range(2):
        b.nic.front.set_vring_call(index, b.nic.errors)
        b.nic.front.set_vring_enable(index, True)
    assert b.link is None
    b.nic.start()
    works(b)
    for which, index in enumerate(b.nic.pairs[0].indexes()):
        b.nic.front.set_vring_call(index, b.nic.errors)
        b.nic.front.set_vring_call(index, b.nic.pairs[0].calls[which])
    works(b)
    b.nic.front.set_vring_call(0, None)
    assert b.give(bytes(60)) == 1
    assert len(b.nic.receive()) == 1


def test_bases_are_what_was_used_and_nothing_is_lost_over_a_pause(bench: MakeBench) -> None:
    b = bench()
    for round_ in range(5):
        works(b, round_)
        frames = [bytes((round_,)) * 100, bytes((round_,)) * 600]
        for frame in frames:
            b.nic.send(frame)
        assert b.nic.stop() == [queue.used_index for queue in b.nic.pairs[0].queues]
        b.nic.send(bytes(70))
        b.nic.start()
        assert b.take() == [*frames, bytes(70)]
    assert b.appeared == 6


def test_frames_that_were_taken_but_not_shown_are_used_up_when_the_ring_stops(bench: MakeBench) -> None:
    b = bench()
    b.nic.send(bytes(60))
    link = b.link
    assert link is not None
    assert len(link.receive()) == 1
    assert link.send_one(memoryview(link.prefix(60) + bytes(60)))
    bases = b.nic.stop()
    assert bases == [queue.used_index for queue in b.nic.pairs[0].queues] == [1, 1]
    assert len(b.nic.receive()) == 1


@pytest.mark.parametrize("features", SUBSETS.values(), ids=SUBSETS)
def test_a_driver_that_starts_anew_gets_what_it_agreed_to(bench: MakeBench, features: int) -> None:
    b = bench(FULL)
    works(b)
    b.nic.reboot(features)
    link = b.link
    assert link is not None and b.appeared == 2
    assert link.headroom == b.nic.header_size
    assert link.partial_checksums == b.nic.has(Feature.GUEST_CSUM)
    assert bool(link.tso) == (b.nic.has(Feature.GUEST_TSO4) and b.nic.has(Feature.GUEST_CSUM))
    works(b, 1)
    b.nic.reboot(FULL)
    works(b, 2)


@pytest.mark.parametrize("how", ["status", "device", "owner"])
def test_a_reset_stops_all_rings(bench: MakeBench, how: str) -> None:
    b = bench()
    works(b)
    if how == "status":
        b.nic.front.set_status(0x0F)
        assert b.nic.front.get_status() == 0x0F
        b.nic.front.set_status(0)
        assert b.nic.front.get_status() == 0
    elif how == "device":
        b.nic.front.reset_device()
    else:
        b.nic.front.reset_owner()
    assert b.link is None
    b.nic.running = False
    b.nic.reboot()
    works(b)


def test_broken_rings_are_told_by_the_error_descriptor_and_end_when_the_driver_starts_anew(bench: MakeBench) -> None:
    b = bench()
    works(b)
    b.nic.pairs[0].tx.add([Piece(1 << 50, 100, False)], [])
    b.nic.flush()
    assert b.take() == []
    assert b.link is None and "0x4000000000000" in b.reasons[-1]
    assert os.eventfd_read(b.nic.errors) >= 1
    for index in range(2):  # enabling is not starting
        b.nic.front.set_vring_enable(index, False)
        b.nic.front.set_vring_enable(index, True)
    b.nic.reboot()
    works(b)


@pytest.mark.parametrize("like", ["qemu", "cloud-hypervisor"])
@pytest.mark.parametrize("features", [PLAIN, FULL], ids=["nothing", "everything"])
def test_f1_a_back_end_started_anew_goes_on_where_the_old_one_was(bench: MakeBench, features: int, like: str) -> None:
    b = bench(features)
    for round_ in range(4):
        works(b, round_)
        b.nic.send(b"\1" * 60)
        b.nic.send(b"\2" * 60)
        link = b.link
        assert link is not None and len(link.receive()) == 2  # not shown as used: it dies
        b.reconnect(like)  # type: ignore[arg-type]
        assert b.take() in ([b"\1" * 60, b"\2" * 60], [])
        b.nic.pairs[0].reclaim()
        assert not b.nic.pairs[0].tx.outstanding
    works(b)


def test_the_mtu_of_the_hypervisor_is_kept_and_told(bench: MakeBench) -> None:
    b = bench(FULL | Feature.MTU.mask, mtu=9000)
    assert b.link is not None and b.link.mtu == 9000
    b.nic.stop()
    b.nic.front.net_set_mtu(1400)
    b.nic.start()
    assert b.link is not None and b.link.mtu == 1400


def test_configuration_says_mac_status_pairs_and_mtu(bench: MakeBench) -> None:
    b = bench(mtu=4000, start=False)
    front = b.nic.front
    if not front.get_protocol_features() & ProtocolFeature.CONFIG.mask:
        pytest.skip("expected: no configuration is offered")
    front.set_protocol_features(ProtocolFeature.CONFIG.mask | ProtocolFeature.REPLY_ACK.mask)
    octets = front.get_config(0, 12)
    assert octets[0] & 3 == 2, "a MAC that is locally administered and one machine's"
    assert octets[6:8] == b"\1\0" and 1 <= int.from_bytes(octets[8:10], "little") <= 0x8000
    assert int.from_bytes(octets[10:12], "little") == 4000
    assert front.get_config(3, 5) == octets[3:8]
    front.need_reply = True
    with pytest.raises(Refused):
        front.set_config(0, b"\2\0\0\0\0\1")


def test_memory_may_be_added_and_removed_while_rings_run(bench: MakeBench) -> None:
    b = bench(PLAIN, slots=True)
    works(b)
    more = GuestMemory([(1 << 40, 1 << 20)])
    region = more.regions()[0]
    extra = Region(region.guest_address, region.size, 0x1234_0000_0000, region.offset, region.fd)
    b.nic.front.add_mem_reg(extra)
    address = more.allocate(200)
    frame = random.Random(1).randbytes(100)
    more.write(address, bytes(12) + frame)
    pair = b.nic.pairs[0]
    pair.tx.add([Piece(address, 112, False)], [])
    b.nic.flush()
    assert b.take() == [frame]
    b.nic.front.rem_mem_reg(extra, with_fd=True)
    works(b)
    with pytest.raises(Refused):  # its rings are in there
        for inside in b.memory.regions():
            b.nic.front.rem_mem_reg(inside)
    works(b)
    pair.tx.add([Piece(address, 112, False)], [])
    b.nic.flush()
    assert b.take() == [] and b.link is None
    more.close()


def test_the_memory_table_may_be_told_again_while_rings_run(bench: MakeBench) -> None:
    b = bench()
    works(b)
    b.nic.front.set_mem_table(b.memory.regions())
    works(b, 1)
    assert b.appeared == 1


def test_inflight_memory_is_given_out_and_taken_back(bench: MakeBench) -> None:
    b = bench(start=False)
    b.nic.negotiate()
    if not b.nic.speaks(ProtocolFeature.INFLIGHT_SHMFD):
        pytest.skip("expected: no inflight memory is offered")
    for _ in range(20):
        size, offset, fd = b.nic.front.get_inflight_fd(2, 256)
        try:
            assert size >= 2 * (16 + 256 * 16) and os.fstat(fd).st_size >= offset + size
            b.nic.front.set_inflight_fd(size, offset, 2, 256, fd)
        finally:
            os.close(fd)
    b.nic.start()
    works(b)


def test_more_pairs_come_and_go_while_the_first_runs(bench: MakeBench) -> None:
    b = bench(FULL | Feature.MQ.mask, pairs=3, buffers=8, size=16)
    assert b.nic.queue_pairs >= 3
    front = b.nic.front
    for index in range(2, 6):
        front.set_vring_enable(index, False)
    b.nic.send(bytes(60), pair=2)
    assert b.take() == [], "a ring that is not enabled carries nothing"
    works(b)
    for index in range(2, 6):
        front.set_vring_enable(index, True)
    frames = [bytes((number,)) * 60 for number in range(3)]
    for number, frame in enumerate(frames):
        b.nic.send(frame, pair=number)
    taken = b.take()
    assert sorted(taken)[-3:] == frames or sorted(taken) == frames
    assert b.appeared == 1


def test_offload_off_offers_none(bench: MakeBench) -> None:
    b = bench(PLAIN | MRG, offload=False)
    assert not b.nic.offered & (CHECKSUMS | SUPER_FRAMES)
    works(b)


def test_only_what_can_be_kept_is_offered(bench: MakeBench) -> None:
    offered = bench(start=False).nic.front.get_features()
    for feature in (
        Feature.RING_PACKED,
        Feature.ACCESS_PLATFORM,
        Feature.LOG_ALL,
        Feature.HASH_REPORT,
        Feature.IN_ORDER,
    ):
        assert not offered & feature.mask, feature.name
    for feature in (Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.MQ):
        assert offered & feature.mask, feature.name


def test_a_connection_that_ended_lets_go_of_the_machines_memory_at_once(bench: MakeBench) -> None:
    """Not at some later run of the garbage collector: it may be gigabytes."""
    b = bench()
    b.reconnect()
    gc.collect()
    before = count_descriptors()
    gc.disable()
    try:
        for _ in range(3):
            b.reconnect()
        assert count_descriptors() == before
    finally:
        gc.enable()


def test_two_machines_on_two_connections_know_nothing_of_each_other(bench: MakeBench) -> None:
    one, other = bench(), bench(PLAIN)
    works(one)
    works(other)
    one.nic.front.send(0xFFFF)
    assert one.nic.front.hung_up() and one.link is None
    works(other)


VANISH = """
import random
from tests.support.guest_memory import GuestMemory
from tests.support.vhost_bench import Bench
from tests.support.virtio_net import FULL
memory = GuestMemory([(0x100000, 8 << 20), (0x4000000, 8 << 20)], spread=False)
bench, other = Bench(FULL, memory=memory), Bench(FULL)
bench.nic.send(bytes(600), kick=False)
bench.nic.flush()
for number in range(2):
    memory.truncate(number, 0)
bench.take()
if bench.link is not None:
    bench.give(bytes(60))
assert bench.link is None or bench.take() == [] and bench.link is None, bench.reasons
other.nic.send(bytes(60))
assert other.take() == [bytes(60)]
print("reason:", bench.reasons)
"""


def test_g7_memory_that_is_cut_off_ends_its_machine_and_nothing_else() -> None:
    """In a process of its own: who touches such memory unprepared is killed by SIGBUS."""
    done = subprocess.run([sys.executable, "-c", VANISH], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cut off" in done.stdout


def test_a_front_end_in_another_process_is_served_by_the_loop(tmp_path: Path) -> None:
    """Blocking, as a hypervisor: `start` in an asyncio loop, the front-end elsewhere."""
    script = """
import asyncio, socket, sys
from netstack.link.vhost_user.server import VhostUserPeer
sock = socket.socket(fileno=int(sys.argv[1]))
async def main():
    links, over = asyncio.Queue(), asyncio.Event()
    peer = VhostUserPeer(sock, "vhost-user:x", 1500, appeared=links.put_nowait,
                         gone=lambda link, reason: link.close(), closed=lambda reason: over.set())
    peer.start()
    link = await links.get()
    seen = 0
    while not over.is_set():
        frames = link.receive() if peer.device.link is link else []
        seen += len(frames)
        if frames:
            link.send([(link.prefix(len(frame)), bytes(frame[12:])) for frame in frames])
            link.publish()
        await asyncio.sleep(0)
    print(seen)
asyncio.run(main())
"""
    ours, theirs = socket.socketpair()
    memory = GuestMemory()
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
    nic = Nic(FrontEnd(ours, patience_s=20.0), memory, features=PLAIN | MRG)
    try:
        nic.start()
        os.set_blocking(nic.pairs[0].calls[0], True)
        got: list[bytes] = []
        sent = [bytes((number,)) * (60 + number) for number in range(100)]
        for frame in sent:
            nic.send(frame)
        while len(got) < len(sent):
            got += [received.frame for received in nic.receive(called=True)]
        assert got == sent
        nic.front.get_features()
        nic.close()
        assert child.communicate(timeout=20)[0] == "100\n"
    finally:
        nic.close()
        child.kill()
        child.communicate()
        memory.close()


def test_requests_have_the_numbers_of_the_specification() -> None:
    assert [Request.SET_MEM_TABLE, Request.SET_VRING_ENABLE, Request.GET_STATUS] == [5, 18, 40]
    assert Header(num_buffers=1).pack() == bytes(10) + b"\1\0"
