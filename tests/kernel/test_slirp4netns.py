"""Network namespaces behind `slirp4netns`, started as podman, rootlesskit and people start it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.netns import LIMIT_S, Namespace, World, require, wait_until
from tests.support.vpnkit_program import program
from tests.support.webhost import MB, digest, web

pytestmark = pytest.mark.netns

GATEWAY = "10.0.2.2"
NAMES = "10.0.2.3"
GUEST = "10.0.2.100"


@contextlib.contextmanager
def started(place: World, *words: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Ready; its output is in `directory/log`."""
    ready, said = os.pipe()
    with (place.directory / "log").open("a") as log:
        argv = place.host.command(program(place.directory, "slirp4netns"), "-r", str(said), *words)
        process = subprocess.Popen(argv, stderr=log, text=True, pass_fds=(said, *pass_fds))
    os.close(said)
    try:
        with open(ready, "rb") as reading:
            assert reading.read() == b"1", (place.directory / "log").read_text()
        yield process
        assert "Traceback" not in (place.directory / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.contextmanager
def stranger(place: World) -> Iterator[int]:
    """A process in user and network namespaces of its own."""
    words = place.host.command("unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo up; exec sleep 600")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield process.pid
        process.kill()


@contextlib.contextmanager
def opened(guest: Namespace) -> Iterator[int]:
    """A descriptor of the namespace: its path is not seen from where the programs run."""
    descriptor = os.open(guest.path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def within(place: World, pid: int, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return place.host.run(
        "nsenter", "--user", "--net", "--preserve-credentials", f"--target={pid}", *words, check=check
    )


def test_a_process_of_ones_own(fresh: World) -> None:
    """`slirp4netns -c PID tap0`: address, route, names, the host's loopback, a port by the API, the end with the process."""
    api = fresh.directory / "api"
    with stranger(fresh) as pid, web(fresh.host) as port:
        with started(
            fresh, "-c", "--mtu=65520", "--enable-sandbox", "--enable-seccomp", "-a", str(api), str(pid), "tap0"
        ) as slirp:
            shown = within(fresh, pid, "ip", "-o", "addr", "show", "dev", "tap0").stdout
            assert f"inet {GUEST}/24 " in shown
            assert "mtu 65520" in within(fresh, pid, "ip", "link", "show", "dev", "tap0").stdout
            assert f"default via {GATEWAY} dev tap0" in within(fresh, pid, "ip", "route").stdout
            for address in (GATEWAY, NAMES):
                within(fresh, pid, "ping", "-c", "1", "-W", "5", address)
            found = within(fresh, pid, "dig", "+short", "+time=5", "host.internal", f"@{NAMES}").stdout.split()
            assert found == [GATEWAY]
            script = f"curl -sSf http://{GATEWAY}:{port}/{MB} | sha256sum"
            assert within(fresh, pid, "sh", "-c", script).stdout.split()[0] == digest(MB)
            with fresh.host.listen() as free:
                outside = free.getsockname()[1]
            arguments = {"proto": "tcp", "host_addr": "127.0.0.1", "host_port": outside, "guest_port": 7}
            request = json.dumps({"execute": "add_hostfwd", "arguments": arguments})
            answer = fresh.host.run("sh", "-c", f"echo '{request}' | socat -t 5 - UNIX-CONNECT:{api}").stdout
            assert json.loads(answer) == {"return": {"id": 1}}
            words = ("nsenter", "--user", "--net", "--preserve-credentials", f"--target={pid}", "socat")
            echo = fresh.host.start(*words, "TCP-LISTEN:7", "EXEC:cat")
            wait_until(lambda: ":7 " in within(fresh, pid, "ss", "-ltn").stdout)
            assert fresh.host.run("sh", "-c", f"echo hello | socat -t 5 - TCP:127.0.0.1:{outside}").stdout == "hello\n"
            assert echo.wait(LIMIT_S) == 0
            status = Path(f"/proc/{slirp.pid}/status").read_text().splitlines()
            capabilities = next(line for line in status if line.startswith("CapEff")).split()[1]
            assert int(capabilities, 16) == 1 << 10  # CAP_NET_BIND_SERVICE
            os.kill(pid, 9)
            assert slirp.wait(LIMIT_S) == 0


def test_as_podman_starts_it(fresh: World) -> None:
    """A namespace by its path, and an end by a descriptor that closes."""
    guest = fresh.namespace()
    reading, writing = os.pipe()
    options = ("--disable-host-loopback", "--mtu=9000", "--enable-sandbox", "--enable-seccomp", "--enable-ipv6", "-c")
    with contextlib.ExitStack() as ends:
        port = ends.enter_context(web(fresh.host))
        netns = ends.enter_context(opened(guest))
        words = (*options, "-e", str(reading), "--netns-type=path", f"/proc/self/fd/{netns}", "tap0")
        slirp = ends.enter_context(started(fresh, *words, pass_fds=(reading, netns)))
        os.close(reading)
        assert guest.address("tap0") == GUEST
        guest.run("ping", "-c", "1", "-W", "5", GATEWAY)
        refused = guest.run("curl", "-sS", "--max-time", "5", f"http://{GATEWAY}:{port}/1", check=False)
        assert "Connection refused" in refused.stderr or "Couldn't connect" in refused.stderr
        os.write(writing, b"this ends nothing")
        guest.run("ping", "-c", "1", "-W", "5", NAMES)
        assert slirp.poll() is None
        os.close(writing)
        assert slirp.wait(LIMIT_S) == 0


def test_a_lease_for_who_wants_one(fresh: World) -> None:
    """Without `-c` the interface has no address; DHCP is as slirp4netns'."""
    guest = fresh.namespace()
    with (
        opened(guest) as netns,
        started(fresh, "--netns-type=path", f"/proc/self/fd/{netns}", "tap0", pass_fds=(netns,)),
    ):
        assert guest.address("tap0") == ""
        assert guest.udhcpc(interface="tap0") == "10.0.2.15"
        assert f"nameserver {NAMES}" in guest.read("/etc/resolv.conf")


def test_rootlesskit(fresh: World) -> None:
    """The genuine one, with its port driver: a command inside has a network, and a port of it is published."""
    require("rootlesskit", "newuidmap", "unshare", "nsenter", "socat")
    numbers = fresh.directory / "numbers"
    numbers.write_text("root:200000:65536\n")
    with fresh.host.listen() as free:
        outside = free.getsockname()[1]
    mounts = f"mount --bind {numbers} /etc/subuid && mount --bind {numbers} /etc/subgid"
    options = [f"--state-dir={fresh.directory}/state", "--net=slirp4netns", "--mtu=65520", "--copy-up=/etc"]
    options += [f"--slirp4netns-binary={program(fresh.directory, 'slirp4netns')}", "--slirp4netns-sandbox=auto"]
    options += ["--port-driver=slirp4netns", "-p", f"127.0.0.1:{outside}:7/tcp"]
    words = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", "rootlesskit", *options]
    with web(fresh.host) as port:
        script = f"curl -sSf http://{GATEWAY}:{port}/{MB} | sha256sum; cat /etc/resolv.conf; exec socat TCP-LISTEN:7 EXEC:cat"
        inside = fresh.host.start(*words, "sh", "-c", script)
        assert answered(fresh.host, outside) == "hello\n"
        said = inside.communicate(timeout=LIMIT_S)[0]
    assert inside.returncode == 0, said
    assert digest(MB) in said
    assert f"nameserver {NAMES}" in said


def answered(host: Namespace, port: int) -> str:
    """What an echo says that is not there yet."""
    found = ""

    def tried() -> bool:
        nonlocal found
        script = f"echo hello | socat -t 5 - TCP:127.0.0.1:{port}"
        found = host.run("sh", "-c", script, check=False).stdout
        return bool(found)

    wait_until(tried, 3 * LIMIT_S)
    return found
