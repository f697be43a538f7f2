"""Contents: a template as one archive, to be taken away, kept, and brought back.

The archive begins with a manifest and ends with a seal: the digest of every other member, signed.
An image is only a disk, and is taken from wherever it comes, also as an archive of a bare
`rootfs.ext4` that any tar makes. A snapshot has a device state in it and is taken only if this
machine's key signed all of it. What comes in is written to a draft beside its place, looked at
once it is whole and its seal is good, and appears whole or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandmartin.agent import archive, disk, files
from sandmartin.agent.archive import Member
from sandmartin.agent.disk import Image
from sandmartin.agent.images import ext4_bytes
from sandmartin.agent.machine import Machine
from sandmartin.agent.memory import Base, get_base, open_diff
from sandmartin.agent.memory.whole import opened as opened_file
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import IMAGE, Draft, Manifest, Snapshot, state_digest
from sandmartin.agent.tasks import to_its_end
from sandmartin.agent.templates import Templates
from sandmartin.agent.traits import Traits
from sandmartin.errors import Invalid
from sandmartin.model import random_id

_FORMAT = 1
#: Before what is signed, so that no signature of a snapshot's manifest is one of an archive.
_SIGNED = b"sandmartin content 1\n"
_SIGNED_MANIFEST = b"sandmartin content manifest 1\n"
MANIFEST, _SEAL, _TRAITS = "manifest.json", "seal.json", "template.json"
_STATE, _DIFF, _BASE = "state", "ram.diff", "ram.base"
_LAYER = re.compile(r"layers/[0-9]{2}\.qcow2")
_MAX_TEXT_BYTES = 1 << 20
_MAX_STATE_BYTES = 64 << 20
_CHECK_BYTES = 64 << 20
_PAGE = 4096
_HINT = "flatten the sandbox where it is, and bring its image"


@dataclass
class Received:
    """What came, in a draft."""

    texts: dict[str, bytes] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    sealed: bool = False

    def take(self, name: str, content: bytes) -> None:
        """A part that is read whole. Raises Invalid."""
        if name == MANIFEST:
            self.manifest = _read_manifest(content)
        else:
            self.texts[name] = content


class Contents:
    """The way out and in of one agent's templates."""

    def __init__(self, machine: Machine, templates: Templates, replacing: asyncio.Lock) -> None:
        self._machine = machine
        self._templates = templates
        #: Held by whoever replaces or removes a template's files.
        self._replacing = replacing

    # Out.

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """A template in pieces, as it is now whatever becomes of it. Raises NotFound, Invalid."""
        with contextlib.ExitStack() as stack:
            contents, opened = await self.open(name, stack)
            pieces = archive.pack(contents, opened, (_SEAL, self._seal))
            async with contextlib.aclosing(archive.in_thread(pieces)) as passing:
                async for piece in passing:
                    yield piece

    async def open(
        self, name: str, stack: contextlib.ExitStack
    ) -> tuple[dict[str, bytes], dict[str, int]]:
        """All of a template by parts: small contents, and files that `stack` closes.

        It stays as it is now whatever becomes of the template. Raises NotFound, Invalid.
        """
        async with self._replacing:
            return await asyncio.to_thread(self._open, self._templates.find(name), None, stack)

    async def open_asleep(
        self, sandbox: Sandbox, stack: contextlib.ExitStack
    ) -> tuple[dict[str, bytes], dict[str, int]]:
        """All that a paused sandbox sleeps in, as a template would have it. Raises Conflict."""
        async with self._replacing:
            return await asyncio.to_thread(self._open, *sandbox.asleep(), stack)

    def _open(
        self, found: Image | Snapshot, top: Path | None, stack: contextlib.ExitStack
    ) -> tuple[dict[str, bytes], dict[str, int]]:
        """Small contents and open files; `top` is a layer over those that a snapshot names."""
        if isinstance(found, Image):
            contents, paths = _parts(found)
        else:
            contents, paths = self._all_parts(found, top)
        opened: dict[str, int] = {}
        for part, path in paths.items():
            opened[part] = stack.enter_context(opened_file(path))
        return contents, opened

    def _all_parts(
        self, snapshot: Snapshot, top: Path | None
    ) -> tuple[dict[str, bytes], dict[str, Path]]:
        manifest, storage = snapshot.manifest, self._machine.storage
        below = [storage.layers.path(layer) for layer in manifest.layers]
        if top is not None:
            manifest = replace(manifest, layers=(*manifest.layers, top.stem))
        text = manifest.to_json()
        signature = storage.snapshots.signer.sign(_SIGNED_MANIFEST + text)
        told = {"kind": "snapshot", "snapshot": text.decode(), "signature": signature}
        contents, paths = _image_parts(manifest.image, told)
        contents[_STATE] = snapshot.read_state()
        memory = {_DIFF: snapshot.diff} if manifest.diff else {}
        memory[_BASE] = storage.base(manifest.base, manifest.memory_mb).path
        layers = {
            f"layers/{number:02}.qcow2": layer
            for number, layer in enumerate(below if top is None else [*below, top])
        }
        return contents, {**memory, **layers, **paths}

    def _seal(self, digests: Mapping[str, str]) -> bytes:
        signature = self._machine.storage.snapshots.signer.sign(_signed(digests))
        return json.dumps({"sha256": digests, "signature": signature}, indent=1).encode()

    # In.

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Make a template of an archive.

        Raises Invalid, AlreadyExists, Exhausted, DiskFull; Conflict when it does not run here.
        """
        path = self._templates.new(name)
        async with self._machine.storage.snapshots.draft(path) as draft:
            with files.space_errors(path):
                received = await self._receive(draft, chunks)
                self._machine.step("content:received")
                # What has come this far is put in its place, or taken back, whoever waits.
                await to_its_end(self.place(name, path, draft, received))

    async def _receive(self, draft: Draft, chunks: AsyncIterator[bytes]) -> Received:
        received = Received()
        (draft.path / "layers").mkdir(mode=0o700)
        async with contextlib.aclosing(archive.members(chunks)) as members:
            async for member in members:
                if received.sealed:
                    raise Invalid(f"{member.name!r} comes after the seal of the archive")
                if member.name in received.digests:
                    raise Invalid(f"{member.name!r} is in the archive twice")
                if member.name == _SEAL:
                    self._check_seal(await member.read(_MAX_TEXT_BYTES), received)
                else:
                    await self._take(member, draft, received)
                    received.digests[member.name] = member.digest
        if received.manifest is not None and not received.sealed:
            raise Invalid("the archive has no seal", hint="it may be cut off: send it again")
        return received

    async def _take(self, member: Member, draft: Draft, received: Received) -> None:
        if (limit := limit_of(member.name)) is None:
            with new_file(draft, member.name) as file:
                await member.save(file, self._room_check(draft.path))
            return
        content = await member.read(limit)
        if member.name == MANIFEST and received.digests:
            raise Invalid("the manifest is not the first in the archive")
        received.take(member.name, content)
        if member.name == MANIFEST:
            self._check_manifest(received)

    def _room_check(self, path: Path) -> Callable[[], None]:
        """Raises Exhausted, every now and then, when the host's disk gets too full."""
        left = 0

        def check() -> None:
            nonlocal left
            left -= archive.PIECE_BYTES
            if left < 0:
                disk.check_free(path, self._machine.settings.disk_floor_mb)
                left = _CHECK_BYTES

        return check

    def _check_manifest(self, received: Received) -> None:
        """Raises Invalid for a snapshot that is not ours, Conflict for one that cannot run here."""
        manifest = received.manifest
        if manifest is not None and manifest["kind"] == "snapshot":
            text = manifest["snapshot"].encode()
            self._check_signature(_SIGNED_MANIFEST + text, manifest["signature"])
            self.check_runs_here(received)

    def _check_signature(self, content: bytes, signature: str) -> None:
        try:
            signer = self._machine.storage.snapshots.signer
            signer.check(content, signature, Path("this snapshot"))
        except Invalid as error:
            raise Invalid(error.message, hint=_HINT) from error

    def _check_seal(self, content: bytes, received: Received) -> None:
        """Raises Invalid when it is not of what came, or of a snapshot that is not ours."""
        try:
            seal = json.loads(content)
            digests, signature = dict(seal["sha256"]), str(seal["signature"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Invalid("the seal of the archive cannot be read") from error
        if digests != received.digests:
            wrong = {*digests.items()} ^ {*received.digests.items()}
            raise Invalid(
                f"{min(name for name, _ in wrong)} in the archive is not what was sealed",
                hint="it was damaged on the way, or changed",
            )
        if received.manifest is not None and received.manifest["kind"] == "snapshot":
            self._check_signature(_signed(received.digests), signature)
        received.sealed = True

    async def place(self, name: str, path: Path, draft: Draft, received: Received) -> None:
        """Make a template of what came and is believed. To be called to its end.

        Raises Invalid, AlreadyExists; Conflict when it does not run here.
        """
        if received.manifest is None or received.manifest["kind"] == "image":
            await asyncio.to_thread(self._place_image, name, draft, received)
        else:
            await self._place_snapshot(path, draft, received)

    def _place_image(self, name: str, draft: Draft, received: Received) -> None:
        _expect(received, {IMAGE}, {MANIFEST, _TRAITS})
        image = draft.path / IMAGE
        size_bytes, own_bytes = image.stat().st_size, ext4_bytes(image)
        if own_bytes is None or own_bytes > size_bytes or size_bytes % _PAGE:
            raise Invalid("the image is no whole ext4 file system", hint="it must be raw ext4")
        traits = received.texts.get(_TRAITS)
        said = Traits.parse(traits, name) if traits is not None else None
        target = self._templates.new_image(name)
        try:
            if said is not None:
                said.write(target)
            disk.publish(image, target)
        finally:
            self._templates.forget_failed(target)

    def check_runs_here(self, received: Received) -> None:
        """Raises Conflict when what came cannot run on this machine, Invalid."""
        if received.manifest is not None and received.manifest["kind"] == "snapshot":
            manifest = Manifest.from_json(received.manifest["snapshot"].encode())
            manifest.platform.check(self._machine.platform, "this snapshot")

    async def _place_snapshot(self, path: Path, draft: Draft, received: Received) -> None:
        assert received.manifest is not None
        self.check_runs_here(received)
        manifest = Manifest.from_json(received.manifest["snapshot"].encode())
        layers = [f"layers/{number:02}.qcow2" for number in range(len(manifest.layers))]
        memory = {_STATE, _BASE, *([_DIFF] if manifest.diff else [])}
        _expect(received, {IMAGE, *memory, *layers}, {MANIFEST, _TRAITS})
        if state_digest(received.texts[_STATE]) != manifest.state:
            raise Invalid("the device state in the archive is damaged")
        storage = self._machine.storage
        names = [f"layer-{random_id(12)}" for _ in layers]

        async def make(target: Path) -> Base:
            return await asyncio.to_thread(_make_base, draft.path / _BASE, target, manifest)

        async with storage.new_base(make) as base:
            if base.digest != manifest.base:
                raise Invalid("the memory in the archive is damaged")
            await asyncio.to_thread(_settle, draft, manifest, received)
            with storage.pinned(names):
                # Their old names may be those of layers here, which others may come to share.
                for layer, new in zip(layers, names, strict=True):
                    renamed = (draft.path / layer).rename(draft.path / f"{new}.qcow2")
                    storage.layers.seal(renamed)
                await storage.layers.sync(names)
                (draft.path / "layers").rmdir()
                self._machine.step("content:sealed")
                here = replace(manifest, image=path / IMAGE, layers=tuple(names))
                await self._finish(draft, path, here, received.texts[_STATE])

    async def _finish(self, draft: Draft, path: Path, manifest: Manifest, state: bytes) -> None:
        async with self._replacing:
            # An image of that name may have come meanwhile.
            self._templates.new(path.name)
            await self._machine.storage.snapshots.finish(draft, path, manifest, state)


def limit_of(name: str) -> int | None:
    """The most bytes of a part that is read whole; None for a file. Raises Invalid for others."""
    if name in {IMAGE, _DIFF, _BASE} or _LAYER.fullmatch(name):
        return None
    if name in {MANIFEST, _TRAITS}:
        return _MAX_TEXT_BYTES
    if name == _STATE:
        return _MAX_STATE_BYTES
    raise Invalid(f"{name[:80]!r} is no part of a template")


@contextlib.contextmanager
def new_file(draft: Draft, name: str) -> Iterator[int]:
    """A part that is a file, open to be written. Raises OSError."""
    path = draft.path / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _signed(digests: Mapping[str, str]) -> bytes:
    return _SIGNED + json.dumps(digests, sort_keys=True).encode()


def _parts(image: Image) -> tuple[dict[str, bytes], dict[str, Path]]:
    return _image_parts(image.path, {"kind": "image"})


def _image_parts(
    image: Path, told: Mapping[str, object]
) -> tuple[dict[str, bytes], dict[str, Path]]:
    manifest = {"format": _FORMAT, **told, "disk_bytes": image.stat().st_size}
    contents = {MANIFEST: json.dumps(manifest, indent=1).encode()}
    with contextlib.suppress(FileNotFoundError):
        contents[_TRAITS] = image.with_name(_TRAITS).read_bytes()
    return contents, {IMAGE: image}


def _read_manifest(content: bytes) -> Mapping[str, Any]:
    try:
        manifest = json.loads(content)
        found, kind = manifest["format"], manifest["kind"]
        signed = (manifest["snapshot"], manifest["signature"]) if kind == "snapshot" else ("", "")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Invalid("the manifest of the archive cannot be read") from error
    texts = all(isinstance(each, str) for each in signed)
    if found != _FORMAT or kind not in {"image", "snapshot"} or not texts:
        raise Invalid(f"an archive of format {found!r:.20} is not {_FORMAT}")
    return {"kind": kind, "snapshot": signed[0], "signature": signed[1]}


def _expect(received: Received, needed: set[str], allowed: set[str]) -> None:
    """Raises Invalid when something lacks, or is there that does not belong there."""
    there = set(received.digests)
    if missing := needed - there:
        raise Invalid(f"the archive has no {min(missing)}")
    if more := there - needed - allowed:
        raise Invalid(f"{min(more)} does not belong into this archive")


def _make_base(source: Path, target: Path, manifest: Manifest) -> Base:
    """A base of what came, which is verified by whoever asked. Raises Invalid."""
    if source.stat().st_size != manifest.memory_mb << 20:
        raise Invalid("the memory in the archive is of another size than its VM's")
    source.chmod(0o444)
    files.sync(source)
    source.rename(target)
    return get_base(target)


def _settle(draft: Draft, manifest: Manifest, received: Received) -> None:
    """Check the rest of a snapshot, and have it as it is to stay."""
    if manifest.diff is not None:
        with open_diff(draft.diff, manifest.diff.digest) as diff:
            if diff.base_digest != manifest.base:
                raise Invalid("the changes of memory in the archive are not of this memory")
        files.sync(draft.diff)
    image = draft.path / IMAGE
    if _TRAITS in received.texts:
        Traits.parse(received.texts[_TRAITS], "in the archive").write(image)
    image.chmod(0o444)
    files.sync(image)
    # Programs that read disks run as another user, who may pass.
    draft.path.chmod(0o711)
