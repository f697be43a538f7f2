"""Warm snapshots: an image after its boot, for each shape, so that creating is restoring.

They stand in the assets directory, for all agents of the machine, each whole in a directory of
its own under the hash of all that it depends on: a changed input makes another one, and what was
made from the old one keeps what it uses. Ten creates at once boot one VM, and ten agents too.

An agent has bases and layers in its own data directory as well, as further names of the same
files. So a warm snapshot may be removed at any time but while it is restored: what was made from
it has lost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from sandmartin.agent import disk
from sandmartin.agent.disk import Image
from sandmartin.agent.guest import Guest, Identity
from sandmartin.agent.machine import Machine
from sandmartin.agent.microvm import MicroVm, Records, new_token
from sandmartin.agent.snapshots import (
    Draft,
    Manifest,
    Platform,
    Snapshot,
    Snapshots,
    remove_snapshot,
    state_digest,
)
from sandmartin.agent.storage import names_in, remove
from sandmartin.agent.vmm import Disk
from sandmartin.errors import Conflict, Invalid, NotFound, SandmartinError, Unavailable
from sandmartin.model import Shape, WarmAhead, random_id

_log = logging.getLogger(__name__)

_BASE = "base.ram"
_KEY = re.compile(r"[0-9a-f]{20}")
#: A guest that has just begun to serve still has some of its boot to do.
_SETTLE_S = 0.3
_LOCK_RETRY_S = 0.02
#: What this machine cannot run any more may be what another version of us runs next.
_DEAD_AFTER_S = 7 * 86400.0
#: A create in whose hands warm snapshots vanish this often boots.
_TRIES = 5
#: An image's earlier warm snapshots are kept for as long as one of so many creates used them.
_KEPT_USES = 4


class WarmStore:
    """The warm snapshots of a machine on its disk, shared by its agents.

    Each has a lock: who restores it shares the lock, who makes or removes it has the lock alone.
    The time at which its directory was changed is that of its last use.
    """

    def __init__(
        self, directory: Path, budget_bytes: int, snapshots: Snapshots, platform: Platform
    ) -> None:
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._snapshots = snapshots
        self._platform = platform

    def path(self, key: str) -> Path:
        return self._directory / key

    def lock(self, key: str, *, alone: bool) -> AbstractAsyncContextManager[None]:
        """The lock of a warm snapshot, for all agents, waited for."""
        self._directory.mkdir(parents=True, exist_ok=True)
        return _locked(self._lock_file(key), alone=alone)

    def _lock_file(self, key: str) -> Path:
        return self._directory / f".{key}.lock"

    def read(self, key: str) -> Snapshot:
        """A warm snapshot that runs here. Raises NotFound, Invalid, Conflict."""
        path = self.path(key)
        snapshot = self._snapshots.read(path)
        manifest = snapshot.manifest
        manifest.platform.check(self._platform, "a warm snapshot")
        for name in (_BASE, *(f"{layer}.qcow2" for layer in manifest.layers)):
            if not (path / name).exists():
                raise Invalid(f"{name} is gone")
        return snapshot

    def read_alone(self, key: str) -> Snapshot | None:
        """The same for who has the lock alone; what is of no use is removed."""
        self._remove_drafts(key)
        try:
            return self.read(key)
        except NotFound:
            return None
        except (Invalid, Conflict) as error:
            _log.warning("the warm snapshot %s is made anew: %s", key, error)
            remove_snapshot(self.path(key))
            return None

    def use(self, snapshot: Snapshot) -> bool:
        """Mark a snapshot, whose lock is held, as used now; False when it is not there any more."""
        try:
            # Removed by one agent and made anew by another it is not the same.
            found = self.read(snapshot.path.name)
            if _over(found, snapshot.manifest.image) != snapshot:
                return False
            os.utime(snapshot.path)
        except (NotFound, Invalid, Conflict):
            return False
        return True

    # Removing.

    def tidy(self) -> None:
        """Remove what killed agents left, what can never be used again, what is beyond the budget.

        What is in use stays.
        """
        keys = {path.name.lstrip(".").partition(".")[0] for path in self._list()}
        for key in filter(_KEY.fullmatch, keys):
            with _tried(self._lock_file(key)) as lock:
                if lock is None:
                    continue
                self._remove_drafts(key)
                if self._is_dead(key):
                    _log.info("removing warm snapshot %s: it fits nothing here any more", key)
                    remove_snapshot(self.path(key))
                if not self.path(key).exists():
                    self._lock_file(key).unlink()
        self.trim()

    def trim(self) -> None:
        """Remove the least recently used beyond the budget, but none that is in use."""
        files = {path.name: _blocks(path) for path in self._by_use()}
        for key in list(files):
            # A file counts once, under however many names.
            taken = {inode: size for each in files.values() for inode, size in each.items()}
            if sum(taken.values()) <= self._budget_bytes:
                return
            with _tried(self._lock_file(key)) as lock:
                if lock is None:
                    continue
                _log.info("removing warm snapshot %s: others were used since", key)
                remove_snapshot(self.path(key))
                self._lock_file(key).unlink()
                del files[key]

    def _list(self) -> list[Path]:
        return list(self._directory.iterdir()) if self._directory.exists() else []

    def _by_use(self) -> list[Path]:
        """Those that are whole, the least recently used first."""
        used = {}
        for path in self._list():
            with contextlib.suppress(FileNotFoundError):
                if _KEY.fullmatch(path.name):
                    used[path] = path.stat().st_mtime_ns
        return sorted(used, key=lambda path: used[path])

    def _remove_drafts(self, key: str) -> None:
        for path in self._directory.glob(f".{key}.*"):
            if path != self._lock_file(key):
                remove(path)

    def _is_dead(self, key: str) -> bool:
        try:
            if time.time() - self.path(key).stat().st_mtime < _DEAD_AFTER_S:
                return False
            return not self.read(key).manifest.image.exists()
        except FileNotFoundError:
            return False
        except (NotFound, Invalid, Conflict):
            return True


@dataclass(eq=False)
class _Known:
    """A warm snapshot that this agent has used."""

    image: Image
    shape: Shape
    #: The last create that used it, by number.
    used: int = 0
    #: Once this agent has its base and layers.
    snapshot: Snapshot | None = None
    making: asyncio.Task[Snapshot] = field(init=False)


class WarmSnapshots:
    """The warm snapshots that one agent uses."""

    def __init__(self, machine: Machine) -> None:
        settings = machine.settings
        self._machine = machine
        self._store = WarmStore(
            settings.assets_dir / "warm",
            settings.warm_budget_mb << 20,
            machine.storage.snapshots,
            machine.platform,
        )
        self._known: dict[str, _Known] = {}
        self._uses = 0
        self._tending: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to tidy up, and to make those that are wanted ahead."""
        self._tending = self._machine.tasks.watch("warm snapshots", self._tend())

    def close(self) -> None:
        """Begin with nothing any more."""
        if self._tending is not None:
            self._tending.cancel()

    def covers(self, shape: Shape) -> bool:
        """Whether VMs of this shape are to be had warm."""
        settings = self._machine.settings
        return settings.warm and (not settings.warm_shapes or shape in settings.warm_shapes)

    def needed(self) -> set[str]:
        """Bases and layers that the next create may ask for."""
        self._forget()
        needed: set[str] = set()
        for known in self._known.values():
            if known.snapshot is not None:
                needed |= names_in(known.snapshot.manifest)
        return needed

    def _forget(self) -> None:
        """Forget what was removed, and what an image had before it was changed."""
        newest = {(k.image.name, k.shape): k for k in sorted(self._known.values(), key=_used)}
        for key, known in list(self._known.items()):
            if not known.making.done():
                continue
            failed = known.making.cancelled() or known.making.exception() is not None
            gone = failed or not self._store.path(key).exists()
            current = newest[known.image.name, known.shape] is known
            if gone or not (current or self._uses - known.used < _KEPT_USES):
                del self._known[key]

    @contextlib.asynccontextmanager
    async def use(self, image: Image, shape: Shape) -> AsyncIterator[Snapshot]:
        """The warm snapshot of an image, made now if there is none; it stays until the end.

        Raises what the boot of a VM raises.
        """
        key = self._key(image, shape)
        self._uses += 1
        for _ in range(_TRIES):
            known = self._know(key, image, shape)
            snapshot = await asyncio.shield(known.making)
            async with self._store.lock(key, alone=False):
                if self._known.get(key) is known and self._store.use(snapshot):
                    yield snapshot
                    return
            if self._known.get(key) is known:
                del self._known[key]
        raise Unavailable(f"warm snapshot {key} was removed again and again")

    def _know(self, key: str, image: Image, shape: Shape) -> _Known:
        """The warm snapshot `key`, which is there or being made."""
        self._forget()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(image, shape)
            # One for all who ask, and not ended with the one who asked first.
            making = self._machine.tasks.operate(f"warm {key}", self._ensure(key, known))
            known.making = asyncio.create_task(making, name=f"warm {key}")
        known.used = self._uses
        return known

    def _key(self, image: Image, shape: Shape) -> str:
        machine = self._machine
        stat, traits = image.path.stat(), image.traits
        inputs = (
            os.fspath(image.path.resolve()),
            f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}",
            machine.kernel.parent.name,
            machine.initramfs.parent.name,
            machine.command_line,
            repr(machine.platform.vmm_version),
            machine.platform.machine,
            machine.accel,
            f"{shape.vcpus} {shape.memory_mb}",
            *([traits.digest_words()] if traits.starts else []),
        )
        return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:20]

    async def _ensure(self, key: str, known: _Known) -> Snapshot:
        store = self._store
        async with store.lock(key, alone=False):
            with contextlib.suppress(NotFound, Invalid, Conflict):
                return await self._adopt(known, store.read(key))
        async with store.lock(key, alone=True):
            found = await asyncio.to_thread(store.read_alone, key)
            snapshot = await self._adopt(known, found or await self._make(key, known))
            # The one whose lock we have is in use.
            await _keep_house(store.trim)
            return snapshot

    async def _adopt(self, known: _Known, snapshot: Snapshot) -> Snapshot:
        storage = self._machine.storage
        snapshot = _over(snapshot, known.image.path)
        with storage.pinned(names_in(snapshot.manifest)):
            await storage.adopt(snapshot, snapshot.path / _BASE)
            known.snapshot = snapshot
        return snapshot

    async def _make(self, key: str, known: _Known) -> Snapshot:
        began, path = time.monotonic(), self._store.path(key)
        snapshots = self._machine.storage.snapshots
        async with snapshots.draft(path) as draft:
            vm_dir = draft.path / "vm"
            vm_dir.mkdir(mode=0o700)
            vm = MicroVm(self._machine, f"warm-{random_id(8)}", vm_dir, Records())
            try:
                manifest, state = await self._boot_and_freeze(vm, draft, known)
            finally:
                await asyncio.shield(vm.end(None, None, "warm"))
            snapshot = await snapshots.finish(draft, path, manifest, state)
        _log.info("warm snapshot %s made in %.1f s", key, time.monotonic() - began)
        return snapshot

    async def _boot_and_freeze(
        self, vm: MicroVm, draft: Draft, known: _Known
    ) -> tuple[Manifest, bytes]:
        machine, image, shape = self._machine, known.image, known.shape
        layers = machine.storage.layers
        top = await layers.create(draft.path, image.size_mb)
        await vm.boot(shape, Disk(image=image.path, top=top))
        assert vm.slot is not None
        guest = machine.guest(str(vm.slot.host_ip), "")
        try:
            token = await self._bring_up(vm, guest, image)
        finally:
            await guest.close()
        await asyncio.sleep(_SETTLE_S)
        frozen = await vm.freeze(cont=False)
        base = await asyncio.to_thread(vm.dump, frozen, draft.path / _BASE)
        # Nobody writes to its layer any more; QEMU has flushed it when it stopped.
        await vm.running.kill()
        layers.seal_in_place(top)
        return Manifest(
            platform=machine.platform,
            template=image.name,
            vcpus=shape.vcpus,
            memory_mb=shape.memory_mb,
            disk_size_mb=image.size_mb,
            image=image.path,
            layers=(top.stem,),
            base=base.digest,
            diff=None,
            state=state_digest(frozen.state),
            token=token,
            created_at=time.time(),
        ), frozen.state

    async def _bring_up(self, vm: MicroVm, guest: Guest, image: Image) -> str:
        """Wait until a VM can be used as it is to be found; the token that its guest knows then.

        Where something has to be started in it, the guest has to be told first who it is.
        """
        deadline_s, traits = self._machine.settings.boot_timeout_s, image.traits
        if not traits.starts:
            await vm.awake(guest, deadline_s)
            return ""
        token = new_token()
        nobody = Identity(
            sandbox_id=vm.group,
            template=image.name,
            hostname="sandbox",
            machine_id="0" * 32,
            token=token,
        )
        await vm.introduce(guest, nobody, deadline_s)
        await vm.start_up(guest, traits)
        return token

    # What is done at the start.

    async def _tend(self) -> None:
        tasks = self._machine.tasks
        # An operation, because a thread cannot be ended: the agent waits for it.
        await tasks.operate("tidy warm snapshots", _keep_house(self._store.tidy))
        for ahead in self._machine.settings.warm_ahead:
            # A create that comes meanwhile has the other processors, or waits for the same.
            await tasks.settle()
            await self._make_ahead(ahead)

    async def _make_ahead(self, ahead: WarmAhead) -> None:
        settings = self._machine.settings
        try:
            image = self._machine.images.get(ahead.template)
            shape = ahead.shape or image.traits.shape
            if not self.covers(shape):
                raise Conflict("the settings `warm` and `warm_shapes` leave this shape out")
            disk.check_free(settings.assets_dir, settings.disk_floor_mb)
            async with self.use(image, shape):
                _log.info("template %s is warm as %s", ahead.template, shape)
        except (SandmartinError, OSError) as error:
            _log.warning("template %s is not made warm ahead: %s", ahead.template, error)


