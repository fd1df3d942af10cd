"""The forwarder without its command line: data connections of the host, and what flows through them to targets in the VM.

    host --data connection--> Connection --(generation found)--> channel + destination --dial--> target
                                 one per flow in generation 1, one for all flows in 2 and 3

Whatever the host opens is bounded: sockets towards targets by one `Budget`, data connections by a second one; what exceeds the
first is refused as if the target had, what exceeds the second waits in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from netstack.errors import HostError, Malformed
from portfwd.carriers import Destination
from portfwd.invm.limits import Budget, Counts, Seldom
from portfwd.invm.targets import Client, Patience, UdpTarget, dial
from portfwd.invm.transport import Address, Listening
from portfwd.mux.accept import Accepted
from portfwd.mux.channel import Channel, Ending
from portfwd.mux.engine import Limits, Role
from portfwd.mux.records import Record, RecordChannel
from portfwd.mux.session import Session
from portfwd.mux.splice import splice

log = logging.getLogger("pyvpnkit.forwarder")

ACCEPT_BATCH: Final = 64
REST_S: Final = 0.25
"""Rest of a listener while no data connection, descriptor or memory is to be had."""
SPEAK_S: Final = 30.0
"""A host that connected and says nothing for so long is let go: until it speaks its generation is not known."""
REDIAL_S: Final = 1.0  # spec vpnkit 1.2
DIAL_TIMEOUT_S: Final = 10.0
LOG_EVERY_S: Final = 30.0  # spec vpnkit 1.2

_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(slots=True)
class Flows:
    """Makes flows out of channels, for all data connections."""

    budget: Budget
    patience: Patience = field(default_factory=Patience)
    counts: Counts = field(default_factory=Counts)

    async def stream(self, target: Destination, channel: Channel) -> None:
        """Dial a `tcp` or `unix` target and join it to `channel`; a refusal closes the channel. Never raises `OSError`."""
        if not self.budget.take():
            self.counts["flows refused: too many"] += 1
            channel.close()
            return
        try:
            sock = await dial(target, self.patience, self.counts)
        except OSError as error:
            self.budget.give()
            self.counts["flows refused by the target"] += 1
            log.debug("%s: %s", target, error.strerror or type(error).__name__)
            channel.close()
            return
        except BaseException:
            self.budget.give()
            channel.close()
            raise
        self.counts["flows"] += 1
        log.debug("%s: connected", target)

        def over(reason: str) -> None:
            self.budget.give()
            log.debug("%s: over %s", target, reason)

        splice(channel, sock, on_close=over)


class UdpFlow:
    """One channel of records and its UDP target. `on_over` is called when the host ended it, not after `close`."""

    def __init__(self, flows: Flows, target: Destination, channel: Channel, on_over: Callable[[UdpFlow], None]) -> None:
        self._flows = flows
        self._on_over = on_over
        self.over = False
        flows.counts["udp flows"] += 1
        self._goal = UdpTarget(
            target, self._answer, budget=flows.budget, counts=flows.counts, idle_s=flows.patience.udp_idle_s
        )
        self._records = RecordChannel(channel, self._record, self._ended)

    def _record(self, one: Record) -> None:
        self._goal.datagram(Client(one.address, one.port, one.zone), one.payload)

    def _answer(self, client: Client, payload: bytes) -> None:
        try:
            taken = self._records.send(Record(payload, client.address, client.port, client.zone))
        except Malformed:  # an IPv6 target may say 20 octets more than fit
            taken = False
        if not taken:
            self._flows.counts["udp datagrams dropped"] += 1

    def _ended(self, why: Ending) -> None:
        self.over = True
        self._goal.close()
        self._on_over(self)

    def close(self) -> None:
        self.over = True
        self._goal.close()
        self._records.close()


class _Accepted(Accepted):
    """With its multiplexer in sight, to open channels the other way round (`portfwd.invm.reverse`)."""

    @property
    def session(self) -> Session | None:
        return self._session


class Connection:
    """One data connection. `close` ends it and all that flows through it."""

    def __init__(self, flows: Flows, sock: socket.socket, *, role: Role, generation: int | None, most: int) -> None:
        self._flows = flows
        self._dialling: set[asyncio.Task[None]] = set()
        self._datagrams: set[UdpFlow] = set()
        self.over = asyncio.Event()
        self.reason = ""
        self._loop = asyncio.get_running_loop()
        self._accepted = _Accepted(
            sock,
            self._opened,
            role=role,
            generation=generation,
            on_end=self._ended,
            limits=Limits(channels=most),
        )
        self._silence = None if role is Role.CONNECTOR else self._loop.call_later(SPEAK_S, self._silent)

    @property
    def generation(self) -> int | None:
        """1, 2 or 3; `None` until the host spoke."""
        return self._accepted.generation

    @property
    def session(self) -> Session | None:
        """A multiplexer that is ready to open channels."""
        session = self._accepted.session
        return session if session is not None and session.ready else None

    def _silent(self) -> None:
        if self.generation is None:
            self._flows.counts["data connections that said nothing"] += 1
            self.close()

    def _opened(self, target: Destination, channel: Channel) -> None:
        if target.protocol == "udp":
            flow = UdpFlow(self._flows, target, channel, self._datagrams.discard)
            if not flow.over:
                self._datagrams.add(flow)
            return
        task = self._loop.create_task(self._flows.stream(target, channel))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    def _ended(self, reason: str) -> None:
        self.reason = reason
        if self._silence is not None:
            self._silence.cancel()
        for task in tuple(self._dialling):
            task.cancel()
        for flow in tuple(self._datagrams):
            flow.close()
        self._datagrams.clear()
        self.over.set()

    def close(self) -> None:
        self._accepted.close()

    def dump(self) -> str:
        return self._accepted.dump()


class Data:
    """All data connections of one forwarder."""

    def __init__(self, flows: Flows, *, most_connections: int, redial_s: float = REDIAL_S) -> None:
        self.flows = flows
        self.connections: dict[Connection, None] = {}  # in the order in which they came
        self._seats = Budget(most_connections)
        self._redial_s = redial_s
        self._loop = asyncio.get_running_loop()
        self._listening: list[tuple[Address, Listening]] = []
        self._seldom = Seldom(LOG_EVERY_S)
        self._resting: dict[int, asyncio.TimerHandle] = {}
        self._waiting: set[asyncio.Task[None]] = set()

    def serve(self, sock: socket.socket, *, role: Role, generation: int | None) -> Connection:
        """Take over a connected data connection, whose seat is taken already."""
        connection = Connection(self.flows, sock, role=role, generation=generation, most=self.flows.budget.most)
        self.connections[connection] = None
        self.flows.counts["data connections"] += 1
        task = self._loop.create_task(self._seated(connection))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return connection

    async def _seated(self, connection: Connection) -> None:
        try:
            await connection.over.wait()
        finally:
            self.connections.pop(connection, None)
            self._seats.give()
        if connection.reason not in ("", "closed") and self._seldom.now():
            log.warning("a data connection ended: %s", connection.reason)

    def listen(self, address: Address, *, generation: int | None = None) -> None:
        """Accept data connections at `address`; raises `HostError`."""
        listening = address.listener()
        self._listening.append((address, listening))
        self._loop.add_reader(listening.sock.fileno(), self._accept, listening.sock, generation)
        log.info("data connections are accepted at %s", address)

    def _accept(self, listener: socket.socket, generation: int | None) -> None:
        for _ in range(ACCEPT_BATCH):
            if not self._seats.take():
                self._rest(listener, generation, "as many data connections as may be are open")
                return
            try:
                sock, _peer = listener.accept()
            except OSError as error:
                self._seats.give()
                if error.errno in _SCARCE:
                    self._rest(listener, generation, error.strerror or "")
                    return
                if isinstance(error, BlockingIOError):
                    return
                continue  # that one gave up (accept(2))
            sock.setblocking(False)
            self.serve(sock, role=Role.LISTENER, generation=generation)

    def _rest(self, listener: socket.socket, generation: int | None, why: str) -> None:
        if not self.flows.counts["rests of a listener"]:
            log.warning("%s; hosts wait in the queue", why)
        self.flows.counts["rests of a listener"] += 1
        descriptor = listener.fileno()
        self._loop.remove_reader(descriptor)

        def resume() -> None:
            del self._resting[descriptor]
            self._loop.add_reader(descriptor, self._accept, listener, generation)

        self._resting[descriptor] = self._loop.call_later(REST_S, resume)

    async def keep_connected(self, address: Address, *, generation: int | None = 3) -> None:
        """Dial the host, serve the connection, and again when it ends. Returns for `fd:N` alone, which can be had once."""
        seldom, lasting = Seldom(LOG_EVERY_S), True
        while True:
            try:
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    sock = await address.connect()
            except (OSError, HostError) as error:
                if seldom.now():
                    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "no answer"
                    log.warning("cannot connect to the host at %s: %s; trying every %g s", address, why, self._redial_s)
            else:
                if self._seats.take():
                    began = self._loop.time()
                    # A host that hangs up again and again is not reported each time.
                    log.log(logging.INFO if lasting else logging.DEBUG, "connected to the host at %s", address)
                    await self.serve(sock, role=Role.CONNECTOR, generation=generation).over.wait()
                    log.log(
                        logging.INFO if lasting else logging.DEBUG, "the connection to the host at %s ended", address
                    )
                    lasting = self._loop.time() - began >= LOG_EVERY_S
                else:
                    sock.close()
            if address.kind == "fd":
                return
            await asyncio.sleep(self._redial_s)

    def status(self) -> dict[str, Any]:
        """Plain values for people."""
        return {
            "data connections": [{"generation": one.generation} for one in self.connections],
            "sockets to targets": {"held": self.flows.budget.held, "most": self.flows.budget.most},
            "counts": dict(sorted(self.flows.counts.items())),
        }

    def session(self) -> tuple[Session, int] | None:
        """The multiplexer of the latest data connection that has one, and its generation."""
        for one in reversed(self.connections):
            if (session := one.session) is not None:
                return session, one.generation or 3
        return None

    def mux_dump(self) -> str:
        """The last events of every multiplexer, one a line; empty while there is none."""
        return "\n".join(text for one in self.connections if (text := one.dump()))

    def dump(self) -> str:
        """`status`, and the last events of every multiplexer."""
        return f"{json.dumps(self.status(), indent=1)}\n{self.mux_dump()}\n"

    async def close(self) -> None:
        """Stop listening, end every connection and wait until all is let go."""
        for timer in self._resting.values():
            timer.cancel()
        for _address, listening in self._listening:
            self._loop.remove_reader(listening.sock.fileno())
            listening.close()
        self._listening.clear()
        for connection in tuple(self.connections):
            connection.close()
        if self._waiting:
            await asyncio.wait(self._waiting)
