"""Settings as the person who writes them meets them: complaints, overriding, and one definition behind all texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from netstack.settings import Limits, Network, Timeouts
from pyvpnkit import config
from pyvpnkit.config import OPTIONS, Option, Settings, value_of
from pyvpnkit.loader import ConfigErrors, load


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "vm.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def complaints(path: str | None, **flags: list[str]) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(path, {key.replace("__", "."): texts for key, texts in flags.items()})
    return [text.replace(f"{path}:", "") for text in caught.value.complaints]


def test_nothing_said_is_vpnkits_network() -> None:
    assert load() == Settings()
    assert load().network.subnet == "192.168.65.0/24"


def test_a_file_and_flags_over_it(write: Any) -> None:
    path = write(
        "network:\n  mtu: 9000\n  domain: vm.example\nlimits: {max_flows: 7, flow_buffer: 64K}\npublish: [22:22, 8080:80]\n"
    )
    settings = load(path, {"network.mtu": ["4000"], "publish": ["1:1,2:2", "udp:3:3"]})
    assert settings.network.mtu == 4000, "the flag overrides the file"
    assert settings.network.domain == "vm.example"
    assert (settings.network.limits.max_flows, settings.network.limits.flow_buffer) == (7, 65536)
    assert [spec.port for spec in settings.publish] == [1, 2, 3], "a list replaces the list of the file"


def test_yaml_does_not_reinterpret_what_is_written(write: Any) -> None:
    """YAML 1.1 reads 22:22 as 1342, off as false, 0x10 as 16 and an unquoted time as seconds."""
    settings = load(
        write("publish: [22:22, 10:30]\nnetwork: {host_alias: off, domain: 1.10, gateway_mac: 02:00:00:00:00:01}\n")
    )
    assert [str(spec) for spec in settings.publish] == ["tcp:127.0.0.1:22:22", "tcp:127.0.0.1:10:30"]
    assert settings.network.host_alias is None
    assert settings.network.domain == "1.10"
    assert settings.network.gateway_mac == "02:00:00:00:00:01"


def test_every_mistake_is_reported_at_once_with_its_place_and_what_would_be_accepted(write: Any) -> None:
    path = write(
        "network:\n"
        "  subnet: 10.0.2.0/24\n"
        "  mtu: 99\n"
        "  gatway: 10.0.2.1\n"
        "  static_leases:\n"
        "    02:00:00:00:00:07: 192.168.65.7\n"
        "publish: [8080:80, nonsense]\n"
        "mtu: 1500\n"
        "limits: {max_flows: -1, max_flows: 3}\n"
        "log_level: inf\n"
        "capture: yes\n"
        "dns: {servers: [9.9.9.9, dns.example]}\n"
    )
    found = complaints(path, timeouts__grace_s=["soon"])
    assert [text.split(": ")[0] for text in found] == [
        "3:8", "4:3", "6:5", "7:20", "8:1", "9:21", "9:25", "10:12", "11:10", "12:26", "--grace",
    ]  # fmt: skip
    text = "\n".join(found)
    for expected in (
        "network.mtu: 99 is out of range; write a whole number from 576 to 65520",
        "unknown key 'gatway' in 'network' (did you mean 'gateway'?)",
        "192.168.65.7 is not in 10.0.2.0/24",
        "publish: 'nonsense': protocol 'nonsense' is none of",
        "unknown key 'mtu' at the top; it belongs at network.mtu",
        "'max_flows' is given twice (first on line 9); keep one",
        "'inf' is unknown (did you mean 'info'?); write one of: error, warning, info, debug",
        "capture must be a mapping",
        "DNS server 'dns.example': write an address",
        "timeouts.grace_s: 'soon' is not a time; write seconds",
    ):
        assert expected in text


def test_gateway_and_host_alias_follow_a_subnet_of_ones_own(write: Any) -> None:
    network = load(None, {"network.subnet": ["10.0.2.0/24"]}).network
    assert (network.gateway, network.host_alias) == ("10.0.2.1", "10.0.2.2")
    network = load(None, {"network.subnet": ["10.0.2.0/24"], "network.gateway": ["10.0.2.2"]}).network
    assert (network.gateway, network.host_alias) == ("10.0.2.2", "10.0.2.1")
    network = load(None, {"network.subnet": ["10.0.2.0/24"], "network.host_alias": ["off"]}).network
    assert (network.gateway, network.host_alias) == ("10.0.2.1", None)


def test_a_wrong_subnet_is_one_complaint_and_not_one_per_address_in_it(write: Any) -> None:
    path = write("network: {subnet: 10.0.2.0/31, gateway: 10.0.2.1, host_alias: 10.0.2.2, mtu: 9000}\n")
    assert len(complaints(path)) == 1


def test_two_forwards_of_one_host_port(write: Any) -> None:
    (text,) = complaints(write("publish:\n- 8000-8010:80-90\n- 8005:22\n"))
    assert "tcp:127.0.0.1:8005:22 uses a host port of tcp:127.0.0.1:8000-8010:80-90" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(b"a: [", "not YAML", id="broken"),
        pytest.param(b"\xff\xfe\x00", "not YAML", id="not text"),
        pytest.param(b"a: 1\n---\nb: 2\n", "not YAML", id="two documents"),
        pytest.param(b"[" * 5000, "not YAML", id="deep"),
        pytest.param(b'ntp: off\nx: "\\UFFFFFFFF"\n', "2:7: not YAML: a number beyond", id="no character"),
        pytest.param(b'x: "\\U00110000"\n', "1:7: not YAML", id="the first that is no character"),
        pytest.param(b"%YAML 1." + b"9" * 5000 + b"\n--- {}\n", "1:9: not YAML", id="a long version"),
        pytest.param(b"network: {subnet: 255.255.255.255/32}\n", "use /29 or larger", id="the last address"),
        pytest.param(b"network: {subnet: 255.255.255.254/31}\n", "use /29 or larger", id="the last two"),
        pytest.param(b"- a\n", "must be a mapping", id="a list"),
        pytest.param(b"? [a]\n: b\n", "a key must be a plain word", id="a list as key"),
        pytest.param(b"links: [[a]]\n", "a single value is wanted", id="nested list"),
        pytest.param(b"publish: {a: b}\n", "a list is wanted", id="mapping for a list"),
        pytest.param(b"ntp: [on]\n", "a single value is wanted", id="list for one value"),
        pytest.param(b"ntp: maybe\n", "neither on nor off", id="switch"),
        pytest.param(b"capture: {size: 1X}\n", "is not a size", id="size"),
        pytest.param(b"links: ['quemu:/x']\n", "qemu", id="link"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(write: Any, text: bytes, expected: str) -> None:
    assert expected in "\n".join(complaints(write(text)))


def test_a_file_that_is_not_there_and_one_that_all_may_write(write: Any, tmp_path: Path) -> None:
    assert "No such file" in complaints(str(tmp_path / "absent"))[0]
    path = write("ntp: off\n")
    Path(path).chmod(0o666)
    assert "chmod o-w" in complaints(path)[0]  # L6


@given(st.text() | st.binary())
def test_any_file_is_settings_or_complaints(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    """Z12."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load(str(path)), Settings)
    except ConfigErrors as error:
        assert all(complaint.startswith(str(path)) for complaint in error.complaints)


