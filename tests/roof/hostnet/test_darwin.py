"""macOS's state from what its programs print: in the forms of 10.13 (with Refs and Use) and of 13, with made-up values."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import HostError
from pyvpnkit.hostnet import darwin
from pyvpnkit.hostnet.routes import Egress, clashes, free_subnet

IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\toptions=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
\tinet6 fe80::1%lo0 prefixlen 64 scopeid 0x1
\tnd6 options=201<PERFORMNUD,DAD>
gif0: flags=8010<POINTOPOINT,MULTICAST> mtu 1280
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 02:00:5e:00:53:01
\tinet6 fe80::c4:1%en0 prefixlen 64 secured scopeid 0xb
\tinet 192.168.65.20 netmask 0xffffff00 broadcast 192.168.65.255
\tinet6 2001:db8:7::20 prefixlen 64 autoconf secured
\tstatus: active
utun3: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1380
\tinet 10.8.0.6 --> 10.8.0.5 netmask 0xffffffff
"""

NEW = """\
Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
default            192.168.65.1       UGScg                 en0
default            link#20            UCSIg               utun3
10.8/16            10.8.0.5           UGSc                utun3
10.8.0.5           10.8.0.6           UH                  utun3
127                127.0.0.1          UCS                   lo0
127.0.0.1          127.0.0.1          UH                    lo0
169.254            link#11            UCS                   en0      !
192.168.65         link#11            UCS                   en0      !
192.168.65.1/32    link#11            UCS                   en0      !
192.168.65.1       2:0:5e:0:53:fe     UHLWIir               en0   1195
224.0.0/4          link#11            UmCS                  en0      !

Internet6:
Destination                             Gateway                                 Flags               Netif Expire
default                                 fe80::2%en0                             UGcg                  en0
default                                 fe80::%utun0                            UGcIg               utun0
::1                                     ::1                                     UHL                   lo0
2001:db8:7::/64                         link#11                                 UC                    en0
2001:db8:7::20                          2:0:5e:0:53:1                           UHL                   lo0
fe80::%en0/64                           link#11                                 UCI                   en0
ff00::/8                                ::1                                     UmCI                  lo0
"""

OLD = """\
Routing tables

Internet:
Destination        Gateway            Flags        Refs      Use   Netif Expire
0/1                10.8.0.5           UGSc           63        0   utun3
default            192.168.65.1       UGSc           20       16     en0
128.0/1            10.8.0.5           UGSc            1        0   utun3
192.168.65         link#4             UCS             1        0     en0
192.168.65.1       2:0:5e:0:53:fe     UHLWIir        21       14     en0   1193

Internet6:
Destination                             Gateway                         Flags         Netif Expire
default                                 fe80::%utun0                    UGcI          utun0
"""


def test_a_mac_with_a_vpn_for_some() -> None:
    found = darwin.read(IFCONFIG, NEW)
    wanted = ["127.0.0.1", "::1", "fe80::1", "fe80::c4:1", "192.168.65.20", "2001:db8:7::20", "10.8.0.6"]
    assert found.addresses == {ipaddress.ip_address(text).packed for text in wanted}
    assert found.egress == Egress(interface="en0", mtu=1500) and found.ipv6_route
    assert {str(one) for one in found.routes} == {
        "0.0.0.0/0 on en0",
        "10.8.0.0/16 on utun3",
        "10.8.0.5/32 on utun3",
        "127.0.0.0/8 on lo0",
        "127.0.0.1/32 on lo0",
        "169.254.0.0/16 on en0",
        "192.168.65.0/24 on en0",
        "192.168.65.1/32 on en0",
        "224.0.0.0/4 on en0",
        "::/0 on en0",
        "2001:db8:7::/64 on en0",
    }
    assert clashes("192.168.65.0/24", found.routes) and free_subnet(found.routes) == "192.168.66.0/24"


def test_a_mac_with_a_vpn_for_everything_and_no_ipv6() -> None:
    found = darwin.read(IFCONFIG, OLD)
    assert found.egress == Egress(interface="utun3", mtu=1380), "the halves are more specific than the default"
    assert not found.ipv6_route, "a scoped route of utun0 leads nowhere"


def test_a_mac_without_any_network() -> None:
    found = darwin.read(
        IFCONFIG.partition("gif0")[0], "Routing tables\n\nInternet:\nDestination Gateway Flags Netif Expire\n"
    )
    assert found.egress is None and not found.ipv6_route and not found.routes


lines = st.sampled_from(
    [*IFCONFIG.splitlines(), *NEW.splitlines(), *OLD.splitlines(), "inet", "default", "1.2.3.4.5 x U en0"]
)


@given(st.lists(st.one_of(lines, st.text(max_size=60)), max_size=30))
def test_lines_that_cannot_be_understood_are_passed_over(said: list[str]) -> None:
    found = darwin.read("\n".join(said), "\n".join(reversed(said)))
    assert all(len(one) in (4, 16) for one in found.addresses)


@given(st.text(max_size=400))
def test_any_text(text: str) -> None:
    head = "Internet:\nDestination Gateway Flags Netif\n"
    darwin.read(text, head + text)
    darwin.read(IFCONFIG, head.replace("Internet", "Internet6") + text)


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(HostError, match="/nonexistent/ifconfig"):
        darwin._said("/nonexistent/ifconfig", "-a")
