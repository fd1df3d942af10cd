"""Which vsock ports the services of a machine take, read from their command lines (spec companions 1.2, 3.3).

    vsudd -inport PORT|GUID:unix:PATH             the guest listens; `docker` where the path is docker's, else the path
    vpnkit-forwarder -vsockPort, -data-listen     the guest listens: `forwarder`; with -data-connect the host does
    vpnkit-forwarder -control-listen              the guest listens: `control`
    host-timesync-daemon -port                    the guest listens: `timesync`
    vpnkit-expose-port -control                   the host listens: `control`, also where dockerd is told to run it
    mount9p -port                                 the host listens: `9p`; with -listen the guest does
    socat VSOCK-LISTEN:PORT, VSOCK-CONNECT:2:PORT `docker` where the other side is docker's socket, else that side

`vsudd`, `timesync`, `forwarder`, `expose_port` and `mount9p` of ours are known too, run as modules or files.

A service without a command runs its image's, so the program is known by the image's or the service's name, with its defaults. Two
defaults of the original programs are the same number, 62372 = 0xf3a4: the newer forwarder's and time synchronisation's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from netstack.errors import ConfigError
from vm.linuxkit.schema import Image, LinuxKit
from vm.yaml_lines import Complaints, quoted

TIMESYNC: Final = 0xF3A4
FORWARDER: Final = 0xF3A5
CONTROL: Final = 0x1002
NINEP: Final = 564  # IANA: 9pfs
MAX_PORT: Final = 0xFFFF_FFFE

Side: TypeAlias = Literal["guest", "host"]

_HVSOCK: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_VSOCK_GUID: Final = "-facb-11e6-bd58-64006a7986d3"  # spec companions 1.1, with the port before it
_SHELLS: Final = ("sh", "bash", "ash", "dash")
_BETWEEN: Final = re.compile(r"[;&|()]+")
_CID_SELF: Final = 1  # VMADDR_CID_LOCAL, vsock(7): the guest itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One vsock port."""

    port: int | None
    """`None` for a GUID of Hyper-V that stands for no port."""
    service: str
    what: str
    """`docker`, `forwarder`, `control`, `timesync`, `9p`, or the path of the guest's socket behind it."""
    listens: Side = "guest"
    guid: str = ""


_Found: TypeAlias = Iterator[tuple[str, int | None, Side, str]]
"""What, port, who listens, GUID."""


def derive(machine: LinuxKit) -> tuple[Entry, ...]:
    """The table, in the order of `onboot` and `services`. Raises `ConfigErrors` for what a program would refuse."""
    complaints = Complaints()
    entries: list[Entry] = []
    for image in machine.onboot + machine.services:
        for program, words in _programs(image):
            try:
                for what, port, listens, guid in PROGRAMS[program](words):
                    entry = Entry(port=port, service=image.name, what=what, listens=listens, guid=guid)
                    if entry not in entries:
                        entries.append(entry)
            except ConfigError as error:
                complaints.add(image.mark, f"{image.name}: {program}: {error}")
    complaints.raise_any()
    return tuple(entries)


def check(table: Sequence[Entry], ports: Mapping[str, int]) -> tuple[str, ...]:
    """Complaints about `vsock.ports` of a `vm.yml` (name -> port) beside what the services take; empty when both agree.

    Names other than docker, forwarder, control and timesync need only a service at their port. The host may serve `control` for
    programs that no service of the file runs.
    """
    complaints = []
    taken: dict[tuple[Side, int], Entry] = {}
    for entry in table:
        if entry.port is None:
            continue
        first = taken.setdefault((entry.listens, entry.port), entry)
        if first is not entry and entry.listens == "guest":
            complaints.append(
                f"vsock port {entry.port} is taken by {first.what} of {first.service!r} and by {entry.what} of "
                f"{entry.service!r}; give one of them another port"
            )
    by_port: dict[int, str] = {}
    for name, port in ports.items():
        first_name = by_port.setdefault(port, name)
        if first_name != name:
            complaints.append(f"vsock.ports.{name}: {port} is also {first_name}'s; give each its own")
        complaints += _compared(table, name, port)
    return tuple(complaints)


