"""OCI images become templates: from a registry, or from an archive of OCI's or Docker's.

Three steps, each in a cell: an OCI layout of one image (`skopeo`), its layers unpacked over each
other (`umoci`), an ext4 file system of the tree (`mke2fs`). All of it is made in a draft beside
its place, and appears whole or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from sandmartin.agent import disk, files, packages
from sandmartin.agent.blobs import Blobs
from sandmartin.agent.cell import Cell
from sandmartin.agent.filesystem import make_file_system
from sandmartin.agent.journal import write_whole
from sandmartin.agent.machine import Machine
from sandmartin.agent.reference import Reference
from sandmartin.agent.registry import (
    IMAGE,
    SKOPEO,
    Registries,
    RegistryAuth,
    explain_archive,
    place_of,
)
from sandmartin.agent.storage import remove
from sandmartin.agent.tasks import to_its_end
from sandmartin.agent.templates import Templates
from sandmartin.errors import Invalid, SandmartinError, ToolFailed
from sandmartin.model import DEFAULT_DISK_SIZE_MB, random_id

_T = TypeVar("_T")
_Words = Sequence[str | os.PathLike[str]]

_MB = 2**20
_DISK_BYTES = DEFAULT_DISK_SIZE_MB * _MB
#: What is fetched or sent is compressed, and is there beside what is unpacked.
_MAX_ARCHIVE_BYTES = 2 * _DISK_BYTES
_CONVERT_S = 1800.0
_UNPACK_S = 1800.0
_LOOK_S = 0.5
_TELL_S = 2.0
#: A look that takes long is taken less often.
_LOOK_SHARE = 10
_AT_ONCE = 2
_ORIGIN = "origin.json"
_MAX_JSON_BYTES = 4 << 20
_MAX_LOG_BYTES = 1 << 20
_CHECK_BYTES = 64 << 20
#: An empty file takes something of a disk too.
_LEAST_BYTES = 4096
_SAID = 400
_NO_SPACE = os.strerror(errno.ENOSPC).lower()
#: Before what umoci says.
_MARKS = " \t\u2022\u2a2f"
_LAYOUT, _ROOT, _FILE, _ARCHIVE = "layout", "root", "disk.ext4", "archive"
#: umoci cannot make a device where it runs, and says so.
_DEVICE = re.compile(r"rootless\{(.*)\} creating empty file in place of device")


@dataclass(frozen=True)
class Progress:
    """What is being done."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An image that became a template, and what it says of itself."""

    #: Of its manifest, as its registry or its archive has it.
    digest: str
    #: Blocks that the template takes.
    size_bytes: int
    envs: Mapping[str, str] = field(repr=False)
    user: str
    workdir: str
    entrypoint: Sequence[str]
    cmd: Sequence[str]
    #: As `80/tcp`.
    ports: Sequence[str]


Report = Callable[[str], None]


