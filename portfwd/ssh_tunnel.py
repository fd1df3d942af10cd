"""gvproxy's `ssh-tunnel://` remotes: a Unix socket in a guest, reached through the guest's own sshd (spec gvproxy 1.3, 1.4).

Theory of operation. A `Tunnel` is the way of one forward: it gets every client that the forward's path accepts.

    client --Unix socket--> Tunnel --direct-streamlocal channel--> SSH --socketpair--> Dialer --TCP--> sshd --> socket in the guest

The first client has the SSH connection made, all of them share it, and it stays until the guest ends it, or the forward does.
While sshd is not up, clients wait: it is dialled again and again for `CONNECT_S`. Then, and at once when sshd does not want our
key, who waits is reset, and for `REST_S` so is who comes. A connection that is lost takes its clients with it; the next one
has a new one made. A client that finds out that it is lost while asking for its channel has `CONNECTIONS` in all.
Keep-alives (asyncssh's `keepalive@openssh.com`) find a guest that is gone without a word.

A client is not read before its channel is there, so that one that is turned away finds its words unread: ECONNRESET on Linux
(a Unix socket has no other reset; where nothing was unread, it is an end of file). Half-closes cross both ways.

sshd's host key is not verified, as by gvproxy: the guest is ours and the way to it is inside this process, but a guest that
was taken over reads what clients send. Nothing of this user's SSH set-up (configuration, agent, keys, known hosts) is used.
sshd may open nothing here: asyncssh refuses what a server asks of a client.

After `close` (the forward is removed) clients that were carried go on, as with every forward; who still waited is reset, and the
SSH connection ends with the last.

Bounds: `MAX_CLIENTS` of a forward (the next are reset and counted), `WINDOW` octets from the guest for each.

Needs the library asyncssh (pyproject's extra `ssh`), imported at the first client and not in the loop's thread.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from netstack.api import Dialer
from netstack.errors import ConfigError, HostError
from portfwd.spec import PublishSpec
from portfwd.ssh_target import Target

if TYPE_CHECKING:
    import asyncssh

log = logging.getLogger("pyvpnkit.portfwd")

MAX_CLIENTS: Final = 128
CONNECT_S: Final = 60.0
"""So long is an sshd waited for that does not answer: a guest that boots."""
ATTEMPT_S: Final = 10.0
"""For one attempt, authentication included."""
PAUSE_S: Final = (0.1, 2.0)
"""Between attempts, at first and at most; doubled each time."""
REST_S: Final = 1.0
"""After a failure nobody is dialled for so long."""
CONNECTIONS: Final = 3
"""That one client may see lost while it asks for a channel; gvproxy's number."""
KEEPALIVE_S: Final = 15.0
KEEPALIVES: Final = 3
"""So many in a row without an answer end the connection."""
WINDOW: Final = 512 * 1024
CHUNK: Final = 64 * 1024
LOG_S: Final = 5.0


class _Final(HostError):
    """Another attempt would fail the same way."""


@dataclass(eq=False)
class _Connection:
    """To sshd."""

    ssh: asyncssh.SSHClientConnection
    client: Any
    """What asyncssh tells of it: `lost`."""


