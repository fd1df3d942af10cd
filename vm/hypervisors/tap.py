"""A TAP device for a hypervisor that has nothing else, kept from the host's own network stack (Linux, CAP_NET_ADMIN).

    python -m vm.hypervisors.tap --name vmtap0 -- pyvpnkit run --link packet:vmtap0    # our network is at the interface
    firecracker ... host_dev_name vmtap0                                              # the hypervisor is at the descriptor

A TAP has one program at its descriptor, so our own `tap:` link cannot be beside a hypervisor there. What comes out of the guest
arrives at the interface like frames from a wire: at our network, which reads all of them (AF_PACKET), and then at the host's own
stack, where the guest would reach every service of the host that listens on all addresses, past the rules of our network. `_SHIELD`
is what keeps it out: the host answers no ARP there, takes no packet for itself out of a broadcast frame, and its MAC address, by
which alone it takes others, is never sent. (A filter of `tc` would be plainer, but not every kernel has one that drops.)

It makes the device, runs the command, hands signals on to it, and removes the device when it was asked to end. When the command
ends by itself the device stays, for a machine may have it open, and the next run takes it over (its alias says whose it is). A
device of somebody else's is used as it is and left there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from vm.api import Nic

_ALIAS: Final = "pyvpnkit"
_SHIELD: Final = {
    "ipv6/disable_ipv6": "1",  # no link-local address, no advertisement of ours that the host would follow
    "ipv4/arp_ignore": "8",
    "ipv4/drop_unicast_in_l2_multicast": "1",
    "ipv4/rp_filter": "1",  # nothing is routed there, so no source is right
    "ipv4/forwarding": "0",
}
_ENDS: Final = (signal.SIGTERM, signal.SIGINT)
_HANDED_ON: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SYSTEM: Final = "/usr/sbin:/sbin"
MAX_NAME: Final = 15  # IFNAMSIZ, with the zero behind it


def behind(nic: Nic, command: Sequence[str]) -> tuple[str, ...]:
    """`command`, which has `--link packet:NAME`, so that `nic`'s TAP is there for it."""
    return (sys.executable, "-m", __name__, "--name", nic.tap, "--mtu", str(nic.mtu), "--", *command)


class Tap:
    """The device `name`, there and up after `__init__`. Raises `ConfigError`."""

    def __init__(self, name: str, *, mtu: int = 1500, uid: int | None = None) -> None:
        if not 0 < len(name.encode()) <= MAX_NAME or any(one in "/: \t\n" for one in name) or name in (".", ".."):
            raise ConfigError(
                f"tap {name!r}: not a name of an interface; it has 1 to {MAX_NAME} octets and no / : or space"
            )
        self.name = name
        self._ours = False
        if any(name == there for _, there in socket.if_nameindex()):
            # By `ip`, for /sys may be of another namespace.
            (found,) = json.loads(_run("ip", "-json", "-details", "link", "show", "dev", name))
            if found.get("linkinfo", {}).get("info_kind") != "tun":
                raise ConfigError(
                    f"tap {name}: there is an interface of that name which is no TAP; choose another name"
                )
            if found.get("ifalias") != _ALIAS:
                return
        else:
            _run("ip", "tuntap", "add", "dev", name, "mode", "tap", "user", str(os.getuid() if uid is None else uid))
        self._ours = True
        try:
            self._set_up(mtu)
        except ConfigError:
            self.close()
            raise

    def _set_up(self, mtu: int) -> None:
        _run("ip", "link", "set", "dev", self.name, "alias", _ALIAS, "mtu", str(mtu))
        for setting, value in _SHIELD.items():
            version, _, leaf = setting.partition("/")
            path = Path(f"/proc/sys/net/{version}/conf/{self.name}/{leaf}")
            if version == "ipv6" and not path.exists():
                continue  # a host without IPv6
            try:
                path.write_text(value)
            except OSError as error:
                raise ConfigError(f"tap {self.name}: {path}: {error.strerror}") from None
        _run("ip", "link", "set", "dev", self.name, "up")

    def close(self) -> None:
        """Remove it where it was made here."""
        if self._ours:
            self._ours = False
            _run("ip", "link", "delete", self.name)


def _run(program: str, *words: str) -> str:
    """What it printed. Raises `ConfigError`."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SYSTEM}")
    if path is None:
        raise ConfigError(f"a TAP is made with '{program}'; install the package iproute2")
    done = subprocess.run([path, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ConfigError(f"{program} {' '.join(words)}: {done.stderr.strip()} (it needs CAP_NET_ADMIN)")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m vm.hypervisors.tap", description="Make a TAP for a command.")
    options.add_argument("--name", required=True, help="of the device, for instance vmtap0")
    options.add_argument("--mtu", type=int, default=1500, help="default: 1500")
    options.add_argument("--uid", type=int, help="of the user who may open it; default: ours")
    options.add_argument("command", nargs="+", help="what is run beside it, after --")
    chosen = options.parse_args(argv)
    # Taken by `_beside`; one that comes before then waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_ENDS, *_HANDED_ON, signal.SIGCHLD))
    try:
        tap = Tap(chosen.name, mtu=chosen.mtu, uid=chosen.uid)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        child = subprocess.Popen(chosen.command, close_fds=False, preexec_fn=_bound_to(os.getpid()))
    except OSError as error:
        print(f"{chosen.command[0]}: {error.strerror}", file=sys.stderr)
        tap.close()
        return 127
    os.closerange(3, 1 << 20)  # they are the command's: who waits until it closes one waits for us too
    asked = _beside(child)
    if asked:
        tap.close()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _bound_to(parent: int) -> Callable[[], None]:
    """It ends with us, however we end; nothing else runs here that could hold a lock between fork and exec."""
    libc = ctypes.CDLL(None)

    def bound() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return bound


def _beside(child: subprocess.Popen[bytes]) -> bool:
    """Until it has ended; whether it was asked to."""
    asked = False
    while child.poll() is None:
        number = signal.sigwait((*_ENDS, *_HANDED_ON, signal.SIGCHLD))
        if number != signal.SIGCHLD:
            asked |= number in _ENDS
            child.send_signal(number)
    return asked


if __name__ == "__main__":
    sys.exit(main())
