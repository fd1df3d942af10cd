"""An HTTP client's side of CONNECT (RFC 9110 9.3.6), without I/O.

The head of the answer ends with an empty line; what is behind it belongs to the connection, whatever Content-Length or
Transfer-Encoding say of a 2xx answer (9.3.6). Interim answers (1xx) may come before. Anything but 2xx refuses.

Bound: `MAX_HEAD` octets of heads.
"""

from __future__ import annotations

import base64
import re
from typing import Final

from netstack.api import Endpoint
from netstack.errors import HostError
from netstack.host.handshake import Refused

MAX_HEAD: Final = 16 << 10
_END: Final = re.compile(rb"\r?\n\r?\n")  # RFC 9112 2.2: a lone LF may be taken for the end of a line
_STATUS: Final = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9][0-9])(?: |\r?\n|$)")
_WORDS: Final = {
    403: "it forbids the destination",
    407: "it asks for other credentials",
    502: "bad gateway: it cannot connect",
    503: "it is overloaded, or cannot connect",
    504: "gateway timeout: it cannot connect",
}


def request(endpoint: Endpoint, name: str = "", user: bytes = b"", password: bytes = b"") -> bytes:
    """The CONNECT for `endpoint`, by `name` where there is one."""
    target = f"{name}:{endpoint.port}" if name else str(endpoint)
    lines = [f"CONNECT {target} HTTP/1.1".encode(), f"Host: {target}".encode()]
    if user or password:
        lines.append(b"Proxy-Authorization: Basic " + base64.b64encode(user + b":" + password))  # RFC 7617 2
    return b"\r\n".join((*lines, b"", b""))


class HttpConnect:
    """An `Exchange`; raises `Refused` for an answer that is not 2xx and `HostError` for what is no HTTP."""

    def __init__(self, endpoint: Endpoint, name: str = "", user: bytes = b"", password: bytes = b"") -> None:
        self.done = False
        self._to_say = request(endpoint, name if name.isascii() else "", user, password)
        self._asked_as = bool(user)
        self._head = b""
        self._octets = 0

    def say(self) -> bytes:
        said, self._to_say = self._to_say, b""
        return said

    def hear(self, octets: bytes) -> int:
        before = len(self._head)
        self._head += octets
        if not b"HTTP/1.".startswith(self._head[:7]):
            raise HostError("its answer is no HTTP/1")
        end = _END.search(self._head, max(before - 3, 0))
        taken = len(octets) if end is None else end.end() - before
        self._octets += taken
        if self._octets > MAX_HEAD:
            raise HostError(f"its answer has a head of more than {MAX_HEAD} octets")
        if end is not None:
            self._check(self._head[: end.end()])
            self._head = b""
        return taken

    def _check(self, head: bytes) -> None:
        status = _STATUS.match(head)
        if status is None:
            raise HostError("its answer has no status")
        code = int(status[1])
        if code // 100 == 2:
            self.done = True
        elif code // 100 != 1 or code == 101:
            words = _WORDS.get(code, "")
            if code == 407 and not self._asked_as:
                words = "it asks for credentials"
            raise Refused(f"status {code}" + (f", {words}" if words else ""))
