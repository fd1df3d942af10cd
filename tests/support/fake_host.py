"""The outside world played by a script: a `HostIO` whose sockets have a far end that the test holds, in virtual time.

What a `FakeSocket` does is what Linux does, as far as the stack can see it:

- `connect_ex` says EINPROGRESS, or a local error at once; a second call tells the outcome (`EALREADY` while it is open);
  a unix socket (its outcome is found by `(path, 1)`) is connected at once or not at all, and after EAGAIN may try again;
- events are edge-triggered as EPOLLET: one report after each arrival, with the whole level mask; room to write is reported
  only after a send fell short; a socket that is ready when it is watched is reported once;
- SO_PEEK_OFF (42): each `MSG_PEEK` read moves the offset on, each read without it (also with `MSG_TRUNC`) back;
- octets that arrived before a reset may still be read, then comes ECONNRESET once; EPIPE for sends afterwards;
- `close` with octets unread, or with SO_LINGER 1,0, is a reset for the far end.

Any call can be made to fail: `fail(call, nth, errno)`, or `fail_at(index, errno)` over all calls together (F19).
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.support.clock import VirtualClock

READ, WRITE, ERROR, HANGUP, READ_CLOSED = 1, 4, 8, 16, 0x2000
SO_PEEK_OFF = 42
SENT_BUFFER = 256 << 10
RECEIVE_BUFFER = 4 << 20
_fds = itertools.count(1000)

Address = tuple[str, int]


@dataclass(frozen=True)
class Accept:
    """The far end accepts `after` seconds."""

    after: float = 0.0


@dataclass(frozen=True)
class Refuse:
    """The connect fails with `code` `after` seconds; `at_once`: in the first `connect_ex` itself (no route)."""

    after: float = 0.0
    code: int = errno.ECONNREFUSED
    at_once: bool = False


@dataclass(frozen=True)
class Never:
    """Nothing ever answers."""


Outcome = Accept | Refuse | Never


class Peer:
    """The far end of one host stream socket, in the hands of the test."""

    def __init__(self, sock: FakeSocket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.eof = False
        """The socket was shut down for writing or closed, and everything before was read."""
        self.aborted = False
        """The far end saw a RST."""
        self.reading = True
        self._waiting: deque[bytes] = deque()
        """Sent by the test, not yet in the socket's receive buffer."""
        self._fin = False

    # what the test does

    def send(self, data: bytes) -> None:
        self._waiting.append(bytes(data))
        self.push()

    def shutdown(self) -> None:
        """No more octets from here: the socket reads the end of file."""
        self._fin = True
        self.push()

    def reset(self, code: int = errno.ECONNRESET) -> None:
        """The connection breaks: a RST, or with `code` ETIMEDOUT, EHOSTUNREACH."""
        self._waiting.clear()
        self.sock.break_with(code)

    def vanish(self) -> None:
        """As the other end of a socket pair that is closed: the end of file, and a hang-up."""
        self.sock.write_closed = True
        self.shutdown()

    def close(self) -> None:
        """As a program's close: the end of file, and a RST for what is sent afterwards."""
        self.shutdown()
        self.sock.peer_closed = True

    def stop_reading(self) -> None:
        self.reading = False

    def resume(self, octets: int | None = None) -> None:
        """Read again everything, or only `octets` more."""
        if octets is None:
            self.reading = True
        self.drain(octets)

    # plumbing

    def push(self) -> None:
        """Move octets into the socket's receive buffer as far as there is room."""
        sock = self.sock
        moved = False
        while self._waiting and sock.connected and sock.buffered < sock.receive_buffer:
            octets = self._waiting.popleft()
            room = sock.receive_buffer - sock.buffered
            if len(octets) > room:
                self._waiting.appendleft(octets[room:])
                octets = octets[:room]
            sock.incoming += octets
            moved = True
        if not self._waiting and self._fin and sock.connected and not sock.read_closed:
            sock.read_closed = True
            moved = True
        if moved:
            sock.wake()

    def drain(self, octets: int | None = None) -> None:
        sock = self.sock
        if self.aborted:
            return
        count = len(sock.outgoing) if octets is None else min(octets, len(sock.outgoing))
        if not self.reading and octets is None:
            return
        self.received += sock.outgoing[:count]
        del sock.outgoing[:count]
        if not sock.outgoing and sock.write_closed:
            self.eof = True
        if count and sock.no_space and sock.room() >= sock.sent_buffer // 3:
            sock.no_space = False
            sock.wake()


