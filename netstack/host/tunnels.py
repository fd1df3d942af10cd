"""Outgoing TCP through a program on the host: VPNKit's tunnels, for one connection (spec vpnkit 7.7, appendix B).

In place of a connect to the destination the flow's socket is connected to the program's unix socket, and both sides say one
document, each with its length before it (2 octets, little-endian):

    we:  {"protocol":"tcp","src_ip":"0.0.0.0","src_port":0,"dst_ip":"10.0.0.1","dst_port":443}
    it:  {"accepted":true}

after which the socket carries the octets of the connection. Anything else it says, its silence and its end refuse the guest.

How it goes on with the guest and the socket is told in `netstack.host.handshake`.

States: CONNECTING (Linux has no event for a unix listener whose queue was full, so it is tried again after `RETRY_S`),
ASKING (until the request is sent, then until the answer is there), and the end.

Bounds: `MAX_ANSWER` octets of its answer.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Final

from netstack.errors import HostError
from netstack.host.handshake import Handshake
from netstack.host.tcp_flow import TcpFlow
from netstack.policy.egress import Tunnel

if TYPE_CHECKING:
    from netstack.host.tcp_proxy import TcpProxy

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


class Question:
    """The exchange: a request, an answer."""

    def __init__(self, tunnel: Tunnel) -> None:
        self.done = False
        self._request = request(tunnel)
        self._answer = b""
        self._wanted = _LENGTH
        """So many octets of the answer are known to come."""

    def say(self) -> bytes:
        said, self._request = self._request, b""
        return said

    def hear(self, octets: bytes) -> int:
        taken = 0
        while taken < len(octets) and not self.done:
            part = octets[taken : taken + self._wanted - len(self._answer)]
            taken += len(part)
            self._answer += part
            if len(self._answer) == self._wanted == _LENGTH:
                length = int.from_bytes(self._answer, "little")
                if length > MAX_ANSWER:
                    raise HostError(f"its answer claims {length} octets")
                self._wanted += length
            if len(self._answer) == self._wanted:
                check_answer(self._answer[_LENGTH:])
                self.done = True
        return taken


class TunnelHandshake(Handshake):
    """See the module."""

    def __init__(self, proxy: TcpProxy, flow: TcpFlow, tunnel: Tunnel) -> None:
        super().__init__(proxy, flow, Question(tunnel))
        self._path = tunnel.path
        self._retry_s = RETRY_S

    def start(self, now: float) -> None:
        """Connect, and ask; again when the program's queue was full, as perhaps it has room by now."""
        try:
            number = self._sock.connect_ex(self._path)
            if number in _LATER:
                self._proxy.timers.arm(now + self._retry_s, self)
                self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)
                return
            if number not in _CONNECTED:
                raise OSError(number, _words(number))
            self._say()
            self._watch(write=bool(self._to_say))
        except (OSError, HostError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        self._proxy.connect_failed(self._flow, 0, f"tunnel {self._path}: {reason}")


def _words(number: int) -> str:
    """An errno for people who look for what to do."""
    if number == errno.ENOENT:
        return "no such socket"
    if number == errno.ECONNREFUSED:
        return "nobody listens"
    return errno.errorcode.get(number, str(number))
