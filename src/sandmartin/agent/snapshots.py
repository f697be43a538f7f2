"""Snapshots: what a VM was at one moment, in a directory of its own.

A snapshot is a manifest, a device state, and, unless its RAM is just that of a base, a diff. It
names the base of its RAM, the image of its disk and the sealed layers over it, which are kept
elsewhere and shared. It appears whole: written beside, synced, renamed. The manifest is signed
with a key of this machine and carries the checksums of the rest: no device state is ever given to
a VMM that was not saved by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandmartin.agent import files
from sandmartin.agent.journal import write_whole
from sandmartin.agent.memory import Written
from sandmartin.errors import Conflict, Invalid, NotFound
from sandmartin.model import INTERNET, Accel, NetworkPolicy, random_id

_FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state"
_DIFF = "ram.diff"
IMAGE = "rootfs.ext4"
#: The guest's clock has the host's rate frozen in; a host that differs by more is another host.
_TSC_TOLERANCE = 0.0005


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What a device state was made on, and so what it can be loaded on."""

    vmm_version: str
    machine: str
    accel: Accel
    #: Rate of the time stamp counter; 0 where the guest does not depend on it.
    tsc_khz: int

    def check(self, other: Platform, what: str) -> None:
        """Raises Conflict when what was made on this platform does not run on `other`."""
        for name in ("accel", "vmm_version", "machine"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise Conflict(
                    f"{what} was saved on {name} {ours}, and this host has {theirs}",
                    hint="its files are kept: it can be started from its disk alone",
                )
        if abs(self.tsc_khz - other.tsc_khz) > self.tsc_khz * _TSC_TOLERANCE:
            raise Conflict(
                f"{what} was saved on a host whose clock runs at {self.tsc_khz} kHz, and this one's"
                f" runs at {other.tsc_khz}",
                hint="its files are kept: it can be started from its disk alone",
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a snapshot."""

    platform: Platform
    template: str
    vcpus: int
    memory_mb: int
    disk_size_mb: int
    #: The raw image below all layers.
    image: Path
    #: Sealed layers over it, the lowest first.
    layers: tuple[str, ...]
    #: Checksum of the RAM's base.
    base: str
    #: Pages that differ from it; None when none do.
    diff: Written | None
    #: SHA-256 of the device state.
    state: str
    created_at: float
    #: Access token in force in the guest; empty before its first introduction.
    token: str = field(default="", repr=False)
    #: Environment of every command.
    envs: dict[str, str] = field(default_factory=dict, repr=False)
    comment: str = ""
    #: What its source might reach.
    network: NetworkPolicy = INTERNET
    #: Size of the diff that was folded into the base.
    folded_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Size of what is this snapshot's alone."""
        return self.diff.size_bytes if self.diff else self.folded_bytes

    def to_json(self) -> bytes:
        content = asdict(self) | {"format": _FORMAT, "image": os.fspath(self.image)}
        return json.dumps(content, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Parse what was verified. Raises Invalid when it is of another format."""
        raw: dict[str, Any] = json.loads(content)
        if (found := raw.pop("format")) != _FORMAT:
            raise Invalid(f"snapshot format {found} is not {_FORMAT}")
        platform = raw["platform"] | {"accel": Accel(raw["platform"]["accel"])}
        return cls(
            **raw
            | {
                "platform": Platform(**platform),
                "image": Path(raw["image"]),
                "layers": tuple(raw["layers"]),
                "diff": Written(**raw["diff"]) if raw["diff"] else None,
                # Manifests of the first release have none.
                "network": NetworkPolicy.from_dict(raw.get("network")),
            }
        )


class Signer:
    """The key with which this machine signs what it will load again."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, file: Path) -> Signer:
        """The key in `file`, which is made if it is not there. Raises Invalid."""
        with contextlib.suppress(FileExistsError):
            made = file.with_name(f".{file.name}.{random_id(6)}")
            write_whole(made, secrets.token_bytes(32), mode=0o600, sync=True)
            try:
                # Agents share the key: whoever links first has made it.
                file.hardlink_to(made)
            finally:
                made.unlink()
        key = file.read_bytes()
        if len(key) != 32 or file.stat().st_mode & 0o077:
            raise Invalid(f"{file} is no key of ours", hint="remove it; snapshots are then lost")
        return cls(key)

    def sign(self, content: bytes) -> str:
        return hmac.new(self._key, content, hashlib.sha256).hexdigest()

    def check(self, content: bytes, signature: str, what: Path) -> None:
        """Raises Invalid when `content` was not signed by us."""
        if not hmac.compare_digest(self.sign(content), signature):
            raise Invalid(f"{what} was not made by this machine, or was changed since")


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot on disk, its manifest verified."""

    path: Path
    manifest: Manifest

    @property
    def diff(self) -> Path:
        return self.path / _DIFF

    @property
    def own_image(self) -> Path:
        """Where the image below its disk is, if it brought that along."""
        return self.path / IMAGE

    def read_state(self) -> bytes:
        """The device state. Raises Invalid when it is not what was saved."""
        state = (self.path / _STATE).read_bytes()
        if hashlib.sha256(state).hexdigest() != self.manifest.state:
            raise Invalid(f"the device state in {self.path} is damaged")
        return state

    def remove(self) -> None:
        remove_snapshot(self.path)


class Draft:
    """A snapshot that is being written, beside its place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def diff(self) -> Path:
        """Where its diff goes, if it has one."""
        return self.path / _DIFF


class Snapshots:
    """Writes and reads snapshots."""

    def __init__(self, signer: Signer) -> None:
        self.signer = signer

    @contextlib.asynccontextmanager
    async def draft(self, path: Path) -> AsyncIterator[Draft]:
        """A place to write a snapshot in; what was not put in its place by `finish` is removed."""
        beside = path.with_name(f".{path.name}.{random_id(6)}")
        beside.mkdir(mode=0o700, parents=True)
        try:
            yield Draft(beside)
        finally:
            await asyncio.to_thread(shutil.rmtree, beside, True)

    async def finish(self, draft: Draft, path: Path, manifest: Manifest, state: bytes) -> Snapshot:
        """Put a snapshot in its place, whole; it then survives a power cut.

        Raises Conflict when another stands there.
        """
        await asyncio.to_thread(self._finish, draft, path, manifest, state)
        return Snapshot(path, manifest)

    def _finish(self, draft: Draft, path: Path, manifest: Manifest, state: bytes) -> None:
        write_whole(draft.path / _STATE, state, sync=True)
        self._write_manifest(draft.path, manifest)
        try:
            draft.path.rename(path)
        except OSError as error:
            raise Conflict(f"{path.name} exists already") from error
        files.sync(path.parent)

    def _write_manifest(self, directory: Path, manifest: Manifest) -> None:
        content = manifest.to_json()
        signed = {"manifest": content.decode(), "signature": self.signer.sign(content)}
        write_whole(directory / _MANIFEST, json.dumps(signed).encode(), sync=True)

    def replace(self, old: Snapshot, manifest: Manifest) -> bool:
        """Have another manifest for the same content; False when `old` does not stand there now.

        Whoever may remove or replace the snapshot must be kept out meanwhile. Raises DiskFull.
        """
        try:
            if self.read(old.path).manifest != old.manifest:
                return False
        except NotFound:
            return False
        with files.space_errors(old.path):
            self._write_manifest(old.path, manifest)
        return True

    def drop_folded(self, path: Path) -> None:
        """Remove the diff of a snapshot whose manifest names none. Idempotent."""
        with contextlib.suppress(NotFound, Invalid):
            snapshot = self.read(path)
            if snapshot.manifest.diff is None:
                snapshot.diff.unlink(missing_ok=True)

    def read(self, path: Path) -> Snapshot:
        """The snapshot at `path`. Raises NotFound, Invalid."""
        try:
            signed = json.loads((path / _MANIFEST).read_bytes())
            content = signed["manifest"].encode()
            self.signer.check(content, signed["signature"], path)
            return Snapshot(path, Manifest.from_json(content))
        except FileNotFoundError as error:
            raise NotFound(f"there is no snapshot at {path}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Invalid(f"the snapshot at {path} cannot be read: {error!r}") from error

    def list(self, directory: Path) -> list[Snapshot]:
        """All whole and readable snapshots in a directory."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(directory.iterdir()):
                if not path.name.startswith(".") and path.is_dir():
                    with contextlib.suppress(NotFound, Invalid):
                        found.append(self.read(path))
        return found


def remove_snapshot(path: Path) -> None:
    """Remove a snapshot, at once for whoever looks for it. Idempotent."""
    with contextlib.suppress(FileNotFoundError):
        doomed = path.with_name(f".{path.name}.{random_id(6)}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def state_digest(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()
