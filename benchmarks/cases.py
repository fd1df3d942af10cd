"""The cases: what is run in a guest, and the numbers that come of it.

A case is a function of a guest and the conditions; it returns metrics by name. Units are in the names. CPU is the
back-end's alone: on a TAP it holds the guest kernel's receive path and the delivery on loopback, which run inside its
write and send calls; behind the bridge the former is the bridge's.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import load
from benchmarks.build import SetupError, build
from benchmarks.guest import Guest
from benchmarks.guests import PyvpnkitVm
from benchmarks.load import Moved, Servers
from benchmarks.namespaces import HostNamespace
from benchmarks.processes import Cpu, end
from benchmarks.published import WayIn
from netstack.errors import HostError

Metrics = dict[str, float]
Result = TypeVar("Result")

IDLE_FLOWS = 10_000
PACED_RATE = 20_000
DNS_WINDOW = 32
NEW_NAMES = 65536
"""More than any cache holds."""
FEW_NAMES = 64
GIB = float(1 << 30)
DOWN_OCTETS = 256 << 20
UP_OCTETS = 64 << 20
"""Twice in the machine's memory, which is 256 MiB: as a file, and in wget."""
UP_FILE = "/tmp/up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the cases of a run share."""

    host: HostNamespace
    directory: Path
    seconds: float
    servers: Servers
    idle_s: float = 5.0
    flows: int = IDLE_FLOWS


class CaseFailed(Exception):
    """This case gave no figure with this guest; the text is the client's complaint."""


class ServerBusy(Exception):
    """iperf3 serves one client at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`run(guest, conditions)`; a `fresh` case is given a guest class instance it starts and stops itself."""

    name: str
    run: Callable[[Guest, Conditions], Metrics]
    fresh: bool = False
    lasting: bool = False
    """TCP over connections that stay."""
    needs_backend: bool = False
    needs_dhcp: bool = False
    machine: bool = False
    published: bool = False
    """The client is the host's, the server in the guest."""
    help: str


def client(command: list[str], limit_s: float) -> dict[str, Any]:
    """Run a client that prints one JSON document; raises `CaseFailed`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise CaseFailed(f"no result after {limit_s:g} s") from None
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise CaseFailed(done.stderr.strip() or f"ended with status {done.returncode}") from None
    if "busy" in str(report.get("error")):
        raise ServerBusy
    if done.returncode != 0 or "error" in report:
        raise CaseFailed(str(report.get("error") or done.stderr.strip()))
    assert isinstance(report, dict)
    return report


def with_cpu(guest: Guest, run: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], Cpu | None]:
    """The client's report and the CPU seconds the back-end spent meanwhile; raises `CaseFailed` when it died."""
    if not guest.measured:
        return run(), None
    try:
        before = guest.cpu_seconds()
        report = run()
        return report, guest.cpu_seconds().since(before)
    except ProcessLookupError:
        raise CaseFailed(f"the back-end ended: {guest.log_tail()}") from None


def cost(cpu: Cpu | None, unit: str, count: float) -> Metrics:
    """Per operation (or GiB): what the back-end spent, and how much of it outside the kernel; nothing without one."""
    if cpu is None or not count:
        return {}
    factor = 1.0 if unit == "cpu_s_per_gib" else 1e6
    user = {"user_pct": cpu.user / cpu.total * 100} if cpu.total else {}
    return {unit: cpu.total / count * factor, **user}


def with_kicks(guest: Guest, run: Callable[[], Result]) -> tuple[Result, Metrics]:
    """What `run` gave, and on a ring how many frames the guest sent for each time it had to wake the back-end."""
    before = guest.counters()
    result = run()
    after = guest.counters()
    return result, frames_per_kick({name: after[name] - before.get(name, 0) for name in after})


def frames_per_kick(counted: Mapping[str, int]) -> Metrics:
    return {"frames_per_kick": counted["frames_out"] / max(counted["kicks_out"], 1)} if counted else {}


