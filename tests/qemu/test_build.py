"""Machines that `vm build` made, booted: ours to run onboot in order, to keep services running, and to end as they are told."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import HostError
from pyvpnkit import boot, machine
from tests.support.netns import ROOT, require
from vm.build.build import Built, build
from vm.linuxkit.load import load

pytestmark = [pytest.mark.qemu]

BOOT_S = 180.0
END_S = 60.0
"""Under a second where nothing else runs."""
SHELL = 'stty -echo; while read -r tag line; do (eval "$line") </dev/null 2>&1; echo "@$tag $?"; done'


class Guest(machine.Machine):
    """A machine with its console and QMP, on a network that leads nowhere."""

    def __init__(self, made: Built, kernel: Path, directory: Path, *words: str) -> None:
        self._qmp = directory / "qmp"
        command = [machine.QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-m", "512", "-serial", "stdio"]
        command += ["-kernel", str(kernel), "-initrd", str(made.initrd), "-append", made.cmdline]
        command += ["-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n,romfile="]
        super().__init__([*command, "-qmp", f"unix:{self._qmp},server=on,wait=off", *words])
        try:
            self.boot_lines = self.wait_line(r".*vm: up after ([0-9.]+) s", BOOT_S)[0]
            self.wait_line(r".*built-in shell \(ash\)", BOOT_S)
            self.type(SHELL)
            self.run("true", limit_s=BOOT_S)
        except BaseException:
            self.kill()
            raise

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def until(self, command: str) -> str:
        """What it prints as soon as it succeeds."""
        return self.run(f"until {command}; do usleep 100000; done", limit_s=BOOT_S)

    def run(self, command: str, *, limit_s: float = machine.ANSWER_S * 3, check: bool = True) -> str:
        said = super().run(command, limit_s=limit_s, check=check)
        return "\n".join(line for line in said.splitlines() if not line.startswith("vm: "))

    def press(self, command: str, **arguments: Any) -> None:
        """Have QEMU press a button."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(END_S)
            sock.connect(str(self._qmp))
            with sock.makefile("rw") as file:
                file.readline()
                for words in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    file.write(json.dumps(words) + "\n")
                    file.flush()
                    while "return" not in json.loads(file.readline()):
                        pass

    def ended(self) -> tuple[int, str, float]:
        """Its exit status, its last words, and how long they took."""
        began = time.monotonic()
        status = self.process.wait(END_S)
        self._reader.join()
        return status, self.said(), time.monotonic() - began


