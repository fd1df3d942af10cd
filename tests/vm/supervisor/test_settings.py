"""`vm.yml`: what it takes, and what is said about what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from portfwd.spec import PublishSpec
from vm import settings_file
from vm.settings import VmSettings

HERE = Path("/machines/one/vm.yml")
BOOT = "boot: {kernel: k}\n"


def of(text: str) -> VmSettings:
    return settings_file.of_text(text, HERE, check_publish=PublishSpec.parse)


def complaints(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        of(text)
    return str(raised.value).splitlines()


def test_the_smallest_file_says_what_to_boot() -> None:
    found = of(BOOT)
    assert found.name == "one"
    assert found.hypervisor.driver == "qemu"
    assert found.boot.kernel == Path("/machines/one/k")
    assert (found.cpus, found.memory_mib, found.network.kind, found.probe) == (1, 1024, "auto", "lease")
    assert (found.restart.max, found.restart.backoff_s, found.restart.backoff_most_s) == (5, 1.0, 30.0)
    assert found.stop.grace_s == 30.0
    assert not found.wants_vsock


def test_the_file_of_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = of(
        """\
name: docker
hypervisor: {driver: qemu, accel: tcg}
cpus: 2
memory: 1024
boot: {kernel: K, initrd: I, cmdline: "console=ttyS0"}
network: {kind: qemu-stream, uuid: auto, mtu: 1500}
vsock: {cid: 3, ports: {docker: 2376, forwarder: 62373, timesync: 62372, control: 4098}}
disks: [{path: data.img, size: 4G, discard: true}]
shares: [{tag: users, source: ~/src, target: /Users/me/src, kind: 9p-local, owner: mapped}]
console: {path: tty, log: console.log}
publish: ["8080:80/tcp"]
docker_socket: ~/docker.sock
"""
    )
    assert found.docker is not None
    assert found.docker.path == Path("/home/me/docker.sock")
    assert found.console.path == Path("tty")
    assert found.publish == ("tcp:8080:80",)
    assert found.disks[0].size == 4 << 30
    assert found.shares[0].source == Path("/home/me/src")
    assert found.vsock_ports == {"docker": 2376, "forwarder": 62373, "timesync": 62372, "control": 4098}
    assert found.probe == "docker"


def test_every_complaint_comes_at_once_with_its_place_and_what_would_be_accepted() -> None:
    text = """\
name: a b
hypervisor: {driver: qemu, acel: tcg}
cpus: 0
memory: lots
boot: {linuxkit: a.yml, kernel: b}
network: {kind: vhost, mac: 01:00:00:00:00:01}
shares:
  - {source: a, target: mnt}
  - {target: /mnt}
