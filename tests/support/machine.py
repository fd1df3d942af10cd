"""A machine that is not ours: Debian's kernel under QEMU's TCG, in a namespace of the test (`pyvpnkit.machine`).

What is downloaded for it stays in `PYVPNKIT_TEST_CACHE`, or where the demo keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from netstack.errors import HostError
from pyvpnkit import boot, machine
from pyvpnkit.boot import Parts
from pyvpnkit.machine import MAC, Card
from tests.support.netns import Namespace


def parts(directory: Path, kind: boot.Kind = boot.SMALL, added: Iterable[tuple[str, int, bytes]] = ()) -> Parts:
    """The kernel, and an initramfs in `directory`, with files `added`; skips where there is none to be had."""
    try:
        return boot.parts(directory, Path(os.environ.get("PYVPNKIT_TEST_CACHE") or boot.cache()), kind, added)
    except boot.NotHere as error:
        pytest.skip(f"expected: {error}")
    except HostError as error:
        pytest.skip(str(error))


class Machine(machine.Machine):
    """A machine that has booted, in the namespace `place` (its socket links cross namespaces, it needs only `lo`)."""

    def __init__(self, place: Namespace, made_of: Parts, card: Card, *, mac: str = MAC, processors: int = 1) -> None:
        words = machine.command(made_of, card, mac=mac, processors=processors)
        super().__init__(["nsenter", f"--net={place.path}", *words])
        try:
            self.wait_up()
        except BaseException:
            self.kill()
            raise
