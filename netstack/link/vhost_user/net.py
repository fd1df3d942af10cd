"""virtio-net on vhost-user: which features, what configuration, and a link while its rings run (virtio 1.2, 5.1).

Rings by number: 0 is what the guest receives by, 1 what it transmits by, 2 and 3 those of the second pair, and so on; behind
the last pair the control queue, where a front-end passes it on (QEMU and cloud-hypervisor keep it for themselves). The link is
there while pair 0 runs. A driver that starts anew may agree to something else, so each start is a new link.

Not offered: VIRTIO_NET_F_HOST_UFO and GUEST_UFO (no driver of these years makes or takes them; HOST_USO is), VIRTIO_F_RING_RESET
(QEMU passes the reset of a single ring on to nobody: ours would go on where the guest began anew), VIRTIO_F_RING_PACKED.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from functools import partial
from typing import Final

from netstack.link.vhost_user.device import EVENT_IDX, INDIRECT_DESC, OFFERED, VERSION_1, Device, Refused, Ring, warn
from netstack.link.vhost_user.link import Offloads, VhostUserLink
from netstack.link.vhost_user.memory import Broken
from netstack.link.vhost_user.messages import ProtocolFeature
from netstack.link.vhost_user.ring import SplitQueue
from netstack.observe.metrics import Counters

MAX_PAIRS: Final = 16
"""Queue pairs of one guest."""
_GSO_TCPV4: Final = 1
_GSO_TCPV6: Final = 4
_GSO_UDP_L4: Final = 5
_LINK_UP: Final = 1
_CTRL_MQ: Final = 4
_CTRL_MQ_PAIRS_SET: Final = 0
_CONFIG: Final = struct.Struct("<6sHHHIB")
"""MAC, status, max_virtqueue_pairs, MTU, speed in Mbit/s, duplex."""
_UNKNOWN_SPEED: Final = 0xFFFFFFFF
_UNKNOWN_DUPLEX: Final = 0xFF

FEATURES: Final = {
    "CSUM": 0,
    "GUEST_CSUM": 1,
    "MTU": 3,
    "MAC": 5,
    "GUEST_TSO4": 7,
    "GUEST_TSO6": 8,
    "GUEST_ECN": 9,
    "HOST_TSO4": 11,
    "HOST_TSO6": 12,
    "HOST_ECN": 13,
    "MRG_RXBUF": 15,
    "STATUS": 16,
    "CTRL_VQ": 17,
    "MQ": 22,
    "ANY_LAYOUT": 27,
    "RING_INDIRECT_DESC": INDIRECT_DESC,
    "RING_EVENT_IDX": EVENT_IDX,
    "VERSION_1": VERSION_1,
    "HOST_USO": 56,
}
"""What is offered, by the names of virtio 1.2 without their prefix."""
OFFLOADS: Final = (
    "CSUM",
    "GUEST_CSUM",
    "GUEST_TSO4",
    "GUEST_TSO6",
    "GUEST_ECN",
    "HOST_TSO4",
    "HOST_TSO6",
    "HOST_ECN",
    "HOST_USO",
)
"""Those that `offload=off` leaves out."""


def features(*, offload: bool) -> int:
    """The bits."""
    return sum(1 << bit for name, bit in FEATURES.items() if offload or name not in OFFLOADS)


def made_up_mac(name: str) -> bytes:
    """A locally administered address that stays the same for a link of this name, for front-ends that ask us for one."""
    return b"\x52\x54\x00" + hashlib.blake2b(name.encode(), digest_size=3).digest()


class NetDevice(Device):
    """See the module. `appeared(link)` and `gone(link, reason)` tell when a guest's rings run and when they stop."""

    def __init__(
        self,
        name: str,
        mtu: int,
        *,
        appeared: Callable[[VhostUserLink], None],
        gone: Callable[[VhostUserLink, str], None],
        counters: Counters | None = None,
        mac: bytes | None = None,
        offload: bool = True,
        with_config: bool = True,
        complain: Callable[[str, str], None] = warn,
    ) -> None:
        super().__init__(
            name,
            features=features(offload=offload),
            queues=2 * MAX_PAIRS + 1,
            queue_number=MAX_PAIRS,
            protocol=[one for one in OFFERED if with_config or one is not ProtocolFeature.CONFIG],
            complain=complain,
        )
        self.mtu = mtu
        self.mac = mac or made_up_mac(name)
        self.link: VhostUserLink | None = None
        self._appeared = appeared
        self._gone = gone
        self._counters = counters
        self._settling = False

    def config(self) -> bytes:
        return _CONFIG.pack(self.mac, _LINK_UP, MAX_PAIRS, self.mtu, _UNKNOWN_SPEED, _UNKNOWN_DUPLEX)

    def mtu_set(self, mtu: int) -> None:
        """The front-end's idea of the MTU; a smaller one than ours holds from the next start on."""
        if not 68 <= mtu <= 65535:
            raise Refused(f"an MTU of {mtu}")
        self.mtu = min(self.mtu, mtu)

    def agreed_names(self) -> list[str]:
        """The features that the driver agreed to, for people."""
        return [name for name, bit in FEATURES.items() if self.has(bit)]

    # Running.

    def rings_changed(self) -> None:
        if self._settling:
            return
        self._settling = True
        try:
            self._settle()
        finally:
            self._settling = False

    def _pairs(self) -> list[tuple[Ring, Ring]]:
        """The pairs that run, if the first does."""
        found = []
        for number in range(MAX_PAIRS if self.has(FEATURES["MQ"]) else 1):
            receive, transmit = self.rings.get(2 * number), self.rings.get(2 * number + 1)
            if receive is not None and transmit is not None and receive.runs and transmit.runs:
                found.append((receive, transmit))
            elif not number:
                break
        return found

    def _settle(self) -> None:
        pairs = [] if self.broken else self._pairs()
        link = self.link
        if not pairs:
            if link is not None:
                self.link = None
                link.publish()
                self._gone(link, self.broken or self.why or "the guest's driver stopped the device")
            return
        queues = [(receive.queue, transmit.queue) for receive, transmit in pairs]
        running = [(one, other) for one, other in queues if one is not None and other is not None]
        if link is None:
            link = VhostUserLink(self.name, self.mtu, self._offloads(), self.memory, running, counters=self._counters)
            link.on_broken = self._broke
            link.details = self.describe
            self._watch(link, pairs)
            self.link = link
            self._appeared(link)
            return
        link.remap(self.memory)
        link.use(running)
        self._watch(link, pairs)

    def _watch(self, link: VhostUserLink, pairs: list[tuple[Ring, Ring]]) -> None:
        """Which descriptors mean what. A ring to transmit by that is not enabled is emptied and its frames forgotten."""
        other: dict[int, Callable[[], None]] = {}
        control = 2 * MAX_PAIRS if self.has(FEATURES["MQ"]) else 2
        for index, ring in self.rings.items():
            queue = ring.queue
            if queue is None or ring.kick < 0:
                continue
            if index == control and self.has(FEATURES["CTRL_VQ"]):
                other[ring.kick] = partial(self.control, queue)
            elif index & 1 and not ring.enabled:
                other[ring.kick] = queue.drop_all
        link.kicks([transmit.kick for _, transmit in pairs], [receive.kick for receive, _ in pairs], other)

    def _broke(self, reason: str) -> None:
        """The link met something that cannot be, and tells the stack itself."""
        self.link = None
        self.stop_by_itself(reason)

    def _offloads(self) -> Offloads:
        mergeable = self.has(FEATURES["MRG_RXBUF"])
        partial_out = self.has(FEATURES["GUEST_CSUM"])
        partial_in = self.has(FEATURES["CSUM"])
        gso = {
            kind
            for name, kind in (("HOST_TSO4", _GSO_TCPV4), ("HOST_TSO6", _GSO_TCPV6), ("HOST_USO", _GSO_UDP_L4))
            if partial_in and self.has(FEATURES[name])
        }
        return Offloads(
            headroom=12 if mergeable or self.has(VERSION_1) else 10,
            mergeable=mergeable,
            partial_out=partial_out,
            partial_in=partial_in,
            tso=partial_out and self.has(FEATURES["GUEST_TSO4"]),
            gso=frozenset(gso),
        )

    # The control queue, where it comes here.

    def control(self, queue: SplitQueue) -> None:
        """Answer what the driver asks: the number of pairs is acknowledged (which ones run is told by SET_VRING_ENABLE), nothing
        else is known. Raises `Broken`."""
        for head in queue.heads(queue.size):
            readable, written = queue.chain(head)
            asked = b"".join(readable)[:64]
            if not written:
                raise Broken("the control queue: a command without room for the answer")
            known = (
                len(asked) >= 4
                and asked[:2] == bytes((_CTRL_MQ, _CTRL_MQ_PAIRS_SET))
                and 1 <= int.from_bytes(asked[2:4], "little") <= MAX_PAIRS
            )
            written[0][0] = 0 if known else 1
            queue.used(head, 1)
        queue.publish()

    def describe(self) -> dict[str, object]:
        """For status pages."""
        found: dict[str, object] = {
            "features": self.agreed_names(),
            "memory": self.memory.describe(),
            "queue_pairs": len(self._pairs()),
            "ring_sizes": [ring.size for _, ring in sorted(self.rings.items()) if ring.queue is not None],
        }
        if self.link is not None:
            found["frames_outbound"] = self.link.taken
            found["kicks"] = self.link.kicked
            found["calls"] = sum(ring.queue.calls for ring in self.rings.values() if ring.queue is not None)
        return found
