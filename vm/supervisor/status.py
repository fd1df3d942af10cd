"""How a machine does, at a glance."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any, Final

from netstack.errors import NetstackError
from vm.supervisor.lifecycle import UP
from vm.supervisor.supervisor import Supervisor

STATUS_S: Final = 2.0
"""How long a status waits for the network."""


async def status(supervisor: Supervisor) -> dict[str, Any]:
    """Everything at a glance, in values of JSON."""
    state = supervisor.home.state
    addresses = []
    if supervisor.design.spec.nics and supervisor.state in UP:
        with contextlib.suppress(NetstackError, TimeoutError):
            async with asyncio.timeout(STATUS_S):
                leases = await supervisor.network.leases()
            addresses = [one for one in leases if one.get("mac") == supervisor.design.spec.nics[0].mac]
    shares = [
        {"tag": one.tag, "source": str(one.source), "target": one.target, "kind": one.kind, "owner": one.owner}
        for one in supervisor.design.spec.shares
    ]
    return {
        "name": supervisor.settings.name,
        "file": str(supervisor.settings.file),
        "driver": supervisor.design.plan.driver,
        "state": supervisor.state.value,
        "since": round(supervisor.since, 3),
        "reason": supervisor.reason,
        "paused": supervisor.guest.paused,
        "pid": supervisor.pid,
        "supervisor": os.getpid(),
        "last_event": supervisor.journal.last,
        "restarts": supervisor.restarts,
        "resets": supervisor.guest.resets,
        "restarts_max": supervisor.settings.restart.max,
        "degraded": dict(supervisor.degraded),
        "parts": [{"name": one.name, "pid": one.pid, "restarts": one.restarts} for one in supervisor.parts.values()],
        "addresses": addresses,
        "published": list(supervisor.published.held.values()),
        "shares": shares,
        "mounts": list(supervisor.design.mounts),
        "docker_socket": str(supervisor.docker.path) if supervisor.docker is not None else None,
        "console": str(state.console),
        "console_log": str(state.console_log),
        "network_control": str(state.network_control) if supervisor.design.network is not None else None,
    }
