"""Checks of the texts in LinuxKit's YAML; each returns the value or raises `ConfigError` that says what would be accepted.

Sources: spec companions 3.1, the OCI runtime specification (config.md, config-linux.md), capabilities(7), getrlimit(2).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from typing import Final

from netstack.errors import ConfigError
from vm.yaml_lines import meant, quoted

CAPABILITIES: Final = tuple(
    "CAP_" + name
    for name in (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP "
        "MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ).split()
)
"""By their numbers, capabilities(7)."""
ALL: Final = "all"
"""In place of every capability."""
NONE: Final = "none"
"""In place of an empty list of capabilities."""

RLIMITS: Final = (
    "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
)
PROPAGATIONS: Final = ("private", "shared", "slave", "unbindable", "rprivate", "rshared", "rslave", "runbindable")
MOUNT_POINTS: Final = {
    "proc": "/proc",
    "sysfs": "/sys",
    "devpts": "/dev/pts",
    "cgroup": "/sys/fs/cgroup",
    "mqueue": "/dev/mqueue",
}
"""Where a mount of a type goes that has no destination."""
MAX_NAME: Final = 76
"""Characters of a container's name; containerd takes no more."""
MAX_ID: Final = 0xFFFF_FFFE
"""The last uid; the one after it means "leave alone"."""

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_LIMIT: Final = re.compile(r"unlimited|[0-9]{1,20}", re.ASCII)


def text(value: str) -> str:
    if not value:
        raise ConfigError("is empty; leave the key out")
    if "\0" in value:
        raise ConfigError(f"{quoted(value)} has a zero octet in it")
    return value


def name(value: str) -> str:
    """Of a container or volume: it becomes the name of a directory."""
    if not _NAME.fullmatch(value) or len(value) > MAX_NAME:
        raise ConfigError(
            f"{quoted(value)} is no name; write letters, digits and . _ - between them, at most {MAX_NAME} characters"
        )
    return value


def image(value: str) -> str:
    """A reference is kept as it is written, also `@pkg:PATH`, which nothing but linuxkit itself can resolve."""
    if not value or any(one.isspace() or one < " " for one in value):
        raise ConfigError(
            f"{quoted(value)} is no image; write NAME:TAG, or dir:PATH, tar:PATH, deb:PACKAGE, oci-layout:PATH"
        )
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise ConfigError(f"{quoted(value)} is unknown{meant(value, choices)}")
        return value

    return check


def whole(low: int, high: int) -> Callable[[int], int]:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise ConfigError(f"{value} is out of range; write a whole number from {low} to {high}")
        return value

    return check


def capability(value: str) -> str:
    if value.lower() in (ALL, NONE):
        return value.lower()
    if value not in CAPABILITIES:
        raise ConfigError(f"{quoted(value)} is no capability{meant(value.upper(), (ALL, NONE, *CAPABILITIES))}")
    return value


def path(value: str) -> str:
    """An absolute path in the guest."""
    if not text(value).startswith("/"):
        raise ConfigError(f"{quoted(value)} is no path from the root; write /{value}")
    return value


def file_path(value: str) -> str:
    """Where a file goes. LinuxKit takes it from the root, with or without the slash."""
    if posixpath.normpath("/" + text(value).lstrip("/")) == "/" or ".." in value.split("/"):
        raise ConfigError(f"{quoted(value)} names no file below the root; write a path such as etc/motd, without ..")
    return value


def bind(value: str) -> str:
    """`SOURCE:DESTINATION[:OPTION,...]`."""
    parts = text(value).split(":")
    if not 2 <= len(parts) <= 3 or not parts[0] or not parts[1].startswith("/"):
        raise ConfigError(f"{quoted(value)} is no bind; write SOURCE:/DESTINATION or SOURCE:/DESTINATION:OPTION,OPTION")
    return value


def tmpfs(value: str) -> str:
    """`DESTINATION[:OPTION,...]`."""
    parts = text(value).split(":")
    if len(parts) > 2 or not parts[0].startswith("/"):
        raise ConfigError(f"{quoted(value)} is no tmpfs; write /DESTINATION or /DESTINATION:OPTION,OPTION")
    return value


def variable(value: str) -> str:
    before, equals, _ = value.partition("=")
    if not before or not equals or "\0" in value:
        raise ConfigError(f"{quoted(value)} is no variable; write NAME=VALUE")
    return value


def namespace(value: str) -> str:
    """`host` or `root` (the guest's own), `new` or `none` (one of its own), or the path of one."""
    if value in ("", "host", "root", "new", "none") or value.startswith("/"):
        return value
    raise ConfigError(f"{quoted(value)} is no namespace; write host, new, or the path of one such as /run/netns/name")


def identity(value: int | str) -> int | str:
    """A uid or gid, or the name of a container, which stands for the id it has been given; `root` is 0."""
    if isinstance(value, str):
        return name(value) if value else 0
    if not 0 <= value <= MAX_ID:
        raise ConfigError(f"{value} is no id; write a number from 0 to {MAX_ID}, or the name of a container")
    return value


def mode(value: str) -> str:
    """Octal, as text: a number would be decimal to one program and octal to the next."""
    digits = value.removeprefix("0o")
    if not re.fullmatch(r"[0-7]{1,5}", digits, re.ASCII) or int(digits, 8) > 0o7777:
        raise ConfigError(f'{quoted(value)} is no mode; write it in octal and in quotes such as "0644"')
    return value


def rlimit(value: str) -> str:
    """`NAME,SOFT,HARD`."""
    kind, *limits = (part.strip().lower() for part in value.split(","))
    known = kind.removeprefix("rlimit_") in RLIMITS
    if not known or len(limits) != 2 or not all(_LIMIT.fullmatch(one) for one in limits):
        guess = "" if known else meant(kind, RLIMITS)
        raise ConfigError(f"{quoted(value)} is no limit; write NAME,SOFT,HARD such as nofile,1024,unlimited{guess}")
    return value