class Tunnel:
    """The way of a forward through SSH (`portfwd.carriers.Way`). `dialer` is asked at each attempt."""

    def __init__(self, target: Target, dialer: Callable[[], Dialer | None]) -> None:
        self.target = target
        self._dialer = dialer
        self._clients: set[asyncio.Task[None]] = set()
        self._connecting: asyncio.Task[_Connection] | None = None
        self._connection: _Connection | None = None
        self._failure = ""
        self._rests_until = 0.0
        self._quiet_until = 0.0
        self._closed = False
        self.carried = 0
        """Clients that got a channel."""
        self.unreached = 0
        """Those reset because there was none to be had."""
        self.refused = 0
        """Those reset because there were `MAX_CLIENTS`."""
        self.connections = 0
        """To sshd, that came about."""

    # A forward's way.

    def stream(self, spec: PublishSpec, sock: socket.socket, client: Any) -> None:
        """Carry an accepted connection, and own its socket."""
        if len(self._clients) >= MAX_CLIENTS:
            self.refused += 1
            self._complain(f"{MAX_CLIENTS} clients are there already; one more was reset")
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._carry(sock))
        self._clients.add(task)
        task.add_done_callback(self._left)

    def close(self) -> None:
        """No more will come."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self._end_if_unused()

    def _left(self, task: asyncio.Task[None]) -> None:
        self._clients.discard(task)
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self._closed and not self._clients and self._connection is not None:
            self._connection.ssh.close()
            self._connection = None

    def _complain(self, why: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until and not self._closed:
            self._quiet_until = now + LOG_S
            log.warning("%s: %s (said at most once in %.0f s)", self.target, why, LOG_S)

    # A client.

    async def _carry(self, sock: socket.socket) -> None:
        with sock:  # closed with what is unread in it, it is reset
            try:
                guest = await self._channel()
            except HostError as error:
                self.unreached += 1
                self._complain(f"a client was reset: {error}")
                return
            except Exception:  # one client's failure must not end the others
                log.exception("%s: a client could not be carried", self.target)
                return
            self.carried += 1
            channel = guest[1].channel
            try:
                client = await asyncio.open_unix_connection(sock=sock, limit=CHUNK)
                try:
                    await _splice(client, guest)
                    client[1].close()
                    await client[1].wait_closed()
                except BaseException:
                    client[1].transport.abort()
                    raise
                channel.close()
                # Until the guest has let go of it too, so that channels are bounded by clients.
                await channel.wait_closed()
            except* OSError:
                pass  # the client has left, or the guest has
            except* Exception as group:
                if not _is_lost(group):
                    log.exception("%s: a client was reset", self.target)
            finally:
                channel.abort()

    async def _channel(self) -> tuple[asyncssh.SSHReader[bytes], asyncssh.SSHWriter[bytes]]:
        """Raises `HostError`."""
        why = ""
        for _ in range(CONNECTIONS):
            connection = await self._connected()
            import asyncssh

            try:
                found: Any = await connection.ssh.open_unix_connection(self.target.path, window=WINDOW)
                return found  # type: ignore[no-any-return]
            except (asyncssh.Error, OSError) as error:
                why = _plain(error)
                if not connection.client.lost:
                    raise HostError(f"sshd did not connect to {self.target.path}: {why}") from None
        raise HostError(f"{CONNECTIONS} connections to sshd were lost, the last one: {why}")

    # The connection to sshd.

    async def _connected(self) -> _Connection:
        """The connection there is, or a new one. Raises `HostError`."""
        if self._connection is not None and not self._connection.client.lost:
            return self._connection
        loop = asyncio.get_running_loop()
        if self._closed:
            raise HostError("the forward was removed")
        if self._connecting is None:
            if loop.time() < self._rests_until:
                raise HostError(self._failure)
            self._connecting = loop.create_task(self._connect())
            self._connecting.add_done_callback(self._has_connected)
        attempt = self._connecting
        await asyncio.wait((attempt,))
        if attempt.cancelled():
            raise HostError("the forward was removed")
        return attempt.result()

    def _has_connected(self, task: asyncio.Task[_Connection]) -> None:
        self._connecting = None
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            self.connections += 1
            self._connection = task.result()
            self._end_if_unused()
            return
        self._failure = str(error)
        self._rests_until = asyncio.get_running_loop().time() + REST_S

    async def _connect(self) -> _Connection:
        """Until sshd lets us in. Raises `HostError`."""
        try:
            await asyncio.to_thread(_library)
            key = await asyncio.to_thread(self._key)
        except (ImportError, ConfigError, ValueError) as error:
            raise HostError(_plain(error)) from None
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + CONNECT_S, PAUSE_S[0]
        while True:
            try:
                return await self._attempt(key)
            except _Final:
                raise
            except HostError as error:
                if loop.time() + pause >= until:
                    raise HostError(f"no sshd in {CONNECT_S:.0f} s: {error}") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])

    def _key(self) -> asyncssh.SSHKey:
        """Not in the loop's thread: the passphrase of a key is made dear on purpose."""
        import asyncssh

        try:
            return asyncssh.import_private_key(self.target.read_key(), self.target.passphrase)
        except ValueError as error:  # KeyImportError, KeyEncryptionError
            raise ConfigError(f"key {self.target.key}: {error}") from None

    async def _attempt(self, key: asyncssh.SSHKey) -> _Connection:
        """Raises `HostError`; `_Final` where sshd has heard us out and says no."""
        import asyncssh

        class Client(asyncssh.SSHClient):
            lost = False

            def connection_lost(self, exc: Exception | None) -> None:
                self.lost = True

        dialer = self._dialer()
        if dialer is None:
            raise HostError("the network does not run yet")
        ended: list[str] = []
        ours, theirs = socket.socketpair()
        dialer.dial(self.target.guest, theirs, on_close=ended.append)
        try:
            ours.setblocking(False)
            async with asyncio.timeout(ATTEMPT_S):
                ssh, client = await asyncssh.create_connection(
                    Client,
                    self.target.guest.text,
                    self.target.guest.port,
                    sock=ours,
                    config=None,
                    known_hosts=None,
                    x509_trusted_certs=None,
                    x509_trusted_cert_paths=[],
                    username=self.target.user,
                    client_keys=[key],
                    agent_path=None,
                    preferred_auth="publickey",
                    gss_kex=False,
                    compression_algs=["none"],
                    login_timeout=0,
                    keepalive_interval=KEEPALIVE_S,
                    keepalive_count_max=KEEPALIVES,
                )
        except BaseException as error:
            ours.close()
            if isinstance(error, asyncssh.PermissionDenied):
                raise _Final(
                    f"sshd does not let {self.target.user} in with the key {self.target.key}: {_plain(error)}"
                ) from None
            if isinstance(
                error,
                asyncssh.KeyExchangeFailed | asyncssh.ProtocolError | asyncssh.ProtocolNotSupported | ValueError,
            ):
                raise _Final(f"no SSH with {self.target.guest}: {_plain(error)}") from None
            if isinstance(error, TimeoutError):
                raise HostError(f"{self.target.guest} said nothing for {ATTEMPT_S:.0f} s") from None
            if isinstance(error, asyncssh.Error | OSError):
                why = f" ({', '.join(ended)})" if ended else ""
                raise HostError(f"{self.target.guest}: {_plain(error)}{why}") from None
            raise
        return _Connection(ssh, client)


