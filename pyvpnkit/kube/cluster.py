"""The API server, by the official client (`pip install 'pyvpnkit[kube]'`).

The client blocks, so each call and each read of a watch has a thread; they are daemons, so that a server that does not answer
keeps nobody from ending. Answers are read as JSON: the client's models differ from version to version, and some refuse what
a newer server says. Everything that is not asked for by `Cluster`'s user is the client's own: addresses, certificates, tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias, TypeVar

import yaml

from netstack.errors import ConfigError, HostError, Malformed
from pyvpnkit.kube.engine import LOCALHOST, Trouble
from pyvpnkit.kube.services import Service, parse

log = logging.getLogger("pyvpnkit.kube")

T = TypeVar("T")

TIMEOUT_S: Final = (10.0, 30.0)
"""To connect, and between two octets of an answer."""
WATCH_S: Final = 300
"""After which the server is asked to end a watch; it begins anew where it was."""
WATCH_SILENCE_S: Final = WATCH_S + 30
"""A watch from which nothing comes, not even its end, is lost."""
PAGE: Final = 500
"""Services in one answer, as client-go has it."""
MAX_ANSWER: Final = 32 << 20
"""Octets of one answer, or of one event of a watch."""
MAX_MESSAGE: Final = 1024
"""Characters of an event's message; Kubernetes takes no more."""


class ClusterError(HostError):
    """The API server cannot be reached, refuses, or answers what is none."""


class Gone(ClusterError):
    """Status 410: what happened since a version is no longer known; list anew."""


@dataclass(frozen=True, slots=True)
class Changed:
    service: Service


@dataclass(frozen=True, slots=True)
class Deleted:
    key: str


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Nothing happened up to here."""


Happened: TypeAlias = tuple[str, Changed | Deleted | Bookmark]
"""The version to go on from, and what it was."""


def connect(kubeconfig: str = "", context: str = "") -> Any:
    """The client's `CoreV1Api`: by the file and its context, in a pod by its service account, else by `~/.kube/config`.

    Raises `ConfigError`.
    """
    client, config = _imported("kubernetes.client"), _imported("kubernetes.config")
    settings = client.Configuration()
    named = f"--kubeconfig {kubeconfig or '(default)'}"
    try:
        if not kubeconfig and not context and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(
                config_file=kubeconfig or None,
                context=context or None,
                client_configuration=settings,
                persist_config=False,
            )
    except config.ConfigException as error:
        raise ConfigError(f"{named}: {' '.join(str(error).split())}; name a kubeconfig file that can be used") from None
    except (
        yaml.YAMLError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # what odd files make of the client
        raise ConfigError(f"{named}: is no kubeconfig: {' '.join(str(error).split())}") from None
    settings.retries = 0  # the forwarder waits by itself, and longer each time
    return client.CoreV1Api(client.ApiClient(settings))


def _imported(name: str) -> Any:
    """The client is an extra, and its types are none that mypy should read (80,000 lines)."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError("kube-forwarder needs Kubernetes' client; run: pip install 'pyvpnkit[kube]'") from None


