"""gvproxy's framing, and what gvforwarder takes (spec gvproxy 1.4). What all links share is in `test_conformance.py`."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.api import Link
from netstack.errors import ConfigError
from netstack.link.attach import Attachments
from netstack.link.stdio import GVFORWARDER_MTU, StdioLink, adopt
from netstack.observe.metrics import Counters, Drop
from tests.support import packets

from .conftest import frame


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_the_wire(pair: tuple[socket.socket, socket.socket]) -> None:
    link = StdioLink(pair[0], "connect#1", 1500)
    octets = frame(1, 42)
    assert link.send([(link.prefix(42), octets)]) == 1
    assert pair[1].recv(100) == b"\x2a\0" + octets
    pair[1].sendall(b"\x2a\0" + octets)
    assert [bytes(view) for view in link.receive()] == [b"\x2a\0" + octets]


@pytest.mark.parametrize(
    ("network", "peer", "longest_sent", "longest_taken"),
    [
        (1500, None, 1514, GVFORWARDER_MTU + 18),  # the network's own is less than gvforwarder's 4000
        (9000, None, GVFORWARDER_MTU + 14, 9018),
        (9000, 9000, 9014, 9018),
        (1500, 1000, 1014, 1518),
    ],
)
def test_no_frame_is_longer_than_the_peer_takes(
    pair: tuple[socket.socket, socket.socket], network: int, peer: int | None, longest_sent: int, longest_taken: int
) -> None:
    counters = Counters()
    link = StdioLink(pair[0], "connect#1", network, counters=counters, peer_mtu=peer)
    for octets in (longest_sent, longest_sent + 1):
        assert link.send([(link.prefix(octets), bytes(octets))]) == 1
    assert len(pair[1].recv(1 << 17)) == 2 + longest_sent
    assert counters.drops[Drop.FRAME_LONG] == 1
    for octets in (longest_taken, longest_taken + 1):
        pair[1].sendall(octets.to_bytes(2, "little") + frame(1, octets))
    assert [len(view) - 2 for view in link.receive()] == [longest_taken]
    assert counters.drops[Drop.FRAME_LONG] == 2


async def test_connections_are_adopted_by_number_and_refused_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attached: list[Link] = []
    pairs = [socket.socketpair() for _ in range(3)]
    async with Attachments(
        mtu=1500, attach=lambda link, _: attached.append(link), detach=lambda port, why: None
    ) as all_:
        monkeypatch.setattr("netstack.link.attach.MAX_LINKS", 2)
        for ours, _ in pairs[:2]:
            adopt(all_, ours, mtu=1500)
        assert [link.name for link in attached] == ["connect#1", "connect#2"]
        with pytest.raises(ConfigError, match="connect#3"):
            adopt(all_, pairs[2][0], mtu=1500)
        assert pairs[2][0].fileno() == -1
        all_.detached(attached[0], "gone")
        adopt(all_, pairs[2][1], mtu=1500)
        assert [link.name for link in all_.links] == ["connect#2", "connect#1"]
    for pair_ in pairs:
        for sock in pair_:
            sock.close()


# Standard input and output.

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "pyvpnkit", "run", "--link", "stdio:", "--state-dir", "off"]
FRAMES = 3000


def who_has(number: int) -> bytes:
    """A guest's question after the gateway, told apart by its own address."""
    mac = b"\x02\0\0\0\0\x07"
    guest = bytes((192, 168, 65, 3 + number % 200))
    octets = packets.ether(
        b"\xff" * 6, mac, packets.ARP, packets.arp(1, mac, guest, bytes(6), bytes((192, 168, 65, 1)))
    )
    return len(octets).to_bytes(2, "little") + octets


def answers(stream: bytes) -> int:
    """Frames in a stream, all of them ARP replies of the gateway."""
    count = 0
    while stream:
        length = int.from_bytes(stream[:2], "little")
        frame_, stream = stream[2 : 2 + length], stream[2 + length :]
        assert frame_[12:14] == b"\x08\x06" and frame_[20:22] == b"\0\2" and frame_[28:32] == bytes((192, 168, 65, 1))
        count += 1
    return count


def test_a_daemon_on_two_pipes_that_ends_with_them() -> None:
    """As gvforwarder starts it; more goes both ways than pipes hold, and nothing but frames comes out."""
    said = b"".join(map(who_has, range(FRAMES)))
    with subprocess.Popen(
        RUN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as daemon:
        assert daemon.stdin is not None and daemon.stdout is not None and daemon.stderr is not None
        writer = threading.Thread(target=daemon.stdin.write, args=(said,))
        writer.start()
        heard = daemon.stdout.read(len(said))  # an answer is as long as its question
        writer.join()
        daemon.stdin.close()
        assert daemon.wait(10) == 0
        assert b"the last link has ended" in daemon.stderr.read()
        assert (answers(heard), daemon.stdout.read()) == (FRAMES, b"")


def test_a_daemon_on_one_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen(RUN, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT) as daemon:
        theirs.close()
        ours.settimeout(10)
        ours.sendall(who_has(1))
        assert answers(ours.recv(100)) == 1
        ours.close()
        assert daemon.stderr is not None
        assert daemon.wait(10) == 0, daemon.stderr.read()


def test_a_terminal_and_a_log_in_between_are_refused() -> None:
    master, slave = pty.openpty()
    try:
        run = subprocess.run(RUN, stdin=slave, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        assert (run.returncode, "standard input is a terminal" in run.stderr) == (2, True), run.stderr
        both = subprocess.run(
            RUN,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
        assert (both.returncode, "are the same; send the log elsewhere" in both.stdout) == (2, True), both.stdout
        closed = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *RUN], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
        )
        assert (closed.returncode, "standard input is closed" in closed.stderr) == (2, True), closed.stderr
    finally:
        os.close(master)
        os.close(slave)
