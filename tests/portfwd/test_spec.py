"""The text form of a published port."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from portfwd.spec import PublishSpec


@st.composite
def specs(draw: st.DrawFn) -> PublishSpec:
    count = draw(st.integers(1, 20))
    return PublishSpec(
        protocol=draw(st.sampled_from(["tcp", "udp"])),
        bind=str(draw(st.ip_addresses())),
        port=draw(st.integers(1 if count > 1 else 0, 65536 - count)),
        guest=draw(st.none() | st.ip_addresses(v=4).map(str)),
        guest_port=draw(st.integers(1, 65536 - count)),
        count=count,
    )


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
