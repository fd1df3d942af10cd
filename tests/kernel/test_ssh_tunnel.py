"""gvproxy's `ssh-tunnel://` forwards through the sshd of OpenSSH in a guest (spec gvproxy 1.3, 1.4)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.netns import LIMIT_S, Daemon, Namespace, World, require, wait_until
from tests.support.webhost import MB, content, digest, echo, read_all, serve, web

pytestmark = pytest.mark.netns

GUEST = "192.168.65.3"
SECRET = "a secret & more"


@dataclass(frozen=True)
class Sshd:
    """OpenSSH's daemon in the guest."""

    process: subprocess.Popen[str]
    log: Path

    def stop(self) -> None:
        """With all its connections, as when the guest restarts it hard."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def sessions(self) -> int:
        """Connections that were let in so far."""
        return self.said().count("Accepted publickey")


@dataclass(frozen=True)
class Net:
    """A guest on a TAP, and the host, where the API is at a path."""

    directory: Path
    host: Namespace
    guest: Namespace
    api: Path
    daemon: Daemon

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of an answer to curl."""
        words = ["curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", "--unix-socket", str(self.api)]
        words += [] if body is None else ["-d", json.dumps(body)]
        text, _, status = self.host.run(*words, f"http://gvproxy{path}").stdout.rpartition("\n")
        return int(status), text

    @contextlib.contextmanager
    def tunnel(self, name: str, path: str, key: str = "key", more: str = "") -> Iterator[str]:
        """A forward, and its path on the host."""
        local = str(self.directory / f"{name}.sock")
        remote = f"ssh-tunnel://root@{GUEST}:22{quote(path)}?key={self.directory / key}{more}"
        body = {"local": local, "remote": remote, "protocol": "unix"}
        assert self.ask("/services/forwarder/expose", body) == (200, "")
        try:
            yield local
        finally:
            self.ask("/services/forwarder/unexpose", {"local": local, "protocol": "unix"})

    @contextlib.contextmanager
    def sshd(self, name: str) -> Iterator[Sshd]:
        log = self.directory / f"{name}.sshd"
        self.guest.run("mkdir", "-p", "/run/sshd")
        process = self.guest.start("/usr/sbin/sshd", "-D", "-f", str(self.directory / "sshd_config"), "-E", str(log))
        made = Sshd(process, log)
        try:
            wait_until(lambda: log.exists() and "listening on" in made.said(), LIMIT_S, lambda: made.said())
            yield made
        finally:
            made.stop()

    @contextlib.contextmanager
    def programs(self, *words: str) -> Iterator[None]:
        """socat in the guest, which listens at `/run/NAME.sock` of the guest's own file system."""
        process = self.guest.start("socat", "-t", "60", *words, start_new_session=True)
        path = words[0].split(":")[1].split(",")[0]
        wait_until(lambda: self.guest.run("test", "-S", path, check=False).returncode == 0)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.guest.run("rm", "-f", path)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs: sshd gives each connection a session of its own."""
    try:
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*children, *(one for child in children for one in descendants(child))]


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    try:
        client.connect(path)
    except BaseException:
        client.close()
        raise
    return client


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    return listener


@contextlib.contextmanager
def network(world: World) -> Iterator[Net]:
    require("ssh-keygen", "socat", "curl", "/usr/sbin/sshd")
    directory, guest = world.directory, world.namespace()

    def keygen(name: str, passphrase: str = "") -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(directory / name)], check=True)

    for name in ("host_key", "key", "stranger"):
        keygen(name)
    keygen("locked", SECRET)
    (directory / "authorized").write_text("".join((directory / f"{one}.pub").read_text() for one in ("key", "locked")))
    (directory / "sshd_config").write_text(
        f"HostKey {directory}/host_key\nAuthorizedKeysFile {directory}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nPidFile none\n"
    )
    api = directory / "api.sock"
    daemon = world.daemon("--link", f"tap:netns={guest.name}", "--control-listen", f"unix:{api}")
    assert guest.udhcpc() == GUEST
    yield Net(directory, world.host, guest, api, daemon)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()
    assert SECRET not in daemon.said() and quote(SECRET) not in daemon.said()


@pytest.fixture(scope="module")
def net(shared: World) -> Iterator[Net]:
    with network(shared) as made:
        yield made


def test_curl_loads_from_a_web_server_at_a_path_in_the_guest(net: Net) -> None:
    with (
        web(net.guest, "127.0.0.1", 80),
        net.programs("UNIX-LISTEN:/run/web.sock,fork", "TCP:127.0.0.1:80"),
        net.sshd("curl") as sshd,
        net.tunnel("curl", "/run/web.sock") as local,
    ):
        listed = {"local": local, "protocol": "unix"}
        listed["remote"] = f"ssh-tunnel://root@{GUEST}:22/run/web.sock?key={net.directory}/key"
        assert json.loads(net.ask("/services/forwarder/all")[1]) == [listed]
        assert sshd.sessions() == 0, "nobody connects before the first client"
        curl = f"curl -sS --max-time 60 --unix-socket {local} http://guest"
        done = net.host.run("sh", "-c", f"{curl}/{10 * MB} | sha256sum", limit_s=70)
        assert done.stdout.split()[0] == digest(10 * MB)
        (net.directory / "up").write_bytes(content(10 * MB))
        done = net.host.run(*f"{curl}/ -X POST -T {net.directory}/up".split(), limit_s=70)
        assert done.stdout == digest(10 * MB)
        for _ in range(3):
            assert len(net.host.run(*f"{curl}/text/6".split()).stdout) == 6
        assert sshd.sessions() == 1, "one SSH connection carries them all"
        again = net.ask("/services/forwarder/expose", listed)
        assert again == (500, f"proxy already running for unix on {local}\n")


def test_half_closes_cross_both_ways(net: Net) -> None:
    heard: list[bytes] = []

    def server(connection: socket.socket) -> None:
        """Sums up what came until the client has finished; or finishes first, and hears the client out."""
        if connection.recv(1) == b"u":
            octets = read_all(connection)
            connection.sendall(b"%d" % len(octets))
            return
        connection.sendall(b"all I say")
        connection.shutdown(socket.SHUT_WR)
        heard.append(read_all(connection))

    with (
        serve(listen(net.directory / "half-in-guest"), server),
        net.sshd("half"),
        net.tunnel("half", f"{net.directory}/half-in-guest") as local,
    ):
        with connect(local) as client:
            client.sendall(b"u" + content(MB))
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"%d" % MB
        with connect(local) as client:
            client.sendall(b"d")
            assert read_all(client) == b"all I say"
            client.sendall(content(MB))
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: bool(heard))
        assert heard == [content(MB)]


def test_the_first_client_waits_for_an_sshd_that_starts_later(net: Net) -> None:
    with (
        serve(listen(net.directory / "late-in-guest"), echo),
        net.tunnel("late", f"{net.directory}/late-in-guest") as local,
        connect(local) as client,
    ):
        client.sendall(b"hello")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(100)
        client.settimeout(60)
        with net.sshd("late"):
            assert client.recv(100) == b"hello"


def test_after_a_restart_of_sshd_new_clients_are_carried_again(net: Net) -> None:
    with (
        serve(listen(net.directory / "again-in-guest"), echo),
        net.tunnel("again", f"{net.directory}/again-in-guest") as local,
    ):
        with net.sshd("before") as sshd, connect(local) as client:
            client.sendall(b"one")
            assert client.recv(100) == b"one"
            sshd.stop()
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b"", "its connection is gone, and nothing pretends otherwise"
        with connect(local) as client:
            client.sendall(b"two")
            with net.sshd("after") as sshd:
                assert client.recv(100) == b"two"
                assert sshd.sessions() == 1


def test_a_key_that_sshd_does_not_know_resets_the_client_and_says_so(net: Net) -> None:
    with net.sshd("wrong"), net.tunnel("wrong", "/run/x.sock", key="stranger") as local, connect(local) as client:
        client.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        net.daemon.wait_said(f"sshd does not let root in with the key {net.directory}/stranger")


def test_a_path_where_nobody_listens_resets_the_client_and_says_so(net: Net) -> None:
    with net.sshd("nobody"), net.tunnel("nobody", "/run/nobody.sock") as local, connect(local) as client:
        client.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        net.daemon.wait_said("sshd did not connect to /run/nobody.sock")


def test_a_key_with_a_passphrase_which_is_never_shown(net: Net) -> None:
    with (
        serve(listen(net.directory / "locked-in-guest"), echo),
        net.sshd("locked"),
        net.tunnel(
            "locked", f"{net.directory}/locked-in-guest", key="locked", more=f"&passphrase={quote(SECRET)}"
        ) as local,
        connect(local) as client,
    ):
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        (listed,) = json.loads(net.ask("/services/forwarder/all")[1])
        assert listed["remote"].endswith(f"?key={net.directory}/locked&passphrase=***")


def test_unexpose_frees_the_path_and_ends_the_connection_with_its_last_client(net: Net) -> None:
    with serve(listen(net.directory / "end-in-guest"), echo), net.sshd("end") as sshd:
        with net.tunnel("end", f"{net.directory}/end-in-guest") as local:
            client = connect(local)
            client.sendall(b"one")
            assert client.recv(100) == b"one"
        assert not os.path.exists(local)
        with pytest.raises(FileNotFoundError):
            connect(local)
        with client:
            client.sendall(b"still here")
            assert client.recv(100) == b"still here"
            assert "Received disconnect" not in sshd.said()
        wait_until(lambda: "Received disconnect" in sshd.said(), LIMIT_S, sshd.said)


def test_a_daemon_that_stops_ends_clients_that_are_carried_and_clients_that_wait(fresh: World) -> None:
    with contextlib.ExitStack() as stack, network(fresh) as net:
        stack.enter_context(serve(listen(net.directory / "stop-in-guest"), echo))
        stack.enter_context(net.sshd("stop"))
        for name, path in (("carried", f"{net.directory}/stop-in-guest"), ("waits", "/run/x.sock")):
            remote = f"ssh-tunnel://root@{GUEST}:{22 if name == 'carried' else 23}{path}?key={net.directory}/key"
            body = {"local": f"{net.directory}/{name}.sock", "remote": remote, "protocol": "unix"}
            assert net.ask("/services/forwarder/expose", body) == (200, "")
        carried, waits = (stack.enter_context(connect(f"{net.directory}/{name}.sock")) for name in ("carried", "waits"))
        for client in (carried, waits):
            client.sendall(b"one")
        assert carried.recv(100) == b"one"
        net.daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            waits.recv(100)
        with contextlib.suppress(ConnectionResetError):
            assert carried.recv(100) == b""  # once its time of grace is over
        assert net.daemon.process.wait(LIMIT_S) == 0
