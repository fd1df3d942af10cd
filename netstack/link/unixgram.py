"""One datagram, one frame: vfkit, Virtualization.framework, krunkit, QEMU `dgram`, and UML's seqpacket ("bess").

Three classes. `DatagramLink` has a socket of its own, connected to its peer (a socketpair, an inherited descriptor, an
accepted SOCK_SEQPACKET connection). `UnixgramServer` is bound to a path and makes a link for every peer that sends to
it. A datagram socket cannot be accepted from: all peers share the one bound socket, and because some peers connect to
it, every answer must leave from it. Hence two kinds of link at a server:

* the *first* peer's `PeerLink` reads the shared socket itself, 32 datagrams in a row, no copy; that is the usual case;
* a datagram of somebody else is passed on by the server through a socketpair, the other end of which is that peer's own
  descriptor. One copy and two system calls more, and nothing in the stack has to know.

While there is no direct link the server watches its socket in the event loop; a new peer's first datagram is looked at
with MSG_PEEK and stays in the socket for the link to find, unless it is the hello `VFKT` (spec: gvproxy 1.4).

Room at a peer. On Linux a peer that did not connect to our socket (QEMU) has a queue of 10 datagrams, and our socket, which
is connected to nobody, counts as writable while that is full. What the kernel does count is how much of what the socket
sent is unread. So where there is one peer, its full queue makes us narrow the send buffer to the point at which "writable"
means that half of the queue was read: 32 MiB to QEMU in 1.3 instead of 5.3 s, and no asking while a machine is paused. A
second socket, connected to the peer, would know as well, but a peer may look at where its frames come from. Of several peers one
that does not read would hold up the others: they are asked every 2 ms (`stack.RETRY_S`).

A peer that is gone shows when we send to it (ECONNREFUSED, ENOENT), or when the next one comes: then each known one is
probed. The server socket stays, and the peer may come back without a word (threats F3).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from netstack.api import Frame
from netstack.errors import LinkDown
from netstack.link.common import ETHERNET_HEADER, LARGEST_FRAME, only_busy
from netstack.observe.metrics import Counters, Drop

log = logging.getLogger("pyvpnkit.link")

Address: TypeAlias = str | bytes
"""A bound path, or an abstract name as bytes; `""` and `None` stand for a socket without a name."""

HELLO: Final = b"VFKT"
BATCH: Final = 32
SEND_BUFFER: Final = 1 << 20
RECEIVE_BUFFER: Final = 4 << 20
MAX_PEERS: Final = 16
"""Peers of one server socket; a datagram from one more is dropped and counted."""


def _is_hello(datagram: memoryview) -> bool:
    return len(datagram) == len(HELLO) and datagram.tobytes() == HELLO


def _widen(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def _unread(sock: socket.socket) -> int:
    """Octets (with the kernel's own) that were sent from `sock` and that nobody has read yet; 0 where that is not told."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


class DatagramLink:
    """A `Link` over a connected datagram or seqpacket socket, which becomes its own. No headroom."""

    headroom = 0
    tso = 0
    partial_checksums = False

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        mtu: int,
        *,
        counters: Counters | None = None,
        max_frame: int = LARGEST_FRAME,
    ) -> None:
        _widen(sock)
        self.name = name
        self.mtu = mtu
        self.max_frame = max_frame
        self._counters = counters if counters is not None else Counters()
        self._sock = sock
        self._ends = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_SEQPACKET
        # One octet more than the largest frame: a longer datagram is cut there, and so it shows.
        # Pages of the map become resident as they are used: 32 of 1500-octet frames, not 2 MiB, for most peers.
        stride = -(-(max_frame + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = memoryview(mmap.mmap(-1, BATCH * stride))
        self._views = [pages[at : at + max_frame + 1] for at in range(0, BATCH * stride, stride)]

    def fileno(self) -> int:
        return self._sock.fileno()

    def prefix(self, octets: int) -> bytes:
        return b""

    def receive(self) -> Sequence[memoryview]:
        """See `Link`. At most 32 datagrams."""
        frames: list[memoryview] = []
        receive, largest = self._sock.recv_into, self.max_frame
        for view in self._views:
            try:
                octets = receive(view)
            except OSError as error:
                if not frames:  # otherwise the frames first; the next call meets the same error
                    only_busy(self.name, error)
                break
            if ETHERNET_HEADER <= octets <= largest:
                frames.append(view[:octets])
            elif octets or not self._ends:
                self._misfit(view, octets)
            elif frames:
                break
            else:
                raise LinkDown(f"{self.name}: closed by the peer")
        return frames

    def _misfit(self, view: memoryview, octets: int) -> None:
        if not _is_hello(view[:octets]):
            self._counters.drops[Drop.FRAME_SHORT if octets < ETHERNET_HEADER else Drop.FRAME_LONG] += 1

    def send(self, frames: Sequence[Frame]) -> int:
        """See `Link`. A full queue at the peer leaves the rest of the frames to the caller."""
        limit = ETHERNET_HEADER + self.mtu
        for index, frame in enumerate(frames):
            if sum(map(len, frame)) > limit:
                self._counters.drops[Drop.FRAME_LONG] += 1
                continue
            try:
                self._send(frame)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    only_busy(self.name, error)
                    return index
                self._counters.drops[Drop.FRAME_LONG] += 1  # more than the send buffer can ever hold
        return len(frames)

    def _send(self, frame: Frame) -> None:
        self._sock.sendmsg(frame)

    def flush(self) -> bool:
        """See `Link`; nothing is ever kept here."""
        return True

    def close(self) -> None:
        """Let go of the socket; harmless when repeated."""
        self._sock.close()


class PeerLink(DatagramLink):
    """The link to one peer of a `UnixgramServer`; the server makes it.

    Where the peer did not connect to our socket and is not the only one, the socket counts as writable even while the
    peer's queue is full: who waits for room must not try again at once.
    """

    def __init__(
        self, server: UnixgramServer, peer: Address, name: str, *, own: socket.socket | None, max_frame: int
    ) -> None:
        self._server: UnixgramServer | None = server
        self.peer = peer
        self.direct = own is None
        shared = server.sock
        super().__init__(
            shared if own is None else own, name, server.mtu, counters=server.counters, max_frame=max_frame
        )
        self._shared = shared
        self._before = _unread(shared)

    def receive(self) -> Sequence[memoryview]:
        """See `Link`. At most 32 datagrams of the shared socket; those of other peers are passed on."""
        if not self.direct:
            return super().receive()
        server, peer, largest = self._server, self.peer, self.max_frame
        frames: list[memoryview] = []
        if server is None:
            return frames
        receive = self._shared.recvfrom_into
        for view in self._views:
            try:
                octets, source = receive(view)
            except OSError as error:
                if not frames:
                    only_busy(self.name, error)
                break
            if source != peer:
                server.pass_on(source, view[:octets])
            elif ETHERNET_HEADER <= octets <= largest:
                frames.append(view[:octets])
            else:
                self._misfit(view, octets)
        return frames

    def _send(self, frame: Frame) -> None:
        try:
            self._shared.sendmsg(frame, (), 0, self.peer)
        except BlockingIOError:
            if self._server is not None:
                self._server.narrow(self._before)
            raise

    def close(self) -> None:
        """Forget the peer; the server's socket stays, and the peer's next datagram makes a new link."""
        server, self._server = self._server, None
        if server is not None:
            if not self.direct:
                self._sock.close()
            server.forget(self)


class UnixgramServer:
    """Learns the peers of a bound datagram socket, which becomes its own, and makes a link for each.

    `appeared(link)` is called for each new peer. `gone(link, reason)` is called for a peer that was found dead while
    another one came; whoever gets it closes the link. Both are called from the event loop it was `start`ed in, never
    from inside a link's `receive`.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        mtu: int,
        *,
        appeared: Callable[[PeerLink], None],
        gone: Callable[[PeerLink, str], None],
        counters: Counters | None = None,
        max_frame: int = LARGEST_FRAME,
        label: Callable[[], str] | None = None,
    ) -> None:
        _widen(sock)
        self.sock = sock
        self.name = name
        self.mtu = mtu
        self.counters = counters if counters is not None else Counters()
        self.max_frame = max_frame
        self._label = label if label is not None else lambda: name
        self._appeared = appeared
        self._gone = gone
        self._links: dict[Address, PeerLink] = {}
        self._carriers: dict[Address, socket.socket] = {}
        """Our ends of the socketpairs of the links that do not read the shared socket themselves."""
        self._direct: PeerLink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nameless = False
        self._scratch = memoryview(bytearray(max_frame + 1))

    def start(self) -> None:
        """Watch the socket in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.sock.fileno(), self._readable)

    def close(self) -> None:
        """Stop, and close the socket and what links are left."""
        if self._loop is not None and self._direct is None:
            self._loop.remove_reader(self.sock.fileno())
        self._loop = None
        for link in tuple(self._links.values()):
            link.close()
        self.sock.close()

    def narrow(self, before: int) -> None:
        """The queue of a peer is full: let the socket be writable again when half of what waits there is read.

        `before` octets wait elsewhere, perhaps for ever.
        """
        if len(self._links) == 1:  # of several one that does not read would hold up the others
            self._set_send_buffer(max(_unread(self.sock) + before, self.mtu))

    def _set_send_buffer(self, octets: int) -> None:
        """The kernel takes twice as much, and calls a socket writable while a quarter of that, or less, is unread."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, octets)

    def forget(self, link: PeerLink) -> None:
        """Called by a link that is closed."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            carrier = self._carriers.pop(link.peer, None)
            if carrier is not None:
                carrier.close()
        if self._direct is link:
            self._direct = None
            if self._loop is not None:
                self._loop.add_reader(self.sock.fileno(), self._readable)

    def _readable(self) -> None:
        """Nobody reads the socket directly: look for a new peer, and serve those that have a carrier."""
        for _ in range(BATCH):
            try:
                octets, source = self.sock.recvfrom_into(self._scratch, 0, socket.MSG_PEEK)
                if source in self._links or not source or _is_hello(self._scratch[:octets]) or not self._room():
                    octets, source = self.sock.recvfrom_into(self._scratch)
                    self.pass_on(source, self._scratch[:octets])
                else:
                    self._lead(source)
            except OSError as error:
                self._report(error)
                return
            if self._direct is not None:
                return

    def _report(self, error: OSError) -> None:
        try:
            only_busy(self.name, error)
        except LinkDown as down:  # an error of a former send, at most; the socket itself has no peer to lose
            log.warning("%s", down)

    def _lead(self, source: Address) -> None:
        """The first peer: from now on its link reads the socket."""
        if self._loop is not None:
            self._loop.remove_reader(self.sock.fileno())
        self._direct = link = PeerLink(self, source, self._label(), own=None, max_frame=self.max_frame)
        self._links[source] = link
        self._soon(self._announce, link)

    def _soon(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            self._loop.call_soon(call, *arguments)

    def _announce(self, link: PeerLink) -> None:
        if self._links.get(link.peer) is not link:
            return
        direct = link is self._direct
        self._appeared(link)
        if (
            direct and link.peer not in self._links
        ):  # not wanted, nor is what it came with: otherwise it came at once again
            self.counters.drops[Drop.LINK_FULL] += 1
            with contextlib.suppress(OSError):
                self.sock.recv_into(self._scratch)

    def _part(self, link: PeerLink) -> None:
        if self._links.get(link.peer) is link:
            self._gone(link, f"{link.name}: the peer's socket is gone")

    def pass_on(self, source: Address | None, datagram: memoryview) -> None:
        """A datagram that the reader of the socket found not to be its own. `datagram` is copied."""
        if not source:
            self.counters.drops[Drop.LINK_GONE] += 1
            if not self._nameless:
                self._nameless = True
                log.warning("%s: a peer without an address cannot be answered; it must bind its socket", self.name)
            return
        if source not in self._links:
            if not self._room():
                self.counters.drops[Drop.LINK_FULL] += 1
                return
            self._add(source)
        if source in self._carriers and not _is_hello(datagram):
            try:
                self._carriers[source].send(datagram)
            except OSError:  # its owner does not read; a datagram socket may lose datagrams
                self.counters.drops[Drop.LINK_FULL] += 1

    def _add(self, source: Address) -> None:
        """One more peer, with a descriptor of its own; first the hello of a lone one, which then leads."""
        if self._direct is None:
            self._lead(source)
            return
        carrier, own = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        _widen(carrier)
        link = PeerLink(self, source, self._label(), own=own, max_frame=self.max_frame)
        self._links[source] = link
        self._set_send_buffer(SEND_BUFFER)
        self._carriers[source] = carrier
        self._soon(self._announce, link)

    def _room(self) -> bool:
        """Whether one more peer may come; those that are no more are parted with soon."""
        present = 0
        for link in self._links.values():
            if alive(link.peer):
                present += 1
            else:
                self._soon(self._part, link)
        return present < MAX_PEERS and len(self._links) < 2 * MAX_PEERS


def alive(peer: Address) -> bool:
    """Whether a socket is bound to `peer`, found by connecting one; nothing is sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(peer)
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
