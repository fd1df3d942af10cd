"""The port control tree as a program in a VM uses it (spec vpnkit 7.1, 9.1 "Ports")."""

from __future__ import annotations

import base64
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.errors import ConfigError, HostError
from portfwd.carriers import Carriers
from portfwd.errors import BindFailed
from portfwd.ninep.client import Client, Rejected, expose
from portfwd.ninep.messages import DMDIR, ORDWR, OTRUNC, OWRITE, Stat
from portfwd.ninep.ports import FILE_TIME, PortTable
from portfwd.ninep.requests import PortRequest, failure
from portfwd.owners import HAND, Owner
from portfwd.registry import Registry
from portfwd.spec import PublishSpec
from tests.portfwd.ninep.site import GUEST, Site, client_of

ANY = "tcp:127.0.0.1:0:tcp:192.168.65.3:80"


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with site.client() as made:
        yield made


def ask(client: Client, request: str, name: str = "x") -> tuple[int, str]:
    """Make the directory and write; the fid of `ctl`, and what it reads back."""
    client.mkdir(name)
    fid = client.walk(name, "ctl")
    client.open(fid, ORDWR)
    assert client.write(fid, request.encode()) == len(request)
    return fid, client.read(fid).decode()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def names(client: Client) -> list[str]:
    return [stat.name for stat in client.list() if stat.name not in (".", "..", "README")]


def refused(call: object, *arguments: object) -> str:
    with pytest.raises(Rejected) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.text


def test_the_tree_before_anything_is_published(client: Client) -> None:
    assert [stat.name for stat in client.list()] == [".", "..", "README"]
    readme = client.load("README").decode()
    assert "tcp:HOST-IP:HOST-PORT:tcp:IP:PORT" in readme and readme.endswith("\n")
    assert client.load("README", "..", "README").decode() == readme
    root, file = client.stat(client.root), client.stat(client.walk("README"))
    assert (root.name, root.mode & DMDIR, root.qid.kind) == ("", DMDIR, 0x80)
    assert (file.name, file.mode & DMDIR, file.qid.kind) == ("README", 0, 0)
    for stat in (root, file):
        assert (stat.type, stat.dev, stat.length) == (0xFFFF, 0xFFFFFFFF, 0)
        assert (stat.atime, stat.mtime, stat.uid, stat.gid) == (FILE_TIME, FILE_TIME, "uid", "gid")


def test_a_port_is_published_for_as_long_as_ctl_is_open(site: Site, client: Client) -> None:
    client.mkdir(ANY)
    assert names(client) == [ANY]
    assert [stat.name for stat in client.list(ANY)] == [".", "..", "ctl"]
    fid = client.walk(ANY, "ctl")
    client.open(fid, ORDWR)
    assert client.read(fid) == b"ERROR no request received. Please read the README.\n"
    client.write(fid, ANY.encode(), 77)  # the offset is ignored
    (forward,) = site.registry
    assert forward.owner == Owner("9p", "test#1")
    port = forward.spec.port
    canonical = f"tcp:127.0.0.1:{port}:tcp:192.168.65.3:80"
    assert client.read(fid) == f"OK {canonical}\n".encode()
    assert client.read(fid, 3, 3) == b"tcp"
    assert client.read(fid, 1000) == b""
    assert listens(port)
    assert client.load(ANY).decode() == f"{canonical}\n"
    assert client.stat(client.walk(ANY)).qid.kind == 0, "NAME is a plain file now"
    assert client.stat(client.walk(ANY, "ctl")).name == "ctl", "and ctl is in it all the same"
    client.clunk(fid)
    assert not listens(port)
    assert names(client) == []
    assert len(site.registry) == 0


def test_the_name_of_the_directory_is_free(site: Site, client: Client) -> None:
    _, said = ask(client, ANY, "web, and more")
    assert said.startswith("OK ")
    assert names(client) == ["web, and more"]


@pytest.mark.parametrize("version", ["9P2000", "9P2000.u"])
def test_expose_and_close(site: Site, version: str) -> None:
    with site.client(version) as client:
        exposed = expose(client, ANY)
        (forward,) = site.registry
        assert exposed.request == f"tcp:127.0.0.1:{forward.spec.port}:tcp:192.168.65.3:80"
        other = expose(client, "udp:127.0.0.1:0:udp:192.168.65.3:53", "dns")
        assert len(site.registry) == 2
        exposed.close()
        assert [str(forward.owner) for forward in site.registry] == ["9p test#1"]
        assert other.request.startswith("udp:127.0.0.1:")
    assert len(site.registry) == 0, "the connection is gone"


def test_what_expose_could_not_publish_leaves_nothing_behind(client: Client) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"Bind for 127.0.0.1:{port} failed: port is already allocated"):
            expose(client, f"tcp:127.0.0.1:{port}:tcp:192.168.65.3:80")
    assert names(client) == []


