"""VPNKit's `vpnkit-iptables-wrapper`: stands in for `iptables` in a VM, so that Docker swarm's ports are exposed (spec vpnkit 1.4).

Swarm publishes a port by one rule in the chain DOCKER-INGRESS and starts no userland proxy. Where such a rule is inserted an
`expose-port` is started, where it is deleted that one is ended; iptables itself is run in any case, and its status returned.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BEFORE: Final = ("--wait", "-t", "nat")
_AFTER: Final = ("DOCKER-INGRESS", "-p")
_MODULE: Final = "portfwd.invm.expose_port"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things are; tests have their own."""

    iptables: str = "/sbin/iptables"
    native: Path = Path("/var/config/vpnkit/native-port-forwarding")
    """Where its first line is `1` or `true`, ports are left alone."""
    pids: Path = Path("/var/run/service-port-opener")


@dataclass(frozen=True, slots=True)
class Rule:
    """A swarm port: `insert` or delete, and what leads where."""

    insert: bool
    proto: str
    port: int
    address: str
    target: int

    @classmethod
    def of(cls, argv: Sequence[str]) -> Rule | None:
        """The rule that `argv` begins with, if it is one of swarm's."""
        if len(argv) < 13 or (*argv[:3], *argv[4:6]) != (*_BEFORE, *_AFTER) or argv[3] not in ("-I", "-D"):
            return None
        if (argv[7], argv[9], argv[10], argv[11]) != ("--dport", "-j", "DNAT", "--to-destination"):
            return None
        address, _, target = argv[12].rpartition(":")
        try:
            rule = cls(argv[3] == "-I", argv[6], int(argv[8]), str(ipaddress.ip_address(address)), int(target))
        except ValueError:
            return None
        ports = 0 < rule.port < 65536 and 0 < rule.target < 65536
        return rule if ports and rule.proto in ("tcp", "udp") else None

    @property
    def name(self) -> str:
        return f"{self.proto}.{self.port}.{self.address}.{self.target}.pid"


def main(argv: Sequence[str], *, places: Places = Places()) -> int:
    """Do as iptables does, and expose or unexpose what the rule is about; returns its status, 1 where it is missing."""
    rule = Rule.of(argv)
    if rule is not None and not _native(places.native):
        try:
            if rule.insert:
                _expose(rule, places.pids)
            else:
                _unexpose(rule, places.pids)
        except OSError as error:  # the rule itself is worth more than its port on the host
            print(f"iptables-wrapper: {rule.name}: {error}", file=sys.stderr)
    try:
        return subprocess.run([places.iptables, *argv], check=False).returncode
    except OSError as error:
        print(f"iptables-wrapper: {places.iptables}: {error.strerror}", file=sys.stderr)
        return 1


def _native(path: Path) -> bool:
    try:
        return path.read_text().partition("\n")[0].strip().lower() in ("1", "true")
    except OSError:
        return False


def _expose(rule: Rule, pids: Path) -> None:
    _unexpose(rule, pids)  # one that is left from before would hold the port
    pids.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", _MODULE, "-proto", rule.proto, "-container-ip", rule.address]
    command += ["-container-port", str(rule.target), "-host-ip", "0.0.0.0", "-host-port", str(rule.port)]
    command += ["-i", "-no-local-ip"]
    # Nothing of dockerd's may be held: it reads what iptables says to the end, and would wait for the port's.
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)
    ]
    actions += [(os.POSIX_SPAWN_CLOSE, number) for number in map(int, os.listdir("/proc/self/fd")) if number > 2]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    (pids / rule.name).write_text(f"{pid}\n")


def _unexpose(rule: Rule, pids: Path) -> None:
    try:
        pid = int((pids / rule.name).read_text())
    except (OSError, ValueError):
        return
    (pids / rule.name).unlink(missing_ok=True)
    if _is_ours(pid):
        os.kill(pid, signal.SIGTERM)


def _is_ours(pid: int) -> bool:
    """The file may be from before a reboot: the number may be another program's by now."""
    try:
        return _MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