def netload(guest: Guest, verb: str, where: str, port: int, *arguments: object, limit_s: float) -> dict[str, Any]:
    return client(guest.inside(*load.netload(verb, where, port, *arguments)), limit_s)


def transfer(command: list[str], seconds: float) -> dict[str, Any]:
    """The report of iperf3, or of what stands in for it."""
    for _ in range(20):
        with contextlib.suppress(ServerBusy):  # it has not seen the end of the run before
            return client(command, seconds + 15)
        time.sleep(0.1)
    raise CaseFailed("the server stayed busy")


def rates(guest: Guest, moved: Moved, cpu: Cpu | None) -> Metrics:
    memory = {"rss_mib": guest.rss_mib()} if guest.measured else {}
    return {"gbit_s": moved.bits_per_second / 1e9, **cost(cpu, "cpu_s_per_gib", moved.octets / GIB), **memory}


def round_trips(report: dict[str, Any], cpu: Cpu | None) -> Metrics:
    if not report["operations"]:
        raise CaseFailed("not one operation")
    told = {name: float(report[name]) for name in ("p50_us", "p99_us", "errors")}
    return {"per_s": report["rate"], **told, **cost(cpu, "cpu_us_per_op", report["operations"])}


def tcp(streams: int, down: bool) -> Callable[[Guest, Conditions], Metrics]:
    def run(guest: Guest, at: Conditions) -> Metrics:
        command = guest.bulk(at.servers, streams=streams, down=down, seconds=at.seconds)
        (report, cpu), kicks = with_kicks(guest, lambda: with_cpu(guest, lambda: transfer(command, at.seconds)))
        return {**rates(guest, guest.moved(report), cpu), **kicks, **frames_per_kick(guest.counted(report))}

    return run


def operations(verb: str, connections: int) -> Callable[[Guest, Conditions], Metrics]:
    def run(guest: Guest, at: Conditions) -> Metrics:
        command = guest.operations(verb, at.servers, connections=connections, seconds=at.seconds)
        (report, cpu), kicks = with_kicks(guest, lambda: with_cpu(guest, lambda: client(command, at.seconds + 20)))
        return {**round_trips(report, cpu), **kicks, **frames_per_kick(guest.counted(report))}

    return run


def published_tcp(streams: int, up: bool) -> Callable[[Guest, Conditions], Metrics]:
    """Bulk by a client on the host, to the guest or, where `up`, from it."""

    def run(guest: Guest, at: Conditions) -> Metrics:
        way = reachable_way_in(guest)
        command = way.bulk(streams=streams, up=up, seconds=at.seconds)
        before = way.crossed(up=up)
        report, cpu = with_cpu(guest, lambda: transfer(command, at.seconds))
        moved = load.moved(report)
        if (crossed := way.crossed(up=up) - before) < moved.octets:
            raise CaseFailed(f"only {crossed} of {moved.octets:.0f} octets crossed the guest's interface")
        return rates(guest, moved, cpu)

    return run


def published_operations(verb: str, connections: int) -> Callable[[Guest, Conditions], Metrics]:
    def run(guest: Guest, at: Conditions) -> Metrics:
        command = reachable_way_in(guest).operations(verb, connections=connections, seconds=at.seconds)
        return round_trips(*with_cpu(guest, lambda: client(command, at.seconds + 20)))

    return run


def reachable_way_in(guest: Guest, limit_s: float = 15.0) -> WayIn:
    """The way in, with an answer of the guest's server."""
    way = guest.way_in()
    client(way.probe(limit_s), limit_s + 5)
    return way


def udp(size: int, down: bool) -> Callable[[Guest, Conditions], Metrics]:
    def run(guest: Guest, at: Conditions) -> Metrics:
        def send(rate: int) -> dict[str, Any]:
            verb = "udp-down" if down else "udp-up"
            limit_s = at.seconds + 20
            return netload(guest, verb, guest.server, at.servers.netload, size, rate, at.seconds, limit_s=limit_s)

        paced, cpu = with_cpu(guest, lambda: send(PACED_RATE))
        flood = send(0)
        return {
            "kpps": flood["rate"] / 1e3,
            "loss_at_20k_pct": paced["loss"] * 100,
            **cost(cpu, "cpu_us_per_packet", paced["received"]),
        }

    return run


