"""Link URLs: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from netstack.link.spec import LinkSpec, detect

GOOD = [
    "vhost-user:/run/vhost.sock",
    "vhost-user:connect:/run/vhost.sock,mtu=9000,offload=off,config=off",
    "vhost-user:fd:3,mac=02:00:00:00:00:01",
    "qemu:/run/net.sock",
    "qemu:./net.sock",
    "qemu:tcp:127.0.0.1:1234",
    "qemu:tcp:[::1]:1234",
    "qemu:connect:/run/net.sock",
    "qemu:connect:tcp:localhost:1234",
    "qemu:fd:3",
    "vmnet:/run/eth.sock,mtu=1400,name=docker",
    "vmnet:fd:3",
    "unixgram:/run/vfkit.sock",
    "unixgram:fd:4",
    "bess:/run/uml.sock",
    "fd:3",
    "fd:3,mtu=9000",
    "fd:3,kind=tap,offload=off",
    "tap:netns=guest",
    "tap:netns=/run/netns/guest,ifname=ens3,mac=02:00:00:00:00:01,offload=off",
    "tap:pid=1234,mtu=65520",
    "tap:fd=5",
    "tap:tap0",
    "tap:netns=/run/netns/a,ifname=tap0,userns=/proc/7/ns/user",
    "packet:netns=guest,ifname=eth1",
    "packet:pid=77",
    "packet:veth0",
    "qemu:/odd,,path/a.sock,name=one,,two",
    "qemu:/run/net.sock,once=on",
    "qemu:tcp:127.0.0.1:1234,once=on",
    "bess:/run/uml.sock,mtu=9000,once=on",
    "stdio:",
    "stdio:,mtu=4000",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_link_is_written_as_it_is_read(text: str) -> None:
    assert str(LinkSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("unixgram:///run/vfkit.sock", "unixgram:/run/vfkit.sock"),
        ("fd:3,kind=vmnet", "vmnet:fd:3"),
        ("fd:3,kind=vhost-user", "vhost-user:fd:3"),
        ("vhost-user:/run/a.sock,mode=client", "vhost-user:connect:/run/a.sock"),
        ("vhost-user:/run/a.sock,mode=server,config=on", "vhost-user:/run/a.sock"),
        ("tap:netns=a,mac=02-AA-00-00-00-0F", "tap:netns=a,mac=02:aa:00:00:00:0f"),
        ("tap:netns=a,offload=on", "tap:netns=a"),
    ],
)
def test_other_spellings_mean_the_same(text: str, same: str) -> None:
    assert LinkSpec.parse(text) == LinkSpec.parse(same)
    assert str(LinkSpec.parse(text)) == same


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "one of the schemes vhost-user, qemu"),
        ("qemu", "SCHEME:ADDRESS"),
        ("/run/net.sock", "one of the schemes"),
        ("ethernet:/x", "one of the schemes"),
        ("vhost-user:vhost.sock,mode=server", "write vhost-user:/PATH"),
        ("vhost-user:tcp:127.0.0.1:1", "write vhost-user:/PATH"),
        ("vhost-user:/x,mode=sideways", "mode=server or mode=client"),
        ("vhost-user:connect:/x,mode=server", "contradict each other"),
        ("qemu:/x,mode=client", "is for vhost-user"),
        ("qemu:/x,config=off", "config is for vhost-user links only"),
        ("vhost-user:/x,config=maybe", "use on or off"),
        ("vhost-user:/x,ifname=eth1", "tap and packet links only"),
        ("stdio:gvforwarder", "write stdio:"),
        ("stdio", "SCHEME:ADDRESS"),
        ("fd:3,kind=stdio", "use one of vhost-user, qemu, vmnet"),
        ("tap:tap0,userns=/x", "userns is for tap and packet links in a network namespace"),
        ("qemu:/x,userns=/x", "userns is for tap and packet links in a network namespace"),
        ("vmnet:/x,once=on", "once is for qemu, bess and unixgram links that listen"),
        ("qemu:connect:/x,once=on", "once is for qemu, bess and unixgram links that listen"),
        ("qemu:fd:3,once=on", "once is for qemu, bess and unixgram links that listen"),
        ("qemu:/x,once=yes", "use on or off"),
        ("qemu:", "write qemu:/PATH"),
        ("qemu:net.sock", "write qemu:/PATH"),
        ("qemu:tcp:127.0.0.1", "qemu:tcp:HOST:PORT"),
        ("qemu:tcp:127.0.0.1:70000", "qemu:tcp:HOST:PORT"),
        ("qemu:tcp:127.0.0.1:" + "1" * 5000, "qemu:tcp:HOST:PORT"),
        ("qemu:tcp:example.com:80", "qemu:tcp:HOST:PORT"),
        ("qemu:tcp:::1:80", "qemu:tcp:HOST:PORT"),
        ("unixgram:tcp:127.0.0.1:1", "write unixgram:/PATH"),
        ("unixgram:connect:/run/x", "write unixgram:/PATH"),
        ("bess:tcp:127.0.0.1:1", "write bess:/PATH"),
        ("fd:three", "write fd:N"),
        ("fd:" + "3" * 5000, "write fd:N"),
        ("fd:2147483648", "write fd:N"),
        ("tap:pid=99999999999999999999", "tap:pid=PID"),
        ("fd:3,kind=token-ring", "use one of vhost-user, qemu, vmnet"),
        ("tap:pid=x", "tap:pid=PID"),
        ("tap:", "tap:netns=NAME"),
        ("tap:user=me", "tap:netns=NAME"),
        ("tap:much-too-long-a-name", "tap:netns=NAME"),
        ("qemu:/x,mtu=big", "mtu=1500"),
        ("qemu:/x,mtu=" + "1" * 5000, "mtu=1500"),
        ("qemu:/x,mtu=100", "576..65520"),
        ("qemu:/x,speed=1", "unknown option 'speed'; there are mtu"),
        ("qemu:/x,mtu", "one option=value"),
        ("qemu:/x,mtu=1500,mtu=1500", "one option=value"),
        ("qemu:/x,mac=02:00:00:00:00:01", "tap, packet and vhost-user links only"),
        ("tap:netns=a,mac=hello", "MAC"),
        ("tap:netns=a,mac=01:00:00:00:00:01", "group address"),
        ("tap:netns=a,offload=maybe", "use on or off"),
        ("tap:netns=a,ifname=a/b", "no interface name"),
        ("qemu:/a\0b", "SCHEME:ADDRESS"),
    ],
)
def test_a_link_that_cannot_be_is_refused_with_what_can(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[").replace(".", r"\.")):
        LinkSpec.parse(text)


@given(text=st.text(max_size=60))
def test_any_text_is_a_link_or_a_complaint(text: str) -> None:  # Z12
    for candidate in (text, "qemu:" + text, "tap:" + text, "fd:" + text):
        try:
            spec = LinkSpec.parse(candidate)
        except ConfigError:
            continue
        assert LinkSpec.parse(str(spec)) == spec


@given(path=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), name=st.text(min_size=1))
def test_any_path_and_name_survive_the_text_form(path: str, name: str) -> None:
    spec = LinkSpec(kind="vmnet", how="unix", where="/" + path.lstrip("/"), name=name.replace("\0", "_"))
    assert LinkSpec.parse(str(spec)) == spec


def test_inherited_descriptors_tell_what_they_are() -> None:
    with (
        socket.socket(socket.AF_UNIX) as door,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        open(os.devnull) as device,
        open(__file__) as file,
    ):
        stream, other = socket.socketpair()
        seqpacket, another = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with stream, other, seqpacket, another:
            assert detect(stream.fileno()) == ("qemu", False)
            assert detect(datagrams.fileno()) == ("unixgram", False)
            assert detect(seqpacket.fileno()) == ("bess", False)
        door.bind("")  # an abstract name of the kernel's choice
        door.listen()
        assert detect(door.fileno()) == ("vmnet", True)
        assert detect(device.fileno()) == ("tap", False)
        with pytest.raises(ConfigError, match="neither a socket nor a TAP"):
            detect(file.fileno())
        number = door.fileno()
    with pytest.raises(ConfigError, match="leave the descriptor open"):
        detect(number + 1000)
    with pytest.raises(ConfigError, match="leave the descriptor open"):
        detect(LinkSpec.parse("fd:2147483647").descriptor)