class _Socket:
    """What stream and datagram sockets share: a descriptor, options, fault injection."""

    def __init__(self, io: FakeHostIO, family: int, kind: int, protocol: int) -> None:
        self.io = io
        self.family = family
        self.type = kind
        self.proto = protocol
        self.fd = next(_fds)
        self.options: dict[tuple[int, int], Any] = {}
        self.closed = False
        self.local: Address = ("0.0.0.0", 0)
        io.objects[self.fd] = self

    def _enter(self, call: str, *, raising: bool = True) -> int:
        """Count a call; an injected error is raised, or returned where the call returns errors."""
        if self.closed:
            self.io.misuse.append(f"{call} on a closed socket")
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        code = self.io.injected(call)
        if code and raising:
            raise OSError(code, os.strerror(code))
        return code

    def fileno(self) -> int:
        return -1 if self.closed else self.fd

    def setblocking(self, blocking: bool) -> None:
        if blocking:
            self.io.misuse.append("a blocking socket")

    def settimeout(self, timeout: float | None) -> None:
        if timeout != 0:
            self.io.misuse.append("a socket with a timeout")

    def gettimeout(self) -> float:
        return 0.0

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._enter("setsockopt")
        if (level, option) == (socket.SOL_SOCKET, SO_PEEK_OFF):
            if not self.io.peek_off:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            assert isinstance(value, int)
        self.options[level, option] = value

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        self._enter("getsockopt")
        value = self.options.get((level, option), 0)
        return value if not size else bytes(value) if isinstance(value, bytes) else struct.pack("i", value)

    def getsockname(self) -> Address:
        return self.local

    def bind(self, address: Address) -> None:
        self._enter("bind")
        self.local = (address[0], address[1] or self.fd + 30000)

    def mask(self) -> int:
        raise NotImplementedError

    def wake(self) -> None:
        """Something happened: one edge for a watched descriptor."""
        self.io.wake(self.fd)

    def close(self) -> None:
        if self.closed:
            return
        if self.fd in self.io.watched:
            self.io.misuse.append("a socket was closed while it was watched")
        self.closed = True
        self.io.objects.pop(self.fd, None)
        self._on_close()

    def _on_close(self) -> None: ...


def _views(buffers: Iterable[Any]) -> list[memoryview]:
    return [memoryview(buffer).cast("B") for buffer in buffers]


