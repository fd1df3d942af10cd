"""What stands on the host (or in a guest) for others to talk to: a web server with sums, and servers of one function."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.netns import Namespace, inside

MB = 1 << 20


@functools.lru_cache(maxsize=4)
def content(octets: int) -> bytes:
    """The same octets whoever asks, and no two places in them alike."""
    return random.Random(octets).randbytes(octets)


@functools.lru_cache
def digest(octets: int) -> str:
    return hashlib.sha256(content(octets)).hexdigest()


@functools.lru_cache(maxsize=4)
def text(octets: int) -> bytes:
    """As `content`, of hexadecimal digits only, for clients that take what they post for a text; `octets` is even."""
    return content(octets // 2).hex().encode()


class _Handler(BaseHTTPRequestHandler):
    """`GET /N`: N octets of `content`; `GET /text/N`: of `text`. `POST`: the sha256 of what came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        *words, octets = self.path.strip("/").split("/")
        self._answer((text if words else content)(int(octets or "0")))

    def do_POST(self) -> None:
        rest, total = int(self.headers["Content-Length"]), hashlib.sha256()
        while rest:
            octets = self.rfile.read(min(rest, MB))
            if not octets:
                return
            rest -= len(octets)
            total.update(octets)
        self._answer(total.hexdigest().encode())

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away; what matters is what the client saw


@contextlib.contextmanager
def web(place: Namespace, address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A web server in `place`; its port."""
    with inside(place.path):
        server: socketserver.BaseServer = _Server((address, port), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serve(listener: socket.socket, handle: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """Each connection to `listener` gets a thread that runs `handle`; the address of the listener."""
    accepted: list[socket.socket] = []

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            handle(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(60)
            accepted.append(connection)
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    listener.settimeout(None)
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in accepted:
            connection.close()


def read_all(sock: socket.socket) -> bytes:
    """Until the other side has finished."""
    parts = []
    while octets := sock.recv(MB):
        parts.append(octets)
    return b"".join(parts)


def exactly(sock: socket.socket, octets: int) -> bytes:
    parts, rest = [], octets
    while rest:
        some = sock.recv(min(rest, MB))
        if not some:
            raise EOFError(f"{rest} of {octets} octets missing")
        parts.append(some)
        rest -= len(some)
    return b"".join(parts)


def echo(connection: socket.socket) -> None:
    while octets := connection.recv(MB):
        connection.sendall(octets)
