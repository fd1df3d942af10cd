"""slirp4netns' own command line and API: what its options come to, and the answers of its socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from portfwd.registry import Registry
from pyvpnkit import config
from pyvpnkit.config import BY_KEY
from pyvpnkit.service import Service
from pyvpnkit.slirp4netns import command
from pyvpnkit.slirp4netns.api import Api
from tests.support.ports import free_port
from vm.accepting import Acceptor

GREPPED = (
    "--netns-type --cidr --api-socket --enable-sandbox --enable-seccomp --enable-ipv6 --disable-host-loopback --mtu"
)
"""What rootlesskit and podman look for in the help (spec gvproxy 2)."""


def settings(*argv: str) -> config.Settings:
    return command.settings(command.parser().parse_args(argv))


def shown(value: Any) -> Any:
    return [str(one) for one in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("7", "links", ["tap:pid=7,ifname=tap0"]),
        ("7 tun9", "links", ["tap:pid=7,ifname=tun9"]),
        ("--netns-type=path /run/netns/x tap0", "links", ["tap:netns=/run/netns/x,ifname=tap0"]),
        ("--netns-type tapfd 5", "links", ["fd:5,kind=tap"]),
        ("--target-type=bess /run/uml", "links", ["bess:/run/uml"]),
        (
            "--userns-path=/proc/7/ns/user --netns-type=path /n",
            "links",
            ["tap:netns=/n,ifname=tap0,userns=/proc/7/ns/user"],
        ),
        ("-c --macaddress=02:00:00:00:00:09 7", "links", ["tap:pid=7,ifname=tap0,mac=02:00:00:00:00:09"]),
        ("7", "network.subnet", "10.0.2.0/24"),
        ("7", "network.gateway", "10.0.2.2"),
        ("7", "network.host_alias", "10.0.2.2"),
        ("7", "network.gateway_aliases", ["10.0.2.3"]),
        ("7", "network.dns_servers", ["10.0.2.3"]),
        ("7", "network.gateway_mac", "52:55:0a:00:02:02"),
        ("7", "network.pool_first", "10.0.2.15"),
        ("7", "network.pool_last", "10.0.2.30"),
        ("7", "network.mtu", 1500),
        ("7", "state_dir", None),
        ("7", "control.socket", None),
        ("7", "timeouts.grace_s", 0),
        ("--disable-host-loopback 7", "network.host_alias", None),
        ("--disable-dns 7", "network.gateway_aliases", []),
        ("--cidr=10.9.0.0/16 7", "network.gateway", "10.9.0.2"),
        ("--cidr 10.9.0.0/16 7", "network.dns_servers", ["10.9.0.3"]),
        ("-m 65520 7", "network.mtu", 65520),
        ("--mtu=65521 7", "network.mtu", 65520),
        ("-6 --enable-seccomp --enable-sandbox -r 3 -e 4 -a /s 7", "network.mtu", 1500),
    ],
)
def test_an_option_means_the_setting(argv: str, key: str, value: Any) -> None:
    assert shown(config.value_of(settings(*argv.split()), BY_KEY[key])) == value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "PID or PATH is missing"),
        ("seven", "write tap:netns=NAME, tap:pid=PID"),
        ("--netns-type=name x", "invalid choice: 'name'"),
        ("--cidr=10.0.2.1/24 7", "--cidr: '10.0.2.1/24'"),
        ("--cidr=10.0.2.0/26 7", "it must be /25 or larger"),
        ("--mtu=65522 7", "mtu: "),
        ("--mtu=low 7", "invalid int value: 'low'"),
        ("--outbound-addr=10.0.0.1 7", "--outbound-addr: cannot be had here"),
        ("--outbound-addr6=::1 7", "--outbound-addr6: cannot be had here"),
        ("--macaddress=02:00:00:00:00:09 7", "--macaddress: is for -c"),
        ("-c --macaddress=x 7", "MAC address"),
        ("-x 7", "unrecognized arguments: -x"),
        ("7 tap0 more", "unrecognized arguments: more"),
    ],
)
def test_a_mistake_is_told(argv: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(*argv.split())
    assert said in str(raised.value)


@given(
    st.lists(
        st.sampled_from([*GREPPED.split(), "-c", "7", "=", "--cidr=0.0.0.0/1", "-r", "3", "\udcff", ",", ""]),
        max_size=6,
    )
)
def test_any_words_are_settings_or_a_complaint(words: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        assert settings(*words).links


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(word in said for word in GREPPED.split())
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slirp4netns version 1.")
    assert command.main(["--mtu=1", "7"]) == 1
    assert capsys.readouterr().err.startswith("slirp4netns: ")


def test_a_process_that_is_not_there() -> None:
    words = [sys.executable, "-m", "pyvpnkit", "slirp4netns", "-c", "2147483646"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "slirp4netns: link tap:pid=2147483646" in run.stderr and "there is no process" in run.stderr


# The API.


@pytest.fixture
async def registry() -> Any:
    service = Service(settings("7"))
    yield service.registry
    service.registry.close()
    service.stack.close()
    service.stack.io.close()


@pytest.fixture
def api(registry: Registry) -> Api:
    return Api(registry, "10.0.2.100")


def ask(api: Api, command: str, **arguments: Any) -> Any:
    return api.answer(json.dumps({"execute": command, "arguments": arguments}).encode())


def test_forwards_come_are_listed_and_go(api: Api, registry: Registry) -> None:
    first, second = free_port(), free_port(socket.SOCK_DGRAM)
    assert ask(api, "add_hostfwd", proto="tcp", host_addr="127.0.0.1", host_port=first, guest_port=80) == {
        "return": {"id": 1}
    }
    assert ask(api, "add_hostfwd", proto="udp", host_port=second, guest_addr="10.0.2.15", guest_port=53) == {
        "return": {"id": 2}
    }
    entries = [
        {
            "id": 1,
            "proto": "tcp",
            "host_addr": "127.0.0.1",
            "host_port": first,
            "guest_addr": "10.0.2.100",
            "guest_port": 80,
        },
        {
            "id": 2,
            "proto": "udp",
            "host_addr": "0.0.0.0",
            "host_port": second,
            "guest_addr": "10.0.2.15",
            "guest_port": 53,
        },
    ]
    assert ask(api, "list_hostfwd") == {"return": {"entries": entries}, "entries": entries}
    assert {str(forward.owner.kind) for forward in registry} == {"slirp4netns"}
    assert ask(api, "remove_hostfwd", id=1) == {"return": {}}
    assert ask(api, "list_hostfwd")["entries"] == entries[1:]
    assert ask(api, "add_hostfwd", proto="tcp", host_addr="127.0.0.1", host_port=first, guest_port=80) == {
        "return": {"id": 3}
    }


ADD = {"proto": "tcp", "host_port": 80, "guest_port": 80}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"", "cannot parse JSON"),
        (b"{", "cannot parse JSON"),
        (b"[" * 4000, "cannot parse JSON"),
        (b"\xff", "cannot parse JSON"),
        (b"[]", "json_object() failed"),
        (b"{}", "no execute found"),
        (b'{"execute": 3}', "no execute found"),
        (b'{"execute": "quit"}', "unknown execute"),
        (b" " * 4096, "too large message"),
        (b'{"execute": "add_hostfwd"}', "add_hostfwd: bad arguments.proto"),
        (b'{"execute": "add_hostfwd", "arguments": 3}', "add_hostfwd: bad arguments.proto"),
        ({**ADD, "proto": "sctp"}, "add_hostfwd: bad arguments.proto"),
        ({**ADD, "host_addr": "::1"}, "add_hostfwd: bad arguments.host_addr"),
        ({**ADD, "host_addr": 7}, "add_hostfwd: bad arguments.host_addr"),
        ({**ADD, "host_port": 0}, "add_hostfwd: bad arguments.host_port"),
        ({**ADD, "host_port": "80"}, "add_hostfwd: bad arguments.host_port"),
        ({**ADD, "host_port": True}, "add_hostfwd: bad arguments.host_port"),
        ({**ADD, "guest_addr": "guest"}, "add_hostfwd: bad arguments.guest_addr"),
        ({**ADD, "guest_port": 65536}, "add_hostfwd: bad arguments.guest_port"),
        ({**ADD, "host_addr": "192.0.2.1"}, "add_hostfwd: slirp_add_hostfwd failed"),  # not this machine's
        (b'{"execute": "remove_hostfwd"}', "remove_hostfwd: bad arguments.id"),
        (b'{"execute": "remove_hostfwd", "arguments": {"id": "1"}}', "remove_hostfwd: bad arguments.id"),
        (b'{"execute": "remove_hostfwd", "arguments": {"id": 7}}', "remove_hostfwd: slirp_remove_hostfwd failed"),
    ],
)
def test_a_bad_request(api: Api, request_: bytes | dict[str, Any], said: str) -> None:
    octets = (
        request_
        if isinstance(request_, bytes)
        else json.dumps({"execute": "add_hostfwd", "arguments": request_}).encode()
    )
    assert api.answer(octets) == {"error": {"desc": f"bad request: {said}"}}


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["execute", "arguments", "id", "proto"]), inner)
        ),
    ).map(lambda one: json.dumps(one).encode())
)
def test_any_octets_are_answered(octets: bytes) -> None:
    (key,) = Api(Registry.__new__(Registry), "10.0.2.100").answer(octets).keys() - {"entries"}
    assert key in ("error", "return")


@pytest.mark.parametrize(
    ("pieces", "half_close"),
    [
        ([b'{"execute": "list_hostfwd"}'], False),
        ([b'{"execute": ', b'"list_hostfwd"}\n'], False),
        ([b'{"execute": "list_hostfwd"}\n'], True),
    ],
    ids=["one write", "two writes", "as rootlesskit"],
)
async def test_a_connection(api: Api, pieces: list[bytes], half_close: bool, short_path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(short_path)
    listener.listen()
    acceptor = Acceptor(listener, api.serve, name="test")
    try:
        reader, writer = await asyncio.open_unix_connection(short_path)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(5):
            assert json.loads(await reader.read()) == {"return": {"entries": []}, "entries": []}
        writer.close()
        await writer.wait_closed()
    finally:
        await acceptor.close()


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s") / "api")
