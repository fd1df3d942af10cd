"""The device with a played guest and real host sockets, in one thread and without a loop: an honest guest."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.guest_memory import GuestMemory
from tests.support.virtio_net import Feature
from tests.support.virtio_vsock import FEATURES, RECEIVE, RST, RW, RX, SEND, STREAM, TX, Packet, Sock
from tests.support.vsock_world import GUEST_PORT, SERVICE, World, drain, end_of
from vm.vsock.engine import BUF_ALLOC, CLOSE_S, Count

VERSION = Feature.VERSION_1.mask
INDIRECT, EVENT_IDX = Feature.INDIRECT_DESC.mask, Feature.EVENT_IDX.mask


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def one(**options: object) -> World:
        made.append(World(**options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for world in made:
        world.close()


def noise(octets: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(octets)


def carry(world: World, sock: Sock, far: socket.socket, outbound: bytes, inbound: bytes) -> tuple[bytes, bytes]:
    """Send both ways at once until all has arrived; what did, at the host and at the guest."""
    sent = given = 0
    came = b""
    for _ in range(20_000):
        sent += sock.send(outbound[sent:])
        if given < len(inbound):
            with contextlib.suppress(BlockingIOError):
                given += far.send(inbound[given : given + 65536])
        world.turn()
        came += drain(far)
        if len(came) == len(outbound) and len(sock.received) == len(inbound):
            break
    return came, bytes(sock.received)


def test_the_configuration_is_the_guests_address(world: World) -> None:
    assert world.guest.front.get_config(0, 8) == (3).to_bytes(8, "little")


@pytest.mark.parametrize("features", [VERSION, VERSION | INDIRECT, VERSION | EVENT_IDX, FEATURES])
@pytest.mark.parametrize(
    ("options", "spread"),
    [
        pytest.param({}, False, id="as Linux 6.1"),
        pytest.param({"buffer": 65536, "size": 64, "buffers": 16}, False, id="large buffers"),
        pytest.param({"buffer": 512, "cuts": (10, 44, 60)}, True, id="buffers in pieces"),
        pytest.param({"buffer": 45}, True, id="an octet each"),
    ],
)
def test_octets_arrive_whatever_the_guests_buffers_look_like(
    make: Callable[..., World], features: int, options: dict[str, int], spread: bool
) -> None:
    world = make(features=features, memory=GuestMemory(spread=spread), **options)
    sock, far = world.from_guest()
    octets = 5_000 if options.get("buffer") == 45 else 600_000
    outbound, inbound = noise(600_000), noise(octets, 1)
    assert carry(world, sock, far, outbound, inbound) == (outbound, inbound)


@pytest.mark.parametrize("cuts", [(1,), (44,), (43, 45), (20, 30, 50, 60), (100_000,)])
def test_packets_of_the_guest_may_be_cut_anywhere(world: World, cuts: tuple[int, ...]) -> None:
    sock, far = world.from_guest()
    data = noise(3000)
    assert sock.send(data, cuts=cuts) == len(data)
    world.settle()
    assert drain(far) == data


def test_packets_that_are_longer_than_they_say_lose_what_is_too_much(world: World) -> None:
    sock, far = world.from_guest()
    packet = Packet(3, 2, sock.port, SERVICE, 5, STREAM, RW, 0, 1000, 0, b"octets and more")
    world.guest.send_packet(packet, cuts=(44, 47))
    world.settle()
    assert drain(far) == b"octet"


STEPS = st.lists(
    st.tuples(st.sampled_from(["guest", "host", "read", "take", "turn"]), st.integers(1, 200_000)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS, buffer=st.sampled_from([45, 100, 3776, 8192]), buf_alloc=st.integers(1, 300_000), small=st.booleans()
)
def test_no_octet_is_lost_or_out_of_order_and_no_credit_exceeded(
    steps: list[tuple[str, int]], buffer: int, buf_alloc: int, small: bool
) -> None:
    """The played guest complains of whoever exceeds its credit, and the device resets it when it exceeds ours."""
    world = World(buffer=buffer, buf_alloc=buf_alloc)
    world.buffer = 4096 if small else 0
    try:
        sock, far = world.from_guest()
        sock.greedy = False
        outbound, inbound = noise(100_000), noise(min(20_000, 50 * min(buf_alloc, buffer - 44)), 1)
        sent = given = 0
        came = b""
        for what, number in steps:
            if what == "guest":
                sent += sock.send(outbound[sent : sent + number])
            elif what == "host" and given < len(inbound):
                with contextlib.suppress(BlockingIOError):
                    given += far.send(inbound[given : given + number])
            elif what == "read":
                came += end_of(far, number) or b""
            elif what == "take":
                sock.take(min(number, sock.rx - sock.fwd))
            else:
                world.turn()
            held = world.device.engine.connections[next(iter(world.device.engine.connections))].held
            assert held <= BUF_ALLOC
        sock.greedy = True
        sock.take()
        for _ in range(20_000):
            sent += sock.send(outbound[sent:])
            if given < len(inbound):
                with contextlib.suppress(BlockingIOError):
                    given += far.send(inbound[given:])
            world.turn()
            came += drain(far)
            if len(came) == len(outbound) and len(sock.received) == len(inbound):
                break
        assert came == outbound and bytes(sock.received) == inbound and sock.state == "open"
    finally:
        world.close()


# Who is slow.


def test_a_guest_without_buffers_holds_the_host_back(make: Callable[..., World]) -> None:
    world = make(buffers=4)
    sock, far = world.from_guest()
    world.guest.posting = False
    data = noise(3_000_000)
    given = 0
    for _ in range(100):
        try:
            given += far.send(data[given : given + 100_000])
        except BlockingIOError:
            break
        world.turn()
    assert given < 2_000_000 and len(sock.received) < 4 * 3776
    world.guest.posting = True
    world.guest.post()
    rest = data[given:]
    while rest:
        with contextlib.suppress(BlockingIOError):
            rest = rest[far.send(rest) :]
        world.turn()
    world.run(lambda: len(sock.received) == len(data))
    assert bytes(sock.received) == data


def test_a_guest_that_does_not_read_is_sent_what_it_has_room_for(make: Callable[..., World]) -> None:
    world = make(buf_alloc=10_000)
    sock, far = world.from_guest()
    sock.greedy = False
    far.send(noise(50_000))
    world.settle()
    assert len(sock.received) == 10_000
    sock.take()
    world.settle()
    assert len(sock.received) == 20_000


def test_a_host_that_does_not_read_holds_the_guest_back(world: World) -> None:
    sock, far = world.from_guest()
    data = noise(4_000_000)
    sent = 0
    for _ in range(200):
        sent += sock.send(data[sent:])
        world.settle()
    # What we hold, and what the kernel's socket took.
    (connection,) = world.device.engine.connections.values()
    assert connection.held == BUF_ALLOC and sock.room == 0
    assert sent < len(data)
    came = drain(far)
    while len(came) < len(data):
        sent += sock.send(data[sent:])
        world.turn()
        came += drain(far)
    assert came == data


def test_one_slow_host_does_not_hold_up_the_others(world: World) -> None:
    slow, _ = world.from_guest()
    quick, far = world.from_guest()
    while slow.send(noise(500_000)):
        world.settle()
    data = noise(1_000_000)
    assert carry(world, quick, far, data, b"")[0] == data


# Ends.


def test_half_closes_cross_both_ways(world: World) -> None:
    for sock, far in (world.from_guest(), world.to_guest()):
        sock.send(b"last of the guest")
        sock.shutdown(SEND)
        world.settle()
        assert drain(far) == b"last of the guest" and end_of(far) == b""
        far.send(b"still")
        world.settle()
        assert sock.received == b"still" and not sock.eof
        far.shutdown(socket.SHUT_WR)
        world.settle()
        assert sock.eof and sock.state in ("open", "closed")
    assert world.guest.resets == []


def test_the_hosts_half_close_leaves_the_other_direction_open(world: World) -> None:
    sock, far = world.to_guest()
    far.send(b"question")
    far.shutdown(socket.SHUT_WR)
    world.settle()
    assert sock.received == b"question" and sock.eof and not sock.deaf
    sock.send(noise(10_000))
    sock.close()
    world.settle()
    assert drain(far) == noise(10_000) and end_of(far) == b"" and sock.state == "closed"


def test_a_host_that_closes_is_told_to_the_guest_when_all_was_read(world: World) -> None:
    sock, far = world.from_guest()
    far.send(noise(500_000)[:100_000])
    far.close()
    world.settle()
    assert len(sock.received) == 100_000 and sock.state == "closed"
    assert not world.device.streams and not world.device.engine.connections


def test_a_host_that_closes_after_its_half_close_is_told_too(world: World) -> None:
    sock, far = world.from_guest()
    far.shutdown(socket.SHUT_WR)
    world.settle()
    assert sock.eof and not sock.deaf
    far.close()
    world.settle()
    assert sock.deaf and sock.state == "closed" and not world.device.streams


def test_a_host_that_takes_no_more_is_told_to_the_guest(world: World) -> None:
    sock, far = world.from_guest()
    far.shutdown(socket.SHUT_RD)
    sock.send(b"into nothing")
    world.settle()
    assert sock.deaf and not sock.eof and sock.state == "open"
    far.send(b"and yet it speaks")
    world.settle()
    assert sock.received == b"and yet it speaks"


def test_a_guest_that_takes_no_more_is_told_to_the_host(world: World) -> None:
    sock, far = world.from_guest()
    sock.shutdown(RECEIVE)
    world.settle()
    with pytest.raises(BrokenPipeError):
        far.send(b"into nothing")
    sock.send(b"and yet it speaks")
    world.settle()
    assert drain(far) == b"and yet it speaks"


def test_a_host_that_leaves_octets_unread_resets_the_guest(world: World) -> None:
    sock, far = world.from_guest()
    sock.send(b"unread")
    world.settle()
    far.close()
    world.settle()
    assert sock.state == "reset" and not world.device.streams


def test_what_a_guest_sent_before_its_end_is_not_lost(world: World) -> None:
    """It sends as much as it may and closes, while the host does not read at all."""
    sock, far = world.from_guest()
    data = noise(4_000_000)
    sent = 0
    while piece := sock.send(data[sent:]):
        sent += piece
        world.settle()
    sock.close()
    world.settle()
    assert sock.state == "closed" and not world.device.engine.connections and len(world.device.streams) == 1
    came = b""
    while len(came) < sent:
        came += drain(far)
        world.turn()
    assert came == data[:sent]
    world.settle()
    assert end_of(far) == b"" and not world.device.streams


def test_who_only_empties_itself_makes_room_for_who_comes(make: Callable[..., World]) -> None:
    world = make(limit=2)
    sock, far = world.from_guest()
    while sock.send(noise(500_000)):
        world.settle()
    sock.close()
    world.settle()
    assert len(world.device.streams) == 1
    for _ in range(2):
        world.from_guest()
    assert len(world.device.streams) == 2
    drain(far)
    assert end_of(far) == b""  # what was held is lost


def test_a_guest_that_never_confirms_the_end_is_let_go(world: World) -> None:
    sock, far = world.from_guest()
    sock.state = "closing"  # hears, and does nothing
    far.close()
    world.settle()
    assert len(world.device.engine.connections) == 1
    world.now = CLOSE_S
    world.device.tick()
    world.settle()
    assert not world.device.engine.connections and not world.device.streams and sock.state == "closed"


# Begins.


def test_the_host_reaches_the_guest_and_says_hello_first(world: World) -> None:
    world.guest.listen(GUEST_PORT)
    ends: list[socket.socket] = []
    assert world.device.connect(GUEST_PORT, world.pair(ends), lambda host_port: b"OK %d\n" % host_port)
    ends[0].send(b"early")
    assert end_of(ends[0]) is None
    world.settle()
    (sock,) = world.guest.accepted
    assert drain(ends[0]) == b"OK %d\n" % sock.peer and sock.received == b"early"


def test_a_port_that_nobody_listens_on_is_a_close(world: World) -> None:
    far = world.dial_guest(99)
    world.settle()
    assert end_of(far) == b"" and not world.device.streams


def test_a_port_of_the_host_that_nobody_serves_is_refused(world: World) -> None:
    sock = world.guest.connect(99)
    world.settle()
    assert sock.state == "refused" and not world.device.engine.connections


def test_a_host_that_gives_up_waiting_is_forgotten(world: World) -> None:
    world.guest.posting = False
    world.guest.packets()
    far = world.dial_guest(GUEST_PORT)
    far.close()
    world.turn()
    world.turn()
    assert not world.device.streams and not world.device.engine.connections


def test_an_answer_that_comes_late_is_used_or_closed(world: World) -> None:
    world.answer = False
    first, second = world.guest.connect(SERVICE), world.guest.connect(SERVICE)
    world.settle()
    assert first.state == second.state == "connecting" and len(world.dialled) == 2
    second.say(RST)
    world.settle()
    for _, answer in world.dialled:
        answer(world.pair(world.taken))
    world.settle()
    assert first.state == "open" and end_of(world.taken[1]) == b""


def test_without_a_guest_the_host_is_turned_away(make: Callable[..., World]) -> None:
    world = make(start=False)
    assert end_of(world.dial_guest()) == b""
    world.guest.start()
    world.to_guest()


def test_200_connections_at_once(world: World) -> None:
    world.guest.listen(GUEST_PORT)
    fars = [world.dial_guest() for _ in range(200)]
    world.settle()
    assert len(world.guest.accepted) == 200
    for number, far in enumerate(fars):
        far.send(b"%d" % number)
    world.settle()
    assert sorted(int(sock.received) for sock in world.guest.accepted) == list(range(200))
    for far in fars:
        far.close()
    world.settle()
    assert not world.device.streams


# The machine.


def test_a_machine_that_pauses_keeps_its_connections(world: World) -> None:
    sock, far = world.from_guest()
    sock.send(b"before")
    world.settle()
    bases = world.guest.stop()
    assert bases[TX] == world.guest.queues[TX].used_index and not world.device.running
    far.send(b"meanwhile")
    world.turn()
    world.guest.start()
    world.settle()
    assert sock.received == b"meanwhile" and drain(far) == b"before" and world.guest.events == []


def test_a_guest_that_reboots_has_none(world: World) -> None:
    _, far = world.from_guest()
    world.guest.reboot()
    world.settle()
    assert end_of(far) == b"" and world.guest.events == []
    sock, far = world.from_guest()
    far.send(b"again")
    world.settle()
    assert sock.received == b"again"


def test_a_device_that_is_new_to_a_living_guest_has_it_forget_its_connections(world: World) -> None:
    sock, far = world.from_guest()
    far.send(b"before")
    world.settle()
    world.channel.close()
    assert end_of(far) == b"" and world.closed == ["shutting down"]
    world.guest.front.close()
    world.guest.reconnect(world.connection())
    world.settle()
    world.guest.packets()
    assert world.guest.events == [(0).to_bytes(4, "little")]  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    sock.say(RW, b"to nobody")
    world.settle()
    assert sock.state == "reset"
    _, far = world.from_guest()
    far.send(b"after")
    world.settle()


def test_a_device_without_the_event_ring_works(make: Callable[..., World]) -> None:
    """QEMU keeps it for itself."""
    world = make(events=False)
    sock, far = world.from_guest()
    far.send(b"octets")
    world.settle()
    assert sock.received == b"octets"


def test_a_front_end_that_goes_ends_everything(world: World) -> None:
    _, far = world.from_guest()
    world.guest.front.close()
    world.channel.readable()
    assert end_of(far) == b"" and not world.device.streams and not world.device.running


# Who is told of what.


@pytest.mark.parametrize("features", [VERSION | INDIRECT, FEATURES])
def test_few_words_are_made_of_many_octets(make: Callable[..., World], features: int) -> None:
    """Kicks and calls cost a guest more than packets do."""
    world = make(features=features)
    sock, far = world.from_guest()
    outbound, inbound = noise(2_000_000), noise(2_000_000, 1)
    kicked, called = sum(world.guest.kicked), int(str(world.device.describe()["calls"]))
    packets = world.device.engine.counters[Count.PACKETS_INBOUND]
    assert carry(world, sock, far, outbound, inbound) == (outbound, inbound)
    packets = world.device.engine.counters[Count.PACKETS_INBOUND] - packets
    assert packets > 500
    assert int(str(world.device.describe()["calls"])) - called < packets / 8
    assert sum(world.guest.kicked) - kicked < packets / 4


def test_a_guest_is_not_asked_for_buffers_while_there_are_some(world: World) -> None:
    sock, far = world.from_guest()
    before = world.guest.kicked[RX]
    for _ in range(200):
        far.send(b"x")
        world.settle()
    assert len(sock.received) == 200 and world.guest.kicked[RX] == before


@pytest.mark.parametrize("every", [1, 2])
def test_buffers_without_room_for_a_header_are_given_back(make: Callable[..., World], every: int) -> None:
    world = make(start=False, buffers=16)
    guest = world.guest
    for number in range(0, 16, every):
        guest.spare[number] = [guest.spare[number][0]._replace(length=43)]
    guest.start()
    sock = guest.connect(SERVICE)
    world.settle()
    if every == 2:
        world.taken[0].send(noise(50_000))
        world.run(lambda: sock.received == noise(50_000))
    else:
        assert sock.state == "connecting"
    assert world.device.engine.counters[Count.BUFFERS_SMALL] >= 4 and world.device.running