class FakeSocket(_Socket):
    """A stream socket; its far end is `peer`."""

    def __init__(self, io: FakeHostIO, family: int, kind: int, protocol: int) -> None:
        super().__init__(io, family, kind, protocol)
        self.peer = Peer(self)
        self.remote: Address | None = None
        self.connected = False
        self.connecting = False
        self._told = False
        self.error = 0
        self.broken = False
        self.incoming = bytearray()
        self.outgoing = bytearray()
        """Taken by send, not yet read by the far end."""
        self.read_closed = False
        self.write_closed = False
        self.peer_closed = False
        self.no_space = False
        self.sent_buffer = io.sent_buffer
        self.receive_buffer = io.receive_buffer
        self.peeked_most = 0

    @property
    def buffered(self) -> int:
        return len(self.incoming)

    def room(self) -> int:
        return max(self.sent_buffer - len(self.outgoing), 0)

    def mask(self) -> int:
        if self.connecting:
            return 0
        if not self.connected and not self.broken:
            return WRITE | HANGUP
        mask = 0
        if self.incoming or self.read_closed or self.broken or self.error:
            mask |= READ
        if self.broken or self.room() > self.sent_buffer // 3:
            mask |= WRITE
        if self.read_closed or self.broken:
            mask |= READ_CLOSED
        if self.broken or (self.read_closed and self.write_closed):
            mask |= HANGUP
        if self.error:
            mask |= ERROR
        return mask

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            self._enter("getsockopt")
            code, self.error = self.error, 0
            return code
        if level == socket.IPPROTO_TCP and option == getattr(socket, "TCP_INFO", 11):
            self._enter("getsockopt")
            return bytes((1 if self.connected else 2,)) + bytes(max(size - 1, 0))
        return super().getsockopt(level, option, size)

    def getpeername(self) -> Address:
        if self.remote is None or not self.connected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self.remote

    # connecting

    def connect_ex(self, address: Address | str) -> int:
        code = self._enter("connect_ex", raising=False)
        if code:
            return code
        if isinstance(address, str):
            return self._connect_unix(address)
        if self.error:
            code, self.error = self.error, 0
            return code
        if self.connecting:
            return errno.EALREADY
        if self.connected:
            if self._told:
                return errno.EISCONN
            self._told = True
            return 0
        if self.remote is not None:
            return errno.ECONNABORTED
        self.remote = (address[0], address[1])
        self.io.connects.append(self)
        outcome = self.io.outcome(self.remote)
        if isinstance(outcome, Refuse) and outcome.at_once:
            return outcome.code
        if isinstance(outcome, Never):
            self.connecting = True
        elif outcome.after:
            self.connecting = True
            self.io.clock.at(self.io.clock.now + outcome.after, lambda: self.settle(outcome))
        else:
            self.settle(outcome)
        return errno.EINPROGRESS

    def _connect_unix(self, path: str) -> int:
        if self.connected:
            return errno.EISCONN
        self.io.connects.append(self)
        outcome = self.io.outcome((path, 1))
        if isinstance(outcome, Refuse):
            return outcome.code
        if isinstance(outcome, Never):
            return errno.EAGAIN  # its queue is full
        self.remote, self.connected = (path, 1), True
        self.peer.push()
        return 0

    def connect(self, address: Address) -> None:
        code = self.connect_ex(address)
        if code:
            raise OSError(code, os.strerror(code))

    def settle(self, outcome: Accept | Refuse) -> None:
        """The handshake of the host's kernel ends."""
        if self.closed:
            return
        self.connecting = False
        if isinstance(outcome, Refuse):
            self.error = outcome.code
            self.broken = True
        else:
            self.connected = True
        self.wake()
        self.peer.push()

    def break_with(self, code: int) -> None:
        if self.broken or self.closed:
            return
        self.broken = True
        self.error = code
        self.outgoing.clear()
        self.wake()

    # sending

    def send(self, data: Any, flags: int = 0) -> int:
        return self.sendmsg([data], [], flags, _call="send")

    def sendmsg(
        self,
        buffers: Iterable[Any],
        ancillary: Iterable[Any] = (),
        flags: int = 0,
        address: Any = None,
        *,
        _call: str = "sendmsg",
    ) -> int:
        self._enter(_call)
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))
        if self.broken or self.write_closed:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if not self.connected:
            if self.connecting:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        views = _views(buffers)
        if len(views) > 1024:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        room = self.room()
        if self.io.send_at_most is not None:
            room = min(room, self.io.send_at_most)
        wanted = sum(len(view) for view in views)
        if wanted and not room:
            self.no_space = True
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self.peer_closed:
            self.break_with(errno.ECONNRESET)  # the far end's kernel answers data for a closed socket with RST
            return wanted
        taken = 0
        for view in views:
            part = view[: room - taken]
            self.outgoing += part
            taken += len(part)
            if taken == room:
                break
        if taken < wanted:
            self.no_space = True
        self.peer.drain()
        if taken < wanted and self.io.send_at_most is not None and self.no_space:
            self.no_space = False
            self.wake()
        return taken

    def shutdown(self, how: int) -> None:
        self._enter("shutdown")
        if not self.connected or self.broken:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if how in (socket.SHUT_WR, socket.SHUT_RDWR) and not self.write_closed:
            self.write_closed = True
            self.peer.drain()
            if not self.outgoing:
                self.peer.eof = True
        if how in (socket.SHUT_RD, socket.SHUT_RDWR):
            self.read_closed = True

    # receiving

    def _take(self, count: int, flags: int, call: str) -> bytes:
        self._enter(call)
        if not self.connected and not self.broken:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if self.io.receive_at_most is not None:
            count = min(count, self.io.receive_at_most)
        key = (socket.SOL_SOCKET, SO_PEEK_OFF)
        offset = self.options.get(key, -1)
        start = offset if flags & socket.MSG_PEEK and offset >= 0 else 0
        data = bytes(self.incoming[start : start + count])
        if not data and count:
            if self.error:
                code, self.error = self.error, 0
                raise OSError(code, os.strerror(code))
            if self.read_closed or self.broken:
                return b""
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if flags & socket.MSG_PEEK:
            if offset >= 0:
                self.options[key] = offset + len(data)
                self.peeked_most = max(self.peeked_most, offset + len(data))
        else:
            del self.incoming[: len(data)]
            if offset >= 0:
                self.options[key] = max(offset - len(data), 0)
            self.peer.push()
        return data

    def recv(self, count: int, flags: int = 0) -> bytes:
        return self._take(count, flags, "recv")

    def recv_into(self, buffer: Any, count: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer).cast("B")
        if count > len(view):
            raise ValueError("buffer too small for requested bytes")
        data = self._take(count or len(view), flags, "recv_into")
        if not flags & socket.MSG_TRUNC:
            view[: len(data)] = data
        return len(data)

    def recvmsg_into(
        self, buffers: Iterable[Any], ancillary: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, Any]:
        views = _views(buffers)
        data = self._take(sum(len(view) for view in views), flags, "recvmsg_into")
        if not flags & socket.MSG_TRUNC:
            at = 0
            for view in views:
                part = data[at : at + len(view)]
                view[: len(part)] = part
                at += len(part)
        return len(data), [], 0, None

    # end

    def _on_close(self) -> None:
        linger = self.options.get((socket.SOL_SOCKET, socket.SO_LINGER))
        hard = isinstance(linger, bytes) and struct.unpack("ii", linger) == (1, 0)
        peer = self.peer
        if not self.connected or self.broken:
            return
        if hard or self.incoming:
            peer.aborted = True
            self.outgoing.clear()
        else:
            self.write_closed = True
            peer.drain()
            if not self.outgoing:
                peer.eof = True


