"""What `pyvpnkit doctor` looks at, one function per check: each says how it is, and what to do where that is not well.

`fail`: guests will miss something that people count on. `warn`: some will, sometimes. Nothing is changed on the host, and no
packet leaves it but one question to each resolver.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import secrets
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from dns.servers import Upstream
from netstack.errors import ConfigError
from netstack.settings import Network
from portfwd.spec import PublishSpec
from pyvpnkit.hostnet import routes
from pyvpnkit.hostnet.routes import Snapshot

State: TypeAlias = Literal["ok", "warn", "fail"]

LINUX: Final = sys.platform == "linux"
FEW_DESCRIPTORS: Final = 4096
FEW_PORTS: Final = 4096
SMALL_MTU: Final = 1280
"""Less than any IPv6 link has (RFC 8200 5): a tunnel in a tunnel."""
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_OCTETS: Final = 256
_ERROR_AT: Final = 32
"""Of `esterror` in struct timex where a long has 8 octets."""
_RCODES: Final = {0: "", 2: " (SERVFAIL)", 3: " (NXDOMAIN)", 5: " (REFUSED)"}
_UNSHARE: Final = (
    "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True); "
    "sys.exit(0 if libc.unshare(int(sys.argv[1])) == 0 else ctypes.get_errno())"
)
_NEWNS_NEWNET: Final = 0x00020000 | 0x40000000
_NEWUSER: Final = 0x10000000
_SWITCHES: Final = {
    "kernel/unprivileged_userns_clone": (0, 1),
    "kernel/apparmor_restrict_unprivileged_userns": (1, 0),
    "user/max_user_namespaces": (0, 15000),
    "user/max_net_namespaces": (0, 15000),
    "user/max_mnt_namespaces": (0, 15000),
}
"""Sysctls that forbid namespaces: the value that does, and one that does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one check came to."""

    name: str
    state: State
    text: str
    advice: str = ""
    """What to do; empty where nothing need be done."""


# Names and the way out.


def resolvers(servers: Sequence[Upstream], source: str, limit_s: float = 2.0) -> Iterator[Result]:
    """Ask each for the root's name servers, all at once. `source` is where they are named."""
    if not servers:
        yield Result(
            name="resolvers",
            state="fail",
            text=f"{source} names none, so guests resolve only what this network knows itself",
            advice="name one there, or set `dns: {servers: [...]}`; a VPN client may not be up yet",
        )
        return
    took = ask(servers, limit_s)
    answered = any(isinstance(one, tuple) for one in took)
    for server, one in zip(servers, took, strict=True):
        if isinstance(one, tuple):
            seconds, rcode = one
            code = _RCODES.get(rcode, f" (rcode {rcode})")
            yield Result(name="resolvers", state="ok", text=f"{server} answers in {seconds * 1000:.0f} ms{code}")
        else:
            yield Result(
                name="resolvers",
                state="warn" if answered else "fail",
                text=f"{server}: {one}",
                advice=f"is it the resolver of a network or VPN that is gone? {source} names it",
            )


def ask(servers: Sequence[Upstream], limit_s: float) -> list[tuple[float, int] | str]:
    """Per server `(seconds, rcode)`, or why there was no answer."""
    found: list[tuple[float, int] | str] = [f"no answer within {limit_s:g} s"] * len(servers)
    waiting: dict[socket.socket, tuple[int, bytes, float]] = {}
    try:
        for number, server in enumerate(servers):
            question = secrets.token_bytes(2) + struct.pack("!HHHHHBHH", 0x0100, 1, 0, 0, 0, 0, 2, 1)  # RD; ". NS IN"
            try:
                sock = socket.socket(server.family, socket.SOCK_DGRAM)
            except OSError as error:
                found[number] = str(error.strerror)
                continue
            waiting[sock] = number, question, time.monotonic()
            try:
                sock.setblocking(False)
                sock.connect(server.sockaddr)
                sock.send(question)
            except OSError as error:
                found[number] = str(error.strerror)
                del waiting[sock]
                sock.close()
        end = time.monotonic() + limit_s
        while waiting and (left := end - time.monotonic()) > 0:
            for sock in select.select(list(waiting), [], [], left)[0]:
                number, question, began = waiting[sock]
                try:
                    answer = sock.recv(4096)
                except OSError as error:
                    found[number] = str(error.strerror)
                else:
                    if len(answer) < 12 or answer[:2] != question[:2] or answer[2] < 0x80:
                        continue  # not the answer
                    found[number] = time.monotonic() - began, answer[3] & 15
                del waiting[sock]
                sock.close()
        return found
    finally:
        for sock in waiting:
            sock.close()


