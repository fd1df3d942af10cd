"""The OpenAPI document and the handlers say the same: every operation is called with what fits and what does not.

No answer is a 5xx, each has a declared status, and its body fits the declared schema (threats L5). The checks here are not the
server's own.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvpnkit.api import shapes, v1
from tests.roof.api.conftest import Control, control_server
from tests.roof.api.schema import ANYTHING, KNOWN, TEXT, fitting, misfit, nearly, resolve

EXAMPLES = int(os.environ.get("PYVPNKIT_API_EXAMPLES", "60"))
STREAMS = ("/v1/events", "/v1/capture")


class Running:
    """A control server in a thread of its own, for tests that are not coroutines."""

    def __init__(self, directory: Path) -> None:
        self.control: Control
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(directory,))
        self._thread.start()
        assert self._ready.wait(30)

    def _run(self, directory: Path) -> None:
        async def serve() -> None:
            async with control_server(directory) as self.control:
                self._ready.set()
                await self._stop.wait()
                for forward in self.control.service.registry:
                    self.control.service.registry.remove(forward)

        try:
            self._loop.run_until_complete(serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()
            self._loop.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert self._failure is None, self._failure

    def ask(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(self.control.path)
            connection.request(method, target, body, headers)
            with connection.getresponse() as response:
                kind = response.headers.get_content_type()
                # A stream without end is looked at, not read.
                whole = response.status != 200 or target.partition("?")[0] not in STREAMS
                return response.status, kind, response.read() if whole else b""
        finally:
            connection.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("openapi"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def document(running: Running) -> dict[str, Any]:
    status, kind, body = running.ask("GET", "/v1/openapi.json", None, {})
    assert (status, kind) == (200, "application/json")
    found: dict[str, Any] = json.loads(body)
    return found


def operations() -> list[tuple[str, str]]:
    """Method and path of all there are, without a network."""
    return [(one.method, one.path) for one in v1.Api(*[_Nothing()] * 3, 0.0).operations]  # type: ignore[arg-type]


class _Nothing:
    """Operations are listed without being called."""

    def __getattr__(self, _name: str) -> Any:
        return self

    def __call__(self) -> Any:
        return {}


def check_answer(document: Any, operation: Any, status: int, kind: str, body: bytes, about: object) -> None:
    assert status < 500, (about, body)
    assert str(status) in operation["responses"], (about, status, body)
    content = operation["responses"][str(status)]["content"]
    assert kind in content, (about, kind)
    if kind == "application/json":
        wrong = misfit(document, content[kind]["schema"], json.loads(body))
        assert wrong is None, (about, wrong)


def test_the_document_holds_together(document: dict[str, Any], running: Running) -> None:
    assert document["openapi"].startswith("3.1.")
    ids = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            ids.append(operation["operationId"])
            assert operation["summary"].endswith(".")
            names = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
            assert names == {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert method in ("get", "post", "delete")
            for status, answer in operation["responses"].items():
                assert 200 <= int(status) < 600 and answer["description"] and answer["content"]
    assert len(ids) == len(set(ids))
    everything = [document]
    while everything:
        match everything.pop():
            case {"$ref": reference, **rest}:
                assert not rest
                assert resolve(document, {"$ref": reference})
            case dict() as inside:
                everything += inside.values()  # type: ignore[arg-type]
            case list() as inside:
                everything += inside
    for schema in document["components"]["schemas"].values():
        assert set(schema) <= KNOWN


def test_every_route_is_described_and_everything_described_is_a_route(
    document: dict[str, Any], running: Running
) -> None:
    served = {
        (route.method, route.resource.canonical)
        for route in running.control.server.http._app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert served == described == set(operations())


def test_a_forward_has_every_member_of_what_makes_it() -> None:
    import dataclasses

    from portfwd.spec import PublishSpec

    assert set(shapes.SPEC_FIELDS) == {one.name for one in dataclasses.fields(PublishSpec)}


@pytest.mark.parametrize(("method", "path"), operations(), ids=lambda value: value)
def test_an_operation_answers_as_described_whatever_it_is_asked(
    running: Running, document: dict[str, Any], method: str, path: str, tmp_path: Path
) -> None:
    operation = document["paths"][path][method.lower()]
    parameters = operation.get("parameters", ())
    body_schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    seen = set()

    def tame(value: Any) -> Any:
        """What is published stays in a directory of ours; it is a test."""
        if isinstance(value, dict) and isinstance(value.get("path"), str) and value["path"].startswith("/"):
            return {**value, "path": str(tmp_path / quote(value["path"], safe="")[:40])}
        return value

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(data=st.data())
    def calls(data: st.DataObject) -> None:
        fits = True

        def draw(schema: Any) -> Any:
            nonlocal fits
            if data.draw(st.integers(0, 4)):
                return data.draw(fitting(document, schema))
            value = data.draw(TEXT | st.integers())
            # All of it is text on the way; a number may be what is wanted.
            fits = fits and None in (misfit(document, schema, value), misfit(document, schema, str(value)))
            return value

        target, query, headers = path, [], {}
        for one in parameters:
            if one["in"] == "path":
                target = target.replace(f"{{{one['name']}}}", quote(str(draw(one["schema"])), safe="") or "-")
            elif one["in"] == "query" and (one["required"] or data.draw(st.booleans())):
                query.append((one["name"], str(draw(one["schema"]))))
            elif one["in"] == "header" and data.draw(st.booleans()):
                headers[one["name"]] = quote(str(draw(one["schema"])))
        if data.draw(st.integers(0, 5)) == 0:
            query.append((data.draw(TEXT), data.draw(TEXT)))
        if query:
            target += f"?{urlencode(query)}"
        octets = None
        if body_schema is not None:
            value = tame(data.draw(fitting(document, body_schema) | nearly(document, body_schema)))
            octets = json.dumps(value).encode()
            if data.draw(st.integers(0, 9)) == 0:
                octets = data.draw(st.binary(max_size=40))
            headers["Content-Type"] = data.draw(st.sampled_from(["application/json"] * 9 + ["text/plain"]))
            if misfit_body(octets):
                fits = False
        status, kind, body = running.ask(method, target, octets, headers)
        check_answer(document, operation, status, kind, body, (method, target, octets, headers))
        seen.add(status)
        if not fits:
            assert status >= 400, (method, target, octets, body)

    def misfit_body(octets: bytes) -> bool:
        try:
            return misfit(document, body_schema, json.loads(octets)) is not None
        except ValueError:
            return True

    calls()
    assert seen
    if not any(one["in"] == "path" for one in parameters) and method == "GET":
        assert 200 in seen


@settings(max_examples=EXAMPLES * 3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
    target=st.sampled_from(["/", "/v1", "/v1/", "/v1/forwards", "/v1/flows/", "/v1//status", "/metrics/x"])
    | TEXT.map(lambda text: f"/{quote(text)}"),
    body=st.none() | st.binary(max_size=200) | ANYTHING.map(lambda value: json.dumps(value).encode()),
)
def test_no_request_at_all_is_a_fault(running: Running, method: str, target: str, body: bytes | None) -> None:
    status, kind, octets = running.ask(method, target, body, {"Content-Type": "application/json"})
    assert status < 500
    if status >= 400 and method != "HEAD":
        assert kind == "application/json"
        assert isinstance(json.loads(octets)["message"], str)


def test_a_published_guest_is_described_as_it_is(running: Running, document: dict[str, Any]) -> None:
    """The fuzzing above sees mostly errors: these see the answers that matter."""
    headers = {"Content-Type": "application/json"}
    for method, path, body, wanted in (
        ("POST", "/v1/forwards", {"spec": "0:80"}, 201),
        ("POST", "/v1/leases", {"mac": "02:00:00:00:00:42", "address": "192.168.65.142"}, 201),
        ("POST", "/v1/leases", {"mac": "02:00:00:00:00:42", "address": "192.168.65.142"}, 200),
        ("GET", "/v1/forwards", None, 200),
        ("GET", "/v1/leases", None, 200),
        ("GET", "/v1/status", None, 200),
        ("GET", "/v1/flows", None, 200),
    ):
        octets = None if body is None else json.dumps(body).encode()
        status, kind, answer = running.ask(method, path, octets, headers if octets else {})
        assert status == wanted
        check_answer(document, document["paths"][path][method.lower()], status, kind, answer, path)
    forward = json.loads(running.ask("POST", "/v1/forwards", b'{"spec": "0:81"}', headers)[2])
    taken = json.dumps({"port": forward["port"], "guest_port": 82}).encode()
    status, kind, answer = running.ask("POST", "/v1/forwards", taken, headers)
    assert status == 409 and "holder" in json.loads(answer)
    check_answer(document, document["paths"]["/v1/forwards"]["post"], status, kind, answer, taken)
    for method, path in (("GET", "/v1/forwards/{id}"), ("DELETE", "/v1/forwards/{id}")):
        status, kind, answer = running.ask(method, path.replace("{id}", str(forward["id"])), None, {})
        assert status == 200
        check_answer(document, document["paths"][path][method.lower()], status, kind, answer, path)
    path = "/v1/leases/{mac}"
    status, kind, answer = running.ask("DELETE", path.replace("{mac}", "02:00:00:00:00:42"), None, {})
    assert status == 200
    check_answer(document, document["paths"][path]["delete"], status, kind, answer, path)