@given(st.sampled_from(OPTIONS), st.text(max_size=20))
def test_any_text_for_any_option_is_a_value_or_a_complaint(option: Option, text: str) -> None:
    try:
        load(None, {option.key: [text]})
    except ConfigErrors as error:
        assert str(error).startswith("--")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_each_option_takes_its_example_from_flag_and_file(option: Option, write: Any) -> None:
    dependencies = {"network.gateway": "10.0.2.0/24", "network.host_alias": "10.0.2.0/24"}
    flags = {option.key: [option.example]}
    if subnet := dependencies.get(option.key):
        flags["network.subnet"] = [subnet]
    by_flag = load(None, flags)
    assert value_of(by_flag, option) != option.default, "an example that shows nothing"
    indent = "  " if option.section else ""
    lines = [f"{option.section}:"] if option.section else []
    if option.section == "network" and subnet:
        lines.append(f"  subnet: {subnet}")
    if option.pairs:
        key, _, value = option.example.partition("=")
        lines += [f"{indent}{option.name}:", f"{indent}  '{key}': {value}"]
    elif option.many:
        lines += [f"{indent}{option.name}:", f"{indent}- {option.example}"]
    else:
        lines.append(f"{indent}{option.name}: {option.example}")
    assert load(write("\n".join(lines) + "\n")) == by_flag
    assert config.differences(Settings(), by_flag)


def test_every_field_is_an_option_and_every_option_a_field() -> None:
    fields = {
        f"{section}.{field.name}" if section else field.name
        for section, kind in config.SECTIONS.items()
        for field in dataclasses.fields(kind)
    }
    holders = {"network", "capture", "dns", "http_proxy", "control", "vpnkit", "network.limits", "network.timeouts"}
    assert fields - holders == {option.key for option in OPTIONS}
    assert {kind for kind in config.SECTIONS.values()} >= {Settings, Network, Limits, Timeouts}


def test_every_option_is_explained_and_no_flag_is_given_twice() -> None:
    flags = [flag for option in OPTIONS for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert all(len(config.documentation(option)) > 10 for option in OPTIONS)


def test_values_are_checked_where_they_are_made() -> None:
    with pytest.raises(ConfigError):
        Network(mtu=1)
