"""VPNKit's HTTP API as its Go client, curl and people see it (spec vpnkit 7.2, 9.3, Appendix B)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import portfwd.vpnkit_api
from portfwd.owners import HAND, SETTINGS, VPNKIT, Owner
from portfwd.spec import PublishSpec
from portfwd.vpnkit_api import MAX_BODY, MAX_DUMPS, routes
from tests.support.http_house import JSON, Answer, House, call, free_port, house, read_answer, request, serving, until

FULL = {"proto": "tcp", "out_ip": "127.0.0.1", "out_port": 0, "in_ip": "172.17.0.2", "in_port": 80}


@dataclass
class Api:
    """The API on a socket, and what is behind it."""

    path: Path
    house: House
    dumps: list[str]
    asked: list[str]

    async def __call__(self, method: str, target: str, body: Any = None, **headers: str) -> Answer:
        return await call(self.path, method, target, body, {name.replace("_", "-"): to for name, to in headers.items()})

    async def ports(self) -> Any:
        answer = await self("GET", "/forwards/list")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json; charset=UTF-8")
        return answer.json

    async def expose(self, **port: Any) -> Answer:
        kind = "pipe" if port.get("proto") == "unix" else "port"
        return await self("PUT", f"/forwards/expose/{kind}", port)

    async def unexpose(self, **port: Any) -> Answer:
        kind = "pipe" if port.get("proto") == "unix" else "port"
        return await self("DELETE", f"/forwards/unexpose/{kind}", port)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    dumps: list[str] = []
    asked: list[str] = []

    def via(address: str) -> str:
        asked.append(address)
        return "forwarder" if address.startswith("172.") else "stack"

    async with house(allowed=("127.0.0.1", "127.0.0.2", "192.0.2.1", "::1")) as made:
        table = routes(made.registry, via=via, dump=lambda: dumps[0] if dumps else None)
        path = tmp_path / "control.sock"
        async with serving(path, table):
            yield Api(path, made, dumps, asked)


def empty(answer: Answer) -> None:
    assert (answer.status, answer.reason, answer.body, answer.headers["content-length"]) == (200, "OK", b"", "0")


async def test_an_empty_list_is_null(api: Api) -> None:
    answer = await api("GET", "/forwards/list")
    assert (answer.status, answer.body) == (200, b"null\n")


async def test_a_port_is_exposed_listed_used_and_unexposed(api: Api) -> None:
    empty(await api.expose(**FULL))
    (listed,) = await api.ports()
    assert listed == {**FULL, "out_port": listed["out_port"]}  # 0 became the real one; nothing else is there
    assert listed["out_port"] > 0
    with socket.create_connection(("127.0.0.1", listed["out_port"])):
        await until(lambda: bool(api.house.plane.streams))
        assert str(api.house.plane.streams[0][0]) == "tcp:172.17.0.2:80"
    empty(await api.unexpose(**listed))
    assert await api.ports() is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listed["out_port"]))


async def test_the_way_into_the_guest_is_asked_for(api: Api) -> None:
    await api.expose(**{**FULL, "in_ip": "192.168.65.3"})
    assert api.asked == ["192.168.65.3"]
    (listed,) = await api.ports()
    with socket.create_connection(("127.0.0.1", listed["out_port"])):
        await until(lambda: bool(api.house.guests.dialled))
        assert api.house.guests.dialled[0][0] == "192.168.65.3:80"


async def test_exposing_twice_is_one_forward(api: Api) -> None:
    await api.expose(**FULL)
    (listed,) = await api.ports()
    empty(await api.expose(**listed))
    # Any spelling of the same.
    empty(await api.expose(**{**listed, "in_ip": "::ffff:172.17.0.2", "in_path": "", "annotation": None}))
    assert await api.ports() == [listed]


async def test_port_0_is_another_one_each_time(api: Api) -> None:
    for _ in range(2):
        empty(await api.expose(**FULL))
    first, second = await api.ports()
    assert first["out_port"] != second["out_port"]


async def test_the_annotation_is_part_of_the_name(api: Api) -> None:
    await api.expose(**FULL, annotation="vpnkit-k8s-controller")
    (listed,) = await api.ports()
    assert listed["annotation"] == "vpnkit-k8s-controller"
    empty(await api.unexpose(**{**listed, "annotation": "another"}))
    assert await api.ports() == [listed]
    taken = await api.expose(**{**listed, "annotation": "another"})
    assert taken.json["message"] == f"listen tcp 127.0.0.1:{listed['out_port']}: bind: address already in use"
    empty(await api.unexpose(**listed))
    assert await api.ports() is None


async def test_unexposing_what_is_not_there_is_no_error(api: Api) -> None:
    empty(await api.unexpose(**{**FULL, "out_port": 9}))


async def test_unexpose_removes_only_its_port(api: Api) -> None:
    await api.expose(**FULL)
    await api.expose(**{**FULL, "proto": "udp"})
    tcp, udp = await api.ports()
    assert (tcp["proto"], udp["proto"]) == ("tcp", "udp")
    assert udp["out_port"] > 0
    empty(await api.unexpose(**udp))
    assert await api.ports() == [tcp]


async def test_post_is_put_and_delete(api: Api) -> None:
    empty(await api("POST", "/forwards/expose/port", FULL))
    (listed,) = await api.ports()
    empty(await api("POST", "/forwards/unexpose/port", listed))
    assert await api.ports() is None


async def test_without_out_ip_every_address_is_meant(tmp_path: Path) -> None:
    async with house() as made:
        async with serving(tmp_path / "s", routes(made.registry, via=lambda _: "stack", dump=lambda: None)):
            port = {"proto": "tcp", "in_ip": "192.168.65.3", "in_port": 80}
            empty(await call(tmp_path / "s", "PUT", "/forwards/expose/port", port))
            (listed,) = (await call(tmp_path / "s", "GET", "/forwards/list")).json
            assert listed["out_ip"] == "0.0.0.0"
            gone = {**port, "out_port": listed["out_port"]}
            empty(await call(tmp_path / "s", "DELETE", "/forwards/unexpose/port", gone))
            assert not len(made.registry)


async def test_what_go_writes_is_read(api: Api) -> None:
    """Any order of keys, unknown ones, indentation, a newline behind; Go's decoder takes keys in any case."""
    body = '{\n  "In_Port": 80,\n "in_ip": "172.17.0.2",\n "extra": [1],\n "OUT_IP": "127.0.0.1", "proto": "tcp"\n}\n'
    empty(await api("PUT", "/forwards/expose/port", body, Content_Type="application/json; charset=utf-8"))
    (listed,) = await api.ports()
    assert listed == {**FULL, "out_port": listed["out_port"]}


