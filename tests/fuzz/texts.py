"""Z12: texts that people write. A settings file is settings or complaints; files of the host are read, whatever is in them."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import tempfile
import time

from dns import hosts, system
from dns.server import Server as DnsServer
from dns.servers import TIMEOUT_S
from netstack.dhcp.leases import Leases
from netstack.dhcp.server import Server as DhcpServer
from netstack.errors import ConfigError
from netstack.link.spec import LinkSpec
from portfwd.spec import PublishSpec
from pyvpnkit import loader
from pyvpnkit.config import OPTIONS, SECTIONS, Option, Settings
from tests.fuzz.bend import spoil

ODD = r"""
off on none null ~ "" '' 0 1 -1 1500 65536 4294967296 1e309 nan inf 0x10 1_000 12:30:45 5s 100M 1K K ² ٣ 9999999999999999999999
192.168.65.1 192.168.65.0/24 10.0.0.0/29 10.0.0.0/8 0.0.0.0/0 255.255.255.248/29 255.255.255.255/32 255.255.255.254/31
10.1.2.3/16 ::/0 ::1 fe80::1%lo fe80::1%99999999999
1.1.1.1#53 1.1.1.1:0 [::1]:70000 02:00:00:00:00:07 01:00:00:00:00:07 02-00-00-00-00-07
gateway.internal bücher.example a..b . .a "\0" "\ud800" "\UFFFFFFFF" "\U00110000" "\xff" "a b" [] {} [[]] {a: b} [a, [b]]
qemu:/a qemu:tcp:[::1]:1 qemu:tcp:127.0.0.1:99999 qemu:connect:tcp:localhost:1 vmnet:fd:3 unixgram:///a bess:connect:/a,mtu=576
qemu:/a,,b,name=x,,y qemu: tap:netns=a,ifname=e tap:pid=1 tap:x,mac=01:00:00:00:00:00 packet:fd=99999999999999999999
fd:3,kind=vmnet fd:4,kind=x fd:9999999999999999999999999 fd:2147483648 vhost-user:/a
8080:80 0:80 udp:[::1]:1-3:4-6 1-65535:1-65535 0-1:0-1 1:10.0.0.1:2 tcp:0.0.0.0:53:192.168.65.3:53 1:2:3:4:5 [:]:1:1
&a *a *b !!python/object:os.system !!int !<x> | > %TAG --- ... ? : - @ ` #
""".split()
DIGITS = "9" * 5000  # more than `int` takes of a text
ODD += [text + DIGITS for text in ("", "fd:", "qemu:tcp:127.0.0.1:", "qemu:/a,mtu=", "80:", "%YAML 1.")]


def _word(rng: random.Random) -> str:
    if rng.random() < 0.03:
        return rng.choice(["9", "a", "[", "- ", "{a: "]) * rng.choice([64, 300, 5000])
    return rng.choice(ODD)


def _value(rng: random.Random, option: Option) -> str:
    text = option.example if rng.random() < 0.6 else _word(rng)
    if option.pairs:
        left, _, right = text.rpartition("=")
        return f"{{{left or _word(rng)}: {right}}}" if rng.random() < 0.8 else text
    if option.many and rng.random() < 0.7:
        return f"[{', '.join([text, *(_word(rng) for _ in range(rng.randrange(3)))])}]"
    return text


def _settings_text(rng: random.Random) -> bytes:
    lines = []
    for section in rng.sample(list(SECTIONS), rng.randrange(len(SECTIONS) + 1)):
        options = [option for option in OPTIONS if option.section == section]
        chosen = rng.sample(options, min(len(options), rng.randrange(6)))
        indent = "  " if section else ""
        if section:
            lines.append(f"{section}:" + (" " + _word(rng) if rng.random() < 0.05 else ""))
        for option in chosen:
            key = option.name if rng.random() < 0.95 else rng.choice(OPTIONS).name
            lines.append(f"{indent}{key}: {_value(rng, option)}")
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines) + 1), _word(rng))
    made = "\n".join(lines).encode("utf-8", "replace")
    if rng.random() < 0.05:
        made = made.decode().encode(rng.choice(["utf-16", "utf-16-le", "latin-1"]), "replace")
    return spoil(rng, made) if rng.random() < 0.3 else made


def _workable(settings: Settings) -> None:
    """Text forms are inverses, and what is built of the settings at start is built, or complains."""
    for link in settings.links:
        assert LinkSpec.parse(str(link)) == link
        assert link.label
    for spec in settings.publish:
        assert PublishSpec.parse(str(spec)) == spec
    network = settings.network
    try:
        leases = Leases(network)
        DhcpServer(network, leases)
        names = {name: [network.gateway_bytes] for name in (*network.gateway_names, *network.host_names)}
        dns = DnsServer(
            names=names,
            domain=network.domain,
            hosts_path=None,
            resolv_conf=None,
            upstreams=settings.dns.servers,
        )
    except ConfigError:
        return
    dns.close()


def _settings(rng: random.Random) -> None:
    text = _settings_text(rng)
    with tempfile.NamedTemporaryFile(prefix="fuzz", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            settings = loader.load(file.name)
        except ConfigError as error:
            assert str(error), text
            for line in str(error).splitlines():
                assert line.strip(), text
            return
        except Exception as error:
            raise AssertionError(f"{text[:400]!r}: {error!r}") from error
    _workable(settings)


def _lines(rng: random.Random, words: list[str]) -> str:
    made = "\n".join(
        " ".join(rng.choice([rng.choice(words), _word(rng)]) for _ in range(rng.randrange(5)))
        for _ in range(rng.randrange(12))
    )
    return spoil(rng, made.encode("utf-8", "replace")).decode("utf-8", "replace") if rng.random() < 0.5 else made


def _files_of_the_host(rng: random.Random) -> None:
    text = _lines(
        rng, ["nameserver", "search", "domain", "options", "timeout:3", "attempts:0", "attempts:²", "rotate", "#", ";"]
    )
    resolvers = system.parse_resolv_conf(text)
    assert len(resolvers.servers) <= system.MAX_SERVERS
    for place, known in enumerate(resolvers.servers):
        assert known.order == place and 0 < known.timeout_s <= TIMEOUT_S
        server = known.upstream
        assert system.Upstream.parse(str(server)) == server
        with socket.socket(server.family, socket.SOCK_DGRAM) as sock:
            with contextlib.suppress(OSError):  # not ours to bind; what Python cannot pass to the system raises another
                sock.bind((server.address, 0, *server.sockaddr[2:]))
    text = _lines(rng, ["127.0.0.1", "::1", "fe80::1%lo", "10.0.0.1", "localhost", "a.b", "#", "x" * 64])
    table = hosts.parse(text)
    for wire, addresses in table.addresses.items():
        assert len(wire) <= 255 and wire.endswith(b"\0")
        assert all(len(address) in (4, 16) for address in addresses)
    for address, wire in table.names.items():
        assert address in table.addresses[wire]
        assert hosts.address_of_reverse(hosts.reverse_name(address)) == address
    path = os.path.join(tempfile.gettempdir(), _word(rng))
    assert system.watch(path, time.monotonic).current() is not None
    assert hosts.watch(rng.choice([path, "a\0b", "\udcff", "/dev", ""]), time.monotonic).current() is not None


def z12_texts(rng: random.Random) -> None:
    """Settings, resolv.conf and hosts."""
    logging.getLogger("pyvpnkit.dns").setLevel(logging.CRITICAL)
    _settings(rng)
    _files_of_the_host(rng)
