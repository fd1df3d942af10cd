"""gvproxy's own command line and file: what they come to, and machines behind a program of that name."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dnslib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from portfwd.invm import flags
from pyvpnkit import config
from pyvpnkit.config import BY_KEY
from pyvpnkit.gvproxy import command, translate
from pyvpnkit.gvproxy.wanted import FLAGS, UUID, wanted
from tests.roof.guest import LIMIT_S, StreamGuest, wait_until
from tests.support import packets
from tests.support.ports import free_port
from tests.support.vpnkit_program import program

QEMU = ("-listen-qemu", "unix:///run/qemu.sock")
GATEWAY = "192.168.127.1"
DEVICE = "192.168.127.2"
HOST = "192.168.127.254"
MAC = "5a:94:ef:e4:0c:ee"


def asked(*argv: str) -> tuple[config.Settings, translate.Translation]:
    return translate.settings(wanted(flags.parse(argv, FLAGS)))


def complaint(*argv: str) -> str:
    with pytest.raises(ConfigError) as raised:
        asked(*argv)
    return str(raised.value)


def shown(value: Any) -> Any:
    return [str(one) for one in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("", "state_dir", None),
        ("", "control.socket", None),
        ("", "timeouts.grace_s", 0),
        ("", "control.guest_api", True),
        ("", "control.guest_bind", "any"),
        ("", "network.subnet", "192.168.127.0/24"),
        ("", "network.gateway", GATEWAY),
        ("", "network.host_alias", HOST),
        ("", "network.gateway_mac", "5a:94:ef:e4:0c:dd"),
        ("", "network.static_leases", {MAC: DEVICE}),
        ("", "network.mtu", 1500),
        ("", "network.lease_s", 3600),
        ("", "network.domain", None),
        ("", "network.host_names", []),
        ("", "network.allow", []),
        ("", "publish", [f"tcp:127.0.0.1:2222:{DEVICE}:22"]),
        ("", "log_level", "info"),
        ("-mtu 4000", "network.mtu", 4000),
        ("-mtu 0", "network.mtu", 1500),
        ("--mtu=9000", "network.mtu", 9000),
        ("-ssh-port -1", "publish", []),
        ("-ssh-port 20022", "publish", [f"tcp:127.0.0.1:20022:{DEVICE}:22"]),
        ("-subnet 10.1.0.0/28", "network.gateway", "10.1.0.1"),
        ("-subnet 10.1.0.0/28", "network.host_alias", "10.1.0.14"),
        ("-subnet 10.1.0.0/28", "publish", ["tcp:127.0.0.1:2222:10.1.0.2:22"]),
        ("-deviceIP 192.168.127.9", "network.static_leases", {MAC: "192.168.127.9"}),
        ("-gatewayIP 192.168.127.7", "network.gateway", "192.168.127.7"),
        ("-pcap /tmp/x.pcap", "capture.file", "/tmp/x.pcap"),
        ("-pcap off", "capture.file", "./off"),
        ("-debug", "log_level", "debug"),
        ("-debug=0", "log_level", "info"),
        ("-ec2-metadata-access=true", "network.allow", ["169.254.0.0/16"]),
        ("-listen unix:///a -listen tcp://127.0.0.1:1", "control.listen", ["unix:/a", "tcp:127.0.0.1:1"]),
        ("-services unix:///a -services unix:///b", "control.listen", ["unix:/b"]),
        ("-listen vsock://null:1024/vm", "control.listen", ["unix:/vm/00000002.00000400"]),
        ("-listen tcp://:8080", "control.listen", ["tcp:0.0.0.0:8080"]),
    ],
)
def test_a_flag_means_the_setting(argv: str, key: str, value: Any) -> None:
    assert shown(config.value_of(asked(*QEMU, *argv.split())[0], BY_KEY[key])) == value


@pytest.mark.parametrize(
    ("argv", "links"),
    [
        ("-listen-qemu unix:///run/q,1", ["qemu:/run/q,,1,once=on"]),
        ("-listen-qemu tcp://127.0.0.1:1234", ["qemu:tcp:127.0.0.1:1234,once=on"]),
        ("-listen-bess unixpacket:///run/b", ["bess:/run/b,once=on"]),
        ("-listen-vfkit unixgram:///run/v", ["unixgram:/run/v,once=on"]),
        ("-listen-vpnkit unix:///run/k -listen-vfkit unixgram:///run/v", ["vmnet:/run/k", "unixgram:/run/v,once=on"]),
        ("-listen-vpnkit vsock://null:1024/run", ["vmnet:/run/00000002.00000400"]),
        ("-listen-stdio accept", ["stdio:"]),
        ("-listen unix:///run/api", []),
    ],
)
def test_where_machines_connect(argv: str, links: list[str]) -> None:
    assert shown(asked(*argv.split())[0].links) == links


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "nothing to listen on; give -listen-qemu"),
        ("-listen-qemu", "flag -listen-qemu needs a value"),
        ("-listen-qemu /run/q", "listen-qemu: '/run/q': write unix:///PATH or tcp://IP:PORT"),
        ("-listen-qemu unix://q", "the path must be absolute"),
        ("-listen-qemu unixgram:///q", "listen-qemu: 'unixgram:///q': write unix:///PATH"),
        ("-listen-vfkit unix:///q", "write unixgram:///PATH"),
        ("-listen-bess unix:///q", "write unixpacket:///PATH"),
        ("-listen vsock://:1024", "AF_VSOCK is not opened here; write unix:///PATH"),
        ("-listen unix:///a,b", "a path with a comma"),
        ("-listen-qemu unix:///q -listen-vpnkit unix:///k", "listen-qemu: cannot be had beside -listen-vpnkit"),
        ("-listen-qemu unix:///q -listen-bess unixpacket:///k", "listen-bess: cannot be had beside -listen-qemu"),
        ("-listen unix:///a -mtu many", "flag -mtu: 'many' is no number"),
        ("-listen unix:///a -mtu 100", "mtu: "),
        ("-listen unix:///a -ssh-port 22", "give a port from 1024 to 65535, or -1"),
        ("-listen unix:///a -subnet 10.0.0.0/30", "it must be /29 or larger"),
        ("-listen unix:///a -subnet x", "subnet: 'x'"),
        ("-listen unix:///a -hostIP 192.168.127.2", "hostIP: 192.168.127.2 is used twice"),
        ("-listen unix:///a -deviceIP 10.0.0.1", "deviceIP: 10.0.0.1 is not a usable address"),
        ("-listen unix:///a -gatewayIP 192.168.127.255", "gatewayIP: 192.168.127.255 is not a usable address"),
        ("-listen unix:///a -notification tcp://x", "notification: 'tcp://x': write unix:///PATH"),
        ("-listen unix:///a -forward-sock /s", "-forward-sock 1, -forward-dest 0"),
        (
            "-listen unix:///a -forward-sock /s -forward-dest /d -forward-user u -forward-identity /nonexistent",
            "identity /nonexistent: there is no such file",
        ),
        ("-listen unix:///a -config /nonexistent", "-config /nonexistent: No such file"),
        ("-listen unix:///a word", "'word': only flags are wanted"),
        ("-listn unix:///a", "unknown flag -listn"),
    ],
)
def test_a_mistake_is_told(argv: str, said: str) -> None:
    assert said in complaint(*argv.split())


def test_all_mistakes_of_the_values_are_told_at_once() -> None:
    said = complaint("-listen-vfkit", "x", "-listen", "y", "-notification", "z").splitlines()
    assert [line.split(": ")[:2] for line in said] == [
        ["gvproxy", "listen-vfkit"],
        ["gvproxy", "listen"],
        ["gvproxy", "notification"],
    ]


def test_names_and_a_machine_known_by_its_uuid() -> None:
    extra = asked(*QEMU)[1].extra
    assert [zone.document() for zone in extra.zones] == [
        {
            "Name": name,
            "Records": [{"Name": "gateway", "IP": GATEWAY}, {"Name": "host", "IP": HOST}],
            "DefaultIP": "",
        }
        for name in ("containers.internal.", "docker.internal.")
    ]
    assert {str(known): mac.hex(":") for known, mac in extra.macs.items()} == {UUID: MAC}


FILE = f"""
listen: [unix:///run/api]
log-level: warn
pid-file: /run/pid
log-file: /run/log
notification: unix:///run/note
ec2-metadata-access: true
future: 1
interfaces: {{vfkit: "unixgram:///run/v"}}
forwards: [{{socket: /run/s, dest: /run/podman, user: core, identity: KEY}}]
stack:
  mtu: 9000
  subnet: 10.9.0.0/24
  hostIP: 10.9.0.200
  gatewayMacAddress: 02:00:00:00:00:01
  capture-file: /run/cap
  dns:
  - name: crc.testing.
    records: [{{name: host, ip: 10.9.0.2}}, {{regexp: "^api-.*", ip: 10.9.0.3}}]
    defaultIP: 10.9.0.4
  dnsSearchDomains: [corp.example]
  forwards: {{"127.0.0.1:2222": "10.9.0.2:22", "udp::53": "10.9.0.2:53"}}
  nat: {{10.9.0.200: 127.0.0.1}}
  gatewayVirtualIPs: [10.9.0.200, 10.9.0.201]
  dhcpStaticLeases: {{10.9.0.2: "{MAC}"}}
  vpnKitUUIDMacAddresses: {{{UUID}: "{MAC}"}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    key = tmp_path / "key"
    key.touch()
    made = tmp_path / "gvproxy.yaml"
    made.write_text(FILE.replace("KEY", str(key)))
    return made


def test_a_file(file: Path) -> None:
    found, said = asked("-config", str(file))
    network = found.network
    assert shown(found.links) == ["unixgram:/run/v,once=on"]
    assert (network.subnet, network.gateway, network.host_alias) == ("10.9.0.0/24", "10.9.0.1", "10.9.0.200")
    assert network.gateway_aliases == ("10.9.0.201",)
    assert (network.mtu, network.gateway_mac, network.search) == (9000, "02:00:00:00:00:01", ("corp.example",))
    assert shown(found.publish) == ["tcp:127.0.0.1:2222:10.9.0.2:22", "udp:0.0.0.0:53:10.9.0.2:53"]
    assert (found.log_level, found.capture.file, found.control.listen) == ("warning", "/run/cap", ("unix:/run/api",))
    (zone,) = said.extra.zones
    assert zone.document()["DefaultIP"] == "10.9.0.4"
    assert [record.regexp for record in zone.records] == ["", "^api-.*"]
    assert said.extra.tunnels == [
        ("/run/s", f"ssh-tunnel://core@10.9.0.2:22/run/podman?key={file.parent}/key"),
    ]
    assert said.extra.notification == "/run/note"
    assert said.notes == [f"-config {file}: future is not known and passed over"]


def test_flags_go_before_the_file(file: Path) -> None:
    words = "-mtu 1400 -listen unix:///other -ssh-port 3000 -pcap /x -debug -hostIP 10.9.0.201"
    found, said = asked("-config", str(file), *words.split()[:-2])
    assert (found.network.mtu, found.control.listen, found.log_level) == (1400, ("unix:/other",), "debug")
    assert found.capture.file == "/run/cap"
    assert [note.partition(" is passed over")[0] for note in said.notes[1:]] == ["-ssh-port", "-pcap"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not YAML"),
        ("[]", "must be a mapping"),
        ("3", "must be a mapping"),
        ("stack: [1]", "stack: '[1]' is not a mapping"),
        ("stack: {mtu: high}", "stack.mtu: 'high' is not a number"),
        ("listen: unix:///a", "listen: 'unix:///a' is not a list"),
        ("listen: [1]", "listen: a text is wanted, not '1'"),
        ("forwards: [1]", "forwards.socket: a text is wanted"),
        ("listen: ['unix:///a']\nstack: {nat: {192.168.127.254: 10.0.0.1}}", "one address can stand for 127.0.0.1"),
        ("listen: ['unix:///a']\nstack: {dns: [zone]}", "a zone is a mapping with name and records"),
        ("listen: ['unix:///a']\nstack: {forwards: {'tcp:1': 'x'}}", "stack.forwards: "),
        ("listen: ['unix:///a']\nstack: {vpnKitUUIDMacAddresses: {x: y}}", "'x' is no UUID"),
        ("listen: ['unix:///a']\nlog-level: loud", "log-level: "),
        pytest.param("[" * 100_000, "not YAML", id="deep"),
        pytest.param(" " * (2 << 20), "longer than", id="long"),
    ],
)
def test_a_file_that_cannot_be_followed(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "gvproxy.yaml"
    path.write_text(text)
    assert said in complaint("-config", str(path), *(() if "listen" in text else QEMU))


TEXTS = (
    "- -1 0 22 9999 /a unix:///a unixgram:///a tcp://:1 tcp://x vsock://null:1/x 10.0.0.0/8 10.0.0.1 a,b \udcff".split()
)


@given(st.dictionaries(st.sampled_from(sorted(FLAGS)), st.sampled_from(TEXTS) | st.text(max_size=8), max_size=5))
def test_any_words_are_settings_or_a_complaint(pairs: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        asked(*QEMU, *(f"-{name}={text}" for name, text in pairs.items()))


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["-help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  -{name}" in said for name in FLAGS)
    assert command.main(["-version"]) == 0
    assert capsys.readouterr().out.startswith("gvproxy version v0.")
    assert command.main(["-listen-qemu", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("gvproxy: listen-qemu: 'nowhere'")


# The program.


class Guest(StreamGuest):
    GATEWAY = packets.ip(GATEWAY)
    GATEWAY_MAC = bytes.fromhex("5a94efe40cdd")

    def __init__(self, path: str) -> None:
        super().__init__(path, bytes.fromhex(MAC.replace(":", "")))

    def posts(self, path: str, body: dict[str, str]) -> bytes:
        """A request of the gateway's port 80; the answer whole."""
        connection = self.connect(self.GATEWAY, 80)
        assert connection is not None
        text = json.dumps(body)
        connection.send(
            packets.ACK,
            f"POST {path} HTTP/1.0\r\nHost: gateway\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode(),
        )
        answer = b""
        for segment in connection.segments():
            if segment.flags & packets.RST:
                break
            answer += segment.payload
            connection.ack = segment.end
            connection.send(packets.ACK)
            if segment.flags & packets.FIN:
                break
        return answer


class Notes:
    """Listens for notifications."""

    def __init__(self, path: Path) -> None:
        self.heard: list[dict[str, str]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile() as lines:
                self.heard += [json.loads(line) for line in lines]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gv") as name:
        yield Path(name)


@contextlib.contextmanager
def started(directory: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """As podman starts it: its output goes to a file."""
    log = directory / "gvproxy.log"
    process = subprocess.Popen(
        [program(directory, "gvproxy"), *argv, "-log-file", str(log)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(directory)},
    )
    try:
        wait_until(lambda: (log.exists() and " ready" in log.read_text()) or process.poll() is not None, 3 * LIMIT_S)
        assert process.poll() is None, log.read_text()
        yield process
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Api(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)

    def ask(self, method: str, path: str) -> Any:
        self.request(method, path)
        answer = self.getresponse()
        octets = answer.read()
        assert answer.status == 200, octets
        return json.loads(octets)


def test_as_podman_starts_it(directory: Path) -> None:
    """A machine on QEMU's stream: address, names, ports by its own request, notifications, and the end with it."""
    notes = Notes(directory / "note")
    key = directory / "key"
    key.touch(0o600)
    ssh, published = free_port(), free_port()
    pid_file = directory / "pid"
    words = f"-mtu 1500 -ssh-port {ssh} -listen-qemu unix://{directory}/q -services unix://{directory}/api"
    words += f" -forward-sock {directory}/podman.sock -forward-dest /run/podman/podman.sock -forward-user core"
    words += f" -forward-identity {key} -pid-file {pid_file} -notification unix://{directory}/note"
    try:
        with started(directory, *words.split()) as process:
            assert pid_file.read_text() == str(process.pid)
            guest = Guest(str(directory / "q"))
            assert socket.inet_ntoa(guest.lease()) == DEVICE
            assert guest.asks("gateway.containers.internal") == (0, [GATEWAY])
            assert guest.asks("host.docker.internal") == (0, [HOST])
            assert guest.asks("nothing.containers.internal") == (dnslib.RCODE.NXDOMAIN, [])
            asks = {"local": f"0.0.0.0:{published}", "remote": ":80", "protocol": "tcp"}
            assert guest.posts("/services/forwarder/expose", asks).startswith(b"HTTP/1.0 200")
            with contextlib.closing(Api(directory / "api")) as api:
                listed = api.ask("GET", "/services/forwarder/all")
            assert {"local": asks["local"], "remote": f"{DEVICE}:80", "protocol": "tcp"} in listed
            assert {"local": f"127.0.0.1:{ssh}", "remote": f"{DEVICE}:22", "protocol": "tcp"} in listed
            (tunnel,) = [one for one in listed if one["protocol"] == "unix"]
            assert tunnel["local"] == f"{directory}/podman.sock"
            assert tunnel["remote"] == f"ssh-tunnel://core@{DEVICE}:22/run/podman/podman.sock?key={key}"
            with socket.create_connection(("127.0.0.1", ssh), LIMIT_S):
                guest.listen(22)
            guest.close()
            assert process.wait(LIMIT_S) == 0  # with the machine's end
        wait_until(lambda: len(notes.heard) == 3, why=lambda: str(notes.heard))
        assert [note["notification_type"] for note in notes.heard] == [
            "ready",
            "connection_established",
            "connection_closed",
        ]
        assert {note["mac_address"] for note in notes.heard[1:]} == {MAC}
        assert not pid_file.exists()
    finally:
        notes.close()


@pytest.mark.parametrize("how", ["signal", "gone"])
def test_a_machine_of_vfkit_and_the_end(directory: Path, how: str) -> None:
    with (
        started(
            directory, "-listen-vfkit", f"unixgram://{directory}/v", "-ssh-port", str(ssh := free_port())
        ) as process,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as guest,
    ):
        guest.bind(str(directory / "vfkit-1.sock"))
        guest.connect(str(directory / "v"))
        guest.settimeout(LIMIT_S)
        mac, own = bytes.fromhex(MAC.replace(":", "")), packets.ip(DEVICE)
        question = packets.arp(1, mac, own, bytes(6), packets.ip(GATEWAY))
        guest.send(packets.ether(b"\xff" * 6, mac, packets.ARP, question))
        assert guest.recv(2000)[22:32] == bytes.fromhex("5a94efe40cdd") + packets.ip(GATEWAY)
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        else:  # noticed by what is sent to it in vain
            guest.close()
            socket.create_connection(("127.0.0.1", ssh), LIMIT_S).close()
        assert process.wait(3 * LIMIT_S) == 0


def test_gvforwarder_by_the_api_alone(directory: Path) -> None:
    """No `-listen-...`: machines come by `/connect`."""
    with started(directory, "-listen", f"unix://{directory}/api", "-ssh-port", "-1") as process:
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(str(directory / "api"))
            guest.settimeout(LIMIT_S)
            guest.sendall(b"POST /connect HTTP/1.1\r\nHost: x\r\n\r\n")
            mac = bytes.fromhex(MAC.replace(":", ""))
            question = packets.ether(
                b"\xff" * 6, mac, packets.ARP, packets.arp(1, mac, packets.ip(DEVICE), bytes(6), packets.ip(GATEWAY))
            )
            guest.sendall(struct.pack("<H", len(question)) + question)
            answer = guest.recv(2000)
            assert answer[2 + 28 : 2 + 32] == packets.ip(GATEWAY)
        process.send_signal(signal.SIGINT)
        assert process.wait(3 * LIMIT_S) == 0


def test_what_prevents_a_start_is_told_with_status_1(directory: Path) -> None:
    (directory / "q").write_text("a file")
    run = subprocess.run(
        [program(directory, "gvproxy"), "-ssh-port", "-1", "-listen-qemu", f"unix://{directory}/q"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("gvproxy: ") and f"{directory}/q exists and is not a socket" in last