def _compared(table: Sequence[Entry], name: str, port: int) -> Iterator[str]:
    wanted = [entry for entry in table if entry.what == name]
    if name not in ("docker", "forwarder", "control", "timesync"):
        if not any(entry.port == port for entry in table):
            known = ", ".join(sorted({str(entry.port) for entry in table if entry.port is not None})) or "none"
            yield f"vsock.ports.{name}: no service takes {port}; taken are: {known}"
    elif not wanted:
        if name != "control":
            yield f"vsock.ports.{name}: no service of the LinuxKit file is one; add it there, or leave the port out"
    elif not any(entry.port == port for entry in wanted):
        first = wanted[0]
        yield f"vsock.ports.{name}: is {port}, but {first.service!r} uses {first.port}; write {first.port} or change the service"


def _programs(image: Image) -> Iterator[tuple[str, list[str]]]:
    """Each known program that a service runs, with the words behind it."""
    if image.command is None:
        for name in (_bare(image.image), image.name):
            if name in PROGRAMS:
                yield name, []
                return
        return
    for words in _commands(image.command):
        for at, word in enumerate(words):
            if program := _program(word, words[at - 1] if at else ""):
                yield program, words[at + 1 :]
                break


def _bare(reference: str) -> str:
    """The last part of `linuxkit/vsudd:v0.2`, without tag and digest."""
    return reference.partition("@")[0].rpartition("/")[2].partition(":")[0]


def _program(word: str, before: str) -> str:
    """The known program that a word of a command line is; or "". Our short names count where only a program can stand."""
    name = word.rpartition("/")[2]
    if name not in PROGRAMS and (
        before in ("", "-m", "exec") or before.rpartition("/")[2] == "pyvpnkit" or name.endswith(".py")
    ):
        name = name.removeprefix("vm.guest.").removeprefix("portfwd.invm.").removesuffix(".py").replace("_", "-")
        name = _ALIASES.get(name, name)
    return name if name in PROGRAMS else ""


def _commands(command: Sequence[str]) -> Iterator[list[str]]:
    """The command itself, or those of a shell's `-c`."""
    if len(command) >= 3 and command[0].rpartition("/")[2] in _SHELLS and command[1].endswith("c"):
        try:
            words = list(shlex.shlex(command[2], posix=True, punctuation_chars=True))
        except ValueError:
            return  # quotes that never end: the shell will say so
        part: list[str] = []
        for word in words:
            if _BETWEEN.fullmatch(word):
                yield part
                part = []
            else:
                part.append(word)
        yield part
    else:
        yield list(command)


def _flags(words: Sequence[str], *names: str) -> Iterator[tuple[str, str]]:
    """`-x V`, `-x=V`, `--x V`, `--x=V` as Go reads them; unknown flags are passed over. Raises `ConfigError`."""
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            continue
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name not in names:
            continue
        if not equals:
            if not left:
                raise ConfigError(f"-{name} has no value")
            value = left.pop(0)
        yield name, value


def _port(text: str) -> int:
    """A vsock port, decimal or as 0x..."""
    try:
        port = int(text, 0)
    except ValueError:
        port = -1
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(
            f"{quoted(text)} is no vsock port; write a number up to {MAX_PORT}, or 0x and hexadecimal digits"
        )
    return port


def _guid(text: str) -> tuple[int | None, str]:
    """The port that a GUID of Hyper-V stands for, and the GUID."""
    guid = text.lower()
    return (int(guid[:8], 16) if guid.endswith(_VSOCK_GUID) else None), guid


