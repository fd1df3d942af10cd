"""One HTTP/1 connection: a socket, and h11's engine that knows the protocol (RFC 9110, RFC 9112).

Nothing is read before it is asked for and nothing is sent that the socket does not take, so a body of any size passes through in
pieces of `CHUNK` octets, and a slow end stops its sender. Refused are heads of more than `MAX_HEAD` octets, and whatever two
parsers could read differently: Content-Length together with Transfer-Encoding, Content-Lengths that differ, Transfer-Encoding
in HTTP/1.0, folded lines' leftovers and bare line ends (by h11).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import h11

from pyvpnkit.proxy.errors import Gone, Refusal
from pyvpnkit.proxy.relay import hung_up

CHUNK: Final = 64 << 10
MAX_HEAD: Final = 32 << 10
"""Of a request ..."""
MAX_ANSWER_HEAD: Final = 128 << 10
"""... and of an answer; also of the trailers of either."""
_LINGER_S: Final = 2.0
_LINGER_OCTETS: Final = 4 << 20
_LOOK_S: Final = 1.0

Headers: TypeAlias = list[tuple[bytes, bytes]]

_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~-]+)?\]|[A-Za-z0-9._~-]{1,253})(?::([0-9]{0,5}))?")
_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"proxy-authorization",
     b"proxy-authenticate", b"http2-settings")
)  # fmt: skip
"""Headers for one hop alone (RFC 9110 7.6.1), Transfer-Encoding aside, which is h11's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Host and port of an authority; `host` has no brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, authority: bytes, port: int) -> Place:
        """`host[:port]`, with `port` where there is none (0: it must be there). Raises `Refusal` 400."""
        found = _HOST.fullmatch(authority)
        number = int(found[2] or port) if found else 0
        if found is None or not 1 <= number <= 65535:
            raise Refusal(400, f"no host and port: {authority[:100].decode('latin-1')!r}")
        return cls(found[1].decode("ascii").strip("[]"), number)

    @property
    def full(self) -> str:
        """Always with the port."""
        return f"{self._host}:{self.port}"

    @property
    def short(self) -> str:
        """Without port 80, as a `Host` header has it."""
        return self._host if self.port == 80 else self.full

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


