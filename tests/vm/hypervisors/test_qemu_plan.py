"""QEMU's command line word by word, for machines of all kinds; `tests/support/golden.py` says how the files are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from netstack.errors import ConfigError
from tests.support import golden
from tests.support.specs import card, disk, full, minimal, share, vsock
from vm.api import Disk, Plan, Unsupported, VmSpec
from vm.filesystems import virtiofsd
from vm.filesystems.virtiofsd import Program, User
from vm.hypervisors import caps, qemu, registry
from vm.hypervisors.qemu_plan import Host, kvm_denied, kvm_works, made_up_mac

GOLDEN = Path(__file__).parent / "golden"
LINUX = Host(arch="x86_64", system="linux", root=True)
USER = replace(LINUX, root=False)
ARM = replace(LINUX, arch="aarch64")
MAC = Host(arch="aarch64", system="darwin", root=False)
DEVICE = golden.STATE.vsock_device

PLANNED: dict[str, tuple[VmSpec, Host]] = {
    "minimal": (minimal(), LINUX),
    "full": (full("qemu-stream", ("9p-local",), vsock=vsock(socket=DEVICE)), LINUX),
    "without-kvm": (minimal(nics=(card("vhost-user"),)), replace(LINUX, kvm=False)),
    "aarch64": (minimal(disks=(disk(),), nics=(card("qemu-stream"),)), ARM),
    "mac": (minimal(nics=(card("qemu-stream"),)), MAC),
    "stream-8.0": (minimal(nics=(card("qemu-stream"),)), replace(LINUX, version=(8, 0))),
    "stream-9.2": (minimal(nics=(card("qemu-stream"),)), replace(LINUX, version=(9, 2))),
    "ring-auto": (minimal(nics=(card("vhost-user", mtu=9000),)), LINUX),
    "ring-kvm": (minimal(accel="kvm", nics=(card("vhost-user"),)), LINUX),
    "ring-9.2": (minimal(nics=(card("vhost-user"),)), replace(LINUX, version=(9, 2))),
    "many-cards": (
        minimal(
            nics=(
                card("none"),
                card("qemu-dgram", mac=None, mtu=9000),
                card("unixgram", mac=None),
                card("tap", tap="vmtap0"),
                card("vhost-user"),
            )
        ),
        LINUX,
    ),
    "vsock-kernel": (minimal(vsock=vsock()), LINUX),
    "disk-only": (minimal(kernel=None, disks=(disk(format="qcow2"), disk(path=Path("/vm/b"), readonly=True))), LINUX),
    "shares": (
        minimal(
            vsock=vsock(socket=DEVICE),
            shares=(
                share("9p-local", owner="mapped", readonly=True),
                share("9p-local", tag="plain"),
                share("9p-vsock", tag="ours", owner="requester"),
                share("virtiofs"),
            ),
        ),
        LINUX,
    ),
    "share-of-a-user": (minimal(shares=(share("9p-local"),)), USER),
    "commas": (
        minimal(
            name="a,b",
            cmdline="console=ttyS0,115200",
            disks=(Disk(path=Path("/vm/a,b.img")),),
            shares=(share("9p-local", source=Path("/home/me/a,b"), tag="c,d"),),
        ),
        LINUX,
    ),
}

REFUSED: dict[str, tuple[VmSpec, Host]] = {
    "nic": (minimal(nics=(card("vmnet"),)), LINUX),
    "share": (minimal(shares=(share("9p-socket"),)), LINUX),
    "owner": (minimal(shares=(share("9p-local", owner="requester"),)), LINUX),
    "arch": (minimal(), replace(LINUX, arch="riscv64")),
    "firmware": (minimal(kernel=None), ARM),
    "mac-ring": (minimal(nics=(card("vhost-user"),)), MAC),
    "long-tag": (minimal(shares=(share("9p-local", tag="t" * 32),)), LINUX),
    "9p-without-vsock": (minimal(shares=(share("9p-vsock"),)), LINUX),
}


@pytest.fixture(autouse=True)
def same_programs_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    there = virtiofsd.Virtiofsd(lambda: Program(Path("/usr/lib/qemu/virtiofsd"), "C"), lambda: User(0, 0))
    monkeypatch.setattr(virtiofsd, "SHARE", there)
    yield


def planned(case: tuple[VmSpec, Host]) -> Plan:
    spec, host = case
    return qemu.Qemu(host).plan(spec, golden.STATE)


@pytest.mark.parametrize("case", PLANNED)
def test_each_word(case: str) -> None:
    golden.check(GOLDEN / f"qemu-{case}.txt", golden.text_of(planned(PLANNED[case])))


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_who_could(case: str) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(REFUSED[case])
    golden.check(GOLDEN / f"qemu-{case}.txt", golden.refusal(refused.value))


def test_no_golden_file_is_left_of_a_case_that_is_gone() -> None:
    assert {path.stem for path in GOLDEN.glob("qemu-*.txt")} == {f"qemu-{case}" for case in (*PLANNED, *REFUSED)}


def test_the_driver_is_what_the_registry_has_and_the_table_says() -> None:
    assert registry.load("qemu") is qemu.DRIVER
    assert qemu.DRIVER.caps == caps.caps_of("qemu")


def test_what_a_newer_qemu_wants_is_not_said_to_an_older_one() -> None:
    words = " ".join(planned((minimal(nics=(card("qemu-stream"),)), LINUX)).argv)
    assert "reconnect" not in words, "7.2 rejects it"


@pytest.mark.parametrize(
    ("spec", "shared"),
    [
        (minimal(nics=(card("qemu-stream"),), shares=(share("9p-local"),), vsock=vsock()), False),
        (minimal(nics=(card("vhost-user"),)), True),
        (minimal(shares=(share("virtiofs"),)), True),
        (minimal(vsock=vsock(socket=DEVICE)), True),
    ],
)
def test_memory_is_shared_only_where_somebody_maps_it(spec: VmSpec, shared: bool) -> None:
    words = planned((spec, LINUX)).argv
    assert any("memory-backend-memfd" in word for word in words) is shared
    assert any("memory-backend=mem" in word for word in words) is shared


@pytest.mark.parametrize(("accel", "plain"), [("auto", True), ("tcg", True), ("kvm", False)])
def test_a_ring_has_no_msix_where_tcg_may_be_used(accel: Any, plain: bool) -> None:
    """It crashes QEMU 7.2."""
    words = planned((minimal(accel=accel, nics=(card("vhost-user"),)), LINUX)).argv
    assert any(word.endswith(",vectors=0") for word in words) is plain


def test_addresses_of_cards_are_made_up_the_same_each_time_and_otherwise_elsewhere() -> None:
    spec, other = minimal(), minimal(uuid=UUID(int=8))
    made = {made_up_mac(spec, 0), made_up_mac(spec, 1), made_up_mac(other, 0)}
    assert len(made) == 3 and all(mac.startswith("52:54:00:") for mac in made)
    assert made_up_mac(spec, 0) == made_up_mac(minimal(), 0)


FLAGS = "processor\t: 0\nflags\t\t: fpu vme {} hypervisor\nbugs\t\t: vmx_none\n"


@pytest.mark.parametrize(
    ("arch", "flags", "works"),
    [
        ("x86_64", "vmx", True),
        ("x86_64", "svm", True),
        # As on some clouds: /dev/kvm is there, answers with its version, and no guest gets anywhere.
        ("x86_64", "sse", False),
        ("aarch64", "", True),
    ],
)
def test_whether_kvm_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, flags: str, works: bool
) -> None:
    (tmp_path / "kvm").touch()
    (tmp_path / "cpuinfo").write_text(FLAGS.format(flags))
    assert kvm_works(arch, tmp_path / "kvm", tmp_path / "cpuinfo") is works
    assert not kvm_works(arch, tmp_path / "absent", tmp_path / "cpuinfo")
    assert not kvm_denied(arch, tmp_path / "kvm", tmp_path / "cpuinfo")
    assert not kvm_denied(arch, tmp_path / "absent", tmp_path / "cpuinfo")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert kvm_denied(arch, tmp_path / "kvm", tmp_path / "cpuinfo") is works
    assert not kvm_works(arch, tmp_path / "kvm", tmp_path / "cpuinfo")


def test_words_of_the_user_come_last_and_may_turn_the_sandbox_off() -> None:
    argv = planned((minimal(extra=("-sandbox", "off")), LINUX)).argv
    assert argv[-2:] == ("-sandbox", "off") and argv.count("-sandbox") == 1


def test_an_unsupported_architecture_is_typed() -> None:
    with pytest.raises(Unsupported):
        planned(REFUSED["arch"])
