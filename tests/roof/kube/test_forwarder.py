"""The forwarder between an API server and a host's control API, both over real sockets (spec vpnkit 7.2, 7.8).

Kubernetes' own client talks to the API server, and the ports are those of a real registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from portfwd.invm.ports import Port
from portfwd.invm.transport import Address
from portfwd.owners import HAND
from portfwd.spec import PublishSpec
from portfwd.vpnkit_api import routes
from pyvpnkit.kube.cluster import Cluster, ClusterError, connect
from pyvpnkit.kube.engine import ANNOTATION, Engine
from pyvpnkit.kube.forwarder import Backoff, ControlHost, Forwarder
from tests.roof.kube.fake_api import FakeApi, api_server, service
from tests.support.http_house import House, free_port, house, serving, until

pytest.importorskip("kubernetes", reason="kube-forwarder needs the extra kube")

LOOPBACK = "127.0.0.1"


def quick() -> Backoff:
    return Backoff(random.Random(1), first_s=0.01, last_s=0.05)


@dataclass
class World:
    """A cluster, a host, and what is wanted of them."""

    api: FakeApi
    house: House
    control: Path
    kubeconfig: Path
    running: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, *, namespace: str = "", resync_s: float = 30.0, control: Path | None = None) -> asyncio.Task[None]:
        cluster = Cluster(connect(str(self.kubeconfig)), namespace=namespace, component=ANNOTATION)
        host = ControlHost(Address("unix", path=str(control or self.control)))
        forwarder = Forwarder(cluster, host, Engine(bind=LOOPBACK), resync_s=resync_s, backoff=quick)
        self.running.append(asyncio.create_task(forwarder.run()))
        return self.running[-1]

    async def stop(self, running: asyncio.Task[None]) -> None:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    @property
    def published(self) -> list[str]:
        return sorted(str(forward.spec) for forward in self.house.registry)

    async def shows(self, *specs: str) -> None:
        wanted = sorted(specs)
        try:
            await until(lambda: self.published == wanted)
        except TimeoutError:
            assert self.published == wanted

    @contextlib.asynccontextmanager
    async def host(self, path: Path) -> AsyncIterator[None]:
        async with serving(path, routes(self.house.registry, via=lambda _: "stack", dump=lambda: None)):
            yield


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with api_server() as api, house(allowed=(LOOPBACK,)) as made:
        path = tmp_path / "kubeconfig"
        path.write_text(api.kubeconfig)
        found = World(api, made, tmp_path / "control.sock", path)
        async with found.host(found.control):
            yield found
            for running in found.running:
                running.cancel()
            await asyncio.gather(*found.running, return_exceptions=True)


def spec(number: int, *, ip: str = "10.96.0.1", to: int = 80, proto: str = "tcp") -> str:
    """As the registry writes it."""
    return str(
        PublishSpec(
            protocol=proto, bind=LOOPBACK, port=number, guest=ip, guest_port=to, via="stack", annotation=ANNOTATION
        )
    )


async def test_a_load_balancer_is_published_and_told_so(world: World) -> None:
    number = free_port()
    await world.api.put(service("web", web={"port": number}))
    world.start()
    await world.shows(spec(number, to=number))
    await until(lambda: world.api.ingress("default/web") == [{"hostname": "localhost"}])
    _, writer = await asyncio.open_connection(LOOPBACK, number)
    await until(lambda: [where for where, _ in world.house.guests.dialled] == [f"10.96.0.1:{number}"])
    writer.close()
    await writer.wait_closed()
    assert world.api.tokens == {"Bearer secret"}
    assert world.api.patches == ["default/web"]


async def test_node_ports_of_tcp_and_udp_are_published_and_the_status_is_left_alone(world: World) -> None:
    number = free_port(2)
    world.start()
    await until(lambda: world.api.watching == 1)
    both = {"port": 53, "nodePort": number}
    await world.api.put(
        service("dns", "NodePort", a=both, b={**both, "protocol": "UDP"}, c={"port": 80, "nodePort": number + 1})
    )
    await world.api.put(service("inner", "ClusterIP", a={"port": number + 1}))
    await world.shows(spec(number, to=53), spec(number, to=53, proto="udp"), spec(number + 1))
    assert world.api.patches == []


async def test_an_update_closes_and_opens_and_a_delete_closes(world: World) -> None:
    first, second, third = (free_port(3) + offset for offset in range(3))
    await world.api.put(service("web", a={"port": first}, b={"port": second}))
    world.start()
    await world.shows(spec(first, to=first), spec(second, to=second))
    await world.api.put(service("web", a={"port": second}, b={"port": third}))
    await world.shows(spec(second, to=second), spec(third, to=third))
    await world.api.put(service("web", ip="10.96.0.7", a={"port": second}))
    await world.shows(spec(second, to=second, ip="10.96.0.7"))
    await world.api.put(service("web", "ClusterIP", a={"port": second}))
    await world.shows()
    await world.api.put(service("web", a={"port": second}))
    await world.shows(spec(second, to=second))
    await world.api.drop("default/web")
    await world.shows()


async def test_the_end_closes_our_ports_and_no_others(world: World) -> None:
    number = free_port(2)
    hand = PublishSpec.parse(f"tcp:{LOOPBACK}:{number + 1}:80")
    world.house.registry.add(hand, HAND)
    await world.api.put(service("web", a={"port": number}))
    running = world.start()
    await world.shows(spec(number, to=number), str(hand))
    await world.stop(running)
    assert world.published == [str(hand)]


async def test_ports_of_a_run_that_was_killed_are_put_right_by_the_next(world: World) -> None:
    number = free_port(2)
    host = ControlHost(Address("unix", path=str(world.control)))
    stale = Port(
        proto="tcp", out_ip=LOOPBACK, out_port=number + 1, in_ip="10.96.0.9", in_port=80, annotation=ANNOTATION
    )
    await host.expose(stale)
    await world.api.put(service("web", a={"port": number}))
    world.start()
    await world.shows(spec(number, to=number))


async def test_a_port_that_is_taken_is_an_event_and_a_line_with_the_services_name(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyvpnkit.kube")
    number = free_port(2)
    hand = world.house.registry.add(PublishSpec.parse(f"tcp:{LOOPBACK}:{number}:80"), HAND)
    await world.api.put(service("web", a={"port": number}, b={"port": number + 1}))
    world.start(resync_s=0.2)
    await until(lambda: len(world.api.events) == 1)
    (event,) = world.api.events
    assert (event["type"], event["reason"]) == ("Warning", "PortTaken")
    assert event["involvedObject"]["uid"] == "uid-web"
    assert event["metadata"]["generateName"] == "web."
    assert event["message"].startswith(
        f"tcp port {number} of the host is taken by `tcp forward from 127.0.0.1:{number} to "
    )
    assert any(f"Service default/web: tcp port {number} of the host is taken" in line for line in caplog.messages)
    # Once it is free, the next resync takes it, without another event.
    world.house.registry.remove(hand)
    await world.shows(spec(number, to=number), spec(number + 1, to=number + 1))
    assert len(world.api.events) == 1


async def test_what_the_host_refuses_is_an_event_and_is_tried_again(world: World) -> None:
    number = free_port()
    with socket.socket() as taken:
        taken.bind((LOOPBACK, number))
        taken.listen()
        await world.api.put(service("web", a={"port": number}))
        world.start(resync_s=0.2)
        await until(lambda: len(world.api.events) == 1)
        assert world.api.events[0]["reason"] == "PortRefused"
        assert world.api.events[0]["message"] == (
            f"the host refused tcp port {number}: listen tcp 127.0.0.1:{number}: bind: address already in use"
        )
        assert world.api.ingress("default/web") is None
    await world.shows(spec(number, to=number))
    assert len(world.api.events) == 1


async def test_a_namespace_alone_is_published(world: World) -> None:
    number = free_port(2)
    await world.api.put(service("mine", namespace="web", a={"port": number}))
    await world.api.put(service("other", a={"port": number + 1}))
    world.start(namespace="web")
    await until(lambda: world.api.watching == 1)
    await world.shows(spec(number, to=number))


async def test_a_list_comes_in_pages(world: World) -> None:
    number = free_port(5)
    world.api.page = 2
    for offset in range(5):
        await world.api.put(service(f"s{offset}", a={"port": number + offset}))
    world.start()
    await world.shows(*(spec(number + offset, to=number + offset) for offset in range(5)))
    assert [one.get("continue") for one in world.api.lists] == [None, "2", "4"]


@pytest.mark.parametrize("how", ["in the stream", "as the answer"])
async def test_after_410_gone_all_is_listed_anew(world: World, how: str) -> None:
    number = free_port(2)
    await world.api.put(service("old", a={"port": number}))
    world.start()
    await world.shows(spec(number, to=number))
    # What happens while nobody watches is never told: only a new list has it.
    world.api.refuse["watch"] = 503
    world.api.cut()
    await until(lambda: world.api.watching == 0)
    lists = len(world.api.lists)
    del world.api.services["default/old"]
    await world.api.put(service("new", a={"port": number + 1}))
    world.api._history.clear()
    world.api.compact()
    if how == "in the stream":
        del world.api.refuse["watch"]
    else:
        world.api.refuse["watch"] = 410
        await until(lambda: len(world.api.lists) > lists + 1)
        del world.api.refuse["watch"]
    await world.shows(spec(number + 1, to=number + 1))
    assert len(world.api.lists) > lists


async def test_a_watch_that_breaks_off_is_taken_up_again(world: World) -> None:
    number = free_port(2)
    world.start()
    await until(lambda: world.api.watching == 1)
    await world.api.put(service("a", a={"port": number}))
    await world.shows(spec(number, to=number))
    world.api.cut()
    await world.api.put(service("b", a={"port": number + 1}))
    await world.shows(spec(number, to=number), spec(number + 1, to=number + 1))


async def test_ports_stay_while_the_api_server_is_away(world: World, caplog: pytest.LogCaptureFixture) -> None:
    number = free_port()
    await world.api.put(service("web", a={"port": number}))
    world.start()
    await world.shows(spec(number, to=number))
    world.api.refuse.update(list=503, watch=503)
    world.api.cut()
    await until(lambda: len([line for line in caplog.messages if "answered 503: is broken; trying again" in line]) >= 3)
    assert world.published == [spec(number, to=number)]
    world.api.refuse.clear()
    await world.api.drop("default/web")
    await world.shows()


async def test_a_host_that_comes_later_is_waited_for(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = free_port()
    later = tmp_path / "later.sock"
    await world.api.put(service("web", a={"port": number}))
    running = world.start(control=later)
    await until(lambda: any("cannot reach the control server" in line for line in caplog.messages))
    async with world.host(later):
        await world.shows(spec(number, to=number))
        await world.stop(running)
    assert world.published == []


async def test_a_host_that_lost_its_ports_has_them_again_after_the_resync(world: World) -> None:
    number = free_port()
    await world.api.put(service("web", a={"port": number}))
    world.start(resync_s=0.2)
    await world.shows(spec(number, to=number))
    (forward,) = world.house.registry
    world.house.registry.remove(forward)
    await world.shows(spec(number, to=number))


async def test_without_rights_the_ports_are_published_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyvpnkit.kube")
    number = free_port(2)
    world.house.registry.add(PublishSpec.parse(f"tcp:{LOOPBACK}:{number + 1}:80"), HAND)
    world.api.refuse.update(status=403, events=403)
    await world.api.put(service("web", a={"port": number}, b={"port": number + 1}))
    world.start(resync_s=0.1)
    await until(lambda: any("its status was not set" in line for line in caplog.messages))
    world.api.refuse.clear()
    await until(lambda: world.api.ingress("default/web") == [{"hostname": "localhost"}])
    assert len([line for line in caplog.messages if "its status was not set" in line]) == 1
    assert len([line for line in caplog.messages if "no events are written" in line]) == 1
    assert "create on events" in "".join(caplog.messages)
    assert world.api.events == []


async def test_the_end_does_not_wait_for_a_silent_watch(world: World) -> None:
    running = world.start()
    await until(lambda: world.api.watching == 1)
    async with asyncio.timeout(30):
        await world.stop(running)
    # The connection is closed, not just left: the server sees it.
    await until(lambda: world.api.watching == 0)


async def test_a_watch_over_tls_ends_at_once_too(world: World, tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    request = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    names = ("-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1")
    making = await asyncio.create_subprocess_exec(
        "openssl", *request, "-keyout", key, "-out", certificate, *names, stderr=asyncio.subprocess.DEVNULL
    )
    assert await making.wait() == 0
    number = free_port()
    async with api_server(certificate, key) as api:
        world.kubeconfig.write_text(api.kubeconfig)
        running = world.start()
        await until(lambda: api.watching == 1)
        await api.put(service("web", a={"port": number}))
        await world.shows(spec(number, to=number))
        await until(lambda: api.ingress("default/web") is not None)  # so that nothing but the watch goes on
        async with asyncio.timeout(30):
            await world.stop(running)
        await until(lambda: api.watching == 0)


async def test_an_account_without_rights_is_told_what_it_needs(world: World) -> None:
    cluster = Cluster(connect(str(world.kubeconfig)), component="x")
    world.api.refuse["list"] = 403
    with pytest.raises(ClusterError, match="answered 403: services is forbidden; the account needs list and watch"):
        await cluster.list()


async def test_an_api_server_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind((LOOPBACK, 0))
        config = FakeApi(port=nobody.getsockname()[1]).kubeconfig
        (tmp_path / "config").write_text(config)
        cluster = Cluster(connect(str(tmp_path / "config")), component="x")
        with pytest.raises(ClusterError, match=r"cannot be reached: .*Connection refused"):
            await cluster.list()


@pytest.mark.parametrize(
    "octets",
    [b"[]", b"{", b"{}", b'{"metadata": {}, "items": 5}', b"\xff", b"[" * 100_000],
    ids=lambda one: repr(one[:20]),
)
async def test_an_answer_that_is_none_is_an_error_in_words(tmp_path: Path, octets: bytes) -> None:
    async with answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + octets) as number:
        (tmp_path / "config").write_text(FakeApi(port=number).kubeconfig)
        cluster = Cluster(connect(str(tmp_path / "config")), component="x")
        with pytest.raises(ClusterError, match="answered"):
            await cluster.list()
        with contextlib.suppress(ClusterError):
            async with contextlib.aclosing(cluster.watch("1")) as events:
                async for _ in events:
                    pass


@contextlib.asynccontextmanager
async def answering(octets: bytes) -> AsyncIterator[int]:
    """A server that says this to everybody."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(octets)
        writer.close()

    server = await asyncio.start_server(answer, LOOPBACK, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "name a kubeconfig file that can be used"),
        ("{", "is no kubeconfig"),
        ("[]", "is no kubeconfig"),
        ("current-context: x\ncontexts: []\nclusters: []\nusers: []\n", "name a kubeconfig file"),
    ],
)
def test_a_kubeconfig_that_is_none_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        connect(str(path))
    assert str(caught.value).startswith(f"--kubeconfig {path}: ")
    assert complaint in str(caught.value)
    with pytest.raises(ConfigError, match="none"):
        connect(str(tmp_path / "none"))


def test_waits_grow_to_their_limit_and_begin_anew() -> None:
    backoff = Backoff(random.Random(1))
    waits = [backoff.delay() for _ in range(8)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, (1, 2, 4, 8, 16, 30, 30, 30), strict=True))
    backoff.reset()
    assert backoff.delay() <= 1