def subnet(network: Network, now: Snapshot) -> Result:
    """Whether guests take addresses of the host's networks for their neighbours'."""
    found = routes.clashes(network.subnet, now.routes)
    if not found:
        return Result(name="subnet", state="ok", text=f"no route of this host leads into {network.subnet}")
    text = f"{network.subnet} is also {', '.join(map(str, found[:3]))}: guests cannot reach that"
    try:
        other = routes.free_subnet(now.routes)
    except ConfigError as error:
        return Result(name="subnet", state="warn", text=text, advice=str(error))
    if routes.clashes(other, now.routes):
        only_wide = all(route.destination.prefixlen <= 16 for route in found)
        advice = "every private network is routed here" + ("" if only_wide else f"; --subnet {other} hides the least")
        return Result(name="subnet", state="warn", text=text, advice=advice)
    return Result(name="subnet", state="fail", text=text, advice=f"use --subnet {other}, or --subnet auto")


def egress(network: Network, now: Snapshot) -> Result:
    """The way out and its MTU."""
    way = now.egress
    if way is None:
        return Result(
            name="egress",
            state="warn",
            text="this host has no IPv4 default route; guests reach what it reaches",
            advice="connect it to a network",
        )
    six = "with IPv6" if now.ipv6_route else "without IPv6"
    text = f"out by {way.interface}, MTU {way.mtu}, {six}"
    if way.mtu < SMALL_MTU:
        advice = (
            "unusually small: is it a tunnel in a tunnel? UDP with large datagrams (QUIC, WireGuard) may fail there"
        )
        return Result(name="egress", state="warn", text=text, advice=advice)
    if way.mtu < network.mtu:
        text += (
            f"; guests have {network.mtu}: TCP fits by itself, of datagrams they are told; `--mtu auto` says it at once"
        )
    return Result(name="egress", state="ok", text=text)


# What this user may do.


def ping() -> Result:
    """Whether echo requests of guests can be passed on."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError as error:
        words = Path("/proc/sys/net/ipv4/ping_group_range")
        allowed = f"; net.ipv4.ping_group_range is {' '.join(words.read_text().split())}" if words.exists() else ""
        return Result(
            name="ping",
            state="warn",
            text=f"this user may not ping ({error.strerror}{allowed}), so guests cannot either, beyond the gateway",
            advice=f'as root: sysctl -w net.ipv4.ping_group_range="{os.getegid()} {os.getegid()}"',
        )
    return Result(name="ping", state="ok", text="pings of guests are passed on")


def descriptors(network: Network) -> Result:
    """Each TCP flow and each UDP mapping is a descriptor."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Result(name="descriptors", state="ok", text="no limit of open files")
    few = hard < FEW_DESCRIPTORS
    return Result(
        name="descriptors",
        state="warn" if few else "ok",
        text=f"up to {hard} open files: guests may have about {max(0, hard - network.limits.descriptor_reserve)} flows",
        advice="raise it: `ulimit -Hn 65536` as root, or LimitNOFILE=65536 in a systemd unit" if few else "",
    )


def clock() -> Result:
    """Whether the host itself knows what time it is, since guests ask it."""
    if not (LINUX and struct.calcsize("l") == 8):
        return Result(name="clock", state="ok", text="this system does not say whether its clock is synchronised")
    timex = ctypes.create_string_buffer(_TIMEX_OCTETS)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state < 0:
        return Result(name="clock", state="warn", text=f"adjtimex: {os.strerror(ctypes.get_errno())}")
    if state == _TIME_ERROR:
        return Result(
            name="clock",
            state="warn",
            text="this host's clock is not synchronised; guests get its time",
            advice="run chrony, systemd-timesyncd or another NTP client on it",
        )
    (error_us,) = struct.unpack_from("=q", timex, _ERROR_AT)
    return Result(name="clock", state="ok", text=f"synchronised, right within about {error_us / 1000:.3g} ms")


