"""How a container is started: two scripts, written out of its entry in the YAML and its image's config (spec companions 3.1).

`run` is in the machine's own namespaces: it joins the control group, sets limits and asks for new namespaces. `inside` is in those:
it mounts what the entry says (with the functions of container.sh), and becomes the program, in its root and directory and with its
environment and user. There is no runc: what takes one is not done, and a `Warning` names the field. A container so made keeps
programs apart; what keeps the host safe from them is the machine around them all.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from netstack.errors import ConfigError
from vm.build import oci
from vm.build.tree import Tree
from vm.linuxkit import merge
from vm.linuxkit.schema import Image, Resources

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SETPRIV: Final = "usr/bin/setpriv"
"""util-linux's, in the machine's root: busybox's cannot take capabilities away."""
_SHARED: Final = ("/dev", "/run", "/sys", "/tmp", "/var")
"""What init.sh shares mounts below."""
_PROPAGATIONS: Final = frozenset("private shared slave unbindable rprivate rshared rslave runbindable".split())
_HOST: Final = ("", "host", "root")
_NEW: Final = ("new", "none")
# Field, unshare's flag and nsenter's; pid is new unless it is said to be the machine's.
_NAMESPACES: Final = (("net", "-n"), ("ipc", "-i"), ("uts", "-u"), ("pid", "-p -f"))
# What ash's ulimit calls them, and the octets of its unit.
_ULIMITS: Final = {
    "as": ("v", 1024), "core": ("c", 512), "cpu": ("t", 1), "data": ("d", 1024), "fsize": ("f", 512),
    "locks": ("x", 1), "memlock": ("l", 1024), "msgqueue": ("q", 1), "nice": ("e", 1), "nofile": ("n", 1),
    "nproc": ("u", 1), "rss": ("m", 1024), "rtprio": ("r", 1), "sigpending": ("i", 1), "stack": ("s", 1024),
}  # fmt: skip
_DEFAULTS: Final = (
    ("/proc", "place proc proc /proc nosuid,nodev,noexec"),
    ("/dev", "dev"),
    ("/dev/pts", "place devpts devpts /dev/pts nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "place tmpfs shm /dev/shm nosuid,noexec,nodev,mode=1777,size=64m"),
    ("/dev/mqueue", "place mqueue mqueue /dev/mqueue nosuid,noexec,nodev"),
    ("/sys", "place sysfs sysfs /sys nosuid,noexec,nodev,ro"),
    ("/sys/fs/cgroup", "place cgroup2 cgroup /sys/fs/cgroup nosuid,noexec,nodev,relatime,ro"),
)


@dataclass(frozen=True, slots=True)
class Warning:
    """Something that is not done as the YAML has it: the container, its field, and what is so instead."""

    container: str
    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.container}: {self.field}: {self.text}"


