"""The oracle itself: each rule fires on a frame that breaks it, and a good conversation breaks none."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.support import packets
from tests.support.drill import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC
from tests.support.oracle import Oracle, Violation
from tests.support.packets import ACK, FIN, IPV4, PSH, RST, SYN, ip

REMOTE = ip("93.184.216.34")
ISN, ISS = 1000, 77_000
SYN_OPTIONS = packets.mss_option(1460) + packets.scale_option(7) + packets.SACK_PERMITTED


def guest_frame(seq: int, ack: int, flags: int, window: int = 500, data: bytes = b"", options: bytes = b"") -> bytes:
    body = packets.tcp(GUEST, REMOTE, 40000, 80, seq, ack, flags, window, data, options)
    return packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packets.ipv4(GUEST, REMOTE, 6, body, df=True))


def our_packet(packet: bytes) -> bytes:
    return packets.ether(GUEST_MAC, GATEWAY_MAC, IPV4, packet)


def ours(
    seq: int, ack: int, flags: int, window: int = 500, data: bytes = b"", options: bytes = b"", **fields: object
) -> bytes:
    body = packets.tcp(REMOTE, GUEST, 80, 40000, seq, ack, flags, window, data, options, **fields)  # type: ignore[arg-type]
    return our_packet(packets.ipv4(REMOTE, GUEST, 6, body, df=True))


def established() -> Oracle:
    """After the handshake and 1,000 octets to the guest, 100 from it. The guest's window: 500 << 7 octets."""
    oracle = Oracle()
    oracle.guest_sent(guest_frame(ISN, 0, SYN, 65535, options=packets.mss_option(1400) + SYN_OPTIONS[4:]))
    oracle.stack_sent(ours(ISS, ISN + 1, SYN | ACK, 65535, options=SYN_OPTIONS))
    oracle.guest_sent(guest_frame(ISN + 1, ISS + 1, ACK))
    oracle.guest_sent(guest_frame(ISN + 1, ISS + 1, ACK | PSH, data=bytes(100)))
    oracle.stack_sent(ours(ISS + 1, ISN + 101, ACK, 1000, data=b"\7" * 1000))
    return oracle


NEXT, ACKED = ISS + 1001, ISN + 101


def test_a_good_conversation_passes() -> None:
    oracle = established()
    oracle.stack_sent(ours(ISS + 501, ACKED, ACK, 1000, data=b"\7" * 500))  # a retransmission
    oracle.stack_sent(ours(NEXT, ACKED, ACK | PSH, 1000, data=b"x"))
    oracle.stack_sent(ours(NEXT + 1, ACKED, ACK | FIN, 1000))
    oracle.stack_sent(ours(NEXT, ACKED, ACK | FIN, 1000, data=b"x"))
    oracle.guest_sent(guest_frame(ACKED, NEXT + 2, ACK | FIN))
    oracle.stack_sent(ours(NEXT + 2, ACKED + 1, ACK, 1000))


def changed(frame: bytes, at: int, value: bytes, *, ip_sum: bool = True) -> bytes:
    frame = frame[:at] + value + frame[at + len(value) :]
    if ip_sum:
        frame = frame[:24] + b"\0\0" + frame[26:]
        frame = frame[:24] + struct.pack("!H", packets.checksum(frame[14:34])) + frame[26:]
    return frame


BASE = ours(NEXT, ACKED, ACK, 1000, data=b"abcdefghij")
UDP = our_packet(packets.ipv4(REMOTE, GUEST, 17, packets.udp(REMOTE, GUEST, 7, 1234, b"hello")))
QUOTED = packets.ipv4(GUEST, REMOTE, 17, packets.udp(GUEST, REMOTE, 1234, 7, b"hello"))
ARP_REPLY = packets.ether(GUEST_MAC, GATEWAY_MAC, packets.ARP, packets.arp(2, GATEWAY_MAC, GATEWAY, GUEST_MAC, GUEST))


def error(quoted: bytes, kind: int = 3, code: int = 3, rest: bytes = bytes(4)) -> bytes:
    return our_packet(packets.ipv4(REMOTE, GUEST, 1, packets.icmp(kind, code, rest, quoted)))


def fragment(**fields: object) -> bytes:
    return our_packet(packets.ipv4(REMOTE, GUEST, 17, bytes(fields.pop("size", 80)), **fields))  # type: ignore[arg-type,call-overload]


