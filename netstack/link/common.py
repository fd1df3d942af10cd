"""What all socket links share: frame sizes, and what a failed system call on a link means."""

from __future__ import annotations

import errno
from typing import Final

from netstack.api import Link
from netstack.errors import LinkDown

ETHERNET_HEADER: Final = 14
VLAN_TAG: Final = 4

LARGEST_FRAME: Final = 65550
"""A TSO super-frame of the largest IP datagram, as krunkit and Virtualization.framework send (spec: gvproxy 1.4)."""

_PASSING: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM})


def only_busy(name: str, error: OSError) -> None:
    """Return when the call may simply be made again later; otherwise raise `LinkDown`. The one place that decides it.

    ENOBUFS is what macOS says instead of "would block" on a datagram socket; gvproxy ended on it (#367).
    """
    if error.errno not in _PASSING:
        raise LinkDown(f"{name}: {error.strerror or error}") from None


def bare(link: Link) -> Link:
    """The link inside its wrappers (capture, faults), which have it as `inner`."""
    while (inner := getattr(link, "inner", None)) is not None:
        link = inner
    return link