class FakeDatagramSocket(_Socket):
    """An unconnected (or connected) datagram or ping socket; what it sends is in `io.datagrams`."""

    QUEUE = 1024

    def __init__(self, io: FakeHostIO, family: int, kind: int, protocol: int) -> None:
        super().__init__(io, family, kind, protocol)
        self.incoming: deque[tuple[bytes, Address]] = deque()
        self.errors: deque[tuple[bytes, list[tuple[int, int, bytes]], Address]] = deque()
        self.remote: Address | None = None
        self.error = 0
        self.ident = self.fd & 0xFFFF

    def mask(self) -> int:
        return (READ if self.incoming or self.error else 0) | WRITE | (ERROR if self.errors or self.error else 0)

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            code, self.error = self.error, 0
            return code
        return super().getsockopt(level, option, size)

    def connect_ex(self, address: Address) -> int:
        code = self._enter("connect_ex", raising=False)
        if not code:
            self.remote = address
        return code

    def connect(self, address: Address) -> None:
        code = self.connect_ex(address)
        if code:
            raise OSError(code, os.strerror(code))

    def _send(self, data: bytes, address: Address | None) -> int:
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))
        if address is None:
            address = self.remote
        if address is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        if len(data) > 65507:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        if self.local[1] == 0:
            self.local = (self.local[0], 40000 + self.fd % 20000)
            self.ident = self.local[1]
        if self.proto == socket.IPPROTO_ICMP:
            # The kernel puts the socket's identifier and the checksum in.
            data = data[:4] + struct.pack("!H", self.ident) + data[6:]
        sent = Datagram(
            self, bytes(data), (address[0], address[1]), self.options.get((socket.IPPROTO_IP, socket.IP_TTL))
        )
        self.io.datagrams.append(sent)
        if self.io.on_datagram is not None:
            self.io.on_datagram(sent)
        return len(data)

    def send(self, data: Any, flags: int = 0) -> int:
        self._enter("send")
        return self._send(bytes(data), None)

    def sendto(self, data: Any, *rest: Any) -> int:
        self._enter("sendto")
        return self._send(bytes(data), rest[-1])

    def sendmsg(
        self, buffers: Iterable[Any], ancillary: Iterable[Any] = (), flags: int = 0, address: Any = None
    ) -> int:
        self._enter("sendmsg")
        return self._send(b"".join(bytes(buffer) for buffer in buffers), address)

    def deliver(self, data: bytes, source: Address) -> None:
        """A datagram arrives from `source`."""
        if not self.closed and len(self.incoming) < self.QUEUE:
            self.incoming.append((bytes(data), source))
            self.wake()

    def unreachable(self, sent: Datagram, kind: int, code: int, number: int, offender: str, *, info: int = 0) -> None:
        """An ICMP error about `sent` arrives at the host: `number` is the errno; IP_RECVERR decides what is kept."""
        if self.closed:
            return
        if self.options.get((socket.IPPROTO_IP, getattr(socket, "IP_RECVERR", 11))):
            extended = struct.pack("=IBBBBII", number, 2, kind, code, 0, info, 0)
            extended += struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(offender))
            self.errors.append(
                (sent.data, [(socket.IPPROTO_IP, getattr(socket, "IP_RECVERR", 11), extended)], sent.address)
            )
            self.error = number
        elif self.remote is not None:
            self.error = number
        self.wake()

    def _take(self, flags: int, call: str) -> tuple[bytes, list[Any], Address]:
        self._enter(call)
        if flags & getattr(socket, "MSG_ERRQUEUE", 0x2000):
            if not self.errors:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            taken = self.errors.popleft()
            self.error = 0
            return taken
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))
        if not self.incoming:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        data, source = self.incoming[0] if flags & socket.MSG_PEEK else self.incoming.popleft()
        return data, [], source

    def recvfrom_into(self, buffer: Any, count: int = 0, flags: int = 0) -> tuple[int, Address]:
        data, _ancillary, source = self._take(flags, "recvfrom_into")
        view = memoryview(buffer).cast("B")[: count or None]
        data = data[: len(view)]
        view[: len(data)] = data
        return len(data), source

    def recv_into(self, buffer: Any, count: int = 0, flags: int = 0) -> int:
        return self.recvfrom_into(buffer, count, flags)[0]

    def recvfrom(self, count: int, flags: int = 0) -> tuple[bytes, Address]:
        data, _ancillary, source = self._take(flags, "recvfrom")
        return data[:count], source

    def recvmsg(self, count: int, ancillary: int = 0, flags: int = 0) -> tuple[bytes, list[Any], int, Address]:
        data, control, source = self._take(flags, "recvmsg")
        return data[:count], control if ancillary else [], flags & getattr(socket, "MSG_ERRQUEUE", 0x2000), source

    def recvmsg_into(
        self, buffers: Iterable[Any], ancillary: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, Any]:
        data, control, source = self._take(flags, "recvmsg_into")
        views = _views(buffers)
        at = 0
        for view in views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return at, control if ancillary else [], 0 if at == len(data) else socket.MSG_TRUNC, source


