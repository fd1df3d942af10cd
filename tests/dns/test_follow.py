"""Where the host's resolvers come from, and how soon a change holds (Q03, F11; vpnkit 4.5, 11)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dns import codec, follow, resolved
from dns.askers import askers
from dns.follow import HostResolvers, Mode
from dns.server import Server as DnsServer
from dns.servers import HOST, Resolvers, Server, Upstream
from netstack.errors import ConfigError, HostError
from tests.dns.support import ask, dnsmasq, needs_dnsmasq, parse, query
from tests.dns.test_resolved import DNS_252, DOMAIN_252, played, shell
from tests.dns.test_scutil import FULL_VPN, HOME

SOON_S = 0.02


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what is waited for is in files and threads
            await asyncio.sleep(0.005)


def replace(path: Path, text: str) -> None:
    """As VPN clients write a file: a new one over the old."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)


@contextlib.asynccontextmanager
async def following(mode: str = "auto", **settings: object) -> AsyncIterator[HostResolvers]:
    made = HostResolvers(mode, **({"every_s": SOON_S} | settings))  # type: ignore[arg-type]
    made.start(asyncio.get_running_loop())
    try:
        yield made
    finally:
        made.close()


def addresses(resolvers: Resolvers) -> list[str]:
    return [server.upstream.address for server in resolvers.servers]


# Files


@pytest.mark.parametrize(
    ("mode", "written"), [("resolv.conf", "nameserver {}\n"), ("file", "# VPN\nnameserver {}\nzone corp.example\n")]
)
async def test_a_file_may_come_later_be_replaced_be_wrong_and_go(tmp_path: Path, mode: str, written: str) -> None:
    path = tmp_path / "dns"
    told: list[list[str]] = []
    settings = {"dns_file" if mode == "file" else "resolv_conf": str(path)}
    async with following(mode, changed=lambda found: told.append(addresses(found)), **settings) as source:
        assert source() == Resolvers() and source.origin == mode
        path.write_text(written.format("10.0.0.1"))
        await until(lambda: addresses(source()) == ["10.0.0.1"])
        replace(path, written.format("10.0.0.2"))
        await until(lambda: addresses(source()) == ["10.0.0.2"])
        replace(path, "nameserver nonsense\n")
        await until(lambda: addresses(source()) == [])
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text(written.format("10.0.0.3"))
        link.replace(path)
        await until(lambda: addresses(source()) == ["10.0.0.3"])
        path.unlink()
        await until(lambda: addresses(source()) == [])
    assert told == [["10.0.0.1"], ["10.0.0.2"], [], ["10.0.0.3"], []]