class ImageImports:
    """The way in for images of one agent."""

    def __init__(self, machine: Machine, templates: Templates) -> None:
        """Raises Invalid for settings that cannot be read."""
        settings = machine.settings
        blobs = Blobs(machine.data.blobs, settings.layer_cache_mb * _MB)
        self._machine = machine
        self._templates = templates
        self._registries = Registries(settings, blobs, machine.storage.snapshots.signer)
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def from_registry(
        self, reference: str, name: str, auth: RegistryAuth | None
    ) -> AsyncGenerator[Progress | Imported, None]:
        """Make a template of an image of a registry: what is done, and at the end what came.

        Whoever stops listening ends it. Raises Invalid, AlreadyExists, Denied, NotFound,
        Unavailable, TimedOut, Exhausted, DiskFull, ToolFailed.
        """
        told: asyncio.Queue[Progress | None] = asyncio.Queue()
        parsed = Reference.parse(reference)
        work = asyncio.create_task(
            self._fetch(parsed, name, auth, lambda text: told.put_nowait(Progress(text))),
            name=f"import {name}",
        )
        work.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (progress := await told.get()) is not None:
                yield progress
            yield work.result()
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def _fetch(
        self, reference: Reference, name: str, auth: RegistryAuth | None, report: Report
    ) -> Imported:
        async with self._draft(name, report) as draft:
            async with self._registries.visit(reference, auth, draft.cell) as visit:
                report(f"asking for {reference}")
                manifest = await visit.manifest()
                if manifest.size_bytes > _MAX_ARCHIVE_BYTES:
                    raise Invalid(f"image {reference} has {manifest.size_bytes // _MB} MB to fetch")
                lent = await asyncio.to_thread(self._registries.lend, visit, manifest, draft.layout)
                new = [each for each in manifest.layers if each not in lent]
                report(f"{manifest.digest}: {len(new)} of {len(manifest.layers)} layers to fetch")
                copying = visit.copy(manifest, draft.layout)
                await draft.watched(copying, draft.layout, "fetched", _MAX_ARCHIVE_BYTES)
                await asyncio.to_thread(self._registries.keep, visit, new, _LAYOUT)
            self._machine.step("import:fetched")
            async with self._turn(report):
                return await draft.finish(manifest.digest, str(reference))

    async def from_archive(self, name: str, pieces: AsyncIterator[bytes]) -> Imported:
        """Make a template of an archive of one image, gzipped or not.

        Raises Invalid, AlreadyExists, TimedOut, Exhausted, DiskFull, ToolFailed.
        """
        async with self._draft(name, lambda _: None) as draft:
            await draft.receive(pieces)
            self._machine.step("import:received")
            async with self._turn(lambda _: None):
                await draft.convert()
                return await draft.finish("", "an archive")

    @contextlib.asynccontextmanager
    async def _turn(self, report: Report) -> AsyncIterator[None]:
        """For what takes a processor: not for what waits for others, who may be slow on purpose."""
        if self._places.locked():
            report("waiting for other images to be unpacked")
        async with self._places:
            yield

    @contextlib.asynccontextmanager
    async def _draft(self, name: str, report: Report) -> AsyncIterator[_Draft]:
        """Where an image is made; what it takes is given back, however it ends."""
        packages.require("skopeo", "umoci")
        self._templates.new(name)
        path = self._machine.data.images / f".{name}.{random_id(6)}"
        try:
            with files.space_errors(path):
                draft = _Draft(self._machine, self._templates, name, path, report)
                draft.open()
                yield draft
        finally:
            await asyncio.shield(asyncio.to_thread(remove, path))