@pytest.mark.parametrize(
    ("target", "port", "message"),
    [
        ("/forwards/expose/port", {"proto": "unix", "out_path": "/a"}, "exposed ports can only be TCP or UDP"),
        ("/forwards/expose/port", {}, "exposed ports can only be TCP or UDP"),
        ("/forwards/expose/pipe", FULL, "exposed pipes can only have proto=Unix"),
        ("/forwards/unexpose/pipe", FULL, "exposed pipes can only have proto=Unix"),
    ],
)
async def test_the_wrong_protocol(api: Api, target: str, port: Any, message: str) -> None:
    answer = await api("POST", target, port)
    assert (answer.status, answer.json) == (400, {"message": message})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_is_not_said_to_be_json(api: Api, kind: str) -> None:
    headers = {"Content_Type": kind} if kind else {}
    answer = await api("PUT", "/forwards/expose/port", json.dumps(FULL), **headers)
    assert (answer.status, answer.body) == (415, b'{"message":"Unsupported Media Type"}\n')
    assert await api.ports() is None


async def test_no_body_needs_no_content_type(api: Api) -> None:
    answer = await api("PUT", "/forwards/expose/port")
    assert (answer.status, answer.json) == (400, {"message": "exposed ports can only be TCP or UDP"})


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"tcp"',
        b"7",
        b"\xff\xfe",
        b'{"proto":7}',
        b'{"proto":"tcp","out_port":"80"}',
        b'{"proto":"tcp","out_port":65536}',
        b'{"proto":"tcp","out_port":-1}',
        b'{"proto":"tcp","out_port":1.5}',
        b'{"proto":"tcp","out_port":true}',
        b'{"proto":"tcp","out_ip":"localhost"}',
        b'{"proto":"tcp","out_ip":"127.0.0.1","in_ip":"1.2.3","in_port":80}',
        b'{"proto":"tcp","out_ip":"127.0.0.1","in_ip":"192.168.65.3"}',  # no port in the guest
        b'{"proto":"tcp","out_ip":"127.0.0.1","in_ip":"192.168.65.3","in_port":80,"annotation":"\\ud800"}',
        b'{"proto":"tcp","out_ip":"127.0.0.1","in_ip":"192.168.65.3","in_port":80,"annotation":"' + b"x" * 300 + b'"}',
        b'{"proto":"tcp","out_port":' + b"9" * 5000 + b"}",
        b'{"proto":' + b"[" * 30000 + b"]" * 30000 + b"}",
        b'{"proto":"tcp"} {"proto":"tcp"}',
    ],
)
async def test_bad_json_is_400_with_a_message(api: Api, body: bytes) -> None:
    answer = await api("PUT", "/forwards/expose/port", body, Content_Type="application/json")
    assert answer.status == 400
    assert set(answer.json) == {"message"} and len(answer.json["message"]) > 10
    assert await api.ports() is None


