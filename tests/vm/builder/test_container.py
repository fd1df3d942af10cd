"""The scripts that a container is started by, field by field, and what is warned of. `tests/qemu/test_build.py` runs some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from netstack.errors import ConfigError
from vm.build import oci
from vm.build.container import Container
from vm.build.tree import Tree
from vm.linuxkit.load import load
from vm.linuxkit.merge import ids
from vm.linuxkit.schema import Image

PLAIN = """\
volumes: [{name: data}, {name: fixed, readonly: true}]
services:
  - name: web
    image: dir:x
    command: [/bin/web, "it's", "two words"]
"""


def made(
    more: str = "", *, config: oci.Config | None = None, tree: Tree | None = None, **given: Any
) -> tuple[str, str, list[str]]:
    """`run`, `inside` and the warnings of a service with these lines of YAML."""
    machine = load(PLAIN + "".join(f"    {line}\n" for line in more.splitlines()))
    (image,) = machine.services
    assert isinstance(image, Image)
    container = Container(
        image=image,
        config=config or oci.Config(),
        tree=tree or Tree(),
        here="/containers/services/web",
        ids=ids(machine),
        volumes={"data": False, "fixed": True},
        setpriv=given.pop("setpriv", False),
        **given,
    )
    run, inside = container.scripts()
    return run, inside, [str(warning) for warning in container.warnings]


def test_a_container_without_wishes() -> None:
    run, inside, warnings = made()
    assert run.splitlines() == [
        "#!/bin/busybox sh",
        "# web, of dir:x",
        "here=/containers/services/web",
        "set -e",
        "echo $$ >/sys/fs/cgroup/services/web/cgroup.procs",
        "exec unshare -m -p -f --propagation shared /bin/busybox sh $here/inside",
    ]
    lines = inside.splitlines()
    assert lines[3:7] == [
        ". /usr/lib/vm/container.sh",
        "mount -o bind $root $root",
        "place proc proc /proc nosuid,nodev,noexec",
        "dev",
    ]
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert "\n".join(lines[-2:]) == (
        f"exec /bin/busybox env -i {path} \\\n"
        "\t/bin/busybox nsenter -F -r$root -w$root -- /bin/web 'it'\"'\"'s' 'two words'"
    )
    assert not warnings


RUN = [
    ("net: new\nipc: new\nuts: new\npid: host", "exec unshare -m -n -i -u --propagation shared"),
    ("net: /run/netns/x\npid: host", "exec nsenter -F -n/run/netns/x unshare -m --propagation shared"),
    ("oomScoreAdj: -7", "echo -7 >/proc/self/oom_score_adj"),
    (
        'rlimits: ["nofile,100,200", "RLIMIT_AS,4096,unlimited"]',
        "ulimit -n 200; ulimit -S -n 100\nulimit -v unlimited; ulimit -S -v 4",
    ),
    (
        "resources: {memory: {limit: 1000000}, pids: {limit: -1}}",
        "echo 1000000 >/sys/fs/cgroup/services/web/memory.max",
    ),
    (
        "resources: {cpu: {quota: 5000, period: 10000, shares: 1024}}",
        "echo '5000 10000' >/sys/fs/cgroup/services/web/cpu.max",
    ),
    ("runtime: {mkdir: [/var/x y], cgroups: [/more]}", "mkdir -p '/var/x y'\nmkdir -p /sys/fs/cgroup/more"),
    (
        "runtime: {mounts: [{type: ext4, source: /dev/vda, destination: /var/d, options: [noatime, ro]}]}",
        "mkdir -p /var/d\nmount -t ext4 -o noatime,ro /dev/vda /var/d",
    ),
]


@pytest.mark.parametrize(("more", "expected"), RUN)
def test_what_is_done_in_the_machine(more: str, expected: str) -> None:
    run, _, warnings = made(more)
    assert expected in run
    assert not warnings


INSIDE = [
    ("binds: ['/var/x:/x', '/etc/a:/a:ro']", "bind /var/x /x '' rprivate\nbind /etc/a /a ro rprivate"),
    ("binds: ['/var:/var:rshared,rbind,noexec']", "bind /var /var noexec rshared"),
    (
        "binds: ['data:/d', 'fixed:/f']",
        "bind /containers/volumes/data /d '' rprivate\nbind /containers/volumes/fixed /f ro rprivate",
    ),
    ("tmpfs: ['/t:size=1m', '/u']", "place tmpfs tmpfs /t size=1m\nplace tmpfs tmpfs /u nosuid,nodev"),
    ("mounts: [{type: 9p, source: tag, destination: /s, options: [trans=virtio]}]", "place 9p tag /s trans=virtio"),
    ("mounts: [{type: cgroup, options: [rw]}]", "place cgroup2 cgroup2 /sys/fs/cgroup rw"),
    ("readonly: true", "mount -o remount,bind,ro none $root"),
    ("rootfsPropagation: shared", "mount --make-shared $root"),
    ("maskedPaths: [/proc/kcore]\nreadonlyPaths: [/proc/sys]", "masked /proc/kcore\nunwritable /proc/sys"),
    ("sysctl: {net.ipv4.ip_forward: '1'}", "echo 1 >/proc/sys/net/ipv4/ip_forward"),
    ("hostname: a b\nuts: new", "hostname 'a b'"),
    ("runtime: {bindNS: {net: /run/netns/web}}", "namespace net /run/netns/web"),
    ("devices: [{path: /dev/x, type: c, major: 1, minor: 5, mode: '0600'}]", "device /dev/x c 1 5 0600"),
    ("env: [A=b c, PATH=/x]", "env -i 'A=b c' PATH=/x"),
    ("cwd: /srv", "-r$root -w$root/srv --"),
    ("uid: 5\ngid: 6", "-w$root -S5 -G6 --"),
    ("uid: web", "-S100 -G0 --"),
    ("noNewPrivileges: true", "exec /bin/busybox setpriv --nnp /bin/busybox env"),
]


@pytest.mark.parametrize(("more", "expected"), INSIDE)
def test_what_is_done_inside(more: str, expected: str) -> None:
    _, inside, warnings = made(more)
    assert expected in inside
    assert not warnings


def test_what_is_bound_takes_the_place_of_the_usual() -> None:
    _, inside, _ = made("binds: ['/dev:/dev', '/sys/fs/cgroup:/sys/fs/cgroup']")
    lines = inside.splitlines()
    assert "dev" not in lines and "devpts" not in inside and "place sysfs sysfs /sys nosuid,noexec,nodev,ro" in lines
    assert "cgroup2" not in inside
    _, inside, _ = made("binds: ['/a/b/c:/a/b/c', '/a:/a']")
    assert inside.index("bind /a /a") < inside.index("bind /a/b/c"), "what is further up is mounted first"


UNSUPPORTED = [
    ("hostname: x", "web: hostname: has no effect without uts: new"),
    ("userns: new", "web: userns: "),
    ("uidMappings: [{hostID: 0, containerID: 1, size: 2}]", "web: uidMappings: "),
    ("cgroupsPath: /x", "web: cgroupsPath: not used: its control group is services/web"),
    ("runtime: {interfaces: [{name: eth1}]}", "web: runtime.interfaces: "),
    ("runtime: {namespace: x}", "web: runtime.namespace: "),
    ("runtime: {bindNS: {mnt: /x}}", "web: runtime.bindNS.mnt: "),
    ("resources: {blockio: {weight: 10}, memory: {swap: 1}}", "web: resources.memory.swap: not set"),
    ("resources: {cpu: {realtimePeriod: 1}}", "web: resources.cpu.realtime_period: not set"),
    ("devices: [{path: all, type: b}]", "web: devices: all: not made"),
    ("additionalGids: [5]", "web: additionalGids: "),
    ("uid: 5\ncapabilities: [CAP_NET_ADMIN]", "web: capabilities: user 5 has none without util-linux's setpriv"),
    ("ambient: [CAP_NET_ADMIN]", "web: ambient: "),
    (
        "mounts: [{type: tmpfs, destination: /x, uidmappings: [{hostID: 0, containerID: 1, size: 2}]}]",
        "web: mounts.uidmappings: ",
    ),
    (
        "binds: ['/mnt:/mnt:shared']",
        "web: binds: /mnt: what the container mounts there, others see only below /dev, /run,",
    ),
]


@pytest.mark.parametrize(("more", "words"), UNSUPPORTED)
def test_what_is_not_done_is_said(more: str, words: str) -> None:
    _, _, warnings = made(more)
    assert [line for line in warnings if line.startswith(words)], warnings


def test_privileges_by_util_linux() -> None:
    _, inside, warnings = made("capabilities: [CAP_NET_ADMIN]", setpriv=True)
    words = "exec /usr/bin/setpriv --reuid 0 --regid 0 --clear-groups --bounding-set=-all,+net_admin,+sys_chroot --inh-caps=-all"
    assert f"{words} --ambient-caps=-all /bin/busybox env" in inside
    _, inside, _ = made(
        "uid: 5\ncapabilities: [CAP_NET_ADMIN]\nadditionalGids: [7, 8]\nnoNewPrivileges: true", setpriv=True
    )
    assert "--reuid 5 --regid 0 --groups 7,8 " in inside
    assert "--ambient-caps=-all,+net_admin,+sys_chroot --no-new-privs /bin/busybox env" in inside
    assert not warnings


def test_the_images_config_says_what_the_yaml_does_not() -> None:
    machine = load(PLAIN.replace('    command: [/bin/web, "it\'s", "two words"]\n', ""))
    tree = Tree()
    tree.file("etc/passwd", "web:x:33:34::/:\n")
    config = oci.Config(entrypoint=("/bin/e",), cmd=("c",), env=("A=b",), cwd="/srv", user="web:99")

    def inside(config: oci.Config) -> str:
        return Container(
            image=machine.services[0], config=config, tree=tree, here="/c", ids={}, volumes={}, setpriv=False
        ).scripts()[1]

    assert inside(config).endswith(" A=b \\\n\t/bin/busybox nsenter -F -r$root -w$root/srv -S33 -G99 -- /bin/e c\n")
    with pytest.raises(ConfigError, match="web: command is missing, and the image dir:x names no program either"):
        inside(oci.Config())


def test_an_image_of_several_containers() -> None:
    tree = Tree()
    tree.file("bin/busybox", "x")
    assert "\noverlay /containers/images/0\napplets\n" in made(tree=tree, shared="/containers/images/0")[1]
    inside = made("readonly: true", tree=tree, shared="/containers/images/0")[1]
    assert "\nmkdir -p $root; mount -o bind /containers/images/0 $root\napplets\n" in inside
    tree.symlink("bin/sh", "busybox")
    assert "applets" not in made(tree=tree)[1]


def test_a_label_that_binds_what_is_no_volume() -> None:
    image = replace(load(PLAIN).services[0], binds=("other:/x",))
    container = Container(image=image, config=oci.Config(), tree=Tree(), here="/c", ids={}, volumes={}, setpriv=False)
    with pytest.raises(ConfigError, match="web: binds: 'other' is no volume; a path from the root, or one of volumes"):
        container.scripts()
