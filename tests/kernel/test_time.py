"""The guest's clock from the gateway, by the programs people use and by hand (P01, P02, F8)."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ntp import limit, packet
from ntp.packet import Packet
from tests.support.netns import GATEWAY, Daemon, Namespace, World, require

pytestmark = pytest.mark.netns

NEAR_S = 0.010
NTP = (GATEWAY, 123)
TIMESYNCD = Path("/usr/lib/systemd/systemd-timesyncd")


@dataclass(frozen=True)
class Timed:
    """A guest with a lease, and its daemon; guest and host have the same kernel, so the true offset is 0."""

    guest: Namespace
    daemon: Daemon


@pytest.fixture(scope="module")
def timed(shared: World) -> Iterator[Timed]:
    require("chronyd")
    guest = shared.namespace()
    daemon = shared.daemon("--link", f"tap:netns={guest.name}")
    assert guest.udhcpc() == "192.168.65.3"
    yield Timed(guest, daemon)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def _closest(measure: Callable[[], float]) -> float:
    """The best of some measurements, as NTP's own clock filter takes it: on a busy machine a packet may wait its turn."""
    best = measure()
    for _ in range(9):
        if abs(best) < NEAR_S:
            break
        best = min(best, measure(), key=abs)
    return best


def _ask(client: socket.socket, version: int = 4, mode: int = packet.CLIENT) -> tuple[Packet, float]:
    """The answer to a question on a connected socket, and the offset of RFC 5905 8."""
    sent = time.time()
    request = Packet(version=version, mode=mode, poll=6, transmit=packet.timestamp(sent))
    client.send(packet.emit(request))
    octets = client.recv(1000)
    arrived = packet.timestamp(time.time())
    answer = packet.parse(octets)
    assert len(octets) == packet.SIZE
    assert (answer.version, answer.origin) == (version, request.transmit)
    return answer, _seconds((answer.receive - request.transmit) + (answer.transmit - arrived)) / 2


def _seconds(ticks: int) -> float:
    return ticks / 2**32


def _said(child: subprocess.Popen[str], pattern: str, limit_s: float = 60.0) -> Generator[re.Match[str], None, None]:
    """What of `pattern` a program says, as it says it; it is ended after `limit_s`, or when nobody wants more."""
    stop = threading.Timer(limit_s, child.kill)
    stop.start()
    said = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            said.append(line)
            found = re.search(pattern, line)
            if found is not None:
                yield found
        raise AssertionError(f"never said {pattern!r}:\n{''.join(said)}")
    finally:
        stop.cancel()
        child.terminate()
        child.wait()


def _client(guest: Namespace, source: str = "") -> socket.socket:
    made = guest.socket(socket.SOCK_DGRAM)
    if source:
        made.bind((source, 0))
    made.connect(NTP)
    return made


@pytest.mark.parametrize("version", [3, 4])
def test_chronyd(timed: Timed, version: int) -> None:
    def measure() -> float:
        words = [
            "chronyd",
            "-Q",
            "-t",
            "10",
            "-f",
            "/dev/null",
            f"server {GATEWAY} iburst maxsamples 1 version {version}",
        ]
        done = timed.guest.run(*words, limit_s=30)
        offset = re.search(r"System clock wrong by (-?[0-9.]+) seconds", done.stdout + done.stderr)
        assert offset is not None, done
        return float(offset[1])

    assert abs(_closest(measure)) < NEAR_S


def test_chronyd_that_goes_on_takes_the_gateway_for_its_source(timed: Timed) -> None:
    """As a daemon, without touching the clock (`-x`): after some samples the gateway is selected, also as the only source."""
    words = ["chronyd", "-d", "-x", "-U", "-u", "root", "-f", "/dev/null", f"server {GATEWAY} iburst", "cmdport 0"]
    child = timed.guest.start(*words, "bindcmdaddress /", "pidfile /run/chronyd.pid")
    with contextlib.closing(_said(child, f"Selected source {GATEWAY}")) as said:
        next(said)


@pytest.mark.skipif(shutil.which("ntpdig") is None, reason="expected: ntpsec-ntpdig is not installed")
def test_ntpdig(timed: Timed) -> None:
    def measure() -> float:
        said = timed.guest.run("ntpdig", "-t", "10", GATEWAY).stdout
        offset = re.search(r"([+-][\d.]+) \+/- [\d.]+ " + re.escape(GATEWAY), said)
        assert offset is not None, said
        return float(offset[1])

    assert abs(_closest(measure)) < NEAR_S


def test_busybox_ntpd(timed: Timed) -> None:
    applets = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=False).stdout.split()
    if "ntpd" not in applets:
        pytest.skip("expected: Debian's busybox is built without ntpd")
    child = timed.guest.start("busybox", "ntpd", "-n", "-w", "-ddd", "-p", GATEWAY)
    with contextlib.closing(_said(child, r"offset:([+-][\d.]+)")) as said:
        assert abs(_closest(lambda: float(next(said)[1]))) < NEAR_S


