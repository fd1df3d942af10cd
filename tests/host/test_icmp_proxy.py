"""Ping and ICMP errors as a guest sees them (conformance C01-C04, C09; threats G25, G29, R1)."""

from __future__ import annotations

import errno
import hashlib
import logging
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from netstack.observe.metrics import Drop
from netstack.settings import Network
from tests.udp.support import ALIAS, GATEWAY, GUEST, OTHER, World, echo, ones_sum, raw_packet, udp_packet

OUTSIDE = bytes((192, 0, 2, 1))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("octets", [0, 1, 56, 1472, 9000, 65507])
@pytest.mark.parametrize("own", [GATEWAY, ALIAS])
def test_echo_to_the_gateway_and_the_host_alias_is_answered_whatever_its_size(
    world: World, own: bytes, octets: int
) -> None:  # C01
    data = hashlib.shake_128(b"ping").digest(octets)
    world.ping(own, 0x1234, 7, data)
    (reply,) = world.echoes()
    assert (reply.source, reply.destination) == (own, GUEST)
    assert (reply.identifier, reply.sequence, reply.data) == (0x1234, 7, data)
    assert not world.io.open


def test_the_alias_does_not_answer_when_it_is_off() -> None:
    world = World(Network(host_alias=None))
    world.ping(ALIAS, 1, 1)
    assert world.echoes() == []
    assert [(error.type, error.code) for error in world.output.errors] == [(3, 1)]
    world.close()


def test_bad_checksums_and_cut_messages_are_dropped(world: World) -> None:  # C03, C09
    good = echo(8, 1, 1, b"data")
    for message, drop in [
        (good[:-1] + b"!", Drop.ICMP_CHECKSUM),
        (good[:7], Drop.ICMP_MALFORMED),
        (b"", Drop.ICMP_MALFORMED),
    ]:
        packet: Any = raw_packet(world.port, GUEST, GATEWAY, 1, message)
        world.icmp.input(packet, world.now)
        assert world.counters.drops[drop] >= 1
    assert world.echoes() == [] and world.output.errors == []


@pytest.mark.parametrize("kind", [0, 1, 2, 5, 9, 10, 13, 15, 17, 40, 255])
def test_other_types_are_counted_and_nothing_else(world: World, kind: int) -> None:
    packet: Any = raw_packet(world.port, GUEST, GATEWAY, 1, echo(kind, 1, 1, b""))
    world.icmp.input(packet, world.now)
    assert world.counters.drops[Drop.ICMP_UNHANDLED] == 1
    assert world.output.sent == [] and world.output.errors == []


@pytest.mark.parametrize("destination", ["127.0.0.1", "169.254.169.254", "0.0.0.0", "192.168.65.9"])
def test_forbidden_destinations_are_not_pinged(world: World, destination: str) -> None:  # G25
    world.io.error = errno.EMFILE  # a socket asked for would be counted as missing
    world.ping(bytes(map(int, destination.split("."))), 1, 1)
    assert [error.type for error in world.output.errors] == [3]
    assert world.counters.drops == {Drop.POLICY: 1}


def test_where_ping_sockets_are_forbidden_there_is_silence_one_log_line_and_a_try_each_minute(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:  # C02, vpnkit 10
    world.io.error = errno.EACCES
    with caplog.at_level(logging.INFO, logger="pyvpnkit"):
        for _ in range(10):
            world.now += 20
            world.ping(OUTSIDE, 1, 1)
    assert len(caplog.records) == 1
    assert "ping_group_range" in caplog.text
    assert world.counters.drops[Drop.PING_FORBIDDEN] == 10
    assert world.output.errors == [] and world.output.sent == []
    world.ping(GATEWAY, 1, 1)
    assert len(world.echoes()) == 1


def test_without_descriptors_a_ping_is_lost_and_counted(world: World) -> None:  # R1, F19
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
        world.io.error = number
        world.ping(OUTSIDE, 1, 1)
    assert world.counters.drops == {Drop.DESCRIPTORS: 4}


def guest_error(world: World, source: bytes, kind: int, code: int, rest: bytes, quoted: bytes) -> None:
    message = struct.pack("!BBH4s", kind, code, 0, rest) + quoted
    message = message[:2] + struct.pack("!H", 0xFFFF ^ ones_sum(message)) + message[4:]
    packet: Any = raw_packet(world.port, source, OUTSIDE, 1, message)
    world.icmp.input(packet, world.now)


def test_a_guests_error_reaches_the_protocol_it_quotes_and_only_about_packets_to_that_guest(
    world: World,
) -> None:  # T55, G29
    heard: list[tuple[int, int, int, bytes]] = []
    world.icmp.guest_errors[17] = lambda packet, kind, code, mtu, quoted, now: heard.append(
        (kind, code, mtu, bytes(quoted))
    )
    sent = bytes(udp_packet(world.port, OUTSIDE, 53, GUEST, 4000, b"answer").data)
    guest_error(world, GUEST, 3, 4, struct.pack("!HH", 0, 1280), sent[:28])
    guest_error(world, GUEST, 3, 3, bytes(4), sent[:28])
    assert heard == [(3, 4, 1280, sent[:28]), (3, 3, 0, sent[:28])]
    unheard = [
        (OTHER, sent[:28]),  # about somebody else's packet
        (GUEST, sent[:27]),
        (GUEST, sent[:19]),
        (GUEST, b""),
        (GUEST, b"\x65" + sent[1:]),  # version 6
        (GUEST, b"\x44" + sent[1:]),  # header length 16
        (GUEST, b"\x4f" + sent[1:28]),  # header length 60
        (GUEST, sent[:9] + b"\x06" + sent[10:28]),  # nobody asked for TCP's
    ]
    for source, quoted in unheard:
        guest_error(world, source, 3, 4, struct.pack("!HH", 0, 1280), quoted)
    assert len(heard) == 2
    assert world.counters.drops[Drop.ICMP_UNHANDLED] == len(unheard)


def test_a_guests_port_unreachable_ends_its_mapping_through_the_whole_chain(world: World) -> None:  # U07
    world.icmp.guest_errors[17] = world.proxy.guest_error
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    assert len(world.io.open) == 1
    sent = bytes(udp_packet(world.port, ALIAS, server.getsockname()[1], GUEST, 4000, b"answer").data)
    guest_error(world, GUEST, 3, 3, bytes(4), sent[:28])
    assert not world.io.open