def made(yaml: str, directory: Path) -> Built:
    """Skips where the packages cannot be had."""
    require("qemu-system-x86_64", "setpriv")
    cache = Path(os.environ.get("PYVPNKIT_TEST_CACHE") or boot.cache()) / "build"
    try:
        return build(load(yaml), directory, cache=cache, base_directory=ROOT / "examples")
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def tiny(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """The example, with a shared folder."""
    built = made((ROOT / "examples/tiny-linuxkit.yml").read_text(), tmp_path_factory.mktemp("tiny"))
    assert built.initrd_octets < 60_000_000
    share = tmp_path_factory.mktemp("share")
    (share / "file").write_text("of the host\n")
    words = ["-fsdev", f"local,id=f,path={share},security_model=mapped-xattr"]
    guest = Guest(built, built.kernel, short, *words, "-device", "virtio-9p-pci,fsdev=f,mount_tag=share")
    yield guest
    guest.kill()


def test_onboot_ran_in_order(tiny: Guest) -> None:
    done = [line for line in tiny.boot_lines if "vm: " in line]
    assert [line[line.index("vm: ") :] for line in done] == [
        f"vm: onboot {name} done" for name in ("000-sysctl", "001-dhcp", "002-share")
    ]
    assert tiny.run("cat /proc/sys/net/ipv4/ip_forward /proc/sys/vm/panic_on_oom") == "1\n1"
    assert "inet 10.0.2.15/24" in tiny.run("ip -4 addr show dev eth0")
    tiny.run("[ /etc/resolv.conf -nt /etc/hosts ]")  # what a container wrote through a bind
    assert tiny.run("cat /var/share/file") == "of the host", "what a container mounted, with its propagation shared"
    assert tiny.run("hostname") == "tiny"


def test_services_run(tiny: Guest) -> None:
    assert tiny.until("wget -qO- http://127.0.0.1/") == "a tiny machine"
    for program in ("portfwd.invm.forwarder", "vm.guest.vsudd", "vm.guest.timesync"):
        tiny.until(f"ps | grep -q '[p]ython3.11 -m {program}'")
    tiny.run("ls -d /sys/module/vsock /sys/module/overlay /sys/module/virtiofs")


def test_a_service_that_is_killed_starts_again(tiny: Guest) -> None:
    tiny.until("wget -qO /dev/null http://127.0.0.1/")
    before = tiny.run("cat /run/services/web.pid")
    assert before.isdigit()
    tiny.run(f"kill -9 {before}")
    tiny.until(f'[ "$(cat /run/services/web.pid)" != {before} ] && wget -qO /dev/null http://127.0.0.1/')
    assert tiny.run("ps | grep -c '[h]ttpd -f'") == "1", "nothing is left of the first"


def test_services_do_not_see_each_other(tiny: Guest) -> None:
    inside = "nsenter -t $(ps | awk '/[h]ttpd -f/ { print $1 }') -m -p"
    assert "getty" not in tiny.run(f"{inside} chroot /containers/services/web/rootfs /bin/ps")
    assert tiny.run(f"{inside} chroot /containers/services/web/rootfs /bin/cat /www/index.html") == "a tiny machine"
    assert "/containers/services/web/rootfs" not in tiny.run("cat /proc/mounts"), "its mounts are its own"


def test_the_power_button_ends_it(tiny: Guest) -> None:
    """The last of this machine."""
    tiny.press("system_powerdown")
    status, said, _ = tiny.ended()
    assert status == 0 and "vm: poweroff" in said
    assert re.search(r"reboot: Power down", said)


# One field of the schema after another, each by what the program that is so started sees.
REPORT = "binds: ['/var/out:/out']\n    command: [/bin/sh, -c, '({0}) >/out/{1} 2>&1']"
CONTAINERS: dict[str, tuple[str, str]] = {
    "identity": (
        "uid: 1000\n    gid: 1001\n    additionalGids: [7, 8]\n    cwd: /srv/www\n    env: [A=b c, PATH=/bin]\n"
        "    noNewPrivileges: true",
        'id -u; id -g; id -G; pwd; env | grep A=; grep -E "CapBnd|CapEff|NoNewPrivs" /proc/self/status',
    ),
    "able": ("capabilities: [CAP_NET_ADMIN, CAP_CHOWN]", "id -u; grep CapEff /proc/self/status"),
    "all": ("capabilities: [all]", "grep CapEff /proc/self/status"),
    "ambient": (
        "uid: 5\n    capabilities: [CAP_NET_ADMIN]\n    ambient: [CAP_NET_ADMIN]",
        "grep CapEff /proc/self/status",
    ),
    "fixed": (
        "readonly: true\n    tmpfs: ['/scratch:size=64k,mode=700']\n    capabilities: [all]",
        "touch /x; touch /scratch/x && echo written; df /scratch | tail -n 1 | cut -c 1-40",
    ),
    "apart": (
        "net: new\n    uts: new\n    ipc: new\n    hostname: elsewhere\n    capabilities: [all]\n"
        "    sysctl: {net.ipv4.ip_forward: '1'}\n"
        "    runtime: {bindNS: {net: /run/netns/apart}}",
        "echo $PPID; hostname; ls /sys/class/net; cat /proc/sys/net/ipv4/ip_forward; ip link set lo up",
    ),
    "joined": (
        "net: /run/netns/apart\n    capabilities: [all]",
        "ip -o link show dev lo | grep -o LOWER_UP; ls /sys/class/net",
    ),
    "shared": (
        "pid: host\n    capabilities: [all]",
        "cat /proc/1/comm; ls /sys/class/net | tr '\\n' ' '; cat /proc/sys/net/ipv4/ip_forward",
    ),
    "limited": (
        "rlimits: ['nofile,100,200', 'core,0,0']\n    oomScoreAdj: 77\n"
        "    resources: {memory: {limit: 33554432}, pids: {limit: 50}}",
        "ulimit -n; ulimit -H -n; cat /proc/self/oom_score_adj",
    ),
    "masked": (
        "capabilities: [all]\n    maskedPaths: [/etc/secret, /etc/secrets]\n    readonlyPaths: [/etc/open]\n"
        "    binds.add: ['/etc/three:/etc']",
        "cat /etc/secret; ls /etc/secrets; cat /etc/open/x; echo >/etc/open/y",
    ),
    "devices": (
        "devices: [{path: /dev/xyz, type: c, major: 1, minor: 5, mode: '0644'}]",
        "stat -c '%A %t,%T' /dev/xyz; head -c 3 /dev/xyz | xxd -p; echo /dev/*",
    ),
    "volume": (
        "binds.add: ['data:/data', 'fixed:/fixed']",
        "echo more >>/data/x; cat /data/x; echo >/fixed/x; cat /etc/motd",
    ),
}
YAML = r"""
kernel: {image: deb:linux-image-amd64, cmdline: "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"}
init:
  - deb:busybox-static
  - "deb:util-linux,libcap-ng0,libc6,-util-linux-extra,-libblkid1,-libmount1,-libpam0g,-libselinux1,-libsmartcols1,\
    -libsystemd0,-libtinfo6,-libudev1,-libuuid1,-zlib1g,-libcrypt1,-/usr/lib/*/gconv/*"
volumes: [{name: data}, {name: fixed, readonly: true}]
onboot:
  - {name: broken, image: deb:busybox-static, command: [/bin/sh, -c, "echo so it goes; exit 7"]}
  - {name: missing, image: deb:busybox-static, command: [/bin/nothing], binds: [/no/such/place:/x]}
%s
onshutdown:
  - {name: last, image: deb:busybox-static, binds: [/dev:/dev], command: [/bin/sh, -c, "echo so long >/dev/console"]}
services:
  - name: stubborn
    image: deb:busybox-static
    command: [/bin/sh, -c, "trap '' TERM HUP; while :; do sleep 1000; done"]
  - name: polite
    image: deb:busybox-static
    binds: [/dev:/dev]
    command: [/bin/sh, -c, "trap 'echo bye >/dev/console; exit' TERM; while :; do sleep 1; done"]
  - name: getty
    image: deb:busybox-static
    pid: host
    capabilities: [all]
    binds: [/:/host, /dev:/dev, /etc/host-shell:/bin/host-shell:ro]
    command: [/bin/getty, -n, -l, /bin/host-shell, "0", ttyS0]
files:
  - {path: var/out, directory: true, mode: "0777"}
  - {path: etc/host-shell, mode: "0755", contents: "#!/bin/sh\nexec chroot /host /bin/sh -l\n"}
  - {path: etc/three/secret, contents: s}
  - {path: etc/three/secrets/x, contents: s}
  - {path: etc/three/open/x, contents: "open\n"}
"""


def entries() -> str:
    lines = []
    for name, (fields, command) in CONTAINERS.items():
        report = REPORT.format(command.replace("'", "''"), name)
        lines.append(f"  - name: {name}\n    image: deb:busybox-static\n    {fields}\n    {report}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def thorough(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Another, and the kernel without its compression."""
    built = made(YAML % entries(), tmp_path_factory.mktemp("thorough"))
    assert not built.warnings, [str(warning) for warning in built.warnings]
    assert built.vmlinux.read_bytes()[:4] == b"\x7fELF"
    guest = Guest(built, built.vmlinux, short)
    yield guest
    guest.kill()


EXPECTED: dict[str, Any] = {
    "identity": "1000\n1001\n1001 7 8\n/srv/www\nA=b c\nCapEff:\t0000000000040000\nCapBnd:\t0000000000040000\nNoNewPrivs:\t1",
    "able": f"0\nCapEff:\t{1 << 12 | 1 << 0 | 1 << 18:016x}",
    "all": "CapEff:\t000001ffffffffff",
    "ambient": f"CapEff:\t{1 << 12 | 1 << 18:016x}",
    "fixed": re.compile(r"touch: /x: Read-only file system\nwritten\ntmpfs +64 .*"),
    "apart": "0\nelsewhere\nlo\n1",
    "joined": "LOWER_UP\nlo",
    "shared": "init\neth0 lo 0",
    "limited": "100\n200\n77",
    "masked": re.compile(r"open\n/bin/sh: can't create /etc/open/y: Read-only file system"),
    "devices": "crw-r--r-- 1,5\n000000\n/dev/fd /dev/full /dev/mqueue /dev/null /dev/ptmx /dev/pts /dev/random /dev/shm"
    " /dev/stderr /dev/stdin /dev/stdout /dev/tty /dev/urandom /dev/xyz /dev/zero",
    "volume": "more\n/bin/sh: can't create /fixed/x: Read-only file system\ncat: can't open '/etc/motd': No such file or directory",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_a_container_sees(name: str, thorough: Guest) -> None:
    said = thorough.run(f"cat /var/out/{name}")
    expected = EXPECTED[name]
    if isinstance(expected, str):
        assert said == expected
    else:
        assert expected.fullmatch(said), said


def test_limits_are_the_control_groups(thorough: Guest) -> None:
    at = "/sys/fs/cgroup/onboot/010-limited"
    assert thorough.run(f"cat {at}/memory.max {at}/pids.max") == "33554432\n50"


def test_one_that_fails_is_named_and_the_next_runs(thorough: Guest) -> None:
    said = "\n".join(thorough.boot_lines)
    assert re.search(r"vm: onboot 000-broken failed with status 7:\s+so it goes", said)
    assert re.search(
        r"vm: onboot 001-missing failed with status 125:\s+vm: 001-missing: bind: there is no /no/such/place", said
    )
    assert said.index("001-missing") < said.index("002-identity done") < said.index("003-able done")


def test_a_reboot_waits_for_the_polite_and_not_for_the_stubborn(thorough: Guest) -> None:
    """The last of this machine."""
    thorough.until("ps | grep -q '[t]rap .echo bye' && ps | grep -q '[s]leep 1000'")
    thorough.press("send-key", keys=[{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")])
    status, said, _ = thorough.ended()
    assert status == 0
    assert (
        said.index("vm: reboot") < said.index("so long") < said.index("bye") < said.index("reboot: Restarting system")
    )
