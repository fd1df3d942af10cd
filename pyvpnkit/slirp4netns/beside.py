"""What slirp4netns does besides: configures the interface, serves its API, ends with a descriptor, gives up capabilities."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from netstack.errors import ConfigError, HostError
from netstack.link.listening import UnixSocket
from netstack.link.namespace import namespace_paths, open_inside
from netstack.link.tap import bring_up
from pyvpnkit.service import Service
from pyvpnkit.slirp4netns.api import Api
from pyvpnkit.slirp4netns.command import guest_of, network_of
from vm.accepting import Acceptor

CLIENTS: Final = 16
"""Of the API, at once."""

_SIOCADDRT: Final = 0x890B
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_RTF_UP_GATEWAY: Final = 3
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAP_NET_BIND_SERVICE: Final = 1 << 10
_CAPABILITIES: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


@contextlib.asynccontextmanager
async def beside(parsed: argparse.Namespace, service: Service) -> AsyncIterator[None]:
    """`pyvpnkit.daemon.Beside`. Raises `ConfigError` and `HostError`."""
    network = network_of(parsed.cidr)
    async with contextlib.AsyncExitStack() as undo:
        if parsed.configure and parsed.netns_type != "tapfd" and parsed.target_type == "netns":
            configure(parsed, network)
        if parsed.api_socket is not None:
            bound = UnixSocket(parsed.api_socket, socket.SOCK_STREAM, setting="--api-socket")
            undo.callback(bound.close)
            api = Api(service.registry, str(guest_of(network)))
            undo.push_async_callback(Acceptor(bound.sock, api.serve, name="api-socket", limit=CLIENTS).close)
        if parsed.exit_fd is not None:
            _end_with(parsed.exit_fd)
        if parsed.enable_sandbox:
            give_up_capabilities()
        yield


def configure(parsed: argparse.Namespace, network: IPv4Network) -> None:
    """Give the interface in the namespace its address and the default route. Raises `HostError`."""

    def task() -> int:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bring_up(made, "lo")
        _set_address(made, _SIOCSIFADDR, parsed.tap, guest_of(network))
        _set_address(made, _SIOCSIFNETMASK, parsed.tap, network.netmask)
        _default_route(made, network.network_address + 2)
        return made.detach()

    try:
        kind = "pid" if parsed.netns_type == "pid" else "netns"
        target = parsed.target if kind == "pid" else os.path.abspath(parsed.target)
        os.close(open_inside(namespace_paths(kind, target, parsed.userns_path), task))
    except (OSError, ConfigError) as error:
        raise HostError(f"--configure: {parsed.tap}: {error}") from None


def _sockaddr(address: IPv4Address) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, address.packed)


def _set_address(sock: socket.socket, request: int, name: str, address: IPv4Address) -> None:
    fcntl.ioctl(sock, request, struct.pack("16s16s8x", name.encode(), _sockaddr(address)))


def _default_route(sock: socket.socket, gateway: IPv4Address) -> None:
    """struct rtentry of <linux/route.h>, on 64 and 32 bits alike: native sizes and alignment."""
    nowhere = _sockaddr(IPv4Address(0))
    entry = struct.pack("@L16s16s16sHhLPhP4x", 0, nowhere, _sockaddr(gateway), nowhere, _RTF_UP_GATEWAY, 0, 0, 0, 0, 0)
    fcntl.ioctl(sock, _SIOCADDRT, entry.ljust(128, b"\0"))


def _end_with(descriptor: int) -> None:
    """SIGTERM to ourselves when the other end is closed. Raises `ConfigError`."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        try:
            if os.read(descriptor, 4096):
                return  # what is said there means nothing
        except BlockingIOError:
            return
        except OSError:
            pass
        loop.remove_reader(descriptor)
        signal.raise_signal(signal.SIGTERM)

    try:
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
        loop.add_reader(descriptor, look)
    except OSError as error:
        raise ConfigError(
            f"--exit-fd {descriptor}: {error.strerror}; give a descriptor whose other end will be closed"
        ) from None


def give_up_capabilities() -> None:
    """Keep none but that of binding low ports, and never get any again. Raises `HostError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITIES, 0)
    current = ctypes.create_string_buffer(24)
    if libc.capget(ctypes.create_string_buffer(header), current) == 0:
        permitted = struct.unpack("=6I", current.raw)[1]
        kept = permitted & _CAP_NET_BIND_SERVICE
        data = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
        if (
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            and libc.capset(ctypes.create_string_buffer(header), data) == 0
        ):
            return
    raise HostError(f"--enable-sandbox: {os.strerror(ctypes.get_errno())}; leave it out where that is forbidden")
