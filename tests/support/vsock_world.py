"""A played guest, our vsock device and the host's ends of its streams, in one thread and without a loop.

world = World()
sock, far = world.from_guest()                   # a connection of the guest's, and the host service's end of it
sock, near = world.to_guest()                    # one of the host's
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

from netstack.link.vhost_user.channel import Channel
from tests.support.guest_memory import GuestMemory
from tests.support.vhost_front import FrontEnd
from tests.support.virtio_vsock import RX, Guest, Sock
from vm.vsock.device import VsockDevice
from vm.vsock.poller import Poller

FIRST_PORT = 1 << 30
SERVICE = 5000
GUEST_PORT = 2376


class World:
    """See the module. `services` are the host's ports that answer; `options` are the guest's, `limit` the device's."""

    def __init__(
        self,
        *,
        limit: int = 1024,
        memory: GuestMemory | None = None,
        start: bool = True,
        events: bool = True,
        **options: Any,
    ) -> None:
        self.now = 0.0
        self.limit = limit
        self.services = {SERVICE}
        self.taken: list[socket.socket] = []
        """The host's ends of what the guest dialled."""
        self.dialled: list[tuple[int, Callable[[socket.socket | None], None]]] = []
        """What waits for an answer, where `answer` is False."""
        self.answer = True
        self.complaints: list[str] = []
        self.closed: list[str] = []
        self.greetings: list[int] = []
        self.buffer = 0
        """Octets of the kernel's buffer in the host's sockets; 0 for what it has by itself."""
        self._mine: list[socket.socket] = []
        self.poller = Poller(self._after)
        self.memory = memory or GuestMemory(spread=False)
        self.channel: Channel[VsockDevice]
        self.guest = Guest(self.connection(), self.memory, **options)
        if start:
            self.guest.start(events=events)
            self.settle()

    @property
    def device(self) -> VsockDevice:
        return self.channel.device

    def connection(self) -> FrontEnd:
        """To a device that is new."""
        ours, theirs = socket.socketpair()
        device = VsockDevice(
            "vsock:3",
            3,
            self.poller,
            self._dial,
            now=lambda: self.now,
            first_port=FIRST_PORT,
            limit=self.limit,
            complain=lambda cause, text: self.complaints.append(text),
        )
        self.channel = Channel(theirs, device, closed=self.closed.append)
        return FrontEnd(ours, self.channel.readable)

    def _after(self) -> None:
        self.channel.device.turn()

    def _dial(self, port: int, answer: Callable[[socket.socket | None], None]) -> None:
        if not self.answer:
            self.dialled.append((port, answer))
        elif port in self.services:
            answer(self.pair(self.taken))
        else:
            answer(None)

    def pair(self, ends: list[socket.socket]) -> socket.socket:
        """A socket for the device; the other end is added to `ends`."""
        near, far = socket.socketpair()
        if self.buffer:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer)
        far.setblocking(False)
        ends.append(far)
        self._mine.append(far)
        return near

    # time

    def device_turn(self) -> None:
        """As a loop would: only when there is news, so that what nobody was asked to tell of stays unseen."""
        for _ in range(4):
            if not select.select([self.poller], [], [], 0)[0]:
                return
            self.poller.poll()

    def turn(self) -> bool:
        """The device's, then the guest's, which looks only when it is called; whether it got something."""
        self.device_turn()
        return self.guest.running and bool(self.guest.called(RX)) and self.guest.pump()

    def settle(self) -> None:
        """Until nothing comes to the guest any more."""
        quiet = 0
        for _ in range(10_000):
            quiet = 0 if self.turn() else quiet + 1
            if quiet == 4:
                return
        raise AssertionError("the device is never done (it spins)")

    def run(self, until: Callable[[], bool], limit: int = 20_000) -> None:
        for _ in range(limit):
            if until():
                return
            self.turn()
        raise AssertionError("that never comes")

    # streams

    def from_guest(self, port: int = SERVICE) -> tuple[Sock, socket.socket]:
        sock = self.guest.connect(port)
        self.settle()
        assert sock.state == "open", sock.state
        return sock, self.taken[-1]

    def to_guest(self, port: int = GUEST_PORT) -> tuple[Sock, socket.socket]:
        self.guest.listen(port)
        far = self.dial_guest(port)
        self.settle()
        return self.guest.accepted[-1], far

    def dial_guest(self, port: int = GUEST_PORT) -> socket.socket:
        """The host's end of a connection that the guest is asked for."""
        ends: list[socket.socket] = []
        near = self.pair(ends)
        if not self.device.connect(port, near, self._greeting):
            near.close()
        return ends[0]

    def _greeting(self, host_port: int) -> bytes:
        self.greetings.append(host_port)
        return b""

    def close(self) -> None:
        self.channel.close()
        self.guest.close()
        for sock in self._mine:
            sock.close()
        assert not self.device.streams and not self.device.engine.connections
        self.poller.close()
        self.memory.close()


def end_of(sock: socket.socket, octets: int = 1 << 16) -> bytes | None:
    """What can be read now; None where nothing can, b"" for the end. Raises `OSError`."""
    try:
        return sock.recv(octets)
    except BlockingIOError:
        return None


def drain(sock: socket.socket) -> bytes:
    """Everything that can be read now."""
    found = b""
    while piece := end_of(sock):
        found += piece
    return found
