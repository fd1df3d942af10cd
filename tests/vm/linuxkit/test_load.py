"""LinuxKit's YAML as who writes it sees it: what is read, what is complained about and where, and that it is bounded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netstack.errors import ConfigError
from vm import yaml_lines
from vm.linuxkit.fields import known
from vm.linuxkit.load import load, load_all, render
from vm.linuxkit.schema import File, Image, ImageConfig, LinuxKit, Mount, Runtime
from vm.yaml_lines import ConfigErrors

DOCKER_VM = Path(__file__).with_name("docker_vm.yml")


def complaints(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(text, "a.yml")
    assert str(caught.value) == "\n".join(caught.value.complaints)
    return list(caught.value.complaints)


def service(*lines: str) -> str:
    """One service, whose own lines begin in line 4."""
    return "\n".join(["services:", "  - name: one", "    image: example/one:v1", *("    " + line for line in lines)])


def test_a_whole_machine_is_read() -> None:
    machine = load(DOCKER_VM)
    assert machine.kernel is not None
    assert (machine.kernel.image, machine.kernel.tar) == ("example/kernel:6.1.0", "none")
    assert machine.init[3] == "registry.example:5000/containerd:v1"
    assert [image.name for image in machine.onboot] == (
        "metadata sysctl sysfs binfmt format mount swap mount-ports keep-logs dhcp wg0".split()
    )
    assert machine.onboot[1].sysctl == {"net.ipv4.ip_forward": "1"}
    assert machine.onboot[7].binds == ("/var/:/outer:rbind,rshared",)
    assert machine.onboot[7].rootfs_propagation == "shared"
    assert [image.name for image in machine.onshutdown] == ["farewell"]
    services = {image.name: image for image in machine.services}
    assert services["acpid"].command is None
    assert services["ntpd"].capabilities_add == ("CAP_SYS_TIME", "CAP_SYS_NICE")
    assert services["docker"].command is not None
    assert services["docker"].command[-1] == "overlay2"
    assert services["docker"].mounts is not None
    assert services["docker"].mounts[0].point == "/sys/fs/cgroup"
    assert [volume.name for volume in machine.volumes] == ["empty", "pages"]
    assert machine.trust is not None
    assert machine.containers == machine.onboot + machine.onshutdown + machine.services


def test_every_field_of_an_image_is_read_with_its_shape() -> None:
    web = next(image for image in load(DOCKER_VM).services if image.name == "web")
    assert web.image == "@pkg:./web"  # kept as it is: only linuxkit can resolve it
    assert (web.net, web.ipc, web.uts, web.pid) == ("/run/netns/wg0", "new", "host", "host")
    assert (web.uid, web.gid, web.additional_gids) == ("getty", 82, ("ntpd", 1000))
    assert (web.readonly, web.no_new_privileges, web.oom_score_adj) == (True, True, -500)
    assert web.resources is not None
    assert web.resources.memory is not None
    assert web.resources.memory.limit == 104857600
    assert web.resources.pids is not None
    assert web.resources.pids.limit == 64
    assert web.resources.block_io is not None
    assert web.resources.block_io.throttle_read_iops_device is not None
    assert web.resources.block_io.throttle_read_iops_device[0].rate == 100
    assert web.devices is not None
    assert (web.devices[0].major, web.devices[0].mode) == (5, "0666")
    assert web.annotations == {"org.example.owner": "nobody"}
    runtime = next(image for image in load(DOCKER_VM).onboot if image.name == "wg0").runtime
    assert runtime is not None
    assert runtime.interfaces is not None
    assert [(one.add, one.peer, one.create_in_root) for one in runtime.interfaces] == [
        ("wireguard", None, True),
        ("veth", "veth1", None),
    ]
    assert runtime.bind_ns is not None
    assert runtime.bind_ns.net == "/run/netns/wg0"


def test_files_have_modes_and_one_source_each() -> None:
    motd, metadata, key, directory, link = load(DOCKER_VM).files
    assert (motd.contents, motd.bits, motd.uid, motd.gid) == ("one\ntwo\n", 0o644, 0, "web")
    assert (metadata.metadata, metadata.bits) == ("yaml", 0o600)
    assert (key.source, key.optional) == ("~/.ssh/id_ed25519.pub", True)
    assert (directory.directory, directory.bits) == (True, 0o711)
    assert link.symlink == "/usr/share/zoneinfo/UTC"
    assert File(path="var/x", directory=True).bits == 0o700


def test_what_is_written_reads_back_as_the_same() -> None:
    machine = load(DOCKER_VM)
    assert load(render(machine), "again") == machine


def test_the_schema_has_each_key_of_linuxkit() -> None:
    # spec companions 3.1, and its older keys
    assert list(known(LinuxKit)) == "kernel init volumes onboot onshutdown services files trust".split()
    assert set(known(Image)) - set(known(ImageConfig)) == {"name", "image"}
    assert set(known(ImageConfig)) == set(
        """capabilities capabilities.add ambient mounts binds binds.add tmpfs command env cwd net ipc uts pid userns readonly
        maskedPaths readonlyPaths uid gid additionalGids noNewPrivileges hostname oomScoreAdj rootfsPropagation cgroupsPath
        resources sysctl rlimits uidMappings gidMappings annotations devices runtime""".split()
    )
    assert list(known(Runtime)) == "cgroups mounts mkdir interfaces bindNS namespace".split()


def test_all_complaints_come_at_once_in_the_order_of_the_file() -> None:
    found = complaints(
        "kernel: {image: k, comandline: x}\n"
        "init: example/init:v1\n"
        "services:\n"
        "  - name: a/b\n"
        "    imag: example/one:v1\n"
        "    net: bridge\n"
        "files:\n"
        "  - path: ../etc/passwd\n"
        "    contents: x\n"
        "    mode: 0644\n"
        "service: []\n"
    )
    assert found == [
        "a.yml:1:20: unknown key 'comandline' in 'kernel'; did you mean 'cmdline'?",
        "a.yml:2:7: init: a list is wanted, such as [...] or lines that begin with -",
        "a.yml:4:5: services: image is missing",
        "a.yml:4:11: services.name: 'a/b' is no name; write letters, digits and . _ - between them, at most 76 characters",
        "a.yml:5:5: unknown key 'imag' in 'services'; did you mean 'image'?",
        "a.yml:6:10: services.net: 'bridge' is no namespace; write host, new, or the path of one such as /run/netns/name",
        "a.yml:8:11: files.path: '../etc/passwd' names no file below the root; write a path such as etc/motd, without ..",
        "a.yml:10:11: files.mode: '0644' without quotes is no text but a number; write \"0644\"",
        "a.yml:11:1: unknown key 'service' at the top; did you mean 'services'?",
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("capabilities: [CAP_SYS_ADMN]", "'CAP_SYS_ADMN' is no capability; did you mean 'CAP_SYS_ADMIN'?"),
        ("capabilities: all", "a list is wanted"),
        ("binds: [/var]", "is no bind; write SOURCE:/DESTINATION"),
        ("binds: ['/a:/b:ro:x']", "is no bind"),
        ("binds: ['store:/b']", "no volume is named 'store'; write /store, or add it"),
        ("tmpfs: [tmp]", "is no tmpfs; write /DESTINATION"),
        ("env: [PATH]", "is no variable; write NAME=VALUE"),
        ("cwd: srv", "is no path from the root; write /srv"),
        ("command: [/bin/x, 8080]", "'8080' without quotes is no text but a number; write \"8080\""),
        ("command: [/bin/x, yes]", "'yes' without quotes is no text but a truth value"),
        ("command: [/bin/x, ~]", "'~' without quotes is no text but nothing"),
        ("command: [[a]]", "a single value is wanted"),
        ("readonly: 1", "'1' is neither true nor false"),
        ("uid: -1", "-1 is no id; write a number from 0"),
        ("uid: nobody", "no container is named 'nobody'; known are: one, root"),
        ("additionalGids: [on-e]", "no container is named 'on-e'; did you mean 'one'?"),
        ("oomScoreAdj: 1001", "write a whole number from -1000 to 1000"),
        ("oomScoreAdj: high", "'high' is no whole number"),
        ("rootfsPropagation: share", "did you mean 'shared'?"),
        ("rlimits: ['nofile,1024']", "write NAME,SOFT,HARD"),
        ("rlimits: ['nofiles,1,2']", "did you mean 'nofile'?"),
        ("rmlimits: ['nofile,1,2']", "unknown key 'rmlimits' in 'services'; did you mean 'rlimits'?"),
        ("devices: [{path: /dev/x}]", "type is missing"),
        ("mounts: [{destination: /x}]", "type is missing; only for a known source"),
        ("mounts: [{type: tmpfs}]", "destination is missing"),
        ("sysctl: {net.ipv4.ip_forward: 1}", "services.sysctl.net.ipv4.ip_forward: '1' without quotes is no text"),
        ("sysctl: [a]", "a mapping of names to texts is wanted"),
        ("resources: {memory: {limit: 1.5}}", "services.resources.memory.limit: '1.5' is no whole number"),
        ("resources: {memory: {limt: 1}}", "unknown key 'limt' in 'services.resources.memory'; did you mean 'limit'?"),
        ("runtime: {interface: []}", "did you mean 'interfaces'?"),
        ("runtime: {mkdir: [var]}", "services.runtime.mkdir: 'var' is no path from the root"),
        ("runtime: x", "services.runtime: a mapping of keys to values is wanted"),
        ("hostname: ''", "is empty; leave the key out"),
    ],
)
def test_a_bad_value_is_named_with_its_line_and_what_would_be_accepted(line: str, complaint: str) -> None:
    (found,) = complaints(service(line))
    assert complaint in found
    # What shows only in the whole file stands at its container.
    assert found.startswith("a.yml:2:5: " if "is named" in complaint else "a.yml:4:")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["- path: etc/x"], "etc/x: give one of directory, symlink, contents, source, metadata; given is none of them"),
        (["- path: etc/x", "  contents: a", "  source: b"], "given is contents and source"),
        (["- path: etc/x", "  directory: true", "  symlink: b"], "given is directory and symlink"),
        (["- path: etc/x", "  metadata: json"], "files.metadata: 'json' is unknown; known are: yaml"),
        (["- contents: x"], "files: path is missing"),
        (["- path: /", "  contents: x"], "names no file below the root"),
        (["- path: a", "  contents: x", "  mode: rw"], "'rw' is no mode; write it in octal and in quotes"),
        (["- path: a", "  contents: x", "  mode: '77777'"], "'77777' is no mode"),
        (["- path: a", "  contents: x", "  uid: who"], "a: uid: no container is named 'who'"),
    ],
)
def test_a_file_that_cannot_be_is_refused(lines: list[str], complaint: str) -> None:
    (found,) = complaints("\n".join(["files:", *("  " + line for line in lines)]))
    assert complaint in found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "a.yml: is empty; write kernel, init and services at least"),
        ("# nothing\n", "a.yml: is empty"),
        ("- a\n", "a.yml:1:1: the file: a mapping of keys to values is wanted"),
        ("kernel: [\n", "a.yml:2:1: not YAML: "),
        ("kernel: {}\n---\ninit: []\n", "a.yml:3:1: a second document begins; give a file for each"),
        ("kernel: &a [*b]\n", "a.yml:1:13: not YAML: found undefined alias 'b'"),
        ("kernel: {}\nkernel: {}\n", "a.yml:2:1: 'kernel' is given twice (first on line 1); keep one"),
        ("? [a]\n: b\n", "a.yml:1:3: a key must be a plain word"),
        ("a\0b", "a.yml:1:2: not YAML: special characters are not allowed"),
        ('kernel: {cmdline: "\\UFFFFFFFF"}', "not YAML: a number beyond what there is"),
        ("kernel: &a [*a]\n", "a.yml:1:9: nested deeper than 64; an alias may not lie in what it names"),
        ("kernel: " + "[" * 3000, "nested deeper than 64"),
        ("kernel: " + "[" * 70 + "]" * 70, "a.yml:1:73: nested deeper than 64"),
        ("kernel: {<<: x, image: k}\n", "a.yml:1:14: <<: a mapping is wanted"),
    ],
)
def test_what_is_no_yaml_is_a_complaint_with_its_place(text: str, complaint: str) -> None:
    assert complaint in complaints(text)[0]


def bomb(levels: int) -> str:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(lines)


def test_aliases_of_aliases_are_refused_before_they_cost_anything() -> None:
    before = time.process_time()
    found = complaints(bomb(9))
    assert any("more than 100000 values with the aliases followed" in one for one in found)
    assert time.process_time() - before < 20


def test_a_long_text_may_not_be_repeated_by_aliases() -> None:
    text = "kernel: {cmdline: &a '" + "x" * (1 << 20) + "'}\ninit: [" + ", ".join(["*a"] * 40) + "]"
    assert any("characters with the aliases followed" in one for one in complaints(text))


def test_more_values_than_are_held_end_the_reading() -> None:
    (found,) = complaints("init: [" + "x," * 250_000 + "]")
    assert found.startswith("a.yml:1:4")
    assert found.endswith(": more than 100000 values; split the file")


def test_an_alias_and_a_merge_key_work_where_they_are_honest() -> None:
    machine = load(
        "onboot: [&defaults {image: example/one:v1, net: host, name: zero}]\n"
        "services:\n"
        "  - <<: *defaults\n"
        "    name: a\n"
        "  - <<: [{net: new}, *defaults]\n"
        "    name: b\n"
    )
    assert [(one.name, one.image, one.net) for one in machine.services] == [
        ("a", "example/one:v1", "host"),
        ("b", "example/one:v1", "new"),
    ]


def test_complaints_are_bounded() -> None:
    found = complaints("services:\n" + "  - x: 1\n" * 500)
    assert len(found) == yaml_lines.MAX_COMPLAINTS + 1
    assert found[-1] == "and 1400 more"


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.yml"
    path.write_bytes(b"#" * (yaml_lines.MAX_OCTETS + 1))
    with pytest.raises(ConfigError, match="is longer than 8 MiB"):
        load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yml: No such file or directory; name a YAML file that can be read"):
        load(tmp_path / "none.yml")
    latin = tmp_path / "latin.yml"
    latin.write_bytes(b"kernel: {}\n# \xe4\n")
    with pytest.raises(ConfigError, match=f"{latin}:2: not YAML: an octet that is no UTF-8"):
        load(latin)


def test_several_files_are_one_machine(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yml", tmp_path / "second.yml"
    first.write_text("kernel: {image: a, cmdline: quiet}\ninit: [i:1]\n" + service())
    second.write_text("kernel: {cmdline: loud}\ninit: [i:2]\nservices:\n  - {name: two, image: t, uid: one}\n")
    machine = load_all([first, second])
    assert machine.kernel is not None
    assert (machine.kernel.image, machine.kernel.cmdline) == ("a", "loud")
    assert machine.init == ("i:1", "i:2")
    assert [one.name for one in machine.services] == ["one", "two"]
    assert machine.services[1].mark.name == str(second)
    with pytest.raises(ConfigErrors, match=rf"{second}:4:5: .*no container is named 'one'"):
        load(second)


def test_service_names_are_their_own_across_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.yml", tmp_path / "b.yml"]
    for path in paths:
        path.write_text(service())
    with pytest.raises(ConfigErrors) as caught:
        load_all(paths)
    assert caught.value.complaints == (
        f"{paths[1]}:2:5: a service 'one' is at {paths[0]}:2:5 already; give each a name of its own",
    )


def test_names_of_steps_at_boot_may_repeat() -> None:
    machine = load("onboot:\n  - {name: mount, image: m:1}\n  - {name: mount, image: m:1}\n")
    assert len(machine.onboot) == 2


@pytest.mark.parametrize(
    "text", ["22:22", "1:30", "0o17", "1e3", "on", "~", "null", "0x1f", "<<", "a: b", "- x", "#", " x", "ä"]
)
def test_no_text_changes_on_its_way_through_yaml(text: str) -> None:
    machine = LinuxKit(services=(Image(name="one", image="i", command=(text, "x\n" + text), hostname=text),))
    assert load(render(machine)) == machine


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40))
def test_any_printable_text_reads_back(text: str) -> None:
    machine = LinuxKit(services=(Image(name="one", image="i", command=(text,)),))
    try:
        read = load(render(machine))
    except ConfigErrors as error:
        assert "special characters" in str(error)
    else:
        assert read == machine


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_octets_are_a_machine_or_complaints(octets: bytes) -> None:
    try:
        load(octets.decode("latin-1"), "a.yml")
    except ConfigErrors as error:
        assert error.complaints


def test_a_mount_takes_what_is_left_out_from_the_rest() -> None:
    assert Mount(source="proc").kind == "proc"
    assert Mount(source="proc").point == "/proc"
    assert Mount(destination="/dev").kind == "tmpfs"
    with pytest.raises(ConfigError, match="type is missing"):
        Mount(destination="/x")
