"""How a request ends that is not answered by its server."""

from __future__ import annotations

from netstack.errors import NetstackError


class Refusal(NetstackError):
    """The guest is answered with this status and a page that has these words, which hold no secrets."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Gone(NetstackError):
    """The guest is not there any more, or has not gone on in time: there is nobody to answer."""
