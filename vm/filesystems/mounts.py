"""What the guest runs, as root, to have a share."""

from __future__ import annotations

import shlex

from vm.api import Share

MSIZE = 262144
"""Octets of a 9P message: where more does not make it faster (spec companions 2.2)."""


def mount(kind: str, what: str, share: Share, *options: str) -> str:
    """`mount -t kind` of `what` at the share's target."""
    words = [*options, *(["ro"] if share.readonly else [])]
    return shlex.join(["mount", "-t", kind, *(["-o", ",".join(words)] if words else []), what, share.target])