async def _keep_house(work: Callable[[], None]) -> None:
    """Remove what is too much; what cannot be removed stays until the next time."""
    try:
        await asyncio.to_thread(work)
    except OSError as error:
        _log.warning("old warm snapshots stay: %s", error)


def _over(snapshot: Snapshot, image: Path) -> Snapshot:
    """A snapshot over an image as the one who restores it calls it.

    It is the same file: but who made the snapshot may have called it otherwise, and be gone.
    """
    return replace(snapshot, manifest=replace(snapshot.manifest, image=image))


def _used(known: _Known) -> int:
    return known.used


def _blocks(directory: Path) -> dict[int, int]:
    """Bytes that the files in a directory really take, by their inodes."""
    found = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = Path(parent, name).lstat()
                found[status.st_ino] = status.st_blocks * 512
    return found


@contextlib.asynccontextmanager
async def _locked(path: Path, *, alone: bool) -> AsyncIterator[None]:
    while True:
        with _tried(path, alone=alone) as lock:
            if lock is not None:
                yield
                return
        # Not in a thread: many who wait there would leave none for the one they wait for.
        await asyncio.sleep(_LOCK_RETRY_S)


@contextlib.contextmanager
def _tried(path: Path, *, alone: bool = True) -> Iterator[TextIO | None]:
    """The lock at `path` if it is free, else None."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            # Who removes a snapshot removes its lock file too: then this one is no lock any more.
            held = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        yield lock if held else None
