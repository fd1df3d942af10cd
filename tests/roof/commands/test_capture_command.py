"""`pyvpnkit capture` and `top`: files and pipes that others read, and how they end."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvpnkit.commands.capture import Blocks
from pyvpnkit.commands.top import Rates
from tests.roof.api.conftest import Control, until
from tests.roof.commands.conftest import ROOT, end, pyvpnkit, start
from tests.roof.guest import BROADCAST, GATEWAY, HOST, StreamGuest
from tests.support import packets


async def capturing(control: Control, *argv: str) -> asyncio.subprocess.Process:
    process = await start(control.path, "capture", *argv)
    await until(lambda: control.server.counts()["open_captures"] == 1)
    return process


def frames(path: Path) -> list[str]:
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed; packages.txt names what the tests use")
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-e", "frame.protocols"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


async def test_so_many_frames_go_into_a_file_that_is_the_users_alone(
    control: Control, guest: StreamGuest, tmp_path: Path
) -> None:
    path = tmp_path / "dhcp.pcapng"
    process = await capturing(control, "-w", str(path), "-c", "4", "udp", "port", "67")
    await asyncio.to_thread(guest.lease)
    done = await end(process)
    assert (done.status, done.err) == (0, "4 packets captured, 0 lost\n")
    assert path.stat().st_mode & 0o777 == 0o600
    found = await asyncio.to_thread(frames, path)
    assert len(found) == 4 and all(one.endswith(":dhcp") for one in found)
    await until(lambda: control.server.counts()["open_captures"] == 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_leaves_a_whole_file(
    control: Control, guest: StreamGuest, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "all.pcapng"
    process = await capturing(control, "-w", str(path))
    await asyncio.to_thread(guest.lease)
    await until(lambda: path.exists() and path.stat().st_size > 1500)
    process.send_signal(number)
    done = await end(process)
    said = re.fullmatch(r"(\d+) packets captured, 0 lost\n", done.err)
    assert done.status == 0 and said is not None, done.err
    assert len(await asyncio.to_thread(frames, path)) == int(said[1])


async def test_tcpdump_reads_the_pipe_and_may_leave_first(control: Control, guest: StreamGuest) -> None:
    if shutil.which("tcpdump") is None:
        pytest.skip("tcpdump is not installed; packages.txt names what the tests use")
    script = f"{sys.executable} -m pyvpnkit capture | tcpdump -n -U -c 2 -r - 2>/dev/null"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYVPNKIT_CONTROL": control.path}
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    await until(lambda: control.server.counts()["open_captures"] == 1)
    while process.returncode is None:
        await asyncio.to_thread(guest.lease)
        try:
            async with asyncio.timeout(0.1):
                await process.wait()
        except TimeoutError:
            continue
    done = await end(process)
    assert len(done.out.splitlines()) == 2
    assert re.fullmatch(r"\d+ packets captured, 0 lost\n", done.err)


async def test_a_reader_that_is_slow_is_told_what_was_lost(control: Control, guest: StreamGuest) -> None:
    control.server.streams.capture_octets = 128 << 10
    control.server.streams.statistics_s = 0.1
    process = await start(control.path, "capture", "arp")
    await until(lambda: control.server.counts()["open_captures"] == 1)
    assert process.stdout is not None
    process.send_signal(signal.SIGSTOP)
    (reader,) = control.service.stack.live._readers
    frame = packets.ether(
        BROADCAST, guest.mac, packets.ARP, packets.arp(1, guest.mac, guest.address, bytes(6), GATEWAY)
    )
    batch = (struct.pack("!I", len(frame)) + frame) * 100
    drained = asyncio.create_task(asyncio.to_thread(lambda: any(iter(lambda: not guest._sock.recv(1 << 20), True))))
    while reader.lost < 500:
        await asyncio.to_thread(guest._sock.sendall, batch)
    process.send_signal(signal.SIGCONT)
    reading = asyncio.create_task(process.stdout.read())
    await until(lambda: len(reader._buffer) == 0)
    await asyncio.to_thread(guest._sock.sendall, batch)
    lost = reader.lost
    await until(lambda: len(reader._buffer) == 0)
    await asyncio.sleep(0.3)  # three times as long as it takes until the daemon has told the last
    process.send_signal(signal.SIGINT)
    await reading
    assert process.stderr is not None
    async with asyncio.timeout(30):
        said = (await process.stderr.read()).decode()
        assert await process.wait() == 0
    assert said.endswith(f", {lost} lost\n")
    guest._sock.shutdown(socket.SHUT_RDWR)
    await drained


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(["port", "80", "prot", "81"], "character 9", id="filter"),
        pytest.param(["-s", "1"], "64 to 262144", id="snaplen"),
        pytest.param(["-c", "0"], "at least 1", id="count"),
        pytest.param(["-w", "/nonexistent/x"], "No such file", id="file"),
    ],
)
async def test_a_wrong_wish_ends_with_2(control: Control, argv: list[str], words: str) -> None:
    done = await pyvpnkit(control, "capture", *argv)
    assert (done.status, words in done.err) == (2, True), done.err
    assert "captured" not in done.err


async def test_a_full_disk_is_said_and_ends_with_1(control: Control) -> None:
    done = await pyvpnkit(control, "capture", "-w", "/dev/full")  # the section header is there at once
    assert done.status == 1
    assert "/dev/full: No space left on device" in done.err and ", 0 lost" in done.err


def test_blocks_come_whole_however_the_stream_is_cut() -> None:
    from netstack.observe import pcap

    stream = bytearray(pcap.section_header() + pcap.interface("x", 65535))
    for number in range(5):
        pcap.put_packet(stream, 0, pcap.INBOUND, 1, bytes(60 + number), 60 + number, 7 if number == 2 else 0)
    stream += pcap.statistics(0, 1, received=20, accepted=20, lost=9)
    for size in (1, 3, 64, len(stream)):
        blocks = Blocks()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        whole = [block for piece in pieces for block in blocks.feed(bytes(piece))]
        assert b"".join(whole) == stream
        assert (blocks.packets, blocks.lost) == (5, 9)


# Top.


async def test_top_shows_octets_per_second(control: Control, guest: StreamGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connection = await asyncio.to_thread(guest.connect, HOST, port)
        assert connection is not None
        accepted, _ = server.accept()
        with accepted:
            running = asyncio.create_task(pyvpnkit(control, "top", "--once", "--interval", "0.5"))
            while not running.done():
                await asyncio.to_thread(connection.send, packets.ACK, bytes(1000))
                await asyncio.to_thread(accepted.recv, 1000)
    lines = running.result().out.splitlines()
    assert lines[0].split()[:2] == ["PROTO", "GUEST"]
    (line,) = (line for line in lines if f":{port} " in line)
    rate = line.split()[5]
    assert rate.endswith(("K", "M")) and float(rate[:-1]) > 1


def test_rates_are_of_the_time_between_two_looks() -> None:
    rates = Rates()

    def flow(name: str, outbound: int, inbound: int, age_s: float) -> dict[str, object]:
        return {"id": name, "octets_outbound": outbound, "octets_inbound": inbound, "age_s": age_s}

    (first,) = rates.update([flow("a", 1000, 0, 10.0)], 100.0)
    assert first.outbound == 100
    found = rates.update([flow("a", 1500, 2000, 12.0), flow("b", 0, 9000, 1.0)], 102.0)
    assert [(one.flow["id"], one.outbound, one.inbound) for one in found] == [("b", 0, 9000), ("a", 250, 1000)]


@pytest.mark.parametrize("how", ["q", "\x03"], ids=["q", "Ctrl-C"])
async def test_top_is_live_on_a_terminal_and_ends_with_a_key(control: Control, guest: StreamGuest, how: str) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm", COLUMNS="120", LINES="30")
        os.execv(
            sys.executable, [sys.executable, "-m", "pyvpnkit", "top", "--control", control.path, "--interval", "0.1"]
        )

    def watch() -> str:
        seen, pressed, limit = "", False, time.monotonic() + 60
        while time.monotonic() < limit:
            if not select.select([fd], [], [], 1)[0]:
                continue
            try:
                seen += os.read(fd, 65536).decode(errors="replace")
            except OSError:
                break
            if seen.count("q ends") >= 2 and not pressed:
                pressed = True
                os.write(fd, how.encode())
        return seen

    seen = await asyncio.to_thread(watch)
    os.close(fd)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    assert "PROTO" in seen and "/s out" in seen
    assert seen.endswith("\x1b[?25h") or "\x1b[?1049l" in seen, "the terminal is as it was"
    assert "Traceback" not in seen
