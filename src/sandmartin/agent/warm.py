"""Warm snapshots: an image after its boot, for each shape, so that creating is restoring.

They stand in the assets directory, for all agents of the machine, each whole in a directory of
its own under the hash of all that it depends on: a changed input makes another one, and what was
made from the old one keeps what it uses. Ten creates at once boot one VM, and ten agents too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TextIO

from sandmartin.agent.disk import Image
from sandmartin.agent.machine import Machine
from sandmartin.agent.microvm import MicroVm, Records, Shape
from sandmartin.agent.snapshots import Draft, Manifest, Snapshot, remove_snapshot, state_digest
from sandmartin.agent.storage import names_in, remove
from sandmartin.agent.vmm import Disk
from sandmartin.errors import Conflict, Invalid, NotFound
from sandmartin.model import random_id

_log = logging.getLogger(__name__)

_BASE = "base.ram"
#: A guest that has just begun to serve still has some of its boot to do.
_SETTLE_S = 0.3


class WarmSnapshots:
    """The warm snapshots that one agent uses."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._directory = machine.settings.assets_dir / "warm"
        self._known: dict[str, asyncio.Task[Snapshot]] = {}

    def needed(self) -> set[str]:
        """Bases and layers that the next create may ask for."""
        needed: set[str] = set()
        for task in self._known.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                needed |= names_in(task.result().manifest)
        return needed

    async def get(self, image: Image, shape: Shape) -> Snapshot:
        """The warm snapshot of an image, made now if there is none.

        Raises what the boot of a VM raises.
        """
        key = self._key(image, shape)
        task = self._known.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            # One for all who ask, and not ended with the one who asked first.
            making = self._machine.tasks.operate(f"warm {key}", self._ensure(key, image, shape))
            task = self._known[key] = asyncio.create_task(making, name=f"warm {key}")
        return await asyncio.shield(task)

    def _key(self, image: Image, shape: Shape) -> str:
        machine = self._machine
        stat = image.path.stat()
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
        )
        return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:20]

    async def _ensure(self, key: str, image: Image, shape: Shape) -> Snapshot:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / key
        snapshot = self._find(path)
        if snapshot is None:
            async with _locked(self._directory / f".{key}.lock"):
                # Nobody else is making one: these are what killed agents left.
                for draft in self._directory.glob(f".{key}.*"):
                    if draft.is_dir():
                        await asyncio.to_thread(remove, draft)
                snapshot = self._find(path) or await self._make(path, image, shape)
        return await self._machine.storage.adopt(snapshot, path / _BASE)

    def _find(self, path: Path) -> Snapshot | None:
        try:
            snapshot = self._machine.storage.snapshots.read(path)
            snapshot.manifest.platform.check(self._machine.platform, "a warm snapshot")
        except NotFound:
            return None
        except (Invalid, Conflict) as error:
            _log.warning("the warm snapshot %s is made anew: %s", path.name, error)
            remove_snapshot(path)
            return None
        return snapshot

    async def _make(self, path: Path, image: Image, shape: Shape) -> Snapshot:
        began = time.monotonic()
        snapshots = self._machine.storage.snapshots
        async with snapshots.draft(path) as draft:
            vm_dir = draft.path / "vm"
            vm_dir.mkdir(mode=0o700)
            vm = MicroVm(self._machine, f"warm-{random_id(8)}", vm_dir, Records())
            try:
                manifest, state = await self._boot_and_freeze(vm, draft, image, shape)
            finally:
                await asyncio.shield(vm.end(None, None, "warm"))
            snapshot = await snapshots.finish(draft, path, manifest, state)
        _log.info("warm snapshot %s made in %.1f s", path.name, time.monotonic() - began)
        return snapshot

    async def _boot_and_freeze(
        self, vm: MicroVm, draft: Draft, image: Image, shape: Shape
    ) -> tuple[Manifest, bytes]:
        machine = self._machine
        layers = machine.storage.layers
        top = await layers.create(draft.path, image.size_mb)
        await vm.boot(shape, Disk(image=image.path, top=top))
        assert vm.slot is not None
        guest = machine.guest(str(vm.slot.host_ip), "")
        try:
            await vm.awake(guest, machine.settings.boot_timeout_s)
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
            token="",
            created_at=time.time(),
        ), frozen.state


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """The machine-wide lock at `path`, waited for without blocking the event loop."""

    def take() -> TextIO:
        lock = path.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    lock = await asyncio.to_thread(take)
    try:
        yield
    finally:
        lock.close()
