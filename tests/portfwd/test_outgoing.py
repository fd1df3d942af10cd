"""Gateway forwards and tunnels as the person who writes the options and the files sees them (spec vpnkit 7.6, 7.7)."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Endpoint, GatewayForward, TunnelRule
from netstack.errors import ConfigError
from portfwd import watch
from portfwd.outgoing import MAX_ENTRIES, Outgoing, decoded, gateway_forwards, parse_static, tunnels
from portfwd.watch import Content, FileWatch

GOOD = {"protocol": "tcp", "external_port": 80, "internal_ip": "1.2.3.4", "internal_port": 8080}
RULE = {"protocol": "tcp", "dst_prefix": "10.0.0.0/8", "dst_port": 443, "path": "/run/t.sock"}


def forward(protocol: str, port: int, to: str, to_port: int) -> GatewayForward:
    return GatewayForward(protocol, port, Endpoint.of(to, to_port))


def complaints(call: Any, *arguments: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value).splitlines()


# Options


def test_static_forwards_are_read_as_vpnkit_reads_them() -> None:
    assert parse_static("tcp", "8888:127.0.0.1:80,53:8.8.8.8:5353") == (
        forward("tcp", 8888, "127.0.0.1", 80),
        forward("tcp", 53, "8.8.8.8", 5353),
    )
    assert parse_static("udp", " 1:1.2.3.4:65535 ,") == (forward("udp", 1, "1.2.3.4", 65535),)
    assert parse_static("udp", "") == ()


@pytest.mark.parametrize(
    "text",
    ["80", "80:1.2.3.4", "80:1.2.3.4:80:80", "0:1.2.3.4:80", "80:1.2.3.4:65536", "-1:1.2.3.4:80", "80:1.2.3:80",
     "80:host:80", "80:0.0.0.0:80", "80::80", "²:1.2.3.4:80", "80:1.2.3.4:0x50", "80:01.2.3.4:80", "1e3:1.2.3.4:80"],
)  # fmt: skip
def test_a_static_forward_that_is_none_is_named_with_what_is_expected(text: str) -> None:
    (complaint,) = complaints(parse_static, "tcp", f"1:1.1.1.1:1,{text}")
    assert complaint.startswith(f"tcpv4_forwards: '{text}'")
    assert any(word in complaint for word in ("LPORT:IPV4:RPORT", "1 to 65535", "IPv4 address", "127.0.0.1"))


def test_all_complaints_about_an_option_come_at_once() -> None:
    assert len(complaints(parse_static, "udp", "x,1:1.1.1.1:1,y:1.1.1.1:1")) == 2


# Documents


def test_gateway_forwards_of_a_document() -> None:
    more = {"internal_port": 53, "internal_ip": "127.0.0.1", "comment": "x", "external_port": 53, "protocol": "udp"}
    text = json.dumps([GOOD, more], indent="\t") + "\n"
    assert gateway_forwards(decoded(text.encode())) == (
        forward("tcp", 80, "1.2.3.4", 8080),
        forward("udp", 53, "127.0.0.1", 53),
    )


def test_tunnels_of_a_document() -> None:
    rules = tunnels([RULE, RULE | {"dst_prefix": "1.2.3.4/8", "dst_port": 0}, RULE | {"dst_prefix": "fd00::/8"}])
    assert rules == (
        TunnelRule(ipaddress.ip_network("10.0.0.0/8"), 443, "/run/t.sock"),
        TunnelRule(ipaddress.ip_network("1.0.0.0/8"), 0, "/run/t.sock"),
        TunnelRule(ipaddress.ip_network("fd00::/8"), 443, "/run/t.sock"),
    )


def test_tunnels_for_udp_are_understood_left_out_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert len(tunnels([RULE | {"protocol": "udp"}, RULE])) == 1
    assert "only tcp" in caplog.text


@pytest.mark.parametrize("text", ["[]", "null", " [ ] \n", "\ufeff[]"])
def test_a_document_without_entries(text: str) -> None:
    assert gateway_forwards(decoded(text.encode())) == tunnels(decoded(text.encode())) == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1 column 1"),
        (b'[\n  {"protocol": tcp}]', "line 2 column 16"),
        (b"\xff\xfe[\0]\0", "not UTF-8"),
        (b"[" * 100_000, "no JSON"),
        (b"[1" + b"0" * 10_000 + b"]", "no JSON"),
    ],
)
def test_what_is_no_json_is_said_with_its_place(content: bytes, words: str) -> None:
    (complaint,) = complaints(decoded, content)
    assert words in complaint


@pytest.mark.parametrize("document", [{}, "x", 1, True])
def test_what_is_no_list_is_refused(document: object) -> None:
    for call in (gateway_forwards, tunnels):
        assert "a list of objects" in complaints(call, document)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "TCP"}, "'TCP'"),
        ({"protocol": 6}, '"tcp" or "udp"'),
        ({"external_port": 0}, "external_port 0: a number from 1 to 65535"),
        ({"external_port": 65536}, "external_port 65536"),
        ({"external_port": "80"}, "external_port '80'"),
        ({"external_port": True}, "external_port True"),
        ({"external_port": 80.0}, "external_port 80.0"),
        ({"internal_port": -1}, "internal_port -1"),
        ({"internal_ip": "localhost"}, "internal_ip 'localhost': an IPv4 address"),
        ({"internal_ip": "::1"}, "internal_ip '::1'"),
        ({"internal_ip": "0.0.0.0"}, "write 127.0.0.1"),
        ({"internal_ip": None}, "internal_ip None"),
        ({"internal_ip": "x" * 9999}, "..."),
    ],
)
def test_a_gateway_forward_that_is_none(change: dict[str, object], words: str) -> None:
    (complaint,) = complaints(gateway_forwards, [GOOD, GOOD | change])
    assert complaint.startswith("entry 2: ") and words in complaint and len(complaint) < 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "sctp"}, "'sctp'"),
        ({"dst_prefix": "10.0.0.0/33"}, "such as 10.0.0.0/8"),
        ({"dst_prefix": 10}, "dst_prefix 10"),
        ({"dst_port": 65536}, "0 to 65535"),
        ({"path": ""}, "path ''"),
        ({"path": "a\0b"}, "path of a unix socket"),
        ({"path": "\ud800"}, "path of a unix socket"),
        ({"path": "/" + "x" * 107}, "at most 107 octets"),
        ({"path": ["/a"]}, "path ['/a']"),
    ],
)
def test_a_tunnel_that_is_none(change: dict[str, object], words: str) -> None:
    (complaint,) = complaints(tunnels, [RULE, RULE | change])
    assert complaint.startswith("entry 2: ") and words in complaint


@pytest.mark.parametrize(("call", "entry"), [(gateway_forwards, GOOD), (tunnels, RULE)])
def test_all_complaints_about_a_document_come_at_once_and_not_without_end(call: Any, entry: dict[str, object]) -> None:
    for name in entry:
        (complaint,) = complaints(call, [{key: value for key, value in entry.items() if key != name}])
        assert f"{name} is missing" in complaint
    said = complaints(call, [{}, 7, entry])
    assert len(said) == 5 and said[-1].startswith("entry 2: an object is expected")
    assert len(complaints(call, [0] * MAX_ENTRIES)) == 21
    assert f"at most {MAX_ENTRIES}" in complaints(call, [entry] * (MAX_ENTRIES + 1))[0]


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.lists(st.fixed_dictionaries(dict.fromkeys([*GOOD, *RULE], inner)))
    ),
    max_leaves=20,
)


@given(_anything)
def test_any_document_has_values_or_complaints(document: object) -> None:
    for call in (gateway_forwards, tunnels):
        try:
            call(document)
        except ConfigError as error:
            assert str(error)


@given(st.binary() | st.text().map(str.encode))
def test_any_octets_are_a_document_or_a_complaint(content: bytes) -> None:
    try:
        decoded(content)
    except ConfigError as error:
        assert str(error)


# The watch


def watched(path: Path, **options: Any) -> tuple[FileWatch, list[Content]]:
    told: list[Content] = []
    return FileWatch(str(path), told.append, **options), told


def replace(path: Path, text: str) -> None:
    """As editors and VPN clients do: a new file, renamed over the old."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_file_is_followed_through_all_that_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    followed, told = watched(path)
    followed.look()
    path.write_text("created later")
    followed.look()
    path.write_text("in place")
    followed.look()
    replace(path, "renamed over")
    followed.look()
    followed.look()
    path.unlink()
    followed.look()
    followed.look()
    path.symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("by a link")
    followed.look()
    (tmp_path / "other").write_text("by another link")
    os.symlink(tmp_path / "other", tmp_path / "link.new")
    os.replace(tmp_path / "link.new", path)
    followed.look()
    expected = [None, b"created later", b"in place", b"renamed over", None, b"by a link", b"by another link"]
    assert told == expected


