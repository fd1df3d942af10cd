"""Outgoing TCP through a program on the host: VPNKit's tunnels, for one connection (spec vpnkit 7.7, appendix B).

In place of a connect to the destination the flow's socket is connected to the program's unix socket, and both sides say one
document, each with its length before it (2 octets, little-endian):

    we:  {"protocol":"tcp","src_ip":"0.0.0.0","src_port":0,"dst_ip":"10.0.0.1","dst_port":443}
    it:  {"accepted":true}

after which the socket carries the octets of the connection. Anything else it says, its silence and its end refuse the guest.

The guest's SYN waits meanwhile as it does for a connect, with the same limit (`tcp_connect_s`) and the same ends: the flow is
in the table already and owns the socket, so a RST of the guest, the limit and the end of the stack close it. `Handshake` is
what the socket calls until then; afterwards it is the flow's alone. The answer is read by its exact length, so what the
program says right behind it waits in the socket for the flow.

States: CONNECTING (Linux has no event for a unix listener whose queue was full, so it is tried again after `RETRY_S`),
ASKING (until the request is sent, then until the answer is there), and the end.

Bounds: one handshake per flow, `MAX_ANSWER` octets of its answer.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from typing import Any, Final

from netstack.errors import HostError
from netstack.host.io import HostIO
from netstack.host.tcp_flow import TcpFlow
from netstack.host.timers import Entry, Timers
from netstack.policy.egress import Tunnel

RETRY_S: Final = 0.01
"""The first wait for a full queue; each further one is twice as long, up to `RETRY_MOST_S`."""
RETRY_MOST_S: Final = 0.08
MAX_ANSWER: Final = 4096
"""Octets of JSON; VPNKit's own answer has 17."""
_LENGTH: Final = 2
_LATER: Final = frozenset((errno.EAGAIN, errno.EINPROGRESS, errno.EALREADY, errno.EINTR))
_CONNECTED: Final = frozenset((0, errno.EISCONN))


def request(tunnel: Tunnel) -> bytes:
    """What the program is asked; the source is VPNKit's placeholder, for programs take it as given."""
    document = {
        "protocol": "tcp",
        "src_ip": "0.0.0.0",
        "src_port": 0,
        "dst_ip": tunnel.endpoint.text,
        "dst_port": tunnel.endpoint.port,
    }
    octets = json.dumps(document, separators=(",", ":")).encode()
    return len(octets).to_bytes(_LENGTH, "little") + octets


def check_answer(octets: bytes) -> None:
    """Raises `HostError` unless the program's document accepts the connection."""
    try:
        document = json.loads(octets)
    except (ValueError, RecursionError):
        raise HostError("its answer is no JSON") from None
    accepted = document.get("accepted") if isinstance(document, dict) else None
    if accepted is False:
        raise HostError("not accepted")
    if accepted is not True:
        raise HostError('its answer has no "accepted" that is true or false')


class Handshake:
    """See the module. One of `accepted(flow)` and `refused(flow, reason)` is called, unless the flow ends before."""

    def __init__(
        self,
        flow: TcpFlow,
        tunnel: Tunnel,
        io: HostIO,
        timers: Timers,
        accepted: Callable[[TcpFlow], None],
        refused: Callable[[TcpFlow, str], None],
    ) -> None:
        self.timer_at = 0.0
        self.timer_entry: Entry | None = None
        self._flow = flow
        self._sock: Any = flow.sock
        self._path = tunnel.path
        self._io = io
        self._timers = timers
        self._accepted = accepted
        self._refused = refused
        self._retry_s = RETRY_S
        self._request = request(tunnel)
        """What is still to be sent."""
        self._answer = b""
        self._wanted = _LENGTH
        """So many octets of the answer are known to come."""

    def start(self, now: float) -> None:
        """Connect, and ask."""
        try:
            self._start(now)
        except (OSError, HostError) as error:
            self._refuse(error)

    def timer(self, now: float) -> None:
        """The program's queue was full; perhaps it has room by now."""
        if not self._flow.end:
            self.start(now)

    def ready(self, mask: int) -> None:
        """The socket's edge-triggered event: send what is left, read what came."""
        if self._flow.end:
            return
        try:
            if self._ask() and self._hear():
                self._io.unwatch(self._sock.fileno())
                self._flow.watched = False
                self._accepted(self._flow)
        except (OSError, HostError) as error:
            self._refuse(error)

    def _start(self, now: float) -> None:
        number = self._sock.connect_ex(self._path)
        if number in _LATER:
            self._timers.arm(now + self._retry_s, self)
            self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)
            return
        if number not in _CONNECTED:
            raise OSError(number, _words(number))
        self._ask()
        self._io.watch(self._sock.fileno(), self.ready, write=bool(self._request))
        self._flow.watched = True

    def _ask(self) -> bool:
        """Whether the whole request is sent."""
        try:
            while self._request:
                self._request = self._request[self._sock.send(self._request) :]
        except BlockingIOError:
            return False
        return True

    def _hear(self) -> bool:
        """Whether the program has accepted; not yet, when False. Raises what refuses."""
        try:
            while len(self._answer) < self._wanted:
                octets = self._sock.recv(self._wanted - len(self._answer))
                if not octets:
                    raise HostError("it closed the connection without an answer")
                self._answer += octets
                if len(self._answer) == self._wanted == _LENGTH:
                    length = int.from_bytes(self._answer, "little")
                    if length > MAX_ANSWER:
                        raise HostError(f"its answer claims {length} octets")
                    self._wanted += length
        except BlockingIOError:
            return False
        check_answer(self._answer[_LENGTH:])
        return True

    def _refuse(self, error: Exception) -> None:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        self._refused(self._flow, f"tunnel {self._path}: {reason}")


def _words(number: int) -> str:
    """An errno for people who look for what to do."""
    if number == errno.ENOENT:
        return "no such socket"
    if number == errno.ECONNREFUSED:
        return "nobody listens"
    return errno.errorcode.get(number, str(number))
