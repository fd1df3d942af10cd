"""What an HTTP proxy is told: VPNKit's `http_proxy.json` (spec vpnkit 6.1), and the variables of the host's environment.

    {"http": "http://user:password@proxy.corp:3128", "https": "proxy.corp:3128", "exclude": ".corp, 10.0.0.0/8",
     "transparent_http_ports": [80], "transparent_https_ports": [443],
     "allow_enabled": false, "allow": [], "allow_error_msg": "..."}

Every field may be absent or `null`, which is its default (Go writes `null` for an empty list). Unknown fields are ignored. A
document with anything else wrong is refused as a whole, with every complaint: to take a misspelt proxy for none would send
guests' requests past it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import unquote_to_bytes

from netstack.errors import ConfigError
from pyvpnkit.proxy.patterns import Patterns

DEFAULT_MESSAGE: Final = "Connections to %s are forbidden by policy. Please contact your IT administrator."
HTTP_PORTS: Final = (80,)
HTTPS_PORTS: Final = (443,)
NOBODY: Final = Patterns()
MAX_OCTETS: Final = 1 << 20
"""Of a document."""
_HOST: Final = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253}", re.ASCII)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Upstream:
    """A proxy of the host's network. `str` is for logs and guests, and has no credentials."""

    host: str
    """A name, or an address without brackets."""
    port: int
    credentials: bytes | None = field(default=None, repr=False)
    """`user:password`."""
    text: str = field(default="", repr=False, compare=False)
    """As it was written, credentials and all."""

    @classmethod
    def parse(cls, text: str) -> Upstream:
        """`http://[user:password@]host[:port][/]` or `host:port`. Raises `ConfigError`, whose words have no credentials."""
        scheme, slashes, rest = text.strip().partition("://")
        if not slashes:
            scheme, rest = "http", text.strip()
        if scheme.lower() != "http":
            raise ConfigError(f"{scheme[:20]}: proxies are not spoken to here; write http://host:port")
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        userinfo, at, place = authority.rpartition("@")
        host, colon, number = place.rpartition(":")
        if not colon or place.endswith("]"):
            if not slashes:
                raise ConfigError("the port is missing; write host:port or http://host:port")
            host, number = place, "80"
        if not _HOST.fullmatch(host):
            raise ConfigError("the host is missing or none; write http://host:port")
        if not (number.isascii() and number.isdigit() and 1 <= int(number[:6]) <= 65535):
            raise ConfigError(f"port {number[:20]!r}: a number from 1 to 65535 is expected")
        credentials = unquote_to_bytes(userinfo) if at else None
        if credentials is not None and b":" not in credentials:
            credentials += b":"
        return cls(host.strip("[]"), int(number), credentials, text.strip())

    @property
    def authorization(self) -> bytes | None:
        """The value of `Proxy-Authorization` (RFC 7617)."""
        return None if self.credentials is None else b"Basic " + base64.b64encode(self.credentials)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A document, understood."""

    http: Upstream | None = None
    """Whom requests are given to, intercepted ones and those to port 3128; `None`: straight to their servers."""
    https: Upstream | None = None
    """The same for intercepted TLS and port 3129."""
    exclude: Patterns = NOBODY
    """Who is reached without a proxy."""
    http_ports: tuple[int, ...] = HTTP_PORTS
    https_ports: tuple[int, ...] = HTTPS_PORTS
    allow_enabled: bool = False
    allow: Patterns = NOBODY
    allow_error_msg: str = ""

    @classmethod
    def of(cls, document: object) -> Config:
        """Raises `ConfigError` with every complaint, a line each."""
        if not isinstance(document, dict):
            raise ConfigError(f"an object is expected, not {_shown(document)}")
        complaints: list[str] = []

        def take(name: str, fallback: Value, build: Callable[[Any], Value]) -> Value:
            value = document.get(name)
            if value is None:
                return fallback
            try:
                return build(value)
            except ConfigError as error:
                complaints.extend(f"{name}: {line}" for line in str(error).splitlines())
                return fallback

        made = cls(
            http=take("http", None, _upstream),
            https=take("https", None, _upstream),
            exclude=take("exclude", NOBODY, lambda value: Patterns.parse((_text(value),))),
            http_ports=take("transparent_http_ports", HTTP_PORTS, _ports),
            https_ports=take("transparent_https_ports", HTTPS_PORTS, _ports),
            allow_enabled=take("allow_enabled", False, _truth),
            allow=take("allow", NOBODY, lambda value: Patterns.parse(_texts(value))),
            allow_error_msg=take("allow_error_msg", "", _text),
        )
        if complaints:
            raise ConfigError("\n".join(complaints[:20]))
        return made

    @classmethod
    def decode(cls, octets: bytes) -> Config:
        """Of a file or a body; raises `ConfigError`, and of it `NotJson`."""
        if len(octets) > MAX_OCTETS:
            raise NotJson(f"more than {MAX_OCTETS} octets")
        try:
            document = json.loads(octets.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise NotJson(f"octet {error.start} is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise NotJson(f"no JSON: {error}") from None
        return cls.of(document)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Config | None:
        """`http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`, lower case first; `None` where no proxy is named.

        Raises `ConfigError`.
        """

        def get(name: str) -> str:
            return environment.get(name) or environment.get(name.upper()) or ""

        document = {
            "http": get("http_proxy") or get("all_proxy"),
            "https": get("https_proxy") or get("all_proxy"),
            "exclude": get("no_proxy"),
        }
        return cls.of(document) if document["http"] or document["https"] else None

    def document(self) -> dict[str, object]:
        """As Go writes it; `of` takes it back. It has the credentials."""
        found: dict[str, object] = {}
        if self.http is not None:
            found["http"] = self.http.text
        if self.https is not None:
            found["https"] = self.https.text
        if self.exclude:
            found["exclude"] = ",".join(self.exclude.texts)
        found["transparent_http_ports"] = list(self.http_ports)
        found["transparent_https_ports"] = list(self.https_ports)
        found["allow_enabled"] = self.allow_enabled
        found["allow"] = self.allow.texts
        found["allow_error_msg"] = self.allow_error_msg
        return found

    def allows(self, host: str, port: int) -> bool:
        """Whether guests may reach this host at all."""
        return not self.allow_enabled or self.allow.matches(host, port)

    def refusal(self, host: str) -> str:
        """What is said of a host that they may not reach."""
        return (self.allow_error_msg or DEFAULT_MESSAGE).replace("%s", host)

    def __str__(self) -> str:
        """For the log."""
        return (
            f"http by {self.http or 'nobody'}, https by {self.https or 'nobody'},"
            f" {len(self.exclude.texts)} excluded"
            + (f", {len(self.allow.texts)} allowed" if self.allow_enabled else "")
        )


class NotJson(ConfigError):
    """What there is, is no JSON document."""


def _shown(value: object) -> str:
    """The kind of it, for the value may be a secret."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"a string is expected, not {_shown(value)}")
    return value


def _texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ConfigError(f"a list of strings is expected, not {_shown(value)}")
    return [_text(one) for one in value]


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"true or false is expected, not {_shown(value)}")
    return value


def _ports(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"a list of ports is expected, not {_shown(value)}")
    for one in value:
        if not isinstance(one, int) or isinstance(one, bool) or not 1 <= one <= 65535:
            raise ConfigError("a port is a number from 1 to 65535")
    return tuple(value)


def _upstream(value: object) -> Upstream | None:
    text = _text(value).strip()
    return Upstream.parse(text) if text else None
