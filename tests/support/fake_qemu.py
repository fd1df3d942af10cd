"""Something in QEMU's place that speaks QMP, for what a real one does too rarely.

    fake_qemu.py HOW ... -chardev socket,id=qmp,path=PATH,...

HOW is a word: `well` behaves; `refuses` will not let the machine go; `old` is QEMU 6.2; `no-pty` has no console; `silent` never
greets; `deaf` has no monitor; `gives-up` stops by an internal error; `hangs` ignores SIGTERM and answers nothing but the first
three commands; anything else is said, and it ends with status 1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Any

SAYS_NOTHING_S = 600


def main(how: str, words: list[str]) -> int:
    version = {"major": 6, "minor": 2, "micro": 0} if how == "old" else {"major": 8, "minor": 1, "micro": 5}
    if words == ["--version"]:
        print(f"QEMU emulator version {version['major']}.{version['minor']}.0 (Debian)")
        return 0
    if how not in ("well", "refuses", "old", "no-pty", "silent", "deaf", "hangs", "gives-up"):
        print(f"qemu-system-x86_64: {how}", file=sys.stderr)
        return 1
    if how == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "deaf":
        time.sleep(SAYS_NOTHING_S)
    monitor = socket.socket(socket.AF_UNIX)
    monitor.bind(next(word for word in words if word.startswith("socket,id=qmp")).split(",")[2].removeprefix("path="))
    monitor.listen()
    connection, _ = monitor.accept()
    if how == "silent":
        print("qemu-system-x86_64: waiting for the other end", file=sys.stderr, flush=True)
        time.sleep(SAYS_NOTHING_S)
    _, pty = os.openpty()
    return talk(how, version, connection, os.ttyname(pty))


def talk(how: str, version: dict[str, int], connection: socket.socket, pty: str) -> int:
    def say(message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\r\n")

    say({"QMP": {"version": {"qemu": version}, "capabilities": []}})
    answered = 0
    for line in connection.makefile("rb"):
        command = json.loads(line)
        answer: dict[str, Any] = {"return": {}}
        events: list[tuple[str, dict[str, Any]]] = []
        match command["execute"]:
            case "query-chardev":
                label = "mon" if how == "no-pty" else "con"
                answer = {"return": [{"label": label, "filename": f"pty:{pty}", "frontend-open": True}]}
            case "cont" if how == "refuses":
                answer = {"error": {"class": "GenericError", "desc": "it is held by another"}}
            case "cont":
                events = [("RESUME", {})]
            case "stop":
                # As a full disk does it, and a guest that has its network card changed all the time.
                error = {"device": "d0", "action": "stop", "reason": "No space left on device"}
                events = [("NIC_RX_FILTER_CHANGED", {}), ("BLOCK_IO_ERROR", error), ("STOP", {})]
                events = events[2:] if how == "gives-up" else events
            case "query-status":
                answer = {"return": {"running": False, "status": "internal-error" if how == "gives-up" else "paused"}}
            case "system_powerdown" if how != "hangs":
                say({"event": "POWERDOWN", "timestamp": {}})
                say({"event": "RESET", "data": {"guest": True, "reason": "guest-reset"}})
                say({"event": "GUEST_PANICKED", "data": {"action": "poweroff"}})
                say({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-panic"}})
                return 0
        answered += 1
        if how == "hangs" and answered > 3:
            continue
        say({**answer, "id": command["id"]})
        for name, data in events:
            say({"event": name, "data": data, "timestamp": {}})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
