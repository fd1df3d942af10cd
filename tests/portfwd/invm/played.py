"""Both ends of the in-VM tools, played: a host with VPNKit's HTTP API, and a parent such as dockerd."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

LIMIT_S = 60.0
"""For whatever a test waits for; far more than it takes on a busy machine."""


class PlayedHost(socketserver.ThreadingUnixStreamServer):
    """VPNKit's control server on a unix socket, as the Go programs expect it; it listens to nothing else."""

    daemon_threads = True
    block_on_close = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.ports: list[dict[str, Any]] = []
        self.hold = threading.Event()
        """Answers are given while it is set."""
        self.hold.set()
        super().__init__(str(path), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def asked(self, count: int) -> list[tuple[str, str, Any]]:
        """The first `count` requests, once there are so many."""
        until(lambda: len(self.requests) >= count)
        return self.requests[:count]

    def stop(self) -> None:
        self.hold.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: PlayedHost
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        document = json.loads(body) if body else None
        host = self.server
        host.headers.append({name.lower(): value for name, value in self.headers.items()})
        host.requests.append((self.command, self.path, document))
        host.hold.wait()
        answer = host.answers.get((self.command, self.path))
        if answer is None:
            answer = 200, b""
            if "/expose/" in self.path:
                host.ports.append({**document, "out_port": document.get("out_port") or 40404})
            elif "/unexpose/" in self.path:
                host.ports = [port for port in host.ports if port != document]
            elif self.path == "/forwards/list":
                answer = 200, json.dumps(host.ports or None).encode()
        status, content = answer
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # who asked is gone

    do_GET = do_PUT = do_POST = do_DELETE = _serve


def until(true: Callable[[], object]) -> None:
    """Wait, in a test without a loop, until `true()` is."""
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@dataclass
class Tool:
    """One of the programs as a process, with a pipe as its descriptor 3 as dockerd gives it one."""

    process: subprocess.Popen[bytes]
    told: int
    """The parent's end of that pipe; -1 for none."""
    _said: bytes = field(default=b"")

    @classmethod
    def start(
        cls,
        module: str,
        *arguments: str | Path,
        cwd: Path,
        parent: bool = False,
        listening: socket.socket | None = None,
        within: Sequence[str] = (),
    ) -> Tool:
        """`listening` becomes descriptor 4; `within` is a command that runs another one, in a namespace say."""
        told = given = -1
        high: list[int] = []
        if parent:
            told, given = os.pipe()
            high.append(fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, 20))
            os.close(given)
        if listening is not None:
            high.append(fcntl.fcntl(listening.fileno(), fcntl.F_DUPFD_CLOEXEC, 20))
        wanted = list(zip(high, [3, 4] if parent else [4], strict=False))

        def move() -> None:
            for source, target in wanted:
                os.dup2(source, target, inheritable=True)

        try:
            process = subprocess.Popen(
                [*within, sys.executable, "-m", f"portfwd.invm.{module}", *map(str, arguments)],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[target for _, target in wanted],
                preexec_fn=move,
            )
        finally:
            for descriptor in high:
                os.close(descriptor)
        return cls(process, told)

    def heard(self) -> bytes:
        """All that is written to descriptor 3, up to its end."""
        octets = b""
        end = time.monotonic() + LIMIT_S
        while True:
            ready, _, _ = select.select([self.told], [], [], max(0, end - time.monotonic()))
            assert ready, f"descriptor 3 stays silent after {octets!r}"
            more = os.read(self.told, 4096)
            if not more:
                return octets
            octets += more

    def stderr_until(self, words: str) -> str:
        """What was said on standard error so far, once `words` are in it."""
        assert self.process.stderr is not None
        descriptor = self.process.stderr.fileno()
        end = time.monotonic() + LIMIT_S
        while words.encode() not in self._said:
            ready, _, _ = select.select([descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, f"{words!r} is not said in {self._said.decode()}"
            more = os.read(descriptor, 65536)
            assert more, f"{words!r} is not said in {self._said.decode()}"
            self._said += more
        return self._said.decode()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; exit status, standard output, standard error."""
        self.process.send_signal(number)
        return self.result()

    def result(self) -> tuple[int, str, str]:
        """Exit status, standard output, standard error, once it has ended."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        self._said += err
        return self.process.returncode, out.decode(), self._said.decode()

    def clean(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        if self.told >= 0:
            os.close(self.told)
            self.told = -1
