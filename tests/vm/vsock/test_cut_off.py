"""A hypervisor that cuts its guest's memory off while the device works in it (threat G7: SIGBUS)."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.vsock_world import World
from vm.vsock.packet import SIZE

ROOT = Path(__file__).parents[3]
LIMIT_S = 60.0


@pytest.mark.parametrize("way", ["outbound", "inbound", "idle"])
def test_the_device_stops_and_the_process_goes_on(way: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, way],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr


def cut_off(way: str) -> None:
    """In a process of its own: the played guest has the same memory, and must not touch it any more."""
    world = World()
    sock, far = world.from_guest()
    if way == "outbound":
        sock.send(b"x" * 3000)
    elif way == "inbound":
        far.send(b"x" * (4 * SIZE))
    for number in range(len(world.memory.files)):
        world.memory.truncate(number, 0)
    if way == "idle":
        world.guest.kick(1)
    world.poller.wake()
    world.device_turn()
    world.poller.wake()  # a turn that it was cut off in may read zeros
    world.device_turn()
    assert world.device.broken
    world.channel.close()
    assert not world.device.streams
    print("survived", flush=True)
    os._exit(0)


if __name__ == "__main__":
    faulthandler.enable()
    cut_off(sys.argv[1])
