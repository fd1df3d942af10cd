"""A port scanner in the guest leaves nothing behind (G18: VPNKit leaked a socket per SYN, SYN-ACK, RST)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.kernel.conftest import Site
from tests.support.netns import HOST, require

pytestmark = [pytest.mark.netns, pytest.mark.slow]

OPEN = 3000


@pytest.fixture
def listeners(site: Site) -> Iterator[set[int]]:
    """The ports of 3,000 servers that accept nothing."""
    socks = [site.host.listen(backlog=8) for _ in range(OPEN)]
    yield {sock.getsockname()[1] for sock in socks}
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("how", ["-sS", "-sT"])
def test_a_scan_of_every_port_leaves_nothing(site: Site, listeners: set[int], how: str) -> None:
    """All that are open are found, by SYN, SYN-ACK, RST or by whole connections; then no descriptor is left."""
    require("nmap")
    before = site.daemon.descriptors()
    began = time.monotonic()
    words = ["nmap", how, "-n", "-Pn", "-T5", "-p-", "--min-parallelism", "200", "--max-retries", "6", "-oG", "-", HOST]
    said = site.guest.run(*words, limit_s=60).stdout
    took = time.monotonic() - began
    found = {int(port) for port in re.findall(r"(\d+)/open/tcp", said)}
    assert found == listeners | {site.port}
    assert took < 40, took
    ping = site.guest.run("ping", "-c", "3", "-i", "0.1", "-W", "2", HOST).stdout
    assert " 0% packet loss" in ping, ping
    site.daemon.wait_descriptors(before)
