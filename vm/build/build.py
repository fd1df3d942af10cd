"""From LinuxKit's YAML to what a hypervisor boots. The same YAML and sources give the same octets, wherever it is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError, HostError
from vm.build import cpio, init, kernel, vmlinux
from vm.build.archive import Cache
from vm.build.container import Warning
from vm.build.sources import Sources
from vm.linuxkit.schema import LinuxKit

CMDLINE: Final = "console=ttyS0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What there is now. `release` is of the kernel's modules, empty where it came without any."""

    kernel: Path
    vmlinux: Path
    """The kernel without its compression, which some hypervisors want and none has to decompress; where it is compressed in a way
    not known here, `kernel` again."""
    initrd: Path
    cmdline: str
    release: str
    initrd_octets: int
    files: int
    warnings: tuple[Warning, ...]


def default_cache() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/pyvpnkit/build`, or `~/.cache/pyvpnkit/build`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvpnkit" / "build"


def build(
    machine: LinuxKit,
    out_dir: Path,
    *,
    cache: Path | None = None,
    base_directory: Path = Path(),
    compression: cpio.Compression = "none",
    refresh: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Built:
    """Make `kernel`, `vmlinux`, `initrd.img` and `cmdline` in `out_dir`, which is made if it is not there.

    Relative paths of the YAML start at `base_directory`. Packages are those of the first time, unless `refresh`. `progress` is
    told each image, and what comes after them. Nothing needs root. Raises `ConfigError` for what is wrong in the YAML or behind
    it, `HostError` for what cannot be had or written.
    """
    if machine.kernel is None:
        raise ConfigError("kernel is missing: `kernel: {image: deb:linux-image-amd64}` would do")
    warnings: list[Warning] = []
    if machine.trust is not None:
        text = "nothing is verified by it; packages are by apt, OCI images by their digests"
        warnings.append(Warning("trust", "image", text))
    sources = Sources(Cache(cache or default_cache(), refresh=refresh), base_directory.resolve(), progress)
    cmdline = machine.kernel.cmdline or CMDLINE
    try:
        picked = kernel.pick(machine.kernel, sources)
        tree = init.root(machine, sources, warnings)
        tree.merge(picked.modules)
        progress("initramfs")
        out_dir.mkdir(parents=True, exist_ok=True)
        octets = cpio.write(tree, out_dir / "initrd.img", compression=compression, before=picked.microcode)
        cpio.replaced(out_dir / "kernel", picked.binary.chunks())
        bare = vmlinux.uncompressed(picked.binary, sources.cache, str(machine.kernel.image))
        cpio.replaced(out_dir / "vmlinux", (bare or picked.binary).chunks())
        cpio.replaced(out_dir / "cmdline", [cmdline.encode() + b"\n"])
    except UnicodeEncodeError as error:
        raise ConfigError(f"{error.object!r}: has a character that no file can have") from None
    except RecursionError:
        raise ConfigError("an image has directories, or modules that depend on modules, too deep to follow") from None
    except OSError as error:
        raise HostError(f"{error.filename or out_dir}: {error.strerror}") from None
    return Built(
        kernel=out_dir / "kernel",
        vmlinux=out_dir / "vmlinux",
        initrd=out_dir / "initrd.img",
        cmdline=cmdline,
        release=picked.release,
        initrd_octets=octets,
        files=len(tree),
        warnings=tuple(warnings),
    )
