"""Guests behind real proxies: microsocks, dante and tinyproxy in a namespace of their own, with curl in a kernel guest.

    guest ---- daemon in the host's namespace ---- veth ---- far: the proxies, and a web server that only has a far address

The far server can be reached directly too, so that what goes around a proxy would succeed, and is seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.netns import Daemon, Namespace, World, require, wait_until
from tests.support.webhost import MB, content, digest, read_all, serve, web

pytestmark = pytest.mark.netns

HOST, PROXY, PROXY6 = "198.51.100.1", "198.51.100.2", "2001:db8::2"
SERVER = "203.0.113.9"
OCTETS = 5 * MB
USER, PASSWORD = "me", "secret word"
LOGIN = "me:secret%20word@"

DANTE = """
logoutput: {log}
internal: 0.0.0.0 port = 1081
external: {server}
socksmethod: none
clientmethod: none
user.unprivileged: nobody
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks block {{ from: 0.0.0.0/0 to: {server}/32 port = 83 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
"""

TINYPROXY = """
Port {port}
Listen 0.0.0.0
Listen ::
Timeout 600
MaxClients 100
StartServers 5
{login}
"""


@dataclass
class Far:
    """A guest, the daemon between, and what is far away."""

    world: World
    guest: Namespace
    host: Namespace
    far: Namespace
    daemon: Daemon
    path: Path
    programs: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def use(self, *rules: str, **options: str) -> None:
        """The rules from here on: the settings file is another, and the daemon is told so."""
        lines = ["way_out:", *(f"- {json.dumps(rule)}" for rule in rules)]
        lines += [f"way_out_{name}: {value}" for name, value in options.items()]
        document = "\n".join(lines) + "\n"
        if self.path.read_text() == document:
            return
        self.path.write_text(document)
        before = self.daemon.said().count("reloaded")
        self.daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.daemon.said().count("reloaded") > before, why=self.daemon.said)

    def status(self) -> dict[str, object]:
        """As the control API has it."""
        words = ["curl", "-sS", "--unix-socket", str(self.path.with_name("control.sock")), "http://x/v1/status"]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["host"]["way_out"]
        assert isinstance(found, dict)
        return found

    def curl(self, port: int = 80, address: str = SERVER, limit_s: int = 15) -> int:
        """Its exit status: 0 is an answer, 7 a refusal."""
        url = f"http://{address}:{port}/100"
        done = self.guest.run("curl", "-sS", "-o", "/dev/null", "--max-time", str(limit_s), url, check=False)
        return done.returncode

    def run(self, name: str, *words: str, port: int) -> None:
        """A proxy, ready for clients."""
        log = (self.path.parent / f"{name}.log").open("ab")
        self.programs[name] = self.far.start(*words, stdout=log, stderr=subprocess.STDOUT)
        log.close()

        def listens() -> bool:
            assert self.programs[name].poll() is None, (self.path.parent / f"{name}.log").read_text()
            with contextlib.suppress(OSError), self.far.connect("127.0.0.1", port):
                return True
            return False

        wait_until(listens)

    def microsocks(self) -> None:
        self.run("microsocks", "microsocks", "-i", "0.0.0.0", "-p", "1080", "-b", SERVER, port=1080)

    def kill(self, name: str) -> None:
        self.programs[name].kill()
        self.programs[name].wait()


@pytest.fixture(scope="module")
def far(shared: World) -> Iterator[Far]:
    require("curl", "microsocks", "danted", "tinyproxy", "tcpdump")
    guest, elsewhere, directory = shared.namespace(), shared.namespace("far"), shared.directory
    _join(shared.host, elsewhere)
    path = directory / "settings.yaml"
    path.write_text('way_out:\n- "* -> refuse"\n')
    options = ["--config", str(path), "--control-socket", str(directory / "control.sock")]
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", *options)
    guest.udhcpc()
    made = Far(shared, guest, shared.host, elsewhere, daemon, path)
    _start_proxies(made, directory)
    with web(elsewhere, SERVER, 80):
        yield made
    assert daemon.stop() == 0, daemon.said()
    said = daemon.said()
    assert "Traceback" not in said and "secret" not in said, said


def _join(host: Namespace, far: Namespace) -> None:
    host.ip("link", "add", "up0", "type", "veth", "peer", "name", "down0", "netns", far.name)
    for place, name, address, address6 in ((host, "up0", HOST, "2001:db8::1"), (far, "down0", PROXY, PROXY6)):
        place.ip("addr", "add", f"{address}/24", "dev", name)
        place.ip("addr", "add", f"{address6}/64", "dev", name, "nodad")
        place.ip("link", "set", name, "up")
    far.ip("addr", "add", f"{SERVER}/32", "dev", "lo")
    host.ip("route", "add", f"{SERVER}/32", "via", PROXY)


def _start_proxies(made: Far, directory: Path) -> None:
    made.microsocks()
    made.run("login", "microsocks", "-p", "1082", "-u", USER, "-P", PASSWORD, port=1082)
    made.run("six", "microsocks", "-i", "::", "-p", "1083", port=1083)
    for name, port, login in (("tinyproxy", 3128, ""), ("tinyproxy-login", 3129, "BasicAuth me secret")):
        config = directory / f"{name}.conf"
        config.write_text(TINYPROXY.format(port=port, login=login))
        made.run(name, "tinyproxy", "-d", "-c", str(config), port=port)
    config = directory / "danted.conf"
    log = directory / "danted.out"
    config.write_text(DANTE.format(server=SERVER, log=log))
    made.run("danted", "danted", "-f", str(config), "-p", "/dev/null", port=1081)


WAYS = {
    "microsocks": f"socks5://{PROXY}:1080",
    "microsocks with a login": f"socks5://{LOGIN}{PROXY}:1082",
    "microsocks over IPv6": f"socks5://[{PROXY6}]:1083",
    "dante": f"socks5://{PROXY}:1081",
    "dante, asked by name where known": f"socks5h://{PROXY}:1081",
    "tinyproxy": f"http://{PROXY}:3128",
    "tinyproxy with a login": f"http://me:secret@{PROXY}:3129",
    "tinyproxy over IPv6": f"http://[{PROXY6}]:3128",
}


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_curl_through_the_proxy_both_ways(far: Far, way: str, fetch: Callable[..., None]) -> None:
    far.use(f"* -> {way}")
    before = far.daemon.descriptors()
    with Leaks(far) as leaks:
        fetch(far.guest, 80, OCTETS, SERVER)
    assert leaks.seen() == []
    far.daemon.wait_descriptors(before)


class Leaks:
    """What leaves the host for the far server itself, and so not for a proxy; and what leaves for anywhere."""

    def __init__(self, far: Far, what: str = f"dst host {SERVER}") -> None:
        self._far = far
        self._what = what
        self._path = far.path.parent / "leaks.pcap"

    def __enter__(self) -> Leaks:
        self._path.unlink(missing_ok=True)
        words = ("tcpdump", "-Z", "root", "-i", "up0", "-U", "--immediate-mode", "-w", str(self._path), self._what)
        self._tcpdump = self._far.host.start(*words)
        assert self._tcpdump.stdout is not None
        readable, _, _ = select.select([self._tcpdump.stdout], [], [], 20)
        assert readable and "listening on" in self._tcpdump.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self._tcpdump.terminate()
        self._tcpdump.wait(20)

    def seen(self) -> list[str]:
        done = subprocess.run(["tcpdump", "-nr", str(self._path)], capture_output=True, text=True, check=True, cwd="/")
        return done.stdout.splitlines()


def test_the_far_server_can_be_reached_directly_where_a_rule_says_so(far: Far) -> None:
    """Without this the tests of leaks would show nothing."""
    far.use(f"{SERVER} -> direct", f"* -> socks5://{PROXY}:1080")
    with Leaks(far) as leaks:
        assert far.curl() == 0
    assert leaks.seen()


@pytest.mark.parametrize("first", ["guest", "server"])
@pytest.mark.parametrize("way", [WAYS["dante"]])
def test_octets_and_half_close_both_ways(far: Far, way: str, first: str) -> None:
    """Of the three proxies only dante carries a half close."""
    sums: list[str] = []

    def handle(connection: socket.socket) -> None:
        if first == "server":
            connection.sendall(content(OCTETS))
            connection.shutdown(socket.SHUT_WR)
        sums.append(hashlib.sha256(read_all(connection)).hexdigest())
        if first == "guest":
            connection.sendall(content(OCTETS))

    far.use(f"* -> {way}")
    with serve(far.far.listen(SERVER), handle) as (_, port), far.guest.connect(SERVER, port, limit_s=60) as sock:
        if first == "server":
            assert hashlib.sha256(read_all(sock)).hexdigest() == digest(OCTETS)
        sock.sendall(content(OCTETS))
        sock.shutdown(socket.SHUT_WR)
        if first == "guest":
            assert hashlib.sha256(read_all(sock)).hexdigest() == digest(OCTETS)
        wait_until(lambda: bool(sums))
    assert sums == [digest(OCTETS)]


def test_a_server_that_speaks_first_is_heard(far: Far, way: str) -> None:
    far.use(f"* -> {way}")
    for _ in range(20):
        with (
            serve(far.far.listen(SERVER), lambda sock: sock.sendall(b"220 welcome\r\n")) as (_address, port),
            far.guest.connect(SERVER, port) as client,
        ):
            assert read_all(client) == b"220 welcome\r\n"


def test_refusals_are_refusals(far: Far, way: str) -> None:
    far.use(f"* -> {way}")
    assert far.curl(81) == 7


def test_what_the_proxy_forbids_is_a_refusal(far: Far) -> None:
    """Dante says so, and the guest hears it as ICMP of a direct connect."""
    far.use(f"* -> {WAYS['dante']}")
    with far.far.listen(SERVER, 83):
        assert far.curl(83) == 7


def test_an_unreachable_server_is_unreachable(far: Far) -> None:
    far.use(f"* -> {WAYS['dante']}")
    far.far.ip("route", "add", "unreachable", "203.0.113.77")
    done = far.guest.run("curl", "-sS", "-v", "--max-time", "15", "http://203.0.113.77/", check=False)
    assert done.returncode == 7 and "No route to host" in done.stderr, done.stderr


def test_a_wrong_password_is_a_refusal_and_stays_here(far: Far) -> None:
    for scheme, port in (("socks5", 1082), ("http", 3129)):
        far.use(f"* -> {scheme}://me:secret-wrong@{PROXY}:{port}")
        assert far.curl() == 7
        far.use(f"* -> {scheme}://{PROXY}:{port}")
        assert far.curl() == 7
    assert "secret" not in far.daemon.said()


def test_nothing_goes_directly_while_the_proxy_is_down(far: Far) -> None:
    """Connections, datagrams and pings; and what the proxy carried before is not lost when it comes back."""
    everything = f"src host {HOST} and not (tcp and dst host {PROXY} and dst port 1080) and not arp"
    far.use(f"* -> {WAYS['microsocks']}")
    assert far.curl() == 0
    far.kill("microsocks")
    with Leaks(far, everything) as leaks:
        for _ in range(5):
            assert far.curl() == 7
        with far.guest.socket(socket.SOCK_DGRAM) as sock:
            sock.connect((SERVER, 4433))
            sock.send(b"question")
            with pytest.raises(OSError, match="No route to host"):
                sock.recv(100)
        assert far.guest.run("ping", "-c", "2", "-i", "0.2", "-W", "2", SERVER, check=False).returncode != 0
    assert leaks.seen() == []
    far.microsocks()
    assert far.curl() == 0


def test_nothing_goes_directly_while_the_proxy_is_silent(far: Far) -> None:
    far.use(f"* -> {WAYS['microsocks']}")
    far.programs["microsocks"].send_signal(signal.SIGSTOP)
    try:
        with Leaks(far) as leaks:
            assert far.curl(limit_s=2) == 28
        assert leaks.seen() == []
    finally:
        far.programs["microsocks"].send_signal(signal.SIGCONT)
    assert far.curl() == 0


def test_with_fail_open_a_proxy_that_is_down_is_gone_around(far: Far) -> None:
    far.use(f"* -> socks5://{PROXY}:9", fail="open")
    with Leaks(far) as leaks:
        assert far.curl() == 0
        far.guest.run("ping", "-c", "1", "-W", "5", SERVER)
    assert leaks.seen()


def test_a_proxy_that_is_given_by_name(far: Far) -> None:
    """By the host's own resolver; a name that nobody knows lets nothing out."""
    far.use("* -> socks5://no-such-proxy.invalid:1080")
    with Leaks(far, f"src host {HOST} and tcp") as leaks:
        assert far.curl(limit_s=5) != 0
    assert leaks.seen() == []
    with far.host.listen("127.0.0.1") as unused:
        port = unused.getsockname()[1]
    server = far.host.start("microsocks", "-i", "127.0.0.1", "-p", str(port))
    far.use(f"* -> socks5://localhost:{port}")  # ::1 is tried first, where nobody listens
    wait_until(lambda: far.curl() == 0)
    server.kill()
    server.wait()


def test_rules_change_while_connections_live_on(far: Far) -> None:
    def echo(connection: socket.socket) -> None:
        while octets := connection.recv(MB):
            connection.sendall(octets)

    far.use(f"* -> {WAYS['microsocks']}")
    with serve(far.far.listen(SERVER), echo) as (_, port), far.guest.connect(SERVER, port) as sock:
        for rule, status in (
            ("* -> refuse", 7),
            ("* -> direct", 0),
            (f"* -> http://{PROXY}:3128", 0),
            ("*:80->refuse", 7),
        ):
            far.use(rule)
            assert far.curl() == status
            sock.sendall(b"still here")
            assert sock.recv(100) == b"still here"
        far.use("* -> nowhere")
        assert far.curl() == 7, "rules that cannot be used leave those before"


def test_many_at_once(far: Far) -> None:
    far.use(f"* -> {WAYS['microsocks']}")
    before = far.daemon.descriptors()
    answers: list[bytes] = []

    def one(number: int, port: int) -> None:
        with far.guest.connect(SERVER, port, limit_s=60) as sock:
            sock.sendall(b"%d" % number)
            answers.append(sock.recv(100))

    with serve(far.far.listen(SERVER), lambda sock: sock.sendall(sock.recv(100))) as (_, port):
        threads = [threading.Thread(target=one, args=(number, port)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(answers) == sorted(b"%d" % number for number in range(100))
    far.daemon.wait_descriptors(before)
