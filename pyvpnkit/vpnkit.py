"""`pyvpnkit vpnkit ...`: VPNKit's own command line (spec vpnkit 1.1), for programs that start `vpnkit` themselves.

    linuxkit      vpnkit --ethernet fd:3 --vsock-path STATE/connect --port fd:4
    rootlesskit   vpnkit --ethernet SOCK --mtu 1500 [--host-ip 0.0.0.0]

A symlink `vpnkit` to the console script is this too. The options become the settings that `pyvpnkit run` has, with VPNKit's
defaults where a guest could tell: the lease, the domain, names by the host's library, nothing kept on disk and no control socket,
so any number run side by side. All complaints come at once, by VPNKit's names, with exit status 2 (cmdliner: 124, or 0 where
`--ethernet` is missing). AF_VSOCK and Hyper-V sockets are not opened.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from netstack.errors import ConfigError, Malformed, NetstackError
from pyvpnkit import cmdliner, dhcp_file, loader, values
from pyvpnkit.cmdliner import Line
from pyvpnkit.config import BY_KEY, Settings

log = logging.getLogger("pyvpnkit")

LONGEST_S: Final = "999999999"
"""In place of never."""

OPTIONS: Final[cmdliner.Options] = {
    "ethernet": ("ADDRESS", "where virtual machines connect: PATH, fd:N (a listening socket) or hyperkit://:PORT/DIR"),
    "port": ("ADDRESS", "serve the port control (9P, and HTTP) there, the same forms; repeatable"),
    "port-forwards": ("PATH", "HyperKit's `connect` socket, by which published ports reach the forwarder in the VM"),
    "vsock-path": ("PATH", "the same"),
    "introspection": ("PATH", "serve a 9P tree of connections and captures; repeatable"),
    "diagnostics": ("PATH", "give each client a tar of that tree; repeatable"),
    "pcap": ("PATH", "give each client a live capture; repeatable"),
    "pcap-snaplen": ("N", "octets kept of each frame in it [128]"),
    "max-connections": ("N", "deprecated: TCP flows of all guests together"),
    "dns": ("FILE", "name servers, followed; without it the host's library is asked"),
    "http": ("FILE", "JSON of the HTTP proxy, followed"),
    "http-api-path": ("PATH", "where that document can be had and set"),
    "hosts": ("FILE", "further names [/etc/hosts]; empty for none"),
    "host-names": ("NAMES", "names of --host-ip, by commas [host.internal]"),
    "gateway-names": ("NAMES", "names of --gateway-ip [gateway.internal]"),
    "vm-names": ("NAMES", "names of --lowest-ip [vm.internal]"),
    "listen-backlog": ("N", "ignored"),
    "port-max-idle-time": ("SECONDS", "when UDP and ping flows are forgotten; 0 or less is never. TCP flows are kept"),
    "debug": ("", "log each flow; the variable VPNKIT_DEBUG says the same"),
    "server-macaddr": ("MAC", "of the gateway [F6:16:36:BC:F9:C6]"),
    "domain": ("NAME", "told by DHCP [that of --dhcp-path, or localdomain]"),
    "allowed-bind-addresses": ("IPS", "where programs in the VM may publish ports [0.0.0.0: anywhere]"),
    "gateway-ip": ("IP", "router, DNS and DHCP server [192.168.65.1]"),
    "host-ip": ("IP", "stands for 127.0.0.1 of the host [192.168.65.2]; 0.0.0.0 for none"),
    "lowest-ip": ("IP", "first address of virtual machines [192.168.65.3]"),
    "highest-ip": ("IP", "last one [192.168.65.254]"),
    "dhcp-path": ("FILE", 'JSON {"searchDomains": [...], "domainName": "..."}, followed'),
    "mtu": ("N", "of the virtual link [1500]"),
    "udpv4-forwards": ("FORWARDS", "UDP ports of the gateway that lead elsewhere: PORT:IP:PORT, by commas"),
    "tcpv4-forwards": ("FORWARDS", "the same for TCP"),
    "gateway-forwards": ("FILE", "JSON of such ports, followed"),
    "forwards": ("FILE", "JSON of prefixes whose TCP goes to a program at a Unix socket, followed"),
    "gc-compact-interval": ("SECONDS", "ignored"),
    "help": ("", "this list"),
    "version": ("", "the version"),
    "db": ("URI", "removed from VPNKit in 2021: an error"),
    "branch": ("NAME", "removed from VPNKit in 2021: an error"),
}

REPEATABLE: Final = frozenset({"port", "introspection", "diagnostics", "pcap"})
DEFAULTS: Final = {
    "gateway-ip": "192.168.65.1",
    "host-ip": "192.168.65.2",
    "lowest-ip": "192.168.65.3",
    "highest-ip": "192.168.65.254",
    "vm-names": "vm.internal",
    "domain": "localdomain",
}
SHORTEST_PREFIX: Final = 8
LONGEST_PREFIX: Final = 29

_PLAIN: Final[Mapping[str, str]] = {
    "pcap-snaplen": "vpnkit.pcap_snaplen",
    "max-connections": "limits.max_flows",
    "host-names": "network.host_names",
    "gateway-names": "network.gateway_names",
    "server-macaddr": "network.gateway_mac",
    "allowed-bind-addresses": "allowed_bind_addresses",
    "mtu": "network.mtu",
    "udpv4-forwards": "vpnkit.udpv4_forwards",
    "tcpv4-forwards": "vpnkit.tcpv4_forwards",
}
"""Options that mean what a setting means."""

_FILES: Final[Mapping[str, str]] = {
    "dns": "dns.file",
    "http": "vpnkit.http",
    "hosts": "dns.hosts_file",
    "gateway-forwards": "vpnkit.gateway_forwards",
    "forwards": "vpnkit.forwards",
}
_SOCKETS: Final[Mapping[str, str]] = {
    "port": "vpnkit.port",
    "introspection": "vpnkit.introspection",
    "diagnostics": "vpnkit.diagnostics",
    "pcap": "vpnkit.pcap",
    "http-api-path": "vpnkit.http_api",
}
_BASE: Final[Mapping[str, list[str]]] = {
    "state_dir": ["off"],
    "control.socket": ["off"],
    "network.lease_s": [str(0x7FFFFFFF)],  # spec vpnkit 3.3: shorter ones "caused periodic glitches"
    "dns.resolvers": ["getaddrinfo"],  # Host mode
}
_HYPERKIT: Final = re.compile(r"hyperkit://[^:/]*:(\d{1,10})(/.*)", re.ASCII)
_URI: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def parse(argv: Sequence[str]) -> Line:
    """VPNKit's command line taken apart. Never raises."""
    return cmdliner.parse(argv, OPTIONS, REPEATABLE)


