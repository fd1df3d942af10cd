"""Addresses and flags of the Go tools (spec vpnkit 1.2, 9.3 "transport"). A vsock is only ever read here, never opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import text

from netstack.errors import ConfigError, HostError
from portfwd.invm.flags import Flag, parse
from portfwd.invm.transport import UNIX_PATH_MAX, Address, short_path


@pytest.mark.parametrize(
    ("text", "address", "written"),
    [
        ("2", Address("vsock", port=2), "2"),
        ("3/2", Address("vsock", cid=3, port=2), "3/2"),
        ("62373", Address("vsock", port=62373), "62373"),
        ("/var/run/x.sock", Address("unix", path="/var/run/x.sock"), "unix:/var/run/x.sock"),
        ("x.sock", Address("unix", path="x.sock"), "unix:x.sock"),
        ("3/x", Address("unix", path="3/x"), "unix:3/x"),
        ("1/2/3", Address("unix", path="1/2/3"), "unix:1/2/3"),
        ("unix:62373", Address("unix", path="62373"), "unix:62373"),
        ("tcp:127.0.0.1:80", Address("tcp", host="127.0.0.1", port=80), "tcp:127.0.0.1:80"),
        ("tcp:[::1]:80", Address("tcp", host="::1", port=80), "tcp:[::1]:80"),
        ("fd:7", Address("fd", fd=7), "fd:7"),
    ],
)
def test_an_address_is_read_as_the_go_tools_do(text: str, address: Address, written: str) -> None:
    assert Address.parse(text) == address
    assert str(address) == written
    assert Address.parse(str(address)) == address


@given(text() | text(alphabet="0123456789/:[]tcpfdunix.", max_size=20))
def test_any_text_is_an_address_that_can_be_written_or_a_complaint(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError as error:
        assert str(error)
    else:
        assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("4294967296", "below 4294967296"),
        ("4294967296/1", "below 4294967296"),
        ("tcp:80", "no IP address"),
        ("tcp:localhost:80", "no IP address"),
        ("tcp:::1:80", "brackets"),
        ("tcp:[127.0.0.1]:80", "brackets"),
        ("tcp:127.0.0.1:65536", "no port"),
        ("tcp:127.0.0.1:", "no port"),
        ("fd:", "no descriptor"),
        ("fd:-1", "no descriptor"),
        ("unix:", "path is missing"),
        ("/a\0b", "zero octet"),
    ],
)
def test_what_is_wrong_with_an_address_is_said(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Address.parse(text)


def test_the_longest_unix_path_is_taken_as_it_is(tmp_path: Path) -> None:
    longest = str(tmp_path) + "/" + "x" * (UNIX_PATH_MAX - len(str(tmp_path)) - 1)
    assert len(longest) == UNIX_PATH_MAX
    assert short_path(longest) == longest
    listening = Address.parse(longest).listener()
    assert os.path.exists(longest)
    listening.close()
    assert not os.path.exists(longest)


def test_a_longer_path_is_made_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    path = str(deep / "control.sock")
    assert len(path) > UNIX_PATH_MAX
    assert short_path(path) == "control.sock"
    listening = Address.parse(path).listener()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("control.sock")
    monkeypatch.chdir(tmp_path)  # the path made is remembered whole
    listening.close()
    assert not (deep / "control.sock").exists()


def test_a_path_that_cannot_be_made_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / ("d" * UNIX_PATH_MAX) / "s"), "d" * (UNIX_PATH_MAX + 1)):
        with pytest.raises(ConfigError, match="use a shorter one"):
            short_path(path)


def test_a_stale_socket_is_replaced_and_a_file_never(tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    Address.parse(str(path)).listener().close()
    path.write_text("mine")
    with pytest.raises(HostError, match="only a socket is replaced"):
        Address.parse(str(path)).listener()
    assert path.read_text() == "mine"


def test_closing_leaves_a_path_that_is_somebody_elses_by_now(tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    first = Address.parse(str(path)).listener()
    second = Address.parse(str(path)).listener()
    first.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    second.close()


async def test_inherited_descriptors_are_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        assert Address.parse(f"fd:{os.dup(listener.fileno())}").listener().sock.close() is None
        dialled = await Address.parse(f"fd:{os.dup(client.fileno())}").connect()
        dialled.close()
        with pytest.raises(HostError, match="no listening socket"):
            Address.parse(f"fd:{os.dup(client.fileno())}").listener()
    read, write = os.pipe()
    try:
        with pytest.raises(HostError, match="socket this process inherits"):
            Address.parse(f"fd:{read}").listener()
    finally:
        os.close(read)
        os.close(write)


async def test_dialling_reaches_tcp_and_unix_and_says_why_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address.parse(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        (await address.connect()).close()
    with pytest.raises(ConnectionRefusedError):
        await address.connect()
    unix = Address.parse(str(tmp_path / "s"))
    with pytest.raises(FileNotFoundError):
        await unix.connect()
    listening = unix.listener()
    (await unix.connect()).close()
    listening.close()


FLAGS = {"data": Flag(value="A", help=""), "n": Flag(value="N", default="5", help=""), "debug": Flag(help="")}


@pytest.mark.parametrize(
    "argv",
    [["-data", "x"], ["--data", "x"], ["-data=x"], ["--data=x"], ["-data", "y", "-data", "x"], ["-debug", "-data=x"]],
)
def test_each_spelling_of_a_flag_means_the_same(argv: list[str]) -> None:
    given = parse(argv, FLAGS)
    assert (given.text("data"), given.text("n")) == ("x", "5")


@pytest.mark.parametrize(
    ("argv", "on"),
    [
        (["-debug"], True),
        (["--debug=true"], True),
        (["-debug=1"], True),
        (["-debug", "-debug=false"], False),
        ([], False),
    ],
)
def test_switches_are_as_in_go(argv: list[str], on: bool) -> None:
    assert parse(argv, FLAGS).on("debug") is on


def test_a_value_may_look_like_a_flag_and_words_behind_the_flags_are_kept() -> None:
    given = parse(["-n", "-1", "-debug", "word", "-data", "x"], FLAGS)
    assert (given.text("n"), given.rest) == ("-1", ["word", "-data", "x"])
    assert parse(["-debug", "--", "-n"], FLAGS).rest == ["-n"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["-data"], "needs a value"),
        (["-debug=perhaps"], "neither true nor false"),
        (["-nope"], "unknown flag -nope"),
        (["-=x"], "unknown"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(argv, FLAGS)


def test_unknown_flags_can_be_passed_over_with_their_values() -> None:
    given = parse(["-new", "-data", "x", "--newer", "value", "-newest=1", "-debug"], FLAGS, tolerant=True)
    assert given.unknown == ["-new", "--newer", "-newest=1"]
    assert given.text("data") == "x" and given.on("debug")
