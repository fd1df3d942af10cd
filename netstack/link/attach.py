"""Where links come from and go to: the one path that listens, accepts, dials, shakes hands, loses and cleans up.

Theory of operation. `Attachments` is an async context manager that owns everything between a link URL and the stack:

* listening (a Unix or TCP socket, an inherited one): every accepted peer becomes a link; a lost one is simply gone, and
  the next may come. Several at once are several links. With `once` the first is the only one, and ends the link with it.
* dialling: connect, be a link until it is lost, connect again, with pauses that grow from 0.1 to 2 s (threats F2).
* a bound datagram socket: `UnixgramServer` makes the links.
* vhost-user: a connection is no link yet, it is where the front-end says when the guest's rings run; `VhostUserPeer` makes a
  link of that, and takes it back when they stop, as often as the guest starts anew.
* a device (tap, packet): opened at start, so that a person hears at once why it cannot be; opened again when it is lost
  (threats F20), unless the namespace was named by a process id, which may by then be somebody else's. Such a link ends
  with its process, for our own descriptor would keep the namespace alive without anybody in it.
* an inherited connection: a link until it is lost.

The stack is told by `attach(link, identity)` and tells by `detached(link, reason)` when a link raised `LinkDown`; for an
end that is ours, `detach(port, reason)` is called first. Whichever comes first closes the link, once.

Bounds: 64 handshakes at once, 5 s each, the oldest goes first (threats G12); 256 links and as many vhost-user connections;
without a free descriptor no accept is tried for half a second (N5). All tasks are held in one `TaskGroup`, and nothing outlives
`__aexit__`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol

from netstack.api import Clock, Link
from netstack.errors import ConfigError, GuestError, NetstackError
from netstack.link.common import bare
from netstack.link.devices import open_device
from netstack.link.listening import BACKLOG, UnixSocket, peer_uid
from netstack.link.namespace import process_handle
from netstack.link.spec import DEVICES, ON_STREAM_SOCKETS, Kind, LinkSpec, detect
from netstack.link.stream import QemuLink, VmnetLink
from netstack.link.unixgram import DatagramLink, UnixgramServer
from netstack.link.vmnet import Handshake, Identity, Reserve
from netstack.observe.events import Contained, EventBus, LinkLost, LinkUp
from netstack.observe.metrics import Counters, Drop
from netstack.settings import format_mac, parse_mac

if TYPE_CHECKING:
    from netstack.link.vhost_user.server import VhostUserPeer

log = logging.getLogger("pyvpnkit.link")

HANDSHAKE_S: Final = 5.0
MAX_HANDSHAKES: Final = 64
MAX_LINKS: Final = 256
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_OF_RINGS_S: Final = 1.0
"""For a front-end that was restarted: the link is to be back within two seconds (threats F1)."""
STEADY_S: Final = 5.0
"""A dialled link that lasted so long was a good one: the next pause is the first again."""
CONNECT_S: Final = 10.0
NO_DESCRIPTOR_PAUSE_S: Final = 0.5


class Attach(Protocol):
    def __call__(self, link: Link, identity: str | None, /) -> Any:
        """Take a link into the network; returns its port. Links of one `identity` belong to one guest."""
        ...


def _refuse(_uuid: uuid.UUID, _preferred: bytes | None) -> tuple[bytes, bytes]:
    raise GuestError("No IP addresses available.")


@dataclass(slots=True, eq=False, kw_only=True)
class _Attached:
    """One link that the stack has."""

    link: Link
    identity: Identity | None
    port: Any = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Attachments:
    """The links of one network, while the context is entered.

    `attach` and `detach(port, reason)` are the stack's. `reserve` and `release` are asked for an address and told of the
    end of each vmnet connection. `wrap` may put a capture around each new link. `allowed_uids` may connect to our Unix
    sockets besides our own user and root. Entering raises `ConfigError` for a link that cannot be had.
    """

    def __init__(
        self,
        specs: Sequence[LinkSpec] = (),
        *,
        mtu: int,
        attach: Attach,
        detach: Callable[[Any, str], None],
        reserve: Reserve = _refuse,
        release: Callable[[uuid.UUID], None] = lambda identity: None,
        wrap: Callable[[Link], Link] = lambda link: link,
        counters: Counters | None = None,
        events: EventBus | None = None,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
        allowed_uids: frozenset[int] = frozenset(),
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        self.over = asyncio.Event()
        """Set when the last link is lost and none can come any more."""
        self._specs = tuple(specs)
        self._mtu = mtu
        self._to_stack = attach
        self._from_stack = detach
        self._reserve = reserve
        self._release = release
        self._wrap = wrap
        self._counters = counters if counters is not None else Counters()
        self._events = events if events is not None else EventBus()
        self._clock = clock
        self._rng = rng if rng is not None else random.SystemRandom()
        self._uids = allowed_uids | {0, os.geteuid()}
        self._handshake_s = handshake_s
        self._attached: dict[int, _Attached] = {}
        """By `id` of the link inside its wrappers."""
        self._doors: list[UnixSocket | socket.socket] = []
        self._listening: list[str] = []
        self._servers: list[UnixgramServer] = []
        self._peers: set[VhostUserPeer] = set()
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        self._sources = 0
        self._open = True
        self._complained: dict[str, float] = {}

    # -- the whole

    async def __aenter__(self) -> Attachments:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        try:
            for spec in self._specs:
                self.add(spec)
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        self.stop_accepting()
        for attached in tuple(self._attached.values()):
            self._end(attached, "shutting down")
        for server in self._servers:
            server.close()
        for peer in tuple(self._peers):
            peer.close()
        for door in self._doors:
            door.close()
        self._doors.clear()
        group, self._group = self._group, None
        if group is not None:
            await group.__aexit__(None, None, None)

    def stop_accepting(self) -> None:
        """No new link from now on; those there are go on until the context is left, which also removes the paths."""
        self._open = False
        for task in tuple(self._tasks):
            task.cancel()

    @property
    def links(self) -> list[Link]:
        """The links the stack has, as it has them (wrapped)."""
        return [attached.link for attached in self._attached.values()]

    @property
    def listening(self) -> list[str]:
        """Where a guest can attach now: the URLs, with the port that was chosen where 0 was asked for."""
        return list(self._listening) if self._open else []

    def add(self, spec: LinkSpec) -> None:
        """Begin with one more link. Raises `ConfigError`."""
        self._sources += 1
        if spec.how == "inherited":
            self._inherit(spec)
        elif spec.how == "stdio":
            self._add_stdio(spec)
        elif spec.kind in DEVICES:
            self._add_device(spec)
        elif spec.connect:
            self._start(self._dial(spec))
        elif spec.how == "tcp":
            self._serve(spec, _listen_tcp(spec), ours=False)
        else:
            kind = {"unixgram": socket.SOCK_DGRAM, "bess": getattr(socket, "SOCK_SEQPACKET", None)}.get(
                str(spec.kind), socket.SOCK_STREAM
            )
            if kind is None:
                raise ConfigError(f"link {spec}: this system has no seqpacket sockets; use qemu or unixgram")
            door = UnixSocket(spec.where, kind, setting=f"link {spec}")
            self._doors.append(door)
            self._serve(spec, door.sock, ours=True)

    def adopt(self, link: Link) -> None:
        """Take a link that somebody else opened, and own it. Raises `ConfigError` when the stack would not have it."""
        if self._attach(link) is None:
            raise ConfigError(f"link {link.name}: refused; there are {len(self._attached)} links")

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._group is None:
            work.close()
            raise RuntimeError("Attachments is not entered")
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- one link

    def _attach(self, link: Link, identity: Identity | None = None) -> _Attached | None:
        """Hand a link to the stack; None when it would not have it (the link is then closed)."""
        attached = _Attached(link=self._wrap(link), identity=identity)
        if len(self._attached) >= MAX_LINKS:
            self._complain("limit", f"{link.name}: refused, there are {MAX_LINKS} links")
            self._counters.drops[Drop.LINK_FULL] += 1
            self._close(attached)
            return None
        self._attached[id(bare(link))] = attached  # first: the stack may find it dead at once
        try:
            port = self._to_stack(attached.link, None if identity is None else str(identity.uuid))
        except NetstackError as error:
            self._complain("attach", f"{link.name}: {error}")
            self._attached.pop(id(bare(link)), None)
            self._close(attached)
            return None
        attached.port = port
        if not attached.ended.is_set():
            log.info("%s: connected", link.name)
            self._events.emit(LinkUp(time=self._clock(), link=link.name))
        return attached

    def detached(self, link: Link, reason: str) -> None:
        """The stack has let go of a link, with or without wrappers; harmless when repeated."""
        attached = self._attached.pop(id(bare(link)), None)
        if attached is not None:
            reason = reason.removeprefix(f"{link.name}: ")
            log.info("%s: %s", link.name, reason)
            self._close(attached)
            self._events.emit(LinkLost(time=self._clock(), link=link.name, reason=reason))

    def _end(self, attached: _Attached, reason: str) -> None:
        """An end that the stack does not know of yet."""
        if attached.port is not None:
            self._from_stack(attached.port, reason)
        self.detached(attached.link, reason)

    def _close(self, attached: _Attached) -> None:
        attached.link.close()
        attached.ended.set()
        if attached.identity is not None:
            self._release(attached.identity.uuid)

    def _name(self, spec: LinkSpec) -> str:
        """The URL, and a number where it has several links at once."""
        taken = {attached.link.name for attached in self._attached.values()}
        label, number = spec.label, 1
        name = label
        while name in taken:
            number += 1
            name = f"{label}#{number}"
        return name

    def _socket_link(self, spec: LinkSpec, sock: socket.socket) -> Link:
        kinds: dict[Kind | None, Any] = {"qemu": QemuLink, "vmnet": VmnetLink}
        make = kinds.get(spec.kind, DatagramLink)
        if spec.kind == "stdio":
            from netstack.link.stdio import StdioLink as make
        link: Link = make(sock, self._name(spec), spec.mtu or self._mtu, counters=self._counters)
        return link

    # -- sources

    def _inherit(self, spec: LinkSpec) -> None:
        kind, listening = detect(spec.descriptor)
        spec = replace(spec, kind=spec.kind or kind)
        if spec.kind in DEVICES:
            self._start(self._keep_device(spec, open_device(spec, self._mtu)))
            return
        if kind != spec.kind and not (kind in ON_STREAM_SOCKETS and spec.kind in ON_STREAM_SOCKETS):
            raise ConfigError(
                f"link {spec}: the descriptor is not what a {spec.kind} link needs (it looks like {kind})"
            )
        sock = socket.socket(fileno=spec.descriptor)
        sock.set_inheritable(False)
        sock.setblocking(False)
        if listening or (spec.kind == "unixgram" and not _connected(sock)):
            self._serve(spec, sock, ours=False)
        else:
            self._start(self._keep_connection(spec, sock))

    def _serve(self, spec: LinkSpec, sock: socket.socket, *, ours: bool) -> None:
        if not ours:
            self._doors.append(sock)
        self._listening.append(_url(spec, sock))
        if spec.kind == "unixgram":
            server = UnixgramServer(
                sock,
                spec.label,
                spec.mtu or self._mtu,
                appeared=self._appeared_once if spec.once else self._appeared,
                gone=self._vanished,
                counters=self._counters,
                label=lambda: self._name(spec),
            )
            self._servers.append(server)
            server.start()
        else:
            self._start(self._accept(spec, sock, checked=ours))

    def _appeared(self, link: Any) -> None:
        with self._contained(link.name):
            if self._open:
                self._attach(link)
            else:
                link.close()

    def _appeared_once(self, link: Any) -> None:
        self._appeared(link)
        attached = self._attached.get(id(bare(link)))
        if attached is not None:
            self._start(self._over_with(attached))

    async def _over_with(self, attached: _Attached) -> None:
        await attached.ended.wait()
        self._exhausted()

    def _vanished(self, link: Any, reason: str) -> None:
        attached = self._attached.get(id(link))
        if attached is not None:
            self._end(attached, reason)

    async def _accept(self, spec: LinkSpec, door: socket.socket, *, checked: bool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _address = await loop.sock_accept(door)
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EPROTO):
                    continue
                self._counters.drops[Drop.DESCRIPTORS] += 1
                self._complain("accept", f"{spec.label}: {error.strerror}; will accept again when it is over")
                await asyncio.sleep(NO_DESCRIPTOR_PAUSE_S)
                continue
            uid = peer_uid(peer) if checked else None
            if uid is not None and uid not in self._uids:
                self._complain("uid", f"{spec.label}: user {uid} is refused; only our own user may connect")
                peer.close()
            elif spec.kind == "vmnet":
                while len(self._handshakes) >= MAX_HANDSHAKES:
                    oldest = next(iter(self._handshakes))
                    del self._handshakes[oldest]
                    oldest.cancel()
                task = self._start(self._welcome(spec, peer))
                self._handshakes[task] = None
                task.add_done_callback(self._shaken)
            else:
                ended = await self._take(spec, peer)
                if spec.once and ended is not None:
                    self._listening.remove(_url(spec, door))
                    door.close()
                    await ended.wait()
                    break
            await asyncio.sleep(0)  # sock_accept does not yield while connections wait
        self._exhausted()

    def _shaken(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    async def _welcome(self, spec: LinkSpec, peer: socket.socket) -> None:
        await self._take(spec, peer)

    async def _take(self, spec: LinkSpec, sock: socket.socket) -> asyncio.Event | None:
        """A connected socket becomes a link, after the handshake where there is one; what is set when it has ended, None when it
        does not become one."""
        if spec.kind == "vhost-user":
            return self._meet(spec, sock)
        identity: Identity | None = None
        attached: _Attached | None = None
        link: Link | None = None
        with self._contained(spec.label):
            try:
                if spec.kind == "vmnet":
                    identity = await self._shake_hands(spec, sock)
                    if identity is None:
                        return None
                link = self._socket_link(spec, sock)
            except OSError as error:
                self._complain("handshake", f"{spec.label}: {error.strerror or 'no complete handshake in time'}")
            finally:
                if link is None:
                    sock.close()
                    if identity is not None:
                        self._release(identity.uuid)
            if link is not None:
                attached = self._attach(link, identity)
        return None if attached is None else attached.ended

    def _meet(self, spec: LinkSpec, sock: socket.socket) -> asyncio.Event | None:
        """A front-end is there; what is set when it has gone."""
        if len(self._peers) >= MAX_LINKS:
            self._complain("limit", f"{spec.label}: refused, there are {MAX_LINKS} front-ends")
            self._counters.drops[Drop.LINK_FULL] += 1
            sock.close()
            return None
        # Imported by need: Linux only, and a start without such a link is faster.
        from netstack.link.vhost_user.server import VhostUserPeer

        ended = asyncio.Event()
        taken = {peer.name for peer in self._peers}
        name, number = spec.label, 1
        while name in taken:
            number += 1
            name = f"{spec.label}#{number}"

        def closed(reason: str) -> None:
            self._peers.discard(peer)
            log.info("%s: %s", name, reason)
            ended.set()

        peer = VhostUserPeer(
            sock,
            name,
            spec.mtu or self._mtu,
            appeared=self._appeared,
            gone=self._vanished,
            closed=closed,
            counters=self._counters,
            mac=None if spec.mac is None else parse_mac(spec.mac),
            offload=spec.offload,
            with_config=spec.config,
            complain=self._complain,
            contain=self._contained,
        )
        self._peers.add(peer)
        log.info("%s: a front-end has connected", name)
        peer.start()
        return ended

    async def _shake_hands(self, spec: LinkSpec, sock: socket.socket) -> Identity | None:
        """VMN3T. Reads not one octet beyond the command, so no frame is lost. Raises `OSError`, `TimeoutError`."""
        loop = asyncio.get_running_loop()
        handshake = Handshake(mtu=spec.mtu or self._mtu, reserve=self._reserve, rng=self._rng)
        try:
            async with asyncio.timeout(self._handshake_s):
                while wanted := handshake.wanted:
                    received = await loop.sock_recv(sock, wanted)
                    if not received:
                        return None
                    await loop.sock_sendall(sock, handshake.feed(received))
        except BaseException:
            if handshake.identity is not None:
                self._release(handshake.identity.uuid)
            raise
        if handshake.failure is not None:
            self._complain("handshake", f"{spec.label}: {handshake.failure}")
        return handshake.identity

    async def _dial(self, spec: LinkSpec) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        waiting = False
        while True:
            try:
                sock = await _connect(spec)
            except OSError as error:
                if not waiting:
                    waiting = True
                    log.info("%s: %s; dialling until somebody answers", spec.label, error.strerror or error)
            else:
                waiting = False
                ended = await self._take(spec, sock)
                if ended is not None:
                    began = loop.time()
                    await ended.wait()
                    if loop.time() - began >= STEADY_S:
                        pause = FIRST_PAUSE_S
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_OF_RINGS_S if spec.kind == "vhost-user" else LONGEST_PAUSE_S)

    async def _keep_connection(self, spec: LinkSpec, sock: socket.socket) -> None:
        ended = await self._take(spec, sock)
        if ended is not None:
            await ended.wait()
        self._exhausted()

    def _add_stdio(self, spec: LinkSpec) -> None:
        from netstack.link import stdio  # by need: hardly anybody has it

        ends = stdio.take_over()
        sock, carried = stdio.one_socket(*ends)
        self._start(self._keep_connection(spec, sock))
        if carried is not None and self._group is not None:
            # Not among the tasks that stop accepting: it goes on while flows finish, and ends with the link.
            self._group.create_task(stdio.carried(carried, *ends))

    def _add_device(self, spec: LinkSpec) -> None:
        process = process_handle(int(spec.where)) if spec.how == "pid" else None
        try:
            link = open_device(spec, self._mtu)
        except BaseException:
            if process is not None:
                os.close(process)
            raise
        self._start(self._keep_device(spec, link, process))

    async def _keep_device(self, spec: LinkSpec, link: Link, process: int | None = None) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            attached = self._attach(link)
            if attached is None:
                break
            began = loop.time()
            if process is not None:
                loop.add_reader(process, self._end, attached, f"process {spec.where} has ended")
            try:
                await attached.ended.wait()
            finally:
                if process is not None:
                    loop.remove_reader(process)
                    os.close(process)
            if loop.time() - began >= STEADY_S:
                pause = FIRST_PAUSE_S
            if spec.how in ("inherited", "pid", "fd"):
                break
            mac = getattr(link, "guest_mac", None)
            if mac is not None and spec.mac is None:  # the guest keeps its address when its interface is made again
                spec = replace(spec, mac=format_mac(mac))
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                try:
                    link = open_device(spec, self._mtu)
                except ConfigError as error:
                    self._complain("device", str(error))
                else:
                    break
        self._exhausted()

    def _exhausted(self) -> None:
        self._sources -= 1
        if not self._sources:
            self.over.set()

    # -- what goes wrong

    @contextlib.contextmanager
    def _contained(self, where: str) -> Iterator[None]:
        """A bug of ours met by one peer must not end the links of the others."""
        try:
            yield
        except Exception as error:
            self._counters.contained += 1
            self._events.emit(Contained(time=self._clock(), where=where, error=repr(error)))
            log.exception("%s: a fault of ours, contained to this link", where)

    def _complain(self, cause: str, text: str) -> None:
        """Log, at most once a second for each cause (threats A3)."""
        now = self._clock()
        if now - self._complained.get(cause, -1.0) >= 1.0:
            self._complained[cause] = now
            log.warning("%s", text)


def _url(spec: LinkSpec, door: socket.socket) -> str:
    """Where it listens; without options, for they are nothing to attach to."""
    if spec.how == "tcp":
        host, _, _port = spec.where.rpartition(":")
        spec = replace(spec, where=f"{host}:{door.getsockname()[1]}")
    return replace(spec, name=None).label


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _listen_tcp(spec: LinkSpec) -> socket.socket:
    host, port = spec.endpoint
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"link {spec}: {error.strerror}; give a free port of one of this machine's addresses"
        ) from None
    return sock


async def _connect(spec: LinkSpec) -> socket.socket:
    """A connected socket to the peer of a dialling link. Raises `OSError`."""
    if spec.how == "tcp":
        host, port = spec.endpoint
        family, address = (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, port)
    else:
        family, address = socket.AF_UNIX, spec.where  # type: ignore[assignment]
    kind = socket.SOCK_SEQPACKET if spec.kind == "bess" else socket.SOCK_STREAM
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(CONNECT_S):
            await asyncio.get_running_loop().sock_connect(sock, address)
        # A full backlog of a Unix socket is EAGAIN, which the loop takes for "in progress"; and a dialled port of ours
        # may be the one we dial from.
        if sock.getpeername() == sock.getsockname() and spec.how == "tcp":
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except BaseException:
        sock.close()
        raise
    return sock
