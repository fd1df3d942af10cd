"""Live captures: what a reader gets, what it loses, and that links are plain again when nobody looks."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import dpkt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netstack.errors import ConfigError
from netstack.link.capture import CaptureLink
from netstack.observe.filter import compile_filter
from netstack.observe.live import MAX_INTERFACES, MAX_READERS, SMALLEST_LIMIT, Live
from netstack.observe.pcap import INBOUND, OUTBOUND, PcapWriter, section_header
from tests.support import packets
from tests.support.drill import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, Drill, pattern
from tests.support.link import KINDS, make_link

NOW_NS = 1_700_000_000_123_456_789


def frame(octets: int = 60, port: int = 9) -> bytes:
    body = packets.udp(GUEST, GATEWAY, 4000, port, bytes(max(octets - 42, 0)))
    return packets.ether(
        GATEWAY_MAC, GUEST_MAC, packets.IPV4, packets.ipv4(GUEST, GATEWAY, packets.UDP, body), pad=False
    )


def frames(stream: bytes) -> list[bytes]:
    if len(stream) == len(section_header()):
        return []  # without a link there is no interface, which dpkt takes for a mistake
    return [octets for _, octets in dpkt.pcapng.Reader(io.BytesIO(stream))]


def tshark(directory: Path, stream: bytes, *fields: str) -> list[list[str]]:
    program = shutil.which("tshark")
    if program is None:
        pytest.skip("tshark is not installed")
    path = directory / "stream.pcapng"
    path.write_bytes(stream)
    options = [part for field in fields for part in ("-e", field)]
    out = subprocess.run(
        [program, "-r", str(path), "-T", "fields", *options], capture_output=True, text=True, check=True
    )
    return [line.split("\t") for line in out.stdout.splitlines()]


def report(directory: Path, stream: bytes) -> str:
    """What capinfos says of the interfaces and their statistics."""
    program = shutil.which("capinfos")
    if program is None:
        pytest.skip("capinfos is not installed")
    path = directory / "stream.pcapng"
    path.write_bytes(stream)
    return subprocess.run([program, str(path)], capture_output=True, text=True, check=True).stdout


class Watched(Live):
    """With two links in place, and a list of what the stack was told."""

    def __init__(self) -> None:
        self.switched: list[bool] = []
        super().__init__(self._on, wall_ns=lambda: NOW_NS)

    def _on(self, on: bool) -> None:
        self.switched.append(on)
        if on:
            self.numbers = [self.add_interface("tap:netns=guest"), self.add_interface("qemu:/run/net.sock")]


# The stream.


def test_a_stream_is_complete_wherever_it_is_taken(tmp_path: Path) -> None:
    live = Watched()
    reader = live.open()
    stream = reader.take()
    assert frames(stream) == []
    sent = [frame(60 + number) for number in range(8)]
    for number, one in enumerate(sent):
        live.write(number & 1, (INBOUND, OUTBOUND)[number & 1], NOW_NS + number, memoryview(one))
        if number % 3 == 0:
            stream += reader.take()
    stream += reader.take() + reader.statistics()
    assert reader.take() == b""
    assert frames(stream) == sent
    assert (reader.frames, reader.lost) == (8, 0)
    lines = tshark(tmp_path, stream, "frame.interface_name", "frame.packet_flags_direction", "frame.time_epoch")
    assert [line[0] for line in lines] == ["tap:netns=guest", "qemu:/run/net.sock"] * 4
    assert [int(line[1], 0) for line in lines] == [INBOUND, OUTBOUND] * 4
    assert lines[0][2] == "1700000000.123456789"


def test_a_reader_that_comes_later_and_a_link_that_comes_later(tmp_path: Path) -> None:
    live = Watched()
    early = live.open()
    live.write(0, INBOUND, NOW_NS, frame(60))
    late = live.open()
    number = live.add_interface("vmnet:/run/vmnet.sock")
    assert number == live.add_interface("vmnet:/run/vmnet.sock")
    live.write(number, INBOUND, NOW_NS, frame(61))
    live.write(1, INBOUND, NOW_NS, frame(62))
    names = ["tap:netns=guest", "vmnet:/run/vmnet.sock", "qemu:/run/net.sock"]
    for reader, expected in ((early, names), (late, names[1:])):
        assert [line[0] for line in tshark(tmp_path, reader.take(), "frame.interface_name")] == expected


def test_each_reader_has_its_filter_and_snaplen() -> None:
    live = Watched()
    all_of_it = live.open()
    dns = live.open(compile_filter("port 53"), snaplen=64)
    for port in (53, 80, 53):
        live.write(0, INBOUND, NOW_NS, memoryview(frame(200, port)))
    assert frames(all_of_it.take()) == [frame(200, 53), frame(200, 80), frame(200, 53)]
    assert frames(dns.take()) == [frame(200, 53)[:64]] * 2
    assert dns.frames == 2


def test_a_reader_is_called_once_until_it_takes() -> None:
    live = Watched()
    calls: list[int] = []
    reader = live.open(compile_filter("port 53"), on_data=lambda: calls.append(1))
    live.write(0, INBOUND, NOW_NS, frame(60, 80))
    assert not calls, "nothing for it yet"
    live.write(0, INBOUND, NOW_NS, frame(60, 53))
    live.write(0, INBOUND, NOW_NS, frame(60, 53))
    assert len(calls) == 1
    assert len(frames(reader.take())) == 2
    live.write(0, INBOUND, NOW_NS, frame(60, 53))
    assert len(calls) == 2


# Who is slow.


def test_a_reader_that_does_not_take_loses_frames_and_knows_how_many(tmp_path: Path) -> None:
    live = Watched()
    slow, quick = live.open(limit=SMALLEST_LIMIT), live.open(limit=SMALLEST_LIMIT)
    taken = quick.take()
    for number in range(200):
        live.write(0, INBOUND, NOW_NS + number, frame(1000))
        taken += quick.take()
    assert quick.lost == 0 and len(frames(taken)) == 200
    kept = slow.frames
    assert 100 < kept < SMALLEST_LIMIT // 1000
    assert slow.lost == 200 - kept
    stream = slow.take()
    assert len(stream) <= SMALLEST_LIMIT
    assert frames(stream) == [frame(1000)] * kept
    live.write(1, INBOUND, NOW_NS, frame(70))  # of another link: it lost nothing there
    live.write(0, INBOUND, NOW_NS, frame(80))
    live.write(0, INBOUND, NOW_NS, frame(90))
    more = slow.take()
    assert more.count((4).to_bytes(2, "little") + (8).to_bytes(2, "little") + (200 - kept).to_bytes(8, "little")) == 1
    stream += more
    assert frames(stream)[kept:] == [frame(70), frame(80), frame(90)]
    said = report(tmp_path, stream + slow.statistics())
    assert f"Number of packets = {kept + 2}" in said and "Number of packets = 1" in said, said
    assert "Number of stat entries = 1" in said, said


def test_what_the_statistics_block_says() -> None:
    live = Watched()
    reader = live.open(compile_filter("port 53"), limit=SMALLEST_LIMIT)
    for _ in range(3):
        live.write(1, INBOUND, NOW_NS, frame(60_000, 53))
    live.write(1, INBOUND, NOW_NS, frame(60, 80))
    octets = reader.statistics()
    blocks = [octets[:64], octets[64:]]
    for number, block in enumerate(blocks):
        kind, length, interface, high, low = (int.from_bytes(block[at : at + 4], "little") for at in range(0, 20, 4))
        assert (kind, length, interface) == (5, 64, number) and block[-4:] == block[4:8]
        assert high << 32 | low == NOW_NS
    options = {blocks[1][at]: int.from_bytes(blocks[1][at + 4 : at + 12], "little") for at in (20, 32, 44)}
    assert options == {4: 4, 5: 1, 6: 3}, "isb_ifrecv, isb_ifdrop, isb_filteraccept"
    assert reader.lost == 1


def test_a_closed_reader_costs_nothing_and_keeps_what_it_has() -> None:
    live = Watched()
    reader = live.open()
    live.write(0, INBOUND, NOW_NS, frame())
    reader.close()
    reader.close()
    live.write(0, INBOUND, NOW_NS, frame())
    assert frames(reader.take()) == [frame()]
    assert live.switched == [True, False]


# Bounds and mistakes.


def test_there_is_a_limit_to_readers_and_taps_together() -> None:
    live = Watched()
    remove = live.tap(lambda frame, direction, time_ns: None)
    readers = [live.open() for _ in range(MAX_READERS - 1)]
    for refused in (live.open, lambda: live.tap(lambda frame, direction, time_ns: None)):
        with pytest.raises(ConfigError, match=f"{MAX_READERS} readers already; close one"):
            refused()
    remove()
    remove()
    readers.append(live.open())
    for reader in readers:
        assert live.switched == [True]
        reader.close()
    assert live.switched == [True, False] and not live


@pytest.mark.parametrize("numbers", [{"snaplen": 63}, {"snaplen": 262145}, {"limit": SMALLEST_LIMIT - 1}])
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, int]) -> None:
    live = Watched()
    with pytest.raises(ConfigError, match="64 to 262144 octets of each frame, and at least"):
        live.open(**numbers)
    assert live.switched == []


def test_a_super_frame_fits_into_the_smallest_buffer() -> None:
    live = Watched()
    reader = live.open(snaplen=262144, limit=SMALLEST_LIMIT)
    live.write(0, OUTBOUND, NOW_NS, bytes(65550))
    assert reader.lost == 0


def test_links_are_told_apart_by_name_up_to_a_limit() -> None:
    live = Watched()
    reader = live.open()
    numbers = [live.add_interface(f"unixgram:{number}") for number in range(1000)]
    assert max(numbers) == MAX_INTERFACES - 1 == numbers[-1]
    live.write(numbers[-1], INBOUND, NOW_NS, frame())
    stream = reader.take()
    assert frames(stream) == [frame()] and len(stream) < 100 * MAX_INTERFACES


def test_a_reader_that_fails_is_closed_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    live = Watched()

    def fail(*_anything: Any) -> None:
        raise ValueError("broken")

    good = live.open()
    bad = live.open(on_data=fail)
    live.tap(fail)
    live.write(0, INBOUND, NOW_NS, frame())
    live.write(0, INBOUND, NOW_NS, frame())
    assert frames(good.take()) == [frame()] * 2
    assert bad.closed and len(live) == 1 and live.failed == 2
    assert caplog.text.count("a reader of the live capture failed") == 1


def test_a_reader_may_close_when_it_is_called() -> None:
    live = Watched()
    reader = live.open(on_data=lambda: reader.close())
    live.write(0, INBOUND, NOW_NS, frame())
    live.write(0, INBOUND, NOW_NS, frame())
    assert reader.frames == 1 and live.switched == [True, False] and not live.failed


def test_a_tap_gets_frames_directions_and_times() -> None:
    live = Watched()
    seen: list[tuple[bytes, int, int]] = []
    remove = live.tap(lambda *what: seen.append(what))
    buffer = bytearray(frame())
    live.write(0, INBOUND, NOW_NS, memoryview(buffer))
    live.write(1, OUTBOUND, NOW_NS + 1, memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    remove()
    live.write(0, INBOUND, NOW_NS, frame())
    assert seen == [(frame(), INBOUND, NOW_NS), (frame(), OUTBOUND, NOW_NS + 1)]


# Around links that work.


def ways(drill: Drill) -> list[object]:
    """By what the port and the stack reach the link: bound methods are equal when object and function are."""
    port = drill.port
    ready: Any = drill.io.watched[drill.link.fileno()][0]
    held = dict(zip(ready.__code__.co_freevars, (cell.cell_contents for cell in ready.__closure__), strict=True))
    return [port.link, port._link_send, port._link_send_one, port._link_room, held["receive"], held["take"]]


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_wrapped_while_somebody_looks_and_plain_again_afterwards(kind: str) -> None:
    drill = Drill(link=kind)
    before = ways(drill)
    assert before[0] is drill.link
    first, second = drill.stack.live.open(), drill.stack.live.open()
    assert type(drill.port.link) is CaptureLink and drill.port.link.inner is drill.link
    assert not drill.port.has_room
    assert all(now != then for now, then in zip(ways(drill)[:2], before[:2], strict=True))
    assert getattr(ways(drill)[4], "__self__", None) is drill.port.link
    first.close()
    assert type(drill.port.link) is CaptureLink
    second.close()
    assert drill.port.link is drill.link
    assert ways(drill) == before


def packets_of(seen: list[bytes], destination: bytes, source: bytes) -> list[int]:
    """Octets of TCP payload, as the IP headers say (short frames are padded)."""
    ours = [one for one in seen if one[:12] == destination + source]
    return [int.from_bytes(one[16:18], "big") - 20 - (one[46] >> 4) * 4 for one in ours]


@pytest.mark.parametrize("kind", KINDS)
def test_a_transfer_goes_on_while_readers_come_and_go(kind: str) -> None:
    drill = Drill(link=kind)
    flow = drill.open(window=1 << 20)
    data = pattern(400_000)
    streams, position = [], 0
    assert flow.far is not None
    for step in range(8):
        reader = drill.stack.live.open(compile_filter("tcp")) if step & 1 else None
        part = data[position : position + 50_000]
        position += 50_000
        flow.far.send(part)
        assert drill.transfer(flow, len(part)) == part
        for at in range(0, 3000, 1000):
            drill.guest(flow, "P.", data=pattern(3000, step)[at : at + 1000])
        drill.collect(flow)
        if reader is not None:
            seen = frames(reader.take())
            reader.close()
            to_guest = sum(packets_of(seen, GUEST_MAC, GATEWAY_MAC))
            from_guest = sum(packets_of(seen, GATEWAY_MAC, GUEST_MAC))
            assert (to_guest, from_guest) == (50_000, 3000)
            streams.append(seen)
    assert bytes(flow.received) == data and len(streams) == 4
    assert flow.far.received == b"".join(pattern(3000, step) for step in range(8))


def test_a_link_attached_while_somebody_looks_is_seen_and_given_back_as_it_came() -> None:
    drill = Drill()
    reader = drill.stack.live.open()
    gone: list[object] = []
    drill.stack.on_detached = lambda link, reason: gone.append(link)
    link = make_link("vnet", 1500)
    link.name = "memory:late"
    drill.io.adopt(link)
    port = drill.stack.attach(link)
    link.feed(frame())
    drill.settle()
    assert type(port.link) is CaptureLink
    assert frame() in frames(reader.take())
    drill.stack.detach(port, "wanted")
    assert gone == [link] and link.closed
    reader.close()
    assert drill.port.link is drill.link, "the other one is plain again"


def test_a_link_that_goes_down_while_somebody_looks() -> None:
    drill = Drill()
    reader = drill.stack.live.open()
    gone: list[object] = []
    drill.stack.on_detached = lambda link, reason: gone.append(link)
    drill.link.down = "the peer is gone"
    drill.settle()
    assert gone == [drill.link] and not drill.stack.switch.ports
    reader.close()
    assert not drill.stack._plain


def test_a_capture_file_goes_on_beside_a_reader(tmp_path: Path) -> None:
    writer = PcapWriter(str(tmp_path / "all.pcapng"))
    drill = Drill()
    link = make_link("plain", 1500)
    drill.io.adopt(link)
    given = CaptureLink(link, writer)
    port = drill.stack.attach(given)
    reader = drill.stack.live.open()
    link.feed(frame())
    drill.settle()
    reader.close()
    assert port.link is given
    link.feed(frame(61))
    drill.settle()
    writer.close()
    with (tmp_path / "all.pcapng").open("rb") as file:
        written = [octets for _, octets in dpkt.pcapng.Reader(file)]
    assert frame() in written and frame(61) in written
    seen = frames(reader.take())
    assert frame() in seen and frame(61) not in seen


def test_a_congested_link_stays_congested_and_recovers() -> None:
    drill = Drill()
    flow = drill.open(window=1 << 20)
    assert flow.far is not None
    drill.link.room = 0
    flow.far.send(pattern(30_000))
    drill.settle()
    assert drill.port.congested
    reader = drill.stack.live.open()
    drill.settle()
    assert drill.port.congested
    reader.close()
    drill.link.room = None
    drill.advance(0.1)
    assert drill.transfer(flow, 30_000) == pattern(30_000)


def test_closing_the_stack_closes_readers() -> None:
    drill = Drill()
    reader = drill.stack.live.open()
    drill.stack.close()
    assert reader.closed and not drill.stack.live
    assert drill.link.closed


class Looking(RuleBasedStateMachine):
    """Readers, taps and links come and go in any order while guests speak; who looks sees what happens meanwhile, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.drill = Drill()
        self.stack = self.drill.stack
        self.links: dict[Any, Any] = {self.drill.port: self.drill.link}
        self.given_back: list[object] = []
        self.stack.on_detached = lambda link, reason: self.given_back.append(link)
        self.readers: list[tuple[Any, list[bytes]]] = []
        self.taps: list[tuple[Any, list[bytes], list[bytes]]] = []
        self.count = 0

    def teardown(self) -> None:
        assert not self.stack.counters.contained and not self.stack.live.failed
        self.stack.close()

    @rule(closes_itself=st.booleans())
    def open(self, closes_itself: bool) -> None:
        if len(self.stack.live) == MAX_READERS:
            return
        reader: Any = None

        def on_data() -> None:
            if closes_itself:
                reader.close()

        reader = self.stack.live.open(on_data=on_data)
        if not closes_itself:
            self.readers.append((reader, []))

    @rule()
    def tap(self) -> None:
        if len(self.stack.live) < MAX_READERS:
            got: list[bytes] = []
            remove = self.stack.live.tap(lambda octets, direction, time_ns: got.append(octets))
            self.taps.append((remove, got, []))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        reader, expected = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        reader.close()
        assert [one for one in frames(reader.take()) if one in expected] == expected

    @precondition(lambda self: self.taps)
    @rule()
    def untap(self) -> None:
        remove, got, expected = self.taps.pop()
        remove()
        assert [one for one in got if one in expected] == expected

    @precondition(lambda self: len(self.links) < 4)
    @rule(kind=st.sampled_from(("plain", "vnet")))
    def attach(self, kind: str) -> None:
        link = make_link(kind, 1500)
        link.name = f"memory:{len(self.links)}"
        self.drill.io.adopt(link)
        self.links[self.stack.attach(link)] = link

    @precondition(lambda self: self.links)
    @rule(data=st.data(), down=st.booleans())
    def lose(self, data: st.DataObject, down: bool) -> None:
        port = data.draw(st.sampled_from(list(self.links)))
        link = self.links.pop(port)
        if down:
            link.down = "gone"
            self.drill.settle()
        else:
            self.stack.detach(port, "wanted")
        assert self.given_back[-1] is link

    @precondition(lambda self: self.links)
    @rule(data=st.data(), number=st.integers(1, 5))
    def speak(self, data: st.DataObject, number: int) -> None:
        link = self.links[data.draw(st.sampled_from(list(self.links)))]
        for _ in range(number):
            self.count += 1
            link.feed(frame(100 + self.count % 1000, self.count))
            for _, expected in self.readers:
                expected.append(frame(100 + self.count % 1000, self.count))
            for _, _, expected in self.taps:
                expected.append(frame(100 + self.count % 1000, self.count))
        self.drill.settle()

    @invariant()
    def links_are_wrapped_while_somebody_looks(self) -> None:
        for port, link in self.links.items():
            assert port in self.stack.switch.ports
            if self.stack.live:
                assert type(port.link) is CaptureLink and port.link.inner is link
            else:
                assert port.link is link
        assert set(self.stack._plain) == (set(self.links) if self.stack.live else set())


Looking.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLooking = Looking.TestCase
