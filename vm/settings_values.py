"""Values of `vm.yml` out of their text, a function for each kind; each raises `ConfigError` that says what would be accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from netstack.errors import ConfigError
from vm.yaml_lines import TRUTH, meant, quoted

Check = Callable[[str], Any]

PROBES: Final = ("none", "lease", "docker", "tcp", "vsock", "console")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_SIZES: Final = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def name(text: str) -> str:
    """A name that may stand in paths of sockets."""
    if not _NAME.fullmatch(text):
        raise ConfigError(
            f"{quoted(text)} cannot be a name; write up to 32 letters, digits, - _ and ., a letter or digit first"
        )
    return text


def whole(low: int, high: int) -> Check:
    """A whole number of a range."""

    def check(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ConfigError(f"{quoted(text)}: write a whole number from {low} to {high}")
        return int(text)

    return check


def octets(text: str) -> int:
    """A size; without a letter in MiB."""
    found = re.fullmatch(r"([0-9]{1,12}) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise ConfigError(f"{quoted(text)} is no size; write MiB, or a number with K, M, G or T such as 4G")
    return int(found[1]) * _SIZES[found[2].upper()]


def memory(text: str) -> int:
    """MiB."""
    mib = octets(text) >> 20
    if not 32 <= mib <= 1 << 22:
        raise ConfigError(f"{quoted(text)}: write from 32 MiB to 4 TiB, such as 1024 (MiB) or 2G")
    return mib


def seconds(text: str) -> float:
    """A time of at most a day."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?(s|m|min|h)?", text)
    value = float(found[1]) * {"m": 60, "min": 60, "h": 3600}.get(found[2] or "", 1) if found else -1.0
    if not 0 <= value <= 86400:
        raise ConfigError(
            f"{quoted(text)} is no time; write seconds such as 30 or 0.5, or minutes such as 5m; a day at most"
        )
    return value


def one_of(*choices: str) -> Check:
    """One of some words."""

    def check(text: str) -> str:
        if text not in choices:
            raise ConfigError(f"{quoted(text)} is unknown{meant(text, choices)}; write one of: {', '.join(choices)}")
        return text

    return check


def truth(text: str) -> bool:
    """On or off."""
    if text not in TRUTH:
        raise ConfigError(f"{quoted(text)} is neither on nor off")
    return TRUTH[text]


def uuid(text: str) -> UUID | None:
    """`None` for `auto`."""
    if text == "auto":
        return None
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(f"{quoted(text)} is no UUID; write auto, or one such as `uuidgen` prints") from None


def mac(text: str) -> str:
    """Lower case, with colons; empty for `auto`."""
    if text == "auto":
        return ""
    bare = text.lower().replace("-", ":")
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", bare) or int(bare[:2], 16) & 1 or bare == "00:00:00:00:00:00":
        raise ConfigError(
            f"{quoted(text)} is no address of a card; write auto, or one such as 5a:94:ef:e4:0c:ee (second digit even)"
        )
    return bare


def ipv4(text: str) -> IPv4Address:
    """A dotted address."""
    try:
        return IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{quoted(text)} is not an IPv4 address; write it as in 192.168.65.3") from None


def target(text: str) -> str:
    """An absolute path in the guest."""
    if not text.startswith("/") or ".." in text.split("/") or re.search(r"[\s\x00-\x1f]", text):
        raise ConfigError(f"{quoted(text)}: write an absolute path of the guest without blanks, such as /mnt/src")
    return text


def published(text: str) -> str:
    """A forward in the form of `pyvpnkit expose`; a protocol at the end, as Docker has it, is moved to the front."""
    found = re.fullmatch(r"(.+)/(tcp|udp)", text)
    spec = f"{found[2]}:{found[1]}" if found else text
    if re.search(r"[\s\x00-\x1f]", spec) or ":" not in spec:
        raise ConfigError(f"{quoted(text)}: write [tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT, such as 8080:80")
    return spec


def probe(text: str) -> str:
    """Kind, and behind a colon what it needs."""
    kind, _, rest = text.partition(":")
    one_of(*PROBES)(kind)
    if kind in ("tcp", "vsock"):
        whole(1, 65535 if kind == "tcp" else (1 << 32) - 2)(rest)
    elif kind == "console":
        try:
            re.compile(rest)
        except re.error as error:
            raise ConfigError(
                f"{quoted(text)}: {error}; write a regular expression of Python's behind console:"
            ) from None
        if not rest:
            raise ConfigError("console: write what a line has to say, such as console:login:")
    elif rest:
        raise ConfigError(f"{quoted(text)}: nothing may stand behind {kind}")
    return text


def path(text: str) -> Path:
    """Any path."""
    if not text or "\0" in text:
        raise ConfigError("is empty; write a path")
    return Path(text)
