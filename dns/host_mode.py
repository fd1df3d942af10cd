"""VPNKit's Host mode (spec vpnkit 4.1 step 3): names are looked up by the host's own resolver library, getaddrinfo(3).

So the guest sees what programs on the host see: split DNS of macOS, NSS modules, mDNS. `HostMode` is a `dns.servers.Asker` that
answers A, AAAA and PTR. Other types cannot be put to getaddrinfo and are relayed by `other` if there is one; else SVCB and HTTPS
have no records (clients ask them beside A and must not be kept waiting or led to think that the name does not exist), and the
rest is NOTIMP, which says the truth. TTL is 0: the library does not tell it.

getaddrinfo blocks, for a dead server some 10 s to 30 s. Each look-up that runs has a thread of its own, of which there are
`threads`; those asked for again meanwhile share it, and the others wait in a queue of `waiting`, beyond which the answer is
SERVFAIL. One domain (the last two labels) may hold half of the threads and of the queue: the names of a VPN that has gone never
block all others. A look-up that nobody waits for any longer and that has not begun is dropped. Threads are daemons, so that
none holds up the end of the process.

Names of one label go to the library as they are, to be found in its search domains as on the host; others end in a dot, so
that its search domains are not tried: the guest has them by DHCP, and does that itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Final

from dns import codec
from dns.codec import AAAA, HTTPS, IN, PTR, SVCB, A, Record
from dns.hosts import address_of_reverse
from dns.servers import Asker
from netstack.errors import HostError, Malformed

THREADS: Final = 16
MAX_WAITING: Final = 512
MAX_ADDRESSES: Final = 64
"""Of one name; more would not fit an answer that anyone uses."""
TTL_S: Final = 0

_ABSENT: Final = frozenset(
    getattr(socket, name) for name in ("EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name)
)  # the name exists, without an address of this family

_LOCALHOST_LOCAL: Final = codec.wire_name("localhost.local")

GetAddrInfo = Callable[[str, int], list[bytes]]
"""Addresses (4 or 16 octets) of a name and a family; raises `socket.gaierror`."""
GetNameInfo = Callable[[bytes], str]
"""The name of an address; raises `socket.gaierror`."""


def getaddrinfo(name: str, family: int) -> list[bytes]:
    """The host's own, blocking."""
    found: list[bytes] = []
    for entry in socket.getaddrinfo(name.encode("latin-1"), None, family, socket.SOCK_STREAM):
        address = socket.inet_pton(entry[0], str(entry[4][0]).partition("%")[0])
        if address not in found and len(found) < MAX_ADDRESSES:
            found.append(address)
    return found


