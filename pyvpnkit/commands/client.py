"""A plain client of the control socket: one request per connection, errors in words."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from netstack.errors import ConfigError, HostError

LIMIT_S: Final = 30.0
"""For an answer."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except BaseException:
            self.sock.close()
            raise


def control_path(given: str | None) -> str:
    """Where the daemon's control socket is; raises `ConfigError` when nobody can know."""
    if given:
        return given
    if named := os.environ.get("PYVPNKIT_CONTROL"):
        return named
    from pyvpnkit.process import StateDirectory

    try:
        return str(StateDirectory.default() / "control.sock")
    except ConfigError:
        raise ConfigError("--control: this user has no home directory; give --control PATH") from None


class Stream:
    """An answer without end; a context manager."""

    def __init__(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def read(self) -> bytes:
        """What has come, at least one octet; empty at the end."""
        try:
            return self._response.read1(1 << 16)
        except (http.client.HTTPException, ConnectionError):
            return b""  # the daemon was killed

    def close(self) -> None:
        """Leave."""
        self._response.close()
        self._connection.close()


class Client:
    """Talks to the daemon behind `path`. All methods raise `HostError` when it cannot be done, in words that say what to do,
    and `ConfigError` when the daemon says that the request itself was wrong."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, target: str, **query: str | int | None) -> Any:
        """The JSON value at `target`."""
        return self.call("GET", with_query(target, query))

    def call(self, method: str, target: str, body: object = None) -> Any:
        """The JSON value that is answered."""
        connection, response = self._ask(method, target, body, {}, LIMIT_S)
        try:
            with response:
                octets = response.read()
            return _value(response, octets)
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"{self.path}: the daemon broke off its answer ({error}); its log may say why") from None
        finally:
            connection.close()

    def stream(self, target: str, headers: Mapping[str, str] | None = None, **query: str | int | None) -> Stream:
        """An answer without end."""
        connection, response = self._ask("GET", with_query(target, query), None, headers or {}, None)
        if response.status == 200:
            return Stream(connection, response)
        try:
            with response:
                _value(response, response.read())
        finally:
            connection.close()
        raise HostError(f"{self.path}: answered {response.status} where a stream was expected")

    def _ask(
        self, method: str, target: str, body: object, headers: Mapping[str, str], timeout_s: float | None
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        octets = None if body is None else json.dumps(body).encode()
        more = {"Content-Type": "application/json"} if octets is not None else {}
        connection = _Connection(self.path, timeout_s)
        try:
            connection.request(method, target, octets, {**headers, **more})
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._failure(error) from None
        except BaseException:
            connection.close()
            raise

    def _failure(self, error: Exception) -> HostError:
        match error:
            case FileNotFoundError() | ConnectionRefusedError() | NotADirectoryError():
                return HostError(
                    f"no daemon is running behind {self.path}; start one, such as with `pyvpnkit run --link qemu:/tmp/net.sock`, "
                    "or name the socket of the one that runs with --control PATH"
                )
            case PermissionError():
                return HostError(f"{self.path}: not permitted; it is for the user who runs the daemon, and root")
            case TimeoutError():
                return HostError(f"{self.path}: no answer within {LIMIT_S:g} s; the daemon is stuck, or stopped")
            case ConnectionError() | http.client.BadStatusLine():
                return HostError(
                    f"{self.path}: the daemon hung up; it serves its own user, root and those in `control.users`"
                )
            case OSError():
                return HostError(f"{self.path}: {error.strerror or error}; is it the daemon's control socket?")
            case _:
                return HostError(f"{self.path}: what answers is not HTTP ({error!r}); is it the control socket?")


def with_query(target: str, query: Mapping[str, str | int | None]) -> str:
    """`target?a=b` of the values that are not `None`."""
    given = {name: value for name, value in query.items() if value is not None}
    return f"{target}?{urlencode(given)}" if given else target


def _value(response: http.client.HTTPResponse, octets: bytes) -> Any:
    try:
        value = json.loads(octets)
    except ValueError:
        raise HostError(f"the daemon answered {response.status} and no JSON: {octets[:80]!r}") from None
    if response.status < 400:
        return value
    message = value.get("message") if isinstance(value, dict) else None
    words = str(message or f"refused with {response.status}")
    raise ConfigError(words) if response.status == 400 else HostError(words)
