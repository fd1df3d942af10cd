"""`pyvpnkit run` as a guest, a parent process and an administrator see it, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.roof.guest import GATEWAY, HOST, Daemon, StreamGuest, daemon, wait_until
from tests.support import packets


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path) as made:
        yield made


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_who_starts_it_may_have_closed_the_standard_descriptors(tmp_path: Path, closed: str) -> None:
    link = tmp_path / "net.sock"
    words = [sys.executable, "-m", "pyvpnkit", "run", "--link", f"qemu:{link}", "--state-dir", "off"]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *words], cwd=Path(__file__).parents[2])
    try:
        wait_until(link.exists)
        with contextlib.closing(StreamGuest(str(link))) as guest:
            assert socket.inet_ntoa(guest.lease()) == "192.168.65.3"
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A host server that accepts, sends without end, and never reads."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            accepted.append(connection)
            connection.setblocking(False)
            try:
                connection.send(bytes(65536))
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    for connection in accepted:
        connection.close()


def test_a_guest_gets_a_lease_and_ping_and_the_daemon_stops_cleanly(running: Daemon) -> None:
    guest = StreamGuest(running.link)
    assert socket.inet_ntoa(guest.lease()) == "192.168.65.3"
    guest.send_ip(GATEWAY, packets.ICMP, packets.echo(7, 1, b"hello"))
    assert next(guest.packets(packets.ICMP)).payload[8:] == b"hello"
    assert running.stop() == 0
    assert not os.path.exists(running.link), "the socket is removed"
    assert list(guest.frames()) is not None, "the link is closed"
    guest.close()


def test_the_first_offer_comes_half_a_second_after_exec(tmp_path: Path) -> None:
    """The best of up to eight, since the machine may be busy with something else."""
    took = []
    while len(took) < 8 and min(took, default=1.0) > 0.5:
        directory = tmp_path / str(len(took))
        directory.mkdir()
        began = time.monotonic()
        made = Daemon(directory)
        try:
            wait_until(lambda path=made.link: os.path.exists(path))
            guest = StreamGuest(made.link)
            guest.discover()
            took.append(time.monotonic() - began)
            guest.close()
            made.wait_ready()
            assert made.stop() == 0
        finally:
            made.close()
    assert min(took) <= 0.5, took


@pytest.mark.skipif(sys.platform != "linux", reason="expected: memory and CPU time are read from /proc")
def test_an_idle_daemon_needs_no_cpu_and_little_memory(running: Daemon) -> None:
    guest = StreamGuest(running.link)
    guest.lease()
    time.sleep(1.0)  # start-up and the lease file are over by then

    def spent() -> tuple[int, int]:
        proc = Path(f"/proc/{running.process.pid}")
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        switches = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("voluntary"))
        return int(fields[11]) + int(fields[12]), int(switches.split()[1])

    before = spent()
    time.sleep(2.0)
    after = spent()
    assert after[0] - before[0] <= 1, "clock ticks of CPU in two idle seconds"
    assert after[1] - before[1] <= 2, "wake-ups in two idle seconds"
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    rss_kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    assert rss_kib <= 60 * 1024
    guest.close()


def test_a_second_guest_of_the_same_mac_gets_its_address_back_after_a_restart(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    other = b"\x02\0\0\0\0\x08"
    addresses = []
    for _ in range(2):
        with daemon(tmp_path, "--state-dir", state) as made:
            if not addresses:
                first = StreamGuest(made.link, other)
                first.lease()
                first.close()
            guest = StreamGuest(made.link)
            addresses.append(guest.lease())
            guest.close()
            assert made.stop() == 0
    assert addresses[0] == addresses[1] == packets.ip("192.168.65.4")


def test_a_lease_survives_a_daemon_that_was_killed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with daemon(tmp_path, "--state-dir", str(state)) as made:
        for mac in (b"\x02\0\0\0\0\x08", b"\x02\0\0\0\0\x09"):
            guest = StreamGuest(made.link, mac)
            address = guest.lease()
            guest.close()
        wait_until(
            lambda: (state / "leases.json").exists() and "02:00:00:00:00:09" in (state / "leases.json").read_text()
        )
        made.process.kill()
        made.process.wait()
    with daemon(tmp_path, "--state-dir", str(state)) as made:
        guest = StreamGuest(made.link, b"\x02\0\0\0\0\x09")
        assert guest.lease() == address
        guest.close()


class TestStopping:
    """F18."""

    def test_flows_may_finish(self, tmp_path: Path, server: socket.socket) -> None:
        with daemon(tmp_path, "--grace", "8") as made:
            guest = StreamGuest(made.link)
            guest.lease()
            connection = guest.connect(HOST, server.getsockname()[1])
            assert connection is not None
            made.signal(signal.SIGTERM)
            made.wait_said("stopping")
            assert guest.connect(HOST, server.getsockname()[1]) is None, "no new flows"
            assert made.process.poll() is None
            began = time.monotonic()
            connection.send(packets.RST | packets.ACK)
            assert made.process.wait(5) == 0
            assert time.monotonic() - began < 2, "it does not wait on when the last flow has ended"
            guest.close()

    def test_what_does_not_finish_is_reset_after_the_grace_time(self, tmp_path: Path, server: socket.socket) -> None:
        with daemon(tmp_path, "--grace", "0.5", "-p", "0:80") as made:
            guest = StreamGuest(made.link)
            guest.lease()
            connections = [guest.connect(HOST, server.getsockname()[1]) for _ in range(20)]
            port = published(made)
            began = time.monotonic()
            made.signal(signal.SIGTERM)
            made.wait_said("stopping")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=1)
            last = connections[-1]
            assert last is not None and last.ended_by() == "RST"
            assert made.process.wait(5) == 0
            assert 0.5 <= time.monotonic() - began < 3
            guest.close()

    def test_a_second_signal_does_not_wait(self, tmp_path: Path, server: socket.socket) -> None:
        with daemon(tmp_path, "--grace", "60") as made:
            guest = StreamGuest(made.link)
            guest.lease()
            assert guest.connect(HOST, server.getsockname()[1]) is not None
            made.signal(signal.SIGTERM)
            made.wait_said("stopping")
            began = time.monotonic()
            assert made.stop() == 0
            assert time.monotonic() - began < 2
            guest.close()

    def test_the_last_link_that_cannot_come_back_ends_the_daemon(self, tmp_path: Path) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "pyvpnkit",
                        "run",
                        "--link",
                        f"qemu:fd:{theirs.fileno()}",
                        "--state-dir",
                        "off",
                    ],
                    pass_fds=[theirs.fileno()],
                    cwd=Path(__file__).parents[2],
                )
            ours.settimeout(10)
            ours.sendall(b"\0\0\0\x0a")  # half a frame
        assert process.wait(10) == 0


class TestReload:
    def test_ports_open_and_close_and_what_needs_a_restart_is_named(self, tmp_path: Path) -> None:
        free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        first, second = (one.getsockname()[1] for one in free)
        for one in free:
            one.close()
        settings = tmp_path / "vm.yaml"
        settings.write_text(f"publish: ['{first}:80']\n")
        with daemon(tmp_path, "--config", str(settings)) as made:
            socket.create_connection(("127.0.0.1", first), timeout=5).close()
            settings.write_text(f"publish: ['{second}:80']\nnetwork: {{mtu: 4000}}\nlog_level: debug\n")
            made.signal(signal.SIGHUP)
            log = made.wait_said("need a restart")
            assert "reloaded: publish, log_level" in log
            assert "these need a restart: network.mtu" in log
            socket.create_connection(("127.0.0.1", second), timeout=5).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", first), timeout=5)
            assert made.stop() == 0

    def test_a_mistake_changes_nothing_and_is_named_with_its_line(self, tmp_path: Path) -> None:
        settings = tmp_path / "vm.yaml"
        settings.write_text("publish: [0:80]\n")
        with daemon(tmp_path, "--config", str(settings)) as made:
            settings.write_text("publish: [0:81]\nlog_levle: debug\n")
            made.signal(signal.SIGHUP)
            log = made.wait_said("not reloaded")
            assert f"{settings}:2:1: unknown key 'log_levle' at the top (did you mean 'log_level'?)" in log
            assert "no longer published" not in log
            guest = StreamGuest(made.link)
            guest.lease()
            guest.close()
            assert made.stop() == 0

    def test_a_port_that_was_taken_is_tried_again_at_the_next_reload(self, tmp_path: Path) -> None:
        settings = tmp_path / "vm.yaml"
        settings.write_text("publish: []\n")
        with daemon(tmp_path, "--config", str(settings)) as made, socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            settings.write_text(f"publish: ['{port}:80']\nnetwork: {{mtu: 4000}}\n")
            made.signal(signal.SIGHUP)
            log = made.wait_said("need a restart")
            assert f"127.0.0.1:{port} is in use" in log
            assert "not reloaded, or not all of it: publish" in log
            assert "reloaded: publish" not in log and "nothing that can change" not in log
            taken.close()
            made.signal(signal.SIGHUP)
            log = made.wait_said("INFO reloaded: publish")
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            made.signal(signal.SIGHUP)
            log = made.wait_said("nothing that can change now has changed")
            assert log.count("these need a restart: network.mtu") >= 2, "what still waits is said each time"
            assert made.stop() == 0


def test_where_guests_can_attach_is_said_and_listed(tmp_path: Path) -> None:
    with daemon(tmp_path, "--link", "qemu:tcp:127.0.0.1:0,name=other") as made:
        found = re.search(rf"INFO ready, listening on qemu:{made.link}, (qemu:tcp:127.0.0.1:(\d+))\n", made.said())
        assert found is not None, made.said()
        made.signal(signal.SIGUSR1)
        log = made.wait_said("ntp:")
        assert "links: -" in log
        assert f"listening: 2\n  qemu:{made.link}\n  {found[1]}\n" in log
        socket.create_connection(("127.0.0.1", int(found[2])), timeout=5).close()
        made.wait_said("other: connected")
        assert made.stop() == 0


def test_the_log_reads_as_sentences(tmp_path: Path, server: socket.socket) -> None:
    with daemon(tmp_path, "-p", "0:80", "--log-level", "debug", "--grace", "0.2") as made:
        guest = StreamGuest(made.link)
        guest.lease()
        port = server.getsockname()[1]
        assert guest.connect(HOST, port) is not None
        guest.close()
        assert made.stop() == 0
        log = made.said()
    assert re.search(r"INFO published tcp:127\.0\.0\.1:\d+:80\n", log)
    assert "INFO lease 192.168.65.3 for 02:00:00:00:00:07\n" in log
    assert re.search(rf"DEBUG tcp 192\.168\.65\.3:\d+ -> 192\.168\.65\.2:{port} opened\n", log)
    assert re.search(rf"DEBUG tcp 192\.168\.65\.3:\d+ - 192\.168\.65\.2:{port} closed: .*; 0 octets out", log)
    assert re.search(r"INFO no longer published tcp:127\.0\.0\.1:\d+:80\n", log)
    assert not re.search(r"[A-Z][a-z]+[A-Z][a-z]+ \w+=", log), "no repr"


def test_a_summary_may_be_asked_for_before_the_links_are_ready(tmp_path: Path) -> None:
    """Who sees the socket does not know how far the start has come; the signal's default would end the process."""
    program = (
        "import os, signal, sys\n"
        "from pyvpnkit import cli, daemon\n"
        "class Early(daemon.Service):\n"
        "    async def __aenter__(self):\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return await super().__aenter__()\n"
        "daemon.Service = Early\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", program, "run", "--link", f"qemu:{tmp_path / 'net.sock'}", "--state-dir", "off"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "ntp:" in done.stderr and "stopped" in done.stderr


def test_sigusr1_prints_what_goes_on(running: Daemon, server: socket.socket) -> None:
    guest = StreamGuest(running.link)
    guest.lease()
    assert guest.connect(HOST, server.getsockname()[1]) is not None
    running.signal(signal.SIGUSR1)
    log = running.wait_said("ntp:")
    for expected in (
        "links: 1",
        "192.168.65.3",
        "02:00:00:00:00:07",
        f"192.168.65.2:{server.getsockname()[1]}",
        "frames_in",
    ):
        assert expected in log
    guest.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def published(made: Daemon, protocol: str = "tcp", bind: str = "127.0.0.1") -> int:
    """The host port that the operating system chose for `-p 0:...`."""
    found = re.search(rf"INFO published {protocol}:{re.escape(bind)}:(\d+):", made.said())
    assert found is not None, made.said()
    return int(found[1])


@pytest.mark.parametrize("bind", ["127.0.0.1", "[::1]"])
def test_a_published_port_leads_into_the_guest(tmp_path: Path, bind: str) -> None:
    """X01; the guest sees the gateway as the client (threats N7)."""
    if bind == "[::1]" and not has_ipv6():
        pytest.skip("expected: this host has no IPv6")
    with daemon(tmp_path, "-p", f"{bind}:0:80") as made:
        guest = StreamGuest(made.link)
        guest.lease()
        with socket.create_connection((bind.strip("[]"), published(made, bind=bind)), timeout=10) as client:
            connection = guest.listen(80)
            assert connection.remote == GATEWAY
            client.sendall(b"question")
            segment = next(segment for segment in connection.segments() if segment.payload)
            assert segment.payload == b"question"
            connection.ack = segment.end
            connection.send(packets.ACK | packets.PSH, b"answer")
            assert client.recv(100) == b"answer"
        guest.close()


def test_a_published_port_that_is_closed_in_the_guest_resets_the_client(tmp_path: Path) -> None:
    """X03."""
    with daemon(tmp_path, "-p", "0:80") as made:
        guest = StreamGuest(made.link)
        guest.lease()
        with socket.create_connection(("127.0.0.1", published(made)), timeout=10) as client:
            segment = packets.read_tcp(next(guest.packets(packets.TCP)))
            refusal = packets.tcp(
                guest.address, segment.source, segment.dport, segment.sport, 0, segment.end, packets.RST | packets.ACK
            )
            guest.send_ip(segment.source, packets.TCP, refusal)
            with pytest.raises(ConnectionResetError):
                client.recv(100)
        guest.close()


def test_clients_of_a_published_port_without_a_guest_get_an_error_and_no_hang(tmp_path: Path) -> None:
    with daemon(tmp_path, "-p", "0:80") as made:
        with contextlib.ExitStack() as stack:
            address = ("127.0.0.1", published(made))
            clients = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(100)]
            for client in clients:
                with pytest.raises(ConnectionResetError):
                    client.recv(100)


