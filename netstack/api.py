"""The seams: what links offer the stack, and what services (DNS, NTP, port forwarding) program against.

Nothing here imports the rest of the project. Times are seconds on a clock that never goes back; addresses inside the stack
are `bytes` in network order (4 octets for IPv4), ports are ints.
"""

from __future__ import annotations

import asyncio
import enum
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

Clock: TypeAlias = Callable[[], float]
"""Monotonic seconds: `time.monotonic`, or a test's own."""

Buffer: TypeAlias = bytes | bytearray | memoryview

Frame: TypeAlias = tuple[Buffer, ...]
"""One frame to send, scattered: the concatenation is the link's `headroom` octets, then the Ethernet frame without FCS."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address and a port; `address` in network order."""

    address: bytes
    port: int

    @classmethod
    def of(cls, text: str, port: int) -> Endpoint:
        """`Endpoint.of("192.168.65.3", 80)`; raises `OSError` when the text is no numeric address."""
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        return cls(socket.inet_pton(family, text), port)

    @property
    def text(self) -> str:
        """The address alone as text."""
        return socket.inet_ntop(socket.AF_INET if len(self.address) == 4 else socket.AF_INET6, self.address)

    def __str__(self) -> str:
        return f"[{self.text}]:{self.port}" if len(self.address) == 16 else f"{self.text}:{self.port}"


READABLE: Final = 1
"""What a descriptor is ready for, as masks of `Ready`: reading (epoll's own number) ..."""
ROOM: Final = 4
"""... and writing."""

Ready: TypeAlias = Callable[[int], None]
"""Called with the mask of what is ready."""


class Watch(Protocol):
    """Who notices that descriptors are ready (`netstack.host.io`), as links of several descriptors use it."""

    def watch(self, fd: int, ready: Ready) -> None:
        """Call `ready(mask)` each time `fd` becomes readable, also when it was before."""
        ...

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; before it is closed."""
        ...


class Room(Protocol):
    """Room for one frame in the memory of a link's peer. It is used at once, by `sent`, or not at all."""

    octets: int
    """For so many octets, headroom included."""
    at: int

    @property
    def buffer(self) -> memoryview | None:
        """The headers go to `at` in it; `None` where they lie in pieces, for `write`."""
        ...

    def read(self, source: Any, offset: int) -> int | None:
        """Fill what is behind the headers from `offset` of `source` on (`netstack.host.octets`); as its `read`."""
        ...

    def write(self, octets: memoryview) -> None:
        """The first octets of the frame."""
        ...

    def sent(self, octets: int) -> None:
        """The frame is there, and has so many octets."""
        ...


@runtime_checkable
class Link(Protocol):
    """A pipe for batches of Ethernet frames to one guest (or to the hypervisor that runs it).

    Every frame, both ways, begins with `headroom` octets that belong to the link: the length prefix of a stream, the
    virtio-net header of a TAP, nothing on a datagram socket. So a sender builds a frame with its prefix in one go and a
    receiver parses at a fixed offset. A link never blocks and never raises for a bad frame; `LinkDown` says the peer is gone.

    What some links have besides, and the stack asks for by name:

    * `receive_trains() -> list`: as `receive`, but what belongs together comes together (`netstack.link.trains.Train`: equal
      segments side by side; `Scattered` of `netstack.link.vhost_user.link`: one long frame in pieces).
    * `send_one(frame) -> bool`: as `send` for one frame in one piece.
    * `window: int`: octets that a guest's connection may send ahead, where the link's own queue is the bound.
    * `partial_checksums_in: bool`: the same as `partial_checksums` for what arrives, where the two differ.
    * `watch(watch, ready)` and `unwatch()`: it has several descriptors and watches them itself; `fileno` is not watched then.
    * `whole: bool`: what `receive_trains` returned last are single frames, each in one piece.
    * `busy: bool`: look for frames again without being told.
    * `room(octets, lead, key, native) -> Room | None`: room in the peer's own memory to make one frame in.
    * `publish()`: the turn is over; show the peer what was taken and sent.
    """

    name: str
    """`scheme:address` for people and captures."""
    headroom: int
    mtu: int
    """Largest IP datagram in one ordinary frame, octets."""
    max_frame: int
    """Largest Ethernet frame accepted from the peer, octets without headroom."""
    tso: int
    """Largest TCP payload of one super-frame the peer takes (it segments); 0 where every frame must fit the MTU."""
    partial_checksums: bool
    """The headroom is a virtio-net header: checksums may be left to the peer, and may be missing in what arrives."""

    def fileno(self) -> int:
        """The descriptor that becomes readable when frames wait."""
        ...

    def receive(self) -> Sequence[memoryview]:
        """Frames that wait, prefix included, at most one batch; empty when there is none. Raises `LinkDown`.

        The views are valid until the next call of `receive`.
        """
        ...

    def send(self, frames: Sequence[Frame]) -> int:
        """Hand over frames in order; return how many were taken (less when the peer does not read). Raises `LinkDown`.

        Views may be reused by the caller after the call: a link copies what it must keep. A frame the peer can never take
        counts as taken and is counted as a drop.
        """
        ...

    def flush(self) -> bool:
        """Push what `send` kept back; `True` when nothing is left. Called when the descriptor is writable again."""
        ...

    def prefix(self, octets: int) -> bytes:
        """The `headroom` octets for a complete ordinary frame of `octets` octets (checksums filled in, no offload)."""
        ...

    def close(self) -> None: ...


