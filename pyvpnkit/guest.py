"""A guest without a machine: processes in network and mount namespaces whose only network is our stack (Linux).

    parent (the stack)                       keeper (the guest)
    Guest.start ── fork ───────────────────> unshare: user (unless root), network, mount
                                             TAP eth0; else a veth pair: eth0 here, the other end in
      <── the link's descriptor ───────────  a network namespace of its own that only the socket holds
    serves the link; DHCP, DNS, ... answer   DHCP, address, route, /etc/resolv.conf
      <── the lease ───────────────────────  starts the task, keeps its processes (`pyvpnkit.keeper`)
      <── its status ──────────────────────  waits, so that the namespace's last octets can still leave
    closes the channel ────────────────────> ends

An ordinary user becomes root of a user namespace in which nobody else is mapped. All namespaces are anonymous: they end
with the last process or descriptor in them. Nothing is written to any disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

from netstack.api import Link
from netstack.errors import ConfigError, HostError, NetstackError
from pyvpnkit.dhcp_client import DhcpClient, GaveUp, Lease
from pyvpnkit.keeper import die_with_parent, keep

IFNAME: Final = "eth0"
HOSTNAME: Final = "guest"
"""What the guest calls itself to DHCP: other guests find it as `guest.internal`."""
LINK_KINDS: Final = ("auto", "tap", "packet")
LINK_VARIABLE: Final = "PYVPNKIT_SHELL_LINK"
"""Environment variable that asks for one kind of link; for tests and comparisons."""

RETRY_RENEWAL_S: Final = 60.0

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MS_SLAVE: Final = 1 << 19
_MNT_DETACH: Final = 2
_MAX_MESSAGE: Final = 1 << 16

_SWITCHES: Final[Mapping[str, tuple[str, str]]] = {
    "kernel/unprivileged_userns_clone": ("0", "1"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "user/max_user_namespaces": ("0", "15000"),
    "user/max_net_namespaces": ("0", "15000"),
    "user/max_mnt_namespaces": ("0", "15000"),
}
"""Sysctls that forbid namespaces: the value that does, and one that does not."""

Task: TypeAlias = Callable[[], int]
"""What runs in the guest: a function that returns an exit status, or becomes another program."""


def need_linux() -> None:
    """Raises `HostError` elsewhere."""
    if sys.platform != "linux":
        raise HostError("a guest without a machine needs Linux (namespaces); attach a machine with 'pyvpnkit run'")


class Guest:
    """The parent's end. A context manager: leaving it ends the guest, however far it got."""

    def __init__(self, pid: int, channel: socket.socket, kind: str, link: Link) -> None:
        self.pid = pid
        self.kind = kind
        """`tap` or `packet`."""
        self.link = link
        """Open, for the stack to own."""
        self._channel = channel
        self._status: int | None = None

    @classmethod
    def start(cls, task: Task, *, mtu: int, grace_s: float, kind: str | None = None) -> Guest:
        """Fork the guest and wait for its link; `task` starts once it has a lease. Call it before there are threads.

        `kind` is one of `LINK_KINDS`. Raises `HostError` when namespaces or a link are not to be had, with what to change.
        """
        need_linux()
        kind = kind or os.environ.get(LINK_VARIABLE) or "auto"
        if kind not in LINK_KINDS:
            raise ConfigError(f"{LINK_VARIABLE}: {kind!r} is unknown; use one of {', '.join(LINK_KINDS)}")
        _ip()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            status = 125
            try:
                ours.close()
                status = _be_the_guest(theirs, task, mtu, grace_s, kind)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        theirs.close()
        try:
            data, fds, _flags, _address = socket.recv_fds(ours, _MAX_MESSAGE, 1)
            if not data:
                raise HostError("the guest ended before it had a link")
            message = json.loads(data)
            if not fds:
                raise HostError(message["error"])
            ours.setblocking(False)
            return cls(pid, ours, message["link"], _adopt(message["link"], fds[0], mtu))
        except BaseException:
            ours.close()
            os.waitpid(pid, 0)
            raise

    async def lease(self) -> Lease | None:
        """Wait until the guest has its address; None when it ended before. Raises `HostError`."""
        message = await self._next()
        if message is None:
            return None
        if "error" in message:
            raise HostError(message["error"])
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in message["lease"].items()
        }
        return Lease(**fields)

    async def task_status(self) -> int | None:
        """Wait until the task and all it started have ended; its status, 128+n for a signal, None when the guest died."""
        message = await self._next()
        return None if message is None else int(message["status"])

    async def _next(self) -> dict[str, Any] | None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._channel, _MAX_MESSAGE)
        except ConnectionResetError:
            data = b""
        return json.loads(data) if data else None

    def signal(self, number: int) -> None:
        """Pass a signal on to the task."""
        if self._status is None:
            os.kill(self.pid, number)

    def close(self) -> int:
        """End the guest, with all its processes, and return its exit status. Harmless when repeated."""
        if self._status is None:
            self._channel.close()
            # Wakes the keeper where it is busy; it sees then that nobody listens any more.
            os.kill(self.pid, signal.SIGTERM)
            _pid, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self._status = code if code >= 0 else 128 - code
        return self._status

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self.link.close()


