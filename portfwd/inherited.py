"""Bound sockets that a parent with more rights left us: systemd's socket activation (sd_listen_fds(3)), for ports below 1024.

A unit with `ListenStream=127.0.0.1:80` and the service started by it: `-p 80:80` then uses that socket instead of binding one.
A socket is recognised by what it is bound to, so names and order do not matter. It is kept open when the forward is
removed, since nobody here could bind it again; until the forward comes back its clients wait in the kernel's queue.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Final

from portfwd.spec import PublishSpec

log = logging.getLogger("pyvpnkit.portfwd")

FIRST: Final = 3
"""SD_LISTEN_FDS_START."""
MAX_INHERITED: Final = 1024

_KINDS: Final = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}


class Inherited:
    """The sockets, by what they are bound to. Called with a spec it gives a duplicate of the fitting one, or `None`."""

    def __init__(self, sockets: Mapping[tuple[str, str, int], socket.socket] | None = None) -> None:
        self._sockets = dict(sockets or {})

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ, pid: int | None = None) -> Inherited:
        """Take what systemd announced to this very process, and take the announcement away, so that no child believes it."""
        announced, meant = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
        environ.pop("LISTEN_FDNAMES", None)
        if not announced.isdigit() or meant != str(os.getpid() if pid is None else pid):
            return cls()
        found: dict[tuple[str, str, int], socket.socket] = {}
        for fd in range(FIRST, FIRST + min(int(announced), MAX_INHERITED)):
            try:
                os.set_inheritable(fd, False)
                sock = socket.socket(fileno=fd)
            except OSError as error:
                log.warning("descriptor %d, announced by LISTEN_FDS, is no socket: %s", fd, error.strerror)
                continue
            key = _key(sock)
            if key is None:
                log.warning("descriptor %d, announced by LISTEN_FDS, is no bound TCP or UDP socket; it is not used", fd)
                sock.detach()
                continue
            sock.setblocking(False)
            found[key] = sock
        return cls(found)

    def __len__(self) -> int:
        return len(self._sockets)

    def __call__(self, spec: PublishSpec) -> socket.socket | None:
        sock = self._sockets.get((spec.protocol, spec.bind, spec.port))
        return None if sock is None else sock.dup()

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()


def _key(sock: socket.socket) -> tuple[str, str, int] | None:
    protocol = _KINDS.get(sock.type)
    if protocol is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    address, port = sock.getsockname()[:2]
    if not port or (protocol == "tcp" and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        return None
    return protocol, address, port