@dataclass(slots=True, kw_only=True)
class Container:
    """What goes into the scripts. `here` is the container's directory in the machine, `shared` its image's, if that has others."""

    image: Image
    config: oci.Config
    tree: Tree
    here: str
    ids: dict[str, int]
    volumes: dict[str, bool]
    """Name -> whether it may only be read."""
    setpriv: bool
    shared: str = ""
    warnings: list[Warning] = field(default_factory=list)

    def scripts(self) -> tuple[str, str]:
        """`run` and `inside`. What cannot be done is in `warnings` afterwards."""
        self._unsupported()
        inside = "\n".join(self._inside())
        run = "\n".join(self._run())
        return f"{self._head()}{run}\n", f"{self._head()}{inside}\n"

    def _head(self) -> str:
        return f"#!/bin/busybox sh\n# {self.image.name}, of {self.image.image}\nhere={quote(self.here)}\n"

    def warn(self, name: str, text: str) -> None:
        self.warnings.append(Warning(self.image.name, name, text))

    def _run(self) -> Iterator[str]:
        image, runtime = self.image, self.image.runtime
        group = self.here.replace("/containers", "/sys/fs/cgroup", 1)
        yield "set -e"
        yield from _limits(image.resources, group, self)
        yield f"echo $$ >{group}/cgroup.procs"
        if runtime:
            for path in runtime.mkdir or ():
                yield f"mkdir -p {quote(path)}"
            for path in runtime.cgroups or ():
                yield f"mkdir -p {quote('/sys/fs/cgroup/' + path.strip('/'))}"
            for mount in runtime.mounts or ():
                options = ",".join(mount.options or ()) or "defaults"
                yield f"mkdir -p {quote(mount.point)}"
                kind = "" if mount.type == "bind" else f"-t {quote(mount.type or 'none')} "
                yield f"mount {kind}-o {quote(options)} {quote(mount.source or mount.type or 'none')} {quote(mount.point)}"
        for limit in image.rlimits or ():
            yield from self._ulimit(limit)
        if image.oom_score_adj is not None:
            yield f"echo {image.oom_score_adj} >/proc/self/oom_score_adj"
        enter, flags = "", "-m"
        for name, flag in _NAMESPACES:
            wanted: str = getattr(image, name) or ("new" if name == "pid" else "")
            if wanted in _NEW:
                flags += f" {flag}"
            elif wanted not in _HOST:
                enter += f"{'-F ' if name != 'pid' else ''}{flag[:2]}{quote(wanted)} "
        enter = f"nsenter {enter}" if enter else ""
        yield f"exec {enter}unshare {flags} --propagation shared /bin/busybox sh $here/inside"

    def _inside(self) -> Iterator[str]:
        image = self.image
        yield ". /usr/lib/vm/container.sh"
        if self.shared and image.readonly:
            yield f"mkdir -p $root; mount -o bind {self.shared} $root"
        elif self.shared:
            yield f"overlay {self.shared}"
        else:
            yield "mount -o bind $root $root"
        if (entry := self.tree.get("bin/busybox")) is not None and entry.is_file() and not self.tree.get("bin/sh"):
            yield "applets"
        if image.rootfs_propagation:
            yield f"mount --make-{image.rootfs_propagation} $root"
        mounts = sorted(self._mounts(), key=lambda one: one[0].rstrip("/").count("/"))
        yield from (line for _, line in mounts)
        yield from self._devices()
        yield from (f"masked {quote(path)}" for path in image.masked_paths or ())
        yield from (f"unwritable {quote(path)}" for path in image.readonly_paths or ())
        for name, value in sorted((image.sysctl or {}).items()):
            yield f"echo {quote(value)} >{quote('/proc/sys/' + name.replace('.', '/'))}"
        if image.hostname and (image.uts or "") in _NEW:
            yield f"hostname {quote(image.hostname)}"
        namespaces = image.runtime.bind_ns if image.runtime else None
        for name in ("cgroup", "ipc", "net", "pid", "user", "uts"):
            if path := getattr(namespaces, name, None):
                yield f"namespace {'pid_for_children' if name == 'pid' else name} {quote(path)}"
        if image.readonly:
            yield "mount -o remount,bind,ro none $root"
        yield from self._program()

    def _mounts(self) -> Iterator[tuple[str, str]]:
        """Destination and command of everything that is mounted in the root."""
        image = self.image
        own: list[tuple[str, str]] = []
        for text in image.binds or ():
            source, destination, *rest = text.split(":")
            own.append((destination, self._bind(source, destination, rest[0].split(",") if rest else [], "binds")))
        for text in image.tmpfs or ():
            destination, _, options = text.partition(":")
            own.append((destination, f"place tmpfs tmpfs {quote(destination)} {quote(options or 'nosuid,nodev')}"))
        for mount in image.mounts or ():
            given = list(mount.options or ())
            if mount.type in (None, "bind"):
                own.append((mount.point, self._bind(mount.source or "", mount.point, given, "mounts")))
                continue
            if mount.uid_mappings or mount.gid_mappings:
                self.warn("mounts.uidmappings", "not done: users have the machine's numbers")
            kind = {"dev": "devtmpfs", "cgroup": "cgroup2"}.get(mount.type, mount.type)
            words = (kind, mount.source or kind, mount.point, ",".join(given) or "rw")
            own.append((mount.point, "place " + " ".join(quote(word) for word in words)))
        taken = [path.rstrip("/") for path, _ in own]
        for path, line in _DEFAULTS:
            over = next((one for one in taken if path == one or (path.startswith(f"{one}/") and one)), None)
            if over is None:
                yield path, line
        yield from own

    def _bind(self, source: str, destination: str, options: Sequence[str], name: str) -> str:
        readonly = "ro" in options
        if not source.startswith("/"):
            if source not in self.volumes:
                raise ConfigError(
                    f"{self.image.name}: {name}: {source!r} is no volume; a path from the root, or one of volumes"
                )
            readonly = readonly or self.volumes[source]
            source = f"/containers/volumes/{source}"
        propagation = next((one for one in options if one in _PROPAGATIONS), "rprivate")
        if "shared" in propagation and not any(f"{source}/".startswith(f"{path}/") for path in _SHARED):
            self.warn(name, f"{source}: what the container mounts there, others see only below {', '.join(_SHARED)}")
        flags = [one for one in options if one not in _PROPAGATIONS | {"bind", "rbind", "rw", "ro"}]
        flags += ["ro"] if readonly else []
        return " ".join(["bind", quote(source), quote(destination), quote(",".join(flags)), propagation])

    def _devices(self) -> Iterator[str]:
        for one in self.image.devices or ():
            kind = {"u": "c"}.get(one.type, one.type)
            if kind == "a" or (kind != "p" and (one.major is None or one.minor is None)):
                self.warn("devices", f"{one.path}: not made: type b, c or p and its numbers are wanted; or bind /dev")
                continue
            mode = one.mode if one.mode and one.mode.isdigit() else "0666"
            numbers = "'' ''" if kind == "p" else f"{one.major} {one.minor}"
            yield f"device {quote(one.path)} {kind} {numbers} {mode}"

    def _ulimit(self, text: str) -> Iterator[str]:
        kind, *limits = text.lower().replace(" ", "").removeprefix("rlimit_").split(",")
        if kind not in _ULIMITS:
            self.warn("rlimits", f"{kind}: not set: busybox cannot")
            return
        flag, unit = _ULIMITS[kind]
        soft, hard = (one if one == "unlimited" else str(int(one) // unit) for one in limits)
        yield f"ulimit -{flag} {hard}; ulimit -S -{flag} {soft}"

    def _program(self) -> Iterator[str]:
        image, config = self.image, self.config
        words = image.command if image.command is not None else (*config.entrypoint, *config.cmd)
        if not words:
            raise ConfigError(f"{image.name}: command is missing, and the image {image.image} names no program either")
        variables = list(image.env if image.env is not None else config.env)
        if not any(one.startswith("PATH=") for one in variables):
            variables.insert(0, f"PATH={PATH}")
        cwd = image.cwd or config.cwd
        if cwd != "/":
            yield f"[ -d {quote_after('$root', cwd)} ] || mkdir -p {quote_after('$root', cwd)}"
        uid, gid = self._user()
        more = [merge.number(one, self.ids) for one in image.additional_gids or ()]
        env = " ".join(quote(one) for one in variables)
        drop, enter = self._privileges(uid, gid, more)
        into = f"/bin/busybox nsenter -F -r$root -w{quote_after('$root', cwd)}{enter}"
        yield f"exec {drop}/bin/busybox env -i {env} \\\n\t{into} -- {' '.join(quote(word) for word in words)}"

    def _user(self) -> tuple[int, int]:
        image = self.image
        user, colon, group = self.config.user.partition(":")
        if image.uid is None and image.gid is None and user:
            return oci.identity(self.tree, user, "passwd"), oci.identity(
                self.tree, group, "group"
            ) if colon and group else 0
        return merge.number(image.uid, self.ids), merge.number(image.gid, self.ids)

    def _privileges(self, uid: int, gid: int, more: Sequence[int]) -> tuple[str, str]:
        """What is put before `env`, and nsenter's flags."""
        image = self.image
        given = merge.capabilities(image.capabilities)
        no_new = bool(image.no_new_privileges)
        if not self.setpriv:
            if more:
                self.warn("additionalGids", "not set without util-linux's setpriv: put deb:util-linux in init")
            if image.ambient or (uid and given):
                name = "ambient" if image.ambient else "capabilities"
                self.warn(name, f"user {uid} has none without util-linux's setpriv: put deb:util-linux in init")
            return "/bin/busybox setpriv --nnp " if no_new else "", f" -S{uid} -G{gid}" if uid or gid else ""
        kept = [one.removeprefix("CAP_").lower() for one in dict.fromkeys((*given, "CAP_SYS_CHROOT"))]
        ambient = [one.removeprefix("CAP_").lower() for one in merge.capabilities(image.ambient)]
        if uid:
            ambient = list(dict.fromkeys((*kept, *ambient)))
        bounding = ",".join(f"+{one}" for one in dict.fromkeys((*kept, *ambient)))
        raised = "".join(f",+{one}" for one in ambient)
        groups = f"--groups {','.join(map(str, more))}" if more else "--clear-groups"
        words = f"/{SETPRIV} --reuid {uid} --regid {gid} {groups} --bounding-set=-all,{bounding} "
        words += f"--inh-caps=-all{raised} --ambient-caps=-all{raised} "
        return words + ("--no-new-privs " if no_new else ""), ""

    def _unsupported(self) -> None:
        """Warn of all fields that nothing here looks at."""
        image, runtime = self.image, self.image.runtime
        if image.hostname and (image.uts or "") not in _NEW:
            self.warn("hostname", "has no effect without uts: new")
        if image.userns and image.userns not in _HOST:
            self.warn("userns", "not done: users have the machine's numbers")
        for name, value in (("uidMappings", image.uid_mappings), ("gidMappings", image.gid_mappings)):
            if value:
                self.warn(name, "not done: users have the machine's numbers")
        if image.cgroups_path:
            self.warn("cgroupsPath", f"not used: its control group is {self.here.removeprefix('/containers/')}")
        if runtime and runtime.interfaces:
            self.warn("runtime.interfaces", "not done: make them in a container before, with net: and a path")
        if runtime and runtime.namespace:
            self.warn("runtime.namespace", "not used: there is no containerd")
        if runtime and runtime.bind_ns and runtime.bind_ns.mnt:
            self.warn("runtime.bindNS.mnt", "not kept: the container's mounts end with it")


def _limits(resources: Resources | None, group: str, container: Container) -> Iterator[str]:
    """The control group's limits that version 2 has a file for."""
    if resources is None:
        return
    memory, cpu, pids = resources.memory, resources.cpu, resources.pids
    done: list[tuple[str, str]] = []
    if memory:
        done += [("memory.max", _max(memory.limit))] if memory.limit is not None else []
        done += [("memory.low", _max(memory.reservation))] if memory.reservation is not None else []
        for name in ("swap", "kernel", "kernel_tcp", "swappiness", "disable_oom_killer"):
            if getattr(memory, name) is not None:
                container.warn(f"resources.memory.{name}", "not set")
    if cpu:
        if cpu.shares is not None:  # as runc turns 2..262144 into 1..10000
            done.append(("cpu.weight", str(1 + (min(max(cpu.shares, 2), 262144) - 2) * 9999 // 262142)))
        if cpu.quota is not None or cpu.period is not None:
            done.append(("cpu.max", f"{_max(cpu.quota if cpu.quota is not None else -1)} {cpu.period or 100000}"))
        done += [(f"cpuset.{name}", value) for name in ("cpus", "mems") if (value := getattr(cpu, name))]
        for name in ("realtime_runtime", "realtime_period"):
            if getattr(cpu, name) is not None:
                container.warn(f"resources.cpu.{name}", "not set")
    if pids:
        done.append(("pids.max", _max(pids.limit)))
    for name in ("devices", "block_io", "hugepage_limits", "network"):
        if getattr(resources, name):
            container.warn(f"resources.{name}", "not set")
    yield from (f"echo {quote(value)} >{group}/{name}" for name, value in done)


def _max(limit: int | None) -> str:
    return "max" if limit is None or limit < 0 else str(limit)


def quote(text: str) -> str:
    """One word of the shell's. Raises `ConfigError` for a NUL."""
    if "\0" in text:
        raise ConfigError(f"{text!r}: no NUL can be in a command line")
    return shlex.quote(text)


def quote_after(prefix: str, path: str) -> str:
    """`prefix`, which the shell expands, and a path."""
    return f"{prefix}{quote(path)}" if path != "/" else prefix