def test_a_published_udp_port_answers_each_client(tmp_path: Path) -> None:
    """X02."""
    with daemon(tmp_path, "-p", "udp:0:53") as made:
        guest = StreamGuest(made.link)
        guest.lease()
        port = published(made, "udp")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)]
            for number, client in enumerate(clients):
                client.settimeout(10)
                client.sendto(b"question %d" % number, ("127.0.0.1", port))
            seen = []
            for packet in guest.packets(packets.UDP):
                sport, dport = int.from_bytes(packet.payload[:2], "big"), int.from_bytes(packet.payload[2:4], "big")
                if dport == 53:
                    seen.append((sport, packet.payload[8:]))
                if len(seen) == 3:
                    break
            for sport, question in reversed(seen):
                answer = packets.udp(guest.address, GATEWAY, 53, sport, question.replace(b"question", b"answer"))
                guest.send_ip(GATEWAY, packets.UDP, answer)
            for number, client in enumerate(clients):
                assert client.recv(100) == b"answer %d" % number
        guest.close()


def test_a_capture_shows_a_quiet_network_within_a_second_or_two(tmp_path: Path) -> None:
    path = tmp_path / "guest.pcapng"
    with daemon(tmp_path, "--capture", str(path)) as made:
        guest = StreamGuest(made.link)
        guest.lease()
        guest.send_ip(GATEWAY, packets.ICMP, packets.echo(7, 1, b"seen in the capture"))
        next(guest.packets(packets.ICMP))
        wait_until(lambda: path.read_bytes().count(b"seen in the capture") == 2, 5, lambda: "request and reply")
        assert path.read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"
        guest.close()
        assert made.stop() == 0


