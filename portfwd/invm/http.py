"""One HTTP request to VPNKit's control API (spec vpnkit 7.2) over any socket, in the little that needs.

The standard library's client is blocking and knows host names only; a VM's small tools want neither it nor aiohttp.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, Final

from netstack.errors import HostError

TIMEOUT_S: Final = 120.0  # spec vpnkit 7.2
MAX_BODY: Final = 8 << 20
"""Octets of an answer that are taken; a list of 65,535 ports has fewer."""
_MAX_HEAD: Final = 64 * 1024


async def request(
    sock: socket.socket, method: str, path: str, document: Any = None, *, keep: bool = False
) -> tuple[int, bytes]:
    """Status and body of one request with an optional JSON body; raises `HostError`, `OSError`. Closes `sock` unless `keep`."""
    body = b"" if document is None else json.dumps(document).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: unix", "Accept: application/json", f"Content-Length: {len(body)}"]
    if document is not None:
        lines.append("Content-Type: application/json")
    if not keep:
        lines.append("Connection: close")
    head = "\r\n".join([*lines, "", ""]).encode()
    stream = sock.dup() if keep else sock
    try:
        reader, writer = await asyncio.open_connection(sock=stream, limit=_MAX_HEAD)
    except BaseException:
        stream.close()
        raise
    try:
        writer.write(head + body)
        await writer.drain()
        return await _answer(reader)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise HostError(
            f"the control server's answer is no HTTP that could be understood: {error or type(error).__name__}"
        ) from None
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = head[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ValueError(f"{head[0][:80]!r}")
        status = int(rest[:3])
        if status >= 200:
            break
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return status, await _chunks(reader)
    if "content-length" in fields:
        return status, await reader.readexactly(_bounded(int(fields["content-length"])))
    if status == 204:
        return status, b""
    body = await reader.read(MAX_BODY + 1)
    while more := await reader.read(_bounded(MAX_BODY + 1 - len(body)) or 1):
        body += more
    return status, body


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if not size:
            while (await reader.readuntil(b"\r\n")) != b"\r\n":
                pass
            return body
        body += await reader.readexactly(_bounded(size))
        _bounded(len(body))
        await reader.readexactly(2)


def _bounded(octets: int) -> int:
    if not 0 <= octets <= MAX_BODY:
        raise ValueError(f"{octets} octets of body; at most {MAX_BODY} are taken")
    return octets
