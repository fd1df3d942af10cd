"""Who tells the HTTP proxy what, and when it holds: the file, the API, the settings, the environment."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from netstack.errors import ConfigError
from pyvpnkit.proxy.api import routes
from pyvpnkit.proxy.service import HttpProxy
from tests.roof.proxy.house import GATEWAY, House, Make, Servers, echo

OUTSIDE = "203.0.113.80"


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  # what is waited for is the file's watch
            await asyncio.sleep(0.002)


def upstream(one: HttpProxy) -> str:
    """Who carries requests now; `off` where there is no proxy."""
    return "off" if one.config is None else str(one.config.http)


def replace(path: Path, document: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(document if isinstance(document, str) else json.dumps(document))
    os.replace(new, path)


# The file


async def test_a_file_that_comes_later_changes_and_goes(house: House, proxy: Make, tmp_path: Path) -> None:
    path = tmp_path / "http_proxy.json"
    one = proxy(path=str(path))
    assert upstream(one) == "off" and house.handler(GATEWAY, 3128) is None
    replace(path, {"http": "a:1"})
    await until(lambda: upstream(one) == "a:1")
    assert house.handler(GATEWAY, 3128) and house.handler(GATEWAY, 3129) and house.handler(OUTSIDE, 80)
    path.write_text('{"http": "b:2", "transparent_http_ports": [81]}')
    await until(lambda: upstream(one) == "b:2")
    assert house.handler(OUTSIDE, 80) is None and house.handler(OUTSIDE, 81)
    path.unlink()
    await until(lambda: upstream(one) == "off")
    assert house.handler(GATEWAY, 3128) is None and house.handler(OUTSIDE, 81) is None


async def test_a_file_that_is_no_json_says_nothing_and_one_with_a_mistake_changes_nothing(
    house: House, proxy: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "http_proxy.json"
    path.write_text('{"http": "a:1"}')
    one = proxy(path=str(path))
    assert upstream(one) == "a:1", "holds when `start` returns"
    replace(path, {"http": "http://user:secret@b:x", "allow": 1})
    await until(lambda: bool(one.problem))
    assert upstream(one) == "a:1"
    assert "http: port 'x'" in one.problem and "allow: a list of strings" in one.problem
    replace(path, "{")
    await until(lambda: upstream(one) == "off")
    assert "no JSON" in one.problem
    replace(path, {"http": "c:3"})
    await until(lambda: upstream(one) == "c:3")
    assert one.problem == "" and "secret" not in caplog.text


async def test_a_file_that_cannot_be_read_says_nothing(house: House, proxy: Make, tmp_path: Path) -> None:
    one = proxy(path=str(tmp_path))
    assert upstream(one) == "off" and "cannot be read" in one.problem


async def test_requests_of_a_kept_connection_follow_the_file(
    house: House, proxy: Make, server: Servers, tmp_path: Path
) -> None:
    path = tmp_path / "http_proxy.json"
    first: list[bytes] = []
    second: list[bytes] = []
    path.write_text(json.dumps({"http": f"127.0.0.1:{await server(echo(first))}"}))
    one = proxy(path=str(path))
    guest, explicit = house.connect(80, OUTSIDE), house.connect()
    lines = ["GET http://a.test/ HTTP/1.1", "Host: a.test"]
    assert [(await each.ask(*lines))[0] for each in (guest, explicit)] == [200, 200]
    replace(path, {"http": f"127.0.0.1:{await server(echo(second))}"})
    before = one.config
    await until(lambda: one.config != before)
    assert [(await each.ask(*lines))[0] for each in (guest, explicit)] == [200, 200]
    assert len(first) == len(second) == 2
    path.unlink()
    await until(lambda: one.config is None)
    house.names["a.test"] = ["127.0.0.1"]
    port = await server(echo(first))
    assert (await guest.ask(f"GET http://a.test:{port}/ HTTP/1.1", "Host: a.test"))[0] == 200, "straight, from now on"
    assert (await explicit.ask(*lines))[0] == 503


# Settings and the environment


async def test_the_file_goes_before_the_settings_and_those_before_the_environment(
    house: House, proxy: Make, tmp_path: Path
) -> None:
    path = tmp_path / "http_proxy.json"
    environment = {"http_proxy": "e:1", "https_proxy": "e:2", "no_proxy": "x.test"}
    one = proxy({"http": "s:1", "https": None}, path=str(path), environment=environment)
    assert one.config is not None
    assert (upstream(one), str(one.config.https), one.config.exclude.texts) == ("s:1", "e:2", ["x.test"])
    replace(path, {"http": "f:1"})
    await until(lambda: upstream(one) == "f:1")
    assert one.config.https is None, "the file is a whole document"
    path.unlink()
    await until(lambda: upstream(one) == "s:1")


async def test_settings_that_make_no_sense_are_heard_at_once(house: House) -> None:
    with pytest.raises(ConfigError, match="exclude"):
        HttpProxy(house, house.network, settings={"exclude": "a..b"})
    with pytest.raises(ConfigError, match="environment: http: socks5"):
        HttpProxy(house, house.network, environment={"http_proxy": "socks5://a:1"})


async def test_a_reload_takes_settings_over_and_reads_the_file_again(house: House, proxy: Make, tmp_path: Path) -> None:
    path = tmp_path / "http_proxy.json"
    one = proxy({"http": "a:1"}, path=str(path))
    one.post(b'{"http": "posted:1"}')
    assert upstream(one) == "posted:1"
    one.reload({"http": "b:1"})
    assert upstream(one) == "b:1"
    with pytest.raises(ConfigError):
        one.reload({"http": "b"})
    assert upstream(one) == "b:1"
    path.write_text('{"http": "f:1"}')
    one.reload()
    assert upstream(one) == "f:1"
    path.unlink()
    await until(lambda: upstream(one) == "off")


async def test_the_end_ends_what_there_is(house: House, proxy: Make, server: Servers) -> None:
    one = proxy({"http": f"127.0.0.1:{await server(echo([]))}"})
    idle, tunnel = house.connect(), house.connect(80, OUTSIDE)
    await tunnel.send(b"POST http://a.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
    await one.close()
    assert await idle.rest() == b""
    with pytest.raises(ConnectionResetError):
        assert await tunnel.rest() == b""
        raise ConnectionResetError  # it had read all there was
    assert one.connections == 0 and house.handler(GATEWAY, 3128) is None and house.handler(OUTSIDE, 80) is None
    await one.close()


# The API (spec vpnkit 6.6)

Ask = Callable[..., Awaitable[tuple[int, str]]]


@pytest_asyncio.fixture
async def ask(proxy: Make, tmp_path: Path) -> AsyncIterator[Ask]:
    """`await ask("GET", body)` over a unix socket."""
    app = web.Application()
    app.add_routes(routes(proxy()))
    runner = web.AppRunner(app)
    await runner.setup()
    path = str(tmp_path / "api.sock")
    await web.UnixSite(runner, path).start()
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session:

        async def request(method: str, body: Any = None, url: str = "/http_proxy.json") -> tuple[int, str]:
            data = None if body is None else io.BytesIO((body if isinstance(body, str) else json.dumps(body)).encode())
            async with session.request(method, f"http://x{url}", data=data) as answer:
                return answer.status, await answer.text()

        yield request
    await runner.cleanup()


async def test_none_is_set_until_one_is_posted(house: House, ask: Ask) -> None:
    assert await ask("GET") == (404, "None set\n")
    document = {"http": "http://u:p@a:1", "exclude": "x,.y", "allow": ["z"], "transparent_http_ports": None}
    assert await ask("POST", document) == (200, "")
    status, text = await ask("GET")
    assert status == 200
    assert json.loads(text) == {
        "http": "http://u:p@a:1",
        "exclude": "x,.y",
        "transparent_http_ports": [80],
        "transparent_https_ports": [443],
        "allow_enabled": False,
        "allow": ["z"],
        "allow_error_msg": "",
    }
    assert await ask("POST", text) == (200, ""), "what was read can be posted"
    assert await ask("PUT", {}) == (200, "")
    assert house.proxy.config is not None and house.proxy.config.http is None


@pytest.mark.parametrize(
    ("body", "words"),
    [("", "no JSON"), ("{", "no JSON"), ([], "an object is expected"), ({"http": "a"}, "http: the port is missing"),
     ({"http": "u:secret@a:x", "allow": 1}, "allow: a list of strings")],
)  # fmt: skip
async def test_a_wrong_document_is_a_400_and_changes_nothing(house: House, ask: Ask, body: Any, words: str) -> None:
    await ask("POST", {"http": "a:1"})
    status, text = await ask("POST", body)
    assert status == 400 and words in text and "secret" not in text
    assert upstream(house.proxy) == "a:1"


async def test_all_else_is_a_404(ask: Ask) -> None:
    assert (await ask("GET", url="/"))[0] == 404
    assert (await ask("DELETE"))[0] == 405


async def test_a_document_that_is_too_large(ask: Ask) -> None:
    assert (await ask("POST", " " * (2 << 20)))[0] == 413
