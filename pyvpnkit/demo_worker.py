"""What the demo's two ends do, one in the guest and one on the host: plain blocking Python, told what by JSON over a channel.

A worker is a forked process that answers one command after the other until the channel ends. What serves others (`serve`,
`sink`, `source`) runs in threads of it. A command that fails answers with the error's text.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import Any, Final

from netstack.wire import checksum

LIMIT_S: Final = 3.0
"""How long a command waits for an answer."""
CHUNK: Final = 1 << 20
"""Octets per system call when throughput is measured."""
MAX_MESSAGE: Final = 1 << 16

_ECHO: Final = 8
_ECHO_REPLY: Final = 0
_DNS_PORT: Final = 53


def work(channel: socket.socket) -> int:
    """Answer commands `{"do": name, ...}` until the other end closes; returns the exit status 0."""
    commands = _Commands()
    while message := channel.recv(MAX_MESSAGE):
        arguments = json.loads(message)
        try:
            answer = {"answer": getattr(commands, arguments.pop("do"))(**arguments)}
        except Exception as error:  # told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.send(json.dumps(answer).encode())
    commands.close()
    return 0


class _Commands:
    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._transferred: tuple[int, float] | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._held: socket.socket | None = None

    def close(self) -> None:
        """End every program that was started."""
        for child in self._children:
            child.kill()
            child.wait()

    def resolve(self, name: str) -> list[str]:
        """Addresses as any program here gets them."""
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        return sorted({str(entry[4][0]) for entry in found})

    def ask(self, name: str, server: str) -> list[str]:
        """A addresses as the DNS server gives them, so not out of this end's own /etc/hosts."""
        from dnslib import QTYPE, DNSRecord

        record = DNSRecord.parse(DNSRecord.question(name).send(server, _DNS_PORT, timeout=LIMIT_S))
        return sorted(str(answer.rdata) for answer in record.rr if answer.rtype == QTYPE.A)

    def ping(self, address: str, count: int) -> float:
        """Milliseconds of the fastest of `count` echoes."""
        identifier = os.getpid() & 0xFFFF
        times = []
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.connect((address, 0))
            for sequence in range(count):
                echo = struct.pack("!BBHHH", _ECHO, 0, 0, identifier, sequence) + bytes(56)
                filled = echo[:2] + struct.pack("!H", 0xFFFF ^ checksum.fold(checksum.partial(echo))) + echo[4:]
                began = time.perf_counter()
                sock.send(filled)
                while True:
                    if not select.select([sock], [], [], LIMIT_S)[0]:
                        raise TimeoutError(f"{address} does not answer")
                    kind, _code, _sum, *which = struct.unpack_from("!BBHHH", sock.recv(2048), 20)
                    if kind == _ECHO_REPLY and which == [identifier, sequence]:
                        break
                times.append(time.perf_counter() - began)
        return min(times) * 1000

    def serve(self, text: str, address: str, port: int) -> int:
        """Start a web server whose one page is `text`; returns its port."""

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer((address, port), Page)
        self._start(server.serve_forever)
        return int(server.server_address[1])

    def ip(self, commands: list[str]) -> None:
        """Commands of ip(8)."""
        from pyvpnkit.guest import run_ip

        run_ip(*commands)

    def zone(self, address: str, port: int, names: dict[str, str]) -> None:
        """A name server that knows these names (IPv4 addresses) and says of all others that they do not exist."""
        from dnslib import QTYPE, RCODE, RR, A, DNSRecord

        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, port))

        def run() -> None:
            while True:
                message, asker = sock.recvfrom(4096)
                query = DNSRecord.parse(message)
                answer = query.reply()
                found = names.get(str(query.q.qname).rstrip(".").lower())
                if found is None:
                    answer.header.rcode = RCODE.NXDOMAIN
                elif query.q.qtype == QTYPE.A:
                    answer.add_answer(RR(query.q.qname, QTYPE.A, ttl=60, rdata=A(found)))
                sock.sendto(answer.pack(), asker)

        self._start(run)

    def http_proxy(self, address: str, port: int) -> None:
        """A proxy for GET, which says in the page that it was there."""

        class Proxy(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                place = urllib.parse.urlsplit(self.path)
                connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=LIMIT_S)
                try:
                    connection.request("GET", place.path or "/")
                    page = connection.getresponse().read() + b" (by way of the office's proxy)"
                finally:
                    connection.close()
                self.send_response(200)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._start(http.server.ThreadingHTTPServer((address, port), Proxy).serve_forever)

    def hold(self, host: str, port: int) -> None:
        """Open a connection that stays; `held` uses it."""
        self._held = socket.create_connection((host, port), LIMIT_S)

    def held(self) -> str:
        """What the connection that stays brings: its echo, or how it ended."""
        assert self._held is not None
        try:
            self._held.sendall(b"still there")
            return self._held.recv(100).decode() or "it was closed"
        except OSError as error:
            return type(error).__name__

    def echo(self, address: str) -> int:
        """A server that says everything again; returns its port."""
        listener = socket.create_server((address, 0))

        def serve(sock: socket.socket) -> None:
            with contextlib.suppress(OSError), sock:  # whoever spoke may be gone
                while octets := sock.recv(4096):
                    sock.sendall(octets)

        def run() -> None:
            while True:
                self._start(functools.partial(serve, listener.accept()[0]))

        self._start(run)
        return int(listener.getsockname()[1])

    def start(self, words: list[str], until: str = "") -> int:
        """Start a command of pyvpnkit in here; returns its process id when it is at work.

        That is when the socket `until` is there, or else when it said so on descriptor 3, as to dockerd.
        """
        ours, theirs = os.pipe()
        with open(ours, "rb") as told:
            # Descriptor 3 is what a program tells its parent on (spec vpnkit 7.5), and the only one it inherits.
            place = (
                f"import os, sys; os.dup2({theirs}, 3); os.closerange(4, {theirs} + 1); "
                "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
            )
            command = [sys.executable, "-c", place, "-m", "pyvpnkit", *words]
            child = subprocess.Popen(command, pass_fds=(theirs,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            os.close(theirs)
            self._children.append(child)
            if not until:
                said = told.readline() + told.read() if select.select([told], [], [], LIMIT_S)[0] else b"nothing"
                if said != b"0\n":
                    raise RuntimeError(f"{words[0]} said {said.decode(errors='replace')!r}")
        began = time.monotonic()
        while until and not os.path.exists(until):
            if child.poll() is not None or time.monotonic() > began + LIMIT_S:
                raise RuntimeError(f"{words[0]} does not work; status {child.poll()}")
            time.sleep(0.01)
        return child.pid

    def end(self, pid: int) -> int:
        """End what `start` started, as no program can prevent; its exit status."""
        child = next(child for child in self._children if child.pid == pid)
        child.kill()
        return child.wait(LIMIT_S)

    def fetch(self, host: str, port: int) -> tuple[str, float]:
        """The page of a web server, and how many milliseconds it took from the connection on."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection(host, port, timeout=LIMIT_S)  # not urllib: no proxy is wanted
        try:
            connection.request("GET", "/")
            return connection.getresponse().read().decode(), (time.perf_counter() - began) * 1000
        finally:
            connection.close()

    # Throughput. Who listens is on the host, so that both directions are opened by the guest.

    def sink(self) -> int:
        """Take one connection and read it to its end; `transferred` has the result. Returns the port."""
        return self._accept_one(_receive)

    def source(self, seconds: float) -> int:
        """Take one connection and send for so long; `transferred` has the result. Returns the port."""
        return self._accept_one(lambda sock: _send(sock, seconds))

    def _accept_one(self, transfer: Any) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(LIMIT_S)
        self._transferred = None

        def run() -> None:
            with listener:
                sock, _peer = listener.accept()
            sock.settimeout(None)
            with sock:
                self._transferred = transfer(sock)

        self._start(run)
        return int(listener.getsockname()[1])

    def transferred(self) -> tuple[int, float] | None:
        """Octets and seconds of the connection that `sink` or `source` took."""
        self._threads[-1].join(LIMIT_S)
        return self._transferred

    def send(self, host: str, port: int, seconds: float) -> tuple[int, float]:
        """Send for so long and wait until the other end has it all; octets and seconds."""
        with socket.create_connection((host, port), LIMIT_S) as sock:
            sock.settimeout(None)
            return _send(sock, seconds)

    def receive(self, host: str, port: int) -> tuple[int, float]:
        """Read to the end; octets and seconds."""
        with socket.create_connection((host, port), LIMIT_S) as sock:
            sock.settimeout(None)
            return _receive(sock)

    def _start(self, target: Any) -> None:
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        self._threads.append(thread)


def _send(sock: socket.socket, seconds: float) -> tuple[int, float]:
    for control in (b"cubic", b"reno"):
        # Where the system's default is BBR it would pace a link that cannot be congested.
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
            break
        except OSError:
            continue
    octets = 0
    chunk = memoryview(bytes(CHUNK))
    began = now = time.perf_counter()
    while now < began + seconds:
        octets += sock.send(chunk)
        now = time.perf_counter()
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)
    return octets, time.perf_counter() - began


def _receive(sock: socket.socket) -> tuple[int, float]:
    room = memoryview(bytearray(CHUNK))
    octets = 0
    began = time.perf_counter()
    while got := sock.recv_into(room):
        octets += got
    return octets, time.perf_counter() - began