def test_a_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "notify")
        manager.bind(path)
        manager.settimeout(10)
        with daemon(tmp_path, environment={"NOTIFY_SOCKET": path}) as made:
            assert manager.recv(1000) == f"READY=1\nMAINPID={made.process.pid}".encode()
            made.signal(signal.SIGHUP)
            assert manager.recv(1000).startswith(b"RELOADING=1")
            assert manager.recv(1000) == b"READY=1"
            assert made.stop() == 0
            assert manager.recv(1000) == b"STOPPING=1"


def refused(tmp_path: Path, *options: str) -> str:
    """What a daemon says that does not start; status 1 or 2."""
    run = subprocess.run(
        [sys.executable, "-m", "pyvpnkit", "run", "--state-dir", "off", *options],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode in (1, 2), run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr


def test_what_prevents_a_start_is_said_in_a_line_that_helps(tmp_path: Path) -> None:
    link = f"qemu:{tmp_path}/net.sock"
    assert "give --link" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path, "--link", f"qemu:{tmp_path}/absent/net.sock")
    for capture in (f"{tmp_path}/absent/x.pcapng", str(tmp_path)):
        text = refused(tmp_path, "--link", link, "--capture", capture)
        assert f"capture {capture}: " in text and "name a file that this user may write" in text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = refused(tmp_path, "--link", link, "-p", f"{port}:80")
        assert f"127.0.0.1:{port} is in use" in text
        if sys.platform == "linux":
            assert f"pid {os.getpid()}" in text
    assert "'nobody-at-all' does not exist" in refused(tmp_path, "--link", link, "--user", "nobody-at-all")
    assert "open descriptor" in refused(tmp_path, "--link", link, "--ready-fd", "77")
    assert not (tmp_path / "net.sock").exists(), "a start that failed leaves nothing behind"


