"""Companions by name: ours, those of other packages, and what is said of those that are not or do not work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from vm import settings_file
from vm.api import FILESYSTEMS, HYPERVISORS
from vm.filesystems import registry as filesystems
from vm.hypervisors import registry
from vm.supervisor.design import design
from vm.supervisor.home import Home

GOOD = """
from vm.api import Caps

class Bhyve:
    name = "bhyve"
    caps = Caps(nics=frozenset({"tap"}))
    def plan(self, spec, state): ...
    async def start(self, plan, state): ...

MADE = Bhyve()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install(package, module's text, name="module:attribute", ...)`, as pip does."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(package: str, text: str, group: str = HYPERVISORS, **points: str) -> None:
        module = package.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(text)
        about = tmp_path / f"{module}-2.1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.1\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))

    return put


def test_ours_are_there_and_are_called_what_they_are_called() -> None:
    assert {"qemu", "hyperkit", "vfkit", "cloud-hypervisor", "firecracker", "crosvm", "fake"} <= set(registry.names())
    assert registry.load("qemu").name == "qemu"
    for kind in ("9p-local", "9p-socket", "9p-vsock", "virtiofs"):
        assert filesystems.load(kind).kind == kind


@pytest.mark.parametrize(
    ("name", "meant"), [("Qemu", ", did you mean 'qemu'?"), ("firecraker", "'firecracker'?"), ("bhyve", "")]
)
def test_an_unknown_name(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as told:
        registry.load(name)
    assert str(told.value).startswith(f"hypervisor {name!r}: there is none of that name")
    assert meant in str(told.value)
    assert ("did you mean" in str(told.value)) is bool(meant)
    assert str(told.value).endswith("(there are cloud-hypervisor, crosvm, fake, firecracker, hyperkit, qemu, vfkit)")


@pytest.mark.parametrize("attribute", ["Bhyve", "MADE"])
def test_that_of_another_package(install: Callable[..., None], attribute: str) -> None:
    install("their-driver", GOOD, bhyve=f"their_driver:{attribute}")
    assert "bhyve" in registry.names()
    assert registry.load("bhyve").name == "bhyve"


def test_a_file_system_of_another_package(install: Callable[..., None]) -> None:
    text = "class Nfs:\n    kind = 'nfs'\n    owners = frozenset()\n    def plan(self, share, state): ...\n"
    install("their-nfs", text, group="pyvpnkit.companions.filesystems", nfs="their_nfs:Nfs")
    assert str(filesystems.load("nfs").kind) == "nfs"
    with pytest.raises(ConfigError, match="hypervisor 'nfs'"):
        registry.load("nfs")


NFS = """
from vm.api import Endpoint, Sidecar

class Nfs:
    kind = "nfs"
    owners = frozenset({"passthrough"})
    def plan(self, share, state, index=0):
        server = Sidecar(name=f"share-{share.tag}", argv=("nfsd", str(share.source)))
        return Endpoint(share=share, sidecars=(server,), mount=f"mount -t nfs host: {share.target}")
"""


@pytest.mark.parametrize("driver", ["qemu", "firecracker", "fake"])
def test_a_machine_has_a_share_of_another_package(install: Callable[..., None], tmp_path: Path, driver: str) -> None:
    text = "boot: {kernel: k}\nshares: [{source: /src, target: /dst, kind: nfs, owner: passthrough}]\n"
    with pytest.raises(ConfigError, match=r"shares\.kind: 'nfs' is unknown"):
        settings_file.of_text(text, tmp_path / "vm.yml")
    install("their-nfs", NFS, group=FILESYSTEMS, nfs="their_nfs:Nfs")
    made = design(settings_file.of_text(text, tmp_path / "vm.yml"), Home(tmp_path / "s"), registry.load(driver))
    assert [one.argv for one in made.sidecars] == [("nfsd", "/src")]
    assert made.mounts == ("mount -t nfs host: /dst",)


@pytest.mark.parametrize(
    ("text", "attribute", "why"),
    [
        ("import no_such_module", "X", r"ModuleNotFoundError: No module named 'no_such_module'"),
        ("def", "X", "SyntaxError"),
        ("", "X", "has no attribute 'X'"),
        ("class X:\n    def __init__(self): raise KeyError('HOME')", "X", "KeyError: 'HOME'"),
        ("class X:\n    name = 'x'\n    caps = None", "X", "it has no plan, start"),
        ("import sys\nsys.exit(3)", "X", "SystemExit"),
    ],
)
def test_a_broken_one_is_said_to_be_whose_it_is(
    install: Callable[..., None], text: str, attribute: str, why: str
) -> None:
    install("their-broken", text, broken=f"their_broken:{attribute}")
    assert "broken" in registry.names(), "listing imports nothing"
    with pytest.raises(ConfigError, match=why) as told:
        registry.load("broken")
    assert f"hypervisor 'broken' of their-broken 2.1 (their_broken:{attribute})" in str(told.value)
    assert registry.load("qemu").name == "qemu"


def test_ours_are_not_replaced(install: Callable[..., None]) -> None:
    install("their-qemu", GOOD.replace('"bhyve"', '"theirs"'), qemu="their_qemu:MADE")
    assert registry.load("qemu").name == "qemu"
    assert registry.names().count("qemu") == 1


def test_two_of_one_name(install: Callable[..., None]) -> None:
    install("one", GOOD, bhyve="one:MADE")
    install("another", GOOD, bhyve="another:MADE")
    with pytest.raises(ConfigError, match=r"both another 2\.1 and one 2\.1 have one of that name; uninstall one"):
        registry.load("bhyve")