async def test_nothing_is_told_and_the_object_stays_while_the_content_does(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 10.0.0.1\nsearch corp.example\n")
    told: list[Resolvers] = []
    async with following(resolv_conf=str(path), changed=told.append) as source:
        first = source()
        replace(path, path.read_text())
        replace(path, path.read_text() + "# by somebody else\n")
        source.network_changed()
        assert source() is first and told == [first]
        replace(path, "nameserver 10.0.0.1\nsearch lab.example\n")
        source.network_changed()
        assert source.search == ("lab.example",) and [found.search for found in told] == [
            ("corp.example",),
            ("lab.example",),
        ]


async def test_not_started_it_looks_when_it_is_called(tmp_path: Path) -> None:
    path, now = tmp_path / "resolv.conf", [0.0]
    source = HostResolvers(resolv_conf=str(path), clock=lambda: now[0])
    assert source() == Resolvers()
    path.write_text("nameserver 10.0.0.1\n")
    assert source() == Resolvers(), "not looked at again within the second"
    now[0] += 1.0
    assert addresses(source()) == ["10.0.0.1"]
    replace(path, "nameserver 10.0.0.2\n")
    source.network_changed()
    assert addresses(source()) == ["10.0.0.2"]


@pytest.mark.parametrize(
    ("mode", "dns_file", "complaint"),
    [
        ("bind", None, "write one of auto, resolv.conf, resolved, scutil, file, getaddrinfo"),
        ("file", None, "which file"),
    ],
)
def test_what_cannot_be_is_refused_in_words(mode: str, dns_file: str | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        HostResolvers(mode, dns_file=dns_file)


async def test_getaddrinfo_is_asked_for_all_and_resolv_conf_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 10.0.0.1\nsearch corp.example\n")
    async with following("getaddrinfo", resolv_conf=str(path)) as source:
        assert source() == Resolvers(servers=(Server(HOST),), search=("corp.example",))
        assert source.origin is Mode.GETADDRINFO and addresses(source.resolv_conf()) == ["10.0.0.1"]
        server = DnsServer(hosts_path=None, source=source, asker_for=askers(source.resolv_conf))
        answer = parse(await ask(server, query("localhost")))
        assert [str(rr.rdata) for rr in answer.rr] == ["127.0.0.1"]
        server.close()


@needs_dnsmasq
async def test_a_vpn_that_replaces_resolv_conf_is_followed_by_a_guest_within_two_seconds(tmp_path: Path) -> None:  # F11
    path = tmp_path / "resolv.conf"
    async with (
        dnsmasq(tmp_path, "--address=/a.example/192.0.2.1", "--local=/example/") as home,
        dnsmasq(
            tmp_path, "--address=/a.example/192.0.2.1", "--address=/vpn.example/10.8.0.80", "--local=/example/"
        ) as vpn,
        following(resolv_conf=str(path), every_s=follow.EVERY_S) as source,
    ):
        server = DnsServer(hosts_path=None, source=source)

        async def answer(name: str) -> tuple[int, list[str]]:
            found = parse(await ask(server, query(name)))
            return found.header.rcode, [str(rr.rdata) for rr in found.rr]

        async def becomes(name: str, expected: tuple[int, list[str]]) -> float:
            begin = time.monotonic()
            async with asyncio.timeout(30):
                while await answer(name) != expected:  # noqa: ASYNC110  # what is waited for is in files
                    await asyncio.sleep(0.01)
            return time.monotonic() - begin

        assert await answer("a.example") == (codec.SERVFAIL, []), "started without a resolver"
        replace(path, f"nameserver 127.0.0.1:{home}\n")
        assert await becomes("a.example", (codec.NOERROR, ["192.0.2.1"])) < 4
        assert await answer("vpn.example") == (codec.NXDOMAIN, [])
        replace(path, f"nameserver 127.0.0.1:{vpn}\n")
        assert await becomes("vpn.example", (codec.NOERROR, ["10.8.0.80"])) < 4  # 2 s, and a loaded machine
        replace(path, f"nameserver 127.0.0.1:{home}\n")
        assert await becomes("vpn.example", (codec.NXDOMAIN, [])) < 4
        assert await answer("a.example") == (codec.NOERROR, ["192.0.2.1"])
        server.close()


# systemd-resolved

STUB = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n"


async def test_behind_resolveds_stub_its_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = tmp_path / "resolv.conf", tmp_path / "state"
    path.write_text(STUB)
    state.mkdir()
    played(tmp_path, shell({"dns": DNS_252.partition("Link 5")[0], "domain": DOMAIN_252.partition("Link 5")[0]}))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    async with following(resolv_conf=str(path), state=(str(state),)) as source:
        assert addresses(source()) == ["127.0.0.53"], "until resolvectl has answered"
        await until(lambda: source.origin is Mode.RESOLVED)
        assert "10.8.0.1" not in addresses(source())

        played(tmp_path, shell({"dns": DNS_252, "domain": DOMAIN_252}))  # a VPN
        (state / "5").touch()  # resolved keeps it
        await until(lambda: "10.8.0.1" in addresses(source()))
        corp = [one for one in source().servers if one.upstream.address == "10.8.0.1"]
        assert [codec.wire_name("corp.example") in one.zones for one in corp] == [True]
        assert source.search == ("lan", "eng.corp.example")

        path.write_text("nameserver 10.0.0.1\n")  # resolved is used no more
        await until(lambda: addresses(source()) == ["10.0.0.1"])
        assert source.origin is Mode.RESOLV_CONF


async def test_where_no_link_is_for_all_names_the_stub_is(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(STUB)
    said = {"dns": "Global:\nLink 5 (tun0): 10.8.0.1\n", "domain": "Link 5 (tun0): ~corp.example\n"}
    async with following(resolv_conf=str(path), resolvectl=lambda asked: said.get(asked[0], ""), state=()) as source:
        await until(lambda: source.origin is Mode.RESOLVED)
        assert source().servers == (
            Server(Upstream("10.8.0.1"), (codec.wire_name("corp.example"),)),
            *source.resolv_conf().servers,
        )
        first = source()
        source.network_changed()
        assert source() is first


async def test_a_resolvectl_that_fails_leaves_the_stub_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(STUB)
    monkeypatch.setattr(follow, "RETRY_S", SOON_S)
    works = threading.Event()
    runs: list[tuple[str, ...]] = []

    def run(arguments: tuple[str, ...]) -> str:
        runs.append(arguments)
        if not works.is_set():
            raise HostError("resolvectl dns: made up")
        return {"dns": DNS_252, "domain": DOMAIN_252}.get(arguments[0], "")

    async with following(resolv_conf=str(path), resolvectl=run, state=()) as source:
        await until(lambda: len(runs) > 6)
        assert addresses(source()) == ["127.0.0.53"] and source.origin is Mode.RESOLV_CONF
        assert caplog.text.count("made up") == 1, "told once"
        works.set()
        await until(lambda: source.origin is Mode.RESOLVED)


async def test_resolved_is_not_asked_while_nothing_changes_and_nobody_waits_for_it(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(STUB)
    go_on, runs = threading.Event(), []

    def run(arguments: tuple[str, ...]) -> str:
        runs.append(arguments)
        assert go_on.wait(30)
        return {"dns": DNS_252, "domain": DOMAIN_252}.get(arguments[0], "")

    async with following("resolved", resolv_conf=str(path), resolvectl=run, state=(str(tmp_path),)) as source:
        await until(lambda: len(runs) == 1)
        for _ in range(20):  # the loop goes on, and does not start a second
            await asyncio.sleep(SOON_S)
            assert addresses(source()) == ["127.0.0.53"] and len(runs) == 1
        go_on.set()
        await until(lambda: source.origin is Mode.RESOLVED)
        once = len(runs)
        await asyncio.sleep(10 * SOON_S)
        assert len(runs) == once
        source.network_changed()
        await until(lambda: len(runs) == 2 * once)


async def test_closing_does_not_wait_for_a_program(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(STUB)
    go_on, began = threading.Event(), threading.Event()
    told: list[Resolvers] = []

    def run(arguments: tuple[str, ...]) -> str:
        began.set()
        assert go_on.wait(30)
        return {"dns": DNS_252, "domain": DOMAIN_252}.get(arguments[0], "")

    async with following(resolv_conf=str(path), resolvectl=run, state=(), changed=told.append) as source:
        await until(began.is_set)
    go_on.set()
    await asyncio.sleep(10 * SOON_S)
    assert [addresses(one) for one in told] == [["127.0.0.53"]] and addresses(source()) == ["127.0.0.53"]


# macOS


async def test_on_macos_scutil_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.168.1.1\n")
    said = [HOME]
    fails = threading.Event()

    def run() -> str:
        if fails.is_set():
            raise HostError("scutil --dns: made up")
        return said[0]

    async with following(platform="darwin", resolv_conf=str(path), run_scutil=run) as source:
        await until(lambda: source.origin is Mode.SCUTIL)
        assert addresses(source()) == ["192.168.1.1", "2001:db8:1::1"]
        said[0] = FULL_VPN
        await until(lambda: addresses(source()) == ["10.8.0.1", "10.8.0.2", "192.168.1.1"])
        fails.set()
        await until(lambda: source.origin is Mode.RESOLV_CONF)
        assert source() == Resolvers(servers=source.resolv_conf().servers)
        assert source().servers[0].upstream == Upstream("192.168.1.1")


def test_a_file_given_comes_before_all_on_any_platform(tmp_path: Path) -> None:
    path = tmp_path / "dns"
    path.write_text("nameserver 10.0.0.9\n")
    for platform in ("darwin", "linux"):
        source = HostResolvers(dns_file=str(path), platform=platform)
        assert addresses(source()) == ["10.0.0.9"] and source.origin is Mode.FILE


def test_on_linux_the_state_of_resolved_is_where_it_is_kept() -> None:
    assert resolved.STATE[:2] == ("/run/systemd/resolve", "/run/systemd/resolve/netif")
