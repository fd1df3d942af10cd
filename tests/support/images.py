"""Tars, OCI layouts and Debian packages made on the spot, whole and hostile."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vm.build.archive import Cache, whole
from vm.build.tree import Tree


def member(
    name: str, kind: bytes = tarfile.REGTYPE, *, mode: int = 0o644, link: str = "", size: int = 0
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, link, size
    return info


def tar(files: Mapping[str, bytes | str | tarfile.TarInfo]) -> bytes:
    """A tar: octets are a file's, a text is a link's target, a name with `/` at its end is a directory."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            elif isinstance(content, str):
                archive.addfile(member(name, tarfile.SYMTYPE, link=content))
            elif name.endswith("/"):
                archive.addfile(member(name, tarfile.DIRTYPE, mode=0o755))
            else:
                archive.addfile(member(name, size=len(content)), io.BytesIO(content))
    return made.getvalue()


def layout(directory: Path, layers: Sequence[bytes], config: Mapping[str, Any] | None = None, name: str = "it") -> Path:
    """An OCI layout with one image, or with one more."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(octets: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(octets).hexdigest()
        (blobs / digest).write_bytes(octets)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(octets)}

    manifest = {
        "config": blob(json.dumps({"config": config or {}}).encode(), "config.v1+json"),
        "layers": [blob(layer, "layer.v1.tar") for layer in layers],
    }
    described = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    described["annotations"] = {"org.opencontainers.image.ref.name": name}
    index = directory / "index.json"
    before = json.loads(index.read_text())["manifests"] if index.exists() else []
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*before, described]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return directory


def deb(path: Path, files: Mapping[str, bytes | str | tarfile.TarInfo], *, compress: str = "xz") -> str:
    """A package (deb(5)); its digest."""
    data = {"xz": lzma.compress, "gz": gzip.compress, "": bytes}[compress](tar(files))
    name = f"data.tar.{compress}".rstrip(".")
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", lzma.compress(tar({}))), (name, data)]
    octets = b"!<arch>\n"
    for part, content in parts:
        octets += (
            f"{part:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    path.write_bytes(octets)
    return hashlib.sha256(octets).hexdigest()


def contents(tree: Tree) -> dict[str, bytes | str]:
    """Files by their octets, links by their targets, directories left out."""
    found: dict[str, bytes | str] = {}
    for path, entry in tree.walk():
        if entry.is_link():
            found[path] = entry.read().decode()
        elif not entry.is_dir():
            found[path] = entry.read()
    return found


def stored(directory: Path, octets: bytes) -> tuple[Any, Cache]:
    """The octets as a slice of a file, and a cache."""
    (directory / "archive").write_bytes(octets)
    return whole(directory / "archive"), Cache(directory / "cache")
