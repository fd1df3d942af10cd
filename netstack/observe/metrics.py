"""Counters: every discarded frame by reason, every flow, every octet. Plain ints; reading them costs nothing."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class Drop(StrEnum):
    """Why something was discarded. The text is the counter's public name."""

    FRAME_SHORT = "frame_short"
    FRAME_LONG = "frame_long"
    FRAME_SOURCE = "frame_source"
    OFFLOAD_HEADER = "offload_header"
    ETHERTYPE = "ethertype"
    SWITCH_UNKNOWN = "switch_unknown"
    ARP_MALFORMED = "arp_malformed"
    NEIGHBOUR_LIMIT = "neighbour_limit"
    NEIGHBOUR_UNRESOLVED = "neighbour_unresolved"
    IPV4_HEADER = "ipv4_header"
    IPV4_CHECKSUM = "ipv4_checksum"
    IPV4_SOURCE = "ipv4_source"
    IPV4_SOURCE_ROUTE = "ipv4_source_route"
    IPV4_DESTINATION = "ipv4_destination"
    IPV4_PROTOCOL = "ipv4_protocol"
    FRAGMENT_INVALID = "fragment_invalid"
    FRAGMENT_OVERLAP = "fragment_overlap"
    FRAGMENT_LIMIT = "fragment_limit"
    FRAGMENT_TIMEOUT = "fragment_timeout"
    TTL_EXPIRED = "ttl_expired"
    ICMP_MALFORMED = "icmp_malformed"
    ICMP_CHECKSUM = "icmp_checksum"
    ICMP_UNHANDLED = "icmp_unhandled"
    ICMP_RATE = "icmp_rate"
    PING_FORBIDDEN = "ping_forbidden"
    PING_SEND = "ping_send"
    UDP_MALFORMED = "udp_malformed"
    UDP_CHECKSUM = "udp_checksum"
    UDP_SEND = "udp_send"
    UDP_FILTERED = "udp_filtered"
    UDP_NO_SERVICE = "udp_no_service"
    TCP_MALFORMED = "tcp_malformed"
    TCP_CHECKSUM = "tcp_checksum"
    TCP_NO_FLOW = "tcp_no_flow"
    TCP_LIMIT = "tcp_limit"
    POLICY = "policy"
    DHCP_MALFORMED = "dhcp_malformed"
    DHCP_IGNORED = "dhcp_ignored"
    LINK_FULL = "link_full"
    LINK_GONE = "link_gone"
    DESCRIPTORS = "descriptors"
    MEMORY = "memory"


class Counters:
    """The numbers of one network."""

    def __init__(self) -> None:
        self.drops: Counter[str] = Counter()
        self.frames_in = 0
        self.frames_out = 0
        self.octets_in = 0
        self.octets_out = 0
        self.tcp_opened = 0
        self.tcp_refused = 0
        self.tcp_reset = 0
        self.tcp_retransmitted = 0
        self.udp_mappings = 0
        self.udp_evicted = 0
        self.pings = 0
        self.fragments_reassembled = 0
        self.icmp_sent = 0
        self.contained = 0
        """Bugs of ours that were contained to one flow; anything but 0 deserves a report."""

    def as_dict(self) -> dict[str, object]:
        """Every counter by its name; `drops` is a mapping of reason to count."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {**numbers, "drops": dict(self.drops)}
