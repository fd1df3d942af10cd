"""Who may talk to the control server, and what a bad client gets and does to others (threats L1-L5, 3.5, F21)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import json
import logging
import os
import random
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import portfwd.acceptor
from netstack.errors import ConfigError
from portfwd.hijack import Taken, hijack
from pyvpnkit.api.guard import Guard
from pyvpnkit.api.http import connection_of
from pyvpnkit.api.server import ControlServer, mount_routes, parse_listen
from tests.roof.api.conftest import Control, control_server, request, until

TOKEN = "0123456789abcdef0123456789abcdef"

CONNECT_AS = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
    sock.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    print(sock.recv(64).split(b"\\r\\n")[0].decode() or "closed")
except OSError as error:
    print(type(error).__name__)
"""


async def as_user(uid: int, path: str) -> str:
    """The first line that a process of another user is answered on the socket."""
    command = [sys.executable, "-c", CONNECT_AS, path, str(uid)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=True)
    return str(done.stdout).strip()


@pytest.fixture
async def tcp(tmp_path: Path) -> AsyncIterator[Control]:
    """With a TCP listener and a token."""
    async with control_server(tmp_path, listen=["tcp:127.0.0.1:0"], token=TOKEN) as made:
        yield made


def door(control: Control) -> str:
    """The address of the TCP listener."""
    return control.server.addresses[1]


# The Unix socket.


async def test_the_socket_is_the_owners_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    async with control_server(tmp_path) as control:
        assert stat.S_IMODE(os.lstat(control.path).st_mode) == 0o600
        assert (await control.ask("GET", "/v1/status")).status == 200
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="expected: becoming another user needs root")
@pytest.mark.parametrize(
    ("allowed", "answer"),
    [pytest.param((), "", id="a stranger"), pytest.param((65534,), "HTTP/1.1 200 OK", id="a user of the settings")],
)
async def test_another_user_is_let_in_only_when_the_settings_say_so(
    allowed: tuple[int, ...], answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Not in pytest's directory, which no other user may enter; and the mode is opened, so that only the credentials decide.
    place = Path(f"/tmp/pyvpnkit-control-{os.getpid()}")
    os.mkdir(place, 0o755)
    try:
        async with control_server(place, allowed_uids=allowed) as control:
            os.chmod(control.path, 0o666)
            with caplog.at_level(logging.WARNING):
                said = await as_user(65534, control.path)
            if answer:
                assert said == answer
                assert control.server.http.counters.strangers == 0
            else:
                assert said in ("closed", "ConnectionResetError", "BrokenPipeError")
                assert control.server.http.counters.strangers == 1
                assert len([line for line in caplog.messages if "uid 65534" in line]) == 1
            assert await as_user(0, control.path) == "HTTP/1.1 200 OK"
    finally:
        os.rmdir(place)


async def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "control.sock"))
    async with control_server(tmp_path) as control:
        assert (await control.ask("GET", "/v1/status")).status == 200
    (tmp_path / "control.sock").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        async with control_server(tmp_path):
            pass
    assert (tmp_path / "control.sock").read_text() == "precious"


async def test_http_is_served_on_a_connection_that_somebody_else_accepted(control: Control) -> None:
    ours, theirs = socket.socketpair()
    control.server.accept(theirs)
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(request("GET", "/v1/forwards", Connection="close"))
    assert b'{"forwards": [], "failed": []}' in await reader.read()
    writer.close()