def test_clunks_of_other_fids_and_of_the_same_file_mean_nothing(site: Site, client: Client) -> None:
    """Upstream ends the port on any of these."""
    held, _ = ask(client, ANY)
    other = site.client()
    for who in (client, other):
        who.load("x", "ctl")
        fid = who.walk("x", "ctl")
        who.open(fid, OWRITE | OTRUNC)
        who.clunk(fid)
        who.clunk(who.walk("x"))
        who.clunk(who.walk("x", "ctl"))
    other.close()
    assert len(site.registry) == 1
    client.clunk(held)
    assert len(site.registry) == 0


@pytest.mark.parametrize("path", [("x",), ("x", "ctl")])
def test_removing_anything_of_an_entry_ends_its_port(site: Site, client: Client, path: tuple[str, ...]) -> None:
    held, _ = ask(client, ANY)
    other = site.client()
    other.remove(other.walk(*path))
    assert len(site.registry) == 0
    assert refused(client.read, held) == "file not found"
    client.mkdir("x")
    client.clunk(held)
    assert names(client) == ["x"], "what is clunked late does not take the new entry of that name"


def test_the_end_of_a_connection_ends_what_it_holds_and_nothing_else(site: Site) -> None:
    one, other = site.client(), site.client()
    ask(one, ANY, "one")
    one.mkdir("never asked")
    one.mkdir("given away")
    ask(other, ANY, "other")
    fid = other.walk("given away", "ctl")
    other.open(fid, ORDWR)
    other.write(fid, ANY.encode())
    assert len(site.registry) == 3
    one.close()
    assert names(other) == ["given away", "other"]
    assert {str(forward.owner) for forward in site.registry} == {"9p test#2"}
    other.close()
    assert len(site.registry) == 0 and not site.table.entries


def test_mkdir_of_a_name_that_is_taken(site: Site, client: Client) -> None:
    ask(client, ANY)
    assert refused(client.mkdir, "x") == "file already exists"
    assert refused(client.mkdir, "README") == "file already exists"
    assert len(site.registry) == 1


def test_the_second_write_is_denied(site: Site, client: Client) -> None:
    held, said = ask(client, ANY)
    other = client.walk("x", "ctl")
    client.open(other, OWRITE)
    for fid in (held, other):
        assert refused(client.write, fid, b"again") == "permission denied"
    assert client.read(held).decode() == said
    client.clunk(other)
    assert len(site.registry) == 1, "who was denied holds nothing"


def test_what_may_not_be_made_or_changed(site: Site, client: Client) -> None:
    client.mkdir("x")
    assert refused(client.create, client.walk(), "file", 0o644) == "permission denied"
    assert refused(client.create, client.walk("x"), "dir", DMDIR | 0o755) == "permission denied"
    assert refused(client.create, client.walk("README"), "dir", DMDIR | 0o755) == "permission denied"
    for change in (Stat(mode=0o777), Stat(name="y"), Stat(gid="root"), Stat(length=5)):
        assert refused(client.wstat, client.walk("x", "ctl"), change) == "permission denied"
    readme = client.walk("README")
    client.open(readme, ORDWR)
    assert refused(client.write, readme, b"x") == "permission denied"
    assert refused(client.remove, client.walk()) == "permission denied"
    assert refused(client.walk, "x", "nothing") == "x/nothing: only 1 of these were found"
    directory = client.walk("x")
    client.open(directory)
    assert refused(client.write, directory, b"x") == "Is a directory"


def test_a_shell_truncates_first(site: Site, client: Client) -> None:
    """`echo REQUEST >/port/x/ctl`: O_TRUNC, and a line feed that belongs to the line."""
    client.mkdir("x")
    fid = client.walk("x", "ctl")
    client.wstat(fid, Stat(length=0, mtime=1))
    client.open(fid, OWRITE | OTRUNC)
    client.write(fid, f"{ANY}\n".encode())
    assert len(site.registry) == 1
    client.clunk(fid)
    assert len(site.registry) == 0


