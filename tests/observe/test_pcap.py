"""Capture files as others read them: dpkt, scapy and tshark; their bounds; and the disk that is full."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import dpkt
import pytest

from netstack.errors import ConfigError
from netstack.observe.events import CaptureStopped, Event, EventBus
from netstack.observe.pcap import INBOUND, OUTBOUND, PcapWriter

NOW_NS = 1_700_000_000_123_456_789
ARP = bytes.fromhex("ffffffffffff0250000000010806000108000604000102500000000" + "1c0a841030000000000" + "00c0a84101")


def udp(octets: int) -> bytes:
    """A UDP datagram of `octets` in an Ethernet frame, checksums left out."""
    header = dpkt.ip.IP(
        src=socket.inet_aton("192.168.65.3"),
        dst=socket.inet_aton("192.168.65.1"),
        p=17,
        data=dpkt.udp.UDP(sport=4000, dport=9, ulen=8 + octets, data=bytes(octets)),
    )
    header.len = len(header)
    return bytes(dpkt.ethernet.Ethernet(src=b"\2\0\0\0\0\1", dst=b"\2\0\0\0\0\2", data=header))


def records(path: Path) -> list[tuple[float, bytes]]:
    with path.open("rb") as file:
        return list(dpkt.pcapng.Reader(file))


def tshark(path: Path, *fields: str) -> list[list[str]]:
    program = shutil.which("tshark")
    if program is None:
        pytest.skip("tshark is not installed")
    options = [part for field in fields for part in ("-e", field)]
    out = subprocess.run(
        [program, "-r", str(path), "-T", "fields", *options], capture_output=True, text=True, check=True
    )
    return [line.split("\t") for line in out.stdout.splitlines()]


def test_others_read_frames_times_directions_and_interfaces(tmp_path: Path) -> None:
    path = tmp_path / "all.pcapng"
    writer = PcapWriter(str(path))
    first, second = writer.add_interface("qemu:/run/net.sock"), writer.add_interface("tap:netns=guest")
    frames = [ARP, udp(1), udp(2), udp(3), udp(1400)]
    for number, frame in enumerate(frames):
        writer.write((first, second)[number & 1], (INBOUND, OUTBOUND)[number & 1], NOW_NS + number, frame)
    writer.close()
    assert [octets for _, octets in records(path)] == frames

    from scapy.utils import rdpcap

    packets = rdpcap(str(path))
    assert [bytes(packet) for packet in packets] == frames
    assert packets[0].time == pytest.approx(NOW_NS / 1e9)

    lines = tshark(path, "frame.time_epoch", "frame.interface_name", "frame.packet_flags_direction", "frame.len")
    assert [line[0] for line in lines] == [
        f"1700000000.12345678{9 + n}" if n == 0 else f"1700000000.12345679{n - 1}" for n in range(5)
    ]
    assert [line[1] for line in lines] == ["qemu:/run/net.sock", "tap:netns=guest"] * 2 + ["qemu:/run/net.sock"]
    assert [int(line[2], 0) for line in lines] == [INBOUND, OUTBOUND, INBOUND, OUTBOUND, INBOUND]
    assert [int(line[3]) for line in lines] == [len(frame) for frame in frames]


def test_an_interface_that_comes_later_and_one_that_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "late.pcapng"
    writer = PcapWriter(str(path))
    writer.write(writer.add_interface("a"), INBOUND, NOW_NS, ARP)
    writer.write(writer.add_interface("b"), INBOUND, NOW_NS, ARP)
    assert writer.add_interface("a") == 0
    writer.close()
    assert [line[0] for line in tshark(path, "frame.interface_name")] == ["a", "b"]


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:  # G30
    path = tmp_path / "names.pcapng"
    writer = PcapWriter(str(path))
    writer.write(writer.add_interface("evil\x1b[31m\nname"), INBOUND, NOW_NS, ARP)
    writer.close()
    assert b"\x1b" not in path.read_bytes()
    assert b"evil\\x1b[31m\\x0aname" in path.read_bytes()


def test_a_long_frame_is_cut_and_its_length_kept(tmp_path: Path) -> None:
    path = tmp_path / "short.pcapng"
    writer = PcapWriter(str(path), snaplen=100)
    writer.write(writer.add_interface("a"), INBOUND, NOW_NS, memoryview(udp(1400)))
    writer.close()
    assert [octets for _, octets in records(path)] == [udp(1400)[:100]]
    assert tshark(path, "frame.len", "frame.cap_len") == [["1442", "100"]]


def test_the_capture_is_a_ring_of_files(tmp_path: Path) -> None:  # G30
    path = tmp_path / "ring.pcapng"
    limit, count = 65536, 400
    writer = PcapWriter(str(path), limit=limit, files=3)
    interface = writer.add_interface("a")
    for number in range(count):
        writer.write(interface, INBOUND, NOW_NS + number * 1000, udp(1000 + number))
    writer.close()
    files = [tmp_path / "ring.pcapng.2", tmp_path / "ring.pcapng.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= limit for file in files)
    lengths = [len(octets) for file in files for _, octets in records(file)]
    assert lengths == list(range(1042 + count - len(lengths), 1042 + count))
    assert len(lengths) > 100
    assert tshark(path, "frame.interface_name")[0] == ["a"]


def test_a_single_file_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "one.pcapng"
    writer = PcapWriter(str(path), limit=65536, files=1)
    interface = writer.add_interface("a")
    for number in range(100):
        writer.write(interface, INBOUND, NOW_NS, udp(1000 + number))
    writer.close()
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size <= 65536
    assert len(records(path)[-1][1]) == 1042 + 99


def test_frames_are_in_the_file_within_a_second_of_traffic(tmp_path: Path) -> None:
    path = tmp_path / "live.pcapng"
    writer = PcapWriter(str(path))
    interface = writer.add_interface("a")
    writer.write(interface, INBOUND, NOW_NS, ARP)
    assert len(records(path)) == 1
    writer.write(interface, INBOUND, NOW_NS + 1000, ARP)
    assert len(records(path)) == 1
    writer.flush()
    assert len(records(path)) == 2
    writer.write(interface, INBOUND, NOW_NS + 1_000_000_001, ARP)
    assert len(records(path)) == 3
    writer.close()


def test_the_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "private.pcapng"
    path.write_bytes(b"old" * 1000)
    path.chmod(0o644)
    PcapWriter(str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"old" not in path.read_bytes()
    fresh = tmp_path / "fresh.pcapng"
    PcapWriter(str(fresh)).close()
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o600


def test_what_others_may_have_prepared_is_not_written_to(tmp_path: Path) -> None:  # L2
    victim = tmp_path / "victim"
    victim.write_text("precious")
    symlink, hard, fifo = tmp_path / "symlink", tmp_path / "hard", tmp_path / "fifo"
    symlink.symlink_to(victim)
    os.link(victim, hard)
    os.mkfifo(fifo)
    for path in (symlink, hard, fifo, tmp_path, tmp_path / "missing" / "file", Path("/dev/null")):
        with pytest.raises(ConfigError):
            PcapWriter(str(path))
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("options", [{"limit": 10}, {"files": 0}, {"snaplen": 0}, {"snaplen": 1 << 20}])
def test_bounds_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 65536 octets"):
        PcapWriter(str(tmp_path / "x"), **options)  # type: ignore[arg-type]


def test_a_write_error_stops_the_capture_once_and_nothing_else(tmp_path: Path) -> None:  # F17
    events: list[Event] = []
    bus = EventBus()
    bus.subscribe(events.append)
    path = tmp_path / "full.pcapng"
    writer = PcapWriter(str(path), events=bus, clock=lambda: 7.0)
    interface = writer.add_interface("a")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)
    os.close(full)
    for number in range(1000):
        writer.write(interface, INBOUND, NOW_NS + number, udp(1400))
    writer.flush()
    writer.close()
    assert [event for event in events if isinstance(event, CaptureStopped)] == [
        CaptureStopped(time=7.0, path=str(path), reason="No space left on device")
    ]
    assert writer.stopped == "No space left on device"


FULL_DISK = """
import sys
from netstack.observe.events import EventBus
from netstack.observe.pcap import PcapWriter
events = []
bus = EventBus()
bus.subscribe(events.append)
writer = PcapWriter(sys.argv[1] + "/full.pcapng", events=bus)
interface = writer.add_interface("a")
for number in range(3000):
    writer.write(interface, 1, number, bytes(1000))
writer.close()
assert [event.reason for event in events] == ["No space left on device"], events
sys.stdout.buffer.write(open(sys.argv[1] + "/full.pcapng", "rb").read())
"""


@pytest.mark.netns
def test_a_disk_that_fills_leaves_a_readable_capture(tmp_path: Path) -> None:  # F17
    """A small file system in a mount namespace of its own: what was written before is whole."""
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$0" -c "$2" "$1"'
    mount = tmp_path / "disk"
    mount.mkdir()
    out = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, str(mount), FULL_DISK],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if b"unshare" in out.stderr or b"mount:" in out.stderr:
        pytest.skip(f"no mount namespace here: {out.stderr.decode().strip()}")
    assert out.returncode == 0, out.stderr.decode()
    copy = tmp_path / "copy.pcapng"
    copy.write_bytes(out.stdout)
    assert 500 < len(records(copy)) < 1100
    assert len(tshark(copy, "frame.len")) == len(records(copy))
