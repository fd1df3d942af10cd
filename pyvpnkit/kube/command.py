"""The command line of `pyvpnkit kube-forwarder`.

What it takes to run is imported only then: every command's options are added whenever any is given.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from netstack.errors import ConfigError
from pyvpnkit.kube.engine import ANNOTATION, ANY, RESYNC_S, Engine

if TYPE_CHECKING:
    from pyvpnkit.kube.forwarder import Forwarder

HELP: Final = (
    "publish a Kubernetes cluster's NodePort and LoadBalancer Services on the host (VPNKit's kube-vpnkit-forwarder)"
)
EXAMPLES: Final = """\
examples:
  pyvpnkit kube-forwarder                                     the daemon of this host, the cluster of ~/.kube/config
  pyvpnkit kube-forwarder -control 4098                       in the VM, the host's control API over vsock
  pyvpnkit kube-forwarder --kubeconfig admin.conf --namespace web --bind 127.0.0.1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; those of the original with one dash too."""
    parser.add_argument(
        "-control",
        "--control",
        "-path",
        "--path",
        metavar="ADDRESS",
        help="of the host's control API: PORT or CID/PORT (vsock), unix:PATH or a path, tcp:IP:PORT, fd:N; "
        "without it the daemon's own control socket",
    )
    parser.add_argument(
        "--kubeconfig",
        metavar="FILE",
        default="",
        help="of the cluster; without it the pod's service account, or the default of kubectl",
    )
    parser.add_argument("--context", metavar="NAME", default="", help="of the kubeconfig")
    parser.add_argument(
        "--namespace", metavar="NAME", default="", help="whose Services alone are published; without it all"
    )
    parser.add_argument(
        "--resync", metavar="SECONDS", default=f"{RESYNC_S:g}", help="how often all is compared anew (30)"
    )
    parser.add_argument("--bind", metavar="IP", default=ANY, help=f"of the host that the ports are opened on ({ANY})")
    parser.add_argument(
        "--annotation",
        metavar="TEXT",
        default=ANNOTATION,
        help=f"by which ports are known as ours ({ANNOTATION}); give each of several forwarders its own",
    )


def run(parsed: argparse.Namespace) -> int:
    """Until SIGINT or SIGTERM; 0. Raises `ConfigError`."""
    import asyncio
    import logging

    forwarder = _forwarder(parsed)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    return asyncio.run(_until_signal(forwarder))


def _forwarder(parsed: argparse.Namespace) -> Forwarder:
    from portfwd.invm.ports import checked_ip
    from portfwd.invm.transport import Address
    from pyvpnkit.commands.client import control_path
    from pyvpnkit.kube.cluster import Cluster, connect
    from pyvpnkit.kube.forwarder import ControlHost, Forwarder
    from pyvpnkit.values import seconds

    # The path of the daemon's socket may look like a number; what is given is read as the tools in the VM do.
    address = Address.parse(parsed.control) if parsed.control else Address("unix", path=control_path(None))
    try:
        resync_s = seconds(parsed.resync)
    except ConfigError as error:
        raise ConfigError(f"--resync: {error}") from None
    if resync_s < 1:
        raise ConfigError(f"--resync {parsed.resync}: write at least 1 second")
    if not parsed.annotation:
        raise ConfigError("--annotation is empty, so every port of the host would pass for ours; leave it out")
    engine = Engine(annotation=parsed.annotation, bind=checked_ip("bind", parsed.bind))
    cluster = Cluster(
        connect(parsed.kubeconfig, parsed.context), namespace=parsed.namespace, component=parsed.annotation
    )
    return Forwarder(cluster, ControlHost(address), engine, resync_s=resync_s)


async def _until_signal(forwarder: Forwarder) -> int:
    import asyncio
    import contextlib
    import signal

    running = asyncio.ensure_future(forwarder.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return 0
