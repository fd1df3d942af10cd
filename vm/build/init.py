"""The machine's root: what `init`, containers, volumes and `files` of the YAML bring, and our own first process (init.sh).

/init, /usr/lib/vm/container.sh      ours, for busybox, which an `init` image has to bring
/containers/onboot/NNN-NAME/         rootfs, run, inside (`vm.build.container`); likewise onshutdown/NNN-NAME and services/NAME
/containers/images/N/                an image that several containers have; their rootfs is laid over it
/containers/volumes/NAME/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from vm.build.archive import whole
from vm.build.container import SETPRIV, Container, Warning
from vm.build.sources import Sources
from vm.build.tree import Entry, Tree
from vm.linuxkit import merge
from vm.linuxkit.load import render
from vm.linuxkit.schema import File, Image, ImageConfig, LinuxKit

HERE: Final = Path(__file__).parent
POWER_BUTTON: Final = "etc/acpi/PWRF/00000080"
"""What busybox's acpid runs when it is pressed."""
_PLACES: Final = "bin dev etc lib mnt proc root run sbin sys tmp usr/bin usr/lib usr/sbin var/log".split()
_HIDDEN: Final = ("dev", "proc", "run", "sys", "tmp")
_FILES: Final = {
    "etc/hostname": "linuxkit\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/resolv.conf": "",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
}
"""What is there unless an image or `files` brings its own."""


def root(machine: LinuxKit, sources: Sources, warnings: list[Warning]) -> Tree:
    """Everything but the kernel's modules. Raises `ConfigError` and `HostError`; what cannot be done is added to `warnings`."""
    tree = Tree()
    for reference in machine.init:
        tree.merge(sources.image(reference).tree)
    busybox = tree.get("bin/busybox")
    if busybox is None or not busybox.is_file():
        raise ConfigError(
            "init: none of its images has a /bin/busybox, which our init is run by: add deb:busybox-static"
        )
    if tree.get("init", follow=False) is not None:
        warnings.append(Warning("init", "/init", "that of the image is not used; the machine's first process is ours"))
        tree.remove("init")
    for path in _PLACES:
        if tree.get(path) is None:
            tree.directory(path)
    for path, text in _FILES.items():
        if tree.get(path) is None:
            tree.file(path, text)
    tree.add("init", Entry(mode=0o100755, content=(HERE / "init.sh").read_bytes()))
    tree.file("usr/lib/vm/container.sh", (HERE / "container.sh").read_bytes())
    if tree.get(POWER_BUTTON) is None:
        tree.file(POWER_BUTTON, "#!/bin/sh\nexec poweroff\n", 0o755)
    for volume in machine.volumes:
        at = f"containers/volumes/{volume.name}"
        if volume.format == "oci":
            raise ConfigError(f"volumes: {volume.name}: format oci is not made here; filesystem would be accepted")
        tree.directory(at)
        if volume.image:
            tree.merge(sources.image(volume.image).tree, at)
    _containers(machine, sources, tree, warnings)
    for file in machine.files:
        add_file(tree, file, machine, sources.base, warnings)
    return tree


def _containers(machine: LinuxKit, sources: Sources, tree: Tree, warnings: list[Warning]) -> None:
    ids = merge.ids(machine)
    volumes = {volume.name: bool(volume.readonly) for volume in machine.volumes}
    setpriv = tree.get(SETPRIV)
    able = setpriv is not None and setpriv.is_file()
    often = Counter(entry.image for _, entry in _places(machine))
    shared: dict[str, str] = {}
    trusting: list[str] = []
    for here, entry in _places(machine):
        found = sources.image(entry.image)
        label = found.config.labels.get(merge.LABEL)
        image = merge.merged(entry, merge.label(label, entry.image) if label else ImageConfig())
        container = Container(
            image=image, config=found.config, tree=found.tree, here=here, ids=ids, volumes=volumes, setpriv=able
        )
        if often[entry.image] > 1:
            if entry.image not in shared:
                shared[entry.image] = f"/containers/images/{len(shared)}"
                tree.merge(found.tree, shared[entry.image])
            container.shared = shared[entry.image]
            tree.directory(f"{here}/rootfs")
        else:
            tree.merge(found.tree, f"{here}/rootfs")
        run, inside = container.scripts()
        tree.file(f"{here}/run", run, 0o755)
        tree.file(f"{here}/inside", inside, 0o755)
        warnings += container.warnings
        if not able and "all" not in (image.capabilities or ()) and not image.uid:
            trusting.append(image.name)
    if trusting:
        text = "all are had: busybox cannot take any away, util-linux's setpriv can: put deb:util-linux in init"
        warnings.append(Warning(", ".join(trusting), "capabilities", text))


def _places(machine: LinuxKit) -> Iterator[tuple[str, Image]]:
    """Each container with its directory, in order."""
    for kind, entries in (("onboot", machine.onboot), ("onshutdown", machine.onshutdown)):
        yield from ((f"/containers/{kind}/{number:03}-{entry.name}", entry) for number, entry in enumerate(entries))
    yield from ((f"/containers/services/{entry.name}", entry) for entry in machine.services)


def add_file(tree: Tree, file: File, machine: LinuxKit, base: Path, warnings: list[Warning]) -> None:
    """One of `files`. Raises `ConfigError`."""
    ids = merge.ids(machine)
    uid, gid = merge.number(file.uid, ids), merge.number(file.gid, ids)
    path = file.path.strip("/")
    if path.split("/")[0] in _HIDDEN:
        warnings.append(Warning("files", file.path, f"cannot be seen: something is mounted on /{path.split('/')[0]}"))
    if file.directory:
        tree.directory(path, file.bits, uid, gid)
    elif file.symlink is not None:
        tree.symlink(path, file.symlink, uid, gid)
    elif file.source is not None:
        source = base / Path(file.source).expanduser()
        if file.optional and not source.exists():
            return
        tree.add(path, Entry(mode=0o100000 | file.bits, uid=uid, gid=gid, content=whole(source)))
    else:
        text = render(machine) if file.metadata is not None else file.contents or ""
        tree.file(path, text, file.bits, uid, gid)
