"""Guests' HTTP through proxies, with a kernel guest and curl, and tinyproxy and squid as the proxies of the host's network."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import GATEWAY, HOST, Daemon, Namespace, World, require, wait_until
from tests.support.webhost import content, digest, serve, web

pytestmark = pytest.mark.netns

SERVER = "203.0.113.10"
NOWHERE = "198.51.100.7"
"""The guest's name server says so of every name of the corporate network: only the proxy gets there."""
OCTETS = 3_000_000


@dataclass(frozen=True)
class Office:
    """A guest behind a host whose network is left by proxies alone."""

    guest: Namespace
    host: Namespace
    daemon: Daemon
    directory: Path

    def write(self, document: object) -> None:
        """As a VPN client does: a new file, renamed over the old."""
        new = self.directory / "http_proxy.json.new"
        new.write_text(document if isinstance(document, str) else json.dumps(document))
        os.replace(new, self.directory / "http_proxy.json")

    def use(self, **document: object) -> None:
        """Write, and wait until it holds."""
        document["allow_error_msg"] = os.urandom(8).hex()
        self.write(document)
        wait_until(lambda: document["allow_error_msg"] in self.api("GET"))

    def api(self, method: str, body: str = "") -> str:
        """A request to the socket of the API: what it answered, and behind it the status."""
        words = ["curl", "-sS", "--unix-socket", str(self.directory / "api.sock"), "-w", " %{http_code}", "-X", method]
        words += ["--data-binary", body] if body else []
        done = subprocess.run([*words, "http://x/http_proxy.json"], check=True, capture_output=True, text=True)
        return done.stdout

    def curl(self, *words: str, limit_s: float = 30) -> str:
        """What was written about the transfer: status, octets, exit status."""
        out = "%{http_code} %{size_download} %{http_connect}"
        done = self.guest.run(
            "curl", "-sS", "-o", "/dev/null", "--max-time", "20", "-w", out, *words, check=False, limit_s=limit_s
        )
        return f"{done.stdout} {done.returncode}"


@pytest.fixture(scope="module")
def office(shared: World) -> Iterator[Office]:
    require("curl", "tinyproxy", "squid", "openssl")
    guest, host = shared.namespace(), shared.host
    host.ip("addr", "add", f"{SERVER}/32", "dev", "lo")
    host.run("sh", "-c", f"echo '{SERVER} www.corp.test' >>/etc/hosts")
    directory = shared.directory / "office"
    directory.mkdir()
    with web(host, SERVER, 80):
        daemon = shared.daemon(
            "--link",
            f"tap:netns={guest.name}",
            *("--http", str(directory / "http_proxy.json"), "--http-api-path", str(directory / "api.sock")),
        )
        guest.udhcpc()
        guest.run("sh", "-c", f"echo '{NOWHERE} www.corp.test' >>/etc/hosts")
        yield Office(guest, host, daemon, directory)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.said(), daemon.said()
        assert "contained" not in daemon.said(), daemon.said()


@pytest.fixture(scope="module")
def tinyproxy(office: Office) -> Iterator[int]:
    """With a user and a password; its port on the host's loopback."""
    path = office.directory / "tinyproxy.conf"
    path.write_text(
        "Port 8118\nListen 127.0.0.1\nTimeout 60\nMaxClients 50\nBasicAuth worker secret\n"
        f'LogFile "{office.directory}/tinyproxy.log"\nLogLevel Info\nAllow 127.0.0.1\nDisableViaHeader Yes\n'
    )
    child = office.host.start("tinyproxy", "-d", "-c", str(path))
    wait_until(lambda: _listens(office.host, 8118))
    yield 8118
    child.terminate()
    child.wait()


@pytest.fixture(scope="module")
def squid(office: Office) -> Iterator[int]:
    """Without; its port. It has a user of its own, so its files are where that one may write."""
    text = (
        "http_port 127.0.0.1:8128\nhttp_access allow all\ncache deny all\nshutdown_lifetime 0 seconds\n"
        "pid_filename none\naccess_log none\ncache_log /run/squid/cache.log\n"
        "dns_nameservers 127.0.0.1\nhosts_file /etc/hosts\ncoredump_dir /run/squid\n"
    )
    host = office.host
    host.run("sh", "-c", f"mkdir -m 777 /run/squid && printf '%s' '{text}' >/run/squid/squid.conf")
    child = host.start("squid", "-N", "-f", "/run/squid/squid.conf")
    wait_until(lambda: _listens(host, 8128), why=lambda: host.run("cat", "/run/squid/cache.log", check=False).stdout)
    yield 8128
    child.terminate()
    child.wait()