Reply: TypeAlias = Callable[[bytes], None]
"""Send one datagram back to the asker; harmless after the asker is gone."""

DatagramHandler: TypeAlias = Callable[[bytes, Endpoint, Reply], None]
"""`handler(payload, source, reply)`: may keep `reply` and call it later, from the event loop."""

StreamHandler: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Endpoint], Awaitable[None]]
"""`handler(reader, writer, source)` serves one TCP connection of a guest; its task is held by the stack."""

SocketHandler: TypeAlias = Callable[[socket.socket, Endpoint], None]
"""`handler(sock, source)` owns the connected, non-blocking stream socket of one TCP connection of a guest."""

Intercept: TypeAlias = Callable[[Endpoint], SocketHandler | None]
"""Who is to serve a guest's TCP connection to this destination in its place; `None` where nobody is. Must not raise."""


class Services(Protocol):
    """What a service on one of the network's own addresses needs: the gateway's DNS, NTP, and what later comes there."""

    def serve_datagrams(self, address: bytes, port: int, handler: DatagramHandler) -> None: ...

    def serve_streams(self, address: bytes, port: int, handler: StreamHandler) -> None: ...

    def serve_sockets(self, address: bytes, port: int, handler: SocketHandler) -> None: ...


class Dialer(Protocol):
    """Connections into the guest, from the host side."""

    def dial(
        self,
        guest: Endpoint,
        sock: socket.socket,
        *,
        source: Endpoint | None = None,
        on_close: Callable[[str], None] | None = None,
        preface: bytes = b"",
    ) -> None:
        """Carry a connected host stream socket into the guest as a new TCP connection to `guest`.

        The stack owns `sock` from here on. The guest sees `source` (default, and where that is taken: the gateway and a
        fresh port), and reads `preface` before the octets of `sock`. A refusal resets `sock`. `on_close(reason)` is called
        once, when the flow has ended.
        """
        ...

    def datagrams(self, guest: Endpoint, sock: socket.socket, *, show_client: bool = False) -> Datagrams:
        """Carry the datagrams that arrive at the bound host socket `sock` to `guest`, and its answers back to each peer.

        The guest sees the gateway as source, or with `show_client` the peer's own address where it can be answered there.
        """
        ...


class Datagrams(Protocol):
    """A published UDP port; `close` ends it and its socket."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class GatewayForward:
    """Guests that address the gateway's `port` reach `to` from the host; 127.0.0.1 there is the host's own loopback."""

    protocol: str
    """`tcp` or `udp`."""
    port: int
    to: Endpoint

    def __str__(self) -> str:
        return f"{self.protocol}:{self.port}:{self.to}"


@dataclass(frozen=True, slots=True)
class TunnelRule:
    """Guests' TCP connections to `prefix` at `port` (0: any) go to the program that listens on the unix socket `path`."""

    prefix: IPv4Network | IPv6Network
    port: int
    path: str

    def __str__(self) -> str:
        return f"{self.prefix}:{self.port or '*'} -> {self.path}"


class Way(enum.Enum):
    """A way out without a proxy."""

    DIRECT = "direct"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class OutwardProxy:
    """A proxy through which guests' connections leave the host; neither `str` nor `repr` shows its credentials."""

    scheme: str
    """`socks5`, `socks5h` (the proxy resolves names) or `http` (CONNECT)."""
    host: str
    """A numeric address, or a name that the host resolves."""
    port: int
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def by_name(self) -> bool:
        """It is told names rather than addresses, where they are known."""
        return self.scheme != "socks5"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{'***@' if self.user else ''}{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class WayOutRule:
    """Guests' connections to `prefix`, or to `domain` and below, or to all, at `port` (0: any) leave by `way`."""

    prefix: IPv4Network | IPv6Network | None
    domain: str
    port: int
    way: OutwardProxy | Way

    @property
    def match(self) -> str:
        """What it matches, as text."""
        to = self.domain or (str(self.prefix) if self.prefix is not None else "*")
        to = f"[{to}]" if ":" in to else to
        return f"{to}:{self.port}" if self.port else to

    def __str__(self) -> str:
        return f"{self.match} -> {self.way.value if isinstance(self.way, Way) else self.way}"


class Outgoing(Protocol):
    """Where guests' new flows are led elsewhere; flows that exist go on. From the event loop's thread."""

    def forward_gateway(self, forwards: Sequence[GatewayForward]) -> None:
        """Have these ports of the gateway, in place of those before. The first that matches wins, also over services."""
        ...

    def tunnel(self, rules: Sequence[TunnelRule]) -> None:
        """Have these tunnels, in place of those before. The first that matches wins."""
        ...

    def go_out(self, rules: Sequence[WayOutRule], *, fail_open: bool = False, datagrams: bool = False) -> None:
        """Have these ways out, in place of those before. The first that matches wins; with `fail_open` connections go
        directly where a proxy cannot be reached, with `datagrams` so do datagrams and pings where a rule names a proxy."""
        ...


class Subscriber(Protocol):
    """Takes typed events (`netstack.observe.events`)."""

    def __call__(self, event: Any, /) -> None: ...