async def _splice(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    guest: tuple[asyncssh.SSHReader[bytes], asyncssh.SSHWriter[bytes]],
) -> None:
    """Octets both ways until both sides have finished, or the channel is closed. Raises groups of `OSError`, `asyncssh.Error`."""
    async with asyncio.TaskGroup() as group:
        up = group.create_task(_up(client[0], guest[1]))
        while octets := await guest[0].read(CHUNK):
            client[1].write(octets)
            await client[1].drain()
        if client[1].can_write_eof():
            client[1].write_eof()
        closed = group.create_task(guest[1].channel.wait_closed())
        await asyncio.wait((up, closed), return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        closed.cancel()


async def _up(client: asyncio.StreamReader, guest: asyncssh.SSHWriter[bytes]) -> None:
    while octets := await client.read(CHUNK):
        try:
            guest.write(octets)
            await guest.drain()
        except BrokenPipeError:
            return  # the guest reads no more, but what it sent is still on its way to the client
    guest.write_eof()


def _library() -> None:
    """Import asyncssh: half a second of work."""
    if "asyncssh" not in sys.modules:
        importlib.import_module("asyncssh").set_log_level(logging.WARNING)  # at INFO it tells of every channel


def _is_lost(group: BaseExceptionGroup[Any]) -> bool:
    """Whether all of it is a connection to sshd that ended."""
    import asyncssh

    return group.split(asyncssh.Error)[1] is None


def _plain(error: BaseException) -> str:
    """Its words, which may be the guest's, for a line of a log."""
    return ascii(str(error) or type(error).__name__)[1:-1][:200]
