"""One connection over vsock, in numbers: octets that were sent and taken, never an octet of payload (virtio 1.2, 5.10.6.3 to 5).

Theory of operation. Two sides, `guest` and `host`; we are the host's side of the wire. `Engine` feeds a connection with the
guest's packets, whoever owns the host's socket says what that did (`sent`, `taken`, `host_shuts`), and `next_op` names the control
packets that are due.

      the guest asks:  DIALLING --(the host answers)--> OPEN      the host asks:  CONNECTING --(RESPONSE)--> OPEN
      RST, or both directions shut down by the guest: CLOSED, and the connection is forgotten

Half-close: `guest_shut` and `host_shut` are the flags of SHUTDOWN that each side has said, and only grow.

Credit, both ways the same: the receiver says how much it can hold (`buf_alloc`) and how much has left that buffer again
(`fwd_cnt`, modulo 2**32); the sender may have at most `buf_alloc` octets on their way. What the guest sends is in our buffer
until the host's socket took it (`taken`). What the host sends stays in the kernel's socket until the guest has room.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from vm.vsock import packet
from vm.vsock.packet import Header

_MODULUS: Final = 0xFFFFFFFF
_NO, _YES, _SAID = 0, 1, 2


class State(Enum):
    CONNECTING = auto()
    """We sent REQUEST, or will; the guest has not answered."""
    DIALLING = auto()
    """The guest sent REQUEST; the host has not answered."""
    OPEN = auto()
    CLOSED = auto()


class Connection:
    """See the module. `key` is what the guest's packets carry: its port and the host's, as they are in a header. `due` is called
    when `next_op` may have something to say; it may be called although that is already known."""

    __slots__ = (
        "_asked",
        "_due",
        "_starving",
        "_told",
        "buf_alloc",
        "deadline",
        "fresh",
        "fwd_cnt",
        "guest_port",
        "guest_shut",
        "host_port",
        "host_shut",
        "key",
        "owner",
        "peer_buf_alloc",
        "peer_fwd_cnt",
        "rx_cnt",
        "shut_told",
        "state",
        "tx_cnt",
    )

    def __init__(
        self,
        key: bytes,
        guest_port: int,
        host_port: int,
        state: State,
        buf_alloc: int,
        due: Callable[[Connection], None],
    ) -> None:
        self.key = key
        self.guest_port = guest_port
        self.host_port = host_port
        self.state = state
        self.buf_alloc = buf_alloc
        self.owner: object = None
        """Whoever has the host's socket."""
        self.deadline: float | None = None
        """When it is given up, unless something happens."""
        self.tx_cnt = 0
        """Octets sent to the guest, modulo 2**32, as the other counts."""
        self.rx_cnt = 0
        """Octets that the guest sent."""
        self.fwd_cnt = 0
        """Of those, what the host has taken."""
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0
        self.guest_shut = 0
        self.host_shut = 0
        self.shut_told = 0
        """Of `host_shut`, what the guest was told."""
        self._told = 0
        """`fwd_cnt` as the guest knows it."""
        self._asked = False
        """The guest wants to know its credit."""
        self._starving = _NO
        """We want to know ours: the host has octets and the guest had no room."""
        self.fresh = True
        """REQUEST or RESPONSE is still to be said."""
        self._due = due

    # The guest's packets.

    def credit(self, header: Header) -> bool:
        """Any packet of the guest says how much it can take (5.10.6.3). True where that ends a famine."""
        self.peer_buf_alloc = header.buf_alloc
        self.peer_fwd_cnt = header.fwd_cnt
        if self._starving and self.room():
            self._starving = _NO
            return True
        return False

    def payload_arrives(self, octets: int) -> bool:
        """Count what came; False where it is more than the guest had credit for."""
        if self.held + octets > self.buf_alloc:
            return False
        self.rx_cnt = (self.rx_cnt + octets) & _MODULUS
        return True

    def credit_asked(self) -> None:
        """CREDIT_REQUEST."""
        self._asked = True
        self._due(self)

    # What the host does.

    def answers(self) -> None:
        """The host has taken the guest's connection: RESPONSE."""
        self.state = State.OPEN
        self._due(self)

    def sent(self, octets: int) -> None:
        """So much left towards the guest, in packets that say our `fwd_cnt`. At most `room()`."""
        self.tx_cnt = (self.tx_cnt + octets) & _MODULUS
        self._told = self.fwd_cnt

    def taken(self, octets: int) -> None:
        """The host's socket took so much of what the guest sent, or it was thrown away."""
        self.fwd_cnt = (self.fwd_cnt + octets) & _MODULUS
        if 2 * ((self.fwd_cnt - self._told) & _MODULUS) >= self.buf_alloc:
            self._due(self)

    def host_shuts(self, flags: int) -> None:
        """The host sends no more (`NO_MORE_SEND`), or takes no more (`NO_MORE_RECEIVE`)."""
        if flags & ~self.host_shut:
            self.host_shut |= flags
            self._due(self)

    def starves(self) -> None:
        """The host has octets and the guest no room: ask, once, in case that an update was never sent. `Room` ends it."""
        if self._starving == _NO:
            self._starving = _YES
            self._due(self)

    # Questions.

    def room(self) -> int:
        """How many octets the guest can take now."""
        if self.guest_shut & packet.NO_MORE_RECEIVE:
            return 0
        room = self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & _MODULUS)
        return room if room > 0 else 0

    @property
    def held(self) -> int:
        """What the guest sent and the host has not taken."""
        return (self.rx_cnt - self.fwd_cnt) & _MODULUS

    def next_op(self) -> tuple[int, int] | None:
        """The next control packet `(op, flags)`, which counts as sent; None when there is nothing to say."""
        op, flags = self._choose()
        if op:
            self._told = self.fwd_cnt
            self._asked = False
        return (op, flags) if op else None

    def _choose(self) -> tuple[int, int]:
        if self.state is State.DIALLING or self.state is State.CLOSED:
            return 0, 0
        if self.fresh:
            self.fresh = False
            return (packet.REQUEST if self.state is State.CONNECTING else packet.RESPONSE), 0
        if self.state is not State.OPEN:
            return 0, 0
        if self._asked or 2 * ((self.fwd_cnt - self._told) & _MODULUS) >= self.buf_alloc:
            return packet.CREDIT_UPDATE, 0
        if self._starving == _YES:
            self._starving = _SAID
            return packet.CREDIT_REQUEST, 0
        if self.host_shut != self.shut_told:
            self.shut_told = self.host_shut
            return packet.SHUTDOWN, self.host_shut
        return 0, 0
