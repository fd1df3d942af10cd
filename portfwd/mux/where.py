"""How VPNKit's forwarder in the VM is reached: the text form and its value (spec vpnkit 0.1, 7.4).

    hyperkit:/vm/connect,cid=3,port=62373     hyperkit's socket: one line says which port of which VM
    connect:/vm/vsock.sock,port=62372         Firecracker, cloud-hypervisor: `CONNECT port`, answered with `OK ...`
    unix:/run/forwarder.sock                  a socket that leads there by itself
    listen:/run/data.sock                     we wait; the forwarder connects (`-data-connect`)
    fd:5                                      a connected or a listening stream socket, inherited

All take `generation=1`, `2` or `3` (the default). The host never opens AF_VSOCK itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from netstack.errors import ConfigError

FORM: Final = "hyperkit:PATH|connect:PATH|unix:PATH|listen:PATH|fd:N, then ,generation=1|2|3 and ,cid=N ,port=N"
PORT_OLD: Final = 62373
"""vsock port of the data plane in generations 1 and 2 (0xf3a5)."""
PORT: Final = 62372
"""... and in generation 3 (0xf3a4)."""
FIRST_CID: Final = 3
"""The first VM; 0 to 2 are the hypervisor, loopback and the host."""

_KINDS: Final = ("hyperkit", "connect", "unix", "listen", "fd")
_OPTION: Final = re.compile(r",(cid|port|generation)=([^,]*)$")
_NUMBER: Final = re.compile(r"\d{1,10}", re.ASCII)


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"forwarder: {text!r}: {why}; write {FORM}, such as hyperkit:/vm/connect,cid=3,generation=2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Checked at construction (`ConfigError`); `str` and `parse` are inverses."""

    kind: str
    path: str = ""
    fd: int = -1
    cid: int = FIRST_CID
    """Of the VM, for `hyperkit`."""
    port: int = 0
    """vsock port, for `hyperkit` and `connect`; 0 at construction becomes the generation's own."""
    generation: int = 3

    def __post_init__(self) -> None:
        if self.generation not in (1, 2, 3):
            raise _wrong(self._plain(), f"there is no generation {self.generation}")
        if self.kind not in _KINDS:
            raise _wrong(self._plain(), f"{self.kind!r} is no way to the forwarder")
        if not self.port:
            object.__setattr__(self, "port", PORT if self.generation == 3 else PORT_OLD)
        if self.kind == "fd":
            if self.fd < 0:
                raise _wrong(self._plain(), "a descriptor is a number from 0")
        elif not self.path or "\0" in self.path:
            raise _wrong(self._plain(), "a path is missing")
        elif _OPTION.search(self.path):
            raise _wrong(self._plain(), "the path ends like an option; rename the socket")
        if not 0 < self.port < 1 << 32 or not FIRST_CID <= self.cid < 1 << 32:
            raise _wrong(self._plain(), "a port is 1 to 4294967295, a cid 3 to 4294967295")
        if self.generation == 1 and self.kind in ("listen", "fd"):
            raise _wrong(
                self._plain(), "generation 1 needs a connection for each client; that goes with hyperkit, connect, unix"
            )

    @classmethod
    def parse(cls, text: str) -> Where:
        """The inverse of `str`; raises `ConfigError` that says what is wrong and shows the forms."""
        kind, colon, rest = text.partition(":")
        if not colon:
            raise _wrong(text, "it begins with no kind")
        options: dict[str, int] = {}
        while match := _OPTION.search(rest):
            if match[1] in options or not _NUMBER.fullmatch(match[2]):
                raise _wrong(text, f"{match[1]} is given twice, or is no number")
            options[match[1]] = int(match[2])
            rest = rest[: match.start()]
        allowed = {"hyperkit": {"cid", "port"}, "connect": {"port"}}.get(kind, set()) | {"generation"}
        if kind in _KINDS and (extra := options.keys() - allowed):
            raise _wrong(text, f"{kind} takes no {sorted(extra)[0]}")
        if options.get("port") == 0:
            raise _wrong(text, "a port is 1 to 4294967295")
        if kind != "fd":
            return cls(
                kind=kind,
                path=rest,
                cid=options.get("cid", FIRST_CID),
                port=options.get("port", 0),
                generation=options.get("generation", 3),
            )
        if not _NUMBER.fullmatch(rest):
            raise _wrong(text, "a descriptor is a number from 0")
        return cls(kind=kind, fd=int(rest), generation=options.get("generation", 3))

    @classmethod
    def vsock_path(cls, text: str) -> Where:
        """VPNKit's `--vsock-path`: a path or `unix://PATH` of hyperkit's socket, generation 2 (spec vpnkit 1.1)."""
        return cls(kind="hyperkit", path=text.removeprefix("unix://"), generation=2)

    def _plain(self) -> str:
        return f"{self.kind}:{self.fd if self.kind == 'fd' else self.path}"

    def __str__(self) -> str:
        text = self._plain()
        if self.kind == "hyperkit":
            text += f",cid={self.cid}"
        if self.kind in ("hyperkit", "connect"):
            text += f",port={self.port}"
        return f"{text},generation={self.generation}"
