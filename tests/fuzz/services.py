"""Z10: DHCP and NTP. Neither server raises for what a guest sends, and what they answer can be read and is right."""

from __future__ import annotations

import random
import struct

from netstack.api import Endpoint
from netstack.dhcp.leases import Leases
from netstack.dhcp.server import Server as DhcpServer
from netstack.errors import Malformed
from netstack.settings import Limits, Network
from netstack.wire import dhcp
from ntp import packet as ntp_packet
from ntp.server import Server as NtpServer
from tests.fuzz.bend import spoil

GATEWAY = bytes((10, 0, 2, 1))
POOL = [bytes((10, 0, 2, last)) for last in range(3, 15)]
MACS = [bytes((2, 0, 0, 0, 0, last)) for last in range(6)]
NETWORK = Network(
    subnet="10.0.2.0/28",
    gateway="10.0.2.1",
    host_alias="10.0.2.2",
    static_leases={MACS[0].hex(":"): "10.0.2.9"},
    search=tuple(f"department-{number}.example" for number in range(40)),
    limits=Limits(max_leases_per_port=3),
)
CODES = [1, 3, 6, 12, 15, 26, 28, 42, 50, 51, 52, 54, 55, 57, 61, 81, 119, 121, 0, 82, 254]
ADDRESSES = [*POOL, GATEWAY, bytes(4), b"\xff" * 4, bytes((8, 8, 8, 8)), bytes((10, 0, 2, 0)), bytes((10, 0, 2, 15))]


def value(rng: random.Random, code: int) -> bytes:
    """Something that an option may hold, or may not."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(256))
    match code:
        case 50 | 54:
            return rng.choice(ADDRESSES if code == 50 else [GATEWAY, GATEWAY, rng.choice(ADDRESSES)])
        case 51:
            return struct.pack("!I", rng.choice([0, 1, 120, 3600, 0xFFFFFFFF]))
        case 57:
            return struct.pack("!H", rng.choice([0, 300, 576, 1500, 65535]))
        case 55:
            return bytes(rng.choice(CODES) for _ in range(rng.randrange(20)))
        case 12:
            return rng.choice([b"box", b"Box.internal", b"a b", b"\xff\0", b"-", b"x" * 255, b""])
        case 81:
            return rng.choice([b"\0\0\0box", b"\4\0\0\3box\0", b"\4\0\0\xffbox", b"\1\0\0", b""])
        case _:
            return rng.randbytes(rng.randrange(8))


def request(rng: random.Random, mac: bytes, kind: int) -> bytes:
    """A client's message, put together by hand."""
    head = struct.pack(
        "!BBBBIHH4s4s4s4s16s64s128s",
        rng.choice([1] * 20 + [2, 0]),
        rng.choice([1] * 20 + [6]),
        rng.choice([6] * 20 + [0, 16, 17]),
        0,
        rng.getrandbits(32),
        0,
        rng.choice([0, 0x8000]),
        rng.choice([bytes(4), bytes(4), rng.choice(ADDRESSES)]),
        bytes(4),
        bytes(4),
        rng.choice([bytes(4)] * 20 + [GATEWAY]),
        mac,
        rng.choice([b"", b"\x0c\3box\xff"]),
        rng.choice([b"", b"\x32\4\x0a\0\2\5\xff"]),
    )
    options = bytes((53, 1, kind))
    for _ in range(rng.randrange(6)):
        code = rng.choice(CODES)
        content = value(rng, code)[:255]
        options += bytes((code, len(content))) + content
    return head + b"\x63\x82\x53\x63" + options + rng.choice([b"\xff", b"\xff", b""])


def _readable(asked: dhcp.Message, octets: bytes) -> int:
    """Check an answer by what RFC 2131 says of every one; returns its type."""
    answer = dhcp.parse(octets)
    kind = answer.options[53][0]
    assert len(octets) >= 300 and answer.op == 2 and (answer.xid, answer.chaddr) == (asked.xid, asked.chaddr)
    assert answer.options[54] == GATEWAY and kind in (2, 5, 6)
    assert kind == 6 or answer.options.get(1) in (None, b"\xff\xff\xff\xf0")
    assert all(answer.options[code] for code in answer.options), "an option without value"
    size = asked.options.get(57)
    limit = max(dhcp.MAX_MESSAGE, int.from_bytes(size, "big") if size else 0)
    assert len(octets) <= max(300, limit - 28)
    dhcp.decode_names(answer.options.get(119, b""))
    return kind


def _dhcp(rng: random.Random) -> None:
    leases = Leases(NETWORK)
    server = DhcpServer(NETWORK, leases, rng=rng)
    now = 0.0
    held: dict[bytes, bytes] = {}
    for _ in range(rng.randrange(1, 60)):
        now += rng.choice([0, 0, 0.5, 10, 200, 90_000])
        mac = rng.choice(MACS)
        octets = request(rng, mac, rng.choice([1, 1, 3, 3, 3, 3, 4, 7, 8, rng.randrange(256)]))
        if rng.random() < 0.2:
            octets = spoil(rng, octets)
        reply = server.handle(
            octets,
            source_mac=rng.choice([mac, mac, mac, MACS[1]]),
            source=rng.choice(ADDRESSES),
            destination=rng.choice([b"\xff" * 4, GATEWAY, POOL[0]]),
            port=rng.randrange(3),
            now=now,
            mtu=rng.choice([None, 9000]),
        )
        active = list(leases.active(now))
        assert len({lease.address for lease in active}) == len(active), "an address leased twice"
        held = {lease.address: lease.mac for lease in active}
        if reply is not None:
            asked = dhcp.parse(octets)
            kind = _readable(asked, reply.payload)
            answer = dhcp.parse(reply.payload)
            given = answer.yiaddr
            if kind == 5 and given != bytes(4):
                assert held[given] == asked.chaddr, "acknowledged, but another's"
            if given != bytes(4):
                assert given in POOL and held.get(given, asked.chaddr) == asked.chaddr
                assert (given == POOL[6]) <= (asked.chaddr == MACS[0]), "an address that is kept for another"
    server.timeout(now + 1e7)
    assert not list(leases.active(now + 1e7)), "a lease without end"


def _ntp(rng: random.Random) -> None:
    server = NtpServer(wall=lambda: rng.choice([0.0, 1.8e9, 4.3e9, -1.0, rng.random() * 1e10]))
    payload = bytes((rng.getrandbits(8),)) + rng.randbytes(rng.choice([0, 46, 47, 47, 47, 47, 51, 67, 200]))
    answers: list[bytes] = []
    server.datagram(payload, Endpoint(POOL[0], 123), answers.append)
    assert len(answers) <= (len(payload) >= ntp_packet.SIZE)
    try:
        asked = ntp_packet.parse(payload)
    except Malformed:
        assert len(payload) < ntp_packet.SIZE
        return
    assert ntp_packet.emit(asked) == payload[: ntp_packet.SIZE]
    for answer in answers:
        said = ntp_packet.parse(answer)
        assert len(answer) == ntp_packet.SIZE
        assert (said.version, said.origin) == (asked.version, asked.transmit)
        assert said.mode in (2, 4) and asked.mode in (0, 1, 3), "an answer to an answer"
        assert said.receive and said.transmit and said.reference


def z10_services(rng: random.Random) -> None:
    """A DHCP server of a small network over weeks; a time server at all times."""
    _dhcp(rng)
    for _ in range(5):
        _ntp(rng)
