"""VPNKit's port control file system (spec vpnkit 7.1): a VM mounts it at `/port` and publishes ports of the host with it.

    /README
    /NAME/ctl      before anything was asked for, and after what was asked for failed
    /NAME          a plain file, once it is published

A program makes a directory (`NAME` is up to it), writes one request to `ctl`, reads the result back from offset 0, and keeps `ctl`
open. The port is published until that descriptor is closed: then the fid that wrote is clunked, because the program closed it,
ended, or was killed, and the port and the entry are gone. The same happens when anything of the entry is removed (rmdir), and when
the connection ends. Clunks of other fids mean nothing: Linux looks files up with fids that it clunks as it likes, and `cat ctl`
is not to end somebody's port.

All connections act on one table. An entry belongs to the connection that made it until another one writes to its `ctl`; with its
connection it ends. Fewer than `max_entries` are held; one more is refused (ENOSPC).
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence
from typing import Final

from netstack.errors import ConfigError, NetstackError
from portfwd.ninep.files import Contents, Node, Nothing, Opened, Refused, Words
from portfwd.ninep.messages import DMDIR, QTDIR, Qid, Stat
from portfwd.ninep.requests import GRAMMAR, LONGEST, PortRequest, Via, failure
from portfwd.owners import Owner
from portfwd.registry import Forward, Registry

MAX_ENTRIES: Final = 1024
NOTHING_YET: Final = "ERROR no request received. Please read the README.\n"
FILE_TIME: Final = 1146711721  # spec vpnkit 7.1: every file's time
README: Final = f"""\
Ports of the host that lead into this machine.

To publish one:

  1. make a directory here; its name is yours to choose, the request itself is usual
  2. open the file `ctl` in it for reading and writing
  3. write one of these, in one go:
       tcp:HOST-IP:HOST-PORT:tcp:IP:PORT
       udp:HOST-IP:HOST-PORT:udp:IP:PORT
       unix:BASE64 OF A PATH ON THE HOST:unix:BASE64 OF A PATH HERE
     (HOST-PORT 0 takes any free port)
  4. read the file from its beginning:
       OK and the request, with the port that was really taken, or
       ERROR and what is wrong
  5. keep the file open: the port is published for as long

When that descriptor is closed, also because its process has ended, the port is closed and the directory is gone. Removing the
directory does the same. A port that is published shows here as a file with its request.

