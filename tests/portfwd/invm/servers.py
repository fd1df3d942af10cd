"""What the forwarder connects to: small servers in threads, on loopback or a unix socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.portfwd.invm.played import LIMIT_S


@contextmanager
def served(listener: socket.socket, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Each connection in a thread; leaves when all have ended."""
    threads: list[threading.Thread] = []

    def run(client: socket.socket) -> None:
        client.settimeout(LIMIT_S)
        with client:
            try:
                serve(client)
            except OSError:
                pass  # the client broke it off

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=run, args=(client,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def echo(client: socket.socket) -> None:
    while octets := client.recv(65536):
        client.sendall(octets)


def answer_at_the_end(client: socket.socket) -> None:
    """Half-close from the client is heard before anything is said."""
    octets = b""
    while more := client.recv(65536):
        octets += more
    client.sendall(b"got %d" % len(octets))


def end_first(client: socket.socket) -> None:
    """Half-close from the server: it says its piece, and listens on."""
    client.sendall(b"bye")
    client.shutdown(socket.SHUT_WR)
    octets = b""
    while more := client.recv(65536):
        octets += more
    heard.append(octets)


heard: list[bytes] = []
"""By `end_first`."""


@contextmanager
def udp_echo(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Answers each datagram with itself, up to the longest; yields its port."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, port))

    def run() -> None:
        while True:
            octets, peer = sock.recvfrom(65535)
            if octets == b"stop":
                return
            sock.sendto(octets, peer)

    thread = threading.Thread(target=run)
    thread.start()
    number = sock.getsockname()[1]
    try:
        yield number
    finally:
        with socket.socket(sock.family, socket.SOCK_DGRAM) as last:
            last.sendto(b"stop", (address, number))
        thread.join()
        sock.close()
