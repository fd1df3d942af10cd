"""`pyvpnkit ports`, `expose`, `unexpose`, `status`, `flows`, `events`: what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.observe.events import Contained
from portfwd.owners import Owner
from portfwd.spec import PublishSpec
from tests.roof.api.conftest import Control, control_server, until
from tests.roof.commands.conftest import end, pyvpnkit, start
from tests.roof.guest import HOST, StreamGuest

# Ports.


async def test_a_port_is_exposed_listed_and_unexposed(control: Control) -> None:
    assert "expose 8080:80" in (await pyvpnkit(control, "ports")).out
    done = await pyvpnkit(control, "expose", "0:80", "udp:0:53")
    assert done.status == 0
    first, second = done.out.split()
    assert re.fullmatch(r"tcp:127\.0\.0\.1:\d+:80", first) and second.startswith("udp:")
    lines = (await pyvpnkit(control, "ports")).out.splitlines()
    assert lines[0].split() == ["ID", "SPEC", "OWNER", "CLIENTS"]
    assert [line.split() for line in lines[1:]] == [["1", first, "hand", "0"], ["2", second, "hand", "0"]]
    assert [one["id"] for one in json.loads((await pyvpnkit(control, "ports", "--json")).out)] == [1, 2]
    done = await pyvpnkit(control, "unexpose", first, "2")
    assert (done.status, done.out.split()) == (0, [first, second])
    assert not len(control.service.registry)


async def test_what_fails_is_told_and_the_rest_is_done(control: Control) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = await pyvpnkit(control, "expose", f"{port}:80", "0:81", "nonsense")
    assert done.status == 2
    assert f"pid {os.getpid()}" in done.err and "8080:80" in done.err
    assert re.fullmatch(r"tcp:127\.0\.0\.1:\d+:81\n", done.out)
    done = await pyvpnkit(control, "unexpose", "77", "1:1")
    assert done.status == 1
    assert done.err.count("no forward has id 77") == done.err.count("1:1 is not published") == 1


async def test_unexpose_all_leaves_what_others_made(control: Control) -> None:
    kept = control.service.registry.add(PublishSpec(guest_port=1), Owner("settings"))
    await pyvpnkit(control, "expose", "0:80", "0:81")
    done = await pyvpnkit(control, "unexpose", "--all")
    assert (done.status, len(done.out.split())) == (0, 2)
    assert list(control.service.registry) == [kept]
    for argv in (["unexpose"], ["unexpose", "--all", "1"]):
        done = await pyvpnkit(control, *argv)
        assert (done.status, "--all" in done.err) == (2, True)


async def test_ports_of_before_a_restart_that_are_taken_are_named_and_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        spec = f"tcp:127.0.0.1:{taken.getsockname()[1]}:80"
        document = {"format": "pyvpnkit forwards 1", "forwards": [spec]}
        await asyncio.to_thread((tmp_path / "forwards.json").write_text, json.dumps(document))
        async with control_server(tmp_path, state_directory=tmp_path) as control:
            done = await pyvpnkit(control, "ports")
            assert (done.out, spec in done.err, f"pid {os.getpid()}" in done.err) == ("", True, True)
            done = await pyvpnkit(control, "unexpose", "--all")
            assert (done.status, done.out) == (0, f"{spec}\n")
            assert "nothing is published" in (await pyvpnkit(control, "ports")).out


# Status and flows.


async def test_status_names_the_guests_and_what_was_dropped(control: Control, guest: StreamGuest) -> None:
    guest.send(b"short")
    await until(lambda: control.service.stack.counters.drops["frame_short"] == 1)
    done = await pyvpnkit(control, "status")
    assert done.status == 0
    for expected in (
        f"process {os.getpid()}",
        f"qemu:{control.link}",
        "1 frame_short",
        "192.168.65.3",
        guest.mac.hex(":"),
    ):
        assert expected in done.out
    assert json.loads((await pyvpnkit(control, "status", "--json")).out)["pid"] == os.getpid()


async def test_flows_are_listed_filtered_and_reset(control: Control, guest: StreamGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connection = await asyncio.to_thread(guest.connect, HOST, port)
        assert connection is not None
        accepted, (_, client) = server.accept()
        with accepted:
            lines = (await pyvpnkit(control, "flows", "--protocol", "tcp")).out.splitlines()
            assert len(lines) == 2
            words = lines[1].split()
            assert words[1:5] == ["tcp", f"192.168.65.3:{connection.own_port}", "->", f"192.168.65.2:{port}"]
            assert words[5:9] == [f"127.0.0.1:{client}", "->", f"127.0.0.1:{port}", "ESTABLISHED"]
            (flow,) = json.loads((await pyvpnkit(control, "flows", "--protocol", "tcp", "--json")).out)
            assert words[0] == flow["id"]
            assert len((await pyvpnkit(control, "flows", "--guest", "192.168.65.9")).out.splitlines()) == 1
            assert "and 1 more" in (await pyvpnkit(control, "flows", "--limit", "0", "--protocol", "tcp")).out
            assert (await pyvpnkit(control, "flows", "--reset", flow["id"])).status == 0
            assert await asyncio.to_thread(connection.ended_by) == "RST"
            done = await pyvpnkit(control, "flows", "--reset", flow["id"])
            assert (done.status, flow["id"] in done.err) == (1, True)


# Events.


async def test_events_are_lines_until_ctrl_c(control: Control) -> None:
    process = await start(control.path, "events", "--types", "ForwardAdded,Contained")
    await until(lambda: control.server.counts()["open_event_streams"] == 1)
    control.service.registry.add(PublishSpec(guest_port=80))
    control.service.events.emit(Contained(time=0, where="x", error="\x1b[2J\n"))
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert re.fullmatch(r"\d\d:\d\d:\d\d ForwardAdded forward=tcp:127\.0\.0\.1:\d+:80 owner=settings\n", line)
    assert (await process.stdout.readline()).decode().endswith(r" Contained where=x error=\x1b[2J\x0a" + "\n")
    process.send_signal(signal.SIGINT)
    done = await end(process)
    assert (done.status, done.out, done.err) == (0, "", "")


async def test_events_for_programs_and_the_end_of_the_daemon(tmp_path: Path) -> None:
    async with control_server(tmp_path) as control:
        process = await start(control.path, "events", "--json")
        await until(lambda: control.server.counts()["open_event_streams"] == 1)
        control.service.registry.add(PublishSpec(guest_port=80))
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline())["event"] == "ForwardAdded"
    assert (await end(process)).status == 0


async def test_events_end_quietly_when_nobody_reads_them(control: Control) -> None:
    process = await start(control.path, "events", "--types", "Contained")
    await until(lambda: control.server.counts()["open_event_streams"] == 1)
    assert process.stdout is not None
    process.stdout._transport.close()  # type: ignore[attr-defined]
    for number in range(3):
        control.service.events.emit(Contained(time=0, where=str(number), error=""))
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert process.stderr is not None
    assert await process.stderr.read() == b""


# What can be wrong.


async def test_without_a_daemon_every_command_says_how_to_start_one(tmp_path: Path) -> None:
    for argv in (["ports"], ["expose", "1:1"], ["status"], ["flows"], ["top", "--once"], ["events"], ["capture"]):
        done = await pyvpnkit(str(tmp_path / "none.sock"), *argv)
        assert done.status == 1, argv
        assert "no daemon is running" in done.err and "pyvpnkit run --link" in done.err and str(tmp_path) in done.err
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    assert "no daemon is running" in (await pyvpnkit(str(stale), "ports")).err


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket of some other program."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "other.sock"))
        sock.listen()
        yield str(tmp_path / "other.sock"), sock


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(b"", "hung up", id="nothing"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", "hung up", id="another protocol"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n<p>", "no JSON", id="a web server"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{", "broke off", id="cut short"),
        pytest.param(b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n[]", "refused with 500", id="no message"),
    ],
)
async def test_another_program_behind_the_socket_is_not_believed(
    answering: tuple[str, socket.socket], answer: bytes, words: str
) -> None:
    path, sock = answering

    def serve() -> None:
        connection, _ = sock.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    serving = asyncio.create_task(asyncio.to_thread(serve))
    done = await pyvpnkit(path, "ports")
    await serving
    assert (done.status, words in done.err) == (1, True), done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="expected: becoming another user needs root")
async def test_another_user_is_told_whose_socket_it_is(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pyvpnkit.commands.client import Client\n"
        "import encodings.idna, netstack.errors, urllib.parse, http.client, pyvpnkit.commands.client\n"
        "os.setuid(65534)\n"
        "try: Client(sys.argv[2]).get('/v1/status')\n"
        "except netstack.errors.HostError as error: print(error)"
    )
    place = Path(f"/tmp/pyvpnkit-commands-{os.getpid()}")
    os.mkdir(place, 0o755)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(place / "control.sock"))
            os.chmod(place / "control.sock", 0o600)
            sock.listen()
            root = str(Path(__file__).parents[3])
            argv = [sys.executable, "-c", code, root, str(place / "control.sock")]
            done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
            assert "not permitted; it is for the user who runs the daemon" in done.stdout, done.stderr
            os.unlink(place / "control.sock")
    finally:
        os.rmdir(place)


async def test_the_socket_is_found_where_the_daemon_puts_it(control: Control, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "pyvpnkit")
    os.symlink(control.path, tmp_path / "pyvpnkit" / "control.sock")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYVPNKIT_CONTROL", "STATE_DIRECTORY")
    }
    environment |= {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    argv = (sys.executable, "-m", "pyvpnkit", "ports", "--json")
    process = await asyncio.create_subprocess_exec(*argv, env=environment, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert json.loads(out) == []
    done = await pyvpnkit("/nonexistent", "ports", "--control", control.path, "--json")
    assert json.loads(done.out) == []


def test_the_command_line_knows_them_without_loading_what_they_need() -> None:
    code = (
        "import sys; import pyvpnkit.cli; pyvpnkit.cli.parser()\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('aiohttp', 'rich', 'http')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
