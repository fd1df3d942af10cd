"""Unix sockets of the machine, served to its host by vsock: LinuxKit's vsudd (spec companions 3.3).

    vsudd -inport 2376:unix:/var/run/docker.sock

Each connection to the port is one to the socket: plain octets, half-close both ways. The socket is dialled only then, so it may
come later than this program; while it is missing, callers are closed.
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple, NoReturn

ANY_CID = 0xFFFFFFFF  # vsock(7): VMADDR_CID_ANY
MAX_PORT = 0xFFFFFFFE
BACKLOG = 128
LIMIT = 256
"""Connections at once; more are closed as they come."""
CHUNK = 65536
REST_S = 0.1
"""When there is no descriptor or thread left."""
SAY_EVERY_S = 10.0

_HYPERV = re.compile(r"([0-9a-f]{8})-facb-11e6-bd58-64006a7986d3", re.IGNORECASE)
"""Hyper-V's name of a vsock port (spec companions 1.1)."""


class Inport(NamedTuple):
    """What to listen at (a vsock port, or the path of a Unix socket), and the path that it leads to."""

    at: int | str
    path: str


def inport(text: str) -> Inport:
    """`PORT:unix:PATH`. Raises `ValueError` that says what would be accepted."""
    at, _, path = text.removeprefix("unix:").partition(":unix:")
    if not at or not path:
        raise ValueError(f"-inport {text!r}: write PORT:unix:PATH, such as 2376:unix:/var/run/docker.sock")
    if found := _HYPERV.fullmatch(at):
        return Inport(int(found[1], 16), path)
    if "/" in at:
        return Inport(at, path)
    if not at.isascii() or not at.isdigit() or int(at) > MAX_PORT:
        raise ValueError(f"-inport {text!r}: {at!r} is no vsock port, which is a number up to {MAX_PORT}")
    return Inport(int(at), path)


def listener(at: int | str) -> socket.socket:
    """Raises `OSError`."""
    if isinstance(at, int):
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        sock.bind((ANY_CID, at))
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(at)
        os.chmod(at, 0o600)  # nobody can connect before it listens
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


class Vsudd:
    """Serves some inports, with two threads for each connection."""

    def __init__(self, inports: list[Inport], limit: int = LIMIT) -> None:
        self.accepted = 0
        self.over_limit = 0
        self.no_target = 0
        """Connections whose Unix socket was not there, or refused."""
        self._room = threading.BoundedSemaphore(limit)
        self._said = float("-inf")
        self._paths: list[str] = []
        self._selector = selectors.DefaultSelector()
        for one in inports:
            try:
                made = listener(one.at)
            except OSError as error:
                self.close()
                raise OSError(f"{one.at}: {error.strerror or error}") from None
            self._selector.register(made, selectors.EVENT_READ, one.path)
            if isinstance(one.at, str):
                self._paths.append(one.at)

    def wake_on_signals(self) -> None:
        """For the main thread: a signal that comes just before `select` would else not be handled until the next caller."""
        woken, wakes = socket.socketpair()
        for sock in (woken, wakes):
            sock.setblocking(False)
        signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ)

    def run(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.data is None:
                    key.fileobj.recv(CHUNK)  # the signal's handler runs by itself
                    continue
                try:
                    peer, _ = key.fileobj.accept()
                    peer.setblocking(True)
                    self._take(peer, key.data)
                except BlockingIOError:
                    pass  # the caller has gone again
                except (OSError, RuntimeError) as error:  # no descriptor, no thread: callers wait in the queue
                    self._say(f"a connection is not served: {error}")
                    time.sleep(REST_S)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        for path in self._paths:
            try:
                os.unlink(path)
            except OSError:
                pass  # somebody else removed it

    def _take(self, peer: socket.socket, path: str) -> None:
        if not self._room.acquire(blocking=False):
            self.over_limit += 1
            peer.close()
            self._say("too many connections; some are closed")
            return
        self.accepted += 1
        try:
            threading.Thread(target=self._serve, args=(peer, path), daemon=True).start()
        except RuntimeError:
            peer.close()
            self._room.release()
            raise

    def _serve(self, peer: socket.socket, path: str) -> None:
        try:
            with peer, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as target:
                try:
                    target.connect(path)
                except OSError as error:
                    self.no_target += 1
                    self._say(f"{path}: {error.strerror or error}")
                    return
                back = threading.Thread(target=_one_way, args=(target, peer), daemon=True)
                back.start()
                _one_way(peer, target)
                back.join()
        except (OSError, RuntimeError) as error:
            self._say(f"a connection is not served: {error}")
        finally:
            self._room.release()

    def _say(self, text: str) -> None:
        """To the log, but not for each of very many callers."""
        if time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            print(f"vsudd: {text}", file=sys.stderr, flush=True)


def _one_way(source: socket.socket, sink: socket.socket) -> None:
    """Until `source` ends, which `sink` is told. A sink that takes no more ends this way only, a source that fails both."""
    try:
        while octets := source.recv(CHUNK):
            try:
                sink.sendall(octets)
            except OSError:
                _shut(source, socket.SHUT_RD)
                return
        _shut(sink, socket.SHUT_WR)
    except OSError:
        _shut(source, socket.SHUT_RDWR)
        _shut(sink, socket.SHUT_RDWR)


def _shut(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass  # it is gone already


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 2 for a wrong command line, 1 when it cannot listen."""
    parser = argparse.ArgumentParser(
        "vsudd", description="Serve Unix sockets of this machine by vsock.", allow_abbrev=False
    )
    parser.add_argument(
        "-inport", "--inport", action="append", metavar="PORT:unix:PATH", required=True, help="repeatable"
    )
    parser.add_argument("-pidfile", "--pidfile", metavar="PATH", help="where to write the process id")
    parser.add_argument("-detach", "--detach", action="store_true", help="not offered")
    parser.add_argument("-syslog", "--syslog", action="store_true", help="not offered")
    given = parser.parse_args(argv)
    if given.detach:
        parser.error("-detach is not offered: start this program as a service, or with & behind it")
    if given.syslog:
        parser.error("-syslog is not offered: messages go to standard error, for the service's log")
    try:
        inports = [inport(text) for text in given.inport]
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        serving = Vsudd(inports)
    except OSError as error:
        print(f"vsudd: cannot listen at {error}", file=sys.stderr)
        return 1
    try:
        if given.pidfile:
            with open(given.pidfile, "w") as file:
                file.write(f"{os.getpid()}\n")
        print(f"vsudd: serving {', '.join(f'{one.at} by {one.path}' for one in inports)}", file=sys.stderr, flush=True)
        serving.wake_on_signals()
        serving.run()
    finally:
        serving.close()
        if given.pidfile and os.path.exists(given.pidfile):
            os.unlink(given.pidfile)


if __name__ == "__main__":
    sys.exit(main())
