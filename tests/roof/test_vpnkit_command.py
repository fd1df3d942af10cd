"""VPNKit's own command line: what its options come to, and programs that start `vpnkit` as they always did."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netstack.link import vmnet
from netstack.wire import dhcp
from portfwd.ninep.client import Client, expose
from pyvpnkit import cli, config, entry, vpnkit
from pyvpnkit.config import BY_KEY
from pyvpnkit.loader import ConfigErrors
from tests.roof.guest import GATEWAY, HOST, LIMIT_S, StreamGuest, wait_until
from tests.support import packets
from tests.support.vpnkit_program import program

ETHERNET = ("--ethernet", "/tmp/eth.sock")


def settings(*argv: str, **environment: str) -> config.Settings:
    return vpnkit.settings(vpnkit.parse(argv), environment)[0]


def complaints(*argv: str) -> list[str]:
    with pytest.raises(ConfigErrors) as raised:
        settings(*argv)
    return [complaint.removeprefix("vpnkit: ") for complaint in raised.value.complaints]


def shown(value: Any) -> Any:
    return [str(one) for one in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("", "state_dir", None),
        ("", "control.socket", None),
        ("", "network.lease_s", 0x7FFFFFFF),
        ("", "network.domain", "localdomain"),
        ("", "network.subnet", "192.168.65.0/24"),
        ("", "network.pool_first", "192.168.65.3"),
        ("", "network.pool_last", "192.168.65.254"),
        ("", "network.host_names", ["host.internal"]),
        ("", "network.gateway_names", ["gateway.internal"]),
        ("", "dns.records", {"vm.internal": "192.168.65.3"}),
        ("", "dns.resolvers", "getaddrinfo"),
        ("", "dns.hosts_file", "/etc/hosts"),
        ("", "vpnkit.pcap_snaplen", 128),
        ("", "forwarder", None),
        ("", "log_level", "info"),
        ("--port /p --port=fd:4", "vpnkit.port", ["/p", "fd:4"]),
        ("--port hyperkit://:62373/run/vm", "vpnkit.port", ["/run/vm/00000002.0000f3a5"]),
        ("--port p.sock", "vpnkit.port", ["./p.sock"]),
        ("--port-forwards /vm/connect", "forwarder", "hyperkit:/vm/connect,cid=3,port=62373,generation=2"),
        ("--vsock-path unix:///vm/connect", "forwarder", "hyperkit:/vm/connect,cid=3,port=62373,generation=2"),
        ("--vsock-path=", "forwarder", None),
        ("--port-forwards hyperv-connect://x/y", "forwarder", None),
        ("--introspection /i --introspection /j", "vpnkit.introspection", ["/i", "/j"]),
        ("--diagnostics /d", "vpnkit.diagnostics", ["/d"]),
        ("--pcap /c", "vpnkit.pcap", ["/c"]),
        ("--pcap-snaplen 1500", "vpnkit.pcap_snaplen", 1500),
        ("--max-connections 900", "limits.max_flows", 900),
        ("--dns /r/off", "dns.file", "/r/off"),
        ("--dns off", "dns.file", "./off"),
        ("--dns /r", "dns.resolvers", "file"),
        ("--http /h.json", "vpnkit.http", "/h.json"),
        ("--http-api-path /h.sock", "vpnkit.http_api", ["/h.sock"]),
        ("--hosts=", "dns.hosts_file", None),
        ("--hosts /h", "dns.hosts_file", "/h"),
        ("--host-names host.docker.internal,docker", "network.host_names", ["host.docker.internal", "docker"]),
        ("--gateway-names=", "network.gateway_names", []),
        (
            "--vm-names a.vm,b.vm --lowest-ip 192.168.65.9",
            "dns.records",
            dict.fromkeys(("a.vm", "b.vm"), "192.168.65.9"),
        ),
        ("--vm-names=", "dns.records", {}),
        ("--listen-backlog 32 --gc-compact-interval 30", "log_level", "info"),
        ("--port-max-idle-time 42", "timeouts.udp_idle_s", 42),
        ("--port-max-idle-time 42", "timeouts.ping_idle_s", 42),
        ("--port-max-idle-time 42", "timeouts.tcp_idle_s", 0),
        ("--port-max-idle-time 0", "timeouts.udp_idle_s", 999_999_999),
        ("--port-max-idle-time -1", "timeouts.ping_idle_s", 999_999_999),
        ("--debug", "log_level", "debug"),
        ("--server-macaddr F6:16:36:00:00:01", "network.gateway_mac", "f6:16:36:00:00:01"),
        ("--domain corp.example", "network.domain", "corp.example"),
        ("--domain=", "network.domain", None),
        ("--allowed-bind-addresses 127.0.0.1,10.0.0.1", "allowed_bind_addresses", ["127.0.0.1", "10.0.0.1"]),
        ("--host-ip 0.0.0.0", "network.host_alias", None),
        ("--host-ip 192.168.65.7", "network.host_alias", "192.168.65.7"),
        ("--mtu 4000", "network.mtu", 4000),
        (
            "--udpv4-forwards 53:10.0.0.1:53,67:10.0.0.2:67",
            "vpnkit.udpv4_forwards",
            ["53:10.0.0.1:53", "67:10.0.0.2:67"],
        ),
        ("--tcpv4-forwards 80:127.0.0.1:81", "vpnkit.tcpv4_forwards", ["80:127.0.0.1:81"]),
        ("--gateway-forwards /g.json", "vpnkit.gateway_forwards", "/g.json"),
        ("--forwards /f.json", "vpnkit.forwards", "/f.json"),
        # The beginning of a name, and a whole name that others begin with.
        ("--gateway-i 192.168.65.9", "network.gateway", "192.168.65.9"),
        ("--mt=1400", "network.mtu", 1400),
        ("--forw /f.json", "vpnkit.forwards", "/f.json"),
        ("--http /h --hosts /o", "dns.hosts_file", "/o"),
    ],
)
def test_an_option_means_the_setting(argv: str, key: str, value: Any) -> None:
    assert shown(config.value_of(settings(*ETHERNET, *argv.split()), BY_KEY[key])) == value


@pytest.mark.parametrize(
    ("address", "link"),
    [
        ("/run/eth.sock", "vmnet:/run/eth.sock"),
        ("eth.sock", "vmnet:./eth.sock"),
        ("/run/a,b/eth", "vmnet:/run/a,,b/eth"),
        ("connect:x", "vmnet:./connect:x"),
        ("fd:3", "vmnet:fd:3"),
        ("hyperkit://:1024/run/vm", "vmnet:/run/vm/00000002.00000400"),
    ],
)
def test_where_virtual_machines_connect(address: str, link: str) -> None:
    (found,) = settings("--ethernet", address).links
    assert str(found) == link


@pytest.mark.parametrize(
    ("argv", "subnet"),
    [
        ("--gateway-ip 192.168.67.1 --host-ip 192.168.67.2 --lowest-ip 192.168.67.3 --highest-ip 192.168.67.14", "/28"),
        ("--gateway-ip 10.1.0.1 --host-ip 10.1.0.2 --lowest-ip 10.1.0.3 --highest-ip 10.1.3.254", "/22"),
        # VPNKit would give away the broadcast address of a /28 here.
        ("--gateway-ip 192.168.67.1 --host-ip 192.168.67.2 --lowest-ip 192.168.67.3 --highest-ip 192.168.67.15", "/27"),
        ("--gateway-ip 10.1.0.1 --host-ip 0.0.0.0 --lowest-ip 10.1.0.3 --highest-ip 10.1.0.4", "/29"),
    ],
)
def test_the_network_is_the_smallest_with_all_addresses(argv: str, subnet: str) -> None:
    network = settings(*ETHERNET, *argv.split()).network
    assert network.subnet.endswith(subnet)
    words = argv.split()
    assert [network.gateway, network.host_alias or "0.0.0.0", network.pool_first, network.pool_last] == words[1::2]


def test_the_variable_switches_debugging_on() -> None:
    assert settings(*ETHERNET, VPNKIT_DEBUG="").log_level == "debug"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ("", "Please provide an --ethernet argument, such as --ethernet /tmp/ethernet.sock"),
        ("--ethernet", "--ethernet: needs a value; write --ethernet ADDRESS"),
        ("--ethernet --debug", "--ethernet: needs a value; write --ethernet ADDRESS"),
        (
            "--ethernet vsock://:3",
            "--ethernet: vsock://:3: sockets of vsock:// are not had here; write a path, fd:N or hyp",
        ),
        ("--ethernet hyperv-connect://a/b", "--ethernet: hyperv-connect://a/b: sockets of hyperv-connect:// are not"),
        ("--ethernet hyperkit://3", "--ethernet: 'hyperkit://3' is no address; write a path, fd:N or"),
        ("--ethernet hyperkit://:4294967296/x", "--ethernet: 'hyperkit://:4294967296/x' is no address"),
        ("--ethernet fd:x", "--ethernet: 'fd:x' is no address"),
        ("--ethernet=", "--ethernet: '' is no address"),
        (r"--ethernet \\.\pipe\eth", r"--ethernet: \\.\pipe\eth: named pipes are Windows'"),
        ("--ethernet /e --ethernet /f", "--ethernet: is given 2 times; give it once"),
        ("--ethernet /e --port hvsock://x/y", "--port: hvsock://x/y: sockets of hvsock:// are not had here"),
        ("--ethernet /e --port /a,b", "--port: /a,b: a path with a comma cannot be had here"),
        ("--ethernet /e --port-forwards /a --vsock-path /a", "--vsock-path: is --port-forwards by another name"),
        ("--ethernet /e --host x", "--host: is short for any of --hosts, --host-names, --host-ip"),
        ("--ethernet /e --mtux 1500", "--mtux: is unknown (did you mean '--mtu'?)"),
        ("--ethernet /e --mtu 12", "--mtu: 12 is out of range; write a whole number from 576 to 65520"),
        ("--ethernet /e --debug=1", "--debug: takes no value"),
        ("--ethernet /e file", "'file': only options are wanted"),
        ("--ethernet /e -- file", "'file': only options are wanted"),
        ("--ethernet /e --gateway-ip x", "--gateway-ip: 'x' is not an IPv4 address"),
        ("--ethernet /e --host-ip 192.168.65.1", "--host-ip: 192.168.65.1 is --gateway-ip"),
        ("--ethernet /e --highest-ip 192.168.65.2", "--lowest-ip: 192.168.65.3 comes after --highest-ip 192.168.65.2"),
        (
            "--ethernet /e --gateway-ip 10.0.0.1",
            "--gateway-ip 10.0.0.1, --host-ip 192.168.65.2, --lowest-ip 192.168.65.3, --highest-ip 192.168.65.254: "
            "they are too far from one another; give all from one network",
        ),
        ("--ethernet /e --server-macaddr x", "--server-macaddr: 'x' is not a MAC address"),
        ("--ethernet /e --max-connections many", "--max-connections: 'many' is not a number"),
        ("--ethernet /e --port-max-idle-time soon", "--port-max-idle-time: 'soon' is not a whole number"),
        ("--ethernet /e --listen-backlog x", "--listen-backlog: 'x' is not a whole number"),
        ("--ethernet /e --tcpv4-forwards 80", "--tcpv4-forwards: "),
        ("--ethernet /e --vm-names vm", "--vm-names: 'vm' has no domain"),
        ("--ethernet /e --host-names a.b,a..b", "--host-names: 'a..b' is no name"),
        ("--ethernet /e --domain a..b", "--domain: 'a..b' is no domain"),
        ("--ethernet /e --db file:///x", "--db: VPNKit has had no database since 2021"),
        ("--ethernet /e --branch master", "--branch: VPNKit has had no database since 2021"),
        ("--ethernet /e --dhcp-path /nonexistent", "--dhcp-path: /nonexistent: No such file or directory; give a file"),
    ],
)
def test_a_mistake_is_told_by_the_options_name(argv: str, complaint: str) -> None:
    (said,) = complaints(*argv.split())
    assert said.startswith(complaint)


def test_all_mistakes_are_told_at_once() -> None:
    said = complaints("--ethernet", "vsock://:3", "--mtu", "1", "--nonsense", "value", "--db=x", "--domain", "a b..c")
    assert [one.partition(":")[0] for one in said] == ["--nonsense", "--ethernet", "--mtu", "--domain", "--db"]


NAMES = st.sampled_from([name for name in vpnkit.OPTIONS if name not in ("dhcp-path", "help", "version")])
TEXTS = (
    "- -1 0 9 300 /a a,b off a.b *.a.b a=b.c é.é fd:3 fd:٣ hyperkit://:1/x unix:///x vsock:// 1:1.1.1.1:1 "
    "0.0.0.0 255.255.255.255 10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.254"
).split()
VALUES = st.sampled_from([*TEXTS, "", "\udcff", "9" * 5000, "/" * 300]) | st.text(max_size=8)
PAIRS = st.dictionaries(NAMES, VALUES, max_size=6).map(lambda pairs: [f"--{name}={one}" for name, one in pairs.items()])
WORDS = st.lists(NAMES.map("--{}".format) | VALUES, max_size=4)


@given(PAIRS, WORDS | st.just([]))
@example(["--gateway-ip=255.255.255.255"], [])
@example(["--gateway-ip=255.255.255.253", "--highest-ip=255.255.255.255"], [])
def test_any_words_are_settings_or_complaints(pairs: list[str], words: list[str]) -> None:
    try:
        assert settings(*ETHERNET, *pairs, *words).links
    except ConfigErrors as error:
        assert error.complaints


@pytest.mark.parametrize(
    ("document", "search", "domain"),
    [
        (
            {"searchDomains": ["a.example", "b.example"], "domainName": "c.example"},
            ("a.example", "b.example"),
            "c.example",
        ),
        ({"searchDomains": [], "other": 1}, (), "localdomain"),
        ({"searchDomains": None, "domainName": None}, (), "localdomain"),
        ({"domainName": ""}, (), None),
    ],
)
def test_domains_come_from_the_file(document: Any, search: tuple[str, ...], domain: str | None, tmp_path: Path) -> None:
    path = tmp_path / "dhcp.json"
    path.write_text(json.dumps(document))
    found = settings(*ETHERNET, "--dhcp-path", str(path)).network
    assert (found.search, found.domain) == (search, domain)
    assert settings(*ETHERNET, "--dhcp-path", str(path), "--domain", "mine").network.domain == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"searchDomains": "a.example"}',
        '{"searchDomains": [3]}',
        '{"searchDomains": ["a,b"]}',
        '{"searchDomains": 0}',
        '{"domainName": 3}',
        '{"domainName": 0}',
        '{"domainName": "a..b"}',
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("\udcff", id="not UTF-8"),
        pytest.param(" " * (1 << 21), id="long"),
    ],
)
def test_a_file_of_something_else_is_a_complaint(text: str, tmp_path: Path) -> None:
    path = tmp_path / "dhcp.json"
    path.write_text(text, errors="surrogateescape")
    (said,) = complaints(*ETHERNET, "--dhcp-path", str(path))
    assert said.startswith(f"--dhcp-path: {path}: ")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert vpnkit.main(["--help=plain"]) == 0
    help = capsys.readouterr().out
    assert all(f"  --{name} " in help or f"  --{name}\n" in help for name in vpnkit.OPTIONS)
    assert vpnkit.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") >= 1


# -- the program


class Guest(StreamGuest):
    """Attached as a machine of VPNKit's."""

    LENGTH = struct.Struct("<H")

    def __init__(self, path: str, identity: str | None = None) -> None:
        super().__init__(path)
        request = vmnet.Request(uuid=uuid.UUID(identity) if identity else uuid.uuid4(), preferred=None)
        self._sock.sendall(vmnet.emit_init() + vmnet.emit_command(request))
        answer = b""
        while len(answer) < vmnet.INIT_OCTETS + vmnet.RESPONSE_OCTETS:
            octets = self._sock.recv(vmnet.INIT_OCTETS + vmnet.RESPONSE_OCTETS - len(answer))
            assert octets, answer
            answer += octets
        vif = answer[vmnet.INIT_OCTETS :]
        assert vif[0] == 1, vif
        self.mtu = int.from_bytes(vif[1:3], "little")
        self.mac = vif[5:11]

    def told(self, *codes: dhcp.Option) -> dhcp.Message:
        """The answer to a DISCOVER that wants these options."""
        return dhcp.parse(self._dhcp(1, bytes((55, len(codes), *codes))).payload[8:])

    def hears_of(self, address: bytes) -> bytes:
        """Who answers ARP for `address`, or for the gateway, which is asked after it."""
        for target in (address, GATEWAY):
            question = packets.arp(1, self.mac, self.address, bytes(6), target)
            self.send(packets.ether(b"\xff" * 6, self.mac, packets.ARP, question))
        return next(frame[28:32] for frame in self.frames() if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2")


class Vpnkit:
    """`vpnkit ARGV...`, by a symlink to the console script, ready for guests."""

    def __init__(self, directory: Path, *argv: str, pass_fds: tuple[int, ...] = (), **environment: str) -> None:
        self.log = directory / f"log{uuid.uuid4().hex}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [program(directory), *argv],
                stderr=log,
                pass_fds=pass_fds,
                env={**os.environ, "HOME": str(directory), **environment},
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait_said(self, words: str, times: int = 1) -> None:
        wait_until(lambda: self.said().count(words) >= times or self.process.poll() is not None, 3 * LIMIT_S, self.said)
        assert words in self.said(), self.said()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(3 * LIMIT_S) == 0, self.said()


@contextlib.contextmanager
def started(directory: Path, *argv: str, **more: Any) -> Iterator[Vpnkit]:
    made = Vpnkit(directory, *argv, **more)
    try:
        made.wait_said(" ready")
        yield made
        assert "Traceback" not in made.said(), made.said()
        made.stop()
    finally:
        if made.process.poll() is None:
            made.process.kill()
        made.process.wait()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vk") as name:
        yield Path(name)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen()
        yield made


AS_3_AND_4 = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def test_linuxkit_starts_it_with_two_listening_sockets(directory: Path) -> None:
    """`vpnkit --ethernet fd:3 --vsock-path STATE/connect --port fd:4`; `--publish` asks for the address, then for the port."""
    log, identity = directory / "log", str(uuid.uuid4())
    with (
        listening(directory / "eth.sock") as ethernet,
        listening(directory / "port.sock") as port,
        log.open("ab") as err,
    ):
        numbers = ethernet.fileno(), port.fileno()
        assert min(numbers) > 4
        words = (program(directory), "--ethernet", "fd:3", "--vsock-path", f"{directory}/connect", "--port", "fd:4")
        argv = [sys.executable, "-c", AS_3_AND_4, *map(str, numbers), *words]
        process = subprocess.Popen(argv, stderr=err, pass_fds=numbers)
    try:
        with contextlib.closing(Guest(f"{directory}/eth.sock", identity)) as guest:
            assert guest.lease() == packets.ip("192.168.65.3"), log.read_text()
            with contextlib.closing(Guest(f"{directory}/eth.sock", identity)) as asking:
                assert (asking.mac, asking.discover()) == (guest.mac, guest.address)
            with Client(connected(directory / "port.sock")) as client, socket.create_server(("127.0.0.1", 0)) as free:
                number = free.getsockname()[1]
                free.close()
                published = expose(client, f"tcp:127.0.0.1:{number}:tcp:192.168.65.3:80")
                with socket.create_connection(("127.0.0.1", number), LIMIT_S) as visitor:
                    inside = guest.listen(80)
                    inside.send(packets.ACK | packets.PSH, b"welcome")
                    assert visitor.recv(100) == b"welcome"
                    inside.send(packets.RST)  # or the end waits for it
                assert http(directory / "port.sock", "/forwards/list").startswith(b"HTTP/1.1 200")
                published.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(3 * LIMIT_S) == 0
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


def http(path: Path, target: str) -> bytes:
    with connected(path) as sock:
        sock.settimeout(LIMIT_S)
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while octets := sock.recv(65536):
            answer += octets
        return answer


def test_any_number_run_side_by_side_and_leave_nothing_behind(directory: Path) -> None:
    with started(directory, "--ethernet", f"{directory}/a") as first, started(directory, "--eth", f"{directory}/b"):
        for path in "ab":
            with contextlib.closing(Guest(f"{directory}/{path}")) as guest:
                assert guest.lease() == packets.ip("192.168.65.3")
                assert guest.mac == bytes.fromhex("025000000001")
        first.stop()
    assert {path.name for path in directory.iterdir() if not path.name.startswith("log")} == {"vpnkit", "script"}


def test_a_guest_finds_what_vpnkit_has(directory: Path) -> None:
    hosts = directory / "hosts"
    hosts.write_text("10.9.8.7 printer.example\n")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        started(directory, "--ethernet", f"{directory}/e", "--hosts", str(hosts), "--mtu", "4000"),
        contextlib.closing(Guest(f"{directory}/e")) as guest,
    ):
        guest.lease()
        assert guest.mtu == 4000
        codes = dhcp.Option.SUBNET_MASK, dhcp.Option.DOMAIN_NAME, dhcp.Option.LEASE_TIME
        told = guest.told(*codes).options
        assert [told[code] for code in codes] == [packets.ip("255.255.255.0"), b"localdomain", b"\x7f\xff\xff\xff"]
        names = "gateway.internal", "host.internal", "vm.internal", "printer.example"
        assert [guest.asks(name)[1] for name in names] == [
            ["192.168.65.1"],
            ["192.168.65.2"],
            ["192.168.65.3"],
            ["10.9.8.7"],
        ]
        assert guest.hears_of(HOST) == HOST
        connection = guest.connect(HOST, server.getsockname()[1])
        assert connection is not None
        server.settimeout(LIMIT_S)
        server.accept()[0].close()
        assert connection.ended_by() == "FIN"
        connection.send(packets.RST)  # or the end waits for it