@pytest.mark.skipif(not TIMESYNCD.exists(), reason="expected: Debian has either chrony or systemd-timesyncd")
def test_systemd_timesyncd(timed: Timed) -> None:
    """Alone: no bus, a user namespace in which it may not set the clock of this machine, and its user is the only one."""
    prepare = (
        "sed -i /^systemd-timesync:/d /etc/passwd /etc/group && echo systemd-timesync:x:0:0::/:/bin/sh >>/etc/passwd && "
        "echo systemd-timesync:x:0: >>/etc/group && mkdir -p /run/systemd/timesync /etc/systemd && "
        f"printf '[Time]\\nNTP={GATEWAY}\\n' >/etc/systemd/timesyncd.conf"
    )
    timed.guest.run("sh", "-c", prepare)
    words = ["env", "SYSTEMD_LOG_LEVEL=debug", "SYSTEMD_LOG_TARGET=console", str(TIMESYNCD)]
    child = timed.guest.start("unshare", "--user", "--map-root-user", *words)
    with contextlib.closing(_said(child, f"Contacted time server {GATEWAY}")) as said:
        next(said)  # it did not refuse the answer, and would have set the clock


@pytest.mark.parametrize("mode", [packet.CLIENT, packet.SYMMETRIC_ACTIVE])
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_client_of_any_version(timed: Timed, version: int, mode: int) -> None:
    with _client(timed.guest) as client:
        answer, _ = _ask(client, version, mode)
        assert answer.mode == mode + 1 and answer.leap != packet.ALARM and 1 <= answer.stratum < 16
        assert abs(_closest(lambda: _ask(client, version, mode)[1])) < NEAR_S


def test_control_private_and_broadcast_get_nothing(timed: Timed) -> None:
    """P02: what follows is the answer to the one question among them."""
    with _client(timed.guest) as client:
        for mode in (6, 7, 5, 4, 2):
            client.send(packet.emit(Packet(version=2, mode=mode)))
            client.send(packet.emit(Packet(version=2, mode=mode)) + bytes(400))
        client.send(bytes.fromhex("17000300") + bytes(4))  # ntpdc's monlist, the amplifier of 2014
        client.send(bytes.fromhex("160200010000000000000000"))  # ntpq's readvar
        _ask(client)


def test_a_thousand_questions_from_many_addresses(timed: Timed) -> None:
    addresses = [f"192.168.65.{n}" for n in range(20, 220)]
    for address in addresses:
        timed.guest.ip("addr", "add", f"{address}/32", "dev", "eth0")
    before = timed.daemon.rss_mib()
    clients = [_client(timed.guest, address) for address in addresses]
    try:
        offsets = [_ask(client)[1] for _ in range(5) for client in clients]
    finally:
        for client in clients:
            client.close()
        for address in addresses:
            timed.guest.ip("addr", "del", f"{address}/32", "dev", "eth0")
    assert len(offsets) == 1000
    assert abs(sorted(offsets)[500]) < NEAR_S
    assert timed.daemon.rss_mib() - before < 4


def test_a_storm_is_told_to_calm_down_and_another_guest_is_answered(timed: Timed) -> None:
    """RFC 5905 7.4."""
    timed.guest.ip("addr", "add", "192.168.65.19/32", "dev", "eth0")
    with _client(timed.guest, "192.168.65.19") as storm, _client(timed.guest) as other:
        storm.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        request = Packet(transmit=packet.timestamp(time.time()))
        start = time.monotonic()
        for _ in range(40):
            for _ in range(50):
                storm.send(packet.emit(request))
            _ask(other)
        took = time.monotonic() - start
        storm.setblocking(False)
        answers = []
        while True:
            try:
                answers.append(packet.parse(storm.recv(1000)))
            except BlockingIOError:
                break
    timed.guest.ip("addr", "del", "192.168.65.19/32", "dev", "eth0")
    kisses = [answer for answer in answers if answer.stratum == 0]
    assert 1 <= len(kisses) <= took / limit.KISS_S + 1
    assert all(kiss.refid == packet.KISS_RATE and kiss.origin == request.transmit for kiss in kisses)
    assert limit.BURST <= len(answers) - len(kisses) <= limit.BURST + limit.RATE_PER_S * took


def test_right_at_once_after_the_daemon_stood_still(timed: Timed) -> None:
    """F8: a question that waited is answered with the time of the answer, and the next is as near as ever."""
    with _client(timed.guest) as client, _client(timed.guest) as waiting:
        _ask(client)
        timed.daemon.process.send_signal(signal.SIGSTOP)
        try:
            asked = time.time()
            waiting.send(packet.emit(Packet(transmit=packet.timestamp(asked))))
            time.sleep(1.5)  # longer than anything is kept
            woken = packet.timestamp(time.time())
        finally:
            timed.daemon.process.send_signal(signal.SIGCONT)
        answer = packet.parse(waiting.recv(1000))
        arrived = packet.timestamp(time.time())
        assert answer.origin == packet.timestamp(asked)
        assert woken <= answer.receive <= answer.transmit <= arrived
        assert abs(_closest(lambda: _ask(client)[1])) < NEAR_S
