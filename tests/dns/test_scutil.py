"""macOS's resolvers as `scutil --dns` prints them; laid out as in reports of users of macOS 10.9 to 14, with other names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dns import codec, scutil
from dns.servers import Resolvers, Server, Upstream
from netstack.errors import HostError

HOME = """\
DNS configuration

resolver #1
  search domain[0] : lan
  nameserver[0] : 192.168.1.1
  nameserver[1] : 2001:db8:1::1
  if_index : 13 (en0)
  flags    : Request A records, Request AAAA records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)
  order    : 200000

resolver #2
  domain   : local
  options  : mdns
  timeout  : 5
  flags    : Request A records, Request AAAA records
  reach    : 0x00000000 (Not Reachable)
  order    : 300000

resolver #3
  domain   : 254.169.in-addr.arpa
  options  : mdns
  timeout  : 5
  flags    : Request A records, Request AAAA records
  reach    : 0x00000000 (Not Reachable)
  order    : 300200

DNS configuration (for scoped queries)

resolver #1
  search domain[0] : lan
  nameserver[0] : 192.168.1.1
  nameserver[1] : 2001:db8:1::1
  if_index : 13 (en0)
  flags    : Scoped, Request A records, Request AAAA records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)
"""

SPLIT_VPN = """\
DNS configuration

resolver #1
  search domain[0] : lan
  search domain[1] : corp.example
  nameserver[0] : fe80::1%7
  nameserver[1] : 192.168.1.1
  if_index : 13 (en0)
  flags    : Request A records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)
  order    : 200000

resolver #2
  domain   : corp.example
  nameserver[0] : 10.8.0.1
  nameserver[1] : 10.8.0.2
  if_index : 17 (utun2)
  flags    : Supplemental, Request A records, Request AAAA records
  reach    : 0x00000003 (Reachable,Transient Connection)
  order    : 102600

resolver #3
  domain   : 8.10.in-addr.arpa.
  nameserver[0] : 10.8.0.1
  if_index : 17 (utun2)
  flags    : Supplemental, Request A records, Request AAAA records
  reach    : 0x00000003 (Reachable,Transient Connection)
  order    : 102601

resolver #4
  domain   : local
  options  : mdns
  timeout  : 5
  flags    : Request A records
  reach    : 0x00000000 (Not Reachable)
  order    : 300000

resolver #5
  domain   : test
  nameserver[0] : 127.0.0.1
  port     : 15353
  timeout  : 2
  flags    : Request A records, Request AAAA records
  reach    : 0x00030002 (Reachable,Local Address,Directly Reachable Address)

DNS configuration (for scoped queries)

resolver #1
  search domain[0] : lan
  nameserver[0] : 192.168.1.1
  if_index : 13 (en0)
  flags    : Scoped, Request A records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)

resolver #2
  nameserver[0] : 10.99.99.99
  if_index : 17 (utun2)
  flags    : Scoped, Request A records, Request AAAA records
  reach    : 0x00000003 (Reachable,Transient Connection)
"""

FULL_VPN = """\
DNS configuration

resolver #1
  nameserver[0] : 192.168.1.1
  if_index : 4 (en0)
  flags    : Request A records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)
  order    : 200000

resolver #2
  search domain[0] : corp.example
  nameserver[0] : 10.8.0.1
  nameserver[1] : 10.8.0.2
  if_index : 16 (ppp0)
  flags    : Supplemental, Request A records
  reach    : 0x00000002 (Reachable)
  order    : 100000
"""

NO_NETWORK = """\
DNS configuration

resolver #1
  flags    : Request A records
Not Reachable

resolver #2
  domain   : local
  options  : mdns
  timeout  : 5
  flags    : Request A records
Not Reachable
  order    : 300000

DNS configuration (for scoped queries)

resolver #1
  search domain[0] : openvpn
  nameserver[0] : 10.8.0.1
  nameserver[1] : 10.8.0.2
  if_index : 13 (utun0)
  flags    : Scoped, Request A records
Reachable
"""

MAVERICKS = """\
DNS configuration

resolver #1
  search domain[1] : test
  nameserver[0] : 172.31.30.10
  flags    : Request A records
  reach    : Reachable
resolver #6
  domain   : 9.e.f.ip6.arpa
  options  : mdns
  timeout  : 5
  flags    : Request A records
  order    : 300600

DNS configuration (for scoped queries)

resolver #1
  search domain[0] : test
  nameserver[0] : 172.31.30.11
  if_index : 4 (en0)
  flags    : Scoped, Request A records
  reach    : Reachable
"""


def server(address: str, *zones: str, order: int = 0, timeout_s: float = 5.0) -> Server:
    return Server(Upstream.parse(address), tuple(map(codec.wire_name, zones)), order, timeout_s)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            HOME,
            Resolvers(servers=(server("192.168.1.1"), server("2001:db8:1::1", order=1)), search=("lan",)),
            id="at home: multicast and scoped resolvers are none",
        ),
        pytest.param(
            SPLIT_VPN,
            Resolvers(
                servers=(
                    server("fe80::1%7"),
                    server("192.168.1.1", order=1),
                    server("10.8.0.1", "corp.example"),
                    server("10.8.0.2", "corp.example", order=1),
                    server("10.8.0.1", "8.10.in-addr.arpa"),
                    server("127.0.0.1#15353", "test", timeout_s=2.0),
                ),
                search=("lan", "corp.example"),
            ),
            id="a VPN for some domains, and a file in /etc/resolver",
        ),
        pytest.param(
            FULL_VPN,
            Resolvers(
                servers=(server("10.8.0.1"), server("10.8.0.2", order=1), server("192.168.1.1", order=2)),
                search=("corp.example",),
            ),
            id="a VPN for everything comes before the LAN by its order",
        ),
        pytest.param(NO_NETWORK, Resolvers(), id="only programs bound to the VPN's interface have a resolver"),
        pytest.param(MAVERICKS, Resolvers(servers=(server("172.31.30.10"),), search=("test",)), id="macOS 10.9"),
        pytest.param("No DNS configuration available\n", Resolvers(), id="nothing"),
    ],
)
def test_scutils_output_says_whom_macos_asks_for_what(text: str, expected: Resolvers) -> None:
    assert scutil.parse(text) == expected


def test_a_link_local_server_without_a_scope_is_at_the_interface_of_its_resolver() -> None:
    text = "DNS configuration\n\nresolver #1\n  nameserver[0] : fe80::53\n  if_index : 13 (en0)\n"
    assert scutil.parse(text).servers == (server("fe80::53%13"),)


@given(
    st.text()
    | st.lists(st.sampled_from([*SPLIT_VPN.splitlines(True), "  port     : 99999999\n", " : \n"])).map("".join)
)
def test_any_text_is_an_output_of_scutil(text: str) -> None:
    assert len(scutil.parse(text).servers) <= 64


def test_the_program_is_run_and_its_failure_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"scutil --dns: .*No such file"):
        scutil.run_scutil()
    (tmp_path / "out").write_text(HOME)
    (tmp_path / "scutil").write_text(f'#!/bin/sh\ntest "$*" = --dns && exec /bin/cat {tmp_path}/out\n')
    (tmp_path / "scutil").chmod(0o755)
    assert scutil.parse(scutil.run_scutil()).search == ("lan",)
    (tmp_path / "scutil").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(scutil, "WITHIN_S", 0.2)
    with pytest.raises(HostError, match="timed out"):
        scutil.run_scutil()