# TCP.


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        pytest.param({"Authorization": f"Bearer {TOKEN}"}, 200, "", id="the token"),
        pytest.param({"Authorization": f"bearer {TOKEN}", "Host": "127.0.0.1:99"}, 200, "", id="address as Host"),
        pytest.param({}, 401, "Authorization: Bearer", id="no token"),
        pytest.param({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401, "Authorization: Bearer", id="wrong token"),
        pytest.param({"Authorization": "Bearer "}, 401, "Authorization: Bearer", id="empty token"),
        pytest.param({"Authorization": f"Basic {TOKEN}"}, 401, "Authorization: Bearer", id="wrong scheme"),
        pytest.param({"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 403, "127.0.0.1", id="rebinding"),
        pytest.param({"Authorization": f"Bearer {TOKEN}", "Host": "10.0.0.9:80"}, 403, "localhost", id="other address"),
        pytest.param({"Authorization": f"Bearer {TOKEN}", "Origin": "http://localhost"}, 403, "web pages", id="page"),
        pytest.param(
            {"Authorization": f"Bearer {TOKEN}", "Sec-Fetch-Site": "cross-site"}, 403, "web pages", id="image"
        ),
    ],
)
async def test_on_tcp_a_request_needs_the_token_and_no_browser(
    tcp: Control, headers: dict[str, str], status: int, words: str
) -> None:
    client = await tcp.connect(door(tcp))
    fields = {"Host": "localhost", **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    await client.send(f"GET /v1/forwards HTTP/1.1\r\n{lines}\r\n".encode())
    reply = await client.reply()
    assert reply.status == status
    assert not words or words in reply.message
    assert "access-control-allow-origin" not in reply.headers
    assert tcp.server.http.counters.unauthorised == (status != 200)


async def test_a_token_is_not_asked_for_on_the_unix_socket(tcp: Control) -> None:
    assert (await tcp.ask("GET", "/v1/status")).status == 200


async def test_without_a_token_loopback_is_open_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with control_server(tmp_path, listen=["tcp:127.0.0.1:0", "tcp:[::1]:0"]) as control:
        for address in control.server.addresses[1:]:
            assert (await control.ask("GET", "/v1/status", address=address)).status == 200
        reply = await control.ask("GET", "/v1/status", address=control.server.addresses[2], Host="[0:0::1]:80")
        assert reply.status == 200
    assert "control.token" in caplog.text


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:0"])
async def test_beyond_loopback_no_listener_starts_without_a_token(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"set control\.token"):
        async with control_server(tmp_path, listen=[address]):
            pass


async def test_a_listener_on_every_address_answers_to_the_address_that_was_asked(tmp_path: Path) -> None:
    async with control_server(tmp_path, listen=["tcp:0.0.0.0:0"], token=TOKEN) as control:
        port = door(control).rpartition(":")[2]
        near = f"tcp:127.0.0.1:{port}"
        ask = {"address": near, "Authorization": f"Bearer {TOKEN}"}
        assert (await control.ask("GET", "/v1/status", Host=f"127.0.0.1:{port}", **ask)).status == 200
        assert (await control.ask("GET", "/v1/status", Host=f"0.0.0.0:{port}", **ask)).status == 403


@pytest.mark.parametrize("token", ["short", "x" * 31, "with blanks " * 9, "\u00e9" * 40])
async def test_a_token_that_is_a_password_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand"):
        async with control_server(tmp_path, token=token):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp:8080",
        "udp:127.0.0.1:1",
        "tcp:localhost:1",
        "tcp:::1:80",
        "tcp:127.0.0.1:70000",
        "tcp:127.0.0.1:-1",
    ],
)
def test_an_address_to_listen_on_says_its_form(text: str) -> None:
    with pytest.raises(ConfigError, match="tcp:IP:PORT"):
        parse_listen(text)


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError, match="this very process"):
            async with control_server(tmp_path, listen=[f"tcp:127.0.0.1:{taken.getsockname()[1]}"]):
                pass
    assert not (tmp_path / "control.sock").exists()


# Requests that are not what they should be.