def state_directory(path: Path) -> Result:
    """Where leases and forwards are kept, and the control socket is. Nothing is made."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    found = there.stat()
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} cannot be written by this user"
    elif there == path and found.st_mode & 0o002:
        why = f"{path} can be written by anybody"
    else:
        new = "" if there == path else " (to be made)"
        return Result(name="state", state="ok", text=f"leases and forwards are kept in {path}{new}")
    return Result(
        name="state",
        state="fail",
        text=f"{why}: leases and forwards would not outlive a restart, and there is no control socket",
        advice="give --state-dir a directory of this user",
    )


def namespaces() -> Result:
    """Whether `pyvpnkit shell` has what it needs; tried in a process of its own."""
    if not LINUX:
        return Result(name="shell", state="ok", text="`pyvpnkit shell` is for Linux; `pyvpnkit run` works here")
    number = _unshare(_NEWNS_NEWNET) if os.geteuid() == 0 else errno.EPERM
    if number == errno.EPERM:  # a user, or root in a container, which may still have a user namespace
        number = _unshare(_NEWNS_NEWNET | _NEWUSER)
    if not number:
        return Result(name="shell", state="ok", text="`pyvpnkit shell` can have its namespaces")
    forbidding = [
        f"{name.replace('/', '.')}={permitting}"
        for name, (value, permitting) in _SWITCHES.items()
        if _sysctl_numbers(name) == [value]
    ]
    return Result(
        name="shell",
        state="warn",
        text=f"`pyvpnkit shell` cannot have namespaces here ({os.strerror(number)}); `pyvpnkit run` needs none",
        advice=f"as root: sysctl -w {' '.join(forbidding)}" if forbidding else "in a container, permit it unshare(2)",
    )


def _unshare(flags: int) -> int:
    """The errno of an attempt, 0 for none."""
    words = [sys.executable, "-I", "-S", "-c", _UNSHARE, str(flags)]
    return subprocess.run(words, check=False, capture_output=True).returncode


def tun(path: str = "/dev/net/tun") -> Result:
    """Whether TAP devices can be had."""
    if not LINUX:
        return Result(name="tun", state="ok", text="links of kind tap are for Linux")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Result(
            name="tun",
            state="warn",
            text=f"{path}: {error.strerror}; links of kind tap cannot be had, all others can",
            advice="as root: modprobe tun; in a container, pass the device in (--device /dev/net/tun)",
        )
    return Result(name="tun", state="ok", text=f"{path} can be opened")


def ports(publish: Sequence[PublishSpec] = ()) -> Iterator[Result]:
    """Source ports for guests' connections, and host ports that need a privilege."""
    range_ = _sysctl_numbers("net/ipv4/ip_local_port_range")
    if len(range_) == 2:
        count = range_[1] - range_[0] + 1
        few = count < FEW_PORTS
        yield Result(
            name="ports",
            state="warn" if few else "ok",
            text=f"{count} source ports ({range_[0]}-{range_[1]}): as many connections to one server at a time",
            advice='as root: sysctl -w net.ipv4.ip_local_port_range="32768 60999"' if few else "",
        )
    start = (_sysctl_numbers("net/ipv4/ip_unprivileged_port_start") or [1024])[0]
    needing = [str(spec) for spec in publish if _lowest_port(spec) < start]
    if needing and LINUX and os.geteuid() != 0:
        yield Result(
            name="ports",
            state="warn",
            text=f"only root may publish ports below {start}: {', '.join(needing[:4])}",
            advice=f"as root: sysctl -w net.ipv4.ip_unprivileged_port_start={min(map(_lowest_port, publish))}; "
            "or start as root with --user",
        )


def _lowest_port(spec: PublishSpec) -> int:
    return spec.port or 1 << 16


def _sysctl_numbers(name: str) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/sys/{name}").read_text().split()]
    except (OSError, ValueError):
        return []
