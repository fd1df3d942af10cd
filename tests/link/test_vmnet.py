"""The VMN3T handshake, octet for octet (vpnkit.md 2.2 and Appendix E)."""

from __future__ import annotations

import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import GuestError
from netstack.link.vmnet import Handshake, Request, emit_command, emit_disconnect, emit_init, emit_vif

INIT = bytes.fromhex("564d4e335416000000") + b"0123456789" * 4
TEXT = b"d1d9cd61-d0dc-4715-9bc3-4c11dad7ada5"
UUID = uuid.UUID(TEXT.decode())
ETHERNET = b"\x01" + TEXT + bytes(4)
PREFERRED = b"\x08" + TEXT + bytes.fromhex("fa41a8c0")
VIF = bytes.fromhex("01dc050e06025000000001") + bytes(247)
NO_ADDRESS = b"\x02\x1aNo IP addresses available." + bytes(230)


class Addresses:
    """Grants 192.168.65.3 and 02:50:00:00:00:01, or refuses; remembers what it was asked."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.asked: list[tuple[uuid.UUID, bytes | None]] = []

    def __call__(self, identity: uuid.UUID, preferred: bytes | None) -> tuple[bytes, bytes]:
        self.asked.append((identity, preferred))
        if self.refusal:
            raise GuestError(self.refusal)
        return bytes((192, 168, 65, 3)), bytes.fromhex("025000000001")


def handshake(addresses: Addresses | None = None) -> Handshake:
    return Handshake(mtu=1500, reserve=addresses or Addresses(), rng=random.Random(1))


def test_vectors_have_the_lengths_of_the_protocol() -> None:
    assert (len(INIT), len(ETHERNET), len(PREFERRED), len(VIF), len(NO_ADDRESS)) == (49, 41, 41, 258, 258)
    assert emit_init() == INIT
    assert emit_command(Request(uuid=UUID, preferred=None)) == ETHERNET
    assert emit_command(Request(uuid=UUID, preferred=bytes((192, 168, 65, 250)))) == PREFERRED
    assert emit_vif(1500, bytes.fromhex("025000000001")) == VIF
    assert emit_disconnect("No IP addresses available.") == NO_ADDRESS


@pytest.mark.parametrize("step", [1, 7, 49, 90])
def test_a_client_gets_its_interface(step: int) -> None:
    engine = handshake()
    stream = INIT + ETHERNET
    answer = b"".join(engine.feed(stream[at : at + step]) for at in range(0, len(stream), step))
    assert answer == INIT + VIF
    assert engine.identity is not None and engine.identity.uuid == UUID
    assert engine.failure is None
    assert engine.wanted == 0


def test_the_preferred_address_is_read_in_its_reversed_order() -> None:
    addresses = Addresses()
    handshake(addresses).feed(INIT + PREFERRED)
    assert addresses.asked == [(UUID, bytes((192, 168, 65, 250)))]


def test_no_preference_is_no_preference() -> None:
    addresses = Addresses()
    handshake(addresses).feed(INIT + ETHERNET)
    handshake(addresses).feed(INIT + b"\x08" + TEXT + bytes(4))
    assert addresses.asked == [(UUID, None)] * 2


def test_reading_what_is_wanted_never_reaches_into_the_frames() -> None:
    engine = handshake()
    stream = INIT + ETHERNET + b"\x2a\0" + bytes(42)
    position = 0
    while wanted := engine.wanted:
        engine.feed(stream[position : position + wanted])
        position += wanted
    assert position == len(INIT + ETHERNET)
    assert engine.identity is not None


def test_another_version_is_answered_and_closed() -> None:
    engine = handshake()
    assert engine.feed(b"VMN3T" + (21).to_bytes(4, "little") + bytes(40)) == INIT
    assert engine.failure is not None and "21" in engine.failure
    assert engine.feed(ETHERNET) == b""
    assert engine.identity is None


def test_the_magic_is_not_looked_at() -> None:
    assert handshake().feed(b"VMNET" + INIT[5:] + ETHERNET) == INIT + VIF


@pytest.mark.parametrize("command", [0, 2, 6, 9, 255])
def test_an_unknown_command_is_closed_in_silence(command: int) -> None:
    engine = handshake()
    assert engine.feed(INIT + bytes((command,)) + TEXT + bytes(4)) == INIT
    assert engine.failure is not None


@pytest.mark.parametrize(
    "text",
    [b"x" * 36, TEXT[:-1] + b"g", TEXT.replace(b"-", b"0"), b"{" + TEXT[:34] + b"}", b"\xff" * 36, TEXT[:35] + b"\0"],
)
def test_a_uuid_that_is_none_is_closed_in_silence(text: bytes) -> None:
    engine = handshake()
    assert engine.feed(INIT + b"\x01" + text + bytes(4)) == INIT
    assert engine.failure is not None


def test_a_uuid_of_zeros_is_replaced_by_a_random_one() -> None:
    addresses = Addresses()
    for seed in (1, 2):
        engine = Handshake(mtu=1500, reserve=addresses, rng=random.Random(seed))
        engine.feed(INIT + b"\x01" + bytes(40))
        assert engine.identity is not None and engine.identity.uuid.version == 4
    assert addresses.asked[0] != addresses.asked[1]


def test_uuids_are_compared_by_value() -> None:
    addresses = Addresses()
    handshake(addresses).feed(INIT + ETHERNET)
    handshake(addresses).feed(INIT + b"\x01" + TEXT.upper() + bytes(4))
    assert addresses.asked[0] == addresses.asked[1]


@pytest.mark.parametrize(
    "reason",
    [
        "Preferred IP address out of range.",
        "Preferred IP address 192.168.65.250 already used.",
        "No IP addresses available.",
        "UUID already assigned to a different IP than the IP requested by the client",
    ],
)
def test_a_refusal_is_told_and_closed(reason: str) -> None:
    engine = handshake(Addresses(reason))
    answer = engine.feed(INIT + PREFERRED)
    assert answer == INIT + (bytes((2, len(reason))) + reason.encode()).ljust(258, b"\0")
    assert engine.failure == reason
    assert engine.identity is None


def test_a_large_mtu_fits_the_answer() -> None:
    assert emit_vif(65520, bytes(6))[1:5] == (65520).to_bytes(2, "little") + (65535).to_bytes(2, "little")


@given(data=st.lists(st.binary(max_size=120), max_size=6))
def test_garbage_never_raises(data: list[bytes]) -> None:  # G12
    engine = handshake()
    for part in data:
        engine.feed(part)


@given(tail=st.binary(max_size=41))
def test_garbage_after_a_good_greeting_never_raises(tail: bytes) -> None:
    engine = handshake()
    assert engine.feed(INIT) == INIT
    engine.feed(tail)
