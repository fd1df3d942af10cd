"""`pyvpnkit shell` as its user sees it: the network in there, the terminal, the exit status, and nothing left behind."""

from __future__ import annotations

import hashlib
import http.server
import os
import pty
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.roof.embedded import WORLDS, World, need, processes_with
from tests.roof.guest import wait_until

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(sys.platform != "linux", reason="expected: not Linux"),
]

BLOB = os.urandom(1 << 20) * 12


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


@pytest.fixture(params=["root", "ordinary"])
def anyone(request: pytest.FixtureRequest) -> World:
    """Either user, over the link that is chosen without being told."""
    return World(user=request.param)


@pytest.fixture
def marker() -> str:
    """A word that no other process has in its command line."""
    return f"98765.{os.getpid()}{time.monotonic_ns()}"


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def web() -> Iterator[int]:
    """A web server on the host's 127.0.0.1; returns what it is sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(BLOB if self.path == "/blob" else b"hello from the host")

        def do_PUT(self) -> None:
            digest = hashlib.sha256(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(digest.hexdigest().encode())

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def sh(world: World, script: str, *options: str, **environment: str) -> tuple[int, str, str]:
    done = world.run("shell", *options, "--", "sh", "-c", script, **environment)
    return done.returncode, done.stdout, done.stderr


class TestNetwork:
    def test_the_guest_has_its_lease_and_only_the_stacks_network(self, world: World) -> None:
        before = Path("/etc/resolv.conf").read_text()
        status, out, err = sh(
            world,
            "id -u; ip -4 -o addr; ip route; cat /etc/resolv.conf; ip -d -o link show eth0;"
            " grep -c : /proc/net/dev; cat /proc/net/if_inet6; exit 7",
        )
        assert (status, err) == (7, "")
        assert out.startswith("0\n")
        assert "inet 192.168.65.3/24 brd 192.168.65.255 scope global eth0" in out
        assert "default via 192.168.65.1 dev eth0" in out
        assert "nameserver 192.168.65.1\nsearch internal\n" in out
        assert (" tun " if world.link == "tap" else " veth ") in out
        assert "eth0" not in out.splitlines()[-1], "no IPv6 on the interface"
        assert Path("/etc/resolv.conf").read_text() == before

    def test_names_pages_and_pings_work(self, world: World, web: int) -> None:
        need("curl", "ping")
        status, out, err = sh(
            world,
            "getent hosts host.internal; python3 -c 'import socket; print(socket.gethostbyname(\"gateway.internal\"))';"
            f" curl -sS http://host.internal:{web}/; echo; ping -c1 -w3 192.168.65.1 | grep -c '64 bytes';"
            f" curl -s http://127.0.0.1:{web}/; echo 127.0.0.1 here: $?",
        )
        assert (status, err) == (0, "")
        address, gateway, page, pings, own = out.splitlines()
        assert address.split() == ["192.168.65.2", "host.internal"]
        assert (gateway, page, pings) == ("192.168.65.1", "hello from the host", "1")
        assert own == "127.0.0.1 here: 7", "curl's word for refused"

    def test_a_published_port_leads_into_the_guest(self, world: World, port: int) -> None:
        server = (
            "import socket; s = socket.create_server(('', 8000)); print('ready', flush=True); c, a = s.accept();"
            " c.sendall(b'hello from ' + a[0].encode()); c.close(); raise SystemExit(5)"
        )
        shell = world.start("shell", "-p", f"{port}:8000", "--", "python3", "-c", server)
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            assert sock.recv(100) == b"hello from 192.168.65.1"
        out, err = shell.communicate(timeout=10)
        assert (shell.returncode, out, err) == (5, "", "")

    @pytest.mark.parametrize("mtu", [576, 9000, 65520])
    @pytest.mark.parametrize("name", ["root-tap", "ordinary-packet"])
    def test_any_mtu_holds_for_packets_and_streams(self, name: str, mtu: int, web: int) -> None:
        need("curl", "ping")
        status, out, err = sh(
            WORLDS[name],
            f"cat /sys/class/net/eth0/mtu 2>/dev/null; ip -o link show eth0; ping -c1 -w3 -M do -s {mtu - 28} 192.168.65.1;"
            f" curl -sS http://host.internal:{web}/blob | tee /dev/shm/$$ | sha256sum;"
            f" curl -sS -X PUT -H Expect: --data-binary @/dev/shm/$$ http://host.internal:{web}/; rm /dev/shm/$$",
            "--mtu",
            str(mtu),
        )
        digest = hashlib.sha256(BLOB).hexdigest()
        assert (status, err) == (0, "")
        assert f" mtu {mtu} " in out
        assert f"{mtu - 20} bytes from 192.168.65.1" in out
        assert out.count(digest) == 2, "down and up"

    def test_settings_come_from_a_file_and_a_capture_is_written(self, tmp_path: Path) -> None:
        from scapy.utils import rdpcap

        config = tmp_path / "shell.yaml"
        config.write_text("network: {subnet: 10.77.0.0/24, domain: lab}\nlinks: ['qemu:/nonexistent/net.sock']\n")
        capture = tmp_path / "shell.pcapng"
        status, out, err = sh(
            World(), "ip -4 -o addr show eth0; cat /etc/resolv.conf", "--config", str(config), "--capture", str(capture)
        )
        assert (status, err) == (0, "")
        assert "inet 10.77.0.3/24" in out and "nameserver 10.77.0.1\nsearch lab" in out
        frames = rdpcap(str(capture))
        directions = {int.from_bytes(frame.direction.to_bytes(4, "big"), "big") & 3 for frame in frames}
        assert len(frames) >= 4 and directions == {1, 2}
        assert not Path("/nonexistent").exists()


class TestResolvConf:
    """/etc/resolv.conf is a link on many hosts, and it may lead nowhere."""

    @pytest.mark.parametrize(
        ("leads_to", "prepare", "resolves"),
        [
            pytest.param("../run/systemd/resolve/stub-resolv.conf", "touch $target", True, id="systemd-resolved"),
            pytest.param("../run/other/resolv.conf", "touch $target", True, id="another program"),
            pytest.param("../run/other/resolv.conf", ":", True, id="a missing file"),
            pytest.param("/run/other/deeper/resolv.conf", "rmdir $(dirname $target)", False, id="a missing directory"),
        ],
    )
    def test_names_are_resolved(self, leads_to: str, prepare: str, resolves: bool, tmp_path: Path) -> None:
        made = (
            "mount -t tmpfs tmpfs /mnt; cp -a /etc /mnt/etc; mount -t tmpfs tmpfs /run; "
            f"target=/run/{leads_to.partition('run/')[2]}; mkdir -p $(dirname $target); {prepare}; "
            f"ln -sf {leads_to} /mnt/etc/resolv.conf; mount --bind /mnt/etc /etc"
        )
        status, out, err = sh(
            World(prepare=made),
            f"getent ahostsv4 host.internal; cat /etc/resolv.conf; test -d {tmp_path} && echo /tmp is as before",
        )
        assert status == 0
        if resolves:
            assert (out.count("192.168.65.2"), err) == (3, ""), "three kinds of socket"
            assert "nameserver 192.168.65.1" in out
        else:
            assert "leads nowhere" in err
        assert "/tmp is as before" in out


class TestEnding:
    @pytest.mark.parametrize(
        ("command", "status", "said"),
        [
            pytest.param(["sh", "-c", "exit 3"], 3, "", id="status"),
            pytest.param(["sh", "-c", "kill -9 $$"], 137, "", id="signal"),
            pytest.param(["no-such-command"], 127, "no-such-command: not found", id="not found"),
            pytest.param(["/etc/passwd"], 126, "/etc/passwd: Permission denied", id="not executable"),
            pytest.param([], 0, "", id="no command: a shell, here at its end of input"),
        ],
    )
    def test_the_status_is_that_of_the_command(self, anyone: World, command: list[str], status: int, said: str) -> None:
        done = anyone.run("shell", "--", *command) if command else anyone.run("shell")
        assert done.returncode == status
        assert (said in done.stderr) if said else (done.stderr == "")

    def test_what_the_command_started_ends_with_it(self, anyone: World, marker: str) -> None:
        began = time.monotonic()
        script = (
            f"trap '' TERM HUP; (sleep {marker} & setsid sleep {marker} &) ; setsid sh -c 'sleep {marker}' & exit 4"
        )
        status, _out, err = sh(anyone, script)
        assert (status, err) == (4, "")
        assert not processes_with(marker)
        assert time.monotonic() - began < 5

    @pytest.mark.parametrize(
        ("number", "status"),
        [
            pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, id="TERM"),
            pytest.param(signal.SIGHUP, 128 + signal.SIGHUP, id="HUP"),
            pytest.param(signal.SIGKILL, -signal.SIGKILL, id="KILL"),
        ],
    )
    def test_the_command_ends_with_the_network(
        self, anyone: World, marker: str, number: signal.Signals, status: int
    ) -> None:
        shell = anyone.start("shell", "--", "sh", "-c", f"(setsid sleep {marker} &); exec sleep {marker}")
        wait_until(lambda: sum(line.startswith("sleep") for line in processes_with(marker)) == 2)
        shell.send_signal(number)
        _out, err = shell.communicate(timeout=10)
        assert (shell.returncode, err) == (status, "")
        wait_until(lambda: not processes_with(marker), 5)

    def test_a_command_that_ignores_sigterm_is_killed_after_the_grace_time(self, marker: str) -> None:
        shell = World().start(
            "shell", "--grace", "0.5", "--", "sh", "-c", f"trap '' TERM; sleep {marker}; sleep {marker}"
        )
        wait_until(lambda: any(line.startswith("sleep") for line in processes_with(marker)))
        shell.send_signal(signal.SIGTERM)
        shell.communicate(timeout=10)
        assert shell.returncode == 137
        assert not processes_with(marker)

    def test_what_was_written_last_arrives(self, world: World) -> None:
        """The command ends with megabytes in its socket; a slow reader on the host gets them all."""
        octets = 6 << 20
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(30)
            script = (
                f"import socket; s = socket.create_connection(('host.internal', {listener.getsockname()[1]}));"
                f"s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {octets}); s.sendall(bytes({octets}))"
            )
            shell = world.start("shell", "--", "python3", "-c", script)
            connection, _ = listener.accept()
            got = 0
            with connection:
                while data := connection.recv(64 << 10):
                    got += len(data)
                    time.sleep(0.001)
            _out, err = shell.communicate(timeout=10)
        assert (shell.returncode, err) == (0, "")
        assert got == octets

    def test_a_port_in_use_is_said_and_nothing_is_started(self, anyone: World, marker: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            taken = sock.getsockname()[1]
            done = anyone.run("shell", "-p", f"{taken}:80", "--", "sleep", marker)
        assert done.returncode == 1
        assert f"cannot publish tcp:127.0.0.1:{taken}:80" in done.stderr
        assert "Traceback" not in done.stderr
        assert not processes_with(marker)


class TestForbidden:
    """Where there are no namespaces it says why, and what to do."""

    @pytest.mark.parametrize("command", ["shell", "demo"])
    def test_the_switch_is_named(self, command: str) -> None:
        world = World(user="ordinary")
        if os.geteuid() != 0:
            pytest.skip("expected: the tests do not run as root")
        *become, python, _m, _pyvpnkit, _command = world.argv(command)
        # A user namespace of its own, whose limits are its own; without capabilities in it.
        script = (
            "echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all"
            f' "$0" -m pyvpnkit {command}'
        )
        done = World().run_words([*become, "unshare", "-Ur", "sh", "-c", script, python])
        assert done.returncode == 1
        assert "sysctl -w user.max_user_namespaces=15000" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_missing_ip_program_is_named(self) -> None:
        hide = (
            "for ip in /bin/ip /sbin/ip /usr/bin/ip /usr/sbin/ip; do [ ! -e $ip ] || mount --bind /dev/null $ip; done"
        )
        done = World(prepare=hide).run("shell", "true")
        assert done.returncode == 1
        assert "install the package iproute2" in done.stderr

    def test_an_unknown_kind_of_link_is_refused(self) -> None:
        done = World(link="carrier-pigeon").run("shell", "true")
        assert done.returncode == 2
        assert "auto, tap, packet" in done.stderr


class Terminal:
    """A shell on a pseudo-terminal of its own."""

    def __init__(self, world: World, *arguments: str, **environment: str) -> None:
        argv = world.argv(*arguments)
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir("/")
            os.execvpe(argv[0], argv, world.environment(TERM="dumb", **environment))
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, limit_s: float = 10.0) -> None:
        """Until the text that came since the last call has `pattern`."""
        until = time.monotonic() + limit_s
        while (match := re.search(pattern, self.text, re.DOTALL)) is None:
            assert self._read(until), f"never came: {pattern!r}\n{self.text}"
        self.text = self.text[match.end() :]

    def _read(self, until: float) -> bool:
        if not select.select([self._fd], [], [], max(until - time.monotonic(), 0))[0]:
            return False
        try:
            data = os.read(self._fd, 4096)
        except OSError:  # EIO: the other end is closed
            data = b""
        self.text += data.decode(errors="replace")
        return bool(data)

    def status(self, limit_s: float = 10.0) -> int:
        until = time.monotonic() + limit_s
        while self._read(until):
            pass
        _pid, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


class TestTerminal:
    def test_control_c_is_for_the_command(self, anyone: World) -> None:
        script = "trap 'echo cau''ght; exit 9' INT; echo rea''dy; while :; do sleep 0.05; done"
        terminal = Terminal(anyone, "shell", "--", "sh", "-c", script)
        terminal.wait_for("ready")
        terminal.type("\x03")
        terminal.wait_for("caught")
        assert terminal.status() == 9

    def test_an_interactive_shell_has_job_control(self, anyone: World) -> None:
        need("bash")
        terminal = Terminal(anyone, "shell", SHELL="/bin/bash", PS1="$ ", HOME="/nonexistent")
        terminal.wait_for("This shell is 192.168.65.3.*host.internal")
        terminal.type("PS1='pro''mpt: '; bind 'set enable-bracketed-paste off' 2>/dev/null\n")
        terminal.wait_for("\nprompt: ")
        # What the job prints tells that it has the terminal. It starts no process: a shell that is stopped between vfork and
        # exec is not seen as stopped, because its parent waits for the exec.
        terminal.type("bash -c 'while :; do echo ti\"\"ck; read -rt 0.05; done'\n")
        terminal.wait_for("\ntick")
        terminal.type("\x1a")
        terminal.wait_for("Stopped.*prompt: ")
        terminal.type("fg\n")
        terminal.wait_for("done'\r\n.*\ntick")
        terminal.type("\x03")
        terminal.wait_for("prompt: ")
        terminal.type("echo status $?\n")
        terminal.wait_for("status 130.*prompt: ")
        terminal.type("exit 4\n")
        assert terminal.status() == 4
