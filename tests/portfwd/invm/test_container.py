"""The whole way of a published port: a container only the VM reaches, its `expose-port`, the forwarder, the host, a client.

The VM is a network namespace: nothing of it can be reached from here but by unix sockets.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portfwd.carriers import Carriers
from portfwd.mux.plane import Plane
from portfwd.mux.where import Where
from portfwd.registry import Registry
from tests.portfwd.invm.played import LIMIT_S, Tool
from tests.portfwd.invm.test_doors import http_door, ninep_door, until
from tests.portfwd.invm.test_local_bind import free_port

pytestmark = pytest.mark.netns

Start = Callable[..., Tool]

VM = """
import os, socket, subprocess, sys, threading
subprocess.run("ip link set lo up && ip address add 172.17.0.2/32 dev lo", shell=True, check=True)
tcp = socket.create_server(("172.17.0.2", 80))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("172.17.0.2", 80))
def datagrams():
    while True:
        octets, peer = udp.recvfrom(65535)
        udp.sendto(b"container: " + octets, peer)
def connection(client):
    with client:
        octets = b""
        while more := client.recv(65536):
            octets += more
        client.sendall(b"container: " + octets)
def connections():
    while True:
        threading.Thread(target=connection, args=(tcp.accept()[0],), daemon=True).start()
for run in (datagrams, connections):
    threading.Thread(target=run, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def vm() -> Iterator[list[str]]:
    """A namespace with a container's servers in it; what is yielded runs a command there."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("expected: network namespaces need Linux and root")
    made = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"expected: namespaces may not be made here: {made.stderr.strip()}")
    command = ["unshare", "--net", sys.executable, "-c", VM]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        process.communicate("")


class NoStack:
    """The host's own TCP into guests, which is not what is tested."""

    def dial(self, *_: Any, **__: Any) -> None:
        raise AssertionError

    def datagrams(self, *_: Any, **__: Any) -> Any:
        raise AssertionError


@pytest.fixture(params=["unix-1", "unix-2", "unix-3", "listen-2", "listen-3"])
async def registry(
    request: pytest.FixtureRequest, start: Start, vm: list[str], tmp_path: Path
) -> AsyncIterator[Registry]:
    """The host's, whose ports lead into the VM by a forwarder that runs there."""
    kind, _, generation = request.param.partition("-")
    path = tmp_path / "data.sock"
    way = "-data-listen" if kind == "unix" else "-data-connect"
    tool = start("forwarder", way, path, *(["-generation", generation] if kind == "listen" else []), within=vm)
    if kind == "unix":
        await asyncio.to_thread(tool.stderr_until, "data connections are accepted")
    plane = Plane(Where(kind=kind, path=str(path), generation=int(generation)))
    plane.start(asyncio.get_running_loop())
    made = Registry(carriers=Carriers(lambda: bytes(4), plane=plane))
    made.start(NoStack(), asyncio.get_running_loop())
    yield made
    made.close()
    await plane.close()


@pytest.fixture(params=[http_door, ninep_door], ids=["http", "9p"])
async def door(request: pytest.FixtureRequest, registry: Registry, tmp_path: Path) -> AsyncIterator[str]:
    make: Any = request.param
    async with make(registry, tmp_path / "door.sock", via="forwarder") as where:
        yield where


def flags(proto: str, port: int = 0) -> list[str]:
    """As dockerd gives them, in the VM."""
    return [
        *("-proto", proto, "-host-ip", "127.0.0.1", "-host-port", str(port)),
        *("-container-ip", "172.17.0.2", "-container-port", "80"),
    ]


async def test_a_client_of_the_host_reaches_the_container_until_the_proxy_ends(
    start: Start, vm: list[str], registry: Registry, door: str
) -> None:
    tool = start("expose_port", *flags("tcp"), "-control", door, parent=True, within=vm)
    assert await asyncio.to_thread(tool.heard) == b"0\n"
    (forward,) = registry
    port = forward.spec.port
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        big = os.urandom(1 << 20)
        writer.write(big)
        writer.write_eof()
        assert await reader.read() == b"container: " + big
        writer.close()
        await writer.wait_closed()
    # On the 9P way even a proxy that is killed un-publishes.
    number = signal.SIGKILL if door.startswith("9p:") else signal.SIGTERM
    await asyncio.to_thread(tool.end, number)
    await until(lambda: not len(registry))
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_datagrams_reach_the_container_and_come_back(
    start: Start, vm: list[str], registry: Registry, door: str
) -> None:
    tool = start("expose_port", *flags("udp"), "-control", door, parent=True, within=vm)
    assert await asyncio.to_thread(tool.heard) == b"0\n"
    (forward,) = registry
    loop = asyncio.get_running_loop()
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
    for number, client in enumerate(clients):
        client.setblocking(False)
        client.connect(("127.0.0.1", forward.spec.port))
        client.send(b"%d" % number)
    async with asyncio.timeout(LIMIT_S):
        for number, client in enumerate(clients):
            assert await loop.sock_recv(client, 100) == b"container: %d" % number
            client.close()
    assert (await asyncio.to_thread(tool.end))[0] == 0


async def test_programs_in_the_vm_reach_the_container_at_the_hosts_port(
    start: Start, vm: list[str], registry: Registry, door: str
) -> None:
    port = free_port()  # of the host; in the VM it is as free
    tool = start("expose_port", *flags("tcp", port), "-control", door, parent=True, within=vm)
    assert await asyncio.to_thread(tool.heard) == b"0\n"
    code = (
        f"import socket; s = socket.create_connection(('127.0.0.1', {port}), 60); s.sendall(b'me'); "
        "s.shutdown(socket.SHUT_WR); print(s.recv(100), s.recv(100))"
    )
    run = subprocess.run
    done = await asyncio.to_thread(run, [*vm, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "b'container: me' b''\n"
    assert (await asyncio.to_thread(tool.end))[0] == 0
