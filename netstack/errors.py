"""All errors that are raised on purpose; the class tells whose fault it is.

Bytes that are wrong are `Malformed`: counted, dropped, and the next frame is looked at. A guest that breaks a protocol loses
that flow only. A host that fails is told to the guest as ICMP error, RST or SERVFAIL. A setting that cannot be used names
itself, its value, and what would be accepted.
"""


class NetstackError(Exception):
    """Base of everything pyvpnkit raises on purpose."""


class Malformed(NetstackError):
    """The bytes are wrong: count, drop, go on."""


class GuestError(NetstackError):
    """The guest broke the protocol: that flow alone is reset."""


class HostError(NetstackError):
    """The outside failed us: the guest gets an ICMP error, a RST or a SERVFAIL."""


class ConfigError(NetstackError):
    """A setting cannot be used; the text names the setting, its value, and what would be accepted."""


class LinkDown(NetstackError):
    """The peer of a link went away (end of file, reset, or a frame length that cannot be believed); the text says why."""