def test_without_a_host_address_nobody_stands_for_the_host(directory: Path) -> None:
    """rootlesskit's --disable-host-loopback."""
    with (
        started(directory, "--ethernet", f"{directory}/e", "--host-ip", "0.0.0.0"),
        contextlib.closing(Guest(f"{directory}/e")) as guest,
    ):
        guest.lease()
        assert guest.hears_of(HOST) == GATEWAY  # who was asked after it
        assert guest.asks("gateway.internal")[1] == ["192.168.65.1"]
        assert guest.asks("host.internal")[1] == []


def test_the_file_of_domains_is_followed(directory: Path) -> None:
    path = directory / "dhcp.json"
    codes = dhcp.Option.DOMAIN_NAME, dhcp.Option.DOMAIN_SEARCH

    def write(text: str) -> None:
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)

    write('{"searchDomains": ["a.example"], "domainName": "one.example"}')
    with (
        started(directory, "--ethernet", f"{directory}/e", "--dhcp-path", str(path)) as running,
        contextlib.closing(Guest(f"{directory}/e")) as guest,
    ):

        def told() -> tuple[bytes, tuple[str, ...]]:
            options = guest.told(*codes).options
            return options[codes[0]], dhcp.decode_names(options.get(codes[1], b""))

        assert told() == (b"one.example", ("a.example",))
        write('{"searchDomains": ["b.example", "c.example"], "domainName": "two.example"}')
        running.wait_said("reloaded: network.domain, network.search")
        assert told() == (b"two.example", ("b.example", "c.example"))
        write("{")
        running.wait_said("settings are not reloaded, because of")
        assert told() == (b"two.example", ("b.example", "c.example"))
        write('{"domainName": "three.example"}')
        running.wait_said("reloaded: network.domain, network.search", times=2)
        assert told()[0] == b"three.example"
        path.unlink()
        running.wait_said("No such file or directory; give a file that can be read")
        assert told()[0] == b"three.example"