publish: [8080, "8080:80:80:80:80"]
ready: tpc:80
restart: {backoff: -1}
stopp: 1
"""
    found = complaints(text)
    places = [line.split(": ")[0].rpartition("vm.yml:")[2] for line in found]
    assert places == [
        "1:7",
        "2:28",
        "3:7",
        "4:9",
        "5:7",
        "6:17",
        "6:29",
        "8:25",
        "9:5",
        "10:11",
        "11:8",
        "12:20",
        "13:1",
    ]
    said = "\n".join(found)
    assert "did you mean 'accel'?" in said
    assert "did you mean 'vhost-user'?" in said
    assert "did you mean 'tcp'?" in said
    assert "did you mean 'stop'?" in said
    assert "write a whole number from 1 to 256" in said
    assert "source is missing" in said


def test_what_no_file_can_say_is_not_offered() -> None:
    (said,) = complaints(BOOT + "qqq: 1\n")
    assert "known are: boot, console, cpus, " in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("boot: {linuxkit: a.yml, kernel: b}\n", "linuxkit builds the kernel and initrd"),
        ("boot: {initrd: b}\n", "an initrd without a kernel"),
        ("name: x\n", "there is nothing to boot"),
        (BOOT + "network: tap\n", "write tap: NAME"),
        (BOOT + "network: none\npublish: ['80:80']\n", "publish: needs a network"),
        (BOOT + "network: none\nready: lease\n", "ready: needs a network"),
        (BOOT + "docker_socket: {port: 1, tcp: 2}\n", "not both"),
        (BOOT + "ready: docker\n", "asks through docker_socket"),
        (BOOT + "ready: console\n", "what a line has to say"),
        (BOOT + "ready: 'console:('\n", "regular expression"),
        (BOOT + "restart: {backoff: 60}\n", "longer than backoff_most"),
        (BOOT + "shares: [{source: a, target: /a, uid: 5}]\n", "for owner: squash"),
        (BOOT + "shares: [{source: a, target: /a}, {source: b, target: /a}]\n", "target '/a' is that of share 1 too"),
        (BOOT + "shares: [{tag: x, source: a, target: /a}, {tag: x, source: b, target: /b}]\n", "tag 'x' is that"),
        (BOOT + "shares: [{source: a, target: /a/../b}]\n", "an absolute path of the guest"),
        (BOOT + "publish: [nonsense]\n", "such as 8080:80"),
        (BOOT + "publish: ['8080:80:x:y']\n", "publish: "),
        (BOOT + "network: {preferred_ip: 300.0.0.1}\n", "192.168.65.3"),
        (BOOT + "network: {uuid: 5}\n", "uuidgen"),
        (BOOT + "memory: 8M\n", "from 32 MiB"),
        (BOOT + "vsock: {cid: 2}\n", "from 3 to"),
        (BOOT + "vsock: {ports: {a: 5, b: 5}}\n", "5 is that of a too"),
        (BOOT + "vsock: {ports: {control: 564}}\n", "564 to 579 are those of shares"),
        (BOOT + "vsock: {ports: {a: 5}}\ndocker_socket: {port: 5}\n", "vsock.ports.docker: 5 is that of a too"),
        (BOOT + "stop: {grace: 2 days}\n", "a day at most"),
        (BOOT + "timesync: maybe\n", "neither on nor off"),
        ("", "is empty"),
        ("- a\n", "a mapping of keys to values is wanted"),
        ("{", "not YAML"),
    ],
)
def test_what_does_not_go_together_is_said(text: str, wanted: str) -> None:
    assert any(wanted in line for line in complaints(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1024", 1024), ("1G", 1024), ("512M", 512), ("1.5G", None), ("65536K", 64), ("2GiB", 2048)],
)
def test_memory_is_mib_or_with_a_letter(text: str, value: int | None) -> None:
    if value is None:
        complaints(BOOT + f"memory: {text}\n")
    else:
        assert of(BOOT + f"memory: {text}\n").memory_mib == value


def test_a_word_stands_for_a_whole_section() -> None:
    found = of("boot: lk.yml\nhypervisor: fake\nnetwork: none\nrestart: never\nstop: 5s\n")
    assert found.boot.linuxkit == Path("/machines/one/lk.yml")
    assert (found.hypervisor.driver, found.network.kind, found.restart.policy, found.stop.grace_s) == (
        "fake",
        "none",
        "never",
        5.0,
    )


def test_the_name_follows_from_the_file() -> None:
    assert settings_file.of_text(BOOT, Path("/a/tiny.yml")).name == "tiny"
    assert settings_file.of_text(BOOT, Path("/a b/vm.yml")).name == "a-b"


def test_docker_by_tcp_needs_no_vsock() -> None:
    assert not of(BOOT + "docker_socket: {tcp: 2375}\n").wants_vsock
    assert of(BOOT + "docker_socket: docker.sock\n").vsock_ports == {"docker": 2376}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        settings_file.load(tmp_path / "none.yml")


@given(st.text(max_size=200))
def test_any_text_is_settings_or_a_complaint(text: str) -> None:
    try:
        settings_file.of_text(text, HERE)
    except ConfigError as error:
        assert str(error)


@given(
    st.recursive(
        st.one_of(st.text(max_size=8), st.integers(), st.none(), st.booleans()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(sorted(VmSettings.__dataclass_fields__)) | st.text(max_size=5), inner, max_size=4
            ),
        ),
        max_leaves=20,
    )
)
def test_any_shape_is_settings_or_a_complaint(value: object) -> None:
    try:
        settings_file.of_text(json.dumps(value), HERE)
    except ConfigError as error:
        assert str(error)
