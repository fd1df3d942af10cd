"""Cloud Hypervisor, of Linux with KVM (spec companions 1.1-1.3, 2.2).

A network card is a ring in memory that our network maps, or a TAP; there is no socket of plain frames. The console is a pty that
`vm.info` names. It keeps what the guest says until somebody opens that, so the guest need not wait for us.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from vm.api import Disk, Hypervisor, Machine, Nic, Plan, RestCall, Share, StateDir, VmSpec
from vm.hypervisors.caps import caps_of, check
from vm.hypervisors.machine import Orders, start_by_rest
from vm.hypervisors.words import HYBRID, plain

NAME: Final = "cloud-hypervisor"
API: Final = "/api/v1"
ORDERS: Final[Orders] = {
    "pause": RestCall(method="PUT", path=f"{API}/vm.pause"),
    "resume": RestCall(method="PUT", path=f"{API}/vm.resume"),
    "powerdown": RestCall(method="PUT", path=f"{API}/vm.power-button"),
}
_INSTALL: Final = "github.com/cloud-hypervisor/cloud-hypervisor has it as one file"


class CloudHypervisor:
    """The driver."""

    name = NAME
    caps = caps_of(NAME)

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        check(NAME, self.caps, spec)
        argv = [
            NAME,
            *("--api-socket", f"path={plain(NAME, 'state directory', state.monitor)}"),
            *("--cpus", f"boot={spec.cpus}"),
            *("--memory", f"size={spec.memory_mib}M" + (",shared=on" if _shares_memory(spec) else "")),
            *("--platform", f"uuid={spec.uuid}"),
            *("--kernel", str(spec.kernel)),
            *(("--initramfs", str(spec.initrd)) if spec.initrd is not None else ()),
            *(("--cmdline", spec.cmdline) if spec.cmdline else ()),
            *_listed("--disk", (_disk(disk) for disk in spec.disks)),
            *_listed("--net", (_nic(nic) for nic in spec.nics if nic.kind != "none")),
            *_listed("--fs", (_share(share, state) for share in spec.shares if share.kind == "virtiofs")),
        ]
        sockets = [state.monitor]
        if spec.vsock is not None:
            hybrid = spec.vsock.directory / HYBRID
            argv += ["--vsock", f"cid={spec.vsock.cid},socket={plain(NAME, 'vsock directory', hybrid)}"]
            sockets.append(hybrid)
        argv += ["--serial", "pty", "--console", "off", *spec.extra]
        return Plan(
            driver=NAME,
            argv=tuple(argv),
            disks=spec.disks,
            sockets=tuple(sockets),
            console="printed",
            vsock=None if spec.vsock is None else "hybrid",
        )

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        return await start_by_rest(plan, state, install=_INSTALL, inspect=f"{API}/vm.info", pty=_pty, orders=ORDERS)


DRIVER: Final[Hypervisor] = CloudHypervisor()


def _shares_memory(spec: VmSpec) -> bool:
    return any(nic.kind == "vhost-user" for nic in spec.nics) or any(share.kind == "virtiofs" for share in spec.shares)


def _listed(flag: str, values: Iterator[str]) -> list[str]:
    """All values behind one flag, as it wants them."""
    found = list(values)
    return [flag, *found] if found else []


def _nic(nic: Nic) -> str:
    if nic.kind == "tap":
        words = [f"tap={plain(NAME, 'tap', nic.tap)}"]
    else:
        socket = plain(NAME, "network socket", nic.socket or "")
        words = ["vhost_user=true", f"socket={socket}", "num_queues=2", "vhost_mode=client"]
    if nic.mac:
        words.append(f"mac={nic.mac}")
    if nic.mtu != 1500:
        words.append(f"mtu={nic.mtu}")
    return ",".join(words)


def _disk(disk: Disk) -> str:
    return f"path={plain(NAME, 'disk', disk.path)}" + (",readonly=on" if disk.readonly else "")


def _share(share: Share, state: StateDir) -> str:
    tag, socket = plain(NAME, "tag of a share", share.tag), plain(NAME, "state directory", state.share(share.tag))
    return f"tag={tag},socket={socket},num_queues=1,queue_size=512"


def _pty(info: Any) -> str:
    """The console's pty, of the answer to `vm.info`; empty where it is not there yet."""
    try:
        found = info["config"]["serial"]["file"]
    except (KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""
