"""OCI images that tests make by hand: layers of tar members, a configuration, archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"


def member(
    name: str,
    content: bytes = b"",
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    **more: Any,
) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a layer; `type`, `linkname`, `devmajor` and others are those of TarInfo."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uid, info.gid = len(content), mode, uid, gid
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def directory(name: str, *, mode: int = 0o755, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, mode=mode, type=tarfile.DIRTYPE, **more)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, mode=0o777, type=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def device(name: str, major: int, minor: int) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, mode=0o666, type=tarfile.CHRTYPE, devmajor=major, devminor=minor)


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as out:
        for info, content in members:
            out.addfile(info, io.BytesIO(content))
    return made.getvalue()


@dataclass
class OciImage:
    """An image of layers, each the bytes of a tar; `packed` are the same compressed."""

    layers: list[bytes]
    config: Mapping[str, object] = field(default_factory=dict)
    packed: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.packed = self.packed or [gzip.compress(layer, mtime=0) for layer in self.layers]
        diffs = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in self.layers]
        described = {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(self.config),
            "rootfs": {"type": "layers", "diff_ids": diffs},
        }
        config = self._blob(_CONFIG, json.dumps(described).encode())
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": config,
                "layers": [self._blob(_LAYER, each) for each in self.packed],
            }
        ).encode()
        self.digest = f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"
        self._described = self._blob(_MANIFEST, self.manifest)

    def _blob(self, media_type: str, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def archive(self) -> bytes:
        """As an OCI archive."""
        index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [self._described]}
        members = [
            member("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
            member("index.json", json.dumps(index).encode()),
        ]
        members += [member(f"blobs/sha256/{name}", each) for name, each in self.blobs.items()]
        return tar(members)

    def docker_archive(self) -> bytes:
        """As `docker save` writes one."""
        config = next(each for each in self.blobs.values() if b'"architecture"' in each)
        names = [f"{number}/layer.tar" for number in range(len(self.layers))]
        listed = [{"Config": "config.json", "RepoTags": ["made:latest"], "Layers": names}]
        members = [member("manifest.json", json.dumps(listed).encode())]
        members.append(member("config.json", config))
        members += [member(name, each) for name, each in zip(names, self.layers, strict=True)]
        return tar(members)
