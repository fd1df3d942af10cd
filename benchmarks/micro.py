"""Nanoseconds of the functions that run once per frame: wire formats, checksum forms, flow look-up.

    python -m benchmarks.micro --store base.jsonl       before a change
    python -m benchmarks.micro --baseline base.jsonl    after it: each case with its ratio to before

One JSON line per case: name, unit, median, runs. A baseline of another machine or interpreter is refused: its ratios say
nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import struct
import sys
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, report, runner
from netstack.wire import checksum, ethernet, ipv4, tcp, udp

RUN_S = 0.02
"""Length of one run: long beside the clock's grain, short beside the scheduler's."""

Operation = Callable[[], object]


def _segment(size: int) -> bytes:
    """An Ethernet frame with an IPv4 TCP segment of `size` octets of payload, as a guest sends it."""
    guest, host = bytes((192, 168, 65, 3)), bytes((192, 168, 65, 2))
    payload = bytes(range(256)) * (size // 256 + 1)
    header = tcp.HEADER.pack(40000, 80, 1, 1, 8 << 12 | tcp.ACK, 501, 0, 0) + b"\1\1\x08\x0a" + bytes(8)
    segment = header + payload[:size]
    total = checksum.internet(segment, checksum.pseudo(guest, host, 6, len(segment)))
    segment = segment[:16] + total.to_bytes(2, "big") + segment[18:]
    packet = ipv4.header(guest, host, 6, len(segment)) + segment
    return ethernet.header(b"\xf6\x16\x36\xbc\xf9\xc6", b"\x02\0\0\0\0\1", ethernet.ETHERTYPE_IPV4) + packet


def cases() -> dict[str, tuple[Operation, int]]:
    """Every case: what is called, and how many operations one call counts as.

    The cases with numpy come last: it cannot be switched off again.
    """
    frame = memoryview(_segment(1448))
    packet, segment = frame[14:], frame[34:]
    guest, host = bytes(packet[12:16]), bytes(packet[16:20])
    datagram = memoryview(udp.emit(5353, 53, bytes(64), guest, host))
    small, large, read = bytes(segment[:40]), bytes(range(256)) * 6, bytes(range(256)) * 256
    common = struct.Struct("!12xHBxHHHBBHIIHHIIHH")
    flows = {struct.pack("!IIHH", 0xC0A84103, 0xC0A84102, port, 80): port for port in range(1024, 11264)}
    key = bytes(frame[26:38])
    flows[key] = 0
    syn = tcp.syn_options(1460, 7, True)

    def look_up() -> object:
        return flows.get(bytes(frame[26:38]))

    def numpy_sum(data: bytes) -> Operation:
        def run() -> object:
            return checksum.partial(data)

        return run

    found: dict[str, tuple[Operation, int]] = {
        "ethernet.parse": (lambda: ethernet.parse(frame), 1),
        "ipv4.parse": (lambda: ipv4.parse(packet), 1),
        "ipv4.header": (lambda: ipv4.header(guest, host, 6, 1480), 1),
        "tcp.parse": (lambda: tcp.parse(segment), 1),
        "tcp.parse_options": (lambda: tcp.parse_options(syn), 1),
        "tcp.syn_options": (lambda: tcp.syn_options(1460, 7, True), 1),
        "udp.parse": (lambda: udp.parse(datagram), 1),
        "udp.emit_64": (lambda: udp.emit(5353, 53, small, guest, host), 1),
        "frame.one_unpack": (lambda: common.unpack_from(frame), 1),
        "flow.look_up_10k": (look_up, 1),
        "checksum.verify_tcp_1448": (
            lambda: checksum.verify(segment, checksum.pseudo(guest, host, 6, len(segment))),
            1,
        ),
        "checksum.adjust_4": (lambda: checksum.adjust(0x1234, guest, host), 1),
        "checksum.pure_40": (lambda: checksum.partial(small), 1),
        "checksum.pure_1536": (lambda: checksum.partial(large), 1),
        "checksum.pure_65536": (lambda: checksum.partial(read), 1),
        "checksum.form_sum_cast_1536": (lambda: sum(memoryview(large).cast("H")) % 0xFFFF, 1),
        "checksum.numpy_1536": (numpy_sum(large), 1),
        "checksum.numpy_65536": (numpy_sum(read), 1),
    }
    return found


def measure(operation: Operation, counts: int, runs: int, run_s: float = RUN_S) -> list[float]:
    """Nanoseconds of one operation in each of `runs` runs of about `run_s` seconds."""
    timer = timeit.Timer(operation)
    number, taken = 1, timer.timeit(1)
    while taken < run_s / 4:
        number = max(number * 2, int(number * run_s / 2 / max(taken, 1e-9)))
        taken = timer.timeit(number)
    number = max(1, int(number * run_s / taken))
    return [round(taken / number / counts * 1e9, 1) for taken in timer.repeat(runs, number)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where `--limit` was exceeded; 2 for a baseline that is not of this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default="*", help="shell pattern [all]")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--store", type=Path, metavar="FILE", help="keep the lines as a baseline")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="compare with what --store kept")
    parser.add_argument(
        "--limit", type=float, metavar="RATIO", help="fail when a median is more than RATIO times its old"
    )
    arguments = parser.parse_args(argv)
    where = machine.fingerprint()
    baseline: list[dict[str, Any]] = []
    if arguments.baseline is not None:
        baseline = runner.load(arguments.baseline)
        if any(line.get("machine") != where for line in baseline):
            print(f"benchmarks: {arguments.baseline} was not made here ({where})", file=sys.stderr)
            return 2
    lines: list[dict[str, Any]] = []
    for name, (operation, counts) in cases().items():
        if not fnmatch.fnmatch(name, arguments.cases) or ("numpy" in name and not checksum.use_numpy()):
            continue
        values = measure(operation, counts, arguments.runs)
        line = {"name": name, "unit": "ns", "median": median(values), "runs": values, "machine": where}
        [line] = report.against_baseline([line], baseline)
        print(json.dumps(line), flush=True)
        lines.append(line)
    if arguments.store is not None:
        arguments.store.write_text("".join(json.dumps(line) + "\n" for line in lines))
    slower = [line for line in lines if arguments.limit and line.get("ratio_to_baseline", 0) > arguments.limit]
    for line in slower:
        print(f"benchmarks: {line['name']} takes {line['ratio_to_baseline']} times as long as before", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
