"""The time a guest is told (P01, P02, F8, F9)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Endpoint
from ntp import limit, packet
from ntp.hostclock import ClockState
from ntp.packet import Packet
from ntp.server import LOCAL_STRATUM, Server

GUEST = Endpoint.of("192.168.65.3", 40000)
STAMP = 0xE000_0001_8000_0000


def asked(server: Server, request: bytes) -> list[Packet]:
    answers: list[bytes] = []
    server.datagram(request, GUEST, answers.append)
    assert all(len(answer) == packet.SIZE for answer in answers)
    return [packet.parse(answer) for answer in answers]


def counted(server: Server) -> dict[str, int]:
    return {name: count for name, count in server.counters.items() if count}


def ticking(*instants: float) -> Callable[[], float]:
    left = list(instants)
    return lambda: left.pop(0)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("mode", "answered_as"), [(packet.CLIENT, packet.SERVER), (packet.SYMMETRIC_ACTIVE, packet.SYMMETRIC_PASSIVE)]
)
def test_a_client_gets_the_time_in_its_own_version(version: int, mode: int, answered_as: int) -> None:  # P01
    server = Server(ticking(1_700_000_000.25, 1_700_000_000.5))
    request = packet.emit(Packet(version=version, mode=mode, poll=6, transmit=STAMP, leap=3))
    (answer,) = asked(server, request)
    assert (answer.version, answer.mode, answer.poll, answer.leap) == (version, answered_as, 6, 0)
    assert 1 <= answer.stratum < 16
    assert answer.origin == STAMP
    assert answer.receive == packet.timestamp(1_700_000_000.25)
    assert answer.transmit == packet.timestamp(1_700_000_000.5)
    assert 0 <= answer.transmit - answer.reference <= 64 << 32
    assert 0 < answer.root_delay / 2 + answer.root_dispersion < 2**16, (
        "RFC 5905: a root distance over 1 s is not usable"
    )
    assert -30 < answer.precision < -10


@pytest.mark.parametrize(
    "tail",
    [b"", bytes(4), b"\0" * 20, b"\x01\x04\x00\x20" + bytes(28), bytes(1000)],
    ids=["none", "crypto-NAK", "MAC", "extension", "long"],
)
def test_what_follows_the_header_is_not_answered(tail: bytes) -> None:  # P02: never longer than the question
    (answer,) = asked(Server(), packet.emit(Packet(transmit=STAMP)) + tail)
    assert answer.origin == STAMP


@pytest.mark.parametrize("octets", [0, 1, 4, 12, 47, 49, 50, 51, 67, 1001])
def test_lengths_that_cannot_be_get_nothing(octets: int) -> None:  # RFC 5905 7.5
    server = Server()
    assert asked(server, (packet.emit(Packet(transmit=STAMP)) + bytes(1000))[:octets]) == []
    assert counted(server) == {"malformed": 1}


@pytest.mark.parametrize("mode", [0, 2, 4, 5, 6, 7])
def test_control_private_broadcast_and_answers_get_nothing(mode: int) -> None:  # P02
    server = Server()
    assert asked(server, packet.emit(Packet(mode=mode, transmit=STAMP))) == []
    assert counted(server) == {"ignored": 1}


def test_the_first_version_knew_no_modes() -> None:
    (answer,) = asked(Server(), packet.emit(Packet(version=1, mode=0, transmit=STAMP)))
    assert (answer.version, answer.mode, answer.origin) == (1, packet.SERVER, STAMP)


@pytest.mark.parametrize("version", [0, 5, 6, 7])
def test_versions_that_do_not_exist_get_nothing(version: int) -> None:
    assert asked(Server(), packet.emit(Packet(version=version))) == []


@given(st.binary(max_size=100))
def test_any_octets_get_one_answer_or_none(octets: bytes) -> None:
    assert len(asked(Server(), octets)) <= (len(octets) >= packet.SIZE and len(octets) % 4 == 0)


@pytest.mark.parametrize("jump_s", [8 * 3600.0, 3600.0, -3600.0])
def test_the_time_is_right_in_the_first_answer_after_the_clock_jumped(jump_s: float) -> None:  # P01, F8, F9
    now = [1_700_000_000.0]
    server = Server(lambda: now[0])
    request = packet.emit(Packet(transmit=STAMP))
    asked(server, request)
    now[0] += jump_s
    (answer,) = asked(server, request)
    assert answer.transmit == packet.timestamp(now[0])
    assert answer.reference <= answer.transmit


def test_the_time_goes_on_over_the_end_of_the_era() -> None:
    end = 2_085_978_496.0  # 2036-02-07 06:28:16 UTC
    (answer,) = asked(Server(ticking(end - 0.25, end + 0.25)), packet.emit(Packet(transmit=STAMP)))
    assert (answer.transmit - answer.receive) % 2**64 == 2**31


# What is said of the host's clock


@pytest.mark.parametrize(
    ("state", "leap", "local", "dispersion_s"),
    [
        pytest.param(ClockState(synchronised=True, max_error_s=0.02), 0, False, 0.02, id="synchronised"),
        pytest.param(ClockState(synchronised=True, max_error_s=0.02, leap=1), 1, False, 0.02, id="a second more"),
        pytest.param(ClockState(synchronised=True, max_error_s=0.02, leap=2), 2, False, 0.02, id="a second less"),
        pytest.param(ClockState(synchronised=True, max_error_s=0.0), 0, False, 0.001, id="just set"),
        pytest.param(ClockState(synchronised=True, max_error_s=5.0), 0, False, 0.25, id="set hours ago"),
        pytest.param(ClockState(synchronised=False, max_error_s=16.0), 0, True, 0.25, id="not synchronised"),
        pytest.param(ClockState(synchronised=False, max_error_s=0.0), 0, True, 0.25, id="not synchronised, unknown"),
        pytest.param(None, 0, True, 0.25, id="unknown"),
    ],
)
def test_a_guest_hears_how_good_the_hosts_clock_is_and_may_use_it_always(
    state: ClockState | None, leap: int, local: bool, dispersion_s: float
) -> None:
    (answer,) = asked(Server(host_state=lambda: state), packet.emit(Packet(transmit=STAMP)))
    assert answer.leap == leap
    assert (answer.stratum == LOCAL_STRATUM) is local
    assert (answer.refid[:2] == bytes((127, 127))) is local
    assert answer.root_delay / 2 + answer.root_dispersion == pytest.approx(dispersion_s * 2**16, abs=1)


def test_the_kernel_is_asked_once_a_second_and_again_when_the_clock_was_set() -> None:
    now, states = [1_700_000_000.0], [ClockState(synchronised=n % 2 == 0, max_error_s=0.1) for n in range(5)]
    server = Server(lambda: now[0], host_state=lambda: states.pop(0))
    heard = []
    for at in (0.0, 0.5, 0.99, 1.0, 1.9, 3600.0, 0.0, 0.9, -3600.0):
        now[0] = 1_700_000_000.0 + at
        (answer,) = asked(server, packet.emit(Packet(transmit=STAMP)))
        heard.append(answer.stratum == LOCAL_STRATUM)
    assert heard == [False, False, False, True, True, False, True, True, False]
    assert not states


# Too many questions


def test_who_asks_too_often_is_told_once_a_second_and_others_are_answered() -> None:  # RFC 5905 7.4
    monotonic = [50.0]
    server = Server(clock=lambda: monotonic[0])
    request = packet.emit(Packet(version=3, poll=4, transmit=STAMP))
    answers = [answer for _ in range(1000) for answer in asked(server, request)]
    kiss = answers.pop()
    assert len(answers) == limit.BURST and all(answer.stratum for answer in answers)
    assert (kiss.leap, kiss.version, kiss.mode, kiss.stratum) == (packet.ALARM, 3, packet.SERVER, 0)
    assert kiss.refid == packet.KISS_RATE and kiss.poll >= 6
    assert kiss.origin == kiss.receive == kiss.transmit == STAMP, "it sets nobody's clock"
    assert counted(server) == {"answered": limit.BURST, "limited": 1000 - limit.BURST, "kisses": 1}

    other: list[bytes] = []
    server.datagram(request, Endpoint.of("192.168.65.4", 123), other.append)
    assert packet.parse(other[0]).stratum
    monotonic[0] += 1.0
    later = [answer for _ in range(1000) for answer in asked(server, request)]
    assert [answer.stratum == 0 for answer in later] == [False] * int(limit.RATE_PER_S) + [True]


def test_a_clock_that_is_set_does_not_change_how_often_one_may_ask() -> None:
    now = [1_700_000_000.0]
    server = Server(lambda: now[0], clock=lambda: 50.0)
    request = packet.emit(Packet(transmit=STAMP))
    for _ in range(limit.BURST):
        (answer,) = asked(server, request)
        assert answer.stratum
        now[0] -= 3600
    (kiss,) = asked(server, request)
    assert kiss.stratum == 0


# Real clients


@contextlib.asynccontextmanager
async def served(address: str, port: int, offset_s: float) -> AsyncIterator[tuple[int, Server]]:
    server = Server(lambda: time.time() + offset_s)

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.DatagramTransport, transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            server.datagram(data, Endpoint.of(*addr), lambda reply: self.transport.sendto(reply, addr))

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Datagrams, local_addr=(address, port))
    try:
        yield transport.get_extra_info("sockname")[1], server
    finally:
        transport.close()
        await asyncio.sleep(0)


async def run(*command: str) -> str:
    # Without PYTHONPATH and elsewhere: NTPsec's own programs are Python and have a package `ntp` too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = await asyncio.create_subprocess_exec(
        *command, cwd="/", env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def closest(measure: Callable[[], Awaitable[float]], offset_s: float) -> float:
    """The best of some measurements, as NTP's own clock filter takes it: on a busy machine one packet may wait its turn."""
    best = math.inf
    for _ in range(8):
        best = min(best, await measure() - offset_s, key=abs)
        if abs(best) < 0.010:
            break
    return best


