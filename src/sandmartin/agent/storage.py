"""What the sandboxes of one agent share on disk: bases of RAM, sealed layers, snapshots.

Nothing here counts references. Who needs a base or a layer says so where it is kept itself, in a
journal entry or a manifest, and `sweep` removes what none of them names. What is being made is
pinned until it is named somewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from sandmartin.agent.disk import Layers, link_or_copy
from sandmartin.agent.journal import DataDir
from sandmartin.agent.memory import Base, create_empty_base
from sandmartin.agent.snapshots import Manifest, Snapshot, Snapshots
from sandmartin.errors import AlreadyExists, NotFound
from sandmartin.model import random_id

_log = logging.getLogger(__name__)


class Storage:
    """The shared parts of one data directory."""

    def __init__(self, data: DataDir, snapshots: Snapshots, layers_uid: int) -> None:
        self.data = data
        self.snapshots = snapshots
        self.layers = Layers(data.layers, layers_uid)
        self._pins: Counter[str] = Counter()
        self._empty: dict[int, Base] = {}
        self._sweeping = asyncio.Lock()

    # Bases.

    def base(self, digest: str, memory_mb: int) -> Base:
        """The base with this checksum, not verified yet. Raises NotFound."""
        path = self._base_path(digest)
        if not path.exists():
            raise NotFound(f"the RAM base {digest[:12]} is gone")
        return Base(path, memory_mb << 20, digest)

    def _base_path(self, digest: str) -> Path:
        return self.data.bases / f"{digest}.ram"

    async def empty_base(self, memory_mb: int) -> Base:
        """What a VM that boots has for RAM: nothing but zeroes."""
        if memory_mb not in self._empty:
            self._empty[memory_mb] = await self.add_base(
                lambda target: create_empty_base(target, memory_mb << 20)
            )
        return self._empty[memory_mb]

    async def add_base(self, make: Callable[[Path], Base]) -> Base:
        """A base that `make` writes to the path it is given; pin it until it is named somewhere."""
        return await asyncio.to_thread(self._add_base, make)

    def _add_base(self, make: Callable[[Path], Base]) -> Base:
        target = self._new_path()
        try:
            return self._named(make(target))
        finally:
            target.unlink(missing_ok=True)

    def _new_path(self) -> Path:
        return self.data.bases / f".new.{random_id(8)}"

    def _named(self, made: Base) -> Base:
        named = self._base_path(made.digest)
        # One with the same content may be there, and is in use under its name.
        with contextlib.suppress(FileExistsError, AlreadyExists):
            named.hardlink_to(made.path)
        return Base(named, made.size_bytes, made.digest)

    @contextlib.asynccontextmanager
    async def new_base(self, make: Callable[[Path], Awaitable[Base]]) -> AsyncIterator[Base]:
        """A base that `make` writes to the path it is given, pinned as long as the context lasts.

        `make` must have come to its end when it is cancelled.
        """
        target = self._new_path()
        try:
            made = await make(target)
            with self.pinned([made.digest]):
                yield self._named(made)
        finally:
            target.unlink(missing_ok=True)

    # From elsewhere on this machine.

    async def adopt(self, snapshot: Snapshot, base: Path) -> Snapshot:
        """Have the base and the layers of a snapshot that keeps its own, beside it."""
        manifest = snapshot.manifest
        await link_or_copy(base, self._base_path(manifest.base))
        for name in manifest.layers:
            await self.layers.adopt(snapshot.path / f"{name}.qcow2")
        return snapshot

    # What is needed.

    @contextlib.contextmanager
    def pinned(self, names: Iterable[str]) -> Iterator[None]:
        """Bases and layers that stay for as long as the context lasts."""
        kept = list(names)
        self._pins.update(kept)
        try:
            yield
        finally:
            self._pins.subtract(kept)
            self._pins += Counter()

    def names(self) -> set[str]:
        """All bases and sealed layers."""
        return self.layers.names() | {path.stem for path in self.data.bases.glob("*.ram")}

    async def sweep(self, needed: Callable[[], set[str]]) -> None:
        """Remove the bases and layers that are not pinned and not `needed`."""
        async with self._sweeping:
            # Asked after the listing: what is named meanwhile was not there to be removed.
            unneeded = self.names()
            unneeded -= needed() | set(self._pins)
            unneeded -= {base.digest for base in self._empty.values()}
            for name in unneeded:
                _log.info("removing %s: nothing needs it", name[:24])
                self.layers.remove(name)
                self._base_path(name).unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what a killed agent left half made. To be called before anything else runs."""
        data = self.data
        passing = {data.forks, data.waiting}
        for directory in (data.bases, data.layers, data.templates, data.images, *passing):
            for path in directory.iterdir():
                if path.name.startswith(".") or directory in passing:
                    remove(path)


def names_in(manifest: Manifest) -> set[str]:
    """The base and the layers that a snapshot needs."""
    return {manifest.base, *manifest.layers}


def remove(path: Path) -> None:
    """Remove a file or a whole directory. Idempotent."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def _remove_tree(path: Path) -> None:
    # Not `shutil.rmtree`, which recurses: an image may be nested as deep as a path is long.
    directories = [path]
    for directory in directories:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(Path(entry.path))
                else:
                    Path(entry.path).unlink()
    for directory in reversed(directories):
        directory.rmdir()
