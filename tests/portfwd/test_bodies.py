"""Whatever JSON a client makes up, it is understood or refused in one sentence; nothing else is raised."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dns.zones import Zones
from netstack.api import Endpoint
from netstack.errors import ConfigError
from portfwd import bodies, vpnkit_api
from portfwd.bodies import BadBody
from portfwd.gvproxy_forwards import Forwards, Proxy, Refused
from portfwd.registry import Registry

WORDS = [
    "tcp",
    "udp",
    "unix",
    "",
    ":80",
    "127.0.0.1:80",
    "[::1]:80",
    "10.0.0.1",
    "fe80::1%x",
    "tcp://10.0.0.1:80",
    "z.",
]
WORDS += ["/a", "tcp://[", "tcp://10.0.0.1:99999", "ssh-tunnel://x", "(", "a{2", "[[:", "\0", "\ud800", "é" * 70, ":٣"]
SCALARS = (
    st.none() | st.booleans() | st.integers(-1, 70000) | st.floats() | st.sampled_from(WORDS) | st.text(max_size=20)
)
NAMES = ["proto", "out_ip", "OUT_PORT", "out_path", "in_ip", "in_port", "in_path", "annotation"]
NAMES += ["local", "remote", "protocol", "Name", "records", "IP", "regexp", "DefaultIP"]
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=8)
    ),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), SCALARS | JSON, max_size=8)


@given(JSON | OBJECTS)
def test_vpnkits_ports(document: Any) -> None:
    with contextlib.suppress(BadBody, ConfigError):
        port = vpnkit_api.parse(json.dumps(document).encode())
        spec = vpnkit_api.wanted(port, lambda address: "forwarder")
        # What is listed for it is what would find it again.
        assert vpnkit_api.parse(json.dumps(vpnkit_api.described(spec).json()).encode()) == vpnkit_api.described(spec)


@given(JSON | OBJECTS, st.sampled_from([None, Endpoint.of("192.168.65.3", 1)]))
def test_gvproxys_forwards(document: Any, caller: Endpoint | None) -> None:
    """With a registry that has no room, so that nothing is bound."""
    forwards = Forwards(Registry(max_forwards=0))
    with contextlib.suppress(BadBody, Refused):
        found = bodies.fields(json.dumps(document).encode())
        forwards.expose(Proxy(*(bodies.text(found, name) for name in ("local", "protocol", "remote"))), caller)
        pytest.fail("there was no room")
    assert forwards.all() == []


@given(JSON | OBJECTS)
def test_gvproxys_zones(document: Any) -> None:
    zones = Zones()
    with contextlib.suppress(ConfigError):
        zones.add_document(document)
        written = zones.documents()
        again = Zones()
        again.add_document(json.loads(json.dumps(written[0])))
        assert again.documents() == written
        zones.find(b"\x01a\x01z\0", 1)


@given(st.binary(max_size=200))
def test_octets_that_are_no_json(octets: bytes) -> None:
    with contextlib.suppress(BadBody):
        assert isinstance(bodies.fields(octets), dict)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'"\\ud800"', b"NaN", b"\xef\xbb\xbf{}"]
)
def test_what_strains_a_json_parser(body: bytes) -> None:
    with pytest.raises(BadBody) as refused:
        bodies.fields(body)
    assert len(str(refused.value)) < 300