The form in full: {GRAMMAR}
"""

_WORDS: Final = Words(
    unknown="fid not found", in_use="fid already in use", not_open="fid not open", already_open="fid already open"
)
_UNTOUCHED: Final = 0xFFFFFFFF
_NO_LENGTH: Final = (1 << 64) - 1


def _denied() -> Refused:
    return Refused("permission denied", errno.EACCES)


def _missing() -> Refused:
    return Refused("file not found", errno.ENOENT)


class _Entry:
    """A directory that somebody made, and what became of it."""

    def __init__(self, name: str, number: int, holder: PortFiles) -> None:
        self.name = name
        self.number = number
        self.holder = holder
        """The connection it ends with."""
        self.asked = False
        self.gone = False
        self.request: PortRequest | None = None
        """With the real port."""
        self.forward: Forward | None = None
        self.result = NOTHING_YET

    @property
    def active(self) -> bool:
        return self.forward is not None


class PortTable:
    """All entries. `via` says how connections get to an address in the VM: `stack` or `forwarder`, or a function of the address.

    Used in the event loop's thread, as the registry is.
    """

    def __init__(self, registry: Registry, *, via: Via | str = "stack", max_entries: int = MAX_ENTRIES) -> None:
        self._registry = registry
        self._via: Via = (lambda _address: via) if isinstance(via, str) else via
        self._max = max_entries
        self._numbers = itertools.count(1)
        self.entries: dict[str, _Entry] = {}
        self.refused = 0
        """Directories that were one too many."""

    def connect(self, name: str) -> PortFiles:
        """The tree for one connection; its forwards have the owner `9p NAME`, so `name` is unique."""
        return PortFiles(self, Owner("9p", name))

    def add(self, name: str, holder: PortFiles) -> _Entry:
        if name in self.entries or name == "README":
            raise Refused("file already exists", errno.EEXIST)
        if len(self.entries) >= self._max:
            self.refused += 1
            raise Refused.errno(errno.ENOSPC)
        self.entries[name] = made = _Entry(name, next(self._numbers), holder)
        return made

    def ask(self, entry: _Entry, data: bytes, holder: PortFiles) -> None:
        """The one request of an entry: what comes of it is its `result`."""
        if entry.gone:
            raise _missing()
        if entry.asked:
            raise _denied()
        if len(data) > LONGEST:
            raise Refused.errno(errno.EFBIG)
        entry.asked = True
        entry.holder = holder
        try:
            request = PortRequest.parse(data.decode(errors="backslashreplace"))
        except ConfigError as error:
            entry.result = f"ERROR {error}\n"
            return
        try:
            entry.forward = self._registry.add(request.spec(self._via), holder.owner)
        except (NetstackError, OSError) as error:
            entry.result = f"ERROR {failure(request, error)}\n"
            return
        entry.request = _with_port(request, entry.forward)
        entry.result = f"OK {entry.request}\n"

    def result(self, entry: _Entry) -> str:
        """What reading `ctl` gives now."""
        if entry.forward is not None and self._registry.by_id(entry.forward.id) is None:
            return f"ERROR {entry.request} was unpublished by somebody else\n"
        return entry.result

    def end(self, entry: _Entry) -> None:
        """Stop what it published, and forget it. Harmless when repeated."""
        if entry.gone:
            return
        entry.gone = True
        del self.entries[entry.name]
        if entry.forward is not None:
            self._registry.remove(entry.forward)

    def gone(self, holder: PortFiles) -> None:
        """A connection has ended."""
        for entry in [entry for entry in self.entries.values() if entry.holder is holder]:
            self.end(entry)


class PortFiles:
    """The tree as one connection has it."""

    words = _WORDS

    def __init__(self, table: PortTable, owner: Owner) -> None:
        self.table = table
        self.owner = owner

    def root(self) -> Node:
        return _Root(self)

    def gone(self) -> None:
        self.table.gone(self)


def _stat(name: str, qid: Qid, mode: int) -> Stat:
    # Owners: spec vpnkit 7.1. The numbers are root's, who may do what the mode denies.
    return Stat(
        qid=qid,
        mode=mode | (DMDIR if qid.kind & QTDIR else 0),
        atime=FILE_TIME,
        mtime=FILE_TIME,
        length=0,
        name=name,
        uid="uid",
        gid="gid",
        muid="uid",
        n_uid=0,
        n_gid=0,
        n_muid=0,
    )


class _Node:
    """What all have in common: `README` and `..` are everywhere, nothing is made, and only a truncation is no change."""

    name = ""
    mode = 0o444

    def __init__(self, files: PortFiles) -> None:
        self.files = files

    @property
    def qid(self) -> Qid:
        raise NotImplementedError

    def stat(self) -> Stat:
        return _stat(self.name, self.qid, self.mode)

    def walk(self, name: str) -> Node:
        match name:
            case "..":
                return _Root(self.files)
            case "README":
                return _Readme(self.files)
            case _:
                raise _missing()

    def entries(self) -> Sequence[Stat]:
        return ()

    def open(self, mode: int) -> Opened:
        raise NotImplementedError

    def create(self, name: str, perm: int, mode: int) -> Node:
        raise _denied()

    def wstat(self, stat: Stat) -> None:
        """A shell's `>ctl` truncates (with O_TRUNC in Topen, a Twstat of length 0, or both): there is nothing to cut."""
        if stat.name or stat.uid or stat.gid or stat.mode != _UNTOUCHED or stat.length not in (0, _NO_LENGTH):
            raise _denied()

    def remove(self) -> None:
        raise _denied()

    def _dots(self) -> list[Stat]:
        return [_stat(".", self.qid, self.mode), _stat("..", _Root(self.files).qid, _Root.mode)]