def _adopt(kind: str, fd: int, mtu: int) -> Link:
    if kind == "tap":
        from netstack.link.tap import adopt_tap

        return adopt_tap(fd, name=f"tap:{IFNAME}", mtu=mtu)
    from netstack.link.packet import PacketLink

    return PacketLink(socket.socket(fileno=fd), f"packet:{IFNAME}", mtu=mtu, vnet=True)


# The child's side, in order.


def _be_the_guest(channel: socket.socket, task: Task, mtu: int, grace_s: float, kind: str) -> int:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    try:
        enter_namespaces()
        kind, fd = _open_link(kind, mtu)
    except (OSError, NetstackError) as error:
        _tell(channel, error=str(error))
        return 1
    die_with_parent(signal.SIGTERM)
    socket.send_fds(channel, [json.dumps({"link": kind}).encode()], [fd])
    os.close(fd)
    client = DhcpClient(IFNAME, hostname=HOSTNAME, give_up=channel.fileno())
    try:
        lease = client.acquire()
        _configure(lease, mtu)
        _use_resolvers(lease)
    except GaveUp:
        return 1
    except (OSError, NetstackError) as error:
        _tell(channel, error=str(error))
        return 1
    _tell(channel, lease=asdict(lease))

    def renew() -> float:
        try:
            return client.renew(lease).lease_s / 2
        except (OSError, HostError, GaveUp):
            return RETRY_RENEWAL_S

    status = keep(task, channel, grace_s=grace_s, renew_after_s=lease.lease_s / 2, renew=renew)
    _tell(channel, status=status)
    with contextlib.suppress(OSError):
        channel.recv(1)  # the parent's end of file: the last octets have left the namespace
    return status


def _tell(channel: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):  # a parent that is gone needs to know nothing
        channel.send(json.dumps(message).encode())


