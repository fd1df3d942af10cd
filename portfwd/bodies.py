"""JSON in request bodies, read as Go's decoder reads it: names in any case, unknown ones passed over, null is nothing.

The embedders of VPNKit and gvproxy send what Go wrote. Everything is bounded, and what is wrong is said in one sentence.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from typing import Any, Final

from aiohttp import web

BODY_S: Final = 10.0
"""As gvproxy's server, which reads a request for so long."""
_SHOWN: Final = 60
"""Characters of a bad value that an error repeats."""


class BadBody(Exception):
    """What a client sent cannot be used; `status` of HTTP and a text that says what would be accepted."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


async def read(request: web.Request, limit: int) -> bytes:
    """The whole body, at most `limit` octets; raises `BadBody` (413, 408, 400)."""
    too_long = BadBody(f"the body is longer than {limit} octets", 413)
    if (request.content_length or 0) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise BadBody(f"the body did not come within {BODY_S:.0f} s", 408) from None
    except (
        web.HTTPException,
        ValueError,
        OSError,
        RuntimeError,  # aiohttp's word for a client that left
    ) as error:  # the client's encoding or chunks are broken, or it went away
        raise BadBody(f"the body cannot be read: {error}") from None
    return bytes(body)


def fields(body: bytes) -> dict[str, Any]:
    """The members of a JSON object by their names in lower case; raises `BadBody`."""
    try:
        document = json.loads(body.decode())
    except UnicodeDecodeError:
        raise BadBody("the body is not UTF-8") from None
    except RecursionError:
        raise BadBody("the body is nested too deeply") from None
    except ValueError as error:
        raise BadBody(f"the body is not JSON: {error}") from None
    if document is None:
        return {}
    return members(document, "the body")


def members(document: Any, where: str) -> dict[str, Any]:
    """As `fields`, of a value that is JSON already."""
    if not isinstance(document, dict):
        raise BadBody(f"{where} must be a JSON object, not {shown(document)}")
    return {str(name).lower(): value for name, value in document.items() if value is not None}


def text(found: dict[str, Any], name: str) -> str:
    """A member that is text; empty when it is missing."""
    value = found.get(name.lower(), "")
    if not isinstance(value, str):
        raise BadBody(f"{name} must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadBody(f"{name} is no text: it holds half of a surrogate pair") from None
    return value


def port(found: dict[str, Any], name: str) -> int:
    """A member that is a port number; 0 when it is missing."""
    value = found.get(name.lower(), 0)
    if type(value) is not int or not 0 <= value <= 65535:
        raise BadBody(f"{name} must be a number from 0 to 65535, not {shown(value)}")
    return value


def address(found: dict[str, Any], name: str) -> str:
    """A member that is an IP address, in its canonical text; empty when it is missing."""
    value = text(found, name)
    if not value:
        return ""
    try:
        parsed = ipaddress.ip_address(value)
    except ValueError:
        raise BadBody(f"{name}: invalid IP address: {shown(value)}") from None
    if parsed.version == 6 and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed)


def shown(value: Any) -> str:
    """A value for an error text."""
    words = repr(value)
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