def dns(names: int) -> Callable[[Guest, Conditions], Metrics]:
    def run(guest: Guest, at: Conditions) -> Metrics:
        def ask() -> dict[str, Any]:
            asked = guest.resolver, 53, "bench.example", DNS_WINDOW, at.seconds, names
            return netload(guest, "dns", *asked, limit_s=at.seconds + 20)

        report, cpu = with_cpu(guest, ask)
        if not report["operations"]:
            raise CaseFailed(f"no right answer ({report['wrong']} wrong, {report['lost']} lost)")
        told = {name: float(report[name]) for name in ("p50_us", "p99_us", "wrong", "lost")}
        return {"per_s": report["rate"], **told, **cost(cpu, "cpu_us_per_op", report["operations"])}

    return run


def startup(guest: Guest, at: Conditions) -> Metrics:
    """Exec of the back-end to the first DHCP offer seen by a raw client."""
    guest.make_namespace()
    waiting = subprocess.Popen(guest.dhcp_client(20), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(0.1)  # the client's own start is not what is measured
        begun = time.monotonic()
        guest.launch(bare=True)
        out, err = waiting.communicate(timeout=25)
        if waiting.returncode != 0:
            raise CaseFailed(f"{err.strip()}; {guest.log_tail()}")
        return {"offer_s": json.loads(out)["monotonic"] - begun}
    finally:
        end(waiting)


def idle(guest: Guest, at: Conditions) -> Metrics:
    """Memory and CPU of a daemon whose guest does nothing."""
    guest.start()
    wait_reachable(guest, at)
    time.sleep(1.0)
    before = guest.cpu_seconds()
    begun = time.monotonic()
    time.sleep(at.idle_s)
    spent = guest.cpu_seconds().since(before)
    return {"rss_mib": guest.rss_mib(), "cpu_pct": spent.total / (time.monotonic() - begun) * 100}


def idle_flows(guest: Guest, at: Conditions) -> Metrics:
    """Many open TCP connections that say nothing; each is asked again at the end. Both ends are processes of their own."""
    guest.start()
    wait_reachable(guest, at)
    before = guest.rss_mib()
    command = guest.inside(str(build("netload")), "idle", guest.server, str(at.servers.netload), str(at.flows), "30")
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        opened = json.loads(holder.stdout.readline() or "{}")
        if opened.get("open", 0) < at.flows:
            raise CaseFailed(f"{opened.get('open', 0)} of {at.flows} connections opened")
        time.sleep(1.0)
        full = guest.rss_mib()
        out, _ = holder.communicate(timeout=60)  # closes its standard input: it asks each again and ends
        alive = json.loads(out or "{}").get("alive", 0)
        if alive < at.flows:
            raise CaseFailed(f"{alive} of {at.flows} connections still answered")
        return {
            "rss_mib": full,
            "kib_per_flow": (full - before) * 1024 / at.flows,
            "opens_per_s": at.flows / max(opened["seconds"], 1e-3),
        }
    except subprocess.TimeoutExpired:
        raise CaseFailed("the connections did not answer again") from None
    finally:
        with contextlib.suppress(OSError):
            end(holder)


def machine_transfer(down: bool) -> Callable[[Guest, Conditions], Metrics]:
    """A file by the wget of a machine's busybox: to /dev/null, and what lies in its memory. By the host's clock, from the command
    to its prompt."""

    def run(guest: Guest, at: Conditions) -> Metrics:
        assert isinstance(guest, PyvpnkitVm)
        octets = DOWN_OCTETS if down else UP_OCTETS

        def transfer() -> dict[str, Any]:
            begun = time.monotonic()
            if down:
                guest.fetch(at.servers, octets, "/dev/null")
            elif (arrived := guest.post(at.servers, UP_FILE)) != octets:
                raise CaseFailed(f"{arrived} of {octets} octets arrived")
            return {"seconds": time.monotonic() - begun}

        try:
            if not down and guest.shell(f"[ -e {UP_FILE} ] || echo none", 5.0):
                guest.fetch(at.servers, UP_OCTETS, UP_FILE)
            (report, cpu), kicks = with_kicks(guest, lambda: with_cpu(guest, transfer))
        except HostError as error:
            raise CaseFailed(str(error)) from None
        return {"gbit_s": octets * 8 / report["seconds"] / 1e9, **cost(cpu, "cpu_s_per_gib", octets / GIB), **kicks}

    return run


def wait_reachable(guest: Guest, at: Conditions, limit_s: float = 15.0) -> None:
    """Until the guest gets an octet echoed by the server on the host; raises `SetupError`."""
    try:
        if isinstance(guest, PyvpnkitVm):
            guest.fetch(at.servers, 1, "/dev/null", limit_s)
        else:
            client(guest.probe(at.servers, limit_s), limit_s + 5)
    except (CaseFailed, HostError) as error:
        raise SetupError(f"{guest.label}: {error}\n{guest.log_tail() if guest.measured else ''}") from None


def _cases() -> dict[str, Case]:
    cases = []
    for direction in ("up", "down"):
        for streams in (1, 4):
            text = f"TCP bulk, {streams} stream{'s' * (streams > 1)}, {_words(direction)}"
            name = f"tcp_{direction}_{streams}"
            cases.append(Case(name=name, run=tcp(streams, direction == "down"), lasting=True, help=text))
    for verb, connections, text in (
        ("rr", 1, "one-octet request/response, 1 connection"),
        ("rr", 16, "the same, 16 connections"),
        ("crr", 16, "connect, one octet each way, close; 16 in parallel"),
    ):
        run = operations(verb, connections)
        cases.append(Case(name=f"{verb}_{connections}", run=run, lasting=verb == "rr", help=text))
    for direction in ("up", "down"):
        for size in (64, 1400):
            text = f"UDP, {size} octets, {_words(direction)}: highest rate, and loss at 20,000 a second"
            cases.append(Case(name=f"udp_{direction}_{size}", run=udp(size, direction == "down"), help=text))
    cases += [
        *_published(),
        Case(name="dns", run=dns(NEW_NAMES), help=f"DNS queries forwarded, {DNS_WINDOW} outstanding"),
        Case(name="dns_cache", run=dns(FEW_NAMES), help=f"DNS queries for {FEW_NAMES} names, {DNS_WINDOW} outstanding"),
        Case(name="startup", run=startup, fresh=True, needs_backend=True, needs_dhcp=True, help="exec to DHCP offer"),
        Case(name="idle", run=idle, fresh=True, needs_backend=True, help="memory and CPU of an idle daemon"),
        Case(name="flows", run=idle_flows, fresh=True, needs_backend=True, help="memory with 10,000 idle TCP flows"),
    ]
    for direction in ("up", "down"):
        text = f"wget in a machine of QEMU's, {_words(direction)}"
        cases.append(Case(name=f"vm_{direction}", run=machine_transfer(direction == "down"), machine=True, help=text))
    return {case.name: case for case in cases}


def _published() -> Iterator[Case]:
    for direction in ("down", "up"):
        for streams in (1, 4):
            text = f"TCP bulk through a published port, {streams} stream{'s' * (streams > 1)}, {_words(direction)}"
            name = f"pub_{streams}" if direction == "down" else f"pub_up_{streams}"
            yield Case(name=name, run=published_tcp(streams, direction == "up"), published=True, help=text)
    text = "connect, one octet each way, close, through a published port; 16 in parallel"
    yield Case(name="pub_crr", run=published_operations("crr", 16), published=True, help=text)


def _words(direction: str) -> str:
    return "guest to host" if direction == "up" else "host to guest"


CASES = _cases()