@pytest.mark.parametrize(
    ("raw", "headers", "status", "words"),
    [
        pytest.param(b"{", {}, 400, "no JSON", id="cut short"),
        pytest.param(b"\xff\xfe{}", {}, 400, "not UTF-8", id="bad UTF-8"),
        pytest.param(b"[" * 60000, {}, 400, "too deeply", id="deep"),
        pytest.param(b'{"spec":' * 7000, {}, 400, "too deeply", id="deep objects"),
        pytest.param(b'{"port": NaN, "guest_port": 1}', {}, 400, "NaN is no JSON", id="NaN"),
        pytest.param(b'{"spec": "1:1", "spec": "2:2"}', {}, 400, "given twice", id="a name twice"),
        pytest.param(b'{"spec": "\\ud800"}', {}, 400, "surrogate", id="half a surrogate pair"),
        pytest.param(b'{"spec": "a\\u0000b"}', {}, 400, "zero character", id="zero"),
        pytest.param(b'{"port": ' + b"9" * 5000 + b"}", {}, 400, "", id="a number of 5,000 digits"),
        pytest.param(b'{"port": 80.5, "guest_port": 80}', {}, 400, "not a whole number", id="a fraction"),
        pytest.param(b'{"port": true, "guest_port": 80}', {}, 400, "not a whole number", id="a boolean"),
        pytest.param(b'"8080:80"', {}, 400, "not an object", id="no object"),
        pytest.param(
            b"spec=8080:80", {"Content_Type": "application/x-www-form-urlencoded"}, 415, "application/json", id="form"
        ),
        pytest.param(b"{}", {"Content_Type": "text/plain"}, 415, "application/json", id="plain text"),
        pytest.param(b"{}", {"Content_Encoding": "gzip"}, 415, "as it is", id="compressed"),
        pytest.param(b'"' + b"x" * 65536, {}, 413, "65536 octets", id="too large"),
    ],
)
async def test_a_bad_body_gets_a_clear_error_and_changes_nothing(
    control: Control, raw: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    reply = await control.ask("POST", "/v1/forwards", raw=raw, **headers)
    assert reply.status == status
    assert words in reply.message
    assert "Traceback" not in reply.message
    assert not len(control.service.registry)


async def test_a_body_of_exactly_the_bound_is_read(control: Control) -> None:
    reply = await control.ask("POST", "/v1/forwards", raw=b'{"spec": "bad"}'.ljust(65536))
    assert (reply.status, "'bad'" in reply.message) == (400, True)


async def test_a_body_without_an_end_is_not_read_for_ever(control: Control) -> None:
    client = await control.connect()
    await client.send(
        b"POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            await client.send(b"1000\r\n" + bytes(4096) + b"\r\n")
    assert (await client.reply()).status == 413


@pytest.mark.parametrize(
    ("method", "target", "status", "words"),
    [
        pytest.param("GET", "/", 404, "/v1/openapi.json", id="root"),
        pytest.param("GET", "/v1/nothing", 404, "/v1/openapi.json", id="unknown"),
        pytest.param("GET", "/v1/%2e%2e/%00", 404, "/v1/openapi.json", id="odd path"),
        pytest.param("PATCH", "/v1/forwards", 405, "GET", id="method"),
        pytest.param("GET", "/v1/flows?gest=1", 400, "guest", id="unknown parameter"),
        pytest.param("GET", "/v1/flows?guest=1&guest=2", 400, "more than once", id="twice"),
        pytest.param("GET", "/v1/flows?protocol=sctp", 400, "tcp", id="not of the list"),
        pytest.param("GET", "/v1/flows?limit=-1", 400, "0 to 100000", id="out of range"),
        pytest.param("DELETE", "/v1/forwards", 400, "'spec' is missing", id="missing"),
    ],
)
async def test_a_wrong_request_is_told_what_is_right(
    control: Control, method: str, target: str, status: int, words: str
) -> None:
    reply = await control.ask(method, target)
    assert reply.status == status
    assert words in reply.message
    if status == 405:
        assert "POST" in reply.headers["allow"]


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"\0\1\2\3\r\n\r\n", id="binary"),
        pytest.param(b"GET\r\n\r\n", id="no target"),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"x" * 20000 + b"\r\n\r\n", id="long header"),
        pytest.param(b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n", id="long target"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", id="negative length"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", id="smuggling"),
    ],
)
async def test_what_is_not_http_gets_400_in_json_and_is_closed(control: Control, octets: bytes) -> None:
    client = await control.connect()
    await client.send(octets)
    reply = await client.reply()
    assert reply.status == 400
    assert reply.message.startswith("not HTTP")
    assert await client.closed() == b""
    assert (await control.ask("GET", "/v1/status")).status == 200


# Slow and many clients.


async def test_a_head_that_does_not_come_ends_the_connection(tmp_path: Path) -> None:
    async with control_server(tmp_path, idle_s=0.2) as control:
        silent, dribbling, done = [await control.connect() for _ in range(3)]
        await dribbling.send(b"GET /v1/status HT")
        await done.send(request("GET", "/v1/status"))
        assert (await done.reply()).status == 200
        assert await silent.closed() == b""
        assert (await dribbling.reply()).status == 408
        assert await done.closed() == b""
        assert control.server.http.counters.timeouts == 3


async def test_a_body_that_does_not_come_is_given_up(control: Control) -> None:
    control.server._guard.body_s = 0.2
    client = await control.connect()
    await client.send(request("POST", "/v1/forwards", Content_Length="10", Content_Type="application/json"))
    reply = await client.reply()
    assert (reply.status, reply.message) == (408, "the body did not come within 0.2 s")


