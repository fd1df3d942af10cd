"""rootlesskit starts `vpnkit` for containers of people who are not root: the genuine one, and what it does step by step."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from netstack.wire import dhcp
from tests.support import packets
from tests.support.netns import GATEWAY, HOST, LIMIT_S, Namespace, World, require, wait_until
from tests.support.relay import vmnet
from tests.support.vpnkit_program import program
from tests.support.webhost import MB, digest, web

pytestmark = pytest.mark.netns

NO_DRIVER = "not supported in this Debian package"


class TestGenuine:
    @pytest.fixture
    def rootlesskit(self, fresh: World) -> list[str]:
        """The command up to what is to be run inside; root has other users' numbers in a mount namespace of its own."""
        require("rootlesskit", "newuidmap", "unshare")
        numbers = fresh.directory / "numbers"
        numbers.write_text("root:200000:65536\n")
        mounts = f"mount --bind {numbers} /etc/subuid && mount --bind {numbers} /etc/subgid"
        options = [f"--state-dir={fresh.directory}/state", "--net=vpnkit", "--copy-up=/etc"]
        binary = f"--vpnkit-binary={program(fresh.directory)}"
        words = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", "rootlesskit", *options, binary]
        tried = fresh.host.run(*words, "true", check=False, limit_s=3 * LIMIT_S)
        if NO_DRIVER in tried.stderr:
            pytest.skip(f"expected: Debian builds rootlesskit without its VPNKit driver: {NO_DRIVER!r}")
        assert tried.returncode == 0, tried.stderr
        return words

    def test_a_command_inside_has_a_network(self, fresh: World, rootlesskit: list[str]) -> None:
        with web(fresh.host) as port:
            script = (
                f"ip -4 -o addr show; getent hosts gateway.internal; curl -sS http://{HOST}:{port}/{MB} | sha256sum"
            )
            said = fresh.host.run(*rootlesskit, "sh", "-c", script, limit_s=3 * LIMIT_S).stdout
        assert "192.168.65.3/24" in said
        assert f"{GATEWAY} " in said
        assert digest(MB) in said

    def test_the_hosts_loopback_can_be_kept_away(self, fresh: World, rootlesskit: list[str]) -> None:
        with web(fresh.host) as port:
            words = "--disable-host-loopback", "curl", "-sS", "--max-time", "5", f"http://{HOST}:{port}/1"
            assert fresh.host.run(*rootlesskit, *words, check=False, limit_s=3 * LIMIT_S).returncode != 0


class Parent:
    """What rootlesskit's parent does: starts vpnkit, attaches, asks by DHCP for the address, and stays attached."""

    def __init__(self, world: World, *options: str) -> None:
        self.path = world.socket_path("vpnkit-ethernet.sock")
        self.identity = str(uuid.uuid4())
        self.log = world.directory / "vpnkit.log"
        with self.log.open("wb") as log:
            words = program(world.directory), "--ethernet", self.path, "--mtu", "1500", *options
            self.process = subprocess.Popen(world.host.command(*words), stderr=log)
        world.defer(self._end)
        wait_until(lambda: " ready" in self.said(), LIMIT_S, self.said)
        self.link, self.mac = vmnet(self.path, self.identity)
        world.defer(self.link.sock.close)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text()

    def address(self) -> str:
        """DISCOVER and OFFER, without a checksum of UDP, as VPNKit's Go client (spec vpnkit 2.3)."""
        mac = bytes.fromhex(self.mac.replace(":", ""))
        message = dhcp.emit(
            dhcp.Message(op=1, xid=0x01000000, flags=0x8000, chaddr=mac, options={dhcp.Option.MESSAGE_TYPE: b"\x01"})
        )
        datagram = packets.udp(bytes(4), b"\xff" * 4, 68, 67, message, check=0)
        packet = packets.ipv4(bytes(4), b"\xff" * 4, packets.UDP, datagram)
        self.link.send(packets.ether(b"\xff" * 6, mac, packets.IPV4, packet))
        assert self.link.flush()
        return next(found for frame in self._frames() if (found := offered(frame)))

    def _frames(self) -> Iterator[bytes]:
        while True:
            readable, _, _ = select.select([self.link.sock], [], [], LIMIT_S)
            assert readable, self.said()
            yield from self.link.receive()


def offered(frame: bytes) -> str:
    """The address of an OFFER, or ""."""
    packet = packets.read_ipv4(frame)
    if packet is None or packet.protocol != packets.UDP or packet.payload[:4] != b"\0\x43\0\x44":
        return ""
    return ".".join(map(str, dhcp.parse(packet.payload[8:]).yiaddr))


@contextlib.contextmanager
def child(world: World, parent: Parent) -> Iterator[Namespace]:
    """What its child does: attaches with the same UUID, and has the address on a TAP; nothing renews it."""
    address = parent.address()
    guest = world.namespace()
    relay = world.relay(guest, f"vmnet:{parent.path}", "--uuid", parent.identity)
    assert relay.mac == parent.mac
    guest.ip("address", "add", f"{address}/24", "dev", "eth0")
    guest.ip("link", "set", "eth0", "up")
    guest.ip("route", "add", "default", "via", GATEWAY)
    guest.run("sh", "-c", f"echo nameserver {GATEWAY} > /etc/resolv.conf")
    yield guest
    parent.process.send_signal(signal.SIGTERM)
    assert parent.process.wait(LIMIT_S) == 0, parent.said()
    assert "Traceback" not in parent.said(), parent.said()


def test_as_rootlesskit_does_step_by_step(fresh: World) -> None:
    parent = Parent(fresh)
    with child(fresh, parent) as guest, web(fresh.host) as port:
        assert "192.168.65.3/24" in guest.run("ip", "-4", "-o", "address", "show", "eth0").stdout
        assert guest.run("getent", "hosts", "gateway.internal").stdout.split()[0] == GATEWAY
        for host in (HOST, "host.internal"):
            curl = f"curl -sS --max-time 60 http://{host}:{port}/{4 * MB} | sha256sum"
            assert guest.run("sh", "-c", curl, limit_s=70).stdout.split()[0] == digest(4 * MB)
        guest.run("ping", "-c", "1", "-W", "5", GATEWAY)


def test_as_rootlesskit_does_without_the_hosts_loopback(fresh: World) -> None:
    parent = Parent(fresh, "--host-ip", "0.0.0.0")
    with child(fresh, parent) as guest, web(fresh.host) as port:
        assert guest.run("getent", "hosts", "gateway.internal").stdout.split()[0] == GATEWAY
        assert guest.run("curl", "-sS", "--max-time", "5", f"http://{HOST}:{port}/1", check=False).returncode in (7, 28)
