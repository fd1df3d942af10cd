"""Drills here use the fixtures of `tests.support.plugin`; a host for a test to change is a namespace."""

from collections.abc import Iterator

import pytest

from tests.support.netns import Namespace, require
from tests.support.plugin import d, drill, pytest_runtest_makereport

__all__ = ["d", "drill", "pytest_runtest_makereport"]


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A network of its own, in which nothing is but loopback."""
    require("ip")
    made = Namespace("host")
    yield made
    made.close()


def interface(host: Namespace, name: str, mtu: int = 1500) -> None:
    """One end of a veth pair whose other end nobody uses; up."""
    host.ip("link", "add", name, "mtu", str(mtu), "type", "veth", "peer", f"{name}-peer", "mtu", str(mtu))
    for end in (name, f"{name}-peer"):
        host.ip("link", "set", end, "up")
