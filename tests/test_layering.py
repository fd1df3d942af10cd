"""Imports point down: who may import whom in this project, read from the sources."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
OURS: Final = ("pyvpnkit", "netstack", "dns", "ntp", "portfwd", "vm")
ANYTHING: Final = ("",)

# The first line whose prefix fits a module holds for it. A package may always import from itself.
ARROWS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("pyvpnkit", ANYTHING),
    # What runs inside the machine is copied there alone.
    ("vm.guest", ()),
    # The vsock device is one of vhost-user; sockets are made and found stale by the one rule; 9P's framing is one for all dialects.
    ("vm", ("netstack.api", "netstack.link.vhost_user", "netstack.link.listening", "portfwd.ninep.wire")),
    # Unix sockets of forwards are found stale or not, and removed, by the one rule there is.
    ("portfwd", ("netstack.api", "netstack.link.listening")),
    ("dns", ("netstack.api",)),
    ("ntp", ("netstack.api",)),
    ("netstack.errors", ()),
    ("netstack.api", ()),
    ("netstack.settings", ()),
    ("netstack.jsonfile", ()),
    ("netstack.stack", ("netstack",)),
    ("netstack.views", ("netstack",)),
    ("netstack.wire", ()),
    ("netstack.observe", ("netstack.wire",)),
    # Beyond the house table: the proxies put headers together (wire) and hand packets to the interface's output (iface) ...
    (
        "netstack.host",
        (
            "netstack.api",
            "netstack.tcp",
            "netstack.udp",
            "netstack.policy",
            "netstack.flow",
            "netstack.wire",
            "netstack.iface",
        ),
    ),
    ("netstack.link", ("netstack.api", "netstack.wire")),
    # ... and the interface reassembles, fragments and answers with ICMP (ip) and knows ports by their links (api).
    ("netstack.iface", ("netstack.wire", "netstack.ip", "netstack.api")),
    ("netstack.ip", ("netstack.wire",)),
    ("netstack.tcp", ("netstack.wire",)),
    ("netstack.udp", ("netstack.wire",)),
    ("netstack.dhcp", ("netstack.wire",)),
    ("netstack.policy", ("netstack.api",)),
    ("netstack.flow", ("netstack.api",)),
    ("netstack", ()),
)


@functools.cache
def modules() -> dict[str, Path]:
    """Each module's name, and its file."""
    found = {}
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """Every project module that `path` imports, wherever in the file, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule if submodule in modules() else node.module or ""), node.lineno


def inside(module: str, prefix: str) -> bool:
    return prefix == "" or module == prefix or module.startswith(prefix + ".")


def allowed(importer: str, imported: str) -> bool:
    home, targets = next((line for line in ARROWS if inside(importer, line[0])), ("", ()))
    if inside(imported, home) and home:
        return True
    if home == "vm.guest":
        return False
    open_to_all = ["netstack.errors"]
    if not inside(importer, "netstack.wire") and importer not in ("netstack.errors", "netstack.api"):
        open_to_all.append("netstack.observe")
    if inside(importer, "netstack") and not inside(importer, "netstack.wire"):
        open_to_all.append("netstack.settings")
    if importer in ("netstack.dhcp.store", "portfwd.store"):
        open_to_all.append("netstack.jsonfile")
    return any(inside(imported, target) for target in (*targets, *open_to_all))


def test_imports_point_down_the_table() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} may not import {imported}"
        for module, path in modules().items()
        for imported, line in imports(path, module)
        if imported.split(".")[0] in OURS and imported != "netstack" and not allowed(module, imported)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("dns.server", "netstack.api", True),
        ("dns.server", "netstack.stack", False),
        ("dns.server", "ntp.packet", False),
        ("netstack.wire.tcp", "netstack.observe.metrics", False),
        ("netstack.tcp.sender", "netstack.host.io", False),
        ("netstack.stack", "netstack.host.io", True),
        ("netstack.stack", "dns.server", False),
        ("netstack.link.tap", "netstack.iface.switch", False),
        ("portfwd.registry", "pyvpnkit.config", False),
        ("pyvpnkit.daemon", "dns.server", True),
        ("vm.guest.vsudd", "netstack.errors", False),
        ("vm.vsock.device", "netstack.link.vhost_user.device", True),
        ("vm.supervisor.machine", "pyvpnkit.config", False),
    ],
)
def test_the_table_says_no_and_yes(importer: str, imported: str, expected: bool) -> None:
    assert allowed(importer, imported) is expected


def test_every_package_is_installed() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in modules().values()}
    assert found <= listed, f"pyproject.toml does not list {sorted(found - listed)}"
