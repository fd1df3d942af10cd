"""Stands for the programs of hypervisors that are not on this machine: it takes their command line, opens their API and console,
writes down each order, and ends when a guest would.

    hyperkit -l com1,autopty=LINK,log=FILE     vfkit --restful-uri unix://S       cloud-hypervisor --api-socket path=S
    firecracker --api-sock S                   crosvm run -s S                    crosvm powerbtn|suspend|resume|stop S

`install` makes such a program; what it was told is in `orders.jsonl` beside the API's socket (HyperKit: the link). `refuse.json`
there has answers of another kind: `{"PUT /vsock": [400, {"fault_message": "..."}]}`, or `{"start": "text"}` to end at once.
The console comes back in capitals.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tty
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
ORDERS: Final = "orders.jsonl"
REFUSE: Final = "refuse.json"
GREETING: Final = b"the guest boots\n"


def install(directory: Path, name: str) -> Path:
    """The program `name` in `directory`."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.support.stand_in import main\nsys.exit(main({name!r}, sys.argv[1:]))\n"
    )
    path.chmod(0o700)
    return path


def orders(directory: Path) -> list[Any]:
    """What a program there was told, in order."""
    path = directory / ORDERS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class StandIn:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ended = asyncio.Event()
        path = directory / REFUSE
        self.refuse: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._inspected = 0

    def note(self, order: Any) -> None:
        with open(self.directory / ORDERS, "a") as file:
            file.write(json.dumps(order) + "\n")

    def pty(self) -> str:
        """A console on a pty of its own."""
        master, slave = os.openpty()
        tty.setraw(slave)
        self.talk(master, master)
        return os.ttyname(slave)

    def talk(self, hears: int, says: int) -> None:
        os.write(says, GREETING)
        asyncio.get_running_loop().add_reader(hears, lambda: os.write(says, os.read(hears, 4096).upper()))

    async def rest(self, path: str, answers: dict[str, Any], ends: tuple[str, Any]) -> None:
        """An API that answers as `answers` says, and anything else with 204, until `ends` was ordered."""

        from aiohttp import web  # here, since it takes half a second, and not all have an API

        async def handle(request: web.Request) -> web.Response:
            text = await request.text()
            body = json.loads(text) if text else None
            order = f"{request.method} {request.path}"
            self.note([order, body])
            if order in self.refuse:
                status, answer = self.refuse[order]
                return web.json_response(answer, status=status)
            if (order, body) == ends:
                asyncio.get_running_loop().call_later(0.1, self.ended.set)  # when it has answered
            answer = answers.get(order)
            if callable(answer):
                answer = answer(body)
            if answer is None or isinstance(answer, int):
                return web.Response(status=answer or 204)
            return web.json_response(answer)

        server = web.Server(handle)
        await asyncio.get_running_loop().create_unix_server(server, path)
        await self.ended.wait()

    def inspected(self, found: Any, at_first: Any) -> Any:
        """The first time nothing is known yet."""
        self._inspected += 1
        return found if self._inspected > 1 else at_first


def _after(words: Sequence[str], flag: str) -> str:
    return words[words.index(flag) + 1]


async def _vfkit(words: Sequence[str]) -> None:
    path = _after(words, "--restful-uri").removeprefix("unix://")
    vm = StandIn(Path(path).parent)
    console = {"kind": "virtioserial", "ptyName": vm.pty()}
    devices = {"cpus": 1, "devices": [{"kind": "virtiorng"}, console]}
    await vm.rest(path, {"GET /vm/inspect": lambda _: vm.inspected(devices, {})}, ("POST /vm/state", {"state": "Stop"}))


async def _cloud_hypervisor(words: Sequence[str]) -> None:
    path = _after(words, "--api-socket").removeprefix("path=")
    vm = StandIn(Path(path).parent)
    info = {"config": {"serial": {"file": vm.pty(), "mode": "Pty"}}, "state": "Running"}
    answers = {"GET /api/v1/vm.info": lambda _: vm.inspected(info, 404)}
    await vm.rest(path, answers, ("PUT /api/v1/vm.power-button", None))


async def _firecracker(words: Sequence[str]) -> None:
    path = _after(words, "--api-sock")
    vm = StandIn(Path(path).parent)

    def action(body: Any) -> None:
        if body == {"action_type": "InstanceStart"}:
            vm.talk(0, 1)

    await vm.rest(path, {"PUT /actions": action}, ("PUT /actions", {"action_type": "SendCtrlAltDel"}))


async def _crosvm(words: Sequence[str]) -> int:
    if words[0] != "run":
        return _crosvm_order(*words)
    path = _after(words, "-s")
    vm = StandIn(Path(path).parent)
    vm.talk(0, 1)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        while True:
            peer, _ = await loop.sock_accept(listener)
            with peer:
                order = (await loop.sock_recv(peer, 100)).decode()
                vm.note(order)
                await loop.sock_sendall(peer, b"ok")
            if order in ("powerbtn", "stop"):
                return 0


def _crosvm_order(order: str, path: str) -> int:
    refuse = StandIn(Path(path).parent).refuse
    if order in refuse:
        print(refuse[order], file=sys.stderr)
        return 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        sock.send(order.encode())
        return 0 if sock.recv(100) == b"ok" else 1


async def _hyperkit(words: Sequence[str]) -> None:
    link = Path(_after(words, "-l").removeprefix("com1,autopty=").partition(",")[0])
    vm = StandIn(link.parent)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, vm.note, number.name)
    loop.add_signal_handler(signal.SIGTERM, lambda: (vm.note("SIGTERM"), vm.ended.set()))
    os.symlink(vm.pty(), link)
    await vm.ended.wait()


RUNS: Final = {
    "vfkit": _vfkit,
    "cloud-hypervisor": _cloud_hypervisor,
    "firecracker": _firecracker,
    "crosvm": _crosvm,
    "hyperkit": _hyperkit,
}


def main(name: str, words: Sequence[str]) -> int:
    state = os.environ["STAND_IN_STATE"]
    with contextlib.suppress(OSError):
        refuse = json.loads((Path(state) / REFUSE).read_text())
        if "start" in refuse:
            print(refuse["start"], file=sys.stderr)
            return 3
    return asyncio.run(RUNS[name](words)) or 0
