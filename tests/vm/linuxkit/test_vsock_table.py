"""The vsock ports of a machine as its supervisor sees them (spec companions 1.2, 3.3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm.linuxkit.load import load
from vm.linuxkit.schema import Image, LinuxKit
from vm.linuxkit.vsock_table import Entry, check, derive
from vm.yaml_lines import ConfigErrors

DOCKER_VM = Path(__file__).with_name("docker_vm.yml")
GUID = "00000948-facb-11e6-bd58-64006a7986d3"
OTHER_GUID = "0b95756a-9985-48ad-9470-78e060895be7"


def service(*command: str, name: str = "one", image: str = "example/one:v1") -> Image:
    return Image(name=name, image=image, command=command or None)


def entries(*services: Image) -> list[tuple[str, int | None, str]]:
    return [(one.what, one.port, one.listens) for one in derive(LinuxKit(services=services))]


def test_the_table_of_a_docker_machine() -> None:
    assert derive(load(DOCKER_VM)) == (
        Entry(port=2376, service="vsudd", what="docker"),
        Entry(port=62373, service="vpnkit-forwarder", what="forwarder"),
        Entry(port=62372, service="host-timesync-daemon", what="timesync"),
        Entry(port=4098, service="docker", what="control", listens="host"),
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/vsudd -inport 2376:unix:/run/docker.sock", [("docker", 2376, "guest")]),
        ("/vsudd --inport=0x948:unix:/run/docker.sock", [("docker", 2376, "guest")]),
        (
            "vsudd -syslog -inport 2374:unix:/run/containerd.sock -inport 2376:unix:/var/run/docker.sock -pidfile /p",
            [("/run/containerd.sock", 2374, "guest"), ("docker", 2376, "guest")],
        ),
        (f"vsudd -inport {GUID.upper()}:unix:/x", [("/x", 2376, "guest")]),
        (f"vsudd -inport {OTHER_GUID}:unix:/x", [("/x", None, "guest")]),
        ("vsudd", []),
        ("/usr/bin/vpnkit-forwarder", [("forwarder", 62373, "guest")]),
        ("/vpnkit-forwarder -vsockPort 100", [("forwarder", 100, "guest")]),
        (
            "vpnkit-forwarder -data-listen 62373 -control-listen 4098 -debug",
            [("forwarder", 62373, "guest"), ("control", 4098, "guest")],
        ),
        ("vpnkit-forwarder -data-listen=3/200", [("forwarder", 200, "guest")]),
        ("vpnkit-forwarder -data-connect 62373", [("forwarder", 62373, "host")]),
        ("vpnkit-forwarder -data-connect 2/62373", [("forwarder", 62373, "host")]),
        ("vpnkit-forwarder -data-connect 1/62373", []),
        ("vpnkit-forwarder -data-listen /run/data.sock -control-listen /run/control.sock", []),
        ("host-timesync-daemon", [("timesync", 62372, "guest")]),
        ("/usr/bin/host-timesync-daemon -port 0xF3A6 -cid 3", [("timesync", 0xF3A6, "guest")]),
        ("host-timesync-daemon -port 1234", [("timesync", 1234, "guest")]),
        ("vpnkit-expose-port -proto tcp -host-port 80 -container-port 80", [("control", 4098, "host")]),
        ("vpnkit-expose-port -control 2/5000 -proto tcp", [("control", 5000, "host")]),
        ("vpnkit-expose-port -control 1/4098", []),
        ("vpnkit-expose-port -control /run/control.sock", []),
        ("dockerd --userland-proxy-path /usr/bin/vpnkit-expose-port -s overlay2", [("control", 4098, "host")]),
        ("python3 -m vm.guest.vsudd -inport 5:unix:/x", [("/x", 5, "guest")]),
        ("python3 /lib/timesync.py -port 7", [("timesync", 7, "guest")]),
        ("pyvpnkit forwarder -data-listen 9", [("forwarder", 9, "guest")]),
        ("python3.11 -m portfwd.invm.forwarder -data-listen 62373", [("forwarder", 62373, "guest")]),
        ("python3 -m portfwd.invm.expose_port -proto tcp", [("control", 4098, "host")]),
        ("python3 -m vm.guest.mount9p /mnt", [("9p", 564, "host")]),
        ("mount9p -listen -port 0x300 /mnt", [("9p", 0x300, "guest")]),
        ("mount9p -port /run/9p.sock /mnt", []),
        ("socat VSOCK-LISTEN:2376,fork,reuseaddr UNIX-CONNECT:/var/run/docker.sock", [("docker", 2376, "guest")]),
        ("socat -d UNIX-LISTEN:/run/x.sock,fork vsock-connect:2:4098", [("/run/x.sock", 4098, "host")]),
        ("socat vsock-listen:5 TCP:127.0.0.1:80", [("TCP:127.0.0.1:80", 5, "guest")]),
        ("socat - VSOCK-CONNECT:1:5", []),
        ("mail forwarder", []),
        ("pyvpnkit run", []),
        ("pyvpnkit", []),
        ("nginx -g daemon", []),
    ],
)
def test_a_command_line_takes_its_ports(command: str, expected: list[tuple[str, int | None, str]]) -> None:
    assert entries(service(*command.split())) == expected


def test_a_shell_runs_several() -> None:
    script = (
        "mkdir -p /run && exec /vsudd -inport '2376:unix:/var/run/docker.sock' & host-timesync-daemon -port 9; wait"
    )
    assert entries(service("/bin/sh", "-c", script)) == [("docker", 2376, "guest"), ("timesync", 9, "guest")]
    assert entries(service("sh", "-c", "echo 'never ends")) == []


def test_a_service_without_a_command_is_known_by_its_image_or_name() -> None:
    assert entries(service(image="registry:5000/linuxkit/host-timesync-daemon:v1@sha256:0")) == [
        ("timesync", 62372, "guest")
    ]
    assert entries(service(name="host-timesync-daemon", image="dir:timesync")) == [("timesync", 62372, "guest")]
    assert entries(service(image="linuxkit/vpnkit-forwarder:v0.6")) == [("forwarder", 62373, "guest")]
    assert entries(service(name="timesync")) == []


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("vsudd -inport 2376", "-inport '2376': write PORT:unix:PATH"),
        ("vsudd -inport 2376:tcp:80", "write PORT:unix:PATH"),
        ("vsudd -inport 4294967296:unix:/x", "'4294967296' is no vsock port"),
        ("vsudd -inport", "-inport has no value"),
        ("host-timesync-daemon -port f3a4", "'f3a4' is no vsock port; write a number up to"),
        ("vpnkit-forwarder -vsockPort -1", "'-1' is no vsock port"),
        ("socat VSOCK-LISTEN:x -", "'x' is no vsock port"),
    ],
)
def test_a_command_line_that_its_program_refuses_is_a_complaint_at_its_service(command: str, complaint: str) -> None:
    words = json.dumps(command.split())
    machine = load(
        f"services:\n  - {{name: one, image: i, command: {words}}}\n  - {{name: two, image: i, command: {words}}}\n",
        "a.yml",
    )
    with pytest.raises(ConfigErrors) as caught:
        derive(machine)
    first, second = caught.value.complaints
    assert first.startswith("a.yml:2:5: one: ")
    assert second.startswith("a.yml:3:5: two: ")
    assert complaint in first


WORDS = st.sampled_from(
    "sh -c vsudd vpnkit-forwarder pyvpnkit forwarder socat mount9p -m -inport -port= -data-listen -control".split()
    + "1:unix:/x VSOCK-LISTEN:9 9 2/9 / ; && ' -- - =".split()
)


@settings(deadline=None)
@given(st.lists(WORDS | st.text(max_size=6), max_size=8), st.booleans())
def test_any_command_line_is_a_table_or_complaints(words: list[str], in_shell: bool) -> None:
    command = ["sh", "-c", " ".join(words)] if in_shell else words
    try:
        table = derive(LinuxKit(services=(Image(name="one", image="i", command=tuple(command)),)))
    except ConfigErrors as error:
        assert error.complaints
    else:
        check(table, {"docker": 9, "mine": 9})


def test_ports_of_vm_yml_that_fit_are_no_complaint() -> None:
    table = derive(load(DOCKER_VM))
    assert check(table, {"docker": 2376, "forwarder": 62373, "timesync": 62372, "control": 4098}) == ()
    assert check(table, {}) == ()
    assert check((), {"control": 4098}) == ()
    assert check((Entry(port=9, service="one", what="/x"),), {"mine": 9}) == ()


def test_the_number_that_two_programs_have_as_their_default_is_found() -> None:
    table = derive(
        LinuxKit(
            services=(service("vpnkit-forwarder", "-data-listen", "62372"), service("host-timesync-daemon", name="two"))
        )
    )
    assert check(table, {"forwarder": 62372, "timesync": 62372}) == (
        "vsock port 62372 is taken by forwarder of 'one' and by timesync of 'two'; give one of them another port",
        "vsock.ports.timesync: 62372 is also forwarder's; give each its own",
    )


def test_ports_of_vm_yml_that_do_not_fit_are_told_with_what_would() -> None:
    table = derive(load(DOCKER_VM))
    assert check(table, {"docker": 2375, "mine": 5}) == (
        "vsock.ports.docker: is 2375, but 'vsudd' uses 2376; write 2376 or change the service",
        "vsock.ports.mine: no service takes 5; taken are: 2376, 4098, 62372, 62373",
    )
    assert check((), {"docker": 2376, "mine": 5}) == (
        "vsock.ports.docker: no service of the LinuxKit file is one; add it there, or leave the port out",
        "vsock.ports.mine: no service takes 5; taken are: none",
    )
