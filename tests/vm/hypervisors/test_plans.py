"""What each driver beside QEMU's starts, word by word, and what it refuses (`tests/support/golden.py` writes the files)."""

from __future__ import annotations

from pathlib import Path

import pytest

from netstack.errors import ConfigError
from tests.support import golden
from tests.support.specs import card, disk, full, minimal, share, vsock
from vm.api import Disk, Hypervisor, Unsupported, VmSpec
from vm.hypervisors import caps, cloud_hypervisor, crosvm, firecracker, hyperkit, qemu, vfkit

GOLDEN = Path(__file__).parent / "golden"
DRIVERS: dict[str, Hypervisor] = {
    module.DRIVER.name: module.DRIVER for module in (hyperkit, vfkit, cloud_hypervisor, firecracker, crosvm)
}
DEVICE = golden.STATE.vsock_device

PLANNED = {
    "hyperkit-minimal": minimal(),
    "hyperkit-full": full("vmnet", ("9p-socket", "9p-vsock"), ports_tree=golden.STATE.path / "port.sock"),
    "hyperkit-qcow2": minimal(disks=(disk(format="qcow2"),)),
    "vfkit-minimal": minimal(),
    "vfkit-full": full("unixgram", ("virtiofs", "9p-vsock"), disks=(disk(),)),
    "vfkit-efi": minimal(kernel=None, disks=(disk(),)),
    "cloud-hypervisor-minimal": minimal(),
    "cloud-hypervisor-full": full("vhost-user", ("virtiofs", "9p-vsock")),
    "cloud-hypervisor-readonly-share": minimal(shares=(share("virtiofs", readonly=True),)),
    "cloud-hypervisor-tap": minimal(nics=(card("tap", mtu=9000), card("none"))),
    "firecracker-minimal": minimal(),
    "firecracker-full": full("tap", ("9p-vsock",)),
    "crosvm-minimal": minimal(),
    "crosvm-full": full("vhost-user", ("virtiofs", "9p-vsock"), vsock=vsock(socket=DEVICE)),
    "crosvm-kernel-vsock": minimal(nics=(card("tap"),), vsock=vsock()),
}

REFUSED = {
    "hyperkit-nic": minimal(nics=(card("qemu-stream"),)),
    "hyperkit-share": minimal(shares=(share("virtiofs"),)),
    "hyperkit-five-ports": minimal(vsock=vsock(ports={str(port): port for port in range(5)})),
    "hyperkit-no-kernel": minimal(kernel=None),
    "hyperkit-accel": minimal(accel="kvm"),
    "hyperkit-comma": minimal(disks=(Disk(path=Path("/vm/a,b.img")),)),
    "hyperkit-too-many-devices": minimal(disks=tuple(Disk(path=Path(f"/vm/{number}")) for number in range(30))),
    "hyperkit-port-tag": minimal(shares=(share("9p-socket", tag="port"),), ports_tree=golden.STATE.path / "port.sock"),
    "vfkit-nic": minimal(nics=(card("vhost-user"),)),
    "vfkit-disk": minimal(disks=(disk(format="qcow2"),)),
    "vfkit-readonly-disk": minimal(disks=(disk(readonly=True),)),
    "vfkit-owner": minimal(shares=(share("virtiofs", owner="mapped"),)),
    "vfkit-readonly-share": minimal(shares=(share("virtiofs", readonly=True),)),
    "vfkit-quote": minimal(cmdline='init="/bin/sh"'),
    "cloud-hypervisor-nic": minimal(nics=(card("qemu-stream"),)),
    "cloud-hypervisor-share": minimal(shares=(share("9p-local"),)),
    "cloud-hypervisor-no-socket": minimal(nics=(card("vhost-user", socket=None),)),
    "firecracker-nic": minimal(nics=(card("vhost-user"),)),
    "firecracker-share": minimal(shares=(share("virtiofs"),)),
    "firecracker-disk": minimal(disks=(disk(format="qcow2"),)),
    "firecracker-no-tap": minimal(nics=(card("tap", tap=""),)),
    "firecracker-9p-without-vsock": minimal(shares=(share("9p-vsock"),)),
    "crosvm-nic": minimal(nics=(card("unixgram"),)),
    "crosvm-owner": minimal(shares=(share("virtiofs", owner="squash"),)),
    "crosvm-accel": minimal(accel="tcg"),
}


def driver_of(case: str) -> Hypervisor:
    return next(driver for name, driver in DRIVERS.items() if case.startswith(f"{name}-"))


def plans(driver: Hypervisor, spec: VmSpec) -> bool:
    try:
        driver.plan(spec, golden.STATE)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("case", PLANNED)
def test_a_plan_says_each_word_of_the_hypervisors_own_language(case: str) -> None:
    plan = driver_of(case).plan(PLANNED[case], golden.STATE)
    golden.check(GOLDEN / f"{case}.txt", golden.text_of(plan))


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_hypervisor_has_not_is_refused_with_the_names_of_those_that_have_it(case: str) -> None:
    with pytest.raises(ConfigError) as refused:
        driver_of(case).plan(REFUSED[case], golden.STATE)
    golden.check(GOLDEN / f"{case}.txt", golden.refusal(refused.value))


@pytest.mark.parametrize("name", [*DRIVERS, "qemu"])
def test_who_could_is_who_does(name: str) -> None:
    driver = qemu.DRIVER if name == "qemu" else DRIVERS[name]
    for case, spec in REFUSED.items():
        if name == "qemu" and spec.shares:
            continue  # which virtiofsd there is decides too
        try:
            driver_of(case).plan(spec, golden.STATE)
        except Unsupported as refused:
            assert (name in refused.able) == plans(driver, spec), case
        except ConfigError:
            pass  # nobody could, or another name would do


def test_the_table_has_the_caps_that_drivers_show() -> None:
    assert {name: driver.caps for name, driver in DRIVERS.items()} == {name: caps.caps_of(name) for name in DRIVERS}


def test_no_golden_file_is_left_of_a_case_that_is_gone() -> None:
    ours = {path.stem for path in GOLDEN.glob("*.txt") if any(path.stem.startswith(f"{name}-") for name in DRIVERS)}
    assert ours == {*PLANNED, *REFUSED}
