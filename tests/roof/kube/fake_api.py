"""An API server of Kubernetes in the little that Services need: lists in pages, watches that stream, status, events."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.http_house import until

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "%s"%s}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


def service(
    name: str, kind: str = "LoadBalancer", *, namespace: str = "default", ip: str = "10.96.0.1", **ports: Any
) -> dict[str, Any]:
    """A Service with `ports={name: {...}}`'s values as its ports."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "uid": f"uid-{name}"},
        "spec": {"type": kind, "clusterIP": ip, "ports": [{"protocol": "TCP", **port} for port in ports.values()]},
        "status": {"loadBalancer": {}},
    }


@dataclass
class FakeApi:
    """What the cluster has, and what was asked."""

    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    lists: list[dict[str, str]] = field(default_factory=list)
    watches: list[dict[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    patches: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    """`list`, `watch`, `status` or `events` -> the status that is answered instead."""
    gone_as_event: bool = True
    version: int = 100
    oldest: int = 0
    port: int = 0
    page: int = 500
    authority: Path | None = None
    """The certificate by which the server is known, where it speaks TLS."""
    _history: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    _streams: set[asyncio.Task[Any]] = field(default_factory=set)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def put(self, made: dict[str, Any]) -> None:
        """Add or change."""
        key = f"{made['metadata']['namespace']}/{made['metadata']['name']}"
        before = self.services.get(key)
        made = copy.deepcopy(made)
        made["metadata"]["creationTimestamp"] = (
            before["metadata"]["creationTimestamp"] if before else f"2026-01-01T00:00:{self.version % 60:02}Z"
        )
        if before and not made["status"]["loadBalancer"]:
            made["status"] = before["status"]
        await self._record("MODIFIED" if before else "ADDED", key, made)

    async def drop(self, key: str) -> None:
        await self._record("DELETED", key, copy.deepcopy(self.services[key]))
        del self.services[key]

    async def _record(self, kind: str, key: str, made: dict[str, Any]) -> None:
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        self.services[key] = made
        self._history.append((self.version, kind, copy.deepcopy(made)))
        await self.wake()

    async def wake(self) -> None:
        async with self._news:
            self._news.notify_all()

    def compact(self) -> None:
        """Forget what happened up to now."""
        self.version += 1
        self.oldest = self.version

    def cut(self) -> None:
        """Break off every watch in the middle."""
        for stream in list(self._streams):
            stream.cancel()

    @property
    def watching(self) -> int:
        return len(self._streams)

    def ingress(self, key: str) -> Any:
        return self.services[key]["status"]["loadBalancer"].get("ingress")

    @property
    def kubeconfig(self) -> str:
        """The text of one that leads here."""
        if self.authority is None:
            return KUBECONFIG % (f"http://127.0.0.1:{self.port}", "")
        return KUBECONFIG % (f"https://127.0.0.1:{self.port}", f', certificate-authority: "{self.authority}"')

    def app(self) -> web.Application:
        app = web.Application()
        for path in ("/api/v1/services", "/api/v1/namespaces/{namespace}/services"):
            app.router.add_get(path, self._get)
        app.router.add_patch("/api/v1/namespaces/{namespace}/services/{name}/status", self._patch)
        app.router.add_post("/api/v1/namespaces/{namespace}/events", self._event)
        return app

    def _refusal(self, what: str, request: web.Request) -> web.Response | None:
        self.tokens.add(request.headers.get("Authorization", ""))
        if (status := self.refuse.get(what)) is None:
            return None
        message = {403: "services is forbidden", 410: "too old resource version"}.get(status, "is broken")
        return web.json_response({"kind": "Status", "code": status, "reason": "x", "message": message}, status=status)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        namespace = request.match_info.get("namespace")
        if "watch" in request.query:
            return await self._watch(request, namespace)
        self.lists.append(dict(request.query))
        if (refusal := self._refusal("list", request)) is not None:
            return refusal
        found = [one for one in self.services.values() if namespace in (None, one["metadata"]["namespace"])]
        first = int(request.query.get("continue", "0"))
        last = first + min(self.page, int(request.query.get("limit", "500")))
        metadata = {"resourceVersion": str(self.version)}
        if last < len(found):
            metadata["continue"] = str(last)
        return web.json_response({"kind": "ServiceList", "metadata": metadata, "items": found[first:last]})

    async def _watch(self, request: web.Request, namespace: str | None) -> web.StreamResponse:
        self.watches.append(dict(request.query))
        if (refusal := self._refusal("watch", request)) is not None:
            return refusal
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        at = int(request.query["resourceVersion"])
        if at < self.oldest:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await stream.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            return stream
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            while True:
                for version, kind, made in [one for one in self._history if one[0] > at]:
                    if namespace in (None, made["metadata"]["namespace"]):
                        line = json.dumps({"type": kind, "object": made}).encode() + b"\n"
                        await stream.write(line[:40])  # lines do not come in one piece
                        await stream.write(line[40:])
                    at = version
                async with self._news:
                    if not any(one[0] > at for one in self._history):
                        await self._news.wait()
        except asyncio.CancelledError:
            if request.transport is not None:  # else the client went first
                request.transport.abort()
            raise
        finally:
            self._streams.discard(task)

    async def _patch(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal("status", request)) is not None:
            return refusal
        assert request.content_type == "application/strategic-merge-patch+json"
        key = f"{request.match_info['namespace']}/{request.match_info['name']}"
        self.patches.append(key)
        patch = await request.json()
        made = copy.deepcopy(self.services[key])
        made["status"].update(patch["status"])
        await self._record("MODIFIED", key, made)
        return web.json_response(made)

    async def _event(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal("events", request)) is not None:
            return refusal
        event = json.loads(await request.read())
        self.events.append(event)
        return web.json_response(event, status=201)


@contextlib.asynccontextmanager
async def api_server(certificate: Path | None = None, key: Path | None = None) -> AsyncIterator[FakeApi]:
    """It runs, with TLS where there is a certificate."""
    api = FakeApi(authority=certificate)
    tls = None
    if certificate is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate, key)
    runner = web.AppRunner(api.app(), access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        api.port = runner.addresses[0][1]
        yield api
        if tls is not None:  # a server that closes first waits for the client's goodbye
            await until(lambda: not runner.server or not runner.server.connections)
    finally:
        await runner.cleanup()
