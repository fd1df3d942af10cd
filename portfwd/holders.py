"""Why a port cannot be bound, in words that say what to do: who holds it, what privilege is missing."""

from __future__ import annotations

import errno
import ipaddress
import os
import sys
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def explain(error: OSError, protocol: str, address: str, port: int) -> str:
    """One sentence about the failed bind of `address`:`port`, ending in what to change."""
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if error.errno == errno.EADDRINUSE:
        who = holder(protocol, address, port)
        by = f" by {who}" if who else ""
        return f"{protocol} {where} is in use{by}; choose another port (0 picks a free one) or stop what holds it"
    if error.errno in (errno.EACCES, errno.EPERM):
        first = first_unprivileged_port()
        if port < first:
            return (
                f"{protocol} {where} needs privilege: ports below {first} are kept for root; choose a higher port, or allow it "
                f"with `sysctl net.ipv4.ip_unprivileged_port_start={port}` or CAP_NET_BIND_SERVICE"
            )
        return f"{protocol} {where}: not permitted; a security policy of this host forbids it"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{protocol} {where}: {address} is not an address of this host; use 127.0.0.1 or one that `ip address` shows"
    if error.errno == errno.EAFNOSUPPORT:
        return f"{protocol} {where}: this host has no IPv{6 if ':' in address else 4}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{protocol} {where}: no descriptor is left; raise `ulimit -n`"
    return f"{protocol} {where}: {error.strerror or error}"


def first_unprivileged_port() -> int:
    """Ports below it need privilege on this host (1024 where the host does not say)."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024


def holder(protocol: str, address: str, port: int) -> str:
    """`name (pid N)` of the process whose socket stands in the way, or "" where it cannot be known.

    Linux only, and only processes whose descriptors this user may look at; the search costs a walk through /proc.
    """
    if sys.platform != "linux":
        return ""
    inodes = _inodes(protocol, address, port)
    if not inodes:
        return ""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        if any(_target(process / "fd" / name) in wanted for name in _names(process / "fd")):
            try:
                name = (process / "comm").read_text().strip()
            except OSError:
                continue  # gone by now
            mine = ", this very process" if int(process.name) == os.getpid() else ""
            return f"{name} (pid {process.name}{mine})"
    return "a process of another user"


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # not ours to look at, or gone by now
        return []


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed since the directory was read
        return ""


def _inodes(protocol: str, address: str, port: int) -> set[str]:
    """Socket inodes bound to `port` on `address` or on any address."""
    mine = ipaddress.ip_address(address)
    found = set()
    for table in (protocol, f"{protocol}6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            local, _, local_port = fields[1].rpartition(":")
            if int(local_port, 16) != port or (protocol == "tcp" and fields[3] != _LISTEN):
                continue
            theirs = _address(local)
            if theirs.is_unspecified or mine.is_unspecified or theirs == mine:
                found.add(fields[9])
    return found


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """/proc writes an address as 32-bit words in the host's byte order."""
    words = bytes.fromhex(text)
    if sys.byteorder == "little":
        words = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return ipaddress.ip_address(words)