def _listens(place: Namespace, port: int) -> bool:
    try:
        place.connect("127.0.0.1", port).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture(scope="module")
def tls(office: Office, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A TLS server that echoes, at SERVER."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=www.corp.test", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(10_000)
            secure.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + content(OCTETS))
            secure.unwrap()

    with serve(office.host.listen(SERVER, 443), answer) as (_, port):
        yield port


# What is intercepted


def test_port_80_goes_through_a_proxy_with_credentials(office: Office, tinyproxy: int) -> None:
    office.use(http=f"http://worker:secret@127.0.0.1:{tinyproxy}")
    before = (office.directory / "tinyproxy.log").read_text().count("Request (file descriptor")
    url = f"http://www.corp.test/{OCTETS}"
    done = office.guest.run("curl", "-sS", "-o", "/run/got", "-w", "%{http_code}", url)
    assert done.stdout == "200"
    assert office.guest.run("sha256sum", "/run/got").stdout.split()[0] == digest(OCTETS)
    assert (office.directory / "tinyproxy.log").read_text().count("Request (file descriptor") == before + 1


def test_credentials_that_the_proxy_wants_are_the_hosts_matter(office: Office, tinyproxy: int) -> None:
    office.use(http=f"http://127.0.0.1:{tinyproxy}")
    done = office.guest.run("curl", "-sS", "-i", "http://www.corp.test/1")
    assert done.stdout.startswith("HTTP/1.1 502 ") and "asks for a user and password" in done.stdout
    assert "proxy-authenticate" not in done.stdout.lower()


@pytest.mark.parametrize("which", ["tinyproxy", "squid"])
def test_port_443_becomes_connect(office: Office, tls: int, which: str, request: pytest.FixtureRequest) -> None:
    port = request.getfixturevalue(which)
    office.use(https=f"http://worker:secret@127.0.0.1:{port}")
    # CONNECT names the address that the guest's connection went to: there must be one that the proxy can reach.
    assert office.curl("-k", f"https://{SERVER}/") == f"200 {OCTETS} 000 0"


def test_post_keep_alive_and_head_through_squid(office: Office, squid: int) -> None:
    office.use(http=f"127.0.0.1:{squid}")
    body = office.directory / "body"
    body.write_bytes(content(OCTETS))
    done = office.guest.run(
        *("curl", "-sS", "--max-time", "20", "-v"),
        *("-T", str(body), "-X", "POST", "http://www.corp.test/"),
        *("--next", "-sS", "-T", str(body), "-X", "POST", "-H", "Transfer-Encoding: chunked", "http://www.corp.test/"),
        check=False,
    )
    assert digest(OCTETS) in done.stdout, done.stdout + done.stderr
    done = office.guest.run(
        *("curl", "-sS", "-v", "-o", "/dev/null", "-o", "/dev/null", "-o", "/dev/null"),
        *("http://www.corp.test/10", "http://www.corp.test/20", "http://www.corp.test/30"),
    )
    assert done.stderr.count("Re-using existing connection") == 2, done.stderr


def test_what_the_proxy_cannot_get_is_its_own_answer(office: Office, squid: int) -> None:
    office.use(http=f"127.0.0.1:{squid}")
    done = office.guest.run("curl", "-sS", "-i", "-x", f"http://{GATEWAY}:3128", "http://www.corp.test:81/")
    assert done.stdout.startswith("HTTP/1.1 503 ") and "squid" in done.stdout


def test_excludes_go_their_own_way(office: Office) -> None:
    office.use(http="127.0.0.1:9", https="127.0.0.1:9")
    assert office.curl(f"http://{SERVER}/100").startswith("503 ")
    office.use(http="127.0.0.1:9", https="127.0.0.1:9", exclude="203.0.113.0/24")
    assert office.curl(f"http://{SERVER}/100") == "200 100 000 0"
    assert office.curl(f"http://{NOWHERE}/100").startswith("503 ")


