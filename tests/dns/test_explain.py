"""What people are told: why a name leads where it does, the last queries, counters per resolver; `/v1/dns` and `pyvpnkit dns`."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiohttp import web

from dns import codec, explain
from dns.codec import wire_name
from dns.log import MAX_QUERIES, QTYPES, qtype_name, qtype_of
from dns.rules import Rules, text_name
from dns.server import Server
from dns.servers import Resolvers, Upstream
from dns.servers import Server as Known
from netstack.errors import ConfigError, Malformed
from pyvpnkit.api import dns as api
from pyvpnkit.api import schema
from pyvpnkit.api.errors import ApiError
from pyvpnkit.api.routing import Answer, Call
from pyvpnkit.commands import client
from pyvpnkit.commands import dns as command
from tests.dns.support import GUEST, a_reply, ask, ask_now, code_reply, free_port, query, upstream

CLOSED = Known(Upstream("127.0.0.1", free_port()))


def answer(asked: bytes) -> list[bytes]:
    return [code_reply(asked, codec.NXDOMAIN)] if b"\2no" in asked else [a_reply(asked, "10.0.0.1", "10.0.0.2")]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A closed server first, one that answers, and that one again for a zone and a rule."""
    async with upstream(answer) as resolver:
        at = Upstream.parse(resolver.spec)
        resolvers = Resolvers(servers=(CLOSED, Known(at, order=1), Known(at, (wire_name("corp.example"),))))
        made = Server(
            names={"host.internal": [bytes([192, 168, 65, 2])]},
            hosts_path=None,
            source=lambda: resolvers,
            rules=Rules.parse({"lab.example": [resolver.spec], "ads.example": "refuse"}),
            aaaa="auto",
            ipv6_route=lambda: False,
        )
        yield made
        made.close()


async def test_a_name_of_the_resolvers_is_explained_with_each_server_that_was_asked(server: Server) -> None:
    said = await server.explain("www.example", "a")
    answering = said["servers"][1]["server"]
    assert (said["name"], said["type"], said["source"], said["route"]) == ("www.example", "A", "resolvers", "resolvers")
    assert said["servers"][0] == {"server": str(CLOSED), "order": 0, "offline": False}
    assert [(one["server"], one["result"]) for one in said["tries"]] == [
        (str(CLOSED), "unreachable"),
        (answering, "NOERROR"),
    ]
    assert 0 < said["tries"][1]["took_ms"] <= said["took_ms"]
    assert (said["by"], said["rcode"]) == (answering, "NOERROR")
    assert said["records"] == ["www.example 60 A 10.0.0.1", "www.example 60 A 10.0.0.2"]
    assert said["cache"] is None
    assert await server.explain("www.example") != {}, "an explanation is not remembered as an answer"
    assert server.counters["cache_entries"] == 0


@pytest.mark.parametrize(
    ("name", "qtype", "source", "route", "by", "rcode"),
    [
        ("host.internal", "A", "names", None, "names", "NOERROR"),
        ("www.example", "AAAA", "filter", None, "filter", "NOERROR"),
        ("a.ads.example", "A", "rule", "rule ads.example", "nobody", "REFUSED"),
        ("a.lab.example", "A", "rule", "rule lab.example", "SERVER", "NOERROR"),
        ("a.corp.example", "A", "zone", "zone corp.example", "SERVER", "NOERROR"),
        ("no.corp.example", "A", "zone", "zone corp.example", "SERVER", "NXDOMAIN"),
        ("www.example", "AXFR", "server", None, "server", "REFUSED"),
    ],
)
async def test_the_source_of_an_answer_is_told(
    server: Server, name: str, qtype: str, source: str, route: str | None, by: str, rcode: str
) -> None:
    said = await server.explain(name, qtype)
    assert (said["source"], said["route"], said["rcode"]) == (source, route, rcode)
    assert said["by"] == (said["servers"][0]["server"] if by == "SERVER" else by)


