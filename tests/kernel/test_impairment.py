"""A link that loses, repeats, reorders and falsifies frames (F23): every stream arrives whole, none hangs."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import socket

import pytest

from tests.support.netns import HOST, Namespace, World
from tests.support.webhost import content, exactly, read_all, serve

pytestmark = [pytest.mark.netns, pytest.mark.slow]

TCP_CONGESTION = 13
FLOWS = 8


def _connect(guest: Namespace, port: int) -> socket.socket:
    """With a congestion control that minds loss; BBR would hide it."""
    sock = guest.socket(limit_s=45)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, b"cubic")
    sock.connect((HOST, port))
    return sock


def _both_ways(guest: Namespace, port: int, octets: int, number: int) -> str:
    """Sends `octets` and its end, then reads what the host sends; the sum of that."""
    with _connect(guest, port) as sock:
        sock.sendall(octets.to_bytes(4, "big") + content(octets + FLOWS)[number : number + octets])
        sock.shutdown(socket.SHUT_WR)
        return hashlib.sha256(read_all(sock)).hexdigest()


def _serve(connection: socket.socket) -> None:
    """Reads a stream to its end, then sends it back."""
    octets = int.from_bytes(exactly(connection, 4), "big")
    data = read_all(connection)
    assert len(data) == octets
    connection.sendall(data)


@pytest.mark.parametrize("scheme", ["qemu", "unixgram"])
@pytest.mark.parametrize(("percent", "octets"), [(1, 1 << 20), (5, 256 << 10)])
def test_streams_are_whole(fresh: World, scheme: str, percent: int, octets: int) -> None:
    """Loss, repetition, disorder and one wrong bit, each with the probability; both ways, eight flows at once."""
    link = f"{scheme}:{fresh.socket_path()}"
    guest = fresh.namespace()
    daemon = fresh.daemon("--link", link)
    faults = [word for name in ("loss", "dup", "reorder", "corrupt") for word in (f"--{name}", str(percent / 100))]
    relay = fresh.relay(guest, link, *faults, "--seed", str(percent))
    assert guest.udhcpc() == "192.168.65.3"
    with serve(fresh.host.listen(), _serve) as (_, port), concurrent.futures.ThreadPoolExecutor(FLOWS) as pool:
        sums = list(pool.map(lambda number: _both_ways(guest, port, octets, number), range(FLOWS)))
    whole = content(octets + FLOWS)
    assert sums == [hashlib.sha256(whole[n : n + octets]).hexdigest() for n in range(FLOWS)]
    counted = json.loads(relay.stop())
    for direction in ("to_host", "to_guest"):
        lost = counted[direction]["lost"] / counted[direction]["frames"]
        assert percent / 200 < lost < percent / 50, counted
        assert all(counted[direction].values()), counted
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_nothing_comes_through_for_a_while(fresh: World) -> None:
    """One in five lost: resolvers, pings and a connection still get there by trying again."""
    link = f"qemu:{fresh.socket_path()}"
    guest = fresh.namespace()
    fresh.daemon("--link", link)
    fresh.relay(guest, link, "--loss", "0.2", "--dup", "0.2", "--reorder", "0.2", "--corrupt", "0.01")
    assert guest.udhcpc() == "192.168.65.3"
    said = guest.run("dig", "+short", "+tries=8", "+time=1", "host.internal").stdout
    assert HOST in said.split()
    with serve(fresh.host.listen(), _serve) as (_, port):
        data = content(20_000)
        assert _both_ways(guest, port, 20_000 - FLOWS, 0) == hashlib.sha256(data[: 20_000 - FLOWS]).hexdigest()
