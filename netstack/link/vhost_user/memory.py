"""A virtual machine's memory, mapped here region by region. HOT PATH: `pieces`, and `regions` as `ring` and `link` use them.

The front-end hands over files (memfd, hugetlbfs) and says where each lies in the guest's address space and in its own. Rings are
named by the front-end's addresses, everything in rings by the guest's. An address that is in no region is never touched: it is
`Broken`, the guest's fault.

A file that is made shorter after it was mapped turns every access behind its new end into SIGBUS. The size is looked at when a
region is mapped; a file with F_SEAL_SHRINK (QEMU's memory-backend-memfd by default) cannot change afterwards; for the others see
`vanish`. The guest itself has no way to do this, only who runs it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from netstack.errors import NetstackError
from netstack.link.vhost_user import vanish
from netstack.link.vhost_user.messages import Region

MAX_SLOTS: Final = 64
"""Regions of one guest, for front-ends that add them one by one; each is one descriptor of ours."""
_TOP: Final = 1 << 64
LARGEST: Final = 1 << 46
"""Octets of one region: far more than a machine has, and far less than what would wrap."""


class Broken(NetstackError):
    """The guest's rings say what cannot be; the device stops until its driver starts it again."""


class Unmappable(NetstackError):
    """A memory region cannot be had as it was described."""


class Mapped(NamedTuple):
    """A region that is mapped: guest addresses `start` to `end`, their octets."""

    start: int
    end: int
    view: memoryview
    region: Region
    watch: vanish.Watched
    address: int
    """Where it is in this process."""


class GuestMemory:
    """The mapped regions, in the order in which they are usually asked for (largest first).

    Immutable but for `vanished`: a change of the memory table makes a new one, so views into the old one stay good until
    their last user lets go.
    """

    def __init__(self, mapped: Sequence[Mapped] = (), *, removed: tuple[int, int, int] | None = None) -> None:
        self._removed = removed
        self.regions = sorted(mapped, key=lambda one: one.start - one.end)

    @classmethod
    def of(cls, regions: Sequence[Region], descriptors: Sequence[int]) -> GuestMemory:
        """Map all of them, one descriptor each (which stay the caller's). Raises `Unmappable`; then none stays mapped."""
        memory = cls()
        for region, descriptor in zip(regions, descriptors, strict=True):
            memory = memory.with_region(region, descriptor)
        return memory

    def with_region(self, region: Region, descriptor: int) -> GuestMemory:
        """These and one more; the same ones if it is there already, for QEMU tells of each region once for every queue pair.
        Raises `Unmappable`."""
        if any(one.region == region for one in self.regions):
            return self
        if len(self.regions) >= MAX_SLOTS:
            raise Unmappable(f"there are {MAX_SLOTS} memory regions already")
        if not 0 < region.size <= LARGEST:
            raise Unmappable(f"a memory region of {region.size} octets")
        for name, start in (("guest", region.guest), ("user", region.user), ("file", region.offset)):
            if start + region.size > _TOP:
                raise Unmappable(f"a memory region of {region.size} octets at {name} address {start:#x}")
        for other in self.regions:
            one = other.region
            if region.guest < other.end and other.start < region.guest + region.size:
                raise Unmappable(f"two memory regions at guest address {max(region.guest, other.start):#x}")
            if region.user < one.user + one.size and one.user < region.user + region.size:
                raise Unmappable(f"two memory regions at user address {max(region.user, one.user):#x}")
        return GuestMemory([*self.regions, _map(region, descriptor)])

    def without_region(self, region: Region) -> GuestMemory:
        """All but the one at the same place; the same ones where it was taken away for another queue pair just before. Raises
        `Unmappable` when there was none."""
        place = _place(region)
        kept = [one for one in self.regions if _place(one.region) != place]
        if len(kept) < len(self.regions):
            return GuestMemory(kept, removed=place)
        if place == self._removed:
            return self
        raise Unmappable(f"no memory region of {region.size} octets at guest address {region.guest:#x}")

    @property
    def vanished(self) -> bool:
        """Whether a file was cut off under us: what is read there since is zeros."""
        return any(one.watch.vanished for one in self.regions)

    def pieces(self, address: int, octets: int) -> list[memoryview]:
        """The octets from guest address `address` on: one view, more where regions meet. Raises `Broken` outside of them."""
        end = address + octets
        for start, stop, view, _region, _watch, _address in self.regions:
            if start <= address < stop:
                if end <= stop:
                    return [view[address - start : end - start]]
                return [view[address - start :], *self.pieces(stop, end - stop)]
        raise Broken(f"guest address {address:#x} is in no memory region")

    def at_user_address(self, address: int, octets: int) -> memoryview:
        """The octets from address `address` of the front-end on, in one region. Raises `Broken`."""
        for one in self.regions:
            user = one.region.user
            if user <= address and address + octets <= user + one.region.size:
                return one.view[address - user : address - user + octets]
        raise Broken(f"user address {address:#x} with {octets} octets is in no memory region")

    def describe(self) -> list[str]:
        """The regions, for people."""
        return [f"{one.start:#x}-{one.end:#x}" for one in sorted(self.regions)]


def _place(region: Region) -> tuple[int, int, int]:
    return region.guest, region.size, region.user


def _map(region: Region, descriptor: int) -> Mapped:
    if sys.platform != "linux":
        raise Unmappable("shared memory of a virtual machine needs Linux")
    try:
        length = os.fstat(descriptor).st_size
    except OSError as error:
        raise Unmappable(f"memory region: {error.strerror}") from None
    if region.offset + region.size > length:
        raise Unmappable(
            f"a memory region of {region.size} octets at offset {region.offset} in a file of {length} octets; "
            "with QEMU the memory must be shared (share=on)"
        )
    skipped = region.offset % mmap.ALLOCATIONGRANULARITY
    try:
        octets = mmap.mmap(descriptor, region.size + skipped, offset=region.offset - skipped)
    except (OSError, ValueError, OverflowError) as error:
        raise Unmappable(f"a memory region of {region.size} octets cannot be mapped: {error}") from None
    view = memoryview(octets)[skipped:]
    watched = vanish.watch(octets)
    return Mapped(region.guest, region.guest + region.size, view, region, watched, watched.start + skipped)
