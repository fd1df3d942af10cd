"""What a control client is told when something cannot be done: a status and a text that says what to change."""

from __future__ import annotations

import errno
from typing import Any, Final

from netstack.errors import ConfigError, HostError, NetstackError
from portfwd.errors import AlreadyPublished, BindFailed, NotAllowed, TooMany


class ApiError(Exception):
    """Answered as `{"message": ...}` with `status`; `more` are further members of that object."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.more = more


_BIND_STATUS: Final = {
    errno.EADDRINUSE: 409,
    errno.EEXIST: 409,
    errno.EACCES: 403,
    errno.EPERM: 403,
    errno.EMFILE: 503,
    errno.ENFILE: 503,
    errno.ENOBUFS: 503,
    errno.ENOMEM: 503,
}


def of(error: NetstackError) -> ApiError:
    """The answer to an error of ours."""
    words = str(error)
    match error:
        case AlreadyPublished():
            return ApiError(409, words)
        case NotAllowed():
            return ApiError(403, words)
        case TooMany():
            return ApiError(429, words)
        case BindFailed():
            return ApiError(_BIND_STATUS.get(error.number, 400), words)
        case ConfigError():
            return ApiError(400, words)
        case HostError():
            return ApiError(409, words)
        case _:
            return ApiError(400, words)