async def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    async with control_server(tmp_path, max_connections=3) as control:
        kept = [await control.connect() for _ in range(3)]
        await until(lambda: len(control.server.http.connections) == 3)
        more = await control.connect()
        assert (await more.reply()).status == 429
        assert control.server.http.counters.too_many == 1
        kept[0].close()
        await until(lambda: len(control.server.http.connections) == 2)
        assert (await control.ask("GET", "/v1/status")).status == 200


async def test_a_thousand_clients_that_leave_in_the_middle_leave_nothing_half_done(control: Control) -> None:
    rng = random.Random(21)
    whole = request("POST", "/v1/forwards", {"spec": "0:80"})
    descriptors = len(os.listdir("/proc/self/fd"))
    published = 0
    for number in range(1000):
        client = await control.connect()
        cut = rng.randrange(len(whole) + 1)
        published += cut == len(whole)
        with contextlib.suppress(ConnectionError):
            await client.send(whole[:cut])
        if number % 2:
            client.writer.transport.abort()
        else:
            client.close()
    await until(lambda: not control.server.http.connections)
    # Those whose request was whole are published, or were not taken up at all; a part of a request did nothing.
    assert len(control.service.registry) <= published
    for forward in control.service.registry:
        assert len(forward.listeners) == 1
        control.service.registry.remove(forward)
    # A loop may open one of its own the first time.
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 1)
    assert (await control.ask("POST", "/v1/forwards", {"spec": "0:80"})).status == 201
    assert len(asyncio.all_tasks()) < 20