class Parsed(Protocol):
    """Headers as h11 gives them."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...

    def raw_items(self) -> Headers:
        """With the names as they were spelt."""
        ...


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """The members of a list header (`name` in lower case), in lower case."""
    return [
        word
        for found, value in headers
        if found.lower() == name
        for word in map(bytes.strip, value.lower().split(b","))
        if word
    ]


def passed_on(headers: Parsed, *drop: bytes) -> Headers:
    """The headers that are for the other end: without those of this hop (RFC 9110 7.6.1) and those of `drop`."""
    named = {word for word in values(headers, b"connection") if word != b"transfer-encoding"}
    named -= {b"content-length", b"host"}  # cannot be for one hop; who says so means to harm
    return [
        (raw, value)
        for raw, value in headers.raw_items()
        if (name := raw.lower()) not in _HOP and name not in named and name not in drop
    ]


def target_of(target: bytes) -> tuple[Place | None, bytes]:
    """Whom an absolute URI names, and what of it (RFC 9112 3.2); `None` where the target names nobody. Raises `Refusal` 400."""
    if target[:1] == b"/" or target == b"*":
        return None, target.partition(b"#")[0]
    scheme, found, rest = target.partition(b"://")
    if not found:
        raise Refusal(400, "the target of the request is neither a path nor a URI")
    if scheme.lower() != b"http":
        words = "ask for it by CONNECT" if scheme.lower() == b"https" else "only http is spoken here"
        raise Refusal(400, f"{scheme[:20].decode('latin-1')}: {words}")
    authority = re.split(rb"[/?#]", rest, maxsplit=1)[0]
    path = rest[len(authority) :].partition(b"#")[0]
    if path[:1] != b"/":
        path = b"/" + path
    return Place.parse(authority.rpartition(b"@")[2], 80), path


class Wire:
    """See the module. `role` is h11's: who we are on it."""

    def __init__(self, sock: socket.socket, role: type[h11.CLIENT] | type[h11.SERVER]) -> None:
        self.sock = sock
        self.h11 = h11.Connection(role, MAX_HEAD if role is h11.SERVER else MAX_ANSWER_HEAD)
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._timer: asyncio.TimerHandle | None = None

    # Hearing.

    async def next(self) -> h11.Event:
        """The next event. Raises h11's `RemoteProtocolError` and `OSError`."""
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                self.h11.receive_data(await self._loop.sock_recv(self.sock, CHUNK))
            elif event is h11.PAUSED:
                raise h11.RemoteProtocolError("octets where none belong")
            else:
                return event  # type: ignore[return-value]  # the other two are sentinels

    async def request(self, first_s: float, rest_s: float) -> h11.Request | None:
        """The head of a request, or `None` when none comes any more. Raises `Refusal` for one that is not acceptable.

        `first_s` is how long its first octet may take, `rest_s` all others.
        """
        try:
            if not self.h11.trailing_data[0]:
                try:
                    async with asyncio.timeout(first_s):
                        octets = await self._loop.sock_recv(self.sock, CHUNK)
                except TimeoutError:
                    return None
                if not octets:
                    return None
                self.h11.receive_data(octets)
            async with asyncio.timeout(rest_s):
                event = await self.next()
        except TimeoutError:
            raise Refusal(408, f"the head of the request did not come within {rest_s:g} s") from None
        except h11.RemoteProtocolError as error:
            raise Refusal(error.error_status_hint, f"not acceptable: {error}") from None
        except OSError as error:
            raise Gone(str(error)) from None
        if not isinstance(event, h11.Request):
            return None
        check(event)
        return event

    def watch(self, gone: Callable[[], object]) -> None:
        """Until `unwatch`: call `gone` when the other end cannot take an answer any more. It is not to be read meanwhile.

        What it says meanwhile, the next request or its end, is kept: one reading of it. From then on its socket is looked at
        now and then.
        """
        octets, ended = self.h11.trailing_data
        if octets or ended:
            self._look(gone)
            return
        self._watching = True
        self._loop.add_reader(self.sock, self._heard, gone)

    def unwatch(self) -> None:
        """Harmless when repeated."""
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self.sock)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _heard(self, gone: Callable[[], object]) -> None:
        try:
            octets = self.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            octets = b""
        self.unwatch()
        self.h11.receive_data(octets)
        self._look(gone)

    def _look(self, gone: Callable[[], object]) -> None:
        """It may have said its last word, and may wait for the answer or not."""
        self._timer = None
        if hung_up(self.sock):
            gone()
        else:
            self._timer = self._loop.call_later(_LOOK_S, self._look, gone)

    def is_stale(self) -> bool:
        """Whether an idle connection has ended, or says what nobody asked for."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    # Saying.

    async def send(self, event: h11.Event) -> None:
        """Raises `OSError`, and h11's `LocalProtocolError` for what does not belong here."""
        octets = self.h11.send(event)
        if octets:
            await self._loop.sock_sendall(self.sock, octets)

    @property
    def may_answer(self) -> bool:
        """Whether no part of an answer has been sent."""
        return self.h11.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    def reusable(self) -> bool:
        """Ready for the next request, if both sides want one."""
        if self.h11.our_state is h11.DONE and self.h11.their_state is h11.DONE:
            self.h11.start_next_cycle()
            return True
        return False

    # The end.

    def abort(self) -> None:
        """Whoever waits for it is told its end; `close` is still to come."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.unwatch()
        self.sock.close()

    async def linger(self) -> None:
        """End our side, and read on a little: octets left unread would reset the connection before the answer was read."""
        with contextlib.suppress(OSError, TimeoutError):
            self.sock.shutdown(socket.SHUT_WR)
            left = _LINGER_OCTETS
            async with asyncio.timeout(_LINGER_S):
                while left > 0 and (octets := await self._loop.sock_recv(self.sock, CHUNK)):
                    left -= len(octets)


def check(request: h11.Request) -> None:
    """Raises `Refusal` for a head that the next server might read differently (RFC 9112 6.3, 11.2)."""
    names = [name for name, _ in request.headers]
    if sum(len(name) + len(value) + 4 for name, value in request.headers) + len(request.target) > MAX_HEAD:
        raise Refusal(431, f"the head of the request has more than {MAX_HEAD} octets")
    if request.http_version not in (b"1.0", b"1.1"):
        raise Refusal(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise Refusal(400, "Content-Length together with Transfer-Encoding")
        if request.http_version == b"1.0":
            raise Refusal(400, "Transfer-Encoding in HTTP/1.0")
    for name, value in request.headers:
        if b"\r" in value or b"\n" in value or b"\0" in value:
            raise Refusal(400, f"header {name[:40].decode('latin-1')} has control characters")


def has_body(request: h11.Request) -> bool:
    """Whether octets follow the head."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and int(value)) for name, value in request.headers
    )