class _Root(_Node):
    mode = 0o755

    @property
    def qid(self) -> Qid:
        return Qid(QTDIR, 0, 0)

    def walk(self, name: str) -> Node:
        entry = self.files.table.entries.get(name)
        return super().walk(name) if entry is None else _Named(self.files, entry)

    def entries(self) -> Sequence[Stat]:
        named = [_Named(self.files, entry).stat() for entry in self.files.table.entries.values()]
        return [*self._dots(), _Readme(self.files).stat(), *named]

    def open(self, mode: int) -> Opened:
        return Nothing()

    def create(self, name: str, perm: int, mode: int) -> Node:
        if not perm & DMDIR:
            raise _denied()
        return _Named(self.files, self.files.table.add(name, self.files))


class _Readme(_Node):
    name = "README"

    @property
    def qid(self) -> Qid:
        return Qid(0, 0, 1)

    def open(self, mode: int) -> Opened:
        return _Text(README.encode())


class _Text(Contents):
    """Opening always succeeds (spec vpnkit 7.1); writing does not."""

    held = 0  # the README is everybody's, and a request is short

    def __init__(self, octets: bytes) -> None:
        super().__init__(octets)
        self.held = 0

    def write(self, offset: int, data: bytes) -> int:
        raise _denied()


class _OfEntry(_Node):
    """Files of an entry; with it they are gone."""

    def __init__(self, files: PortFiles, entry: _Entry) -> None:
        super().__init__(files)
        self.entry = entry

    def _here(self) -> _Entry:
        if self.entry.gone:
            raise _missing()
        return self.entry

    def stat(self) -> Stat:
        self._here()
        return super().stat()

    def walk(self, name: str) -> Node:
        if name != "ctl":
            return super().walk(name)
        return _Ctl(self.files, self._here())

    def wstat(self, stat: Stat) -> None:
        self._here()
        super().wstat(stat)

    def remove(self) -> None:
        self.files.table.end(self._here())


class _Named(_OfEntry):
    """`/NAME`: a directory, and a file once the port is published."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.entry.name

    @property
    def mode(self) -> int:  # type: ignore[override]
        return 0o444 if self.entry.active else 0o755

    @property
    def qid(self) -> Qid:
        if self.entry.active:
            return Qid(0, 0, self.entry.number << 2 | 2)
        return Qid(QTDIR, 0, self.entry.number << 2)

    def entries(self) -> Sequence[Stat]:
        return [*self._dots(), _Ctl(self.files, self._here()).stat()]

    def open(self, mode: int) -> Opened:
        entry = self._here()
        return _Text(f"{entry.request}\n".encode()) if entry.active else Nothing()


class _Ctl(_OfEntry):
    name = "ctl"
    mode = 0o644

    @property
    def qid(self) -> Qid:
        return Qid(0, 0, self.entry.number << 2 | 1)

    def open(self, mode: int) -> Opened:
        return _OpenCtl(self.files, self._here())


class _OpenCtl:
    """The port lives as long as the one of these that wrote."""

    held = 0

    def __init__(self, files: PortFiles, entry: _Entry) -> None:
        self._files = files
        self._entry = entry
        self._wrote = False

    def read(self, offset: int, count: int) -> bytes:
        if self._entry.gone:
            raise _missing()
        return self._files.table.result(self._entry).encode()[offset : offset + count]

    def write(self, offset: int, data: bytes) -> int:
        self._files.table.ask(self._entry, data, self._files)
        self._wrote = True
        return len(data)

    def close(self) -> None:
        if self._wrote:
            self._files.table.end(self._entry)


def _with_port(request: PortRequest, forward: Forward) -> PortRequest:
    """As it is published: port 0 has become a real one."""
    local = request.local
    if local.protocol == "unix":
        return request
    return PortRequest(type(local)(local.protocol, local.address, forward.spec.port), request.remote)