def test_a_proxy_that_is_gone_ends_tls_at_once(office: Office) -> None:
    office.use(https="127.0.0.1:9")
    assert office.curl("-k", f"https://{SERVER}/").split()[-1] in ("35", "56")  # no handshake, or a reset


# The explicit proxy


def test_the_explicit_proxy_without_another(office: Office, tls: int) -> None:
    office.use()
    for port in (3128, 3129):
        proxy = f"http://{GATEWAY}:{port}"
        assert office.curl("-x", proxy, f"http://{SERVER}/{OCTETS}") == f"200 {OCTETS} 000 0"
        assert office.curl("-k", "-x", proxy, f"https://{SERVER}/") == f"200 {OCTETS} 200 0"


@pytest.mark.parametrize("which", ["tinyproxy", "squid"])
def test_the_explicit_proxy_through_another(
    office: Office, tls: int, which: str, request: pytest.FixtureRequest
) -> None:
    port = request.getfixturevalue(which)
    office.use(http=f"http://worker:secret@127.0.0.1:{port}", https=f"http://worker:secret@127.0.0.1:{port}")
    for ours in (3128, 3129):
        proxy = f"http://{GATEWAY}:{ours}"
        assert office.curl("-x", proxy, f"http://www.corp.test/{OCTETS}") == f"200 {OCTETS} 000 0"
        assert office.curl("-k", "-x", proxy, "https://www.corp.test/") == f"200 {OCTETS} 200 0"


def test_the_hosts_loopback_by_its_alias_and_by_no_other_name(office: Office) -> None:
    office.use()
    with web(office.host) as port:
        proxy = ("-x", f"http://{GATEWAY}:3128")
        for name in (HOST, "host.internal"):
            assert office.curl(*proxy, f"http://{name}:{port}/100") == "200 100 000 0"
            assert office.curl(*proxy, "-p", f"http://{name}:{port}/100") == "200 100 200 0"
        for name in ("127.0.0.1", "localhost", "0", "127.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]"):
            assert office.curl(*proxy, "--noproxy", "", f"http://{name}:{port}/100").startswith("403 "), name
            assert office.curl(*proxy, "--noproxy", "", "-p", f"http://{name}:{port}/100").split()[2] == "403", name


def test_the_list_of_allowed_hosts(office: Office) -> None:
    office.use(allow_enabled=True, allow=["host.internal"])
    with web(office.host) as port:
        assert office.curl("-x", f"http://{GATEWAY}:3128", f"http://host.internal:{port}/1") == "200 1 000 0"
        assert office.curl("-x", f"http://{GATEWAY}:3128", f"http://{SERVER}/1").startswith("403 ")


# What it is told


def test_the_file_is_followed_and_the_api_goes_before_it(office: Office) -> None:
    office.use()
    proxy = ("-x", f"http://{GATEWAY}:3128", f"http://{SERVER}/10")
    assert office.curl(*proxy) == "200 10 000 0"
    (office.directory / "http_proxy.json").unlink()
    wait_until(lambda: office.api("GET") == "None set\n 404")
    assert office.curl(*proxy).split()[-1] == "7", "nobody listens"
    assert office.api("POST", "{").endswith(" 400")
    assert office.api("POST", '{"http": "socks5://x:1"}').startswith("http: socks5")
    assert office.api("POST", '{"exclude": "a.b"}') == " 200"
    assert office.curl(*proxy) == "200 10 000 0"
    text, _, status = office.api("GET").rpartition(" ")
    assert status == "200" and office.api("POST", text) == " 200"
    office.use(http="127.0.0.1:9")
    assert office.curl(*proxy).startswith("503 ")


def test_many_at_once(office: Office, squid: int) -> None:
    office.use(http=f"127.0.0.1:{squid}")
    results: list[str] = []

    def load() -> None:
        results.extend(office.curl("http://www.corp.test/100000") for _ in range(5))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["200 100000 000 0"] * 40
