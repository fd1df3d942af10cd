"""Our `dns/` has no `__init__.py` and shares the name with dnspython: both work, however they were installed.

Each case runs in a scratch environment, so that nothing of the one that runs the tests can help.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE_BOTH = """
import netstack
import dns.resolver, dns.message, dns.query                   # dnspython's
from dns import codec, forwarder, hosts, records, server, system, upstream, watch   # ours
message = dns.message.make_query("host.internal", "A").to_wire()
answers = []
names = {"host.internal": [bytes([192, 168, 65, 2])]}
server.Server(names=names, hosts_path=None, resolv_conf=None).datagram(message, None, answers.append)
print(dns.message.from_wire(answers[0]).answer[0])
print("dnspython", dns.__file__)
print("ours", codec.__file__)
"""

USE_OURS = """
import netstack
from dns import codec, server
print("ours", codec.__file__)
"""

LATE = (
    """
import dns.name                                               # dnspython was imported before us
"""
    + USE_BOTH
)


def run(*command: str | Path, path: Path | None = None, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_REQUIRE"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout has, so that building leaves nothing in ours."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for package in ("pyvpnkit", "netstack", "dns", "ntp", "portfwd", "vm"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with dnspython and what builds a wheel."""
    place = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    try:
        run(python, "-m", "pip", "install", "--no-deps", "dnspython", "setuptools>=70.1")
    except AssertionError as error:
        if "connection" in str(error).lower() or "no matching distribution" in str(error).lower():
            pytest.skip("pip cannot reach a package index")
        raise
    return python


def test_both_from_a_checkout(python: Path, checkout: Path, tmp_path: Path) -> None:
    for script in (USE_BOTH, LATE):
        printed = run(python, "-c", script, path=checkout, cwd=tmp_path)
        assert "host.internal. 0 IN A 192.168.65.2" in printed
        assert f"ours {checkout}" in printed
        assert "site-packages" in printed.partition("dnspython ")[2].partition("\n")[0]


@pytest.fixture(scope="module")
def wheel(python: Path, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, checkout)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_our_modules_and_no_package_file(python: Path, wheel: Path) -> None:
    names = run(python, "-m", "zipfile", "-l", wheel).split()
    ours = {f"dns/{module.name}" for module in (ROOT / "dns").glob("*.py")}
    assert len(ours) > 5
    assert ours <= set(names)
    assert "dns/__init__.py" not in names


def test_no_module_of_ours_has_a_name_of_theirs(python: Path) -> None:
    theirs = Path(run(python, "-c", "import dns; print(dns.__file__)").strip()).parent
    assert not {module.stem for module in theirs.iterdir()} & {module.stem for module in (ROOT / "dns").glob("*.py")}


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_both_installed(python: Path, wheel: Path, checkout: Path, tmp_path: Path, editable: bool) -> None:
    how = ("--no-build-isolation", "-e", checkout) if editable else (wheel,)
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", *how)
    try:
        for script in (USE_BOTH, LATE):
            printed = run(python, "-c", script, cwd=tmp_path)
            assert "host.internal. 0 IN A 192.168.65.2" in printed
            assert ("ours " + str(checkout if editable else python.parents[1])) in printed
        run(python, "-m", "pip", "uninstall", "-y", "dnspython")
        assert "ours " in run(python, "-c", USE_OURS, cwd=tmp_path), "ours alone"
    finally:
        run(python, "-m", "pip", "uninstall", "-y", "pyvpnkit")
        run(python, "-m", "pip", "install", "--no-deps", "dnspython")
    run(python, "-c", "import dns.resolver", cwd=tmp_path)


def test_ours_alone_from_a_checkout(checkout: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    assert f"ours {checkout}" in run(tmp_path / "bare" / "bin" / "python", "-c", USE_OURS, path=checkout, cwd=tmp_path)
