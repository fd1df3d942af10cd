"""What the supervisor itself serves: docker.sock, the control port that the guest dials, the guest's time after the host slept."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from netstack.errors import ConfigError, HostError
from vm.api import StateDir, Vsock
from vm.docker_socket import DOCKER, PING, Dial, DockerSocket
from vm.http_probe import answers
from vm.settings import VmSettings
from vm.splice import splice
from vm.supervisor import probes
from vm.supervisor.design import Design
from vm.supervisor.network import Network
from vm.timesync import TimeSync
from vm.vsock.api.kinds import vsock_for

if TYPE_CHECKING:
    from vm.supervisor.supervisor import Supervisor


def vsock(design: Design) -> Vsock | None:
    """The machine's streams; `None` where it has none."""
    spec, kind = design.spec.vsock, design.plan.vsock
    return vsock_for(kind, spec) if spec is not None and kind is not None else None


async def serve_control(supervisor: Supervisor, streams: Vsock, stack: contextlib.AsyncExitStack) -> None:
    """What the guest dials at `control` leads to the network, which serves a guest's own forwards there."""
    spec = supervisor.design.spec.vsock
    if spec is None or "control" not in spec.served or supervisor.design.network is None:
        return
    path = supervisor.home.state.socket("port.sock")

    async def carry(guest: socket.socket) -> None:
        there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            there.setblocking(False)
            there.connect(str(path))  # of a Unix socket: done at once, or refused
        except OSError as error:
            there.close()
            raise HostError(f"{path}: {error.strerror}") from None
        await splice(guest, there)

    listening = await streams.serve(spec.served["control"], carry)
    stack.push_async_callback(listening.close)


def console_log(supervisor: Supervisor) -> probes.ConsoleLog | None:
    """Where the probe looks at what the console says."""
    kind, _, pattern = supervisor.settings.probe.partition(":")
    return probes.ConsoleLog(supervisor.home.state.console_log, pattern) if kind == "console" else None


def docker_path(settings: VmSettings, state: StateDir) -> Path:
    """Where docker.sock is: in the state directory, unless the file says an absolute path."""
    wanted = settings.docker.path if settings.docker is not None else None
    return state.path / wanted if wanted is not None else state.docker


def probe(supervisor: Supervisor, streams: Vsock | None, console: probes.ConsoleLog | None) -> probes.Probe | None:
    """What is tried until it says that the machine is ready; `None`: it is ready as soon as it runs."""
    text = supervisor.settings.probe
    nics = supervisor.design.spec.nics
    mac = nics[0].mac if nics else None
    dial = _docker(supervisor, streams)
    match text.partition(":")[0]:
        case "lease" if mac:
            return probes.lease(supervisor.network, mac, supervisor.lease_before)
        case "docker" if dial is not None:
            return lambda: answers(dial, PING, server=DOCKER)
        case "tcp" if mac:
            return probes.tcp(supervisor.network, mac, probes.number(text))
        case "vsock" if streams is not None:
            return probes.vsock(streams, probes.number(text))
        case "console" if console is not None:
            return console.probe
        case "none":
            return None
    raise ConfigError(f"ready: {text}: this machine has nothing that it could ask")


def _docker(supervisor: Supervisor, streams: Vsock | None) -> Dial | None:
    """How the guest's Docker is reached; `None` where it is not wanted."""
    docker = supervisor.settings.docker
    nics = supervisor.design.spec.nics
    if docker is None:
        return None
    if docker.tcp is not None and nics and nics[0].mac:
        return _by_network(supervisor.network, nics[0].mac, docker.tcp)
    if streams is None:
        raise ConfigError(f"docker_socket: {supervisor.design.plan.driver} has no vsock; give tcp: PORT of the guest")
    port = supervisor.settings.vsock_ports["docker"]
    return lambda: streams.dial(port)


def _by_network(network: Network, mac: str, port: int) -> Dial:
    async def dial() -> socket.socket:
        address = await network.address(mac)
        if address is None:
            raise HostError("the guest has no address yet")
        return await network.dial(address, port)

    return dial


async def serve_host(supervisor: Supervisor, streams: Vsock | None) -> None:
    """docker.sock, and the guest's time. What cannot be had is degraded."""
    settings, outside = supervisor.settings, supervisor.outside
    dial = _docker(supervisor, streams)
    if supervisor.docker is not None:
        supervisor.docker.ready()
    elif dial is not None:
        path = docker_path(settings, supervisor.home.state)
        try:
            supervisor.docker = DockerSocket(path, dial)
        except ConfigError as error:
            supervisor.degrade("docker_socket", str(error).removeprefix("docker_socket: "))
        else:
            supervisor.journal.add("published", f"docker.sock is {path}")
    port = settings.vsock_ports.get("timesync")
    if settings.timesync and streams is not None and port is not None:
        time = TimeSync(lambda: streams.dial(port))
        outside.push_async_callback(time.close)


def link_console(supervisor: Supervisor, stack: contextlib.AsyncExitStack) -> None:
    """Further names of the console and of its log, relative to the state directory."""
    state, wanted = supervisor.home.state, supervisor.settings.console
    for word, target in ((wanted.path, state.console), (wanted.log, state.console_log)):
        path = state.path / word if word is not None else target
        if path == target:
            continue
        try:
            if path.is_symlink():
                path.unlink()
            path.symlink_to(target)
        except OSError as error:
            supervisor.degrade(f"console {path}", f"{path}: {error.strerror}; nothing but a link may be there")
            continue
        stack.callback(path.unlink, missing_ok=True)
