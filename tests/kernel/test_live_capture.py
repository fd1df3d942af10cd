"""Looking on while a kernel guest works: live captures that come and go under traffic, and flows ended by hand.

The stack runs in a thread of the test's own process that has entered the host's namespace, so that readers can be opened in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from netstack.api import Link
from netstack.flow.records import FlowRecord
from netstack.link.capture import CaptureLink
from netstack.link.devices import open_device
from netstack.link.spec import LinkSpec
from netstack.link.stream import QemuLink
from netstack.observe.filter import compile_filter
from netstack.observe.live import SMALLEST_LIMIT, Reader
from netstack.observe.pcap import PcapWriter
from netstack.settings import Network
from netstack.stack import Stack
from tests.support.netns import HOST, Namespace, World, inside, wait_until
from tests.support.webhost import MB, content, serve, web

pytestmark = pytest.mark.netns

T = TypeVar("T")


class Here:
    """A stack in a thread that is in `place`. `call` runs a function there, between two turns."""

    def __init__(self, place: Namespace) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._wake, self._waker = socket.socketpair()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(place,))
        self._ready: Future[Stack] = Future()
        self._thread.start()
        self.stack = self._ready.result(20)

    def _run(self, place: Namespace) -> None:
        with inside(place.path):
            stack = Stack(Network())
            self._ready.set_result(stack)
            while not self._ended:
                deadline = stack.deadline()
                wait_s = 1.0 if deadline is None else min(max(deadline - stack.clock(), 0.0), 1.0)
                if select.select([stack.fileno(), self._wake], [], [], wait_s)[0].count(self._wake):
                    self._wake.recv(4096)
                with contextlib.suppress(queue.Empty):
                    while True:
                        function, future = self._calls.get_nowait()
                        try:
                            future.set_result(function())
                        except BaseException as error:
                            future.set_exception(error)
                while stack.turn():
                    pass
            stack.close()

    def call(self, function: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._calls.put((function, future))
        self._waker.send(b"!")
        return future.result(30)

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._waker.send(b"!")
            self._thread.join(30)
            self._wake.close()
            self._waker.close()


def _device(url: str) -> Callable[[World, Namespace], Link]:
    return lambda world, guest: open_device(LinkSpec.parse(url.format(guest.name)), 1500)


def _qemu(world: World, guest: Namespace) -> Link:
    ours, theirs = socket.socketpair()
    with theirs:
        world.relay(guest, f"fd:{theirs.fileno()}", pass_fds=[theirs.fileno()])
    return QemuLink(ours, "qemu:test", 1500)


LINKS: dict[str, Callable[[World, Namespace], Link]] = {
    "tap": _device("tap:netns={}"),
    "tap-offload-off": _device("tap:netns={},offload=off"),
    "packet": _device("packet:netns={}"),
    "qemu": _qemu,
}


class Place:
    def __init__(self, world: World, kind: str) -> None:
        self.world = world
        self.guest = world.namespace()
        self.here = Here(world.host)
        self.stack = self.here.stack
        world.defer(self.here.close)
        self.link = LINKS[kind](world, self.guest)
        self.port = self.here.call(lambda: self.stack.attach(self.link))
        assert self.guest.udhcpc() == "192.168.65.3"

    def open(self, text: str = "", **options: Any) -> Reader:
        return self.here.call(lambda: self.stack.live.open(compile_filter(text), **options))

    def close(self, reader: Reader) -> bytes:
        def end() -> bytes:
            reader.close()
            return reader.take() + reader.statistics()

        return self.here.call(end)

    def flows(self) -> list[FlowRecord]:
        return self.here.call(self.stack.flow_table)

    @contextlib.contextmanager
    def download(self) -> Iterator[int]:
        """Octets flow to the guest as long as this lasts, from the port it yields, and arrive whole."""
        enough = threading.Event()
        sent, received = hashlib.sha256(), hashlib.sha256()
        count = 0

        def pour(connection: socket.socket) -> None:
            part = content(64 << 10)
            while not enough.wait(0.001):  # the stack's thread shares this interpreter
                connection.sendall(part)
                sent.update(part)

        def drink(sock: socket.socket) -> None:
            nonlocal count
            while octets := sock.recv(MB):
                received.update(octets)
                count += len(octets)

        with serve(self.world.host.listen(), pour) as (_, port), self.guest.connect(HOST, port) as sock:
            thread = threading.Thread(target=drink, args=(sock,))
            thread.start()
            try:
                wait_until(lambda: count > MB)
                yield port
                before = count
                wait_until(lambda: count > before + MB)
            finally:
                enough.set()
                thread.join(60)
        assert received.digest() == sent.digest()


@pytest.fixture
def place(fresh: World, request: pytest.FixtureRequest) -> Place:
    return Place(fresh, getattr(request, "param", "tap"))


EACH = pytest.mark.parametrize("place", LINKS, indirect=True)


def tshark(path: Path, stream: bytes, *fields: str) -> list[tuple[str, ...]]:
    program = shutil.which("tshark")
    assert program is not None, "not installed: tshark (packages.txt, `make packages`)"
    path.write_bytes(stream)
    options = [part for field in fields for part in ("-e", field)]
    words = [program, "-n", "-r", str(path), "-T", "fields", *options]
    out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    return [tuple(line.split("\t")) for line in out.stdout.splitlines()]


@EACH
def test_a_reader_in_the_middle_of_traffic_sees_what_its_filter_lets_through(place: Place, tmp_path: Path) -> None:
    plain = place.port.link
    ways = [place.port._link_send, place.port._link_room, place.port.publish]
    with web(place.world.host) as quiet:
        with place.download() as busy:
            everything = place.open(limit=MB, snaplen=96)
            pings = place.open("icmp")
            narrow = place.open(f"host {HOST} and tcp port {quiet} or arp")
            assert type(place.port.link) is CaptureLink
            done = place.guest.run(
                "curl", "-sS", "-o", "/dev/null", "-w", "%{size_download}", f"http://{HOST}:{quiet}/20000"
            )
            assert done.stdout == "20000"
            wait_until(lambda: place.here.call(lambda: everything.frames) > 200)
            place.guest.run("ping", "-c", "1", "-W", "5", "192.168.65.1")
            stream, icmp, all_of_it = place.close(narrow), place.close(pings), place.close(everything)
            assert place.port.link is plain
            assert [place.port._link_send, place.port._link_room, place.port.publish] == ways
    lines = tshark(
        tmp_path / "narrow.pcapng", stream, "frame.protocols", "tcp.port", "http.request.uri", "http.response.code"
    )
    tcp = [line for line in lines if ":tcp" in line[0]]
    assert tcp and all(str(quiet) in line[1].split(",") for line in tcp)
    assert {line[2] for line in lines} >= {"/20000"} and {line[3] for line in lines} >= {"200"}
    assert all(":tcp" in line[0] or ":arp" in line[0] for line in lines)
    assert narrow.lost == 0
    assert {line[0] for line in tshark(tmp_path / "icmp.pcapng", icmp, "icmp.type")} == {"8", "0"}
    lines = tshark(tmp_path / "all.pcapng", all_of_it, "tcp.port", "frame.packet_flags_direction")
    assert str(busy) in {port for line in lines for port in line[0].split(",")}
    assert {int(line[1], 0) for line in lines} == {1, 2}


@EACH
def test_a_reader_that_never_takes_loses_frames_and_the_traffic_goes_on(place: Place, tmp_path: Path) -> None:
    with place.download():
        stuck = place.open(limit=SMALLEST_LIMIT)
        wait_until(lambda: place.here.call(lambda: stuck.lost) > 100)
    stream = place.close(stuck)
    assert len(stream) < SMALLEST_LIMIT + 1000
    (counts,) = place_counts(stuck)
    assert counts == (stuck.frames + stuck.lost, stuck.lost)
    assert len(tshark(tmp_path / "stuck.pcapng", stream, "frame.len")) == stuck.frames


def place_counts(reader: Reader) -> list[tuple[int, int]]:
    """isb_ifrecv and isb_ifdrop of each interface."""
    blocks = reader.statistics()
    found = []
    for at in range(0, len(blocks), 64):
        numbers = [int.from_bytes(blocks[at + begin : at + begin + 8], "little") for begin in (24, 36)]
        found.append((numbers[0], numbers[1]))
    return found


def test_a_reader_that_takes_as_it_comes_loses_nothing(place: Place, tmp_path: Path) -> None:
    """A whole transfer, put together again from what was captured."""
    more = threading.Event()
    with web(place.world.host) as port:
        reader = place.open(f"tcp src port {port}", on_data=more.set, limit=64 * MB)
        curl = place.guest.start("curl", "-sS", "-o", "/dev/null", f"http://{HOST}:{port}/{20 * MB}")
        stream = b""
        while curl.poll() is None:
            if more.wait(0.05):
                more.clear()
                stream += place.here.call(reader.take)
        stream += place.close(reader)
    assert reader.lost == 0
    lines = tshark(tmp_path / "whole.pcapng", stream, "tcp.seq", "tcp.len")
    octets = max(int(seq) + int(length) for seq, length in lines) - 1
    assert octets >= 20 * MB
    covered, right = 0, 1
    for seq, length in sorted((int(seq), int(length)) for seq, length in lines if int(length)):
        assert seq <= right, "a hole"
        covered += max(seq + length - right, 0)
        right = max(right, seq + length)
    assert covered == octets


def test_a_capture_file_and_a_reader_see_the_same(fresh: World, tmp_path: Path) -> None:
    guest = fresh.namespace()
    here = Here(fresh.host)
    fresh.defer(here.close)
    writer = PcapWriter(str(tmp_path / "file.pcapng"))
    given = CaptureLink(LINKS["tap"](fresh, guest), writer)
    port = here.call(lambda: here.stack.attach(given))
    guest.udhcpc()
    reader = here.call(lambda: here.stack.live.open(compile_filter("icmp")))
    guest.run("ping", "-c", "3", "-i", "0.2", "-W", "5", "192.168.65.1")
    stream = here.call(lambda: (reader.close(), reader.take())[1])
    assert port.link is given
    guest.run("ping", "-c", "2", "-i", "0.2", "-W", "5", "192.168.65.1")
    here.close()
    writer.close()
    assert len(tshark(tmp_path / "live.pcapng", stream, "icmp.seq")) == 6
    path = tmp_path / "file.pcapng"
    assert len([line for line in tshark(path, path.read_bytes(), "icmp.seq") if line[0]]) == 10


@EACH
def test_a_flow_that_is_reset_by_hand_is_reset_for_both_ends(place: Place) -> None:
    ended: list[BaseException | None] = []
    peers: list[str] = []
    go_on = threading.Event()

    def pour(connection: socket.socket) -> None:
        peers.append("{}:{}".format(*connection.getpeername()))
        try:
            if connection.recv(3) == b"one":
                while True:
                    connection.sendall(content(MB))
            go_on.wait(20)
            connection.sendall(b"still here")
        except OSError as error:
            ended.append(error)

    with serve(place.world.host.listen(), pour) as (_, port):
        with place.guest.connect(HOST, port) as sock, place.guest.connect(HOST, port) as other:
            sock.sendall(b"one")
            other.sendall(b"two")
            sock.recv(MB)
            name = "{}:{}".format(*sock.getsockname())
            wait_until(lambda: len(peers) == 2)
            (record,) = [each for each in place.flows() if each.guest == name]
            assert (record.protocol, record.direction, record.state) == ("tcp", "outbound", "ESTABLISHED")
            assert (record.remote, record.host_remote) == (f"{HOST}:{port}", f"127.0.0.1:{port}")
            assert record.host_local in peers
            assert record.octets_outbound == 3 and record.octets_inbound > 0
            assert place.here.call(lambda: place.stack.reset_flow(record.id))
            with pytest.raises(ConnectionResetError):
                while sock.recv(MB):
                    pass
            wait_until(lambda: bool(ended))
            assert isinstance(ended[0], ConnectionResetError | BrokenPipeError)
            assert [each.id for each in place.flows() if each.guest == name] == []
            go_on.set()
            assert other.recv(100) == b"still here"


def test_the_lease_table_and_the_switchs_table_say_where_the_guest_is(place: Place) -> None:
    mac = place.guest.ip("-o", "link", "show", "eth0").partition("link/ether ")[2].split()[0]
    (lease,) = place.here.call(place.stack.lease_table)
    assert (lease.address, lease.mac, lease.static, lease.link) == ("192.168.65.3", mac, False, place.link.name)
    assert lease.expires_in_s is not None and 86300 < lease.expires_in_s <= 86400
    assert place.here.call(place.stack.cam)[mac] == place.port.number
    place.here.call(
        lambda: place.stack.leases.add_static(bytes.fromhex(mac.replace(":", "")), bytes((192, 168, 65, 99)))
    )
    assert place.guest.udhcpc() == "192.168.65.99"


def test_a_link_that_goes_away_under_a_reader(place: Place) -> None:
    reader = place.open()
    place.guest.ip("link", "delete", "eth0")
    wait_until(lambda: place.here.call(lambda: not place.stack.switch.ports))
    stream = place.close(reader)
    assert stream and not place.here.call(lambda: len(place.stack.live))
