"""`pyvpnkit demo` as a newcomer and as CI meet it."""

from __future__ import annotations

import asyncio
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import PcapNgReader

from netstack.observe import pcap
from pyvpnkit import demo
from tests.roof.embedded import World, processes_with

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(sys.platform != "linux", reason="expected: not Linux"),
]

STEPS = ["guest", "lease", "exposed", "names", "ping", "page", "published", "upload", "download", "counters", "capture"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A temporary directory that everybody may use."""
    with tempfile.TemporaryDirectory(prefix="pyvpnkit-test-") as name:
        os.chmod(name, 0o1777)
        yield Path(name)


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_every_step_works_without_a_terminal(user: str, directory: Path) -> None:
    began = time.monotonic()
    done = World(user=user).run("demo", TMPDIR=str(directory), COLUMNS="20", http_proxy="http://192.0.2.1:1")
    took = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "\x1b" not in done.stdout, "plain lines"
    lines = dict(re.findall(r"^ok +(\w+) +(.*)$", done.stdout, re.MULTILINE))
    assert list(lines) == STEPS
    assert lines["lease"].startswith("192.168.65.3/24 ")
    assert "host.internal is 192.168.65.2" in lines["names"]
    assert "Hello from the host" in lines["page"] and "Hello from the guest" in lines["published"]
    assert "expose-port" in lines["exposed"] and "so did the port" in lines["exposed"]
    for direction in ("upload", "download"):
        assert float(lines[direction].split()[0]) > 0.1, "Gbit/s"
    assert done.stdout.count("\ntcp  192.168.65.3:") >= 2, "the flow, while it carries each direction"
    assert took < 20
    (written,) = directory.iterdir()
    assert str(written) in lines["capture"], "and nothing else is left"
    with PcapNgReader(str(written)) as reader:
        packets = [packet for packet, _ in zip(reader, range(200), strict=False)]
    assert len(packets) == 200 and {packet.direction & 3 for packet in packets} == {1, 2}
    counted = re.search(r": (\d+) frames from the guest, (\d+) to it", lines["capture"])
    assert counted is not None
    counters = re.match(r"(\d+) frames .*, (\d+) and ", lines["counters"])
    assert counters is not None
    assert counted.groups() == counters.groups(), "the capture has what the stack has seen"
    assert not processes_with(str(directory))


def test_a_terminal_shows_the_flows_live(directory: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    world = World()
    process = subprocess.Popen(
        world.argv("demo"),
        env=world.environment(TMPDIR=str(directory), TERM="xterm", COLUMNS="120"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd="/",
    )
    os.close(theirs)
    text = b""
    try:
        while data := os.read(ours, 65536):
            text += data
    except OSError:  # EIO: all have closed it
        pass
    os.close(ours)
    assert process.wait(10) == 0, text
    assert text.count(b"ESTABLISHED") > 8, "the table, again and again"
    assert b"All of it worked" in text


def test_a_capture_that_cannot_be_written_is_said(directory: Path) -> None:
    """With TMPDIR useless Python looks elsewhere; a full disk is what remains."""
    full = f"mount -t tmpfs -o size=8k tmpfs {directory}"
    done = World(prepare=full).run("demo", TMPDIR=str(directory))
    assert done.returncode == 1
    assert re.search(r"^FAILED capture +stopped: No space left", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.rstrip().endswith("Failed: capture"), "all else worked"


class _Nobody:
    """Stands for a worker, a service, a guest that the steps of this test do not need."""

    settings = type("Settings", (), {"network": None})


async def test_a_failed_step_is_named_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    nobody: Any = _Nobody()
    tour = demo.Tour(Console(width=100), nobody, nobody, nobody, nobody)

    async def good() -> str:
        return "fine [not markup]"

    async def wrong() -> str:
        raise demo.Failed("12 is [not] 13")

    async def unreachable() -> str:
        raise ConnectionRefusedError(111, "Connection refused")

    async def slow() -> str:
        await asyncio.sleep(3600)
        return "never"

    demo_step_s, demo.STEP_S = demo.STEP_S, 0.05  # type: ignore[misc]
    try:
        assert [await tour.step(step.__name__, step) for step in (good, wrong, unreachable, slow, good)] == [
            True,
            False,
            False,
            False,
            True,
        ]
    finally:
        demo.STEP_S = demo_step_s  # type: ignore[misc]
    assert tour.failed == ["wrong", "unreachable", "slow"]
    assert capsys.readouterr().out.splitlines() == [
        "ok     good       fine [not markup]",
        "FAILED wrong      12 is [not] 13",
        "FAILED unreachable [Errno 111] Connection refused",
        "FAILED slow       took more than 0.05 s",
        "ok     good       fine [not markup]",
    ]


class TestCaptureCheck:
    """The demo reads its own capture again, and would notice."""

    @pytest.fixture
    def capture(self, tmp_path: Path) -> Path:
        writer = pcap.PcapWriter(str(tmp_path / "x.pcapng"))
        number = writer.add_interface("tap:eth0")
        for count, direction in ((3, pcap.INBOUND), (2, pcap.OUTBOUND)):
            for octets in range(count):
                writer.write(number, direction, 1_700_000_000_000_000_000, bytes(60 + octets))
        writer.close()
        return tmp_path / "x.pcapng"

    def test_both_directions_are_counted(self, capture: Path) -> None:
        assert demo.directions(capture, capture.stat().st_size) == (3, 2)

    def test_any_damage_to_the_structure_is_noticed(self, capture: Path) -> None:
        whole = capture.read_bytes()
        for damaged in (whole[:-3], whole[4:], b"", whole[:-4] + struct.pack("<I", 7), whole + b"\x06"):
            capture.write_bytes(damaged)
            if damaged:
                with pytest.raises(demo.Failed):
                    demo.directions(capture, len(damaged))
            else:
                assert demo.directions(capture, 0) == (0, 0)