async def test_a_client_that_left_before_its_body_was_looked_at_is_no_fault_of_ours(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asyncio.Event()
    route = Guard._route

    def wait_until_it_has_left(guard: Guard, asked: web.Request) -> None:
        client.writer.transport.abort()
        connection_of(asked).force_close()  # as the loop does when it hears of it
        route(guard, asked)
        looked.set()

    monkeypatch.setattr(Guard, "_route", wait_until_it_has_left)
    client = await control.connect()
    await client.send(request("POST", "/v1/forwards", Content_Length="10", Content_Type="application/json"))
    async with asyncio.timeout(30):
        await looked.wait()
    await until(lambda: not control.server.http.connections)
    assert control.server.http.counters.contained == 0


async def test_descriptors_that_run_out_do_not_end_the_listener(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(portfwd.acceptor, "PAUSE_S", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket(socket.AF_UNIX)
    lowest = os.dup(client.fileno())
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        client.connect(control.path)
        await until(lambda: control.server.counts()["pauses"] > 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await until(lambda: len(control.server.http.connections) == 1)
    client.close()
    assert (await control.ask("GET", "/v1/status")).status == 200


# What is mounted.


async def test_mounted_routes_keep_their_own_words_and_habits(tmp_path: Path) -> None:
    async def teapot(asked: web.Request) -> web.Response:
        raise web.HTTPConflict(text=f"verbatim {(await asked.content.read()).decode()}")

    async def bug(asked: web.Request) -> web.Response:
        raise RuntimeError("secret detail")

    routes = mount_routes([web.post("/forwards/x", teapot), web.get("/services/bug", bug)])
    async with control_server(tmp_path, mounts=[routes], listen=["tcp:127.0.0.1:0"]) as control:
        form = {"raw": b"a=b", "Content_Type": "application/x-www-form-urlencoded"}
        reply = await control.ask("POST", "/forwards/x", **form)
        assert (reply.status, reply.body) == (409, b"verbatim a=b")
        # A browser could send this to a TCP port.
        reply = await control.ask("POST", "/forwards/x", address=door(control), **form)
        assert reply.status == 415
        reply = await control.ask("GET", "/services/bug")
        assert reply.status == 500
        assert "secret" not in reply.message
        assert control.server.http.counters.contained == 1
        control.server.http.counters.contained = 0


async def test_a_mounted_route_may_take_its_connection_over(tmp_path: Path) -> None:
    taken: list[socket.socket] = []

    async def tunnel(asked: web.Request) -> web.StreamResponse:
        taken.append(hijack(asked))
        return Taken()

    options: dict[str, Any] = {"mounts": [mount_routes([web.post("/tunnel", tunnel)])], "hijacked": ["/tunnel"]}
    async with control_server(tmp_path, idle_s=0.2, **options) as control:
        client = await control.connect()
        await client.send(request("POST", "/tunnel") + b"octets that are no HTTP")
        await until(lambda: bool(taken))
        # It is nobody's idle connection any more.
        await until(lambda: not control.server.http.connections)
        sock = taken.pop()
        assert sock.recv(100) == b"octets that are no HTTP"
        sock.sendall(b"answer")
        sock.close()
        assert await client.closed() == b"answer"
        other = await control.connect()
        for _ in range(2):
            await other.send(request("GET", "/v1/forwards"))
            assert (await other.reply()).status == 200
        assert await other.closed() == b""
        assert (await control.ask("POST", "/v1/forwards", raw=b"x" * 70000)).status == 413


# Logs, and the end.


async def test_every_change_is_in_the_log_with_who_did_it(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyvpnkit"):
        made = (await control.ask("POST", "/v1/forwards", {"spec": "0:80"})).json
        await control.ask("DELETE", f"/v1/forwards/{made['id']}")
        await control.ask("DELETE", "/v1/forwards?spec=1%0a2")
        await control.ask("GET", "/v1/forwards")
    lines = [line for line in caplog.messages if line.startswith("control: ")]
    who = f"control: uid {os.geteuid()} (pid {os.getpid()}): "
    assert lines[0] == f"{who}POST /v1/forwards: 201 published {made['spec']}"
    assert lines[1] == f"{who}DELETE /v1/forwards/{made['id']}: 200 no longer published {made['spec']}"
    assert len(lines) == 3
    assert "\n" not in lines[2]


async def test_leaving_ends_streams_and_idle_connections_at_once(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with control_server(tmp_path) as control:
        events, idle = await control.connect(), await control.connect()
        await events.send(request("GET", "/v1/events"))
        assert (await events.head()).status == 200
        began = loop.time()
    assert loop.time() - began < 10
    assert (await events.closed()).endswith(b"0\r\n\r\n")
    assert await idle.closed() == b""


async def test_numbers_of_the_server_are_in_its_status(control: Control) -> None:
    await control.ask("GET", "/nothing")
    counts = (await control.ask("GET", "/v1/status")).json["control"]
    assert counts["requests"] == 2
    assert counts["open_connections"] >= 1
    assert json.dumps(counts)


def test_construction_needs_no_loop_and_bind_only_a_directory(tmp_path: Path) -> None:
    """As the daemon does it: bound while root, served as another user."""
    from pyvpnkit import loader
    from pyvpnkit.service import Service

    service = Service(loader.load(None, {"links": [f"qemu:{tmp_path}/net.sock"]}))
    server = ControlServer(service, path=str(tmp_path / "control.sock"))
    server.bind()
    assert (tmp_path / "control.sock").is_socket()
    server._close_listeners()
    service.stack.close()


@pytest.mark.parametrize(
    "test",
    [
        test_the_socket_is_the_owners_alone_and_goes_with_the_server,
        test_http_is_served_on_a_connection_that_somebody_else_accepted,
        test_without_a_token_loopback_is_open_and_said_so,
        test_a_body_without_an_end_is_not_read_for_ever,
        test_a_head_that_does_not_come_ends_the_connection,
        test_one_connection_too_many_is_told_so,
        test_a_thousand_clients_that_leave_in_the_middle_leave_nothing_half_done,
        test_mounted_routes_keep_their_own_words_and_habits,
        test_a_mounted_route_may_take_its_connection_over,
        test_leaving_ends_streams_and_idle_connections_at_once,
    ],
)
def test_the_same_in_the_loop_that_daemons_run_in(test: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """uvloop differs in what it makes of sockets and transports."""
    uvloop = pytest.importorskip("uvloop", reason="expected: no uvloop on this system")
    wanted = inspect.signature(test).parameters
    given = {name: value for name, value in {"tmp_path": tmp_path, "caplog": caplog}.items() if name in wanted}

    async def run() -> None:
        if "control" not in wanted:
            await test(**given)
            return
        async with control_server(tmp_path) as control:
            await test(control, **given)

    # In a thread, because this one's loop may be there already.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(_run_in, uvloop.new_event_loop, run).result(120)


def _run_in(factory: Any, run: Any) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())