GRAMMAR_TEXT = "Failed to parse request [{}], expected tcp:<local IP>"
NO_PORT = "port is not a proto:IP:port or unix:path: '{}'"
FORM = "port should be of the form proto:IP:port or unix:path"
WRONG = [
    ("", GRAMMAR_TEXT.format("")),
    ("nonsense", GRAMMAR_TEXT.format("nonsense")),
    ("tcp:127.0.0.1:80", GRAMMAR_TEXT.format("tcp:127.0.0.1:80")),
    ("tcp:::1:80:tcp:1.2.3.4:80", GRAMMAR_TEXT.format("tcp:::1:80:tcp:1.2.3.4:80")),
    ("a\nb\0", GRAMMAR_TEXT.format("a\\x0ab\\x00")),
    ("tcp:127.0.0.1:http:tcp:1.2.3.4:80", NO_PORT.format("tcp:127.0.0.1:http")),
    ("tcp:127.0.0.1:65536:tcp:1.2.3.4:80", NO_PORT.format("tcp:127.0.0.1:65536")),
    ("tcp:127.0.0.1:-1:tcp:1.2.3.4:80", NO_PORT.format("tcp:127.0.0.1:-1")),
    ("tcp:127.0.0.1:80:tcp:localhost:80", NO_PORT.format("tcp:localhost:80")),
    ("tcp:127.0.0.1:80:tcp:1.2.3.4:80\n\n", NO_PORT.format("tcp:1.2.3.4:80\\x0a")),
    ("unix:!:unix:L2E=", NO_PORT.format("unix:!")),
    ("unix:L2E=:unix:", NO_PORT.format("unix:")),
    ("unix:/w==:unix:L2E=", NO_PORT.format("unix:/w==")),
    (f"unix:{'L3h4' * 40}:unix:L2E=", NO_PORT.format(f"unix:{'L3h4' * 40}")),
    ("sctp:127.0.0.1:80:sctp:1.2.3.4:80", "unknown protocol: should be tcp or udp"),
    ("tcp:127.0.0.1:unix:L2E=", FORM),
    ("unix:a:b:tcp:1.2.3.4:80", FORM),
    ("udp:127.0.0.1:80:tcp:1.2.3.4:80", "a udp port cannot lead to tcp: udp goes with udp alone"),
]


@pytest.mark.parametrize(("request_text", "why"), WRONG)
def test_a_request_that_cannot_be_read_is_written_without_error_and_read_as_one(
    site: Site, client: Client, request_text: str, why: str
) -> None:
    fid, said = ask(client, request_text)
    assert said.startswith(f"ERROR {why}") and said.endswith("\n") and said.count("\n") == 1
    assert names(client) == ["x"], "it stays until ctl is clunked"
    assert client.stat(client.walk("x")).qid.kind == 0x80
    client.clunk(fid)
    assert names(client) == []


def test_octets_that_are_no_text_are_no_request(client: Client) -> None:
    client.mkdir("x")
    fid = client.walk("x", "ctl")
    client.open(fid, ORDWR)
    client.write(fid, b"\xff\xfe")
    assert client.read(fid).startswith(b"ERROR Failed to parse request [\\xff\\xfe]")


@pytest.mark.parametrize(
    "text",
    [
        "tcp:0.0.0.0:8080:tcp:172.17.0.2:80",
        "udp:127.0.0.1:0:udp:192.168.65.3:53",
        "unix:L3J1bi9hLnNvY2s=:unix:L3Zhci9ydW4vYg==",
        "unix:L3J1bi9hLnNvY2s=:tcp:192.168.65.3:80",
        "tcp:127.0.0.1:80:unix:L3Zhci9ydW4vYg==",
    ],
)
def test_requests_are_printed_as_they_were_read(text: str) -> None:
    assert str(PortRequest.parse(text)) == text


def test_protocols_in_capitals_are_printed_small(client: Client) -> None:
    _, said = ask(client, "TCP:127.0.0.1:0:Tcp:192.168.65.3:80")
    assert said.startswith("OK tcp:127.0.0.1:") and ":tcp:192.168.65.3:80" in said


def test_a_port_that_one_of_us_has(site: Site, client: Client) -> None:
    forward = site.registry.add(PublishSpec.parse("0:80"), HAND)
    port = forward.spec.port
    _, said = ask(client, f"tcp:127.0.0.1:{port}:tcp:192.168.65.3:80")
    assert said == f"ERROR Bind for 127.0.0.1:{port} failed: port is already allocated\n"


def test_a_port_that_another_process_has(client: Client) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        _, said = ask(client, f"udp:127.0.0.1:{port}:udp:192.168.65.3:53")
    assert said == f"ERROR Bind for 127.0.0.1:{port} failed: port is already allocated\n"


def test_an_address_this_host_has_not(client: Client) -> None:
    _, said = ask(client, "tcp:192.0.2.7:8080:tcp:192.168.65.3:80")
    assert said == "ERROR listen tcp 192.0.2.7:8080: bind: cannot assign requested address\n"


