"""The shared ring with QEMU: what is agreed on, and what happens when either side, or both, begin anew."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import pytest

from netstack.link.vhost_user.net import FEATURES, OFFLOADS
from pyvpnkit import machine as qemu
from pyvpnkit.boot import Parts
from tests.qemu.site import ADDRESS, TRANSFER_S, Site, download, held, ping_and_names, site, sum_of, upload
from tests.support.machine import Machine
from tests.support.netns import HOST, wait_until
from tests.support.webhost import MB, exactly, read_all, serve

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

Doing: TypeAlias = Callable[[Machine, Site], AbstractContextManager[None]]
BACK_S = 2.0
"""How long a guest may be without a network after its daemon, or its machine, is there again."""
REQUESTS = 20
"""By each processor: two frames of each way at least."""
OTHER_MAC = "5a:94:ef:e4:0c:ef"
TELLING = {"tcp-segmentation-offload", "tx-checksum-ip-generic", "rx-gro-hw", "scatter-gather"}
"""Lines of `ethtool -k` that say what was agreed on."""


@pytest.fixture
def guest(ring_site: Site) -> Machine:
    return ring_site.machine()


def _agreed(guest: Machine) -> set[str]:
    """The features of the guest's network card, by the names of virtio."""
    bits = guest.run("cat /sys/bus/virtio/devices/virtio0/features")
    return {name for name, bit in FEATURES.items() if bits[bit] == "1"}


def _offloads(guest: Machine) -> set[str]:
    """What of `TELLING` is on."""
    lines = (line.split(":") for line in guest.run("ethtool -k eth0").splitlines())
    return {words[0].strip() for words in lines if words[-1].split()[:1] == ["on"]} & TELLING


def _status(site: Site) -> str:
    """What the daemon says on SIGUSR1."""
    before = len(site.daemon.said())
    site.daemon.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "\nntp: " in site.daemon.said()[before:])
    return site.daemon.said()[before:]


def test_offloads_are_agreed_on(guest: Machine, ring_site: Site) -> None:
    agreed = _agreed(guest)
    assert agreed >= set(OFFLOADS) - {"HOST_USO"} | {"MRG_RXBUF", "RING_INDIRECT_DESC", "RING_EVENT_IDX", "VERSION_1"}
    assert _offloads(guest) == TELLING
    found = re.search(r"features=([\w,]+)", _status(ring_site))
    # MAC, link state and control queue are QEMU's own.
    assert found is not None and set(found[1].split(",")) == agreed - {"MAC", "STATUS", "CTRL_VQ", "ANY_LAYOUT"}


def test_files_of_64_mib(guest: Machine, ring_site: Site) -> None:
    download(guest, ring_site.port, 64 * MB)
    upload(guest, ring_site.port, 64 * MB)


def test_three_reboots_in_the_middle_of_a_transfer(guest: Machine, ring_site: Site) -> None:
    """The rings stop while frames are on them; the next kernel has the same address and nothing of the old one's remains."""
    site = ring_site
    for _ in range(3):
        with _flood(guest, site):
            # Not `reboot -f`: when Linux 6.1 marks the device broken (device_shutdown) while virtnet_poll_cleantx waits for its
            # used ring, that loop never ends. The trace of such a guest has free_old_xmit_skbs, and no word about a bad ring.
            guest.send("echo b >/proc/sysrq-trigger")
            guest.wait_up()
        assert guest.address == ADDRESS
        ping_and_names(guest)
        upload(guest, site.port, 4 * MB)
        site.daemon.wait_descriptors(site.attached)


@contextlib.contextmanager
def _nothing(guest: Machine, site: Site) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _flood(guest: Machine, site: Site) -> Iterator[None]:
    """Octets without end are on their way to the guest."""

    def send(connection: socket.socket) -> None:
        while True:
            connection.sendall(bytes(MB))

    with serve(site.host.listen(), send) as (_, port):
        guest.run(f"rm -f /tmp/came; (nc {HOST} {port} | (head -c 1m >/tmp/came; cat >/dev/null)) &")
        guest.run("until [ -s /tmp/came ]; do usleep 10000; done")
        yield


@contextlib.contextmanager
def _drain(guest: Machine, site: Site) -> Iterator[None]:
    """And from the guest."""
    came = threading.Event()

    def receive(connection: socket.socket) -> None:
        exactly(connection, MB)
        came.set()
        read_all(connection)

    with serve(site.host.listen(), receive) as (_, port):
        guest.run(f"(nc {HOST} {port} </dev/zero) &")
        assert came.wait(TRANSFER_S)
        yield


