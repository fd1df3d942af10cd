"""Published UDP ports over the forwarder: clients of one host socket, and the channels that carry their datagrams.

Generations 1 and 2 have one channel per port, opened at once; each record says whose it is, and what comes back names the client
it is for. An answer goes only to clients that were heard, else the VM could send from the published port to anybody. In
generation 3 each client has its own channel, and records without addresses; a channel that was idle for 90 s is closed, as
VPNKit does, and so is the least recently used one when a client more than `MAX_CLIENTS` comes.

What cannot be sent on is dropped and counted, as a network would: while the forwarder is not reached a few datagrams wait.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from portfwd.carriers import Destination
from portfwd.mux.channel import Channel, Ending
from portfwd.mux.records import Record, RecordChannel

MAX_CLIENTS: Final = 1024
"""Of one port, as of VPNKit's UDP NAT; the least recently used one goes first."""
MAX_HEARD: Final = 4096
"""Clients whose answers are let through, where they share a channel."""
IDLE_S: Final = 90.0
"""spec vpnkit 7.2, appendix C: Go's exposed UDP."""
LOOK_S: Final = 10.0
"""Between two looks for idle clients."""
EARLY: Final = 1 << 17
"""Octets that wait for a channel."""
AGAIN_S: Final = 1.0
"""Between two attempts to open the shared channel."""
BATCH: Final = 64
"""Datagrams per wake-up, so that a flood on one port leaves the loop to others."""

Reach = Callable[[Destination, Callable[[Channel | None], None]], None]
"""Open a channel; calls back, now or later, with `None` where there is none to be had."""


class Lane:
    """One channel of datagrams that may not be there yet."""

    def __init__(
        self, reach: Reach, target: Destination, on_record: Callable[[Record], None], on_end: Callable[[], None]
    ):
        self._on_record = on_record
        self._on_end = on_end
        self._early: list[Record] = []
        self._early_octets = 0
        self._records: RecordChannel | None = None
        self._over = False
        self._dropped = 0
        self.last = 0.0
        """When a datagram went by, on the loop's clock."""
        reach(target, self._reached)

    @property
    def dropped(self) -> int:
        return self._dropped + (0 if self._records is None else self._records.dropped)

    def _reached(self, channel: Channel | None) -> None:
        if self._over:
            if channel is not None:
                channel.close()
            return
        if channel is None:
            self._end(Ending.LOST)
            return
        early, self._early = self._early, []
        self._records = RecordChannel(channel, self._on_record, self._end)
        for record in early:
            self._records.send(record)

    def send(self, record: Record) -> None:
        if self._records is not None:
            self._records.send(record)
        elif self._over or self._early_octets + len(record.payload) > EARLY:
            self._dropped += 1
        else:
            self._early_octets += len(record.payload)
            self._early.append(record)

    def _end(self, _why: Ending) -> None:
        if not self._over:
            self._over = True
            self._dropped += len(self._early)
            self._early.clear()
            self._on_end()

    def close(self) -> None:
        """`on_end` is not called."""
        self._over = True
        self._early.clear()
        if self._records is not None:
            self._records.close()


