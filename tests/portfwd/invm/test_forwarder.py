"""The forwarder as a process, with a host of each generation played octet by octet (spec vpnkit 7.3, 7.9, 9.3 "proxies")."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.portfwd.invm import servers
from tests.portfwd.invm.played import LIMIT_S, Tool, until
from tests.portfwd.invm.played_data import MAGIC, Host, Mux, Raw, connected, destination, record
from tests.portfwd.invm.servers import served, udp_echo

Start = Callable[..., Tool]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data.sock"


@pytest.fixture
def forwarder(start: Start, data: Path) -> Tool:
    return start("forwarder", "-data-listen", data)


@pytest.fixture(params=[1, 2, 3], ids=["gen1", "gen2", "gen3"])
def host(request: pytest.FixtureRequest, forwarder: Tool, data: Path) -> Iterator[Host]:
    made = Host(data, request.param)
    yield made
    made.close()


def listener(family: int = socket.AF_INET) -> socket.socket:
    return socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family)


def descriptors(tool: Tool) -> int:
    return len(os.listdir(f"/proc/{tool.process.pid}/fd"))


@pytest.mark.parametrize("mapped", [False, True], ids=["ipv4", "ipv4-in-16"])
def test_tcp_goes_both_ways(host: Host, mapped: bool) -> None:
    server = listener()
    with served(server, servers.echo):
        flow = host.open(destination("tcp", *server.getsockname(), mapped=mapped))
        big = bytes(range(256)) * 4096
        for octets in (b"x", b"hello world", big[: 50 * 1024]):
            flow.send(octets)
            assert flow.read(len(octets)) == octets
        for at in range(0, len(big), 32768):  # a window never fills
            flow.send(big[at : at + 32768])
            assert flow.read(32768) == big[at : at + 32768]
        flow.shutdown()
        assert flow.read_all() == b""
        flow.close()


def test_ipv6_targets(host: Host) -> None:
    server = listener(socket.AF_INET6)
    with served(server, servers.echo):
        flow = host.open(destination("tcp", *server.getsockname()[:2]))
        flow.send(b"six")
        assert flow.read(3) == b"six"
        flow.close()


def test_unix_targets(host: Host, tmp_path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "target"))
    server.listen()
    with served(server, servers.answer_at_the_end):
        flow = host.open(destination("unix", str(tmp_path / "target")))
        flow.send(b"12345")
        flow.shutdown()
        assert flow.read_all() == b"got 5"
        flow.close()


def test_half_close_reaches_the_target_and_the_answer_comes_back(host: Host) -> None:
    server = listener()
    with served(server, servers.answer_at_the_end):
        flow = host.open(destination("tcp", *server.getsockname()))
        flow.send(b"x" * 300_000)
        flow.shutdown()
        assert flow.read_all() == b"got 300000"
        flow.close()


def test_half_close_of_the_target_leaves_the_other_way_open(host: Host) -> None:
    server = listener()
    servers.heard.clear()
    with served(server, servers.end_first):
        flow = host.open(destination("tcp", *server.getsockname()))
        assert flow.read_all() == b"bye"
        flow.send(b"still here")
        flow.shutdown()
        flow.close()
    assert servers.heard == [b"still here"]


def test_a_refusal_ends_that_flow_alone(host: Host) -> None:
    with listener() as gone:
        nobody = destination("tcp", *gone.getsockname())
    server = listener()
    with served(server, servers.echo):
        good = host.open(destination("tcp", *server.getsockname()))
        good.send(b"1")
        assert good.read(1) == b"1"
        for target in (nobody, destination("unix", "/" + "x" * 200), nobody):
            refused = host.open(target)
            assert refused.refused()
            refused.close()
        good.send(b"2")
        assert good.read(1) == b"2"
        good.close()


def test_many_flows_at_once(host: Host) -> None:
    server = listener()
    with served(server, servers.echo):
        flows = [host.open(destination("tcp", *server.getsockname())) for _ in range(50)]
        for number, flow in enumerate(flows):
            flow.send(b"%05d" % number)
        for number, flow in reversed(list(enumerate(flows))):
            assert flow.read(5) == b"%05d" % number
        for flow in flows:
            flow.close()


UDP_SIZES = [
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    511,
    512,
    1023,
    1024,
    1471,
    1472,
    1473,
    2048,
    4096,
    8192,
]
UDP_SIZES += [9215, 9216, 65507, 0]


def test_udp_echoes_of_each_size_come_back_with_the_clients_address(host: Host) -> None:
    with udp_echo() as port:
        flow = host.open(destination("udp", "127.0.0.1", port))
        client = ("", 0) if host.generation == 3 else ("192.0.2.7", 4567)
        for size in UDP_SIZES:
            said = record(bytes(i & 0xFF for i in range(size)), *client)
            flow.send(said)
            assert flow.read(len(said)) == said, f"{size} octets"
        flow.close()


def test_udp_clients_are_told_apart_by_their_addresses(forwarder: Tool, data: Path) -> None:
    """Generations 1 and 2 have one channel for all clients of a forward."""
    for generation in (1, 2):
        host = Host(data, generation)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(LIMIT_S)
            flow = host.open(destination("udp", *server.getsockname()))
            said = [record(b"%d" % number, "198.51.100.1", 1000 + number) for number in range(3)]
            said.append(record(b"3", "2001:db8::1", 1000))
            flow.send(b"".join(said))
            peers = {octets: peer for octets, peer in (server.recvfrom(10) for _ in said)}
            assert len(set(peers.values())) == 4, "a socket for each client"
            for octets in (b"2", b"0", b"3", b"1"):
                server.sendto(octets, peers[octets])
                assert flow.read(len(said[int(octets)])) == said[int(octets)]
        host.close()


def test_a_udp_server_that_comes_later_is_reached(host: Host) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flow = host.open(destination("udp", "127.0.0.1", port))
    for _ in range(5):
        flow.send(record(b"too early"))
        time.sleep(0.02)  # so that the kernel reports each refusal
    with udp_echo(port=port):
        flow.send(record(b"now"))
        assert flow.read(len(record(b"now"))) == record(b"now")
    flow.close()


@pytest.mark.parametrize(
    "nonsense",
    [bytes(10), b"\xff" * 65535, struct.pack("<HH", 40, 5) + bytes(36), struct.pack("<HHHHH", 12, 0, 0, 0, 9) + b"xx"],
    ids=["no length", "no end", "a long address", "lengths that disagree"],
)
def test_a_broken_record_ends_that_channel_alone(host: Host, nonsense: bytes) -> None:
    with udp_echo() as port:
        target = destination("udp", "127.0.0.1", port)
        good, bad = host.open(target), host.open(target)
        bad.send(nonsense)
        assert bad.refused()
        bad.close()
        good.send(record(b"x"))
        assert good.read(len(record(b"x"))) == record(b"x")
        good.close()


def test_two_thousand_flows_leave_nothing(forwarder: Tool, data: Path) -> None:
    server = listener()
    with served(server, servers.echo), udp_echo() as port:
        before = None
        for generation, count in ((3, 2000), (1, 500), (2, 500)):
            host = Host(data, generation)
            for number in range(count):
                if number % 4 == 3:
                    said = record(b"x")
                    flow = host.open(destination("udp", "127.0.0.1", port))
                else:
                    said = b"x"
                    flow = host.open(destination("tcp", *server.getsockname()))
                if number % 4:  # others are given up before anything was said
                    flow.send(said)
                    assert flow.read(len(said)) == said
                flow.close()
                if before is None:
                    before = descriptors(forwarder) - 1  # without the data connection
            host.close()
        until(lambda: before is not None and descriptors(forwarder) <= before)


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x01\x05\x00aaaaaaaa",
        b"\x09\x04\x00\x7f\x00\x00\x01\x00\x00",
        b"https://example.com/ is not the magic of anybody, far from it",
        b"\x0f\x00\x09" + bytes(12),
        b"\xff\xff\xff\xff",
    ],
)
def test_who_speaks_something_else_is_hung_up_on_and_harms_nobody(
    forwarder: Tool, data: Path, beginning: bytes
) -> None:
    server = listener()
    with served(server, servers.echo):
        good = Mux(connected(data), 3)
        flow = good.open(destination("tcp", *server.getsockname()))
        with connected(data) as bad:
            bad.sendall(beginning)
            try:
                while bad.recv(4096):
                    pass
            except ConnectionResetError:
                pass
        flow.send(b"x")
        assert flow.read(1) == b"x"
        good.sock.close()


def test_a_port_probe_is_quiet(forwarder: Tool, data: Path) -> None:
    connected(data).close()
    Mux(connected(data), 3).sock.close()
    status, _, said = forwarder.end()
    assert status == 0
    assert "WARNING" not in said


def test_when_the_data_connection_breaks_targets_hear_it(forwarder: Tool, data: Path) -> None:
    with listener() as server:
        for generation in (1, 2, 3):
            host = Host(data, generation)
            flow = host.open(destination("tcp", *server.getsockname()))
            target, _ = server.accept()
            with target:
                target.settimeout(LIMIT_S)
                flow.send(b"x")
                assert target.recv(1) == b"x"
                host.close()
                try:
                    assert target.recv(1) == b""
                except ConnectionResetError:
                    pass


def test_signals_end_it_and_its_socket_goes(start: Start, data: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        tool = start("forwarder", "-data-listen", data)
        connected(data).close()
        assert tool.end(number)[0] == 0
        assert not data.exists()


def test_sighup_writes_a_status_file(start: Start, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tool = start("forwarder", "-data-listen", data)
    server = listener()
    with served(server, servers.echo):
        mux = Mux(connected(data), 3)
        flow = mux.open(destination("tcp", *server.getsockname()))
        flow.send(b"x")
        flow.read(1)
        tool.process.send_signal(signal.SIGHUP)
        tool.stderr_until("status is in")
        (path,) = tmp_path.glob("pyvpnkit-forwarder-*.status")
        text = path.read_text()
        assert '"flows": 1' in text and '"generation": 3' in text and "Open" in text
        assert path.stat().st_mode & 0o777 == 0o600
        mux.sock.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give -data-listen ADDRESS or -data-connect ADDRESS"),
        (["-data-listen", "tcp:x:1"], "no IP address"),
        (["-data-listen", "s", "-generation", "4"], "none of 1, 2, 3 and auto"),
        (["-data-lisen", "s"], "unknown flag -data-lisen"),
        (["-debug", "s"], "'s' is no flag"),
        (["-data-listen", "s", "-control-listen", "tcp:0.0.0.0:80"], "whoever reaches it opens ports"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(start: Start, arguments: list[str], says: str) -> None:
    status, _, said = start("forwarder", *arguments).result()
    assert status == 2 and says in said


def test_what_is_in_the_way_is_said(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    status, _, said = start("forwarder", "-data-listen", "file").result()
    assert status == 1 and "only a socket is replaced" in said


def accepted(server: socket.socket) -> socket.socket:
    sock, _ = server.accept()
    sock.settimeout(LIMIT_S)
    return sock


@pytest.mark.parametrize("generation", [2, 3])
def test_data_connect_dials_the_host_until_it_is_there_and_again_when_it_went(
    start: Start, tmp_path: Path, generation: int
) -> None:
    path = tmp_path / "host.sock"
    tool = start("forwarder", "-data-connect", path, "-generation", str(generation))
    tool.stderr_until("trying every 1 s")
    target = listener()
    with served(target, servers.echo), socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.bind(str(path))
        host.listen()
        for _ in range(2):
            mux = Mux(accepted(host), generation)
            flow = mux.open(destination("tcp", *target.getsockname()))
            flow.send(b"x")
            assert flow.read(1) == b"x"
            mux.sock.close()
    status, _, said = tool.end()
    assert status == 0
    assert said.count("cannot connect") <= 2, "one line in 30 s, and one after it was connected"


def test_data_connect_waits_for_the_hosts_word_where_asked_to(start: Start, tmp_path: Path) -> None:
    target = listener()
    with served(target, servers.echo), socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.bind(str(tmp_path / "host.sock"))
        host.listen()
        start("forwarder", "--data-connect=host.sock", "--generation=auto")
        for generation in (1, 2, 3):
            sock = accepted(host)
            if generation == 1:
                raw = Raw(sock, destination("tcp", *target.getsockname()))
                raw.send(b"x")
                assert raw.read(1) == b"x"
            else:
                flow = Mux(sock, generation).open(destination("tcp", *target.getsockname()))
                flow.send(b"x")
                assert flow.read(1) == b"x"
            sock.close()


def test_an_inherited_connection_is_served_and_its_end_is_the_end(start: Start) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            tool = start("forwarder", "-data-connect", "fd:4", listening=theirs)
        ours.settimeout(LIMIT_S)
        Mux(ours, 3)
    assert tool.result()[0] == 0


def test_a_host_that_hangs_up_again_and_again_does_not_fill_the_log(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.bind(str(tmp_path / "host.sock"))
        host.listen()
        tool = start("forwarder", "-data-connect", "host.sock")
        for _ in range(4):
            accepted(host).close()
        said = tool.end()[2]
    assert said.count(" connected to the host") == 1 and said.count("the connection to the host") == 1
    assert said.count("a data connection ended") <= 1


def test_it_runs_without_uvloop(start: Start, data: Path, tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError\n")  # found first: `-m` looks in the current directory
    tool = start("forwarder", "-data-listen", data)
    target = listener()
    with served(target, servers.echo), udp_echo() as port:
        mux = Mux(connected(data), 3)
        maps = Path(f"/proc/{tool.process.pid}/maps").read_text()
        assert "uvloop" not in maps
        flow = mux.open(destination("tcp", *target.getsockname()))
        flow.send(b"x" * 200_000)
        assert flow.read(200_000) == b"x" * 200_000
        datagrams = mux.open(destination("udp", "127.0.0.1", port))
        datagrams.send(record(b"x"))
        assert datagrams.read(len(record(b"x"))) == record(b"x")
        mux.sock.close()
    assert tool.end()[0] == 0


def test_both_doors_at_once(start: Start, data: Path, tmp_path: Path) -> None:
    target = listener()
    with served(target, servers.echo), socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.bind(str(tmp_path / "host.sock"))
        host.listen()
        start("forwarder", "-data-listen", data, "-data-connect", "host.sock")
        for mux in (Mux(connected(data), 2), Mux(accepted(host), 3)):
            flow = mux.open(destination("tcp", *target.getsockname()))
            flow.send(b"x")
            assert flow.read(1) == b"x"
            mux.sock.close()


def exactly(sock: socket.socket, octets: int) -> bytes:
    found = b""
    while len(found) < octets:
        more = sock.recv(octets - len(found))
        assert more
        found += more
    return found


def test_golden_octets_of_generation_2(forwarder: Tool, data: Path) -> None:
    """What goes over the wire for one flow, from the first octet to the last."""
    server = listener()
    with served(server, servers.echo), connected(data) as sock:
        port = struct.pack("<H", server.getsockname()[1])
        sock.sendall(bytes.fromhex("1100 01 04000000 02 01 0400 7f000001") + port)
        sock.sendall(bytes.fromhex("0f00 05 04000000 0000010000000000"))
        expected = bytes.fromhex("0f00 05 04000000")
        window = exactly(sock, 15)
        assert window[:7] == expected and struct.unpack("<Q", window[7:])[0] >= 65536
        sock.sendall(bytes.fromhex("0b00 04 04000000 02000000") + b"hi")
        assert exactly(sock, 13) == bytes.fromhex("0b00 04 04000000 02000000") + b"hi"
        sock.sendall(bytes.fromhex("0700 03 04000000"))
        assert exactly(sock, 14) == bytes.fromhex("0700 03 04000000 0700 02 04000000")
        sock.sendall(bytes.fromhex("0700 02 04000000"))


def test_generation_3_greets_at_once_when_it_was_greeted(forwarder: Tool, data: Path) -> None:
    with connected(data) as sock:
        sock.sendall(MAGIC)
        assert exactly(sock, 54) == MAGIC
