"""What a guest is shown in place of an answer: a status and a few lines of HTML."""

from __future__ import annotations

import html
import re
from http import HTTPStatus
from typing import Final

_ADVICE: Final = {
    400: "The request is not one that a proxy can pass on.",
    403: "The network that this machine is in does not allow it.",
    502: "The server, or the proxy before it, did not answer as HTTP servers do.",
    503: "If this host is behind an HTTP proxy, name the proxy in the settings of pyvpnkit (http_proxy.json).",
}


def reason(status: int, words: str = "") -> bytes:
    """The reason phrase: `words` as far as they can stand there, else the usual one."""
    words = re.sub(r"[^\x20-\x7e]+", " ", words)[:200].strip()
    if not words:
        try:
            words = HTTPStatus(status).phrase
        except ValueError:
            words = "Error"
    return words.encode("ascii")


def page(status: int, words: str) -> bytes:
    """The body."""
    title = f"{status} {reason(status).decode()}"
    return (
        f"<!DOCTYPE html>\n<html><head><meta charset=utf-8><title>{title}</title></head>\n<body><h1>{title}</h1>\n"
        f"<p>{html.escape(words)}</p>\n<p>{_ADVICE.get(status, '')}</p>\n<hr><p>pyvpnkit</p></body></html>\n"
    ).encode("utf-8", "replace")
