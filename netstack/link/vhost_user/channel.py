"""The control socket of one front-end (a VMM). What it says is put together here and done in `device`.

Unix stream sockets only; the descriptors of a message come with its octets. A message that makes no sense ends the connection,
as does one that must be refused and wants no answer; the front-end may connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from netstack.errors import Malformed
from netstack.link.vhost_user import messages
from netstack.link.vhost_user.device import Device, Refused, close_all
from netstack.link.vhost_user.messages import Assembler

_MESSAGES: Final = 64
"""Messages per call of `readable`; then the loop has its turn."""
_INT: Final = struct.calcsize("i")
D = TypeVar("D", bound=Device)


class Channel(Generic[D]):
    """One connection, for a device of any kind. `sock` becomes its own. `closed(reason)` is called once, when the connection is
    over, after the device was closed. `contain` keeps a fault of ours from the loop."""

    def __init__(
        self,
        sock: socket.socket,
        device: D,
        *,
        closed: Callable[[str], None] = lambda reason: None,
        contain: Callable[[str], contextlib.AbstractContextManager[None]] = lambda where: contextlib.nullcontext(),
    ) -> None:
        sock.setblocking(False)
        self.name = device.name
        self.device = device
        self._sock = sock
        self._closed = closed
        self._contain = contain
        self._assembler = Assembler()
        self._descriptors: list[int] = []
        """Of the message that is being put together."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self.open = True

    def start(self) -> None:
        """Read whenever something comes, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock.fileno(), self.readable)

    def readable(self) -> None:
        """Do what waits on the socket now."""
        done = False
        with self._contain(self.name):
            for _ in range(_MESSAGES):
                if not self.open or not self._one():
                    break
            done = True
        if not done:
            self.end("a fault of ours")

    def _one(self) -> bool:
        """Read once; False when nothing waits any more."""
        space = socket.CMSG_SPACE(messages.MAX_REGIONS * _INT)
        try:
            octets, ancillary, flags, _address = self._sock.recvmsg(
                self._assembler.wanted, space, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.end(error.strerror or str(error))
            return False
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                count = len(data) // _INT
                self._descriptors += struct.unpack(f"{count}i", data[: count * _INT])
        if not octets:
            self.end("closed by the front-end" + (" inside a message" if self._assembler.unfinished else ""))
            return False
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > messages.MAX_REGIONS:
            self.end(f"a message with more than {messages.MAX_REGIONS} descriptors")
            return False
        try:
            message = self._assembler.feed(octets)
            if message is None:
                return True
            descriptors, self._descriptors = self._descriptors, []
            answer = self.device.handle(message, descriptors)
            if answer is not None:
                self._send(answer)
        except (Malformed, Refused) as error:
            self.device.complain("refused", f"{self.name}: {error}")
            self.end(str(error))
            return False
        return True

    def _send(self, answer: bytes) -> None:
        """Answers are short and the front-end waits for them; one that does not read is let go."""
        outgoing, self.device.outgoing = self.device.outgoing, []
        try:
            sent = socket.send_fds(self._sock, [answer], outgoing) if outgoing else self._sock.send(answer)
        except OSError as error:
            self.end(f"it takes no answer: {error.strerror}")
            return
        finally:
            close_all(outgoing)
        if sent < len(answer):
            self.end("it takes no answer")

    def end(self, reason: str) -> None:
        """Close the connection; harmless when repeated."""
        if not self.open:
            return
        self.open = False
        if self._loop is not None:
            self._loop.remove_reader(self._sock.fileno())
        self.device.close(reason)
        close_all(self._descriptors)
        self._descriptors = []
        self._sock.close()
        self._closed(reason)

    def close(self) -> None:
        """As `end`, for an end that is ours."""
        self.end("shutting down")