def getnameinfo(address: bytes) -> str:
    """The host's own, blocking."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    return socket.getnameinfo((socket.inet_ntop(family, address), 0), socket.NI_NAMEREQD)[0]


_Found = tuple[int, list[Record]]
"""The rcode and the records."""


class _LookUp:
    __slots__ = ("domain", "done", "key", "qtype", "waiters")

    def __init__(self, key: bytes, qtype: int, done: asyncio.Future[_Found]) -> None:
        self.key = key
        self.qtype = qtype
        self.domain = _domain(key)
        self.done = done
        self.waiters = 0


class HostMode:
    """See the module; used from one event loop. `counters` is shared with the caller."""

    def __init__(
        self,
        counters: Counter[str] | None = None,
        *,
        other: Asker | None = None,
        threads: int = THREADS,
        waiting: int = MAX_WAITING,
        addresses_of: GetAddrInfo = getaddrinfo,
        name_of: GetNameInfo = getnameinfo,
    ) -> None:
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._other = other
        self._threads = threads
        self._share = max(1, threads // 2)
        self._max_waiting = waiting
        self._addresses_of = addresses_of
        self._name_of = name_of
        self._look_ups: dict[tuple[bytes, int], _LookUp] = {}
        self._waiting: dict[tuple[bytes, int], _LookUp] = {}
        self._running: Counter[str] = Counter()
        self._closed = False

    @property
    def running(self) -> int:
        """Look-ups that have a thread, at most `threads`."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Look-ups that wait for a thread."""
        return len(self._waiting)

    async def ask(self, query: bytes, end: int) -> bytes:
        """See `dns.servers.Asker`. How long it takes is up to the host's library: the caller limits it."""
        if self._closed:
            raise HostError("dns: getaddrinfo mode is closed")
        qtype, qclass = codec.question(query, end)
        if qclass != IN or qtype not in (A, AAAA, PTR):
            return await self._ask_other(query, end, qtype, qclass)
        key = codec.key(query, end)
        if key == _LOCALHOST_LOCAL:  # as VPNKit: a host with mDNS would look for it in the neighbourhood
            return _answer(query, end, (codec.NXDOMAIN, []))
        look_up = self._look_ups.get((key, qtype))
        if look_up is None:
            look_up = _LookUp(key, qtype, asyncio.get_running_loop().create_future())
            if self._over_limit(look_up.domain):
                self.counters["getaddrinfo_over_limit"] += 1
                return _answer(query, end, (codec.SERVFAIL, []))
            self._look_ups[key, qtype] = self._waiting[key, qtype] = look_up
            self._start()
        look_up.waiters += 1
        try:
            return _answer(query, end, await asyncio.shield(look_up.done))
        finally:
            look_up.waiters -= 1
            if not look_up.waiters and self._waiting.get((key, qtype)) is look_up:
                self._forget(look_up)

    def renew(self) -> None:
        """Look-ups that run cannot be taken back; who asks for their names waits for them."""
        if self._other is not None:
            self._other.renew()

    def close(self) -> None:
        """Look-ups that run are left to end by themselves; who waits for one gets `HostError`."""
        self._closed = True
        for look_up in self._look_ups.values():
            if not look_up.done.done():
                look_up.done.set_exception(HostError("dns: getaddrinfo mode is closed"))
                look_up.done.exception()  # it may be that nobody waits
        self._look_ups.clear()
        self._waiting.clear()
        if self._other is not None:
            self._other.close()

    async def _ask_other(self, query: bytes, end: int, qtype: int, qclass: int) -> bytes:
        if self._other is not None:
            return await self._other.ask(query, end)
        code = codec.NOERROR if qclass == IN and qtype in (SVCB, HTTPS) else codec.NOTIMP
        return _answer(query, end, (code, []))

    def _over_limit(self, domain: str) -> bool:
        """Whether another look-up of `domain` could neither begin now nor wait."""
        if self.running < self._threads and self._running[domain] < self._share:
            return False
        waiting = len(self._waiting)
        if waiting < self._max_waiting // 2:
            return False
        of_domain = sum(other.domain == domain for other in self._waiting.values())
        return waiting >= self._max_waiting or of_domain >= self._max_waiting // 2

    def _forget(self, look_up: _LookUp) -> None:
        place = look_up.key, look_up.qtype
        self._waiting.pop(place, None)
        if self._look_ups.get(place) is look_up:
            del self._look_ups[place]

    def _start(self) -> None:
        """Give free threads to those that wait, in their order; names of a domain with its share of threads stand aside."""
        if self.running >= self._threads:
            return
        for place, look_up in list(self._waiting.items()):
            if self._running[look_up.domain] >= self._share:
                continue
            del self._waiting[place]
            self._running[look_up.domain] += 1
            self.counters["getaddrinfo"] += 1
            loop = asyncio.get_running_loop()
            try:
                threading.Thread(target=self._run, args=(loop, look_up), name="getaddrinfo", daemon=True).start()
            except RuntimeError:  # the host lets us have no more threads
                self._ended(look_up, (codec.SERVFAIL, []))
                return
            if self.running >= self._threads:
                return

    def _run(self, loop: asyncio.AbstractEventLoop, look_up: _LookUp) -> None:
        """In a thread of its own."""
        found = self._look_up(look_up.key, look_up.qtype)
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it everybody who waited
            loop.call_soon_threadsafe(self._ended, look_up, found)

    def _ended(self, look_up: _LookUp, found: _Found) -> None:
        self._running[look_up.domain] -= 1
        if not self._running[look_up.domain]:
            del self._running[look_up.domain]
        self._forget(look_up)
        if not look_up.done.done():
            look_up.done.set_result(found)
        if not self._closed:
            self._start()

    # In a thread

    def _look_up(self, key: bytes, qtype: int) -> _Found:
        try:
            return self._pointer(key) if qtype == PTR else self._addresses(key, qtype)
        except socket.gaierror as error:
            return _code(error), []
        except (OSError, ValueError):
            return codec.SERVFAIL, []

    def _addresses(self, key: bytes, qtype: int) -> _Found:
        name = _text(key)
        if name is None:
            return codec.NXDOMAIN, []
        family, octets = (socket.AF_INET, 4) if qtype == A else (socket.AF_INET6, 16)
        try:
            found = self._addresses_of(name, family)
        except socket.gaierror as error:
            if _code(error) != codec.NXDOMAIN:
                raise
            # Libraries that do not tell a name without such addresses from no such name: the other family tells.
            self._addresses_of(name, socket.AF_UNSPEC)
            return codec.NOERROR, []
        return codec.NOERROR, [Record(qtype, TTL_S, address) for address in found if len(address) == octets]

    def _pointer(self, key: bytes) -> _Found:
        address = address_of_reverse(key)
        if address is None:
            return codec.NXDOMAIN, []
        try:
            name = codec.wire_name(self._name_of(address))
        except Malformed:
            return codec.SERVFAIL, []
        return codec.NOERROR, [Record(PTR, TTL_S, name)]


def _code(error: socket.gaierror) -> int:
    if error.errno == socket.EAI_NONAME:
        return codec.NXDOMAIN
    return codec.NOERROR if error.errno in _ABSENT else codec.SERVFAIL


def _answer(query: bytes, end: int, found: _Found) -> bytes:
    return codec.answer(query, end, found[1], code=found[0], authoritative=False)


def _labels(key: bytes) -> list[str]:
    labels, at = [], 0
    while length := key[at]:
        labels.append(key[at + 1 : at + 1 + length].decode("latin-1"))
        at += length + 1
    return labels


def _domain(key: bytes) -> str:
    return ".".join(_labels(key)[-2:])


def _text(key: bytes) -> str | None:
    """The name as getaddrinfo takes it; `None` for one that cannot be said to it, or that it would take for an address."""
    labels = _labels(key)
    if not labels or any("." in label or not label.isascii() or min(label) <= " " for label in labels):
        return None
    if all(label.isdecimal() or label.startswith("0x") for label in labels):
        return None  # 127.1 and 0x7f000001 are addresses to inet_aton(3)
    return labels[0] if len(labels) == 1 else ".".join(labels) + "."
