"""The machine's clock, set by its hardware clock whenever the host asks: host-timesync-daemon (spec companions 3.3).

    timesync -port 0xf3a4

Whoever connects has the clock set, and then reads the end of the file. Nothing is read from them. The hardware clock has to follow
the host's (QEMU: `-rtc base=utc,clock=host`, the default), and is taken as UTC.
"""

from __future__ import annotations

import argparse
import calendar
import fcntl
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

PORT = 0xF3A4  # LinuxKit's default
ANY_CID = 0xFFFFFFFF  # vsock(7): VMADDR_CID_ANY
BACKLOG = 16
REST_S = 0.1

RTC_RD_TIME = 0x80247009  # rtc(4): _IOR('p', 0x09, struct rtc_time)
_RTC_TIME = struct.Struct("9i")  # sec, min, hour, mday, mon, year, wday, yday, isdst; as struct tm


def read_rtc(path: str = "/dev/rtc0") -> int:
    """Seconds since 1970 by the hardware clock. Raises `OSError`, `ValueError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return seconds(fcntl.ioctl(fd, RTC_RD_TIME, bytes(_RTC_TIME.size)))
    finally:
        os.close(fd)


def seconds(rtc_time: bytes) -> int:
    """Seconds since 1970 of a `struct rtc_time`. Raises `ValueError` for a time before 1970."""
    second, minute, hour, day, month, year, *_ = _RTC_TIME.unpack(rtc_time)
    found = calendar.timegm((1900 + year, 1 + month, day, hour, minute, second))
    if found < 0:
        raise ValueError(f"the hardware clock says year {1900 + year}")
    return found


def set_clock(now: float) -> None:
    """Raises `OSError`; it takes root."""
    time.clock_settime(time.CLOCK_REALTIME, now)


def listener(at: str, cid: int) -> socket.socket:
    """At a vsock port, or the path of a Unix socket. Raises `OSError`, `ValueError`."""
    if "/" in at:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(at)
        os.chmod(at, 0o600)  # nobody can connect before it listens
    else:
        port = int(at, 0)
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        sock.bind((cid, port))
    sock.listen(BACKLOG)
    return sock


def serve(listening: socket.socket, read: Callable[[], float], set_to: Callable[[float], None]) -> None:
    """Answer callers one after the other, for ever. A clock that cannot be set is said, and the caller closed all the same."""
    while True:
        try:
            caller, _ = listening.accept()
        except OSError as error:  # no descriptor left
            print(f"timesync: {error.strerror}", file=sys.stderr, flush=True)
            time.sleep(REST_S)
            continue
        with caller:
            try:
                now = read()
                moved = now - time.time()
                set_to(now)
                print(f"timesync: the clock is moved by {moved:+.1f} s", file=sys.stderr, flush=True)
            except (OSError, ValueError) as error:
                print(f"timesync: the clock is not set: {error}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 2 for a wrong command line, 1 when it cannot listen."""
    parser = argparse.ArgumentParser(
        "timesync", description="Set the clock by /dev/rtc0 when asked.", allow_abbrev=False
    )
    parser.add_argument(
        "-port", "--port", default=hex(PORT), metavar="PORT|PATH", help="vsock port, or a Unix socket [0xf3a4]"
    )
    parser.add_argument(
        "-cid", "--cid", type=lambda text: int(text, 0), default=ANY_CID, help="of our own, to listen at [any]"
    )
    parser.add_argument("-rtc", "--rtc", default="/dev/rtc0", metavar="PATH", help="the hardware clock [/dev/rtc0]")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        listening = listener(given.port, given.cid)
    except ValueError:
        parser.error(f"-port {given.port!r}: write a vsock port such as 0xf3a4 or 62372, or the path of a Unix socket")
    except OSError as error:
        print(f"timesync: cannot listen at {given.port}: {error.strerror or error}", file=sys.stderr)
        return 1
    with listening:
        serve(listening, lambda: read_rtc(given.rtc), set_clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
