"""Z17, what the companions read of others: files of people, a hypervisor's monitor, a guest's packets over vsock."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError, Malformed
from tests.fuzz.bend import complains, split, spoil
from vm import settings_file
from vm.hypervisors import qmp
from vm.linuxkit import load, vsock_table
from vm.vsock import packet, unix
from vm.vsock.connection import State
from vm.vsock.engine import REPLIES, Asked, Engine
from vm.vsock.packet import Header

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
MACHINE: Final = (EXAMPLES / "tiny.yml").read_bytes()
KIT: Final = (EXAMPLES / "tiny-linuxkit.yml").read_bytes()
SAID: Final = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}\r\n'
    b'{"return": {}, "id": 1}\r\n{"error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}\r\n'
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "x"}}\r\n'
)
CID: Final = 3
LIMIT: Final = 8


def _lines_moved(rng: random.Random, text: bytes) -> bytes:
    """Lines left out, doubled, or with another indentation: bent as a person does it."""
    lines = text.split(b"\n")
    for _ in range(rng.choice([0, 1, 1, 3])):
        at = rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                del lines[at]
            case 1:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case 2:
                lines[at] = b" " * rng.randrange(8) + lines[at].lstrip()
            case _:
                lines[at] = spoil(rng, lines[at])
        lines = lines or [b""]
    return b"\n".join(lines)


def _files(rng: random.Random) -> None:
    text = _lines_moved(rng, MACHINE).decode("utf-8", "replace")
    complains(text, lambda: settings_file.of_text(text, Path("/x/vm.yml")), ConfigError)
    text = _lines_moved(rng, KIT).decode("utf-8", "replace")
    kit = complains(text, lambda: load.load(text), ConfigError)
    if kit is not None:
        assert load.load(load.render(kit)) == kit
        complains(text, lambda: vsock_table.derive(kit), ConfigError)


def _monitor(rng: random.Random) -> None:
    session = qmp.Session()
    said = spoil(rng, SAID) if rng.random() < 0.8 else SAID
    try:
        for piece in split(rng, said):
            for message in session.feed(piece):
                assert isinstance(message, qmp.Greeting | qmp.Reply | qmp.QmpEvent)
    except Malformed as error:
        assert str(error)


def _vsock(rng: random.Random) -> None:
    """A guest that says anything: what is kept is bounded, and nobody's credit is exceeded."""
    engine = Engine(CID, first_port=rng.randrange(1024, 1 << 31), limit=LIMIT, buf_alloc=4096)
    now = 0.0
    ports = [rng.getrandbits(32) for _ in range(3)]
    dialled = [one for _ in range(rng.randrange(3)) if (one := engine.connect(rng.choice(ports), now))]
    for _ in range(rng.randrange(60)):
        now += rng.choice([0.0, 0.5, 30.0])
        if rng.random() < 0.1:
            engine.timeout(now)
        told = rng.choice([one.host_port for one in dialled] or [2376])
        length = rng.choice([0, 0, 1, 4096, 5000, 0xFFFFFFFF])
        header = Header(
            src_cid=rng.choice([CID, CID, CID, CID, 2, rng.getrandbits(64)]),
            dst_cid=rng.choice([2, 2, 2, 2, CID]),
            src_port=rng.choice(ports),
            dst_port=rng.choice([told, 2376, rng.getrandbits(32)]),
            length=length,
            type=rng.choice([1, 1, 1, 1, 2, 0]),
            op=rng.randrange(10),
            flags=rng.randrange(5),
            buf_alloc=rng.choice([0, 4096, 0xFFFFFFFF]),
            fwd_cnt=rng.choice([0, 1, 0x80000000, 0xFFFFFFFF]),
        )
        octets = packet.emit(header)
        assert packet.parse(octets) == header
        if engine.full:
            break
        takes = engine.arrives(header, octets[16:24], min(length, 5000), now)
        if takes is not None:
            assert takes.state is State.OPEN and length <= 4096
            takes.taken(rng.randrange(length + 1))
        assert len(engine.connections) <= LIMIT
        while engine.events:
            event = engine.events.popleft()
            if isinstance(event, Asked):
                rng.choice([engine.accept, engine.refuse])(event.connection)
        if rng.random() < 0.5:
            for _ in range(REPLIES + 4 * LIMIT):
                if engine.next_packet(now) is None:
                    break
            else:
                raise AssertionError("the engine does not come to rest")
    for parse, line in (unix.parse_hyperkit, b"%08x.%08x\n" % (CID, 2376)), (unix.parse_hybrid, b"CONNECT 2376\n"):
        complains(line, lambda parse=parse, line=line: parse(spoil(rng, line)), Malformed)
    complains("a packet cut short", lambda: packet.parse(rng.randbytes(rng.randrange(60))), Malformed)


def z17_companions(rng: random.Random) -> None:
    rng.choice([_files, _monitor, _vsock])(rng)