@pytest.mark.parametrize("how", ["length", "chunked"])
async def test_an_oversized_body_is_refused_unread(api: Api, how: str) -> None:
    body = b'{"proto":"' + b"x" * MAX_BODY + b'"}'
    if how == "length":
        answer = await api("PUT", "/forwards/expose/port", body, Content_Type="application/json")
    else:
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        headers = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
        answer = await api("PUT", "/forwards/expose/port", chunked, **headers)
    assert (answer.status, set(answer.json)) == (413, {"message"})
    assert await api.ports() is None  # and the server goes on


async def test_the_words_of_the_operating_system(api: Api) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = await api.expose(**{**FULL, "out_port": port})
        assert taken.status == 400
        assert taken.json["message"] == f"listen tcp 127.0.0.1:{port}: bind: address already in use"
        assert "this very process" in taken.json["detail"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        port = datagrams.getsockname()[1]
        taken = await api.expose(**{**FULL, "proto": "udp", "out_port": port})
        assert taken.json["message"] == f"listen udp 127.0.0.1:{port}: bind: address already in use"
    foreign = await api.expose(**{**FULL, "out_ip": "192.0.2.1", "out_port": 8080})
    assert foreign.json["message"] == "listen tcp 192.0.2.1:8080: bind: cannot assign requested address"
    assert await api.ports() is None


async def test_addresses_that_the_settings_forbid(api: Api) -> None:
    answer = await api.expose(**{**FULL, "out_ip": "127.0.0.3"})
    assert answer.status == 400
    assert "allowed_bind_addresses" in answer.json["message"]


async def test_a_pipe(api: Api, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = tmp_path / "deep" / "down" / "a.sock"
        port = {"proto": "unix", "out_path": str(path), "in_path": "/run/b.sock"}
        empty(await api.expose(**port))
        empty(await api.expose(**port))
        assert await api.ports() == [port]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            await until(lambda: bool(api.house.plane.streams))
            assert str(api.house.plane.streams[0][0]) == "unix:/run/b.sock"
        empty(await api.unexpose(**port))
        assert await api.ports() is None
    finally:
        os.umask(old)


async def test_a_stale_socket_is_replaced_and_a_file_is_not(api: Api, tmp_path: Path) -> None:
    stale, file = tmp_path / "stale.sock", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    empty(await api.expose(proto="unix", out_path=str(stale), in_path="/b"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(stale))
    file.write_text("precious")
    answer = await api.expose(proto="unix", out_path=str(file), in_path="/b")
    assert answer.status == 400
    assert answer.json["message"].startswith(f"listen unix {file}: bind: ")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("path", ["", "relative", "/" + "x" * 300])
async def test_a_path_that_cannot_be_one(api: Api, path: str) -> None:
    answer = await api.expose(proto="unix", out_path=path, in_path="/b")
    assert (answer.status, bool(answer.json["message"])) == (400, True)


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("GET", "/forwards/expose/port", "PUT, POST"),
        ("DELETE", "/forwards/expose/pipe", "PUT, POST"),
        ("PUT", "/forwards/unexpose/port", "DELETE, POST"),
        ("PATCH", "/forwards/unexpose/pipe", "DELETE, POST"),
        ("POST", "/forwards/list", "GET, HEAD"),
        ("PUT", "/forwards/dump", "GET, HEAD"),
    ],
)
async def test_the_wrong_method(api: Api, method: str, target: str, allow: str) -> None:
    answer = await api(method, target)
    assert (answer.status, answer.body) == (405, b'{"message":"Method Not Allowed"}\n')
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("target", ["/forwards/", "/forwards/nothing", "/forwards/expose/port/x"])
async def test_an_unknown_path(api: Api, target: str) -> None:
    answer = await api("GET", target)
    assert (answer.status, answer.body) == (404, b'{"message":"Not Found"}\n')


async def test_forwards_of_others_are_seen_and_those_of_the_settings_stay(api: Api) -> None:
    registry = api.house.registry
    registry.add(PublishSpec.parse("127.0.0.1:0:80"), HAND)
    registry.add(PublishSpec.parse("127.0.0.1:0:192.168.65.9:81"), SETTINGS)
    by_hand, configured = await api.ports()
    assert "in_ip" not in by_hand and configured["in_ip"] == "192.168.65.9"
    empty(await api.unexpose(**by_hand))
    refused = await api.unexpose(**configured)
    assert refused.status == 400 and "settings" in refused.json["message"]
    empty(await api.expose(**configured))  # it is there
    assert await api.ports() == [configured]


async def test_a_door_of_its_own_knows_only_what_came_through_it(api: Api, tmp_path: Path) -> None:
    registry = api.house.registry
    mine = Owner("vpnkit", "/run/port.sock")
    own = routes(registry, via=lambda _: "stack", dump=lambda: None, owner=mine, own=True)
    await api.expose(**{**FULL, "in_ip": "192.168.65.3"})
    (others,) = await api.ports()
    async with serving(tmp_path / "own.sock", own):

        async def ask(method: str, target: str, body: Any = None) -> Answer:
            return await call(tmp_path / "own.sock", method, target, body)

        assert (await ask("GET", "/forwards/list")).json is None
        empty(await ask("DELETE", "/forwards/unexpose/port", others))
        assert len(registry) == 1
        taken = await ask("PUT", "/forwards/expose/port", others)
        assert taken.status == 400 and taken.json["message"].endswith("bind: address already in use")
        empty(await ask("PUT", "/forwards/expose/port", {**FULL, "in_ip": "192.168.65.3"}))
        (made,) = (await ask("GET", "/forwards/list")).json
        assert [forward.owner for forward in registry] == [VPNKIT, mine]
        assert len(await api.ports()) == 2
        empty(await ask("DELETE", "/forwards/unexpose/port", made))
        assert await api.ports() == [others]


async def test_a_range_is_listed_by_its_ports_and_stays_whole(api: Api) -> None:
    first = free_port(2)
    api.house.registry.add(PublishSpec.parse(f"127.0.0.2:{first}-{first + 1}:80-81"), HAND)
    ports = await api.ports()
    assert [(port["out_port"] - first, port["in_port"]) for port in ports] == [(0, 80), (1, 81)]
    refused = await api.unexpose(**ports[1])
    assert refused.status == 400 and "as a whole" in refused.json["message"]
    assert len(await api.ports()) == 2


async def test_too_many_are_refused(tmp_path: Path) -> None:
    async with house(max_forwards=1) as made:
        async with serving(tmp_path / "s", routes(made.registry, via=lambda _: "stack", dump=lambda: None)):
            empty(await call(tmp_path / "s", "PUT", "/forwards/expose/port", {**FULL, "in_ip": "192.168.65.3"}))
            answer = await call(tmp_path / "s", "PUT", "/forwards/expose/port", {**FULL, "in_ip": "192.168.65.3"})
            assert answer.status == 400 and "remove some first" in answer.json["message"]


async def test_dump_waits_for_a_multiplexer(api: Api) -> None:
    waiting = asyncio.create_task(api("GET", "/forwards/dump"))
    assert await api.ports() is None  # others are served meanwhile
    assert not waiting.done()
    api.dumps.append("last events\nof the mux\n")
    answer = await waiting
    assert (answer.status, answer.body) == (200, b"last events\nof the mux\n")
    assert answer.headers["content-type"] == "text/plain; charset=UTF-8"


async def test_dump_waits_so_long_and_no_longer(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.vpnkit_api, "DUMP_S", 0.2)
    answer = await api("GET", "/forwards/dump")
    assert answer.status == 504 and "vpnkit-forwarder" in answer.json["message"]


async def test_so_many_dumps_wait_and_no_more(api: Api) -> None:
    waiting = [asyncio.create_task(api("GET", "/forwards/dump")) for _ in range(MAX_DUMPS + 1)]
    done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().status for task in done] == [503]
    api.dumps.append("x")
    assert {task.result().status for task in (await asyncio.wait(rest))[0]} == {200}


