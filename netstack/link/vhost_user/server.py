"""A network card's connection: the control socket of one front-end (`channel`) with a `NetDevice` behind it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from netstack.link.vhost_user.channel import Channel
from netstack.link.vhost_user.device import warn
from netstack.link.vhost_user.link import VhostUserLink
from netstack.link.vhost_user.net import NetDevice
from netstack.observe.metrics import Counters


class VhostUserPeer(Channel[NetDevice]):
    """One connection. `sock` becomes its own. `appeared(link)`, `gone(link, reason)` as for `NetDevice`; `closed(reason)` once,
    when the connection is over, after the link is gone. `contain` keeps a fault of ours from the loop."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        mtu: int,
        *,
        appeared: Callable[[VhostUserLink], None],
        gone: Callable[[VhostUserLink, str], None],
        closed: Callable[[str], None] = lambda reason: None,
        counters: Counters | None = None,
        mac: bytes | None = None,
        offload: bool = True,
        with_config: bool = True,
        complain: Callable[[str, str], None] = warn,
        contain: Callable[[str], contextlib.AbstractContextManager[None]] = lambda where: contextlib.nullcontext(),
    ) -> None:
        device = NetDevice(
            name,
            mtu,
            appeared=appeared,
            gone=gone,
            counters=counters,
            mac=mac,
            offload=offload,
            with_config=with_config,
            complain=complain,
        )
        super().__init__(sock, device, closed=closed, contain=contain)
