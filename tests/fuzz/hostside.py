"""Z16: what the host and its network say: resolvers' files and programs, netlink, proxies' answers, rules. A value, or a complaint
of the kind that belongs to it."""

from __future__ import annotations

import json
import logging
import random
import struct
from typing import Any

from dns import resolved, scutil, vpnkit_file
from dns.rules import Rules
from dns.servers import Resolvers, Server
from netstack.api import Endpoint
from netstack.errors import ConfigError, HostError, Malformed, NetstackError
from netstack.host.http_connect import HttpConnect
from netstack.host.socks5 import Socks5
from netstack.policy import ways_out
from pyvpnkit.hostnet import darwin, netlink
from pyvpnkit.proxy.config import Config
from tests.fuzz.bend import complains, spoil

WORDS = (
    "nameserver zone order timeout search assume-offline-after 10.0.0.1 10.0.0.1#53 ::1 corp.example ~corp.example ~. 0 1 -1 99999 "
    "resolver #1 nameserver[0] : domain flags order : port if_index en0 reach Link 2 (eth0) Global DNS Domain "
    "default 192.168.1/24 link#4 UGSc utun0 inet6 fe80::1%lo0 netmask 0xffffff00 mtu 1500 flags=8863<UP,RUNNING> "
    "* -> direct refuse socks5://a:b@h:1 socks5h://[::1]:1 http://h:3128 corp.example:443 10.0.0.0/8 tls://1.1.1.1#a ²"
).split(" ")


def _text(rng: random.Random) -> str:
    made = "".join(rng.choice(WORDS) + rng.choice([" ", " ", "\n", ":", "\t", ""]) for _ in range(rng.randrange(24)))
    return spoil(rng, made.encode()).decode("utf-8", "replace") if rng.random() < 0.3 else made


def _value(rng: random.Random, depth: int = 0) -> Any:
    if depth > 3 or rng.random() < 0.5:
        return rng.choice([None, True, 0, -1, 1 << 70, 1.5, "", rng.choice(WORDS), _text(rng)])
    if rng.random() < 0.5:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [
        "http",
        "https",
        "exclude",
        "allow",
        "allow_enabled",
        "transparent_http_ports",
        "name",
        "servers",
        "domains",
    ]
    keys += ["ifindex", "addressString", "port", "serverName", "scopes", "delegates", "routeOnly"]
    return {rng.choice(keys): _value(rng, depth + 1) for _ in range(rng.randrange(6))}


def _texts(rng: random.Random) -> None:
    text = _text(rng)
    assert isinstance(vpnkit_file.parse_or_none(text), Resolvers)
    assert isinstance(scutil.parse(text), Resolvers)
    complains(text, lambda: darwin.read(text, _text(rng)), HostError)
    complains(text, lambda: Rules.parse({rng.choice(WORDS): text.split()}), ConfigError)
    server = complains(text, lambda: Server.parse(text), ConfigError)
    assert server is None or server.upstream.address
    rule = complains(text, lambda: ways_out.parse(text), ConfigError)
    if rule is not None:
        assert ways_out.parse(ways_out.spelled(rule)) == rule, text


def _documents(rng: random.Random) -> None:
    octets = json.dumps(_value(rng)).encode()
    octets = spoil(rng, octets) if rng.random() < 0.3 else octets
    complains(octets, lambda: Config.decode(octets), NetstackError)
    complains(octets, lambda: resolved.of_json(octets.decode("utf-8", "replace")), NetstackError)


def _netlink(rng: random.Random) -> None:
    body = rng.randbytes(rng.randrange(64))
    if rng.random() < 0.5:
        head = rng.choice(
            [struct.pack("BBBBi", 2, 24, 0, 0, 1), struct.pack("BBBBBBBBI", 2, 24, 0, 0, 254, 3, 0, 1, 0)]
        )
        body = head + b"".join(
            struct.pack("HH", len(data) + 4, rng.choice([1, 2, 4, 5, 6, 8])) + data + bytes(-len(data) % 4)
            for data in (rng.randbytes(rng.choice([0, 1, 4, 4, 4, 16])) for _ in range(rng.randrange(4)))
        )
    view = memoryview(spoil(rng, body) if rng.random() < 0.3 else body)
    for parse in (netlink.parse_address, netlink.parse_route, netlink.parse_link, netlink.attributes):
        complains(bytes(view), lambda parse=parse: parse(view), Malformed)  # type: ignore[misc]
    complains(bytes(view), lambda: list(netlink.messages(view)), Malformed)


def _exchanges(rng: random.Random) -> None:
    where = Endpoint.of("192.0.2.1", 443)
    user = rng.choice([b"", b"user"])
    exchange: Any = rng.choice([Socks5, HttpConnect])(
        where, rng.choice(["", "a.example"]), user, b"secret" if user else b""
    )
    good = [
        b"\x05\x00",
        b"\x05\x02",
        b"\x01\x00",
        b"\x05\x00\x00\x01\x7f\0\0\1\0\x50",
        b"HTTP/1.1 200 OK\r\n",
        b"\r\n",
        b"X: y\r\n",
    ]
    exchange.say()
    waiting = b""
    for _ in range(rng.randrange(8)):
        waiting += rng.choice(good) if rng.random() < 0.8 else rng.randbytes(rng.randrange(40))
        try:
            taken = exchange.hear(waiting)
        except NetstackError as error:
            assert str(error).strip()
            return
        assert 0 <= taken <= len(waiting)
        waiting = waiting[taken:]
        if exchange.done:
            return
        exchange.say()


def z16_hostside(rng: random.Random) -> None:
    """Texts, documents, netlink and proxies."""
    logging.getLogger("pyvpnkit.dns").setLevel(logging.CRITICAL)
    _texts(rng)
    _documents(rng)
    _netlink(rng)
    _exchanges(rng)
