"""`/v1/capture`: what tshark makes of the stream, and what slow readers are told they missed."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvpnkit.api import streams
from tests.roof.api.conftest import Client, Control, request, until
from tests.roof.guest import BROADCAST, GATEWAY, StreamGuest
from tests.support import packets


async def capture(control: Control, target: str = "/v1/capture") -> Client:
    client = await control.connect()
    await client.send(request("GET", target))
    head = await client.head()
    assert (head.status, head.headers["content-type"]) == (200, "application/x-pcapng")
    return client


async def guest(control: Control) -> StreamGuest:
    made = await asyncio.to_thread(StreamGuest, control.link)
    await asyncio.to_thread(made.lease)
    return made


def blocks(stream: bytes) -> Iterator[tuple[int, bytes]]:
    while stream:
        kind, length = struct.unpack_from("<II", stream)
        assert length <= len(stream) and stream[length - 4 : length] == stream[4:8]
        yield kind, stream[8 : length - 4]
        stream = stream[length:]


def option(body: bytes, at: int, wanted: int) -> int | None:
    """A whole number among the options of a block."""
    while at + 4 <= len(body):
        code, length = struct.unpack_from("<HH", body, at)
        if code == wanted:
            return int.from_bytes(body[at + 4 : at + 4 + length], "little")
        at += 4 + (length + 3 & ~3)
    return None


def tshark(path: Path, *fields: str) -> list[list[str]]:
    """The fields of each packet as tshark sees them."""
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed; packages.txt names what the tests use")
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", *(word for name in fields for word in ("-e", name))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


async def read_until(client: Client, stream: bytearray, true: Any) -> None:
    async for chunk in client.chunks():
        stream += chunk
        if true():
            return


def packets_of(stream: bytes) -> int:
    return sum(kind == 6 for kind, _ in blocks(stream))


async def test_tshark_reads_what_each_reader_asked_for(control: Control, tmp_path: Path) -> None:
    everything = await capture(control)
    names = await capture(control, "/v1/capture?filter=udp%20port%2067&snaplen=64")
    made = await guest(control)
    all_of_it, dhcp = bytearray(), bytearray()
    await read_until(everything, all_of_it, lambda: packets_of(all_of_it) >= 5)
    await read_until(names, dhcp, lambda: packets_of(dhcp) == 4)
    made.close()
    path = tmp_path / "all.pcapng"
    await asyncio.to_thread(path.write_bytes, bytes(all_of_it))
    found = await asyncio.to_thread(tshark, path, "dhcp.option.dhcp", "arp.opcode")
    assert [kind for kind, _ in found if kind] == ["1", "2", "3", "5"]
    assert any(opcode for _, opcode in found)
    await asyncio.to_thread(path.write_bytes, bytes(dhcp))
    lengths = await asyncio.to_thread(tshark, path, "frame.cap_len", "frame.len")
    assert [captured for captured, _ in lengths] == ["64"] * 4
    assert all(int(whole) > 64 for _, whole in lengths)
    # Nobody reads any more: the links are not captured.
    everything.close()
    names.close()
    await until(lambda: len(control.service.stack.live) == 0)
    assert control.server.counts()["open_captures"] == 0


async def test_a_wrong_filter_says_where_and_what_is_accepted(control: Control) -> None:
    reply = await control.ask("GET", "/v1/capture?filter=port%2080%20prot%2081")
    assert reply.status == 400
    assert "character 9" in reply.message
    assert (await control.ask("GET", "/v1/capture?snaplen=1")).status == 400


async def test_a_slow_reader_loses_packets_and_is_told_how_many_and_others_lose_none(control: Control) -> None:
    control.server.streams.statistics_s = 0.1
    control.server.streams.capture_octets = 128 << 10
    made = await guest(control)
    slow, fast = await capture(control, "/v1/capture?filter=arp"), await capture(control, "/v1/capture?filter=arp")
    slow.writer.transport.pause_reading()
    slow_reader, fast_reader = control.service.stack.live._readers
    frame = packets.ether(BROADCAST, made.mac, packets.ARP, packets.arp(1, made.mac, made.address, bytes(6), GATEWAY))
    batch = (struct.pack("!I", len(frame)) + frame) * 100
    seen = bytearray()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while made._sock.recv(1 << 20):
                pass

    reading = asyncio.create_task(read_until(fast, seen, lambda: False))
    draining = asyncio.create_task(asyncio.to_thread(drain))
    for number in range(1, 101):
        await asyncio.to_thread(made._sock.sendall, batch)
        # Requests and answers, and both taken by the reader that keeps up.
        await until(lambda: fast_reader.frames >= 200 * number and not fast_reader._buffer)  # noqa: B023
    total = fast_reader.frames
    assert fast_reader.lost == 0 < slow_reader.lost
    slow.writer.transport.resume_reading()
    stream = bytearray()

    def told() -> int:
        return max((option(body, 12, 5) or 0 for kind, body in blocks(bytes(stream)) if kind == 5), default=0)

    await read_until(slow, stream, lambda: packets_of(bytes(stream)) + told() == total)
    await asyncio.to_thread(made._sock.sendall, batch)
    total += 200
    await read_until(slow, stream, lambda: packets_of(bytes(stream)) + told() == total)
    found = [body for kind, body in blocks(bytes(stream)) if kind == 6]
    in_blocks = 0
    for body in found:
        captured = struct.unpack_from("<I", body, 12)[0]
        in_blocks += option(body, 20 + (captured + 3 & ~3), 4) or 0
    assert in_blocks == told() == slow_reader.lost
    assert len(found) + told() == total
    await until(lambda: packets_of(bytes(seen)) == total)
    made._sock.shutdown(socket.SHUT_RDWR)
    await draining
    made.close()
    reading.cancel()
    slow.close()
    await until(lambda: control.server.counts()["packets_lost"] == told())


async def test_a_filter_that_lets_nothing_through_holds_no_reader_that_left(control: Control) -> None:
    client = await capture(control, "/v1/capture?filter=udp%20port%201")
    assert control.server.counts()["open_captures"] == 1
    client.close()
    await until(lambda: control.server.counts()["open_captures"] == 0)


async def test_readers_are_bounded_and_leave_room_for_others(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_CAPTURES", 2)
    kept = [await capture(control) for _ in range(2)]
    reply = await control.ask("GET", "/v1/capture")
    assert (reply.status, "end one" in reply.message) == (429, True)
    kept[0].close()
    await until(lambda: control.server.counts()["open_captures"] == 1)
    await capture(control)


async def test_the_stream_ends_in_order_with_the_server(tmp_path: Path) -> None:
    from tests.roof.api.conftest import control_server

    async with control_server(tmp_path) as control:
        client = await capture(control)
        made = await guest(control)
    stream = b"".join([chunk async for chunk in client.chunks()])
    kinds = [kind for kind, _ in blocks(stream)]
    assert kinds[0] == 0x0A0D0D0A
    assert kinds[-1] == 5
    made.close()