class Cluster:
    """Services of the cluster, or of one namespace. Belongs to one loop."""

    def __init__(self, api: Any, *, namespace: str = "", component: str) -> None:
        """`component` stands in events as their source."""
        self._api = api
        self._namespace = namespace
        self._component = component
        self._errors = _imported("kubernetes.client.exceptions")
        self._transport_errors = (_imported("urllib3.exceptions").HTTPError, OSError)
        self._may_write_events = True
        self._closed = False

    @property
    def host(self) -> str:
        """The API server's URL, for people."""
        return str(self._api.api_client.configuration.host)

    def close(self) -> None:
        """Close the connections that are kept for the next call. Calls that go on close theirs when they end."""
        self._closed = True
        self._forget()

    def _forget(self) -> None:
        manager = self._api.api_client.rest_client.pool_manager
        for key in manager.pools.keys():  # `clear` of newer ones leaves closing to the garbage collector
            with contextlib.suppress(KeyError):
                manager.pools[key].close()
        manager.clear()

    async def list(self) -> tuple[list[Service], str]:
        """All Services, and the version to watch from. Raises `ClusterError`."""
        services: list[Service] = []
        more = ""
        while True:
            page = await self._json(self._lister(), limit=PAGE, **({"_continue": more} if more else {}))
            metadata = page.get("metadata")
            if not isinstance(metadata, Mapping) or not isinstance(page.get("items") or [], list):
                raise ClusterError(f"{self.host}: answered with no list of Services")
            for item in page.get("items") or []:
                with contextlib.suppress(Malformed):
                    services.append(parse(item))
            more = str(metadata.get("continue") or "")
            if not more:
                return services, str(metadata.get("resourceVersion") or "")

    async def watch(self, version: str) -> AsyncGenerator[Happened, None]:
        """What happens after `version`, until the server ends it. Raises `Gone`, `ClusterError`. Close it (`aclosing`)."""
        response = await self._call(
            lambda: self._lister()(
                watch=True,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_S,
                _request_timeout=(TIMEOUT_S[0], WATCH_SILENCE_S),
                _preload_content=False,
            )
        )
        self._check(response)
        lines = _lines(response)
        try:
            while (line := await self._call(lambda: next(lines, None))) is not None:
                if line.strip():
                    yield self._happened(line)
        finally:
            _abort(response)

    async def set_ingress(self, service: Service) -> None:
        """Say at a LoadBalancer that it is at `localhost`. Raises `ClusterError`."""
        status = {"status": {"loadBalancer": {"ingress": [{"hostname": LOCALHOST}]}}}
        await self._json(self._api.patch_namespaced_service_status, service.name, service.namespace, status)

    async def event(self, trouble: Trouble) -> None:
        """An event at the Service, which `kubectl describe` shows. A cluster that refuses is asked no more."""
        if not self._may_write_events:
            return
        try:
            event = _event(trouble, self._component)
            await self._json(self._api.create_namespaced_event, trouble.service.namespace, event)
        except ClusterError as error:
            self._may_write_events = False
            log.info("no events are written, the log has all the same: %s", error)

    def _lister(self) -> Callable[..., Any]:
        if not self._namespace:
            call: Callable[..., Any] = self._api.list_service_for_all_namespaces
            return call
        return lambda **more: self._api.list_namespaced_service(self._namespace, **more)

    async def _json(self, call: Callable[..., Any], *words: Any, **more: Any) -> Mapping[str, Any]:
        def ask() -> tuple[Any, bytes]:
            response = call(*words, **more, _preload_content=False, _request_timeout=TIMEOUT_S)
            try:
                return response, response.read(MAX_ANSWER + 1, decode_content=True)
            finally:
                response.close()

        response, body = await self._call(ask)
        self._check(response, body)
        try:
            document = json.loads(body) if len(body) <= MAX_ANSWER else None
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise ClusterError(
                f"{self.host}: answered something that is no JSON object of at most {MAX_ANSWER >> 20} MiB"
            )
        return document

    async def _call(self, call: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return call()
            finally:
                if self._closed:  # nobody waits for this any more
                    self._forget()

        try:
            return await in_thread(run)
        except self._errors.ApiException as error:
            raise self._refusal(error.status, error.body, error.reason) from None
        except self._transport_errors as error:
            raise ClusterError(f"{self.host}: cannot be reached: {_cause(error)}") from None

    def _check(self, response: Any, body: bytes = b"") -> None:
        """Newer clients leave this to us where they do not read the answer."""
        if not 200 <= response.status <= 299:
            _abort(response)
            raise self._refusal(response.status, body, response.reason)

    def _refusal(self, status: Any, body: Any, reason: Any) -> ClusterError:
        try:
            words = json.loads(body)["message"]
        except (ValueError, TypeError, KeyError, RecursionError):
            words = reason
        text = f"{self.host}: answered {status}: {str(words)[:MAX_MESSAGE]}"
        if status == 410:
            return Gone(text)
        if status in (401, 403):
            text += "; the account needs list and watch on services, patch on services/status and create on events"
        return ClusterError(text)

    def _happened(self, line: bytes) -> Happened:
        try:
            document = json.loads(line)
            kind, thing = document["type"], document["object"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ClusterError(f"{self.host}: an event of the watch is none: {line[:80]!r}") from None
        if kind == "ERROR":
            thing = thing if isinstance(thing, Mapping) else {}
            raise self._refusal(thing.get("code"), None, thing.get("message"))
        if kind == "BOOKMARK":
            metadata = thing.get("metadata") if isinstance(thing, Mapping) else None
            return str((metadata or {}).get("resourceVersion") or ""), Bookmark()
        try:
            service = parse(thing)
        except Malformed:
            return "", Bookmark()
        return service.version, Deleted(service.key) if kind == "DELETED" else Changed(service)


async def in_thread(call: Callable[[], T]) -> T:
    """`call()` in a daemon thread of its own; one that is no longer waited for ends by itself."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # whatever `call` returned

    def run() -> None:
        result, failed = None, None
        try:
            result = call()
        except BaseException as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it who waited
            loop.call_soon_threadsafe(tell, result, failed)

    threading.Thread(target=run, name="pyvpnkit-kube", daemon=True).start()
    return await done


def _lines(response: Any) -> Iterator[bytes]:
    """The lines of an answer as they come; blocks."""
    left = b""
    for chunk in response.stream(1 << 16, decode_content=True):
        *whole, left = (left + chunk).split(b"\n")
        yield from whole
        if len(left) > MAX_ANSWER:
            raise ClusterError(f"an event of the watch is longer than {MAX_ANSWER >> 20} MiB")
    if left:
        yield left


def _abort(response: Any) -> None:
    """End an answer, also under a thread that reads it: closing alone would not wake it."""
    sock = getattr(getattr(response, "connection", None), "sock", None)
    if sock is not None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # that of TLS would wait for its lock
    with contextlib.suppress(Exception):  # whatever the client's layers make of an answer cut short
        response.close()


def _cause(error: BaseException) -> str:
    """The innermost words: urllib3 wraps them three times."""
    while (inner := getattr(error, "reason", None) or error.__cause__) and isinstance(inner, BaseException):
        error = inner
    return str(error).rpartition(">: ")[2] or type(error).__name__


def _event(trouble: Trouble, component: str) -> dict[str, Any]:
    service = trouble.service
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "metadata": {"generateName": f"{service.name}.", "namespace": service.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Service",
            "namespace": service.namespace,
            "name": service.name,
            "uid": service.uid,
            "resourceVersion": service.version,
        },
        "type": "Warning",
        "reason": trouble.reason,
        "message": trouble.message[:MAX_MESSAGE],
        "source": {"component": component},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