def _libc(name: str, *arguments: Any) -> None:
    """A call of the C library that Python lacks. Raises `OSError`."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _libc("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def enter_namespaces() -> None:
    """Have user (unless root), network and mount namespaces of one's own. Raises `HostError` with what to change."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid != 0 or not _unshared_as_root():
            _libc("unshare", _CLONE_NEWUSER)
            with contextlib.suppress(FileNotFoundError):
                _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
            _libc("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
    except OSError as error:
        raise HostError(_forbidden(error)) from None
    with contextlib.suppress(OSError):  # there is no IPv6 network behind the interface to come, so none should be seen
        _write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
    # What the host mounts later should appear here, what we mount must not appear there.
    _mount("none", "/", "", _MS_REC | _MS_SLAVE)


def unshare_network() -> None:
    """Another network namespace, for who is root in this one. Raises `OSError`."""
    _libc("unshare", _CLONE_NEWNET)


def _unshared_as_root() -> bool:
    """False for a root without CAP_SYS_ADMIN, as in most containers: it may still have a user namespace."""
    try:
        _libc("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
    except PermissionError:
        return False
    return True


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _forbidden(error: OSError) -> str:
    """Why there are no namespaces, as far as the kernel's switches tell, and what to do."""
    what = "an unprivileged user namespace" if os.getuid() != 0 else "a network namespace"
    remedies = []
    for name, (forbidding, permitting) in _SWITCHES.items():
        with contextlib.suppress(OSError):
            if Path("/proc/sys", name).read_text().strip() == forbidding:
                remedies.append(f"sysctl -w {name.replace('/', '.')}={permitting}")
    if not remedies:
        remedies.append(
            "in a container, start it with --privileged, or with a seccomp and AppArmor profile that permits unshare"
        )
    if os.getuid() != 0:
        remedies.append("or run this as root")
    number = error.errno or errno.EPERM
    return f"this system does not permit {what} ({os.strerror(number)}). What helps: {'; '.join(remedies)}"


def _ip() -> str:
    found = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise HostError("'ip' is not to be found, and sets up the guest's interface; install the package iproute2")
    return found


def run_ip(*commands: str, pass_fds: tuple[int, ...] = ()) -> None:
    """Commands of ip(8), in one process. Raises `HostError` with what it says."""
    done = subprocess.run(
        [_ip(), "-batch", "-"],
        input="\n".join((*commands, "")),
        capture_output=True,
        text=True,
        check=False,
        pass_fds=pass_fds,
    )
    if done.returncode:
        raise HostError(f"ip: {done.stderr.strip().splitlines()[0] if done.stderr else done.returncode}")


def _open_link(kind: str, mtu: int) -> tuple[str, int]:
    """What the link became, and its descriptor."""
    if kind != "packet":
        from netstack.link.tap import open_tap

        try:
            link = open_tap(IFNAME, mtu=mtu)
        except ConfigError:
            if kind == "tap":
                raise
        else:
            fd = os.dup(link.fileno())
            link.close()
            return "tap", fd
    return "packet", _open_packet(mtu)


def _open_packet(mtu: int) -> int:
    from netstack.link.packet import packet_socket

    guest = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Our end is in a namespace of its own, out of the guest's reach.
        _libc("unshare", _CLONE_NEWNET)
        with contextlib.suppress(OSError):  # or the kernel would talk on it
            _write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
        run_ip(
            f"link add link0 mtu {mtu} type veth peer name {IFNAME} mtu {mtu} netns /proc/self/fd/{guest}",
            "link set link0 up",
            pass_fds=(guest,),
        )
        sock = packet_socket("link0")
        _libc("setns", guest, _CLONE_NEWNET)
    finally:
        os.close(guest)
    run_ip(f"link set {IFNAME} up")
    return sock.detach()


def _configure(lease: Lease, mtu: int) -> None:
    network = lease.interface.network
    run_ip(
        "link set lo up",
        f"link set {IFNAME} mtu {lease.mtu or mtu}",
        f"addr add {lease.interface} broadcast {network.broadcast_address} dev {IFNAME}",
        *([] if lease.router is None else [f"route add default via {lease.router}"]),
    )
    # Ping for programs that gave up root; one number where only our own user is mapped. Refused where /proc/sys is read-only.
    for groups in ("0 2147483647", "0 0"):
        try:
            _write("/proc/sys/net/ipv4/ping_group_range", groups)
            break
        except OSError:
            continue


def _use_resolvers(lease: Lease) -> None:
    """Make /etc/resolv.conf of this mount namespace name the lease's servers."""
    names = dict.fromkeys((*([lease.domain] if lease.domain else []), *lease.search))
    lines = [f"nameserver {server}" for server in lease.dns]
    if names:
        lines.append(f"search {' '.join(names)}")
    text = "".join(f"{line}\n" for line in ["# of this guest (pyvpnkit)", *lines])
    target = os.path.realpath("/etc/resolv.conf")
    parent = os.path.dirname(target)
    fresh = set()
    for directory in ("/run/systemd/resolve", "/run/nscd"):
        # The host's resolvers have their sockets there, and the C library would ask them first.
        if os.path.isdir(directory):
            _mount_scratch(directory)
            fresh.add(directory)
    if not os.path.exists(target) and parent not in fresh:
        if not os.path.isdir(parent) or parent in ("/", "/etc", "/run"):
            print("pyvpnkit: /etc/resolv.conf leads nowhere, so names are not resolved here", file=sys.stderr)
            return
        _mount_scratch(parent)
        fresh.add(parent)
    if parent in fresh:
        _make_file(target, text)
        return
    # A file of a file system that is mounted nowhere else: for a moment somewhere, then only where it is bound.
    scratch = next(place for place in ("/tmp", "/run") if not target.startswith(f"{place}/"))
    _mount_scratch(scratch)
    try:
        _make_file(f"{scratch}/resolv.conf", text)
        _mount(f"{scratch}/resolv.conf", target, "", _MS_BIND)
    finally:
        _libc("umount2", scratch.encode(), _MNT_DETACH)


def _mount_scratch(directory: str) -> None:
    _mount("tmpfs", directory, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=64k")


def _make_file(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w") as file:
        file.write(text)