def test_what_is_passed_over_is_told(directory: Path) -> None:
    words = "--max-connections", "100", "--port-forwards", "hyperv-connect://a/b", "--ethernet", f"{directory}/e"
    with started(directory, *words) as running:
        assert "--max-connections is deprecated" in running.said()
        assert "--port-forwards: hyperv-connect://a/b: only a path or unix://PATH can be had" in running.said()


def test_debugging_by_the_variable(directory: Path) -> None:
    with started(directory, "--ethernet", f"{directory}/e", VPNKIT_DEBUG="1") as running:
        assert "DEBUG" in running.said()


def test_mistakes_end_it_with_status_2(directory: Path) -> None:
    done = subprocess.run([program(directory), "--mtu", "1"], capture_output=True, text=True, timeout=3 * LIMIT_S)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "Please provide an --ethernet argument, such as --ethernet /tmp/ethernet.sock",
        "--mtu",
    ]
    busy = subprocess.run(
        [program(directory), f"--ethernet={directory}"], capture_output=True, text=True, timeout=3 * LIMIT_S
    )
    assert (busy.returncode, busy.stderr.count("\n")) == (2, 1)
    assert "exists and is not a socket" in busy.stderr


def test_the_command_is_the_same_under_its_other_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vpnkit", "--version"]) == entry.main(["vpnkit", "--version"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first == second
    assert cli.main(["vpnkit"]) == 2
    assert capsys.readouterr().err.startswith("vpnkit: Please provide an --ethernet argument")
