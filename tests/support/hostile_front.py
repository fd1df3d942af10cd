"""A front-end that breaks the protocol on purpose (threats G7-G9): one function per kind of message, seeded.

    rogue = Rogue(front, memory)
    refused = attack(rng, rogue)

Each sends something and says whether it must be refused: then the back-end answers with a failure where an answer was asked for,
and hangs up where not, or hangs up in any case. What of it the back-end keeps, descriptors above all, is the test's to count.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

from tests.support.guest_memory import GuestMemory
from tests.support.vhost_front import (
    ADDRESSES,
    INFLIGHT,
    NEED_REPLY,
    NO_DESCRIPTOR,
    REGION,
    REPLY,
    STATE,
    U64,
    VERSION,
    FrontEnd,
    ProtocolFeature,
    Region,
    Request,
)

PAYLOADS: Final[dict[Request, int]] = {
    Request.SET_FEATURES: 8,
    Request.SET_PROTOCOL_FEATURES: 8,
    Request.SET_VRING_NUM: 8,
    Request.SET_VRING_BASE: 8,
    Request.GET_VRING_BASE: 8,
    Request.SET_VRING_ENABLE: 8,
    Request.SET_VRING_ADDR: 40,
    Request.SET_VRING_KICK: 8,
    Request.SET_VRING_CALL: 8,
    Request.SET_VRING_ERR: 8,
    Request.ADD_MEM_REG: 40,
    Request.REM_MEM_REG: 40,
    Request.NET_SET_MTU: 8,
    Request.SET_STATUS: 8,
}
"""Requests whose payload has one size."""
RINGS: Final = 33
"""More than any back-end for 16 pairs has."""
TOP: Final = 1 << 64


class Rogue:
    """A front-end's hands, with descriptors of all kinds in them; `close` closes those."""

    def __init__(self, front: FrontEnd, memory: GuestMemory) -> None:
        self.front = front
        self.memory = memory
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        self.pair = socket.socketpair()
        self.pipe = os.pipe()
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.directory = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
        self.empty = os.memfd_create("empty", os.MFD_CLOEXEC)
        self.short = os.memfd_create("[eventfd]", os.MFD_CLOEXEC)  # a file may have any name
        os.ftruncate(self.short, 4096)
        self.read_only = os.open(f"/proc/self/fd/{self.short}", os.O_RDONLY | os.O_CLOEXEC)
        self.no_files = [self.event, self.pair[0].fileno(), *self.pipe, self.null, self.directory, self.empty]
        self.odd = [*self.no_files, self.short, self.read_only]

    def close(self) -> None:
        for end in self.pair:
            end.close()
        for fd in (self.event, *self.pipe, self.null, self.directory, self.empty, self.short, self.read_only):
            os.close(fd)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A well-formed message, with a confirmation asked for if that was agreed on."""
        flags = VERSION | (NEED_REPLY if self.front.need_reply else 0)
        self.front.send(request, payload, fds, flags=flags)

    def fds(self, rng: random.Random, count: int) -> list[int]:
        return [rng.choice([*self.odd, *self.memory.files]) for _ in range(count)]

    def region(self, number: int = 0) -> Region:
        return self.memory.regions()[number]


Attack = Callable[[random.Random, Rogue], bool]


# the form


def payload_of_another_size(rng: random.Random, r: Rogue) -> bool:
    request, size = rng.choice(list(PAYLOADS.items()))
    wrong = rng.choice([each for each in (0, 1, size - 1, size + 1, size + 8, 100, 4000) if each != size])
    r.tell(request, bytes(wrong), r.fds(rng, 1) if "VRING_" in request.name and size == 8 else ())
    return True


def message_cut_short(rng: random.Random, r: Rogue) -> bool:
    """Then nothing more comes."""
    octets = struct.pack("<III", rng.choice(list(Request)), VERSION, 8) + bytes(8)
    r.front.send_octets(octets[: rng.randrange(1, len(octets))], r.fds(rng, rng.randrange(9)))
    r.front.sock.shutdown(socket.SHUT_WR)
    return True


def payload_without_end(rng: random.Random, r: Rogue) -> bool:
    size = rng.choice([4097, 1 << 16, 1 << 31, (1 << 32) - 1])
    r.front.send(rng.choice(list(Request)), bytes(rng.randrange(64)), r.fds(rng, rng.randrange(3)), size=size)
    return True


def another_version(rng: random.Random, r: Rogue) -> bool:
    flags = rng.choice([0, 2, 3, NEED_REPLY, VERSION | REPLY, VERSION | REPLY | NEED_REPLY])
    r.front.send(rng.choice(list(PAYLOADS)), bytes(8), flags=flags)
    return True


def unknown_request(rng: random.Random, r: Rogue) -> bool:
    r.tell(rng.choice([0, 44, 99, 0xFFFF, 0xFFFFFFFF]), bytes(rng.randrange(64)), r.fds(rng, rng.randrange(9)))
    return True


def more_descriptors_than_any_message_has(rng: random.Random, r: Rogue) -> bool:
    r.tell(rng.choice([Request.GET_FEATURES, Request.SET_OWNER]), b"", r.fds(rng, rng.choice([9, 16, 32, 33, 100])))
    return True


def descriptors_for_nothing(rng: random.Random, r: Rogue) -> bool:
    r.tell(rng.choice([Request.SET_OWNER, Request.GET_FEATURES]), b"", r.fds(rng, rng.randrange(1, 9)))
    return False


def descriptors_in_two_parts(rng: random.Random, r: Rogue) -> bool:
    """Some with the header, some with the payload."""
    octets = struct.pack("<IIIQ", Request.SET_VRING_CALL, VERSION, 8, 0)
    cut = rng.randrange(1, len(octets))
    r.front.send_octets(octets[:cut], r.fds(rng, rng.randrange(1, 6)))
    r.front.send_octets(octets[cut:], r.fds(rng, rng.randrange(1, 6)))
    return True


def noise(rng: random.Random, r: Rogue) -> bool:
    payload = rng.randbytes(rng.choice([0, 8, 12, 20, 32, 40, 72, rng.randrange(300)]))
    r.tell(rng.choice(list(Request)), payload, r.fds(rng, rng.choice([0, 0, 1, 2, 8, rng.randrange(34)])))
    return False


def small_numbers(rng: random.Random, r: Rogue) -> bool:
    """As noise, but nearer to what is right."""
    numbers = [rng.choice([0, 0, 1, 1, 2, 256, 0x100, 4096, 65535, rng.getrandbits(32)]) for _ in range(10)]
    request = rng.choice(list(Request))
    size = PAYLOADS.get(request, 40)
    r.tell(request, struct.pack("<10I", *numbers)[:size], r.fds(rng, rng.choice([0, 0, 1])))
    return False


# features and numbers


def features_never_offered(rng: random.Random, r: Rogue) -> bool:
    r.tell(Request.SET_FEATURES, U64.pack(1 << rng.choice([34, 41, 62, 63])))
    return True


def protocol_features_never_offered(rng: random.Random, r: Rogue) -> bool:
    bit = rng.choice([ProtocolFeature.PAGEFAULT, ProtocolFeature.XEN_MMAP, 40, 63])
    r.tell(Request.SET_PROTOCOL_FEATURES, U64.pack(1 << bit))
    return True


def ring_of_an_odd_size(rng: random.Random, r: Rogue) -> bool:
    size = rng.choice([0, 3, 5, 255, 257, 32769, 65535, 65536, 1 << 31, (1 << 32) - 1])
    r.tell(Request.SET_VRING_NUM, STATE.pack(rng.randrange(2), size))
    return True


def ring_that_is_not_there(rng: random.Random, r: Rogue) -> bool:
    ring = rng.choice([RINGS, 63, 128, 254])
    request = rng.choice([request for request in PAYLOADS if "VRING_" in request.name])
    if request == Request.SET_VRING_ADDR:
        r.tell(request, ADDRESSES.pack(ring, 0, 0, 0, 0, 0))
    elif request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        r.tell(request, U64.pack(ring), [r.event])
    else:
        r.tell(request, STATE.pack(rng.choice([ring, (1 << 32) - 1]), 1))
    return True


def base_of_more_than_an_index(rng: random.Random, r: Rogue) -> bool:
    r.tell(Request.SET_VRING_BASE, STATE.pack(0, rng.choice([1 << 16, 1 << 31])))
    return True


def ring_at_an_odd_address(rng: random.Random, r: Rogue) -> bool:
    user = r.region(1).user_address
    table, used, available = user, user + 8192, user + 4096
    match rng.randrange(3):
        case 0:
            table += rng.randrange(1, 16)
        case 1:
            used += rng.randrange(1, 4)
        case _:
            available += 1
    r.tell(Request.SET_VRING_ADDR, ADDRESSES.pack(rng.randrange(2), 0, table, used, available, 0))
    return True


def ring_outside_of_memory(rng: random.Random, r: Rogue) -> bool:
    region = r.region(1)
    good, end = region.user_address, region.user_address + region.size
    bad = rng.choice([0, end, end - 16, region.guest_address, TOP - 16, 1 << 63])
    parts = [good, good + 8192, good + 4096]
    parts[rng.randrange(3)] = bad
    r.tell(Request.SET_VRING_ADDR, ADDRESSES.pack(rng.randrange(2), 0, *parts, 0))
    return True


def not_an_eventfd(rng: random.Random, r: Rogue) -> bool:
    request = rng.choice([Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
    others = [fd for fd in r.odd if fd != r.event]
    match rng.randrange(4):
        case 0:
            r.tell(request, U64.pack(0))
        case 1:
            r.tell(request, U64.pack(0), [r.event] * rng.choice([2, 8]))
        case 2:
            r.tell(request, U64.pack(NO_DESCRIPTOR), [r.event])
        case _:
            r.tell(request, U64.pack(0), [rng.choice(others)])
    return True


def impossible_mtu(rng: random.Random, r: Rogue) -> bool:
    r.tell(Request.NET_SET_MTU, U64.pack(rng.choice([0, 1, 67, 65536, TOP - 1])))
    return True


def impossible_status(rng: random.Random, r: Rogue) -> bool:
    r.tell(Request.SET_STATUS, U64.pack(rng.choice([256, 1 << 32, TOP - 1])))
    return True


def configuration_out_of_bounds(rng: random.Random, r: Rogue) -> bool:
    offset, size, octets = rng.choice(
        [(0, 257, 257), ((1 << 32) - 1, 8, 8), (0, 8, 0), (0, 0xFFFFFFFF, 8), (300, 8, 8), (0, 0, 8), (256, 1, 1)]
    )
    request = rng.choice([Request.GET_CONFIG, Request.SET_CONFIG])
    r.tell(request, struct.pack("<III", offset, size, 0) + bytes(octets))
    return True


# memory


def _table(r: Rogue, regions: Sequence[bytes], fds: Sequence[int], count: int | None = None) -> None:
    payload = STATE.pack(len(regions) if count is None else count, 0) + b"".join(regions)
    r.tell(Request.SET_MEM_TABLE, payload, fds)


def memory_that_overlaps(rng: random.Random, r: Rogue) -> bool:
    one, other = r.region(1), r.region(2)
    bent = (
        REGION.pack(one.guest_address + rng.choice([0, 4096, one.size - 1]), other.size, other.user_address, 0)
        if rng.random() < 0.5
        else REGION.pack(other.guest_address, other.size, one.user_address + rng.choice([0, one.size - 4096]), 0)
    )
    if rng.random() < 0.5:
        _table(r, [one.pack(), bent], [one.fd, other.fd])
    else:
        _table(r, [bent, one.pack()], [other.fd, one.fd])
    return True


def memory_of_an_impossible_shape(rng: random.Random, r: Rogue) -> bool:
    one = r.region(1)
    guest, size, user, offset = one.guest_address, one.size, one.user_address, one.offset
    match rng.randrange(6):
        case 0:
            size = 0
        case 1:
            size = rng.choice([size + 4096, 1 << 47, 1 << 63, TOP - 1])
        case 2:
            offset = rng.choice([4096, size, 1 << 40, 1 << 62, TOP - size, TOP - 1])
        case 3:
            guest = rng.choice([TOP - size + 1, TOP - 1])
        case 4:
            user = rng.choice([TOP - size + 1, TOP - 1])
        case _:
            size = TOP - rng.randrange(1, 5000)
            offset = rng.randrange(1, 5000)
    shape = REGION.pack(guest, size, user, offset)
    if rng.random() < 0.5:
        _table(r, [shape], [one.fd])
    else:
        r.tell(Request.ADD_MEM_REG, bytes(8) + shape, [one.fd])
    return True


def memory_of_something_else(rng: random.Random, r: Rogue) -> bool:
    """A file that is too short, or may only be read, or no file."""
    fd = rng.choice([*r.no_files, r.short, r.read_only])
    size = 4096 if fd == r.read_only else 8192
    shape = REGION.pack(0x4000_0000_0000, size, 0x1000, 0)
    if rng.random() < 0.5:
        _table(r, [shape], [fd])
    else:
        r.tell(Request.ADD_MEM_REG, bytes(8) + shape, [fd])
    return True


def memory_table_of_a_wrong_count(rng: random.Random, r: Rogue) -> bool:
    one = r.region(1)
    count = rng.choice([0, 9, 10, 100, 255, 1 << 31])
    shapes = [
        REGION.pack(one.guest_address + number * 4096, 4096, one.user_address + number * 4096, 0)
        for number in range(min(count, 100))
    ]
    _table(r, shapes, [one.fd] * min(count, rng.choice([1, 8, 33])), count)
    return True


def memory_table_without_its_descriptors(rng: random.Random, r: Rogue) -> bool:
    regions = r.memory.regions()
    fds = [region.fd for region in regions]
    _table(r, [region.pack() for region in regions], rng.choice([fds[1:], [], fds + fds[:1], fds[:-1], fds * 2]))
    return True


def memory_added_without_a_descriptor(rng: random.Random, r: Rogue) -> bool:
    fds = rng.choice([[], [r.short, r.short], r.fds(rng, 8)])
    r.tell(Request.ADD_MEM_REG, bytes(8) + REGION.pack(0x4000_0000_0000, 4096, 0x1000, 0), fds)
    return True


def memory_removed_that_is_not_there(rng: random.Random, r: Rogue) -> bool:
    one = r.region(1)
    shape = rng.choice(
        [
            REGION.pack(one.guest_address + 4096, one.size, one.user_address, 0),
            REGION.pack(one.guest_address, one.size - 4096, one.user_address, 0),
            REGION.pack(1 << 60, 4096, 1 << 60, 0),
        ]
    )
    r.tell(Request.REM_MEM_REG, bytes(8) + shape)
    return True


def memory_added_again_and_again(rng: random.Random, r: Rogue) -> bool:
    """Up to more slots than there are; the last ones are refused."""
    for number in range(80):
        shape = REGION.pack(0x5000_0000_0000 + number * 4096, 4096, 0x2000_0000 + number * 4096, 0)
        r.tell(Request.ADD_MEM_REG, bytes(8) + shape, [r.short])
        r.front.settle()
    return True


# in flight


def impossible_inflight(rng: random.Random, r: Rogue) -> bool:
    rings, size = rng.choice([(0, 256), (2, 0), (0, 0), (65535, 65535), (2, 65535), (RINGS + 1, 256)])
    request = rng.choice([Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD])
    r.tell(request, INFLIGHT.pack(0, 0, rings, size), [r.short] if request == Request.SET_INFLIGHT_FD else [])
    return True


def inflight_of_a_wrong_file(rng: random.Random, r: Rogue) -> bool:
    fds = rng.choice([[], [r.empty], [r.short], [r.event], [r.pair[0].fileno()], [r.short] * 2])
    r.tell(Request.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 20, 0, 4, 1024), fds)
    return True


FORMS: Final[tuple[Attack, ...]] = (
    payload_of_another_size,
    message_cut_short,
    payload_without_end,
    another_version,
    unknown_request,
    more_descriptors_than_any_message_has,
    descriptors_for_nothing,
    descriptors_in_two_parts,
    noise,
    small_numbers,
)
NUMBERS: Final[tuple[Attack, ...]] = (
    features_never_offered,
    protocol_features_never_offered,
    ring_of_an_odd_size,
    ring_that_is_not_there,
    base_of_more_than_an_index,
    ring_at_an_odd_address,
    ring_outside_of_memory,
    not_an_eventfd,
    impossible_mtu,
    impossible_status,
    configuration_out_of_bounds,
)
MEMORY: Final[tuple[Attack, ...]] = (
    memory_that_overlaps,
    memory_of_an_impossible_shape,
    memory_of_something_else,
    memory_table_of_a_wrong_count,
    memory_table_without_its_descriptors,
    memory_added_without_a_descriptor,
    memory_removed_that_is_not_there,
    memory_added_again_and_again,
    impossible_inflight,
    inflight_of_a_wrong_file,
)
MESSAGES: Final = FORMS + NUMBERS + MEMORY
"""All of them."""
