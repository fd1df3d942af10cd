"""What a capture around a link records: both directions, whole frames, no headroom."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import dpkt
import pytest

from netstack.api import Link
from netstack.link.capture import CaptureLink
from netstack.link.stream import QemuLink
from netstack.observe.pcap import PcapWriter

from .conftest import frame

START_NS = 1_700_000_000_000_000_000


def captured(tmp_path: Path) -> tuple[CaptureLink, socket.socket, PcapWriter, Path]:
    path = tmp_path / "all.pcapng"
    ours, theirs = socket.socketpair()
    writer = PcapWriter(str(path))
    ticks = iter(range(START_NS, START_NS + 10**9, 1000))
    return CaptureLink(QemuLink(ours, "qemu:x", 1500), writer, wall_ns=lambda: next(ticks)), theirs, writer, path


def test_both_directions_are_recorded_without_the_prefix(tmp_path: Path) -> None:
    link, peer, writer, path = captured(tmp_path)
    assert isinstance(link, Link)
    peer.sendall(b"".join(len(octets).to_bytes(4, "big") + octets for octets in (frame(1), frame(2, 1514))))
    assert len(link.receive()) == 2
    out = frame(3, 1000)
    assert link.send([(link.prefix(1000) + out[:14], memoryview(out)[14:])]) == 1
    assert link.receive() == []
    writer.close()
    with path.open("rb") as file:
        records = [(time, octets) for time, octets in dpkt.pcapng.Reader(file)]
    assert [octets for _, octets in records] == [frame(1), frame(2, 1514), frame(3, 1000)]
    if shutil.which("tshark"):
        out_text = subprocess.run(
            ["tshark", "-r", str(path), "-T", "fields", "-e", "frame.packet_flags_direction", "-e", "frame.time_epoch"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        lines = [line.split("\t") for line in out_text.splitlines()]
        assert [int(line[0], 0) for line in lines] == [1, 1, 2]
        assert [line[1] for line in lines] == ["1700000000.000000000"] * 2 + ["1700000000.000001000"]
    link.close()
    peer.close()


def test_frames_that_were_not_taken_are_recorded_when_they_are(tmp_path: Path) -> None:
    link, peer, writer, _path = captured(tmp_path)
    batch = [(link.prefix(1500), frame(number, 1500)) for number in range(64)]
    total = 0
    while (taken := link.send(batch)) == 64:
        total += 64
    assert writer.frames == total + taken
    writer.close()
    link.close()
    peer.close()


def test_a_capture_that_stopped_costs_the_link_nothing(tmp_path: Path) -> None:  # F17
    link, peer, writer, _path = captured(tmp_path)
    writer.close()
    assert link.send([(link.prefix(60), frame(1))]) == 1
    peer.sendall((60).to_bytes(4, "big") + frame(2))
    assert [bytes(view[4:]) for view in link.receive()] == [frame(2)]
    link.close()
    peer.close()


@pytest.mark.parametrize("attribute", ["name", "headroom", "mtu", "max_frame", "tso", "partial_checksums"])
def test_a_captured_link_looks_like_the_link(tmp_path: Path, attribute: str) -> None:
    link, peer, writer, _path = captured(tmp_path)
    assert getattr(link, attribute) == getattr(link.inner, attribute)
    writer.close()
    link.close()
    peer.close()
