"""Gbit/s through VPNKit's multiplexer over a unix socket between two processes, and how evenly channels share it.

    python -m benchmarks.mux                        one channel each way, then 500 at once
    python -m benchmarks.mux --channels 1 --loop asyncio --seconds 5

    client --TCP--> host process (Plane) --unix socket, one connection--> VM process (Accepted) --TCP--> server

Four processes, as where the VM is one; so client and server have their own CPU time, and on two cores share them with what is
measured. One JSON line per case, the medians of its runs; `fairness` is the largest count of octets of a channel by the
smallest, when the first one ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from portfwd.carriers import Destination
from portfwd.mux.accept import Accepted
from portfwd.mux.channel import Channel
from portfwd.mux.engine import Limits
from portfwd.mux.plane import Plane
from portfwd.mux.splice import reset, splice
from portfwd.mux.where import Where

BLOCK = 1 << 18


def load(socks: Sequence[socket.socket], sending: bool, seconds: float) -> dict[str, float]:
    """Send on all for so long, or receive until all have ended; what was received."""
    selector = selectors.DefaultSelector()
    counts = dict.fromkeys(socks, 0)
    block, room = bytes(BLOCK), memoryview(bytearray(BLOCK))
    for sock in socks:
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_WRITE if sending else selectors.EVENT_READ)
    begin = time.monotonic()
    fairness = 0.0
    while selector.get_map() and (not sending or time.monotonic() < begin + seconds):
        for key, _ in selector.select(0.1):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            try:
                octets = sock.send(block) if sending else sock.recv_into(room)
            except BlockingIOError:
                continue
            if not octets:
                fairness = fairness or max(counts.values()) / max(1, min(counts.values()))
                selector.unregister(sock)
            elif not any(counts.values()):
                begin = time.monotonic()
            counts[sock] += octets
    elapsed = time.monotonic() - begin
    for sock in socks:
        sock.close()
    return {"gbit_s": sum(counts.values()) * 8 / elapsed / 1e9, "fairness": fairness}


def client(port: int, channels: int, sending: bool, seconds: float) -> dict[str, float]:
    return load([socket.create_connection(("127.0.0.1", port)) for _ in range(channels)], sending, seconds)


def server(channels: int, sending: bool, seconds: float) -> dict[str, float]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        return load([listener.accept()[0] for _ in range(channels)], sending, seconds)


async def vm(path: str, limits: Limits) -> None:
    """The forwarder's side."""
    loop = asyncio.get_running_loop()
    connections = []

    def opened(destination: Destination, channel: Channel) -> None:
        sock = socket.socket()
        try:
            sock.connect((socket.inet_ntoa(destination.address), destination.port))
        except OSError:
            reset(sock)
            channel.close()
        else:
            splice(channel, sock)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        print("ready", flush=True)
        while True:
            connections.append(Accepted((await loop.sock_accept(listener))[0], opened, limits=limits))


async def host(path: str, target: int, limits: Limits) -> None:
    plane = Plane(Where.parse(f"unix:{path}"), limits=limits)
    loop = asyncio.get_running_loop()
    plane.start(loop)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        print(listener.getsockname()[1], flush=True)
        while True:
            sock, _ = await loop.sock_accept(listener)
            plane.stream(Destination("tcp", socket.inet_aton("127.0.0.1"), target), sock)


def run(channels: int, up: bool, seconds: float, options: Sequence[str]) -> dict[str, float]:
    """One run: starts the four and returns what the receiver counted."""
    parts: list[subprocess.Popen[str]] = []

    def part(name: str, *arguments: str) -> str:
        command = [sys.executable, "-m", "benchmarks.mux", *options, "--channels", str(channels), "--part", name]
        command += ["--seconds", str(seconds), "--arguments", *arguments]
        parts.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        out = parts[-1].stdout
        assert out is not None
        return out.readline().strip() if name != "client" else out.read()

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/forwarder.sock"
        try:
            port = part("server", "receive" if up else "send")
            part("vm", path)
            entry = part("host", path, port)
            of_client = part("client", entry, "send" if up else "receive")
            of_server = parts[0].stdout
            assert of_server is not None
            result: dict[str, float] = json.loads(of_server.read() if up else of_client)
            return result
        finally:
            for process in parts:
                process.terminate()
            for process in parts:
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()


def play(options: argparse.Namespace) -> None:
    """One of the four processes."""
    arguments = options.arguments
    limits = Limits(window=options.window)
    work: dict[str, Callable[[], Any]] = {
        "client": lambda: client(int(arguments[0]), options.channels[0], arguments[1] == "send", options.seconds),
        "server": lambda: server(options.channels[0], arguments[0] == "send", options.seconds),
        "vm": lambda: in_loop(options.loop, vm(arguments[0], limits)),
        "host": lambda: in_loop(options.loop, host(arguments[0], int(arguments[1]), limits)),
    }
    print(json.dumps(work[options.part]()), flush=True)


def in_loop(kind: str, work: Any) -> None:
    factory = asyncio.new_event_loop
    if kind == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mux", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 500])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--window", type=int, default=Limits().window, help="largest window of a channel, octets")
    parser.add_argument("--part", choices=["client", "server", "vm", "host"], help=argparse.SUPPRESS)
    parser.add_argument("--arguments", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        play(options)
        return 0
    shared = ["--loop", options.loop, "--window", str(options.window)]
    for channels in options.channels:
        for up in (True, False):
            runs = [run(channels, up, options.seconds, shared) for _ in range(options.runs)]
            name = f"mux-{channels}-{'up' if up else 'down'}"
            medians = {key: round(median(one[key] for one in runs), 2) for key in runs[0]}
            print(json.dumps({"name": name, **medians, "runs": len(runs)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