def test_a_change_that_leaves_the_status_as_it_was_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes within one tick of the file system's clock."""
    monkeypatch.setattr(watch, "_status", lambda status: (1,))
    path = tmp_path / "file"
    path.write_text("aaa")
    followed, told = watched(path)
    followed.look()
    path.write_text("bbb")
    followed.look()
    assert told == [b"aaa", b"bbb"]


def test_an_old_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("aaa")
    os.utime(path, (1, 1))
    followed, told = watched(path)
    followed.look()
    monkeypatch.setattr(followed, "_read", lambda: pytest.fail("read again"))
    for _ in range(3):
        followed.look()
    assert told == [b"aaa"]


def test_what_cannot_be_read_is_told_once_and_read_when_it_can(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    followed, told = watched(path)
    for _ in range(3):
        followed.look()
    path.rmdir()
    path.write_text("a file now")
    followed.look()
    assert len(told) == 2 and isinstance(told[0], OSError) and told[1] == b"a file now"


def test_a_pipe_nobody_writes_to_holds_nothing_up(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    followed, told = watched(path)
    followed.look()
    assert isinstance(told[0], OSError) and "not a regular file" in str(told[0])


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_OCTETS", 1000)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    followed, told = watched(path)
    followed.look()
    path.write_bytes(bytes(1001))
    followed.look()
    assert told[0] == bytes(1000)
    assert isinstance(told[1], OSError) and told[1].errno == errno.EFBIG


async def test_the_loop_looks_by_itself_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = asyncio.Event()
    told: list[Content] = []

    def changed(content: Content) -> None:
        told.append(content)
        seen.set()

    followed = FileWatch(str(path), changed, every_s=0.01)
    followed.start(asyncio.get_running_loop())
    assert told == [None], "the first look is not awaited"
    for text in ("one", "two"):
        seen.clear()
        replace(path, text)
        await asyncio.wait_for(seen.wait(), 10)
        assert told[-1] == text.encode()
    followed.close()
    followed.close()
    replace(path, "three")
    await asyncio.sleep(0.05)
    assert told[-1] == b"two"


# All of it


class Told:
    """A network that keeps what it is told."""

    def __init__(self) -> None:
        self.forwards: tuple[GatewayForward, ...] | None = None
        self.rules: tuple[TunnelRule, ...] | None = None

    def forward_gateway(self, forwards: Sequence[GatewayForward]) -> None:
        self.forwards = tuple(forwards)

    def tunnel(self, rules: Sequence[TunnelRule]) -> None:
        self.rules = tuple(rules)


@pytest.fixture
def told() -> Told:
    return Told()


STATIC = parse_static("tcp", "8888:127.0.0.1:80")
DYNAMIC = (forward("tcp", 80, "1.2.3.4", 8080),)


async def start(told: Told, tmp_path: Path) -> Outgoing:
    """With both files, which need not exist; the loop looks at them no more by itself."""
    files = {"gateway_file": str(tmp_path / "gateway.json"), "tunnels_file": str(tmp_path / "tunnels.json")}
    outgoing = Outgoing(told, static=STATIC, **files)
    outgoing.start(asyncio.get_running_loop())
    outgoing.close()
    return outgoing


async def test_what_is_written_holds_when_start_returns(told: Told, tmp_path: Path) -> None:
    (tmp_path / "gateway.json").write_text(json.dumps([GOOD]))
    (tmp_path / "tunnels.json").write_text(json.dumps([RULE]))
    outgoing = await start(told, tmp_path)
    assert told.forwards == STATIC + DYNAMIC, "options go before files"
    assert told.rules == outgoing.tunnels == tunnels([RULE])


async def test_without_files_the_options_hold(told: Told, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    outgoing = await start(told, tmp_path)
    assert told.forwards == STATIC and told.rules == ()
    assert not caplog.records and not outgoing.problems
    Outgoing(told).start(asyncio.get_running_loop())
    assert told.forwards == ()


async def test_files_come_change_and_go(told: Told, tmp_path: Path) -> None:
    outgoing = await start(told, tmp_path)
    replace(tmp_path / "gateway.json", json.dumps([GOOD]))
    replace(tmp_path / "tunnels.json", json.dumps([RULE]))
    outgoing.look()
    assert told.forwards == STATIC + DYNAMIC and told.rules == tunnels([RULE])
    replace(tmp_path / "gateway.json", "[]")
    outgoing.look()
    assert told.forwards == STATIC and told.rules == tunnels([RULE])
    (tmp_path / "tunnels.json").unlink()
    outgoing.look()
    assert told.rules == ()


async def test_what_cannot_be_understood_changes_nothing_and_is_logged_once(
    told: Told, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outgoing = await start(told, tmp_path)
    for name, good, bad, words in (
        ("gateway.json", [GOOD], [GOOD | {"internal_ip": "x"}, {}], "entry 1: internal_ip 'x'"),
        ("tunnels.json", [RULE], [RULE | {"dst_port": -1}, {}], "entry 1: dst_port -1"),
    ):
        path = tmp_path / name
        replace(path, json.dumps(good))
        outgoing.look()
        caplog.clear()
        for text in (json.dumps(bad), ""):  # the second: an editor that writes in place, half-way
            path.write_text(text)
            outgoing.look()
            outgoing.look()
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 2 and str(path) in errors[0] and words in errors[0] and "entry 2: " in errors[0]
        assert "the 1 of before stay" in errors[0]
        assert str(path) in outgoing.problems
        assert (told.forwards, told.rules) == (STATIC + DYNAMIC, tunnels([RULE]) if "tunnels" in name else ())
        replace(path, json.dumps(good))
        outgoing.look()
        assert not outgoing.problems


async def test_what_cannot_be_read_is_taken_for_empty(
    told: Told, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outgoing = await start(told, tmp_path)
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps([GOOD]))
    outgoing.look()
    path.unlink()
    path.mkdir()
    outgoing.look()
    assert told.forwards == STATIC
    assert f"{path} cannot be read" in caplog.text and str(path) in outgoing.problems
