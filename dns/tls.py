"""Asking a resolver over TLS (RFC 7858): the certificates. What is sent and when is `dns.stream_asker`'s: one connection, kept
while it is used, many questions on it at once, answers in any order.

With a name, the certificate must be valid and for that name (RFC 8310 5, "strict"): else nothing is asked, and nothing falls
back to clear text. The name may be the server's address. With `ANY_NAME` the certificate is not looked at, which hides
questions from who listens but not from who takes the server's place ("opportunistic").
"""

from __future__ import annotations

import asyncio
import os
import ssl

from dns.servers import ANY_NAME, Server
from dns.stream_asker import IDLE_S, Connect, StreamAsker
from dns.upstream import RandomId
from netstack.errors import HostError


class Certificates:
    """Whom to trust: the authorities of the host, or those in the PEM file `cafile`. Read when first wanted, in a thread."""

    def __init__(self, cafile: str | None = None) -> None:
        self._cafile = cafile
        self._contexts: dict[bool, asyncio.Future[ssl.SSLContext]] = {}

    async def context(self, strict: bool) -> ssl.SSLContext:
        """Raises `HostError` when the file cannot be read."""
        reading = self._contexts.get(strict)
        if reading is None:  # some 30 ms of reading and parsing
            reading = asyncio.get_running_loop().run_in_executor(None, self._read, strict)
            self._contexts[strict] = reading
        try:
            return await asyncio.shield(reading)
        except OSError as error:
            if self._contexts.get(strict) is reading:  # to be read again
                del self._contexts[strict]
            raise HostError(f"dns: certificates in {self._cafile or 'the host'}: {error}") from None

    def _read(self, strict: bool) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=self._cafile)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.set_alpn_protocols(["dot"])
        if not strict:
            made.check_hostname = False
            made.verify_mode = ssl.CERT_NONE
        return made


class TlsAsker:
    """A `dns.servers.Asker` for `server`, whose `tls` is the name to expect, or `ANY_NAME`. Used from one event loop."""

    def __init__(
        self,
        server: Server,
        certificates: Certificates,
        *,
        idle_s: float = IDLE_S,
        new_id: RandomId = lambda: os.urandom(2),
        connect: Connect | None = None,
    ) -> None:
        self._connect = connect
        assert server.tls, "a server to be asked over TLS"
        self._server = server
        self._name: str = server.tls
        self._certificates = certificates
        self._idle_s = idle_s
        self._new_id = new_id
        self._stream: StreamAsker | None = None
        self._closed = False

    async def ask(self, query: bytes, end: int) -> bytes:
        if self._stream is None:
            strict = self._name != ANY_NAME
            context = await self._certificates.context(strict)
            if self._stream is None:  # several may have waited
                self._stream = StreamAsker(
                    self._server.upstream,
                    self._new_id,
                    context=context,
                    name=self._name if strict else self._server.upstream.address,
                    idle_s=self._idle_s,
                    connect=self._connect,
                )
                if self._closed:
                    self._stream.close()
        return await self._stream.ask(query, end)

    def renew(self) -> None:
        if self._stream is not None:
            self._stream.renew()

    def close(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.close()