class _Draft:
    """An image on its way to be a template."""

    def __init__(
        self, machine: Machine, templates: Templates, name: str, path: Path, report: Report
    ) -> None:
        self._machine = machine
        self._templates = templates
        self._name = name
        self._path = path
        self._report = report
        uid = machine.settings.unpack_uid_base
        self.cell = Cell(work=path / "cell", uid=uid, file_bytes=_DISK_BYTES)
        self.layout = self.cell.work / _LAYOUT

    def open(self) -> None:
        self._check_free()
        self._path.mkdir(mode=0o711)
        self.cell.open()

    def _check_free(self) -> None:
        disk.check_free(self._machine.data.path, self._machine.settings.disk_floor_mb)

    # What came.

    async def receive(self, pieces: AsyncIterator[bytes]) -> None:
        """Have an archive in the cell. Raises Invalid, Exhausted."""
        archive, left_bytes, unchecked = self.cell.work / _ARCHIVE, _MAX_ARCHIVE_BYTES, 0
        with archive.open("xb") as file:
            async for piece in pieces:
                left_bytes -= len(piece)
                unchecked += len(piece)
                if left_bytes < 0:
                    raise Invalid(f"the archive is larger than {_MAX_ARCHIVE_BYTES // _MB} MB")
                if unchecked > _CHECK_BYTES:
                    unchecked = 0
                    self._check_free()
                await asyncio.to_thread(file.write, piece)
        archive.chmod(0o444)

    async def convert(self) -> None:
        """Have the one image of the archive as a layout. Raises Invalid, DiskFull."""
        archive = self.cell.work / _ARCHIVE
        # One that says of itself that it is both is OCI's.
        for kind in ("oci-archive", "docker-archive"):
            words = [f"{kind}:{archive}", f"oci:{self.layout}:{IMAGE}"]
            command = [*SKOPEO, f"--tmpdir={self.cell.work}", "copy", *words]
            copying = self.cell.run(command, deadline_s=_CONVERT_S)
            done = await self.watched(copying, self.cell.work, "read", 3 * _MAX_ARCHIVE_BYTES)
            if done.returncode == 0:
                break
            said = self._told(done.stderr)
            if kind == "docker-archive" or "index.json: no such file" not in said:
                raise explain_archive(said)
        await asyncio.to_thread(remove, archive)

    # What becomes of it.

    async def finish(self, digest: str, source: str) -> Imported:
        """Make the template of the layout; it is there afterwards, whole."""
        found, config = self._read_layout()
        origin = _config(digest or found, config)
        await self._unpack()
        self._machine.step("import:unpacked")
        await asyncio.to_thread(remove, self.layout)
        self._report("making the file system")
        making = make_file_system(self.cell.work / _ROOT, self.cell.work / _FILE, self._in_cell)
        await self.watched(making, None, "", 0)
        self._machine.step("import:made")
        # From here on it is put in its place, or taken back, whoever waits.
        return await to_its_end(asyncio.to_thread(self._place, origin, source))

    async def _unpack(self) -> None:
        self._report("unpacking the layers")
        command = ["umoci", "raw", "unpack", "--image", f"{self.layout}:{IMAGE}"]
        with tempfile.TemporaryFile(dir=self._path) as log:
            unpacking = self.cell.run(
                [*command, self.cell.work / _ROOT], deadline_s=_UNPACK_S, log=log
            )
            done = await self.watched(unpacking, self.cell.work / _ROOT, "unpacked", _DISK_BYTES)
            said = self._told(_read_log(log))
        if done.returncode:
            raise _unpacking_failed(said, self._path)
        for device in _DEVICE.findall(said):
            # In a sandbox the kernel makes what is in /dev, over what the image has there.
            if not device.startswith("dev/"):
                raise Invalid(
                    f"the image has a device, {device[:200]!r}, which no sandbox can have",
                    hint="leave it out; those below /dev are made by the sandbox's own kernel",
                )

    async def _in_cell(self, argv: _Words, deadline_s: float) -> None:
        done = await self.cell.run(argv, deadline_s=deadline_s)
        if done.returncode:
            said = self._told(done.stdout + done.stderr)
            raise _making_failed(os.fspath(argv[0]), said, self._path)

    def _told(self, output: bytes) -> str:
        """What a program said, without our own directories."""
        return output.decode(errors="replace").replace(f"{self.cell.work}/", "")

    def _place(self, origin: Imported, source: str) -> Imported:
        target = self._templates.new_image(self._name)
        try:
            told = {"source": source, **asdict(origin)}
            del told["size_bytes"]
            content = json.dumps(told, indent=1).encode()
            write_whole(target.with_name(_ORIGIN), content, mode=0o644, sync=True)
            disk.publish(self.cell.work / _FILE, target)
        finally:
            self._templates.forget_failed(target)
        return replace(origin, size_bytes=disk.allocated_bytes(target))

    def _read_layout(self) -> tuple[str, Mapping[str, Any]]:
        """The digest of the manifest and the configuration. Raises Invalid."""
        try:
            (named,) = self._read_json("index.json")["manifests"]
            manifest = self._read_json(*place_of(named["digest"]))
            config = self._read_json(*place_of(manifest["config"]["digest"]))
            return str(named["digest"]), config
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise Invalid("what the image says of itself cannot be read") from error

    def _read_json(self, *names: str) -> Any:
        with self.cell.opened(_LAYOUT, *names) as handle:
            if handle is None or os.fstat(handle).st_size > _MAX_JSON_BYTES:
                raise ValueError("it is none")
            return json.loads(os.pread(handle, _MAX_JSON_BYTES, 0))

    # What is looked at meanwhile.

    async def watched(
        self, work: Coroutine[Any, Any, _T], where: Path | None, verb: str, limit_bytes: int
    ) -> _T:
        """The result of `work`, which is ended when what it writes gets too much.

        Raises Exhausted for the host's disk, Invalid for more than `limit_bytes`.
        """
        working = asyncio.create_task(work, name=f"import {self._name}: {verb}")
        told_mb, told_at, pause_s = 0, time.monotonic(), _LOOK_S
        try:
            while not (await asyncio.wait({working}, timeout=pause_s))[0]:
                began = time.monotonic()
                self._check_free()
                used = 0 if where is None else await asyncio.to_thread(_used, where, limit_bytes)
                if used > limit_bytes:
                    raise _too_large(verb, limit_bytes)
                if used // _MB > told_mb and began > told_at + _TELL_S:
                    told_mb, told_at = used // _MB, began
                    self._report(f"{verb} {told_mb} MB")
                pause_s = max(_LOOK_S, _LOOK_SHARE * (time.monotonic() - began))
            return working.result()
        finally:
            working.cancel()
            await asyncio.wait({working})


