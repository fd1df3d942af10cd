"""`pyvpnkit kube-forwarder` as who types it sees it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from portfwd.invm.transport import FORMS
from portfwd.vpnkit_api import routes
from pyvpnkit.kube.command import EXAMPLES, HELP, add_arguments, run
from tests.roof.kube.fake_api import FakeApi, api_server, service
from tests.support.http_house import free_port, house, serving, until

PROGRAM = """
import argparse, sys
from pyvpnkit.kube.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(run(parser.parse_args()))
"""


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, epilog=EXAMPLES)
    add_arguments(parser)
    assert FORMS in " ".join(parser.format_help().split())
    return parser.parse_args(argv)


@pytest.mark.parametrize("flag", ["-control", "--control", "-path", "--path"])
def test_the_address_is_given_as_to_the_original(flag: str) -> None:
    assert parsed(flag, "/run/ctl").control == "/run/ctl"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--resync", "soon"], "--resync: 'soon' is not a time"),
        (["--resync", "0"], "--resync 0: write at least 1 second"),
        (["--bind", "everywhere"], "'everywhere' is no IP address"),
        (["--annotation", ""], "--annotation is empty"),
        (["--control", "tcp:localhost:1"], "'localhost' is no IP address"),
        (["--kubeconfig", "/nowhere"], "--kubeconfig /nowhere: "),
    ],
)
def test_what_cannot_be_used_is_named(argv: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(parsed("--control", "/run/ctl", *argv))
    assert complaint in str(caught.value)


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.client", None)
    with pytest.raises(ConfigError, match=r"run: pip install 'pyvpnkit\[kube\]'"):
        run(parsed("--control", "/run/ctl"))


def test_in_a_pod_the_service_account_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kubernetes", reason="kube-forwarder needs the extra kube")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(ConfigError, match="Service token file does not exist"):
        run(parsed("--control", "/run/ctl"))


async def test_it_runs_until_a_signal_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes", reason="kube-forwarder needs the extra kube")
    number = free_port()
    control = tmp_path / "control.sock"
    async with api_server() as api, house(allowed=("127.0.0.1",)) as made:
        await api.put(service("web", a={"port": number}))
        kubeconfig = await asyncio.to_thread(_written, tmp_path / "config", api)
        async with serving(control, routes(made.registry, via=lambda _: "stack", dump=lambda: None)):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, "--kubeconfig", kubeconfig, "--bind", "127.0.0.1"),
                # The daemon's own socket, as all commands find it.
                env={**os.environ, "PYVPNKIT_CONTROL": str(control)},
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                await until(lambda: api.ingress("default/web") is not None)
                assert [forward.spec.port for forward in made.registry] == [number]
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(30):
                    _, said = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            assert process.returncode == 0
            assert len(made.registry) == 0
    lines = said.decode().splitlines()
    port = f"vpnkit-k8s-controller tcp forward from 127.0.0.1:{number} to 10.96.0.1:{number}"
    assert lines == [f"http://127.0.0.1:{api.port}: 1 Services", f"Service default/web: {port}", f"closed: {port}"]


def _written(path: Path, api: FakeApi) -> str:
    path.write_text(api.kubeconfig)
    return str(path)
