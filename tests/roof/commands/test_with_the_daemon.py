"""The commands against `pyvpnkit run` itself: what outlives it, and what goes with it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path

from tests.roof.api.conftest import until
from tests.roof.commands.conftest import pyvpnkit
from tests.roof.guest import StreamGuest, daemon


async def test_a_port_published_by_hand_is_there_again_after_the_daemon_was_killed(tmp_path: Path) -> None:
    options = ("--state-dir", str(tmp_path), "--dns-hosts-file", "off", "--grace", "0.1")
    control = str(tmp_path / "control.sock")
    with daemon(tmp_path, *options) as first:
        done = await pyvpnkit(control, "expose", "0:80")
        spec = done.out.strip()
        assert re.fullmatch(r"tcp:127\.0\.0\.1:\d+:80", spec), done.err
        # Written half a second later.
        await until(lambda: spec in _text(tmp_path / "forwards.json"))
        first.signal(signal.SIGKILL)
        await asyncio.to_thread(first.process.wait, 30)
    assert "no daemon is running" in (await pyvpnkit(control, "ports")).err
    with daemon(tmp_path, *options) as second:
        (forward,) = json.loads((await pyvpnkit(control, "ports", "--json")).out)
        assert (forward["spec"], forward["owner"]) == (spec, "hand")
        await asyncio.to_thread(_reaches_the_guest, second.link, forward["port"])
        assert (await pyvpnkit(control, "unexpose", spec)).status == 0
        assert await asyncio.to_thread(second.stop) == 0
    assert "control.sock" not in os.listdir(tmp_path)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _reaches_the_guest(link: str, port: int) -> None:
    """A client of the host's port is answered by the guest's port 80."""
    guest = StreamGuest(link)
    guest.lease()
    client = socket.create_connection(("127.0.0.1", port))
    serving = threading.Thread(target=lambda: guest.listen(80).send(0x18, b"hello"))
    serving.start()
    client.settimeout(30)
    assert client.recv(5) == b"hello"
    serving.join(30)
    client.close()
    guest.close()