@dataclass(frozen=True, eq=False)
class Datagram:
    """One datagram (or ICMP echo) that left through the host."""

    sock: FakeDatagramSocket
    data: bytes
    address: Address
    ttl: int | None

    def answer(self, data: bytes, source: Address | None = None) -> None:
        self.sock.deliver(data, source or self.address)


class FakeHostIO:
    """`netstack.host.io.HostIO` in virtual time. Connects succeed at once unless `on_connect` says otherwise."""

    BATCH = 64

    def __init__(self, clock: VirtualClock, *, peek_off: bool = True) -> None:
        self.clock = clock
        self.peek_off = peek_off
        self.pings_allowed = True
        self.default: Outcome = Accept()
        self.outcomes: dict[Address, Outcome] = {}
        self.connects: list[FakeSocket] = []
        """Every socket on which a connect was tried, in order."""
        self.datagrams: list[Datagram] = []
        self.on_datagram: Callable[[Datagram], None] | None = None
        self.objects: dict[int, Any] = {}
        """Open sockets, and links, by descriptor."""
        self.watched: dict[int, tuple[Callable[[int], None], bool]] = {}
        self.misuse: list[str] = []
        """What no program may do; empty at the end of a test."""
        self.calls: Counter[str] = Counter()
        self.total_calls = 0
        self.sent_buffer = SENT_BUFFER
        self.receive_buffer = RECEIVE_BUFFER
        self.send_at_most: int | None = None
        """Octets that one send takes; the rest is a partial write."""
        self.receive_at_most: int | None = None
        self._faults: dict[tuple[str, int], int] = {}
        self._faults_at: dict[int, int] = {}
        self._writers: set[int] = set()
        self._pending: dict[int, None] = {}
        self.closed = False

    # what the test says

    def on_connect(self, address: Address, outcome: Outcome) -> None:
        self.outcomes[address] = outcome

    def outcome(self, address: Address) -> Outcome:
        return Refuse() if not address[1] else self.outcomes.get(address, self.default)

    def fail(self, call: str, nth: int, code: int) -> None:
        """The `nth` use (from 1, counted from now) of `call` fails with `code`."""
        self._faults[call, self.calls[call] + nth] = code

    def fail_at(self, index: int, code: int) -> None:
        """Call number `index` (from 1, counted over the life of this object) fails with `code`, whatever it is."""
        self._faults_at[index] = code

    def heal(self) -> None:
        """Forget injected errors that were not met."""
        self._faults.clear()
        self._faults_at.clear()

    def injected(self, call: str) -> int:
        self.calls[call] += 1
        if call == "getsockopt":  # of SO_ERROR: it has no way to fail
            return self._faults.pop((call, self.calls[call]), 0)
        self.total_calls += 1
        return self._faults.pop((call, self.calls[call]), 0) or self._faults_at.pop(self.total_calls, 0)

    def connected(self, remote: Address = ("198.51.100.9", 50000)) -> tuple[FakeSocket, Peer]:
        """An accepted connection, as a listener of a published port has it: the socket, and its far end."""
        sock = FakeSocket(self, socket.AF_INET, socket.SOCK_STREAM, 0)
        sock.remote = remote
        sock.local = ("127.0.0.1", 8080)
        sock.connected = sock._told = True
        return sock, sock.peer

    def bound(self, local: Address = ("127.0.0.1", 5353)) -> FakeDatagramSocket:
        """A bound datagram socket, as that of a published UDP port."""
        sock = FakeDatagramSocket(self, socket.AF_INET, socket.SOCK_DGRAM, 0)
        sock.local = local
        return sock

    def adopt(self, link: Any) -> None:
        """Make a link's descriptor known, so that it can be watched."""
        self.objects[link.fileno()] = link

    @property
    def sockets(self) -> list[Any]:
        """Host sockets that are open."""
        return [each for each in self.objects.values() if isinstance(each, _Socket)]

    # HostIO

    def socket(self, family: int, kind: int, protocol: int = 0) -> Any:
        code = self.injected("socket")
        if code:
            raise OSError(code, os.strerror(code))
        kind &= 0xF
        if kind == socket.SOCK_STREAM:
            return FakeSocket(self, family, kind, protocol)
        if kind == socket.SOCK_DGRAM:
            if protocol == socket.IPPROTO_ICMP and not self.pings_allowed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return FakeDatagramSocket(self, family, kind, protocol)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def admit(self, sock: Any) -> Any:
        code = self.injected("admit")
        if code:
            sock.close()
            raise OSError(code, os.strerror(code))
        return sock

    def watch(self, fd: int, ready: Callable[[int], None], *, edge: bool = True, write: bool = False) -> None:
        code = self.injected("watch")
        if code:
            raise OSError(code, os.strerror(code))
        if fd not in self.objects:
            raise OSError(errno.EBADF, f"watch of unknown descriptor {fd}")
        if fd in self.watched:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.watched[fd] = (ready, edge)
        if edge and self.objects[fd].mask():
            self._pending[fd] = None

    def watch_write(self, fd: int) -> None:
        if self.objects[fd].mask() & WRITE:
            self._pending[fd] = None

    def want_write(self, fd: int, wanted: bool) -> None:
        (self._writers.add if wanted else self._writers.discard)(fd)

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)
        self._pending.pop(fd, None)
        self._writers.discard(fd)

    def forget(self, fd: int) -> None:
        """As `unwatch`: the descriptor is closed at once."""
        self.unwatch(fd)

    def wake(self, fd: int) -> None:
        if fd in self.watched:
            self._pending[fd] = None

    def poll(self) -> list[tuple[Callable[[int], None], int]]:
        self.clock.fire()
        found = []
        for fd in list(self._pending)[: self.BATCH]:
            del self._pending[fd]
            mask = self.objects[fd].mask()
            if mask:
                found.append((self.watched[fd][0], mask))
        for fd, (ready, edge) in self.watched.items():
            if not edge:
                mask = self.objects[fd].mask() & (READ | (WRITE if fd in self._writers else 0) | ERROR | HANGUP)
                if mask:
                    found.append((ready, mask))
        return found

    def idle(self) -> bool:
        """Whether `poll` would find nothing."""
        return not self._pending and not any(
            self.objects[fd].mask() & (READ | (WRITE if fd in self._writers else 0))
            for fd, (_ready, edge) in self.watched.items()
            if not edge
        )

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True
        self.watched.clear()
        self._pending.clear()
