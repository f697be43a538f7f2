"""Templates: what sandboxes start from, by name. An image has a disk, a snapshot memory too."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from sandmartin.agent.disk import Image, ImageStore
from sandmartin.agent.journal import DataDir
from sandmartin.agent.snapshots import Snapshot
from sandmartin.agent.storage import Storage, names_in, remove
from sandmartin.errors import AlreadyExists, Conflict, Denied, NotFound
from sandmartin.model import check_name

_log = logging.getLogger(__name__)
_NAMED = 5


class Dependent(Protocol):
    """What may depend on a template."""

    @property
    def sandbox_id(self) -> str: ...

    @property
    def image(self) -> Path | None: ...

    def needed(self) -> set[str]: ...


class Templates:
    """The templates of one agent."""

    def __init__(self, data: DataDir, images: ImageStore, storage: Storage) -> None:
        self._data = data
        self._images = images
        self._storage = storage

    def snapshots(self) -> list[Snapshot]:
        """All snapshots that are templates."""
        return self._storage.snapshots.list(self._data.templates)

    def all(self) -> list[Image | Snapshot]:
        """Images and snapshots, by name."""
        images = [self._images.get(name) for name in self._images.names()]
        return [*images, *self.snapshots()]

    def needed(self) -> set[str]:
        """Bases and layers that templates need."""
        return {name for each in self.snapshots() for name in names_in(each.manifest)}

    def find(self, name: str) -> Image | Snapshot:
        """The template `name`, which has passed `check_name`. Raises NotFound, Invalid."""
        with contextlib.suppress(NotFound):
            return self._storage.snapshots.read(self._data.templates / name)
        try:
            return self._images.get(name)
        except NotFound as error:
            names = sorted(
                {each.path.name for each in self.snapshots()} | set(self._images.names())
            )
            hint = "the templates here are: " + (", ".join(names) or "none")
            raise NotFound(error.message, hint=hint) from None

    def new(self, name: str) -> Path:
        """Where a snapshot of a new name goes. Raises Invalid, AlreadyExists."""
        check_name(name, "template name")
        if name in self._images.names() or (self._data.templates / name).exists():
            raise AlreadyExists(
                f"template {name!r} exists already", hint="choose another name, or delete it first"
            )
        return self._data.templates / name

    def new_image(self, name: str) -> Path:
        """Where an image of a new name goes. Raises Invalid, AlreadyExists."""
        self.new(name)
        directory = self._data.images / name
        try:
            directory.mkdir(mode=0o711)
        except FileExistsError as error:
            raise AlreadyExists(f"template {name!r} is being made just now") from error
        return directory / "rootfs.ext4"

    def forget_failed(self, target: Path) -> None:
        """Remove what was prepared for an image that did not come to be."""
        if not target.exists():
            shutil.rmtree(target.parent, ignore_errors=True)

    def remove(self, name: str, dependents: Iterable[Dependent]) -> None:
        """Remove a template. Raises NotFound; Conflict, naming what depends on it."""
        check_name(name, "template name")
        found = self.find(name)
        if isinstance(found, Image):
            if found.path.parent.parent != self._data.images:
                raise Denied(f"template {name!r} comes with Sandmartin and cannot be deleted")
            image, own = found.path, set[str]()
        else:
            # What lies below its topmost layer is shared with all that come from the same image.
            image, own = found.own_image, set(found.manifest.layers[-1:])
        users = [
            each.sandbox_id for each in dependents if each.image == image or own & each.needed()
        ]
        users += [
            each.path.name
            for each in self.snapshots()
            if each.manifest.image == image and each.path.name != name
        ]
        if users:
            more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
            raise Conflict(
                f"template {name!r} is needed by {', '.join(users[:_NAMED])}{more}",
                hint="destroy them first",
            )
        if isinstance(found, Image):
            shutil.rmtree(found.path.parent)
        else:
            found.remove()

    def clean(self) -> None:
        """Remove templates that a killed agent left without all they need."""
        there = self._storage.names()
        for snapshot in self.snapshots():
            if missing := names_in(snapshot.manifest) - there:
                _log.warning("template %s is removed: %s is gone", snapshot.path.name, missing)
                snapshot.remove()
        for directory in self._data.images.iterdir():
            for draft in directory.glob(".*"):
                remove(draft)
            self.forget_failed(directory / "rootfs.ext4")
