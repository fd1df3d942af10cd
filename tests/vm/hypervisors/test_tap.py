"""A TAP with a hypervisor at its descriptor and our network at its interface, in network namespaces, by the kernel's own word."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from netstack.errors import ConfigError
from tests.support.netns import HOST, ROOT, Namespace, World, inside, require, wait_until, world
from tests.support.specs import card, minimal
from tests.support.webhost import web
from vm.hypervisors.tap import Tap, behind, main

TAP = "vmtap0"
MEGABYTE = 1 << 20
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000
_CSUM_TSO4 = 1 | 2


@pytest.fixture
def place(tmp_path: Path) -> Iterator[World]:
    require("ip", "busybox")
    with world(tmp_path) as made:
        yield made


def opened(name: str, namespace: Namespace) -> int:
    """The descriptor of a TAP, as Firecracker has it: with virtio-net headers and segmentation offload."""
    with inside(namespace.path):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_NO_PI_VNET_HDR))
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", 12))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _CSUM_TSO4)
    return fd


@contextlib.contextmanager
def hypervisor(host: Namespace, guest: Namespace) -> Iterator[None]:
    """What carries frames between a guest's card, here `eth0` of a namespace, and the TAP's descriptor."""
    ends = opened(TAP, host), opened("eth0", guest)
    stop, stopping = os.pipe()

    def carry() -> None:
        while stop not in (readable := select.select([*ends, stop], [], [])[0]):
            for fd in readable:
                with contextlib.suppress(OSError):  # down, or full: lost as on a wire
                    os.write(ends[fd == ends[0]], os.read(fd, 1 << 17))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        os.close(stopping)
        thread.join()
        for fd in (*ends, stop):
            os.close(fd)


def there(namespace: Namespace, name: str = TAP) -> bool:
    return f" {name}: " in namespace.ip("-o", "link")


def fetch(guest: Namespace, port: int) -> subprocess.CompletedProcess[str]:
    return guest.run("busybox", "wget", "-q", "-O", "/dev/null", f"http://{HOST}:{port}/{MEGABYTE}", check=False)


def beside(name: str = TAP) -> tuple[str, ...]:
    return behind(card("tap", tap=name), ())


def test_a_guest_behind_a_tap_has_our_network(place: World) -> None:
    guest = place.namespace()
    daemon = place.daemon("--link", f"packet:{TAP}", wrap=beside())
    with hypervisor(place.host, guest), web(place.host) as port:
        assert guest.udhcpc().startswith("192.168.65.")
        assert fetch(guest, port).returncode == 0, daemon.said()
    assert daemon.stop() == 0
    assert not there(place.host)


@pytest.mark.parametrize("shield", [True, False])
def test_a_guest_reaches_nothing_of_the_hosts_own_stack(shield: bool, place: World) -> None:
    """And that it would, were the device made without the shield."""
    guest = place.namespace()
    place.host.ip("addr", "add", "10.9.9.9/32", "dev", "lo")
    if shield:
        keeper = place.host.start(*beside(), "sh", "-c", "echo ready; exec sleep 1000", cwd=ROOT)
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "ready\n"
    else:
        place.host.ip("tuntap", "add", "dev", TAP, "mode", "tap")
        place.host.ip("link", "set", TAP, "up")
    with hypervisor(place.host, guest), place.host.datagrams("10.9.9.9", 0) as server:
        guest.ip("addr", "add", "10.8.8.8/32", "dev", "eth0")
        guest.ip("link", "set", "eth0", "up")
        guest.ip("route", "add", "10.9.9.9/32", "dev", "eth0")
        asked = guest.run("busybox", "arping", "-c", "3", "-I", "eth0", "10.9.9.9", check=False)
        assert (asked.returncode != 0) == shield
        guest.ip("neigh", "replace", "10.9.9.9", "lladdr", "ff:ff:ff:ff:ff:ff", "dev", "eth0")
        with guest.datagrams("10.8.8.8") as client:
            client.sendto(b"hello", server.getsockname())
        assert bool(select.select([server], [], [], 1.0 if shield else 20.0)[0]) != shield
        linklocal = "fe80::" in place.host.ip("-6", "addr", "show", "dev", TAP)
        assert not (shield and linklocal)


def test_the_device_stays_when_the_network_is_killed_and_a_guest_goes_on_with_the_next_one(place: World) -> None:
    guest = place.namespace()
    first = place.daemon("--link", f"packet:{TAP}", wrap=beside())
    with hypervisor(place.host, guest), web(place.host) as port:
        guest.udhcpc()
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        assert there(place.host)
        second = place.daemon("--link", f"packet:{TAP}", wrap=beside())
        assert fetch(guest, port).returncode == 0, second.said()
    assert second.stop() == 0
    assert not there(place.host)


def test_a_command_that_ends_by_itself_leaves_the_device_for_the_next_run(place: World) -> None:
    words = (*beside(), "sh", "-c", "exit 7")
    assert run(place.host, *words) == 7
    assert there(place.host)
    assert run(place.host, *beside(), "sh", "-c", "kill -9 $$") == 128 + 9
    assert there(place.host)


def test_a_command_that_is_missing_leaves_nothing(place: World) -> None:
    assert run(place.host, *beside(), "/no/such/command") == 127
    assert not there(place.host)


def test_other_signals_reach_the_command(place: World) -> None:
    script = "trap 'echo heard' USR1; echo ready; while :; do sleep 0.05; done"
    child = place.host.start(*beside(), "sh", "-c", script, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGUSR1)
    assert child.stdout.readline() == "heard\n"
    child.terminate()
    assert child.wait(20) == 128 + signal.SIGTERM
    assert not there(place.host)


def test_the_command_does_not_outlive_it(place: World) -> None:
    child = place.host.start(*beside(), "sh", "-c", "echo $$; exec sleep 1000", cwd=ROOT)
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.kill()
    child.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())


def test_a_device_of_somebody_elses_is_used_as_it_is(place: World) -> None:
    place.host.ip("tuntap", "add", "dev", TAP, "mode", "tap")
    assert run(place.host, *beside(), "true") == 0
    child = place.host.start(*beside(), "sh", "-c", "echo ready; exec sleep 1000", cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert "UP" not in place.host.ip("-o", "link", "show", TAP).partition(">")[0]
    child.terminate()
    child.wait(20)
    assert there(place.host)


def test_an_interface_that_is_no_tap_is_refused(place: World) -> None:
    place.host.ip("link", "add", TAP, "type", "veth", "peer", "name", "other")
    with inside(place.host.path), pytest.raises(ConfigError, match="no TAP; choose another name"):
        Tap(TAP)


@pytest.mark.parametrize("name", ["", "a" * 16, "a/b", "a b", "a:1", ".."])
def test_what_is_no_name_of_an_interface_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name of an interface"):
        Tap(name)


def test_a_complaint_is_said_and_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        assert main(["--name", "a/b", "--", "touch", "/nonexistent/file"]) == 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert "not a name of an interface" in capsys.readouterr().err


def test_its_command_line_is_that_of_the_card() -> None:
    nic = card("tap", mtu=9000)
    assert minimal(nics=(nic,)).uuid == UUID(int=7)
    words = behind(nic, ("pyvpnkit", "run", "--link", f"packet:{nic.tap}"))
    assert words[1:] == (
        *("-m", "vm.hypervisors.tap", "--name", TAP, "--mtu", "9000", "--"),
        *("pyvpnkit", "run", "--link", f"packet:{TAP}"),
    )


def run(place: Namespace, *words: str) -> int:
    child = place.start(*words, cwd=ROOT)
    assert child.stdout is not None
    child.stdout.read()
    return child.wait(20)
