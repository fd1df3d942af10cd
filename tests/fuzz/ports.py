"""Z15: what people, programs in a VM and files say about ports, as text and as JSON: a value, or a complaint with words in it."""

from __future__ import annotations

import json
import random
from typing import Any

from netstack.errors import ConfigError, NetstackError
from netstack.host.tunnels import check_answer
from netstack.observe.filter import compile_filter
from portfwd import outgoing
from portfwd.bodies import BadBody
from portfwd.invm.transport import Address
from portfwd.mux.where import Where
from portfwd.spec import PublishSpec, split
from portfwd.vpnkit_api import described, parse, wanted
from tests.fuzz.bend import complains, spoil

WORDS = (
    "tcp udp unix 0 1 80 8080 65535 65536 -1 0.0.0.0 127.0.0.1 192.168.65.3 ::1 [::1] /tmp/x /a%3Ab %00 ² via=forwarder "
    "source=client proxy=v2 annotation=x hyperkit:/x connect: listen:/a fd:3 port=1 cid=3 generation=2 host net port portrange "
    "src dst and or not ( ) ether arp ip6 10.0.0.0/8 02:00:00:00:00:01 80-90 dns"
).split(" ")
KEYS = [
    *("protocol", "external_port", "internal_ip", "internal_port", "dst_prefix", "dst_port", "path", "accepted"),
    *("proto", "out_ip", "out_port", "out_path", "in_ip", "in_port", "in_path", "annotation", "OUT_PORT"),
]


def _text(rng: random.Random) -> str:
    made = rng.choice([":", ",", " ", ""]).join(rng.choice(WORDS) for _ in range(rng.randrange(7)))
    return spoil(rng, made.encode()).decode("utf-8", "replace") if rng.random() < 0.3 else made


def _spec_text(rng: random.Random) -> str:
    """A spec as somebody may write it, now and then with a mistake."""
    ends = [
        rng.choice(["", "tcp:", "udp:", "unix:", "TCP:"]),
        rng.choice(["", "", "0.0.0.0:", "[::1]:", "/tmp/x:", "/a%3Ab:"]),
        rng.choice(["", "0:", "8080:", "8000-8003:", "65535:"]),
        rng.choice(["", "", "192.168.65.3:", "172.17.0.2:", "[fd00::2]:"]),
        rng.choice(["80", "53", "80-83", "/run/x", "65536"]),
    ]
    options = rng.sample(
        ["via=forwarder", "via=stack", "source=client", "proxy=v1", "proxy=v2", "annotation=a%2Cb", "x=y"],
        rng.randrange(3),
    )
    made = ",".join(["".join(ends), *options])
    return spoil(rng, made.encode()).decode("utf-8", "replace") if rng.random() < 0.2 else made


def _port(rng: random.Random) -> dict[str, Any]:
    """What a program of VPNKit's sends, now and then with a mistake."""
    proto = rng.choice(["tcp", "udp", "unix", "TCP"])
    made: dict[str, Any] = {"proto": proto, "annotation": rng.choice(["", "k8s", "a:b,c"])}
    if proto == "unix":
        made |= {"out_path": rng.choice(["/tmp/a", "/a:b", ""]), "in_path": rng.choice(["/run/x", "/%"])}
    else:
        made |= {"out_ip": rng.choice(["127.0.0.1", "0.0.0.0", "::1", ""]), "out_port": rng.choice([0, 80, 65535])}
        made |= {"in_ip": rng.choice(["192.168.65.3", "172.17.0.2"]), "in_port": rng.choice([0, 80, 443])}
    return made | (_entry(rng) if rng.random() < 0.3 else {})


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice([0, 1, 80, 65535, 65536, -1, 1 << 70, 1.5, float("nan")])
    if kind < 6:
        return rng.choice(WORDS) if rng.random() < 0.9 else _text(rng)
    if kind == 6:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return _entry(rng, depth + 1)


def _entry(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    return {rng.choice(KEYS): _value(rng, depth) for _ in range(rng.randrange(8))}


def _texts(rng: random.Random) -> None:
    text = _text(rng)
    for piece in (text, *split(text), _spec_text(rng)):
        spec = complains(piece, lambda piece=piece: PublishSpec.parse(piece), ConfigError)  # type: ignore[misc]
        if spec is not None:
            assert PublishSpec.parse(str(spec)) == spec, piece
    if rng.random() < 0.5:
        text = f"{rng.choice(['hyperkit', 'connect', 'unix', 'listen', 'fd'])}:{text}"
    where = complains(text, lambda: Where.parse(text), ConfigError)
    if where is not None:
        assert Where.parse(str(where)) == where, text
    complains(text, lambda: Address.parse(text), ConfigError)
    complains(text, lambda: outgoing.parse_static("tcp", text), ConfigError)
    chosen = complains(text, lambda: compile_filter(text), ConfigError)
    if chosen is not None:
        frame = rng.randbytes(rng.randrange(80))
        if rng.random() < 0.7:
            frame = bytes(12) + rng.choice([b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\x81\x00"]) + frame
        assert chosen(frame) in (True, False)


def _documents(rng: random.Random) -> None:
    document = _value(rng) if rng.random() < 0.3 else [_entry(rng) for _ in range(rng.randrange(4))]
    octets = json.dumps(document).encode()
    if rng.random() < 0.3:
        octets = spoil(rng, octets)
    found = complains(octets, lambda: outgoing.decoded(octets), ConfigError)
    complains(octets, lambda: outgoing.gateway_forwards(found), ConfigError)
    complains(octets, lambda: outgoing.tunnels(found), ConfigError)
    complains(octets, lambda: check_answer(octets), NetstackError)
    body = json.dumps(_port(rng)).encode()
    port = complains(body, lambda: parse(body), BadBody)
    if port is not None:
        spec = complains(body, lambda: wanted(port, lambda _address: "stack"), ConfigError)
        if spec is not None:
            again = described(spec)
            assert wanted(again, lambda _address: "stack") == spec, body


def z15_ports(rng: random.Random) -> None:
    """Texts and documents about ports."""
    _texts(rng)
    _documents(rng)