class Translation:
    """From VPNKit's options to `given`: option key of ours -> texts. What is wrong is in `complaints`, what to say in `notes`."""

    def __init__(self, line: Line, environment: Mapping[str, str]) -> None:
        self.complaints = list(line.complaints)
        self.notes: list[str] = []
        self.given: dict[str, list[str]] = {key: list(texts) for key, texts in _BASE.items()}
        self._line = line
        self._ethernet()
        self._forwarder()
        for name, key in _SOCKETS.items():
            self._sockets(name, key)
        for name, key in _PLAIN.items():
            if (text := line.last(name)) is not None:
                self._plain(name, key, text)
        for name, key in _FILES.items():
            if (text := line.last(name)) is not None:
                self._give(name, key, values.path(text) if text else "off")
        if line.last("dns"):
            self.given["dns.resolvers"] = ["file"]
        self._addresses()
        self._names()
        self._rest(environment)

    def _complain(self, name: str, text: str) -> None:
        self.complaints.append(f"--{name}: {text}")

    def _plain(self, name: str, key: str, text: str) -> None:
        from dns import codec

        parts = [one.strip() for one in text.split(",")]
        for part in parts if name.endswith("-names") else ():
            try:
                codec.wire_name(part)
            except Malformed as error:
                self._complain(name, f"{part!r} is no name ({error}); write one such as host.internal")
        self._give(name, key, ",".join(parts))

    def _give(self, name: str, key: str, text: str) -> None:
        try:
            BY_KEY[key].collect([text])
        except ConfigError as error:
            self._complain(name, str(error))
        else:
            self.given.setdefault(key, []).append(text)

    # -- sockets

    def _address(self, name: str, text: str) -> str | None:
        """`fd:N` or a path, of the forms that VPNKit listens on."""
        if re.fullmatch(r"fd:\d{1,9}", text, re.ASCII):
            return text
        if (found := _HYPERKIT.fullmatch(text)) is not None and int(found[1]) < 1 << 32:
            return values.hyperkit_path(found[2], int(found[1]))
        forms = "write a path, fd:N or hyperkit://:PORT/DIR"
        if not text or text.startswith("fd:") or text.lower().startswith("hyperkit:"):
            self._complain(name, f"{text!r} is no address; {forms}")
        elif (uri := _URI.match(text)) is not None:
            self._complain(name, f"{text}: sockets of {uri[1]}:// are not had here; {forms}")
        elif text.startswith("\\\\"):
            self._complain(name, f"{text}: named pipes are Windows'; {forms}")
        else:
            return values.path(text)
        return None

    def _ethernet(self) -> None:
        text = self._line.last("ethernet")
        if text is None:
            if not any(complaint.startswith("--ethernet:") for complaint in self.complaints):
                self.complaints.append("Please provide an --ethernet argument, such as --ethernet /tmp/ethernet.sock")
        elif (where := self._address("ethernet", text)) is not None:
            self._give("ethernet", "links", f"vmnet:{where.replace(',', ',,')}")

    def _sockets(self, name: str, key: str) -> None:
        for text in self._line.values.get(name, ()):
            if not text and name != "port":
                continue
            where = self._address(name, text)
            if where is not None and "," in where:
                self._complain(name, f"{text}: a path with a comma cannot be had here; choose another one")
            elif where is not None:
                self._give(name, key, where)

    def _forwarder(self) -> None:
        """`--port-forwards` and `--vsock-path` are two names of one option."""
        given = [
            (name, text) for name in ("port-forwards", "vsock-path") if (text := self._line.last(name)) is not None
        ]
        if len(given) > 1:
            self._complain("vsock-path", "is --port-forwards by another name; give one of the two")
            return
        for name, text in given:
            if (uri := _URI.match(text)) is not None and uri[1] != "unix":
                self.notes.append(
                    f"--{name}: {text}: only a path or unix://PATH can be had; published ports go to guests"
                )
            elif path := text.removeprefix("unix://"):
                self._give(name, "forwarder", os.path.abspath(path))

    # -- addresses and names

    def _ip(self, name: str) -> IPv4Address | None:
        text = self._line.last(name) or DEFAULTS[name]
        try:
            return IPv4Address(text)
        except ValueError:
            self._complain(name, f"{text!r} is not an IPv4 address; write it as in {DEFAULTS[name]}")
            return None

    def _addresses(self) -> None:
        """The smallest network that has them all (spec vpnkit 3.3), and none of them as its first or last address."""
        names = ("gateway-ip", "host-ip", "lowest-ip", "highest-ip")
        gateway, host, lowest, highest = found = [self._ip(name) for name in names]
        if gateway is None or host is None or lowest is None or highest is None:
            return
        if host == gateway:
            self._complain("host-ip", f"{host} is --gateway-ip; the two must differ")
        if lowest > highest:
            self._complain("lowest-ip", f"{lowest} comes after --highest-ip {highest}")
            return
        used = [one for one in (gateway, host, lowest, highest) if int(one)]
        subnet = smallest(used)
        if subnet is None:
            said = ", ".join(f"--{name} {one}" for name, one in zip(names, found, strict=True) if one in used)
            self.complaints.append(f"{said}: they are too far from one another; give all from one network")
            return
        self.given["network.subnet"] = [str(subnet)]
        self.given["network.gateway"] = [str(gateway)]
        self.given["network.host_alias"] = [str(host) if int(host) else "off"]
        self.given["network.pool_first"] = [str(lowest)]
        self.given["network.pool_last"] = [str(highest)]
        vm_names = self._line.last("vm-names")
        for one in (DEFAULTS["vm-names"] if vm_names is None else vm_names).split(","):
            if one.strip():
                self._give("vm-names", "dns.records", f"{one.strip()}={lowest}")

    def _names(self) -> None:
        """`--domain` goes before the file's, which goes before `localdomain`."""
        path = self._line.last("dhcp-path")
        found = dhcp_file.Domains()
        if path is not None:
            try:
                found = dhcp_file.read(path)
            except ConfigError as error:
                self._complain("dhcp-path", str(error))
        for domain in found.search:
            self.given.setdefault("network.search", []).append(domain)
        asked = self._line.last("domain")
        try:
            dhcp_file.check_names([asked] if asked else [])
        except ConfigError as error:
            self._complain("domain", str(error))
        said = [one for one in (asked, found.domain, DEFAULTS["domain"]) if one is not None]
        self.given["network.domain"] = [said[0] or "off"]

    # -- the rest

    def _rest(self, environment: Mapping[str, str]) -> None:
        line = self._line
        if "debug" in line.values or "VPNKIT_DEBUG" in environment:
            self.given["log_level"] = ["debug"]
        if "max-connections" in line.values:
            self.notes.append("--max-connections is deprecated; it bounds the TCP flows of all guests together")
        if (idle := self._whole("port-max-idle-time")) is not None:
            for key in ("timeouts.udp_idle_s", "timeouts.ping_idle_s"):
                self._give("port-max-idle-time", key, LONGEST_S if idle <= 0 else str(idle))
        self._whole("listen-backlog")
        self._whole("gc-compact-interval")
        for name in ("db", "branch"):
            if name in line.values:
                self._complain(name, "VPNKit has had no database since 2021; give its keys as options (vpnkit --help)")

    def _whole(self, name: str) -> int | None:
        text = self._line.last(name)
        if text is None:
            return None
        if re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) is None:
            self._complain(name, f"{text!r} is not a whole number")
            return None
        return int(text)


