"""What all socket links share: frame sizes, and what a failed system call on a link means."""

from __future__ import annotations

import errno
from typing import Any, Final

from netstack.api import Link
from netstack.errors import LinkDown

ETHERNET_HEADER: Final = 14
VLAN_TAG: Final = 4

LARGEST_FRAME: Final = 65550
"""A TSO super-frame of the largest IP datagram, as krunkit and Virtualization.framework send (spec: gvproxy 1.4)."""

SUPER_FRAME_PAYLOAD: Final = 45 * 1448
"""TCP payload of the largest super-frame we send: whole segments of MTU 1500 (IP total length must stay below 65,536)."""

_PASSING: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM})


def super_frame_payload(mtu: int) -> int:
    """The same for links of `mtu`: as many whole segments, at least one."""
    return max(mtu - 40, SUPER_FRAME_PAYLOAD // (mtu - 40) * (mtu - 40))


def only_busy(name: str, error: OSError) -> None:
    """Return when the call may simply be made again later; otherwise raise `LinkDown`. The one place that decides it.

    ENOBUFS is what macOS says instead of "would block" on a datagram socket; gvproxy ended on it (#367).
    """
    if error.errno not in _PASSING:
        raise LinkDown(f"{name}: {error.strerror or error}") from None


class Wrapper:
    """The face of a link around another, `inner`: all that is told of it, and none of the short ways for single frames and places,
    past which frames would go unseen. `receive`, `send` and `flush` are for who derives from it."""

    inner: Link

    _TOLD: Final = ("window", "partial_checksums_in", "watch", "unwatch", "publish")

    def __init__(self, inner: Link) -> None:
        self.inner = inner
        self.name = inner.name
        self.headroom = inner.headroom
        self.mtu = inner.mtu
        self.max_frame = inner.max_frame
        self.tso = inner.tso
        self.partial_checksums = inner.partial_checksums
        self.fileno = inner.fileno
        self.prefix = inner.prefix
        self.close = inner.close
        for name in self._TOLD:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def __getattr__(self, name: str) -> Any:
        # `busy` changes while the link lives; whether there is one at all is asked too.
        if name == "busy":
            return self.inner.busy  # type: ignore[attr-defined]
        raise AttributeError(name)


def bare(link: Link) -> Link:
    """The link inside its wrappers (capture, faults), which have it as `inner`."""
    while (inner := getattr(link, "inner", None)) is not None:
        link = inner
    return link
