"""gvproxy's API as podman, Lima, CRC and its own Go client see it (spec gvproxy 1.3, 7, 10)."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import portfwd.gvproxy_api
from dns.zones import Zones
from portfwd.gvproxy_api import HIJACKED, MAX_BODY, Suppliers, routes
from portfwd.gvproxy_forwards import Forwards
from portfwd.owners import GVPROXY, HAND
from portfwd.spec import PublishSpec
from tests.support import packets
from tests.support.gvproxy_world import GvForwarder, World, world
from tests.support.http_house import LIMIT_S, Answer, House, call, free_port, house, request, serving, until

PLAIN = "text/plain; charset=utf-8"


@dataclass
class Api:
    """The API on a socket with simple suppliers."""

    path: Path
    house: House
    zones: Zones = field(default_factory=Zones)
    leases: dict[str, str] = field(default_factory=dict)

    async def __call__(self, method: str, target: str, body: Any = None) -> Answer:
        octets = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        return await call(self.path, method, target, octets)  # without a content type, as Go's client here

    async def all(self) -> Any:
        answer = await self("GET", "/services/forwarder/all")
        assert (answer.status, answer.headers["content-type"]) == (200, PLAIN)
        assert answer.body.endswith(b"]\n")
        return answer.json

    async def expose(self, local: str, remote: str, protocol: str | None = "tcp") -> Answer:
        body = {"local": local, "remote": remote} | ({} if protocol is None else {"protocol": protocol})
        return await self("POST", "/services/forwarder/expose", body)

    async def unexpose(self, local: str, protocol: str | None = "tcp") -> Answer:
        body = {"local": local} | ({} if protocol is None else {"protocol": protocol})
        return await self("POST", "/services/forwarder/unexpose", body)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with house() as made:
        it = Api(tmp_path / "services.sock", made)
        suppliers = Suppliers(
            zones=it.zones,
            leases=lambda: it.leases,
            cam=lambda: {"5a:94:ef:e4:0c:ee": 1, "02:00:00:00:00:01": 2},
            stats=lambda: {"BytesSent": 1, "BytesReceived": 2, "TCP": {"Retransmits": 0}},
            dialer=made.guests,
            gateway=bytes((192, 168, 65, 1)),
            state=lambda guest, source: None,
            attach=lambda sock, mtu: sock.close(),
        )
        async with serving(it.path, routes(Forwards(made.registry), suppliers), HIJACKED):
            yield it


def done(answer: Answer) -> None:
    assert (answer.status, answer.reason, answer.body, answer.headers["content-length"]) == (200, "OK", b"", "0")


def failed(answer: Answer, status: int, words: str) -> None:
    assert (answer.status, answer.body.decode()) == (status, words + "\n")
    assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == (PLAIN, "nosniff")


async def test_nothing_is_exposed_at_first(api: Api) -> None:
    answer = await api("GET", "/services/forwarder/all")
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"[]\n", PLAIN)
    assert "x-content-type-options" not in answer.headers


async def test_expose_list_use_unexpose(api: Api) -> None:
    local = f"127.0.0.1:{free_port()}"
    done(await api.expose(local, "192.168.65.3:80", None))  # tcp when nothing is said
    answer = await api("GET", "/services/forwarder/all")
    assert answer.body.decode() == f'[{{"local":"{local}","remote":"192.168.65.3:80","protocol":"tcp"}}]\n'
    host, _, port = local.partition(":")
    with socket.create_connection((host, int(port))):
        await until(lambda: bool(api.house.guests.dialled))
        assert api.house.guests.dialled[0][0] == "192.168.65.3:80"
    assert [forward.owner for forward in api.house.registry] == [GVPROXY]
    done(await api.unexpose(local, None))
    assert await api.all() == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    failed(await api.unexpose(local), 500, "proxy not found")


async def test_the_list_is_sorted_by_local_and_then_protocol(api: Api) -> None:
    first = free_port(2)
    second = first + 1
    for local, protocol in ((second, "tcp"), (first, "udp"), (first, "tcp")):
        done(await api.expose(f"127.0.0.1:{local}", "192.168.65.3:80", protocol))
    listed = [(one["local"], one["protocol"]) for one in await api.all()]
    assert listed == [(f"127.0.0.1:{first}", "tcp"), (f"127.0.0.1:{first}", "udp"), (f"127.0.0.1:{second}", "tcp")]
    failed(await api.unexpose(f"127.0.0.1:{second}", "udp"), 500, "proxy not found")
    done(await api.unexpose(f"127.0.0.1:{first}", "udp"))
    assert len(await api.all()) == 2


async def test_local_is_a_name_to_the_letter(api: Api) -> None:
    port = free_port(2)
    done(await api.expose(f":{port}", "192.168.65.3:80"))
    assert [one["local"] for one in await api.all()] == [f":{port}"]
    assert next(iter(api.house.registry)).spec.bind == "0.0.0.0"
    failed(await api.expose(f":{port}", "192.168.65.3:81"), 500, f"proxy already running for tcp on :{port}")
    taken = f"listen tcp 0.0.0.0:{port}: bind: address already in use"
    failed(await api.expose(f"0.0.0.0:{port}", "192.168.65.3:80"), 500, taken)
    failed(await api.unexpose(f"0.0.0.0:{port}"), 500, "proxy not found")
    done(await api.expose(f"localhost:{port + 1}", "192.168.65.3:80"))
    assert [one["local"] for one in await api.all()] == [f":{port}", f"localhost:{port + 1}"]
    done(await api.unexpose(f":{port}"))
    done(await api.expose(f"0.0.0.0:{port}", "192.168.65.3:80"))


async def test_the_words_of_the_operating_system(api: Api) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        local = f"127.0.0.1:{other.getsockname()[1]}"
        taken = f"listen tcp {local}: bind: address already in use"
        failed(await api.expose(local, "192.168.65.3:80"), 500, taken)
    foreign = "listen udp 192.0.2.1:5353: bind: cannot assign requested address"
    failed(await api.expose("192.0.2.1:5353", "192.168.65.3:80", "udp"), 500, foreign)


@pytest.mark.parametrize(
    ("local", "remote", "protocol", "status", "words"),
    [
        (":1", "192.168.65.3:80", "sctp", 500, "unknown protocol sctp"),
        (":1", "192.168.65.3:80", "TCP", 500, "unknown protocol TCP"),
        (":1", "\\\\.\\pipe\\x", "npipe", 500, "npipe: named pipes are for Windows; use the protocol unix and a path"),
        (":8080", "192.168.65.3", "tcp", 400, "remote: address 192.168.65.3: missing port in address"),
        (":8080", "", "tcp", 400, "remote: address : missing port in address"),
        (":8080", "[fd00::1]:80", "tcp", 400, "remote: '[fd00::1]:80': 'fd00::1' is no IPv4 address"),
        (":8080", "fd00::1:80", "tcp", 400, "remote: address fd00::1:80: too many colons in address"),
        (":8080", "guest:80", "tcp", 400, "remote: 'guest:80': 'guest' is no IPv4 address"),
        (
            ":8080",
            ":80",
            "tcp",
            400,
            "remote: :80 means the caller's own address, and you are no guest; write ADDRESS:PORT",
        ),
        ("8080", "192.168.65.3:80", "tcp", 400, "local: address 8080: missing port in address"),
        ("host.example:8080", "192.168.65.3:80", "tcp", 400, "local: 'host.example' is no IP address of this host"),
        (
            ":http",
            "192.168.65.3:80",
            "udp",
            400,
            "local: address :http: invalid port, it must be a number from 0 to 65535",
        ),
        ("/tmp/x.sock", "192.168.65.3:80", "unix", 400, "remote '192.168.65.3:80': write tcp://ADDRESS:PORT"),
        (
            "/tmp/x.sock",
            "udp://192.168.65.3:80",
            "unix",
            400,
            "remote 'udp://192.168.65.3:80': write tcp://ADDRESS:PORT",
        ),
        (
            "/tmp/x.sock",
            "tcp://[::1:80",
            "unix",
            400,
            "remote 'tcp://[::1:80': Invalid IPv6 URL; write tcp://ADDRESS:PORT",
        ),
    ],
)
async def test_what_cannot_be_exposed(
    api: Api, local: str, remote: str, protocol: str, status: int, words: str
) -> None:
    failed(await api.expose(local, remote, protocol), status, words)
    assert await api.all() == []


async def test_an_ssh_tunnel_without_its_key_is_not_exposed(api: Api, tmp_path: Path) -> None:
    remote = f"ssh-tunnel://core@192.168.65.3/run/p.sock?key={tmp_path}/none"
    answer = await api.expose(str(tmp_path / "p.sock"), remote, "unix")
    words = f"ssh-tunnel: key {tmp_path}/none: No such file or directory; name a private key that this user may read"
    failed(answer, 500, words)
    assert await api.all() == []


async def test_a_path_of_the_host_leads_to_a_port_of_the_guest(api: Api, tmp_path: Path) -> None:
    path = str(tmp_path / "guest.sock")
    remote = "tcp://192.168.65.3:2375"
    done(await api.expose(path, remote, "unix"))
    assert await api.all() == [{"local": path, "remote": remote, "protocol": "unix"}]
    failed(await api.expose(path, remote, "unix"), 500, f"proxy already running for unix on {path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        await until(lambda: bool(api.house.guests.dialled))
        assert api.house.guests.dialled[0][0] == "192.168.65.3:2375"
    done(await api.unexpose(path, "unix"))
    assert await api.all() == []


async def test_a_stale_socket_is_replaced_and_a_file_is_not(api: Api, tmp_path: Path) -> None:
    stale, file = tmp_path / "stale.sock", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    done(await api.expose(str(stale), "tcp://192.168.65.3:80", "unix"))
    file.write_text("precious")
    answer = await api.expose(str(file), "tcp://192.168.65.3:80", "unix")
    assert answer.status == 500 and answer.body.startswith(f"listen unix {file}: bind: ".encode())
    assert file.read_text() == "precious"


async def test_only_posts_change_anything(api: Api) -> None:
    for target in ("forwarder/expose", "forwarder/unexpose", "dns/add"):
        for method in ("GET", "PUT", "DELETE"):
            failed(await api(method, f"/services/{target}", {"local": ":1"}), 400, "post only")
    for target in ("/services/forwarder/all", "/services/dns/all", "/cam", "/stats", "/leases"):
        assert (await api("POST", target)).status == 200  # any method, as there


@pytest.mark.parametrize("target", ["forwarder/expose", "forwarder/unexpose", "dns/add"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"\xff", b'{"local":7,"Name":7}', b"[" * 50000])
async def test_bad_json_is_400_in_a_line(api: Api, target: str, body: bytes) -> None:
    answer = await api("POST", f"/services/{target}", body)
    assert answer.status == 400 and answer.body.count(b"\n") == 1 and len(answer.body) > 10
    assert answer.headers["content-type"] == PLAIN
    assert (await api.all(), api.zones.documents()) == ([], [])


async def test_an_oversized_body_is_refused(api: Api) -> None:
    for target in ("forwarder/expose", "dns/add"):
        answer = await api("POST", f"/services/{target}", b" " * (MAX_BODY + 1))
        failed(answer, 413, f"the body is longer than {MAX_BODY} octets")
    assert await api.all() == []


@pytest.mark.parametrize("target", ["/services/", "/services/none", "/services/forwarder/expose/x", "/extension/x"])
async def test_an_unknown_path(api: Api, target: str) -> None:
    failed(await api("GET", target), 404, "404 page not found")


async def test_forwards_of_others_are_seen_and_those_of_the_settings_stay(api: Api) -> None:
    port = free_port(3)
    registry = api.house.registry
    registry.add(PublishSpec.parse(f"127.0.0.1:{port}:192.168.65.3:80"))
    registry.add(PublishSpec.parse(f"udp:[::1]:{port}:81"), HAND)
    registry.add(PublishSpec.parse(f"127.0.0.1:{port + 1}-{port + 2}:90-91"), HAND)
    listed = {(one["local"], one["remote"], one["protocol"]) for one in await api.all()}
    assert listed == {
        (f"127.0.0.1:{port}", "192.168.65.3:80", "tcp"),
        (f"[::1]:{port}", ":81", "udp"),
        (f"127.0.0.1:{port + 1}", ":90", "tcp"),
        (f"127.0.0.1:{port + 2}", ":91", "tcp"),
    }
    running = f"proxy already running for tcp on 127.0.0.1:{port}"
    failed(await api.expose(f"127.0.0.1:{port}", "192.168.65.3:80"), 500, running)
    refused = await api.unexpose(f"127.0.0.1:{port}")
    assert refused.status == 500 and b"settings" in refused.body
    refused = await api.unexpose(f"127.0.0.1:{port + 2}")
    assert refused.status == 500 and b"as a whole" in refused.body
    done(await api.unexpose(f"[::1]:{port}", "udp"))
    assert len(registry) == 3


async def test_what_another_door_removed_is_not_remembered(api: Api) -> None:
    local = f"127.0.0.1:{free_port()}"
    for _ in range(3):
        done(await api.expose(local, "192.168.65.3:80"))
        api.house.registry.release(GVPROXY)
        assert await api.all() == []


async def test_leases_cam_and_stats(api: Api) -> None:
    api.leases |= {"192.168.65.3": "5a:94:ef:e4:0c:ee", "192.168.65.1": "5a:94:ef:e4:0c:dd"}
    for target in ("/services/dhcp/leases", "/leases"):
        answer = await api("GET", target)
        assert answer.body == b'{"192.168.65.1":"5a:94:ef:e4:0c:dd","192.168.65.3":"5a:94:ef:e4:0c:ee"}\n'
        assert answer.headers["content-type"] == PLAIN
    assert (await api("GET", "/cam")).body == b'{"02:00:00:00:00:01":2,"5a:94:ef:e4:0c:ee":1}\n'
    assert (await api("GET", "/stats")).json == {"BytesSent": 1, "BytesReceived": 2, "TCP": {"Retransmits": 0}}


async def test_zones_are_added_and_listed(api: Api) -> None:
    assert (await api("GET", "/services/dns/all")).body == b"[]\n"
    zone = {
        "Name": "crc.testing.",
        "Records": [{"Name": "host", "IP": "192.168.127.254"}],
        "DefaultIP": "192.168.127.2",
    }
    done(await api("POST", "/services/dns/add", zone))
    answer = await api("GET", "/services/dns/all")
    assert answer.body.decode() == json.dumps([zone], separators=(",", ":")) + "\n"
    assert answer.headers["content-type"] == PLAIN
    lower = {"name": "crc.testing.", "records": [{"name": "host", "ip": "192.168.127.3", "regexp": None}]}
    done(await api("POST", "/services/dns/add", lower))
    (listed,) = (await api("GET", "/services/dns/all")).json
    assert (listed["Records"], listed["DefaultIP"]) == ([{"Name": "host", "IP": "192.168.127.3"}], "")


@pytest.mark.parametrize(
    "zone",
    [
        {"Name": "a..b"},
        {"Name": "z.", "Records": [{"Name": "a", "IP": "x"}]},
        {"Name": "z.", "Records": [{"Name": "a"}]},
        {"Name": "z.", "Records": [{"Regexp": "(", "IP": "10.0.0.1"}]},
        {"Name": "z.", "Records": [{"Regexp": "x" * 300, "IP": "10.0.0.1"}]},
        {"Name": "z.", "DefaultIP": "10.0.0"},
    ],
)
async def test_a_zone_that_cannot_be(api: Api, zone: Any) -> None:
    answer = await api("POST", "/services/dns/add", zone)
    assert answer.status == 400 and answer.body.endswith(b"\n") and len(answer.body) > 15
    assert api.zones.documents() == []


async def test_a_bug_costs_one_request(api: Api) -> None:
    api.leases = None  # type: ignore[assignment]
    failed(await api("GET", "/leases"), 500, "internal server error")
    assert await api.all() == []


async def test_with_curl(api: Api) -> None:
    """As the README of gvproxy shows it."""
    assert shutil.which("curl") is not None, "not installed: curl (packages.txt, `make packages`)"
    base = ["curl", "-sS", "--max-time", "20", "--unix-socket", str(api.path)]

    async def curl(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(*base, *words, stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0].decode()

    local = f"127.0.0.1:{free_port()}"
    body = json.dumps({"local": local, "remote": "192.168.65.3:80"})
    assert await curl("http:/unix/services/forwarder/expose", "-X", "POST", "-d", body) == ""
    assert json.loads(await curl("http:/unix/services/forwarder/all"))[0]["local"] == local
    again = await curl("http:/unix/services/forwarder/expose", "-X", "POST", "-d", body)
    assert again == f"proxy already running for tcp on {local}\n"


# Lima's extension, on a whole network.


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def answering(guest: GvForwarder, port: int, refusals: int = 0) -> Any:
    """The guest refuses `port` so often, then accepts once; whether the other end closed with nothing said."""

    def run() -> str:
        left = refusals
        for packet in guest.packets(packets.TCP, limit_s=60.0):
            segment = packets.read_tcp(packet)
            if segment.dport != port or not segment.flags & packets.SYN or not left:
                break
            left -= 1
            back = packets.tcp(
                guest.address, segment.source, port, segment.sport, 0, segment.end, packets.RST | packets.ACK
            )
            guest.send_ip(segment.source, packets.TCP, back)
        connection = guest.listen(port)  # its SYN comes again, or is the next attempt's
        return connection.ended_by()

    return asyncio.to_thread(run)


async def test_wait_port_returns_when_the_guest_accepts(net: World) -> None:
    guest = await net.gvforwarder()
    accepting = asyncio.create_task(answering(guest, 22, refusals=2))
    answer = await call(net.path, "GET", "/extension/wait_port?ip=192.168.65.3&port=22&timeout=60")
    done(answer)
    assert await accepting in ("FIN", "RST")


async def test_wait_port_gives_up_in_time(net: World) -> None:
    await net.gvforwarder()
    answer = await call(net.path, "GET", "/extension/wait_port?ip=192.168.65.9&port=22&timeout=1")
    failed(answer, 408, "192.168.65.9:22 did not accept a connection within 1 s")
    await until(lambda: not net.stack.flows())


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("port=22", "ip is mandatory"),
        ("ip=192.168.65.3", "port is mandatory"),
        ("ip=x&port=22", "ip: 'x' is no IPv4 address"),
        ("ip=192.168.65.3&port=0", "port: '0' is no whole number from 1 to 65535"),
        ("ip=192.168.65.3&port=22&timeout=1h", "timeout: '1h' is no whole number from 0 to 600"),
    ],
)
async def test_wait_port_with_bad_arguments(api: Api, query: str, words: str) -> None:
    failed(await api("GET", f"/extension/wait_port?{query}"), 400, words)


async def test_so_many_wait_for_ports_and_who_leaves_makes_room(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.gvproxy_api, "MAX_WAITS", 2)
    target = "/extension/wait_port?ip=192.168.65.3&port=22&timeout=600"
    clients = []
    for _ in range(2):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(api.path))
        client.send(request("GET", target))
        clients.append(client)
    await until(lambda: len(api.house.guests.dialled) >= 2)
    failed(await api("GET", target), 503, "2 ports are waited for already")
    clients[0].close()
    async with asyncio.timeout(LIMIT_S):
        while (await api("GET", target.replace("600", "0"))).status != 408:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    clients[1].close()
