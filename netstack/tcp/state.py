"""The connection states of RFC 9293 figure 5 as a table; a pair that is missing is a bug of ours and raised."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Named as in the RFC. Text, so that looking a state up hashes in C."""

    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    CLOSE_WAIT = "CLOSE-WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST-ACK"
    TIME_WAIT = "TIME-WAIT"
    CLOSED = "CLOSED"


class Input(StrEnum):
    SYN = "SYN while SYN-SENT (simultaneous open)"
    ACK_OF_SYN = "our SYN is acknowledged"
    FIN = "the guest's FIN, all before it received"
    CLOSE = "our FIN goes out"
    ACK_OF_FIN = "our FIN is acknowledged"
    TIMEOUT = "2 MSL passed"
    RESET = "a RST came or goes out"


_S, _I = State, Input

TRANSITIONS: Final[Mapping[tuple[State, Input], State]] = {
    (_S.SYN_SENT, _I.SYN): _S.SYN_RECEIVED,
    (_S.SYN_SENT, _I.ACK_OF_SYN): _S.ESTABLISHED,
    (_S.SYN_RECEIVED, _I.ACK_OF_SYN): _S.ESTABLISHED,
    (_S.ESTABLISHED, _I.FIN): _S.CLOSE_WAIT,
    (_S.ESTABLISHED, _I.CLOSE): _S.FIN_WAIT_1,
    (_S.FIN_WAIT_1, _I.FIN): _S.CLOSING,
    (_S.FIN_WAIT_1, _I.ACK_OF_FIN): _S.FIN_WAIT_2,
    (_S.FIN_WAIT_2, _I.FIN): _S.TIME_WAIT,
    (_S.CLOSE_WAIT, _I.CLOSE): _S.LAST_ACK,
    (_S.CLOSING, _I.ACK_OF_FIN): _S.TIME_WAIT,
    (_S.LAST_ACK, _I.ACK_OF_FIN): _S.CLOSED,
    (_S.TIME_WAIT, _I.TIMEOUT): _S.CLOSED,
    **{(state, _I.RESET): _S.CLOSED for state in _S},
}

SYNCHRONISED: Final = frozenset(State) - {State.SYN_SENT, State.SYN_RECEIVED, State.CLOSED}
RECEIVING: Final = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2})
"""States in which the guest may still send octets."""