def test_an_address_the_settings_forbid() -> None:
    registry = Registry(lambda: GUEST, allowed=["127.0.0.1"])
    site = Site()
    table = PortTable(registry)
    site.table = table
    with site.client() as client:
        _, said = ask(client, "tcp:0.0.0.0:8080:tcp:192.168.65.3:80")
        assert said == "ERROR Bind for 0.0.0.0:8080 failed: permission denied\n"
        assert ask(client, ANY, "y")[1].startswith("OK ")
    registry.close()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "Bind for 0.0.0.0:80 failed: permission denied"),
        (errno.EPERM, "Bind for 0.0.0.0:80 failed: permission denied"),
        (errno.EADDRINUSE, "Bind for 0.0.0.0:80 failed: port is already allocated"),
        (errno.EADDRNOTAVAIL, "listen tcp 0.0.0.0:80: bind: cannot assign requested address"),
        (errno.EMFILE, "Bind for 0.0.0.0:80: unexpected error too many open files"),
    ],
)
def test_words_that_docker_looks_for(number: int, words: str) -> None:
    request = PortRequest.parse("tcp:0.0.0.0:80:tcp:172.17.0.2:80")
    assert failure(request, BindFailed(PublishSpec.parse("80:80"), "why", number)) == words


def test_other_errors_are_on_one_line() -> None:
    request = PortRequest.parse("unix:L2E=:tcp:172.17.0.2:80")
    assert failure(request, ConfigError("one\ntwo")) == "Bind for /a: unexpected error one\\x0atwo"


def test_a_path_of_the_host(site: Site, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    local = base64.b64encode(os.fsencode(path)).decode()
    held, said = ask(client, f"unix:{local}:tcp:192.168.65.3:80")
    assert said == f"OK unix:{local}:tcp:192.168.65.3:80\n"
    assert path.is_socket()
    _, again = ask(client, f"unix:{local}:tcp:192.168.65.3:80", "y")
    assert again == f"ERROR Bind for {path} failed: port is already allocated\n"
    client.clunk(held)
    assert not path.exists()
    path.write_text("a file")
    _, said = ask(client, f"unix:{local}:tcp:192.168.65.3:80", "z")
    assert said.startswith(f"ERROR Bind for {path}"), "a file is never replaced"
    assert path.read_text() == "a file"


def test_without_a_forwarder_a_path_in_the_vm_cannot_be_reached(client: Client) -> None:
    _, said = ask(client, "tcp:127.0.0.1:0:unix:L3Zhci9ydW4vYg==")
    assert said.startswith("ERROR Bind for 127.0.0.1:0: unexpected error ") and "forwarder" in said


class Plane:
    """Stands where VPNKit's data plane is."""


def test_the_wiring_decides_how_an_address_is_reached(tmp_path: Path) -> None:
    site = Site(via=lambda address: "stack" if address.startswith("192.168.65.") else "forwarder")
    site.registry.carriers = Carriers(lambda: GUEST, plane=Plane())  # type: ignore[arg-type]
    local = base64.b64encode(os.fsencode(tmp_path / "s")).decode()
    with site.client() as client:
        ask(client, "tcp:127.0.0.1:0:tcp:192.168.65.3:80", "guest")
        ask(client, "tcp:127.0.0.1:0:tcp:172.17.0.2:80", "container")
        ask(client, f"unix:{local}:unix:L3Zhci9ydW4vYg==", "paths")
        assert [forward.spec.via for forward in site.registry] == ["stack", "forwarder", "forwarder"]
        assert [forward.spec.guest_path for forward in site.registry] == ["", "", "/var/run/b"]
    site.close()


def test_unpublished_through_another_door(site: Site, client: Client) -> None:
    held, said = ask(client, ANY)
    (forward,) = site.registry
    site.registry.remove(forward)
    assert client.read(held).decode() == f"ERROR {said[3:-1]} was unpublished by somebody else\n"
    assert names(client) == ["x"]
    client.clunk(held)
    assert names(client) == []


def test_entries_are_bounded() -> None:
    site = Site(max_entries=10)
    with site.client() as client:
        for number in range(10):
            client.mkdir(str(number))
        assert refused(client.mkdir, "one more") == "No space left on device"
        assert site.table.refused == 1
        client.remove(client.walk("3"))
        client.mkdir("one more")
    assert not site.table.entries
    site.close()


def test_a_request_that_is_too_long_is_none(site: Site, client: Client) -> None:
    client.mkdir("x")
    fid = client.walk("x", "ctl")
    client.open(fid, ORDWR)
    assert refused(client.write, fid, b"x" * 1025) == "File too large"
    client.write(fid, ANY.encode())
    assert len(site.registry) == 1


def test_ports_run_out_with_an_error_of_their_own(site: Site) -> None:
    registry = Registry(lambda: GUEST, max_forwards=1)
    site.table = PortTable(registry)
    with site.client() as client:
        assert ask(client, ANY, "x")[1].startswith("OK ")
        assert "unexpected error" in ask(client, ANY, "y")[1]
    registry.close()


def test_two_thousand_ports_one_after_the_other_leave_nothing(site: Site) -> None:
    wire = site.wire()
    client = client_of(wire)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2000):
        expose(client, ANY).close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not site.table.entries and len(site.registry) == 0
    assert wire.session.fids == 1
