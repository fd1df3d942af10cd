"""gvproxy's framing of `/connect` and of standard input and output: u16 little-endian length, then the frame (spec gvproxy 1.4).

The peer is gvforwarder, whose interface has an MTU of its own (`-mtu`, 4000 when not given) that it tells nobody. It ends on a
frame longer than that + 14, so no longer one is sent than it surely takes; and until its guest has heard our MTU by DHCP it
may send frames as long as its interface makes them, so these are taken.

Standard input and output are two pipes as a rule, and a link has one socket: what comes and goes is carried between them and
one end of a socket pair, of which the link has the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import sys
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from netstack.errors import ConfigError, LinkDown
from netstack.link.common import ETHERNET_HEADER, VLAN_TAG
from netstack.link.stream import StreamLink
from netstack.observe.metrics import Counters

if TYPE_CHECKING:
    from netstack.link.attach import Attachments

GVFORWARDER_MTU: Final = 4000
CHUNK: Final = 256 << 10


class StdioLink(StreamLink):
    """`mtu` is the network's. `peer_mtu` is that of the peer's interface, where it is known."""

    headroom = 2
    _length = Struct("<H")

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        mtu: int,
        *,
        counters: Counters | None = None,
        peer_mtu: int | None = None,
    ) -> None:
        theirs = GVFORWARDER_MTU if peer_mtu is None else peer_mtu
        largest = max(mtu, theirs) + ETHERNET_HEADER + VLAN_TAG
        super().__init__(sock, name, min(mtu, theirs), counters=counters, max_frame=largest)


def adopt(
    attachments: Attachments,
    sock: socket.socket,
    *,
    mtu: int,
    counters: Counters | None = None,
    peer_mtu: int | None = None,
) -> None:
    """A connection that `/connect` took over becomes a link, named `connect#N`.

    Owns `sock`, whatever comes of it. Raises `LinkDown`, and `ConfigError` when the network does not take it.
    """
    taken = {link.name for link in attachments.links}
    number = 1
    while (name := f"connect#{number}") in taken:
        number += 1
    try:
        link: Any = StdioLink(sock, name, mtu, counters=counters, peer_mtu=peer_mtu)
    except OSError as error:
        sock.close()
        raise LinkDown(f"{name}: {error.strerror}") from None
    attachments.adopt(link)


def take_over() -> tuple[int, int]:
    """Standard input and output, under other numbers: who reads has nothing to read now, and what is printed goes to standard
    error. Raises `ConfigError` where they cannot be a link."""
    for descriptor, file in enumerate((sys.__stdin__, sys.__stdout__)):
        name = "standard output" if descriptor else "standard input"
        if file is None:  # closed when we began; the number is something else by now
            raise ConfigError(f"link stdio: {name} is closed; start this program with two pipes there")
        if os.isatty(descriptor):
            raise ConfigError(f"link stdio: {name} is a terminal; start this program with two pipes there")
    output = os.fstat(1)
    with contextlib.suppress(OSError):
        if os.path.samestat(output, os.fstat(2)) and not stat.S_ISCHR(output.st_mode):
            raise ConfigError(
                "link stdio: standard output and standard error are the same; send the log elsewhere, as by 2>FILE"
            )
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return reading, writing


def one_socket(reading: int, writing: int) -> tuple[socket.socket, socket.socket | None]:
    """The link's socket, and the one that is to be `carried` to and from the two descriptors; `None` where they are one socket."""
    ends = [os.fstat(descriptor) for descriptor in (reading, writing)]
    if stat.S_ISSOCK(ends[0].st_mode) and os.path.samestat(*ends):
        os.close(writing)
        sock = socket.socket(fileno=reading)
        sock.setblocking(False)
        return sock, None
    ours, other = socket.socketpair()
    for sock in (ours, other):
        sock.setblocking(False)
    for descriptor in (reading, writing):
        os.set_blocking(descriptor, False)
    return ours, other


async def carried(sock: socket.socket, reading: int, writing: int) -> None:
    """Octets both ways between `sock` and two descriptors until the link is closed, as it is at the end of what comes, or
    nobody takes what goes; closes all three."""
    coming = asyncio.ensure_future(_in(reading, sock))
    try:
        with contextlib.suppress(OSError):  # nobody takes it
            await _out(sock, writing)
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        sock.close()
        os.close(reading)
        os.close(writing)


async def _in(reading: int, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            octets = os.read(reading, CHUNK)
        except BlockingIOError:
            await _ready(loop.add_reader, loop.remove_reader, reading)
            continue
        if not octets:
            sock.shutdown(socket.SHUT_WR)
            return
        await loop.sock_sendall(sock, octets)


async def _out(sock: socket.socket, writing: int) -> None:
    loop = asyncio.get_running_loop()
    while octets := await loop.sock_recv(sock, CHUNK):
        left = memoryview(octets)
        while left:
            try:
                left = left[os.write(writing, left) :]
            except BlockingIOError:
                await _ready(loop.add_writer, loop.remove_writer, writing)


async def _ready(watch: Callable[..., Any], unwatch: Callable[[int], Any], descriptor: int) -> None:
    ready = asyncio.Event()
    watch(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        unwatch(descriptor)