async def test_what_is_remembered_is_told_with_its_age(server: Server) -> None:
    await ask(server, query("www.example"))
    said = await server.explain("WWW.example.")
    assert (said["by"], said["tries"], len(said["records"])) == ("cache", [], 2)
    assert said["cache"]["by"] == said["servers"][1]["server"]
    assert 0 <= said["cache"]["age_s"] < 30 and 30 < said["cache"]["left_s"] <= 60


@pytest.mark.parametrize(
    ("name", "qtype", "words"),
    [
        ("a..b", "A", "no name"),
        ("x" * 64, "A", "no name"),
        ("a.example", "BOGUS", "no type"),
        ("a.b", "TYPE65536", "no type"),
    ],
)
async def test_what_cannot_be_asked_is_refused_in_words(server: Server, name: str, qtype: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        await server.explain(name, qtype)


def test_types_have_names_and_numbers() -> None:
    assert all(qtype_of(qtype_name(number)) == number for number in range(1 << 16))
    assert [qtype_of(text) for text in ("aaaa", "type28", "TYPE", "TYPE-1", "")] == [28, 28, None, None, None]
    assert len(set(QTYPES.values())) == len(QTYPES)


def test_odd_names_are_written_so_that_they_can_be_read() -> None:
    assert text_name(b"\0") == "."
    assert text_name(b"\3a.b\2\\\x1b\1\xff\0") == r"a\046b.\092\027.\255"


@pytest.mark.parametrize(
    "message",
    [
        bytes(12) + b"\xc0\x0c",
        bytes(12) + b"\1a\xc0\x0c",
        bytes(12) + b"\xc0\x0e\0",
        bytes(12) + b"\xc0\x02",
        bytes(12) + b"\x80a",
        bytes(12) + b"\5a",
        bytes(12),
        bytes(12) + (b"\x3f" + b"a" * 63) * 5 + b"\0",
    ],
    ids=["itself", "circle", "forward", "header", "type", "short", "none", "long"],
)
def test_a_name_that_leads_nowhere_is_malformed(message: bytes) -> None:  # dns names (must fail)
    with pytest.raises(Malformed):
        codec.expand(message, 12)


def test_names_behind_pointers_are_read() -> None:  # dns names: root, labels, pointer to pointer to label
    message = bytes(12) + b"\3www\7example\0" + b"\xc0\x0c" + b"\1a\xc0\x19" + b"\xc0\x1b"
    assert codec.expand(message, 12) == b"\3www\7example\0"
    assert codec.expand(message, 24) == b"\0"
    assert codec.expand(message, 25) == b"\3www\7example\0"
    assert codec.expand(message, 27) == b"\1a\3www\7example\0"
    assert codec.expand(message, 31) == b"\1a\3www\7example\0"


def test_records_that_cannot_be_read_end_the_list() -> None:
    message = a_reply(query("a.example"), "10.0.0.1", "10.0.0.2")
    assert explain.records(message) == ["a.example 60 A 10.0.0.1", "a.example 60 A 10.0.0.2"]
    assert explain.records(message[:-1]) == ["a.example 60 A 10.0.0.1"]


# The log


async def test_the_last_queries_are_listed_with_who_answered(server: Server) -> None:
    await ask(server, query("www.example"))
    ask_now(server, query("www.example"))
    ask_now(server, query("Host.internal", "TXT"))
    ask_now(server, bytes(12))
    broken, local, again, first = server.log()
    assert (broken["name"], broken["rcode"]) == ("", "FORMERR")
    assert (local["name"], local["type"], local["by"], local["answers"]) == ("Host.internal", "TXT", "names", 0)
    assert (again["by"], again["answers"], again["guest"]) == ("cache", 2, str(GUEST))
    assert first["by"].startswith("127.0.0.1:") and 0 < first["took_ms"] < 10_000
    assert json.dumps(server.log())


def test_the_log_is_bounded() -> None:
    server = Server(hosts_path=None, resolv_conf=None)
    for n in range(MAX_QUERIES + 44):
        ask_now(server, query(f"n{n}.example"))
    assert [one["name"] for one in server.log()] == [f"n{n}.example" for n in range(MAX_QUERIES + 43, 43, -1)]
    server.close()


async def test_each_resolver_has_counters(server: Server) -> None:
    await ask(server, query("www.example"))
    await ask(server, query("no.corp.example"))
    found = {(one["server"] == str(CLOSED), one["zones"], one["order"]): one for one in server.upstreams()}
    closed, home, zone = found[True, 0, 0], found[False, 0, 1], found[False, 1, 0]
    assert (closed["errors"], closed["answered"]) == (1, 0)
    assert (home["asked"], home["answered"], home["timeouts"], home["failures"]) == (1, 1, 0, 0)
    assert (zone["asked"], zone["answered"], zone["offline"]) == (1, 1, False)


# The API and the command


async def call(server: Server, path: str, **given: Any) -> Any:
    """What the operation at `path` answers, held against its schema."""
    (operation,) = [one for one in api.DnsApi(lambda: server).operations if one.path == path]
    for name, value in given.items():
        schema.check(value, operation.query[name], name)
    said = await operation.handler(Call(cast(web.Request, None), {}, given, None))
    assert isinstance(said, Answer)
    wanted = operation.replies[200].schema
    assert wanted is not None
    schema.check(json.loads(json.dumps(said.value)), wanted)
    return said.value


async def test_the_api_says_the_same(server: Server) -> None:
    for name in ("www.example", "host.internal", "a.ads.example"):
        said = await call(server, "/v1/dns/explain", name=name)
        assert said["name"] == name
    await ask(server, query("www.example"))
    assert (await call(server, "/v1/dns/explain", name="www.example", type="A"))["by"] == "cache"
    await ask(server, query("b.example", "MX"))
    assert [one["name"] for one in (await call(server, "/v1/dns/log"))["queries"]] == ["b.example", "www.example"]
    assert [one["type"] for one in (await call(server, "/v1/dns/log", limit=1))["queries"]] == ["MX"]
    assert len((await call(server, "/v1/dns/upstreams"))["upstreams"]) == 4
    with pytest.raises(ApiError, match="no type") as refused:
        await call(server, "/v1/dns/explain", name="www.example", type="BOGUS")
    assert refused.value.status == 400


async def test_explanations_under_way_are_bounded() -> None:
    async with upstream(lambda asked: []) as mute:
        resolvers = Resolvers(servers=(Known(Upstream.parse(mute.spec)),))
        server = Server(hosts_path=None, source=lambda: resolvers)
        operation = api.DnsApi(lambda: server).operations[0]
        one = Call(cast(web.Request, None), {}, {"name": "a.example"}, None)
        waiting = [asyncio.ensure_future(operation.handler(one)) for _ in range(api.MAX_AT_ONCE)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await operation.handler(one)
        assert refused.value.status == 429
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        server.close()


def run(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], **words: object) -> int:
    """The command with an API that answers `values`."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def get(self: client.Client, target: str, **given: Any) -> Any:
        asked.append((target, given))
        return values[target]

    monkeypatch.setattr(client.Client, "get", get)
    return command.dns(argparse.Namespace(control="/tmp/none.sock", **words))


async def test_the_command_prints_it_for_people(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = await call(server, "/v1/dns/explain", name="a.corp.example")
    assert (
        run(monkeypatch, {"/v1/dns/explain": said}, dns_action="explain", name="a.corp.example", type="A", json=False)
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["name     a.corp.example A", "source   zone corp.example"]
    assert any(line.startswith("asked    127.0.0.1:") and ": NOERROR after " in line for line in lines)
    assert lines[-1] == "         a.corp.example 60 A 10.0.0.2"
    await ask(server, query("evil\x1b.example"))
    assert (
        run(monkeypatch, {"/v1/dns/log": await call(server, "/v1/dns/log")}, dns_action="log", limit=9, json=False) == 0
    )
    out = capsys.readouterr().out
    assert r"evil\027.example" in out and "\x1b" not in out
    known = {"/v1/dns/upstreams": await call(server, "/v1/dns/upstreams")}
    assert run(monkeypatch, known, dns_action="upstreams", json=False) == 0
    assert str(CLOSED) in capsys.readouterr().out
    assert run(monkeypatch, known, dns_action="upstreams", json=True) == 0
    assert json.loads(capsys.readouterr().out) == known["/v1/dns/upstreams"]["upstreams"]
