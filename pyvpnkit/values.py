"""Text to value, one function per kind of setting; each raises `ConfigError` that says what would be accepted.

The text may come from a flag or from a YAML file. YAML 1.1's own ideas (`off` is false, `22:22` is 1342) never get a say.
"""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

from netstack.errors import ConfigError, Malformed
from netstack.link.spec import LinkSpec
from netstack.settings import parse_mac

Parse = Callable[[str], Any]
_OFF: Final = ("off", "no", "none", "null", "~", "false", "")
_ON: Final = ("on", "yes", "true")
_SUFFIX: Final = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def text(text: str) -> str:
    if not text:
        raise ConfigError("is empty; leave the key out for its default")
    return text


def flag(text: str) -> bool:
    if text.lower() in _ON:
        return True
    if text.lower() in _OFF[:-1]:
        return False
    raise ConfigError(f"{text!r} is neither on nor off")


def number(low: int, high: int | None = None) -> Parse:
    wanted = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise ConfigError(f"{text!r} is not a number; write {wanted}") from None
        if value < low or (high is not None and value > high):
            raise ConfigError(f"{text} is out of range; write {wanted}")
        return value

    return parse


def octets(text: str) -> int:
    factor = _SUFFIX.get(text[-1:].lower(), 1)
    try:
        value = int(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        value = -1
    if value < 0:
        raise ConfigError(f"{text!r} is not a size; write octets, or a number with K, M or G such as 100M")
    return value


def file_size(text: str) -> int:
    value = octets(text)
    if 0 < value < 64 << 10:
        raise ConfigError(f"{text} is too small; write 0 for no limit, or at least 64K")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ConfigError(f"{text!r} is not a time; write seconds such as 5 or 0.5")
    return value


def or_off(parse: Parse) -> Parse:
    return lambda text: None if text.lower() in _OFF else parse(text)


def one_of(*choices: str) -> Parse:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ConfigError(f"{text!r} is unknown{meant(text.lower(), choices)}; write one of: {', '.join(choices)}")
        return text.lower()

    return parse


def ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ConfigError(f"{text!r} is not an IPv4 address; write it as in 192.168.65.1") from None


def prefix(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a network ({error}); write it as in 10.1.0.0/16") from None


@functools.cache
def _free_subnet() -> str:
    """The same for as long as this process runs."""
    from pyvpnkit.hostnet import routes  # where it is used: it asks the kernel

    return routes.auto_subnet()


def subnet(text: str) -> str:
    return _free_subnet() if text.lower() == "auto" else prefix(text)


class AutoMtu(int):
    """An MTU that is the most guests are told, and less where the host's way out takes less."""

    def __str__(self) -> str:
        return "auto"


def mtu(text: str) -> int:
    return AutoMtu(1500) if text.lower() == "auto" else int(number(576, 65520)(text))


def addresses(text: str) -> str:
    found = [address(word) for word in text.split()]
    if len(found) != len({":" in one for one in found}) or not found:
        raise ConfigError(f"{text!r}: write an address, or an IPv4 and an IPv6 one with a blank between")
    return " ".join(found)


def record_name(text: str) -> str:
    from dns import codec  # where it is used: few have any

    name = text.rstrip(".").lower()
    try:
        codec.wire_name(name.removeprefix("*."))
    except Malformed as error:
        raise ConfigError(f"{text!r} is no name ({error}); write one such as www.corp.example") from None
    if "." not in name:
        raise ConfigError(f"{text!r} has no domain; write a name such as www.corp.example")
    return name


def dns_rule(text: str) -> str:
    from dns.rules import Rules  # where it is used: few have any

    words = text.split()
    Rules.parse({"example": text if text == "refuse" else words})
    return " ".join(words)


def proxy(text: str) -> str:
    from pyvpnkit.proxy.config import Upstream  # where it is used: few have any

    Upstream.parse(text)
    return text


def way_out(text: str) -> str:
    from netstack.policy.ways_out import parse, spelled  # where it is used: few have any

    return spelled(parse(text))


def server(text: str) -> str:
    from dns.servers import Server  # where it is used: most settings name no server

    found = Server.parse(text)
    return text if found.tls else str(found.upstream)


def address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ConfigError(f"{text!r} is not an IP address; write it as in 127.0.0.1 or ::1") from None


def forwarder(text: str) -> str:
    from portfwd.mux.where import Where  # where it is used: few have a forwarder

    # VPNKit's own form is a bare path, or unix:// and one.
    plain = text.startswith("/") or text.startswith("unix://")
    return str(Where.vsock_path(text) if plain else Where.parse(text))


def directory(text: str) -> str:
    if not text.startswith("/"):
        raise ConfigError(f"{text!r} is not an absolute path; write it as in /run/vm")
    return text


def gateway_forward(protocol: str) -> Parse:
    def parse(text: str) -> str:
        from portfwd.outgoing import parse_static  # where it is used: few have any

        parse_static(protocol, text)
        return text

    return parse


def mac(text: str) -> str:
    return parse_mac(text).hex(":")


def link(text: str) -> LinkSpec:
    return LinkSpec.parse(text)


def meant(word: str, choices: Iterable[str]) -> str:
    """A question for who wrote `word`, or ""."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def path(text: str) -> str:
    """A path as other programs are given it, in a form that no setting takes for a word such as `off`, or a link's scheme."""
    return text if text.startswith("/") else f"./{text}"


def hyperkit_path(directory: str, port: int) -> str:
    """Where HyperKit has what its guest dials at the host's vsock `port`."""
    from vm.vsock.api.hyperkit import guest_dials  # by need: hardly anybody has it

    return os.path.join(directory, guest_dials(port))