async def test_a_bug_costs_one_request(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(api.house.registry, "add", broken)
        answer = await api.expose(**FULL)
        assert (answer.status, answer.json) == (500, {"message": "Internal Server Error"})
    empty(await api.expose(**FULL))


async def test_requests_follow_each_other_on_one_connection(api: Api) -> None:
    reader, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(request("PUT", "/forwards/expose/port", FULL) + request("GET", "/forwards/list"))
    empty(await read_answer(reader))
    (listed,) = (await read_answer(reader)).json
    writer.write(request("DELETE", "/forwards/unexpose/port", listed) + request("GET", "/forwards/list"))
    empty(await read_answer(reader))
    assert (await read_answer(reader)).body == b"null\n"
    writer.close()
    await writer.wait_closed()


async def test_with_curl(api: Api) -> None:
    assert shutil.which("curl") is not None, "not installed: curl (packages.txt, `make packages`)"

    async def curl(*words: str) -> str:
        words = ("curl", "-sS", "--max-time", "20", "--unix-socket", str(api.path), "-w", "%{http_code}", *words)
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0].decode()

    kind = f"Content-Type: {JSON['Content-Type']}"
    assert await curl("-X", "PUT", "-H", kind, "-d", json.dumps(FULL), "http://unix/forwards/expose/port") == "200"
    listed = (await curl("http://unix/forwards/list")).removesuffix("200")
    (port,) = json.loads(listed)
    assert await curl("-X", "DELETE", "-H", kind, "-d", json.dumps(port), "http://unix/forwards/unexpose/port") == "200"
    assert await curl("http://unix/forwards/list") == "null\n200"
