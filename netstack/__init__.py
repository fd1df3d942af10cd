"""The centre of pyvpnkit: links, wire formats, IP, TCP, UDP, and the edge to the host's sockets.

Importing it also sees to it that `dns.codec` and its neighbours can be imported. Our `dns/` has no `__init__.py`, so that it
can be installed into one directory with dnspython, which has a package of that name. In a checkout the two are apart, and
Python prefers dnspython's regular package to our bare directory: then ours is appended to its `__path__`. Entry points and
`tests/conftest.py` therefore import `netstack` first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os


def _join_dns() -> None:
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "dns")
    if not os.path.isfile(os.path.join(ours, "codec.py")):
        return  # installed in an unusual way: let Python find what it can
    try:
        spec = importlib.util.find_spec("dns")
    except ValueError:  # a stand-in without a spec is in sys.modules: somebody means it
        return
    if spec is None or spec.submodule_search_locations is None:
        return
    if any(os.path.realpath(place) == os.path.realpath(ours) for place in spec.submodule_search_locations):
        return  # alone, or in one directory with dnspython
    importlib.import_module("dns").__path__.append(ours)


_join_dns()
