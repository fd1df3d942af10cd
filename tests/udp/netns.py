"""A small world of network namespaces for the host's side: `near` -- `router` -- `far`, as root.

    near 10.91.1.2 -- 10.91.1.1 router 10.91.2.1 -- 10.91.2.2 far

Only the sockets live there: `NetnsIO` steps into `near` while it makes one, so everything else is the test's own process.
The link behind the router has an MTU of 1280; the router prohibits 10.91.3.0/24, has no way to 10.91.4.0/24, and `near`
itself has none to anywhere else.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.udp.support import FailingIO

NEAR, ROUTER, FAR = "10.91.1.2", "10.91.1.1", "10.91.2.2"
NARROW = 1280
_CLONE_NEWNET = 0x40000000


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread's new sockets are made in `namespace`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            if libc.setns(home.fileno(), _CLONE_NEWNET):
                os.abort()  # lost in a namespace: nothing that follows could be believed


class NetnsIO(FailingIO):
    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        with inside(self.namespace):
            return super().socket(family, kind, protocol)


@contextmanager
def three_hops() -> Iterator[tuple[str, str]]:
    """Names of the namespaces `near` and `far`, wired as the module says."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 for network namespaces")
    near, router, far = (f"pvu{os.getpid()}{letter}" for letter in "nrf")
    try:
        for name in (near, router, far):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not to be had here: {error.stderr.strip()}")
            ip("-n", name, "link", "set", "dev", "lo", "up")
        ip("-n", near, "link", "add", "r", "type", "veth", "peer", "name", "n", "netns", router)
        ip("-n", far, "link", "add", "r", "mtu", str(NARROW), "type", "veth", "peer", "name", "f", "netns", router)
        for name, device, address in (
            (near, "r", f"{NEAR}/24"),
            (router, "n", f"{ROUTER}/24"),
            (router, "f", "10.91.2.1/24"),
            (far, "r", f"{FAR}/24"),
        ):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", "dev", device, "up")
        ip("-n", router, "link", "set", "dev", "f", "mtu", str(NARROW))
        ip("-n", near, "route", "add", "10.91.0.0/16", "via", ROUTER)
        ip("-n", far, "route", "add", "10.91.1.0/24", "via", "10.91.2.1")
        ip("-n", router, "route", "add", "prohibit", "10.91.3.0/24")
        for name, key, value in (
            (router, "ip_forward", "1"),
            (router, "icmp_ratelimit", "0"),
            (far, "icmp_ratelimit", "0"),
            (near, "ping_group_range", "0 2147483647"),
        ):
            with inside(name), open(f"/proc/sys/net/ipv4/{key}", "w") as file:
                file.write(value)
        yield near, far
    finally:
        for name in (near, router, far):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