def _address(text: str) -> tuple[int, int | None] | None:
    """Port and CID of `PORT` or `CID/PORT`; `None` for the path of a Unix socket, which is no vsock."""
    cid, slash, port = text.rpartition("/")
    if not re.fullmatch(r"\d{1,10}", port, re.ASCII) or (slash and not re.fullmatch(r"\d{1,10}", cid, re.ASCII)):
        return None
    return _port(port), int(cid) if slash else None


def _vsudd(words: Sequence[str]) -> _Found:
    for _, value in _flags(words, "inport"):
        source, _, target = value.partition(":")
        kind, _, path = target.partition(":")
        if kind != "unix" or not path:
            raise ConfigError(
                f"-inport {quoted(value)}: write PORT:unix:PATH, or the GUID of a service instead of PORT"
            )
        what = _behind(path)
        if _HVSOCK.fullmatch(source):
            port, guid = _guid(source)
            yield what, port, "guest", guid
        else:
            yield what, _port(source), "guest", ""


def _behind(path: str) -> str:
    return "docker" if path.endswith("/docker.sock") else path


def _forwarder(words: Sequence[str]) -> _Found:
    given = list(_flags(words, "vsockPort", "hvGuid", "data-listen", "data-connect", "control-listen"))
    if not any(name.startswith("data") for name, _ in given):  # the older one, which listens in any case
        port: int | None = FORWARDER
        guid = ""
        for name, value in given:
            if name == "vsockPort":
                port = _port(value)
            elif name == "hvGuid":
                guid = value.lower()
        yield "forwarder", port, "guest", guid
    for name, value in given:
        if name.startswith(("data", "control")) and (found := _address(value)) is not None:
            what = "forwarder" if name.startswith("data") else "control"
            port, cid = found
            if not (name == "data-connect" and cid == _CID_SELF):
                yield what, port, "host" if name == "data-connect" else "guest", ""


def _timesync(words: Sequence[str]) -> _Found:
    port = TIMESYNC
    for _, value in _flags(words, "port"):
        port = _port(value)
    yield "timesync", port, "guest", ""


def _expose_port(words: Sequence[str]) -> _Found:
    control = str(CONTROL)
    for _, value in _flags(words, "control"):
        control = value
    if (found := _address(control)) is not None and found[1] != _CID_SELF:
        yield "control", found[0], "host", ""


def _mount9p(words: Sequence[str]) -> _Found:
    port = NINEP
    for _, value in _flags(words, "port"):
        if "/" in value:
            return  # a Unix socket
        port = _port(value)
    listens = any(word.lstrip("-") == "listen" for word in words if word.startswith("-"))
    yield "9p", port, "guest" if listens else "host", ""


def _socat(words: Sequence[str]) -> _Found:
    addresses = [word for word in words if not word.startswith("-")]
    for word in addresses:
        kind, _, rest = word.partition(":")
        kind, rest = kind.upper(), rest.partition(",")[0]
        if kind not in ("VSOCK-LISTEN", "VSOCK-CONNECT"):
            continue
        cid, _, port = rest.rpartition(":")
        other = next((one for one in addresses if one is not word), "").partition(",")[0]
        what = _behind(other.partition(":")[2] if other.upper().startswith("UNIX") else other)
        if kind == "VSOCK-LISTEN" or cid != str(_CID_SELF):
            yield what, _port(port), "guest" if kind == "VSOCK-LISTEN" else "host", ""


PROGRAMS: Final[Mapping[str, Callable[[Sequence[str]], _Found]]] = {
    "vsudd": _vsudd,
    "vpnkit-forwarder": _forwarder,
    "host-timesync-daemon": _timesync,
    "vpnkit-expose-port": _expose_port,
    "mount9p": _mount9p,
    "socat": _socat,
}
_ALIASES: Final = {
    "timesync": "host-timesync-daemon",
    "forwarder": "vpnkit-forwarder",
    "expose-port": "vpnkit-expose-port",
}
