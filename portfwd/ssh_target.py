"""`ssh-tunnel://` as gvproxy writes it (spec gvproxy 1.3): where a tunnel leads, and with which key.

What is said of one, in errors and lists, never shows its passphrase.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import stat
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

from netstack.api import Endpoint
from netstack.errors import ConfigError

FORM: Final = "ssh-tunnel://USER@ADDRESS[:22]/PATH/IN/GUEST.sock?key=FILE[&passphrase=TEXT]"
MAX_PATH: Final = 107
"""Octets of a path in the guest (unix(7): 108 with the zero)."""
MAX_KEY: Final = 64 * 1024


def is_tunnel(remote: str) -> bool:
    """Whether its scheme says so, in whatever case."""
    return remote.partition(":")[0].lower() == "ssh-tunnel"


def masked(remote: str) -> str:
    """`remote` with its passphrase replaced, for lists and logs."""
    head, question, query = remote.partition("?")
    parts = (
        "passphrase=***" if unquote_plus(part.partition("=")[0]) == "passphrase" else part for part in query.split("&")
    )
    return head + question + "&".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a tunnel leads."""

    user: str
    guest: Endpoint
    path: str
    key: str
    """Path of a private key on the host."""
    passphrase: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, remote: str) -> Target:
        """Raises `ConfigError`, which never quotes the query, for a passphrase may be in it."""
        head, _, query = remote.partition("?")

        def wrong(why: str) -> ConfigError:
            return ConfigError(f"remote {head[:200]!r}: {why}; write {FORM}")

        if not remote.isprintable() or "#" in remote:
            raise wrong("# and control characters are written %XX in it")
        try:
            where = urlsplit(head)
            user, host, port = unquote(where.username or ""), where.hostname or "", where.port
        except ValueError as error:
            raise wrong(str(error)) from None
        if not user or where.password is not None:
            raise wrong("a user in the guest is needed, without a password")
        try:
            address = ipaddress.IPv4Address(host).packed
        except ValueError:
            raise wrong(f"{host[:200]!r} is no IPv4 address") from None
        if port == 0:
            raise wrong("there is no port 0")
        path = unquote(where.path)
        if path in ("", "/") or "\0" in path or len(path.encode()) > MAX_PATH:
            raise wrong(f"a path in the guest is needed, of at most {MAX_PATH} octets")
        try:
            options = parse_qsl(query, keep_blank_values=True, max_num_fields=16)
        except ValueError:
            raise wrong("too many options") from None
        found = dict(reversed(options))  # of two the first counts, as in Go
        key = found.get("key", "")
        if not key.startswith("/") or "\0" in key:
            raise wrong("key= with the absolute path of a private key on the host is needed")
        guest = Endpoint(address, 22 if port is None else port)
        return cls(user=user, guest=guest, path=path, key=key, passphrase=found.get("passphrase") or None)

    def __str__(self) -> str:
        return f"ssh-tunnel://{self.user}@{self.guest}{self.path}"

    def check(self) -> None:
        """Raise `ConfigError` for what would fail at the first client: no library, no key."""
        if importlib.util.find_spec("asyncssh") is None:
            raise ConfigError(
                "ssh-tunnel needs the library asyncssh, which is not installed: pip install 'pyvpnkit[ssh]'"
            )
        self.read_key()

    def read_key(self) -> bytes:
        """The key file. Raises `ConfigError`."""
        try:
            # Non-blocking, because opening a pipe without a writer waits for one.
            with open(self.key, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ConfigError(f"ssh-tunnel: key {self.key}: not a regular file; name a private key")
                content = file.read(MAX_KEY + 1)
        except OSError as error:
            raise ConfigError(
                f"ssh-tunnel: key {self.key}: {error.strerror}; name a private key that this user may read"
            ) from None
        if len(content) > MAX_KEY:
            raise ConfigError(f"ssh-tunnel: key {self.key}: longer than {MAX_KEY} octets; name a private key")
        return content
