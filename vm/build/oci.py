"""Images of containers as files: an OCI layout (image-layout.md, a directory) and what `docker save` writes (a tar).

Every blob is read by its digest, which is verified. Layers are laid over each other as the image specification has it (layer.md):
`.wh.NAME` takes away what lower layers have at NAME, `.wh..wh..opq` all that they have in its directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError
from vm.build.archive import Cache, members, plain, sha256, unpack, whole
from vm.build.tree import Entry, Slice, Tree

MAX_JSON: Final = 4 << 20
MAX_LAYERS: Final = 256
LABEL: Final = "org.mobyproject.config"
ARCHITECTURE: Final = "amd64"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"
_REF: Final = "org.opencontainers.image.ref.name"
Blob = Callable[[str], Slice]
"""Name -> octets; raises `ConfigError` where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What an image says of how it is run (config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = "/"
    user: str = ""
    """`user`, `uid`, with `:group` or `:gid`; empty is root."""
    labels: Mapping[str, str] = field(default_factory=dict)


def layout(directory: Path, reference: str, cache: Cache) -> tuple[Tree, Config]:
    """The image of an OCI layout that is named `reference`, or the only one if that is empty."""
    what = f"oci-layout:{directory}"

    def blob(digest: str) -> Slice:
        return whole(directory / "blobs" / "sha256" / digest.removeprefix("sha256:"))

    index = _object(_json(whole(directory / "index.json"), f"{what}: index.json"), what)
    manifest = _manifest(index, reference, blob, what)
    config = _object(_json(_verified(blob, manifest.get("config"), what), f"{what}: the image's config"), what)
    layers = [(_verified(blob, layer, what), _digest(layer, what)) for layer in _objects(manifest, "layers", what)]
    return _laid(layers, cache, what), _config(config, what)


def saved(archive: Path, reference: str, cache: Cache) -> tuple[Tree, Config]:
    """The image of a `docker save`d tar; `reference` is its `name:tag` where there are several."""
    what = f"docker-archive:{archive}"
    outer = Tree()
    unpack(plain(whole(archive), cache, what), outer, what)

    def blob(name: str) -> Slice:
        entry = outer.get(name)
        if entry is None or not isinstance(entry.content, Slice):
            raise ConfigError(f"{what}: has no {name!r}; is it from `docker save`?")
        return entry.content

    images = _json(blob("manifest.json"), f"{what}: manifest.json")
    images = [_object(image, what) for image in images] if isinstance(images, list) else []
    fitting = [image for image in images if not reference or reference in (image.get("RepoTags") or ())]
    if len(fitting) != 1:
        tags = sorted(tag for image in images for tag in image.get("RepoTags") or ())
        raise ConfigError(f"{what}: which image? It has {', '.join(map(str, tags)) or 'none with a name'}")
    config = _object(_json(blob(str(fitting[0].get("Config"))), f"{what}: the image's config"), what)
    names = fitting[0].get("Layers")
    if not isinstance(names, list) or len(names) > MAX_LAYERS:
        raise ConfigError(f"{what}: a list of at most {MAX_LAYERS} layers is wanted in its manifest.json")
    layers = [blob(str(name)) for name in names]
    return _laid([(layer, sha256(layer)) for layer in layers], cache, what), _config(config, what)


def _manifest(index: Mapping[str, Any], reference: str, blob: Blob, what: str, depth: int = 0) -> Mapping[str, Any]:
    """The manifest of the image in an index, or in an index in that."""
    found = _objects(index, "manifests", what)
    if reference:
        found = [one for one in found if _object(one.get("annotations") or {}, what).get(_REF) == reference]
    ours = {
        str(one.get("digest")): one
        for one in found
        if _object(one.get("platform") or {}, what).get("architecture", ARCHITECTURE) == ARCHITECTURE
    }
    if len(ours) != 1:
        named = [_object(one.get("annotations") or {}, what).get(_REF) for one in _objects(index, "manifests", what)]
        names = ", ".join(sorted(str(name) for name in named if name)) or f"{len(named)} without a name"
        raise ConfigError(f"{what}: {len(ours)} images fit; it has {names}: name one with {what}:NAME")
    manifest = _object(_json(_verified(blob, next(iter(ours.values())), what), f"{what}: the image's manifest"), what)
    if "manifests" in manifest and depth < 3:
        return _manifest(manifest, "", blob, what, depth + 1)
    return manifest


def _verified(blob: Blob, descriptor: object, what: str) -> Slice:
    """What a descriptor (descriptor.md) is of."""
    digest = _digest(descriptor, what)
    part = blob(digest)
    if f"sha256:{sha256(part)}" != digest:
        raise ConfigError(f"{what}: the blob {digest} has other octets than its name says; fetch the image again")
    return part


def _digest(descriptor: object, what: str) -> str:
    digest = _object(descriptor, what).get("digest")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(f"{what}: digest {digest!r}; sha256: and 64 hexadecimal digits would be accepted")
    return digest


def _laid(layers: list[tuple[Slice, str]], cache: Cache, what: str) -> Tree:
    if len(layers) > MAX_LAYERS:
        raise ConfigError(f"{what}: {len(layers)} layers; at most {MAX_LAYERS} are accepted")
    tree = Tree()
    for part, digest in layers:
        add_layer(tree, plain(part, cache, what, digest.removeprefix("sha256:")), what)
    return tree


def add_layer(tree: Tree, part: Slice, what: str) -> None:
    """Lay one over `tree`. What it takes away is of the layers below it, wherever in the archive it says so."""
    for member in members(part, what):
        parent, _, name = member.path.rstrip("/").rpartition("/")
        if name == _OPAQUE:
            tree.empty(parent)
        elif name.startswith(_WHITEOUT):
            if (gone := name.removeprefix(_WHITEOUT)) in ("", ".", ".."):
                raise ConfigError(f"{what}: {member.path!r} takes away what is no file")
            tree.remove(f"{parent}/{gone}")
    unpack(part, tree, what, layer=True, skip=lambda path: path.rstrip("/").rpartition("/")[2].startswith(_WHITEOUT))


def _config(value: Mapping[str, Any], what: str) -> Config:
    given = _object(value.get("config") or {}, what)

    def texts(key: str) -> tuple[str, ...]:
        found = given.get(key) or []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise ConfigError(f"{what}: {key} of the image's config: a list of texts is wanted")
        return tuple(found)

    labels = _object(given.get("Labels") or {}, what)
    return Config(
        entrypoint=texts("Entrypoint"),
        cmd=texts("Cmd"),
        env=texts("Env"),
        cwd=str(given.get("WorkingDir") or "/"),
        user=str(given.get("User") or ""),
        labels={key: text for key, text in labels.items() if isinstance(text, str)},
    )


def _json(part: Slice, what: str) -> Any:
    if part.size > MAX_JSON:
        raise ConfigError(f"{what}: {part.size:,} octets; at most {MAX_JSON:,} are read")
    try:
        return json.loads(b"".join(part.chunks()))
    except (ValueError, RecursionError):
        raise ConfigError(f"{what}: is not JSON") from None


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: an object is wanted in its JSON, and there is {str(value)[:40]!r}")
    return value


def _objects(value: Mapping[str, Any], key: str, what: str) -> list[Mapping[str, Any]]:
    found = value.get(key)
    if not isinstance(found, list):
        raise ConfigError(f"{what}: {key!r} in its JSON: a list is wanted")
    return [_object(one, what) for one in found]


def identity(tree: Tree, name: str, database: str) -> int:
    """The number of a user (`passwd`) or group (`group`) in an image: `name` itself where it is one."""
    if name.isdigit():
        return int(name)
    entry: Entry | None = tree.get(f"etc/{database}")
    lines = entry.read(MAX_JSON).decode(errors="replace").splitlines() if entry and entry.is_file() else []
    for fields in (line.split(":") for line in lines):
        if len(fields) > 2 and fields[0] == name and fields[2].isdigit():
            return int(fields[2])
    raise ConfigError(f"user or group {name!r} is not in the image's /etc/{database}; give a number")