@pytest.mark.skipif(shutil.which("chronyd") is None, reason="chrony is not installed")
@pytest.mark.parametrize("offset_s", [0.0, 5.0, -3600.0])
@pytest.mark.parametrize("version", [3, 4])
async def test_chrony_takes_the_time(tmp_path: Path, offset_s: float, version: int) -> None:  # P01
    async with served("127.0.0.1", 0, offset_s) as (port, server):

        async def measure() -> float:
            output = await run(
                "chronyd",
                "-Q",  # print the offset and end
                "-x",
                *(("-u", "root") if os.geteuid() == 0 else ("-U",)),
                *("-t", "10"),
                f"server 127.0.0.1 port {port} iburst maxsamples 1 version {version}",
                f"pidfile {tmp_path / 'chronyd.pid'}",
                "cmdport 0",
                "bindcmdaddress /",
            )
            (measured,) = re.findall(r"System clock wrong by (-?[\d.]+) seconds", output)
            return float(measured)

        assert abs(await closest(measure, offset_s)) < 0.010
        assert server.counters["answered"] >= 1


@pytest.mark.skipif(shutil.which("ntpdig") is None, reason="expected: ntpsec-ntpdig is not installed")
async def test_ntpdig_takes_the_time() -> None:  # P01
    async def measure() -> float:
        output = await run("ntpdig", "-t", "5", "127.0.0.123")
        (measured,) = re.findall(r"([+-][\d.]+) \+/- [\d.]+ 127\.0\.0\.123", output)
        return float(measured)

    try:
        async with served("127.0.0.123", 123, 5.0):
            assert abs(await closest(measure, 5.0)) < 0.010
    except PermissionError:
        pytest.skip("expected: only root may take port 123, and ntpdig knows no other")