BAD = {
    "frame below 60": ours(NEXT, ACKED, ACK, 1000)[:54],
    "frame longer": packets.ether(GUEST_MAC, GATEWAY_MAC, IPV4, bytes(1600)),
    "MAC nobody has": b"\2\2\2\2\2\2" + BASE[6:],
    "strange MAC": BASE[:6] + b"\2\2\2\2\2\2" + BASE[12:],
    "ethertype": changed(BASE, 12, b"\x86\xdd", ip_sum=False),
    "arp: fields": changed(ARP_REPLY, 20, b"\0\3", ip_sum=False),
    "arp: sender": changed(ARP_REPLY, 22, b"\2\2\2\2\2\2", ip_sum=False),
    "arp: padding": changed(ARP_REPLY, 50, b"x", ip_sum=False),
    "version and header length": changed(BASE, 14, b"\x46"),
    "ipv4: total length": changed(BASE, 16, b"\5\0"),
    "ipv4: padding": ours(NEXT, ACKED, ACK, 1000)[:-1] + b"x",
    "header checksum": changed(BASE, 24, b"\xbe\xef", ip_sum=False),
    "reserved flag": changed(BASE, 20, b"\xc0\0"),
    "TTL 0": changed(BASE, 22, b"\0"),
    "ipv4: source:": changed(BASE, 26, b"\0\1\2\3"),
    "loopback": changed(BASE, 26, b"\x7f\1\2\3"),
    "source is destination": changed(BASE, 26, GUEST),
    "fragment with DF": fragment(mf=True, df=True),
    "not a multiple of 8": fragment(mf=True, size=81),
    "protocol": changed(BASE, 23, b"\x84"),
    "tcp: checksum": ours(NEXT, ACKED, ACK, 1000, data=b"x", spoil=True),
    "data offset": ours(NEXT, ACKED, ACK, 1000, data=b"x", data_offset=4),
    "reserved or ECN": ours(NEXT, ACKED, ACK | 0x40, 1000),
    "urgent": ours(NEXT, ACKED, ACK | 0x20, 1000, urgent=1),
    "tcp: flags": ours(NEXT, ACKED, ACK | FIN | RST, 1000),
    "no flags": ours(NEXT, 0, PSH, 1000, data=b"x"),
    "option length": ours(NEXT, ACKED, ACK, 1000, options=b"\5\x30\1\1"),
    "SYN options in another": ours(NEXT, ACKED, ACK, 1000, options=packets.mss_option(1460)),
    "RST with data": ours(NEXT, ACKED, RST | ACK, 0, data=b"x"),
    "sequence number before": ours(ISS - 5, ACKED, ACK, 1000),
    "gap": ours(NEXT + 1, ACKED, ACK, 1000, data=b"x"),
    "other octets": ours(NEXT - 10, ACKED, ACK, 1000, data=b"\7\7\7x"),
    "longer than the guest's MSS": ours(NEXT, ACKED, ACK, 1000, data=bytes(1397), options=b"\1\1\1\1"),
    "empty segment beyond": ours(NEXT + 1, ACKED, ACK, 1000),
    "goes back": ours(NEXT, ACKED - 1, ACK, 2000),
    "never sent": ours(NEXT, ACKED + 1, ACK, 1000),
    "right edge": ours(NEXT, ACKED, ACK, 999),
    "SACK block turned": ours(NEXT, ACKED, ACK, 1000, options=packets.sack_option([(ACKED + 9, ACKED + 2)])),
    "SACK of what": ours(NEXT, ACKED, ACK, 1000, options=packets.sack_option([(ACKED + 2, ACKED + 9)])),
    "FIN before the last": ours(NEXT - 5, ACKED, ACK | FIN, 1000),
    "data on a SYN": ours(ISS, ISN + 1, SYN | ACK, 65535, options=SYN_OPTIONS, data=b"x"),
    "SYN without MSS": ours(ISS, ISN + 1, SYN | ACK, 65535),
    "tcp: MSS:": ours(ISS, ISN + 1, SYN | ACK, 65535, options=packets.mss_option(9000)),
    "another ISN": ours(ISS + 1, ISN + 1, SYN | ACK, 65535, options=SYN_OPTIONS),
    "udp: length": changed(UDP, 38, b"\0\x0c", ip_sum=False),
    "udp: checksum": changed(UDP, 42, b"J", ip_sum=False),
    "udp: port 0": our_packet(packets.ipv4(REMOTE, GUEST, 17, packets.udp(REMOTE, GUEST, 0, 1234, b""))),
    "icmp: checksum": changed(error(QUOTED), 40, b"\1", ip_sum=False),
    "icmp: type": error(b"", kind=13, code=0),
    "longer than 576": error(packets.ipv4(GUEST, REMOTE, 17, bytes(900))),
    "less than 8": error(QUOTED[:24]),
    "did not send it": error(packets.ipv4(REMOTE, GUEST, 17, bytes(20))),
    "about broadcast": error(packets.ipv4(GUEST, ip("224.0.0.1"), 17, bytes(20))),
    "about a broadcast": error(packets.ipv4(GUEST, ip("192.168.65.255"), 17, bytes(20))),
    "later fragment": error(packets.ipv4(GUEST, REMOTE, 17, bytes(20), offset=8)),
    "about an ICMP error": error(packets.ipv4(GUEST, REMOTE, 1, packets.icmp(3, 3, body=bytes(28)))),
    "without MTU": error(QUOTED, code=4),
}  # fmt: skip


