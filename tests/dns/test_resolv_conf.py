"""The host's resolvers: what resolv.conf says, now (Q03, F11)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dns import codec, system
from dns.server import Server
from dns.servers import TIMEOUT_S
from dns.system import Upstream
from netstack.errors import ConfigError
from tests.dns.support import a_reply, ask, ask_now, parse, query, upstream


@pytest.mark.parametrize(
    ("text", "sockaddr"),
    [
        ("127.0.0.53", ("127.0.0.53", 53)),
        ("192.0.2.1#5353", ("192.0.2.1", 5353)),
        ("192.0.2.1:5353", ("192.0.2.1", 5353)),
        ("[192.0.2.1]:5353", ("192.0.2.1", 5353)),
        ("::1", ("::1", 53, 0, 0)),
        ("2001:db8::53", ("2001:db8::53", 53, 0, 0)),
        ("[2001:db8::53]:5353", ("2001:db8::53", 5353, 0, 0)),
        ("2001:db8::53#5353", ("2001:db8::53", 5353, 0, 0)),
        ("fe80::1%7", ("fe80::1", 53, 0, 7)),
    ],
)
def test_a_server_is_written_in_any_usual_way(text: str, sockaddr: tuple[object, ...]) -> None:
    server = Upstream.parse(text)
    assert server.sockaddr == sockaddr
    assert Upstream.parse(str(server)) == server


def test_a_link_local_server_has_the_index_of_its_interface() -> None:
    index, name = socket.if_nameindex()[0]
    assert Upstream.parse(f"fe80::1%{name}").scope == index


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one.one.one.one",
        "1.2.3",
        "1.2.3.4#0",
        "1.2.3.4#65536",
        "1.2.3.4:x",
        "fe80::1%no-such-if0",
        "fe80::1%4294967296",
        "::1::2",
    ],
)
def test_what_is_no_server_is_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.53"):
        Server(upstreams=[text])


@pytest.mark.parametrize("path", ["a\0b", "\udcff", "", "/dev"])
def test_a_path_that_cannot_be_one_is_a_file_without_servers(path: str) -> None:
    assert system.watch(path, lambda: 0.0).current().servers == ()


def test_resolv_conf_is_read_as_the_c_library_reads_it() -> None:
    read = system.parse_resolv_conf(
        "# made by somebody\n; nameserver 9.9.9.9\ndomain old.example\nnameserver 192.0.2.1\nnameserver\nnameserver host.example\n"
        "search corp.example. lab.example\nnameserver fe80::1%1 # trailing\n"
        "NAMESERVER 192.0.2.1\nsortlist 10.0.0.0\noptions edns0 timeout:1 attempts:3 ndots:x\n"
    )
    assert [str(server) for server in read.servers] == ["192.0.2.1:53", "[fe80::1%1]:53"]
    assert [server.order for server in read.servers] == [0, 1], "one after the other"
    assert read.search == ("corp.example", "lab.example")
    assert {server.timeout_s for server in read.servers} == {3.0}, "attempts of so many seconds"


@pytest.mark.parametrize("options", ["timeout:30", "timeout: attempts: timeout:99999999999"])
def test_options_cannot_make_a_query_wait_longer(options: str) -> None:
    (server,) = system.parse_resolv_conf(f"nameserver 192.0.2.1\noptions {options}").servers
    assert server.timeout_s == TIMEOUT_S


@given(
    st.text()
    | st.lists(
        st.sampled_from(["nameserver", "options", "search", " ", "\n", "timeout:", "1", "::", "%", "#", "[", "]"])
    ).map("".join)
)
def test_any_text_is_a_resolv_conf(text: str) -> None:
    assert len(system.parse_resolv_conf(text).servers) <= system.MAX_SERVERS


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def nameserver(spec: str) -> str:
    return f"nameserver {spec}\n"


async def test_a_new_resolv_conf_is_followed_within_a_second_and_without_a_restart(tmp_path: Path) -> None:  # F11
    path, clock = tmp_path / "resolv.conf", Clock()
    async with (
        upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as home,
        upstream(lambda asked: [a_reply(asked, "10.0.0.2")]) as vpn,
    ):
        server = Server(hosts_path=None, resolv_conf=str(path), clock=clock)
        (answer,) = ask_now(server, query("a.example"))
        assert parse(answer).header.rcode == codec.SERVFAIL, "no resolver yet: SERVFAIL at once"

        path.write_text(nameserver(home.spec))
        clock.now += 1.0
        assert [str(rr.rdata) for rr in parse(await ask(server, query("a.example"))).rr] == ["10.0.0.1"]

        fresh = tmp_path / "resolv.conf.new"  # as VPN clients write it
        fresh.write_text(nameserver(vpn.spec))
        fresh.replace(path)
        clock.now += 0.5
        assert [str(rr.rdata) for rr in parse(await ask(server, query("a.example"))).rr] == ["10.0.0.1"]
        clock.now += 0.5
        assert [str(rr.rdata) for rr in parse(await ask(server, query("a.example"))).rr] == ["10.0.0.2"]

        link = tmp_path / "link"  # as systemd-resolved switches between its files
        link.symlink_to(tmp_path / "other")
        (tmp_path / "other").write_text(nameserver(home.spec))
        link.replace(path)
        server.network_changed()
        assert [str(rr.rdata) for rr in parse(await ask(server, query("a.example"))).rr] == ["10.0.0.1"]

        path.unlink()
        clock.now += 1.0
        (answer,) = ask_now(server, query("a.example"))
        assert parse(answer).header.rcode == codec.SERVFAIL
        server.close()


async def test_a_query_on_its_way_fails_over_to_the_resolvers_of_the_vpn(tmp_path: Path) -> None:  # F11
    path = tmp_path / "resolv.conf"

    def vpn_comes_up(asked: bytes) -> list[bytes]:
        path.write_text(nameserver(vpn.spec))
        server.network_changed()
        return []  # and this resolver is cut off

    async with upstream(vpn_comes_up) as home, upstream(lambda asked: [a_reply(asked, "10.0.0.2")]) as vpn:
        path.write_text(nameserver(home.spec) + "options timeout:1\n")
        server = Server(hosts_path=None, resolv_conf=str(path))
        assert [str(rr.rdata) for rr in parse(await ask(server, query("a.example"))).rr] == ["10.0.0.2"]
        assert len(home.asked) == 1
        server.close()


async def test_configured_servers_are_asked_instead_of_the_hosts(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.1")]) as chosen, upstream(lambda asked: []) as hosts:
        path.write_text(nameserver(hosts.spec))
        server = Server(hosts_path=None, resolv_conf=str(path), upstreams=[chosen.spec])
        assert [str(rr.rdata) for rr in parse(await ask(server, query("a.example"))).rr] == ["10.0.0.1"]
        assert hosts.asked == []
        assert [f"127.0.0.1#{known.upstream.port}" for known in server.resolvers.servers] == [chosen.spec]
        server.close()
