"""A SOCKS5 client's side of CONNECT (RFC 1928, RFC 1929), without I/O.

    we: 5, methods          it: 5, method       0: none, 2: user and password, 255: neither
    we: 1, user, password   it: 1, 0            where it chose method 2
    we: 5, 1, 0, address    it: 5, reply, 0, address

Nothing is said ahead of its turn: proxies differ in whether they read on. Bound: the longest reply has 262 octets.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from netstack.api import Endpoint
from netstack.errors import HostError
from netstack.host.handshake import Refused

_VERSION: Final = 5
_NONE, _PASSWORD, _UNACCEPTABLE = 0, 2, 255  # RFC 1928 3
_ADDRESS_OCTETS: Final = {1: 4, 4: 16}
_NAME: Final = 3
_REPLIES: Final = {  # RFC 1928 6; the errno is that of a direct connect that fails so
    1: ("general failure", 0),
    2: ("not allowed by its rules", errno.EACCES),
    3: ("network unreachable", errno.ENETUNREACH),
    4: ("host unreachable", errno.EHOSTUNREACH),
    5: ("connection refused", errno.ECONNREFUSED),
    6: ("TTL expired", errno.EHOSTUNREACH),
    7: ("it cannot connect", 0),
    8: ("it does not know this type of address", 0),
}


def address(endpoint: Endpoint, name: str) -> bytes:
    """ATYP, DST.ADDR and DST.PORT: by `name` where there is one that fits (RFC 1928 5)."""
    port = endpoint.port.to_bytes(2, "big")
    octets = name.encode("ascii", "replace")
    if 1 <= len(octets) <= 255:
        return bytes((_NAME, len(octets))) + octets + port
    return (b"\1" if len(endpoint.address) == 4 else b"\4") + endpoint.address + port


class Socks5:
    """An `Exchange`; raises `Refused` for what the proxy refuses and `HostError` for what is no SOCKS5."""

    def __init__(self, endpoint: Endpoint, name: str = "", user: bytes = b"", password: bytes = b"") -> None:
        self.done = False
        self._endpoint = endpoint
        self._name = name
        self._user = user
        self._password = password
        self._to_say = bytes((_VERSION, 2, _NONE, _PASSWORD)) if user else bytes((_VERSION, 1, _NONE))
        self._heard = b""
        self._steps = self._converse()
        self._wanted = next(self._steps)

    def say(self) -> bytes:
        said, self._to_say = self._to_say, b""
        return said

    def hear(self, octets: bytes) -> int:
        taken = 0
        while taken < len(octets) and not self.done and not self._to_say:
            part = octets[taken : taken + self._wanted - len(self._heard)]
            taken += len(part)
            self._heard += part
            if len(self._heard) == self._wanted:
                try:
                    more = next(self._steps)
                    self._wanted += more
                except StopIteration:
                    self.done = True
        return taken

    def _take(self) -> bytes:
        """What was waited for."""
        heard, self._heard, self._wanted = self._heard, b"", 0
        return heard

    def _converse(self) -> Iterator[int]:
        """Yields how many more octets must be there to go on."""
        yield 2
        version, method = self._take()
        if version != _VERSION:
            raise HostError(f"no SOCKS5: it answers with version {version}")
        if method == _PASSWORD and self._user:
            user, password = self._user, self._password
            self._to_say = bytes((1, len(user))) + user + bytes((len(password),)) + password
            yield 2
            _version, status = self._take()  # some say 5 here, and curl takes anything
            if status:
                raise Refused("it does not accept the user and password")
        elif method == _UNACCEPTABLE:
            raise Refused("it asks for credentials" if not self._user else "it accepts none of our ways to log in")
        elif method != _NONE:
            raise HostError(f"it chose method {method}, which was not offered")
        self._to_say = bytes((_VERSION, 1, 0)) + address(self._endpoint, self._name)
        yield 2
        version, reply = self._heard
        if version != _VERSION:
            raise HostError(f"no SOCKS5: it replies with version {version}")
        if reply:
            words, number = _REPLIES.get(reply, (f"reply {reply}", 0))
            raise Refused(words, number)
        yield 2
        kind = self._heard[3]
        if kind == _NAME:
            yield 1
            yield self._heard[4] + 2
        elif kind in _ADDRESS_OCTETS:
            yield _ADDRESS_OCTETS[kind] + 2
        else:
            raise HostError(f"its reply has an address of type {kind}")
