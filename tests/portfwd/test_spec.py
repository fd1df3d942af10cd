"""The text form of a published port."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from portfwd.spec import PublishSpec, split

PRINTABLE = st.characters(exclude_categories=["Cs"])

PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20).map("/{}".format)


@st.composite
def specs(draw: st.DrawFn) -> PublishSpec:
    protocol = draw(st.sampled_from(["tcp", "udp", "unix"]))
    to_path = protocol != "udp" and draw(st.booleans())
    count = 1 if protocol == "unix" or to_path else draw(st.integers(1, 20))
    fields: dict[str, Any] = {"protocol": protocol, "count": count, "annotation": draw(st.text(PRINTABLE, max_size=10))}
    if protocol == "unix":
        fields["path"] = draw(PATHS)
    else:
        fields["bind"] = str(draw(st.ip_addresses()))
        fields["port"] = draw(st.integers(1 if count > 1 else 0, 65536 - count))
    if to_path:
        fields |= {"via": "forwarder", "guest_path": draw(PATHS)}
    else:
        fields["via"] = draw(st.sampled_from(["stack", "forwarder"]))
        addresses = st.ip_addresses(v=4) if fields["via"] == "stack" else st.ip_addresses()
        named = addresses.map(str)
        fields["guest"] = draw(named if fields["via"] == "forwarder" else st.none() | named)
        fields["guest_port"] = draw(st.integers(1, 65536 - count))
    if protocol != "udp":
        fields["proxy"] = draw(st.integers(0, 2))
    if protocol != "unix" and fields["via"] == "stack":
        fields["source"] = draw(st.sampled_from(["gateway", "client"]))
    return PublishSpec(**fields)


@given(specs())
def test_what_is_written_reads_back_the_same(spec: PublishSpec) -> None:
    assert PublishSpec.parse(str(spec)) == spec


@given(st.text(alphabet="tcpudp:[]0123456789.-a ", max_size=30) | st.text(max_size=30))
def test_any_text_is_a_spec_or_a_complaint_that_shows_the_form(text: str) -> None:
    try:
        spec = PublishSpec.parse(text)
    except ConfigError as error:
        assert "GUESTPORT" in str(error)
    else:
        assert PublishSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        pytest.param("8080:80", "tcp:127.0.0.1:8080:80", id="loopback and tcp unless said otherwise (L4)"),
        pytest.param("udp:53:53", "udp:127.0.0.1:53:53", id="protocol alone"),
        pytest.param("0.0.0.0:8080:80", "tcp:0.0.0.0:8080:80", id="address of the host"),
        pytest.param("8080:192.168.65.3:80", "tcp:127.0.0.1:8080:192.168.65.3:80", id="address of the guest"),
        pytest.param("udp:10.0.0.1:1:192.168.65.9:2", "udp:10.0.0.1:1:192.168.65.9:2", id="everything"),
        pytest.param("[::1]:8080:80", "tcp:[::1]:8080:80", id="IPv6 in brackets"),
        pytest.param("8000-8010:80-90", "tcp:127.0.0.1:8000-8010:80-90", id="range"),
        pytest.param("8000-8000:80", "tcp:127.0.0.1:8000:80", id="range of one"),
        pytest.param("0:80", "tcp:127.0.0.1:0:80", id="a free port"),
        pytest.param("8080:/run/x.sock", "tcp:127.0.0.1:8080:/run/x.sock", id="to a socket in the guest"),
        pytest.param("unix:/tmp/a:80", "unix:/tmp/a:80", id="a socket of the host"),
        pytest.param("unix:/tmp/a:192.168.65.9:80", "unix:/tmp/a:192.168.65.9:80", id="to a certain guest"),
        pytest.param("unix:/tmp/a:/run/docker.sock", "unix:/tmp/a:/run/docker.sock", id="socket to socket"),
        pytest.param("unix:/a%3Ab:80", "unix:/a%3Ab:80", id="a colon in a path"),
        pytest.param(
            "80:172.17.0.2:80,via=forwarder",
            "tcp:127.0.0.1:80:172.17.0.2:80,via=forwarder",
            id="what only the VM reaches",
        ),
        pytest.param(
            "80:[fd00::2]:80,via=forwarder", "tcp:127.0.0.1:80:[fd00::2]:80,via=forwarder", id="IPv6 in the VM"
        ),
        pytest.param("80:80,proxy=v2,source=client", "tcp:127.0.0.1:80:80,source=client,proxy=v2", id="options"),
        pytest.param("80:80,via=stack,proxy=off", "tcp:127.0.0.1:80:80", id="options at their defaults"),
    ],
)
def test_short_forms(text: str, canonical: str) -> None:
    assert str(PublishSpec.parse(text)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("80", id="one port"),
        pytest.param("sctp:80:80", id="protocol"),
        pytest.param("80:80:80:80:80", id="too many parts"),
        pytest.param("host:80:80", id="a name for an address"),
        pytest.param("::1:8080:80", id="IPv6 without brackets"),
        pytest.param("[::1:8080:80", id="open bracket"),
        pytest.param("8080:[fe80::1]:80", id="IPv6 guest"),
        pytest.param("65536:80", id="host port"),
        pytest.param("80:0", id="guest port 0"),
        pytest.param("8010-8000:80-90", id="backwards"),
        pytest.param("8000-8010:80-81", id="unequal ranges"),
        pytest.param("0-3:80-83", id="range from a free port"),
        pytest.param("8080:80 ", id="blank"),
        pytest.param("65530-65535:65535-65540", id="range beyond the last port"),
        pytest.param("8٠:80", id="digits of other scripts"),
        pytest.param("unix:80", id="a socket without a path"),
        pytest.param("unix:/a", id="a socket that leads nowhere"),
        pytest.param("unix:a:80", id="a relative path"),
        pytest.param("unix:/a:80-81", id="a range from one socket"),
        pytest.param("udp:53:/run/x", id="datagrams to a path"),
        pytest.param("8000-8001:/run/x", id="a range to one socket"),
        pytest.param("80:/run/x,via=stack", id="a path in the guest by our own TCP"),
        pytest.param("80:80,via=forwarder", id="the default guest by the forwarder"),
        pytest.param("80:10.0.0.1:80,via=forwarder,source=client", id="the client's address by the forwarder"),
        pytest.param("unix:/a:80,source=client", id="the address of a socket's client"),
        pytest.param("udp:53:53,proxy=v1", id="PROXY for datagrams"),
        pytest.param("80:80,proxy=v3", id="a PROXY version"),
        pytest.param("80:80,proxy=v1,proxy=v2", id="an option twice"),
        pytest.param("80:80,colour=red", id="an unknown option"),
        pytest.param("80:80,", id="an empty option"),
        pytest.param("80:80,via=bird", id="an unknown way"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        PublishSpec.parse(text)


def test_a_range_is_its_ports_in_order() -> None:
    assert [str(one) for one in PublishSpec.parse("8000-8002:80-82").each()] == [
        "tcp:127.0.0.1:8000:80",
        "tcp:127.0.0.1:8001:81",
        "tcp:127.0.0.1:8002:82",
    ]


def test_a_list_is_split_at_its_commas_but_not_at_those_of_options() -> None:
    assert split("8080:80,proxy=v2,source=client,udp:53:53,unix:/a:80") == [
        "8080:80,proxy=v2,source=client",
        "udp:53:53",
        "unix:/a:80",
    ]
    assert split("proxy=v1,80:80") == ["proxy=v1", "80:80"], "the complaint comes from the spec"