def smallest(addresses: Sequence[IPv4Address]) -> IPv4Network | None:
    """The smallest network in which all are usable addresses, from /29 to /8."""
    for length in range(LONGEST_PREFIX, SHORTEST_PREFIX - 1, -1):
        network = ipaddress.IPv4Network((min(addresses), length), strict=False)
        edges = network.network_address, network.broadcast_address
        if all(one in network and one not in edges for one in addresses):
            return network
    return None


def settings(line: Line, environment: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings that a command line means, and what is to be said of it. Raises `ConfigErrors`."""
    said = Translation(line, environment)
    if said.complaints:
        raise loader.ConfigErrors([f"vpnkit: {complaint}" for complaint in said.complaints])
    return loader.load(None, said.given), said.notes


def usage() -> str:
    """The options, one a line."""
    lines = ["usage: vpnkit --ethernet ADDRESS [OPTION]...", "", __doc__.partition("\n")[0], ""]
    for name, (metavar, words) in OPTIONS.items():
        lines.append(f"  {f'--{name} {metavar}'.rstrip():34} {words}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run VPNKit's command line `argv` (without the program's name) and return the exit status."""
    line = parse(argv)
    if "help" in line.values or "version" in line.values:
        from importlib import metadata

        print(usage() if "help" in line.values else metadata.version("pyvpnkit"))
        return 0
    try:
        with dhcp_file.following(line.last("dhcp-path")):
            loaded, notes = settings(line, os.environ)
            from pyvpnkit import daemon

            daemon.start_log(loaded.log_level)
            for note in notes:
                log.warning("%s", note)
            return daemon.main(loaded, reload=lambda: settings(line, os.environ)[0])
    except loader.ConfigErrors as error:
        print(error, file=sys.stderr)
        return 2
    except NetstackError as error:
        print(f"vpnkit: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