def test_one_pid_file_one_daemon(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with daemon(tmp_path, "--pid-file", str(pid_file)) as made:
        assert int(pid_file.read_text()) == made.process.pid
        text = refused(tmp_path, "--link", f"qemu:{tmp_path}/other.sock", "--pid-file", str(pid_file))
        assert f"held by process {made.process.pid}" in text
        assert made.stop() == 0
    assert not pid_file.exists()


def test_a_prepared_pid_file_is_not_followed(tmp_path: Path) -> None:
    """L2."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "pid").symlink_to(victim)
    assert "symbolic link" in refused(tmp_path, "--link", f"qemu:{tmp_path}/net.sock", "--pid-file", f"{tmp_path}/pid")
    assert victim.read_text() == "precious"


def test_two_daemons_do_not_share_a_state_directory(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with daemon(tmp_path, "--state-dir", state):
        text = refused(tmp_path, "--link", f"qemu:{tmp_path}/other.sock", "--state-dir", state)
        assert "in use by another pyvpnkit" in text


def test_the_daemon_loads_nothing_heavy_before_it_is_ready(running: Daemon) -> None:
    script = (
        "import sys, pyvpnkit.cli, pyvpnkit.daemon\n"
        "heavy = {'aiohttp', 'scapy', 'rich', 'dpkt', 'numpy', 'yaml'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.split() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="expected: only root can become somebody else")
def test_root_binds_the_ports_and_somebody_else_does_the_rest() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        with daemon(directory, "-p", "0:80", "--user", "nobody", "--capture", f"{name}/x.pcapng") as made:
            nobody = pwd.getpwnam("nobody")
            if sys.platform == "linux":
                status = Path(f"/proc/{made.process.pid}/status").read_text()
                assert f"Uid:\t{nobody.pw_uid}\t{nobody.pw_uid}\t{nobody.pw_uid}\t{nobody.pw_uid}" in status
            for path in (made.link, f"{name}/x.pcapng"):
                assert os.stat(path).st_uid == nobody.pw_uid
            assert "INFO published tcp:" in made.said()
            guest = StreamGuest(made.link)
            guest.lease()
            guest.close()
            assert made.stop() == 0
        assert not os.path.exists(made.link)


def test_it_runs_where_there_is_no_uvloop(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError('not here')\n")
    with daemon(tmp_path, "-p", "0:80", environment={"PYTHONPATH": str(tmp_path)}) as made:
        guest = StreamGuest(made.link)
        guest.lease()
        with socket.create_connection(("127.0.0.1", published(made)), timeout=10) as client:
            connection = guest.listen(80)
            connection.send(packets.ACK | packets.PSH, b"hello")
            assert client.recv(100) == b"hello"
        guest.close()
        assert made.stop() == 0


def test_a_guest_that_vanishes_before_it_was_acknowledged_costs_nothing(tmp_path: Path) -> None:
    """The link ends while an acknowledgement waits for its 4 ms: its time must not stay due for ever (F6)."""
    with daemon(tmp_path, "-p", "0:80", "--grace", "0.2") as made:
        for _ in range(3):
            guest = StreamGuest(made.link)
            guest.lease()
            with socket.create_connection(("127.0.0.1", published(made)), timeout=10) as client:
                connection = guest.listen(80)
                connection.send(packets.ACK | packets.PSH, b"last words")
                assert client.recv(100) == b"last words"
                guest.close()
        assert made.stop(5) == 0