def _killed_and_restarted(guest: Machine, site: Site) -> None:
    """The daemon; the guest sees its cable pulled, and must be back in time."""
    site.kill_daemon()
    guest.run("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do usleep 10000; done")
    site.start_daemon()
    began = time.monotonic()
    guest.run("until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do usleep 10000; done")
    download(guest, site.port, 1000)
    assert time.monotonic() - began < BACK_S


@pytest.mark.parametrize("doing", [_nothing, _flood, _drain])
def test_the_daemon_is_killed_and_restarted(guest: Machine, ring_site: Site, doing: Doing) -> None:
    """The guest, which knows nothing of it, goes on; what was open is reset as soon as it says something there."""
    site = ring_site
    boot = guest.run("cat /proc/sys/kernel/random/boot_id")
    guest.run("mkfifo /tmp/says; rm -f /tmp/ended; (sleep 1000 >/tmp/says) &")
    with site.host.listen() as listener:
        port = listener.getsockname()[1]
        guest.run(f"(nc {HOST} {port} </tmp/says >/dev/null; echo >/tmp/ended) &")
        connection, _ = listener.accept()
        with connection:
            guest.run("echo before >/tmp/says")
            assert exactly(connection, 7) == b"before\n"
            guest.run(f"until netstat -tn | grep -q ' 0 .*:{port} '; do usleep 10000; done")  # it is acknowledged
            with doing(guest, site):
                _killed_and_restarted(guest, site)
            guest.run("[ ! -e /tmp/ended ]")
            guest.run("echo after >/tmp/says; until [ -e /tmp/ended ]; do usleep 10000; done")
    guest.run("killall sleep nc; rm -f /tmp/says", check=False)
    with held(guest, site):
        ping_and_names(guest)
        upload(guest, site.port, 4 * MB)
    guest.run("killall sleep nc", check=False)
    site.daemon.wait_descriptors(site.attached)
    assert guest.run("cat /proc/sys/kernel/random/boot_id") == boot


@contextlib.contextmanager
def _ring_site(
    parts: Parts, directory: Path, card: str = "", link: str = "", processors: int = 1, options: Sequence[str] = ()
) -> Iterator[Site]:
    """With these options of QEMU's card and of our link, and as many queue pairs as processors."""
    path = str(directory / "net.sock")
    other_end = qemu.shared_ring(path, card, queues=processors, server="mode=client" in link)
    with site(f"vhost-user:{path}{link}", other_end, parts, directory, options=options, processors=processors) as made:
        yield made


SUBSETS = [
    pytest.param(
        "csum=off,guest_csum=off",
        "",
        {"CSUM", "GUEST_CSUM"},
        TELLING - {"rx-gro-hw"},
        id="no checksums are left to the other side",
    ),
    pytest.param(
        "host_tso4=off,host_tso6=off,guest_tso4=off,guest_tso6=off",
        "",
        {"HOST_TSO4", "HOST_TSO6", "GUEST_TSO4", "GUEST_TSO6"},
        {"tcp-segmentation-offload", "rx-gro-hw"},
        id="no segments are",
    ),
    pytest.param("mrg_rxbuf=off", "", {"MRG_RXBUF"}, set(), id="a frame in one buffer"),
    pytest.param(
        "event_idx=off,indirect_desc=off", "", {"RING_EVENT_IDX", "RING_INDIRECT_DESC"}, set(), id="the plainest rings"
    ),
    pytest.param(
        "disable-legacy=off,disable-modern=on,mrg_rxbuf=off",
        "",
        {"VERSION_1", "MRG_RXBUF"},
        set(),
        id="a legacy device, with its header of ten octets",
    ),
    pytest.param("rx_queue_size=1024,tx_queue_size=1024,host_mtu=1400", "", set(), set(), id="long rings, a small MTU"),
    pytest.param("", ",offload=off,config=off", {*OFFLOADS}, TELLING, id="none of it offered"),
]


@pytest.mark.parametrize(("options", "link", "features", "offloads"), SUBSETS)
def test_with_fewer_features(
    parts: Parts, tmp_path: Path, options: str, link: str, features: set[str], offloads: set[str]
) -> None:
    with _ring_site(parts, tmp_path, "," + options if options else "", link) as site:
        guest = site.machine()
        assert guest.address == ADDRESS
        assert not _agreed(guest) & features
        assert _offloads(guest) == TELLING - offloads
        assert guest.run("cat /sys/class/net/eth0/mtu") == ("1400" if "host_mtu" in options else "1500")
        assert "config=off" not in link or "PROTOCOL_F_CONFIG" not in guest.said(), "QEMU's warning"
        ping_and_names(guest)
        download(guest, site.port, 8 * MB)
        upload(guest, site.port, 4 * MB)
        site.daemon.wait_descriptors(site.attached)


