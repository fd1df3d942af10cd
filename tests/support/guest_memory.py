"""Memory of a played guest: memfd-backed regions with holes between, at guest-physical and at user addresses that differ.

    memory = GuestMemory()
    front.set_mem_table(memory.regions())
    address = memory.allocate(4096)                  # guest-physical
    memory.write(address, b"octets")
    memory.user(address)                             # where the hypervisor has it mapped, as it tells the back-end

The order of user addresses is not that of guest addresses, and neither begins where a file does, so whoever takes one for the
other reads something else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.support.vhost_front import Region

PAGE: Final = 4096
MIB: Final = 1 << 20
LAYOUT: Final[tuple[tuple[int, int], ...]] = (
    (0, 640 << 10),
    (1 * MIB, 24 * MIB),
    (4096 * MIB, 8 * MIB),
)
"""Guest address and size of each region, as on a PC: low memory, what is below the hole for devices, what is above 4 GiB."""
SMALL: Final[tuple[tuple[int, int], ...]] = ((0x10000, 256 << 10), (0x80000, 256 << 10))
USER_BASE: Final = 0x7F40_0000_0000
USER_STEP: Final = 0x0001_0000_0000

_ADD_SEALS: Final = 1033
_SEAL_SHRINK, _SEAL_GROW = 2, 4


class OutOfMemory(Exception):
    """The guest has given out all it has."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    region: Region
    octets: memoryview

    def holds(self, address: int, length: int) -> bool:
        begin = self.region.guest_address
        return begin <= address and address + length <= begin + self.region.size


class GuestMemory:
    """See the module. `spread`: what is allocated lies in all regions by turns, otherwise in the largest, as in most machines.
    `one_file`: all regions in one memfd, one behind the other, the first at page 1 of it."""

    def __init__(
        self,
        layout: Sequence[tuple[int, int]] = LAYOUT,
        *,
        spread: bool = True,
        one_file: bool = False,
        sealed: bool = False,
    ) -> None:
        self.files: list[int] = []
        self._mapped: list[_Mapped] = []
        # Octets given out of each region. Address 0 is given to nobody: it says "none".
        self._used = [PAGE if address == 0 else 0 for address, _size in layout]
        self._kept = list(self._used)
        self._free: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}
        self._spread = spread
        self._turn = 0 if spread else max(range(len(layout)), key=lambda number: layout[number][1])
        at = PAGE if one_file else 0
        if one_file:
            self._file(PAGE + sum(size for _address, size in layout))
        for number, (address, size) in enumerate(layout):
            if not one_file:
                self._file(size)
            fd = self.files[-1]
            octets = memoryview(mmap.mmap(fd, size, offset=at))
            user = USER_BASE + (len(layout) - number) * USER_STEP
            self._mapped.append(_Mapped(Region(address, size, user, at, fd), octets))
            at += size if one_file else 0
        if sealed:
            self.seal()

    def _file(self, size: int) -> None:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        self.files.append(fd)

    def regions(self) -> list[Region]:
        return [mapped.region for mapped in self._mapped]

    def seal(self) -> None:
        """Nobody may change the files' sizes from here on."""
        for fd in self.files:
            fcntl.fcntl(fd, _ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)

    def truncate(self, number: int, size: int) -> None:
        """Cut a file under everybody's feet: who touches what is gone gets SIGBUS."""
        os.ftruncate(self.files[number], size)

    def close(self) -> None:
        """Close the files; the mappings go when nobody holds a view."""
        for fd in self.files:
            os.close(fd)
        self.files.clear()
        self._mapped.clear()

    # by guest-physical address

    def view(self, address: int, length: int) -> memoryview:
        """Memory at `address`; raises `IndexError` when it is not inside one region."""
        for mapped in self._mapped:
            if mapped.holds(address, length):
                at = address - mapped.region.guest_address
                return mapped.octets[at : at + length]
        raise IndexError(f"{length} octets at {address:#x} are not in one region")

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.view(address, length))

    def write(self, address: int, octets: bytes | memoryview) -> None:
        self.view(address, len(octets))[:] = octets

    def pack(self, form: str, address: int, *values: int) -> None:
        struct.pack_into(form, self.view(address, struct.calcsize(form)), 0, *values)

    def user(self, address: int) -> int:
        """The user address of a guest-physical one."""
        for mapped in self._mapped:
            if mapped.holds(address, 1):
                return address - mapped.region.guest_address + mapped.region.user_address
        raise IndexError(f"{address:#x} is in no region")

    # what is free

    def keep(self) -> None:
        """What is given out now stays so when the rest is forgotten."""
        self._kept = list(self._used)

    def forget(self) -> None:
        """Everything that is not kept is free again."""
        self._used = list(self._kept)
        self._free = {}
        self._sizes = {}

    def allocate(self, size: int, align: int = 16) -> int:
        """The guest address of `size` octets, zero or as their last user left them; regions take turns."""
        room = max(1 << (size - 1).bit_length(), align) if size > 1 else align
        free = self._free.get(room)
        if free:
            return free.pop()
        for _ in self._mapped:
            number = self._turn
            if self._spread:
                self._turn = (number + 1) % len(self._mapped)
            region = self._mapped[number].region
            at = -(-(region.guest_address + self._used[number]) // min(room, PAGE)) * min(room, PAGE)
            if at + room <= region.guest_address + region.size:
                self._used[number] = at + room - region.guest_address
                self._sizes[at] = room
                return at
        raise OutOfMemory(f"{size} octets")

    def free(self, address: int) -> None:
        self._free.setdefault(self._sizes[address], []).append(address)
