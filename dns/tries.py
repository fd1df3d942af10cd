"""Queries on the wire: a socket for each try over UDP, a task for each over a connection. HOT PATH: `send` and `_readable`."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

from dns import codec
from dns.inflight import Asked, ServerState
from dns.readers import Readers
from dns.stream_asker import StreamAsker
from dns.upstream import RandomId, accept, open_udp
from netstack.errors import HostError

MAX_SOCKETS: Final = 2048
"""Open at once; queries are repeated while half of them are free, and beyond all of them one is as good as lost."""
DATAGRAM: Final = 65535


class Tries:
    """All tries of one forwarder.

    `heard(asked, state, answer, sent_at)` has the answer of a server, with the id of the query; `failed(asked, state)` is called
    when a server that was asked cannot be. Neither is called for a query that was dropped.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        counters: Counter[str],
        new_id: RandomId,
        heard: Callable[[Asked, ServerState, bytes, float], None],
        failed: Callable[[Asked, ServerState], None],
    ) -> None:
        self._loop = loop
        self._counters = counters
        self._new_id = new_id
        self._heard = heard
        self._failed = failed
        self._readers: Readers[Asked] = Readers(loop, self._readable)
        self._buffer = memoryview(bytearray(DATAGRAM))

    def send(self, asked: Asked, state: ServerState, now: float) -> bool:
        """Ask a server, or ask it again; whether that was possible."""
        if asked.stream or state.asker is not None:
            if state not in asked.tasks.values():
                state.asked += 1
                task = self._loop.create_task(self._converse(asked, state, now))
                asked.tasks = {**asked.tasks, task: state}
            return True
        if len(self._readers) >= (MAX_SOCKETS // 2 if asked.tries else MAX_SOCKETS):
            self._counters["socket_limit"] += 1
            return True
        try:
            sock = open_udp(state.server.upstream)
        except OSError:  # no route, or no descriptor left
            return False
        query_id = self._new_id()
        fd = sock.fileno()
        try:
            try:
                sock.send(query_id + asked.query[2:])
            except BlockingIOError:
                pass  # as good as lost on the way
            self._readers.add(fd, asked)
        except OSError:
            sock.close()
            return False
        state.asked += 1
        asked.tries[fd] = sock, query_id, state, now
        return True

    def _readable(self, asked: Asked, fd: int) -> None:
        found = asked.tries.get(fd)
        if found is None:
            return
        sock, query_id, state, sent_at = found
        try:
            octets = sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # ICMP said that nobody listens there, or that it cannot be reached
            self.end(asked, state)
            self._failed(asked, state)
            return
        answer = accept(asked.query, asked.end, query_id, bytes(self._buffer[:octets]))
        if answer is None:
            self._counters["upstream_mismatch"] += 1
            return
        self._heard(asked, state, answer, sent_at)

    async def _converse(self, asked: Asked, state: ServerState, sent_at: float) -> None:
        """One question over a connection, or to an asker of another kind."""
        asker = state.asker
        if asker is None:
            if state.stream is None:
                state.stream = StreamAsker(state.server.upstream, self._new_id)
            asker = state.stream
        try:
            answer = await asker.ask(asked.query, asked.end)
        except HostError:
            answer = b""
        this = asyncio.current_task()
        if this not in asked.tasks:
            return  # it was dropped just now
        asked.tasks = {task: known for task, known in asked.tasks.items() if task is not this}
        if len(answer) < codec.HEADER:
            self._failed(asked, state)
        else:
            self._heard(asked, state, asked.query[:2] + answer[2:], sent_at)

    def end(self, asked: Asked, state: ServerState) -> None:
        """No longer listen to a server; what goes over a connection goes on."""
        for fd in [fd for fd, one in asked.tries.items() if one[2] is state]:
            self._readers.remove(fd)
            asked.tries.pop(fd)[0].close()

    def drop(self, asked: Asked) -> None:
        """No longer listen to anybody."""
        for fd, one in asked.tries.items():
            self._readers.remove(fd)
            one[0].close()
        asked.tries.clear()
        if asked.tasks:
            for task in asked.tasks:
                task.cancel()
            asked.tasks = {}

    def close(self) -> None:
        """All queries must have been dropped."""
        self._readers.close()