class Published:
    """A published UDP port: what both kinds have in common. `netstack.api.Datagrams`."""

    def __init__(
        self,
        reach: Reach,
        target: Destination,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_close: Callable[[Published], None],
    ) -> None:
        self._reach = reach
        self._target = target
        self._sock = sock
        self._loop = loop
        self._on_close = on_close
        self._dropped = 0
        self.evicted = 0
        self.unheard = 0
        """Answers to clients that were never heard."""
        self.closed = False
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._readable)

    @property
    def dropped(self) -> int:
        """Datagrams of either direction that were not sent on."""
        raise NotImplementedError

    def _arrived(self, payload: bytes, client: Any) -> None:
        raise NotImplementedError

    def _close_lanes(self) -> None:
        raise NotImplementedError

    def _readable(self) -> None:
        for _ in range(BATCH):
            if self.closed:
                return
            try:
                payload, client = self._sock.recvfrom(65535)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue  # an ICMP error to an earlier answer (ECONNREFUSED): nothing about this port
            self._arrived(payload, client)

    def _answer(self, payload: bytes, client: Any) -> None:
        try:
            self._sock.sendto(payload, client)
        except OSError:
            self._dropped += 1  # full, or no way there: datagrams may be lost

    def close(self) -> None:
        """End it, the host socket included. Harmless twice."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._close_lanes()
            self._on_close(self)


class PerClient(Published):
    """Generation 3: a channel per client."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lanes: OrderedDict[Any, Lane] = OrderedDict()
        """The one used last is last."""
        self._look: asyncio.TimerHandle | None = None

    @property
    def clients(self) -> int:
        return len(self._lanes)

    @property
    def dropped(self) -> int:
        return self._dropped + sum(lane.dropped for lane in self._lanes.values())

    def _arrived(self, payload: bytes, client: Any) -> None:
        lane = self._lanes.get(client)
        if lane is None:
            if len(self._lanes) >= MAX_CLIENTS:
                self.evicted += 1
                self._forget(next(iter(self._lanes)))
            lane = Lane(
                self._reach, self._target, lambda record: self._back(record, client), lambda: self._ended(client)
            )
            if lane._over:
                self._dropped += 1  # refused at once
                return
            self._lanes[client] = lane
            if self._look is None:
                self._look = self._loop.call_later(LOOK_S, self._look_for_idle)
        self._used(client, lane)
        lane.send(Record(payload))

    def _back(self, record: Record, client: Any) -> None:
        lane = self._lanes.get(client)
        if lane is not None:
            self._used(client, lane)
            self._answer(record.payload, client)

    def _used(self, client: Any, lane: Lane) -> None:
        lane.last = self._loop.time()
        self._lanes.move_to_end(client)

    def _ended(self, client: Any) -> None:
        lane = self._lanes.pop(client, None)
        if lane is not None:
            self._dropped += lane.dropped

    def _forget(self, client: Any) -> None:
        self._lanes[client].close()
        self._ended(client)

    def _look_for_idle(self) -> None:
        before = self._loop.time() - IDLE_S
        while self._lanes and next(iter(self._lanes.values())).last <= before:
            self._forget(next(iter(self._lanes)))
        self._look = self._loop.call_later(LOOK_S, self._look_for_idle) if self._lanes else None

    def _close_lanes(self) -> None:
        if self._look is not None:
            self._look.cancel()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()


class Shared(Published):
    """Generations 1 and 2: one channel, whose records name the clients."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._heard: OrderedDict[tuple[bytes, int], Any] = OrderedDict()
        """By address and port as records write them: the kernel's own form, a scope included."""
        self._again = 0.0
        self._lane: Lane | None = None
        self._open()

    def _open(self) -> None:
        """As soon as the port is published; later when a datagram comes and the channel is gone."""
        self._again = self._loop.time() + AGAIN_S
        lane = Lane(self._reach, self._target, self._back, self._ended)
        self._lane = None if lane._over else lane

    @property
    def clients(self) -> int:
        return len(self._heard)

    @property
    def dropped(self) -> int:
        return self._dropped + (0 if self._lane is None else self._lane.dropped)

    def _arrived(self, payload: bytes, client: Any) -> None:
        host, _, zone = client[0].partition("%")
        key = ipaddress.ip_address(host).packed, client[1]
        if key in self._heard:
            self._heard.move_to_end(key)
        elif len(self._heard) >= MAX_HEARD:
            self.evicted += 1
            self._heard.popitem(last=False)
        self._heard[key] = client
        if self._lane is None and self._loop.time() >= self._again:
            self._open()
        if self._lane is None:
            self._dropped += 1
        else:
            self._lane.send(Record(payload, *key, zone))

    def _back(self, record: Record) -> None:
        client = self._heard.get((record.address, record.port))
        if client is None:
            self.unheard += 1
        else:
            self._answer(record.payload, client)

    def _ended(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            self._dropped += lane.dropped

    def _close_lanes(self) -> None:
        if self._lane is not None:
            self._lane.close()
