"""Ports of the host that stay free until they are used: below those that the kernel gives to others meanwhile."""

from __future__ import annotations

import itertools
import os
import socket

_numbers = itertools.count(10000 + os.getpid() % 200 * 100)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """One that can be bound on every address now, and that no call gives again."""
    while True:
        number = 10000 + next(_numbers) % 20000
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("0.0.0.0", number))
            except OSError:
                continue
        return number