@pytest.mark.parametrize("rule", BAD)
def test_p2_p3_a_frame_that_breaks_a_rule_is_caught(rule: str) -> None:
    with pytest.raises(Violation, match=rule.replace("(", r"\(")):
        established().stack_sent(BAD[rule])


def sequence_after_fin(oracle: Oracle) -> None:
    oracle.stack_sent(ours(NEXT, ACKED, ACK | FIN, 1000))
    oracle.stack_sent(ours(NEXT, ACKED, ACK, 1000, data=b"x"))


def sequence_after_rst(oracle: Oracle) -> None:
    oracle.stack_sent(ours(NEXT, ACKED, ACK | RST, 0))
    oracle.stack_sent(ours(NEXT, ACKED, ACK, 1000))


def sequence_beyond_window(oracle: Oracle) -> None:
    at = NEXT
    for _ in range(60):
        oracle.stack_sent(ours(at, ACKED, ACK, 1000, data=bytes(1400)))
        at += 1400


def sequence_same_identification(oracle: Oracle) -> None:
    for _ in range(2):
        oracle.stack_sent(fragment(mf=True, ident=9))


def sequence_answers_an_old_syn(oracle: Oracle) -> None:
    oracle.guest_sent(guest_frame(ISN + 9, 0, SYN, 65535, options=SYN_OPTIONS))
    oracle.stack_sent(ours(ISS + 5, ISN + 8, SYN | ACK, 65535, options=SYN_OPTIONS))


def sequence_of_no_flow(oracle: Oracle) -> None:
    body = packets.tcp(REMOTE, GUEST, 81, 40000, 1, 1, ACK, 1000)
    oracle.stack_sent(our_packet(packets.ipv4(REMOTE, GUEST, 6, body, df=True)))


@pytest.mark.parametrize(
    ("sequence", "rule"),
    [
        (sequence_after_fin, "after the FIN"),
        (sequence_after_rst, "after our RST"),
        (sequence_beyond_window, "beyond the guest's window"),
        (sequence_same_identification, "identification"),
        (sequence_of_no_flow, "of no flow"),
        (sequence_answers_an_old_syn, "with another ISN"),
    ],
)
def test_p3_a_sequence_that_breaks_a_rule_is_caught(sequence: Callable[[Oracle], None], rule: str) -> None:
    with pytest.raises(Violation, match=rule):
        sequence(established())


def test_vnet_headers_are_checked() -> None:
    oracle = Oracle(headroom=12, tso=65160)
    oracle.guest_sent(guest_frame(ISN, 0, SYN, 65535, options=SYN_OPTIONS))

    def sent(fields: tuple[int, ...], frame: bytes) -> None:
        oracle.stack_sent(struct.pack("<BBHHHHH", *fields, 1) + frame)

    sent((0, 0, 0, 0, 0, 0), ours(ISS, ISN + 1, SYN | ACK, 65535, options=SYN_OPTIONS))
    oracle.guest_sent(guest_frame(ISN + 1, ISS + 1, ACK))
    big = ours(ISS + 1, ISN + 1, ACK, 1000, data=bytes(5000), partial=True)
    for fields, rule in (
        ((0, 1, 54, 1460, 34, 16), "without NEEDS_CSUM"),
        ((1, 1, 54, 1461, 34, 16), "gso size"),
        ((1, 1, 54, 0, 34, 16), "gso size"),
        ((1, 1, 50, 1460, 34, 16), "header length"),
        ((1, 1, 54, 1460, 14, 16), "checksum position"),
        ((1, 5, 54, 1460, 34, 16), "gso type"),
        ((1, 0, 0, 1460, 34, 16), "without type"),
        ((1, 0, 0, 0, 34, 16), "longer than the link takes"),
        ((128, 0, 0, 0, 34, 16), "flags"),
    ):
        with pytest.raises(Violation, match=rule):
            sent(fields, big)
    with pytest.raises(Violation, match="partial checksum"):
        sent((1, 1, 54, 1460, 34, 16), ours(ISS + 1, ISN + 1, ACK, 1000, data=bytes(5000)))
    sent((1, 1, 54, 1460, 34, 16), big)