def test_two_queue_pairs(parts: Parts, tmp_path: Path) -> None:
    """One for each processor, and both carry frames."""
    with _ring_site(parts, tmp_path, processors=2) as site:
        guest = site.machine()
        assert guest.address == ADDRESS
        assert "MQ" in _agreed(guest)
        assert guest.run("ethtool -l eth0").count("Combined:\t2") == 2
        assert "queue_pairs=2 " in _status(site)
        ping_and_names(guest)
        for processor in "1", "2":
            guest.run(f"wget -q -O /tmp/text http://{HOST}:{site.port}/text/{4 * MB}")
            posts = f"taskset {processor} wget -q -O - --post-file /tmp/text http://{HOST}:{site.port}/"
            assert guest.run(posts, limit_s=TRANSFER_S) == sum_of(guest, "/tmp/text")
            # Most of a transfer's frames leave in answer to ACKs, wherever the interrupt is taken; a SYN leaves where its program
            # runs, and the answer to it comes by the same pair.
            asks = f"for n in $(seq {REQUESTS}); do taskset {processor} wget -q -O - http://{HOST}:{site.port}/1; done"
            guest.run(asks, limit_s=TRANSFER_S)
        lines = [line.split() for line in guest.run("ethtool -S eth0").splitlines()]
        counted = {words[0]: int(words[1]) for words in lines if words[-1].isdigit()}
        for queue in "rx_queue_0", "rx_queue_1", "tx_queue_0", "tx_queue_1":
            assert counted[f"{queue}_packets:"] >= REQUESTS, counted
        _killed_and_restarted(guest, site)
        assert "queue_pairs=2 " in _status(site)
        guest.run("ethtool -L eth0 combined 1")
        ping_and_names(guest)
        assert "queue_pairs=1 " in _status(site)


def test_a_machine_that_is_dialled(parts: Parts, tmp_path: Path) -> None:
    """QEMU listens, and the daemon dials: again when it, or QEMU, was restarted."""
    with _ring_site(parts, tmp_path, link=",mode=client") as site:
        guest = site.machine()
        assert guest.address == ADDRESS
        ping_and_names(guest)
        _killed_and_restarted(guest, site)
        site.power_cut()
        guest = site.machine()
        assert guest.address == ADDRESS
        download(guest, site.port, 4 * MB)
        upload(guest, site.port, 4 * MB)
        site.daemon.wait_descriptors(site.attached)


def test_two_machines_meet_and_are_captured(parts: Parts, tmp_path: Path) -> None:
    """On one socket, through the switch: what one leaves to its card, the other's card does."""
    capture = tmp_path / "both.pcapng"
    with _ring_site(parts, tmp_path, options=("--capture", str(capture))) as site:
        one, other = site.machine(), site.machine(OTHER_MAC)
        addresses = [one.address, other.address]
        assert addresses == [ADDRESS, "192.168.65.4"]
        for guest, address in zip((one, other), reversed(addresses), strict=True):
            guest.run(f"ping -c 2 -i 0.2 -W 5 {address}")
            guest.run(f"ping -c 1 -s 4000 -W 5 {address}")
        one.run("mkdir -p /www && head -c 8m /dev/urandom >/www/file && httpd -h /www -p 80", limit_s=TRANSFER_S)
        other.run(f"wget -q -O /tmp/file http://{one.address}/file", limit_s=TRANSFER_S)
        assert sum_of(one, "/www/file") == sum_of(other, "/tmp/file")
        one.run("killall httpd")
        upload(other, site.port, MB)
    fields = ("frame.packet_flags_direction", "ip.proto", "_ws.malformed")
    # What goes from one to the other is captured twice, and would be put together twice.
    words = ["tshark", "-r", str(capture), "-o", "tcp.desegment_tcp_streams:FALSE"]
    words += ["-T", "fields", *(word for field in fields for word in ("-e", field))]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in said.splitlines()]
    assert not [line for line in lines if line[2]], "malformed frames"
    seen = {(direction[-1], protocol) for direction, protocol, _ in lines}
    assert seen >= {(direction, protocol) for direction in "12" for protocol in ("1", "6", "17")}