def _used(directory: Path, limit_bytes: int) -> int:
    """What all below a directory takes, in bytes, names too; it may change meanwhile."""
    used, directories = 0, [os.fspath(directory)]
    for each in directories:
        with contextlib.suppress(OSError), os.scandir(each) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        directories.append(entry.path)
                        used += _LEAST_BYTES
                    else:
                        used += max(_LEAST_BYTES, status.st_blocks * 512) // status.st_nlink
        if used > limit_bytes:
            break
    return used


def _too_large(verb: str, limit_bytes: int) -> Invalid:
    return Invalid(
        f"the image is larger than {limit_bytes // _MB} MB when it is {verb}",
        hint="make it smaller: leave out what its layers do not need",
    )


def _read_log(log: IO[bytes]) -> bytes:
    """The beginning of a log, and its end."""
    size = log.seek(0, os.SEEK_END)
    log.seek(0)
    text = log.read(_MAX_LOG_BYTES)
    if size > len(text):
        log.seek(max(len(text), size - _MAX_LOG_BYTES))
        text += log.read(_MAX_LOG_BYTES)
    return text


def _last_words(said: str) -> str:
    lines = [line.strip(_MARKS) for line in said.splitlines() if line.strip()]
    return (lines[-1] if lines else "without a word")[-_SAID:]


def _unpacking_failed(said: str, path: Path) -> SandmartinError:
    last = _last_words(said)
    if _NO_SPACE in last.lower():
        return files.disk_full(path)
    if "file too large" in last:
        return _too_large("unpacked", _DISK_BYTES)
    hint = "owners must be below 65536" if "chown" in last else ""
    return Invalid(f"the layers of the image cannot be unpacked: {last}", hint=hint)


def _making_failed(program: str, said: str, path: Path) -> SandmartinError:
    if "allocate inode" in said:
        return Invalid(f"the image has more files than a disk of {DEFAULT_DISK_SIZE_MB} MB holds")
    if "Could not allocate" in said or "No free space" in said:
        return _too_large("unpacked", _DISK_BYTES)
    if _NO_SPACE in said.lower():
        return files.disk_full(path)
    return ToolFailed(f"{program} failed on the image: {_last_words(said)}")


def _config(digest: str, described: Mapping[str, Any]) -> Imported:
    """What an image says of itself. Raises Invalid."""
    config = described.get("config") or {}
    try:
        pairs = [str(each).partition("=") for each in config.get("Env") or ()]
        return Imported(
            digest=digest,
            size_bytes=0,
            envs={name: value for name, _, value in pairs if name},
            user=str(config.get("User") or ""),
            workdir=str(config.get("WorkingDir") or ""),
            entrypoint=[str(each) for each in config.get("Entrypoint") or ()],
            cmd=[str(each) for each in config.get("Cmd") or ()],
            ports=sorted(map(str, config.get("ExposedPorts") or ())),
        )
    except (AttributeError, TypeError) as error:
        raise Invalid("what the image says of itself cannot be read") from error
