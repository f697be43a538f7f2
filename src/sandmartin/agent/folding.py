"""Folding: what grows with the age of a sandbox is made short again, in the background.

A snapshot's diff that became large, that of a template, and that of a checkpoint which was
returned to again and again, is folded into a new base of RAM; the lower layers of a long chain are
merged into one. What must stay true:

- the content is the same before and after, so each manifest and entry may name the old or the new;
- each names all of the one or all of the other, and what it names is there: what was made is
  pinned until it is named, what was replaced until nobody can still be reading it;
- a fold begins when nothing is asked of the host, and what happens to a sandbox meanwhile does not
  wait for it: its result is dropped if it comes too late;
- killed anywhere, it leaves nothing that the next start does not put right (`tidy`, `sweep`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sandmartin.agent import disk
from sandmartin.agent.machine import Machine
from sandmartin.agent.memory import Base, fold, get_base, open_diff
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Manifest, Snapshot
from sandmartin.agent.tasks import to_its_end
from sandmartin.agent.templates import Templates
from sandmartin.errors import Invalid, SandmartinError
from sandmartin.model import State, random_id

_log = logging.getLogger(__name__)

#: Sealed layers of a sandbox's disk; more are merged.
DEPTH = 8
#: The newest are left alone, and of the lowest so many at most if they are large: what was merged
#: once is copied again only when as much has come on top of it.
_NEWEST, _LOWEST = 2, 2
#: A diff above this, or above a quarter of its RAM, is folded.
_LARGE_BYTES = 128 << 20
#: A checkpoint that was returned to more often is folded.
_STARTS = 2
#: What failed is tried again after this time.
_RETRY_S = 300.0
#: A host that is always busy does not put folding off for ever.
_PATIENCE_S = 60.0
#: How long a fold stands back, every now and then, while something else is done.
_STEP_BACK_S = 0.01

_SETTLED = frozenset({State.RUNNING, State.PAUSED})
_ASLEEP = frozenset({State.PAUSED})
_THERE = frozenset(State) - {State.STOPPING, State.STOPPED, State.ERROR}


class _UnwantedError(Exception):
    """Nobody needs this fold any more."""


class _Check:
    """Asked again and again by a fold: raises when it is unwanted, waits when it is in the way."""

    def __init__(self, wanted: Callable[[], bool], busy: Callable[[], bool]) -> None:
        self._wanted = wanted
        self._busy = busy
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def raise_if_unwanted(self) -> None:
        if self._stopped.is_set() or not self._wanted():
            raise _UnwantedError

    def __call__(self) -> None:
        """For threads."""
        self.raise_if_unwanted()
        if self._busy():
            time.sleep(_STEP_BACK_S)


@dataclass(frozen=True)
class _Fold:
    """One piece of work. `key` is what it would make short, as it is now."""

    key: Hashable
    name: str
    run: Callable[[], Awaitable[None]]


class Folding:
    """Folds what the host's sandboxes and templates have, one at a time."""

    def __init__(
        self,
        machine: Machine,
        sandboxes: Callable[[], Sequence[Sandbox]],
        templates: Templates,
        needed: Callable[[], set[str]],
    ) -> None:
        self._machine = machine
        self._sandboxes = sandboxes
        self._templates = templates
        self._needed = needed
        self._asked = asyncio.Event()
        self._starts: Counter[tuple[str, str]] = Counter()
        #: What was folded, and into what: many may have the same.
        self._made: dict[Hashable, str] = {}
        self._failed: dict[Hashable, float] = {}
        #: Held while a template's manifest is replaced, and by whoever removes a template.
        self.replacing = asyncio.Lock()

    # When.

    def look(self) -> None:
        """Something may have become long."""
        self._asked.set()

    def note_start(self, sandbox_id: str, checkpoint_id: str) -> None:
        """A checkpoint is returned to."""
        self._starts[sandbox_id, checkpoint_id] += 1

    def tidy(self) -> None:
        """Finish what a killed agent had begun. To be called before anything else runs."""
        snapshots = self._machine.storage.snapshots
        for sandbox in self._sandboxes():
            for snapshot in sandbox.kept_snapshots():
                snapshots.drop_folded(snapshot.path)
            try:
                self._follow(sandbox)
            except SandmartinError as error:
                _log.warning("sandbox %s: %s", sandbox.sandbox_id, error)
        for snapshot in self._templates.snapshots():
            snapshots.drop_folded(snapshot.path)

    async def run(self) -> None:
        """Fold what is due, for as long as the agent runs."""
        while True:
            await self._quiet(self._machine.patience.fold_s)
            self._asked.clear()
            found = await asyncio.to_thread(self._find)
            if found is not None:
                await self._do(found)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
                    await self._asked.wait()

    async def _quiet(self, moment_s: float) -> None:
        """Wait until the host has had nothing to do for a moment, but not for ever."""
        tasks = self._machine.tasks
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                while True:
                    await tasks.settle()
                    await asyncio.sleep(moment_s)
                    if not tasks.busy:
                        return

    async def _do(self, due: _Fold) -> None:
        began = time.monotonic()
        try:
            disk.check_free(self._machine.data.path, self._machine.settings.disk_floor_mb)
            await due.run()
            _log.info("%s is folded, in %.1f s", due.name, time.monotonic() - began)
        except _UnwantedError:
            _log.info("%s is not folded: it has changed", due.name)
        except (SandmartinError, OSError) as error:
            self._failed[due.key] = time.monotonic()
            _log.warning("%s is not folded and stays as it is: %s", due.name, error)
        finally:
            await asyncio.shield(self._machine.storage.sweep(self._needed))

    # What.

    def _find(self) -> _Fold | None:
        """The next that is due and has not just failed."""
        now = time.monotonic()
        self._failed = {key: at for key, at in self._failed.items() if now - at < _RETRY_S}
        there = self._machine.storage.names()
        self._made = {key: name for key, name in self._made.items() if name in there}
        return next((due for due in self._due() if due.key not in self._failed), None)

    def _due(self) -> Iterator[_Fold]:
        for sandbox in self._sandboxes():
            if sandbox.state in _SETTLED:
                yield from self._due_of(sandbox)
        for snapshot in self._templates.snapshots():
            if snapshot.manifest.diff is not None:
                name = f"template {snapshot.path.name}"
                yield _Fold(_key(snapshot), name, partial(self._fold_template, snapshot))

    def _due_of(self, sandbox: Sandbox) -> Iterator[_Fold]:
        name, layers = f"sandbox {sandbox.sandbox_id}", sandbox.entry.layers
        if len(layers) > DEPTH:
            key = (sandbox.sandbox_id, layers)
            yield _Fold(key, f"the disk of {name}", partial(self._merge_layers, sandbox))
        asleep = sandbox.asleep_in()
        if asleep is not None and _is_large(asleep.manifest):
            yield _Fold(_key(asleep), name, partial(self._fold_kept, sandbox, asleep, _ASLEEP))
        for checkpoint in sandbox.checkpoints():
            often = self._starts[sandbox.sandbox_id, checkpoint.path.name] > _STARTS
            if _is_large(checkpoint.manifest) or (often and checkpoint.manifest.diff):
                yield _Fold(
                    _key(checkpoint),
                    f"checkpoint {checkpoint.path.name} of {name}",
                    partial(self._fold_kept, sandbox, checkpoint, _THERE),
                )

    # RAM.

    async def _fold_kept(
        self, sandbox: Sandbox, snapshot: Snapshot, states: frozenset[State]
    ) -> None:
        """Fold what a sandbox sleeps in, or a checkpoint, as long as it is in one of `states`."""
        check = self._check(lambda: sandbox.state in states)

        async def take_over(manifest: Manifest) -> None:
            # Whoever wakes it holds the same lock from reading the manifest to the end.
            async with sandbox.lifecycle:
                check.raise_if_unwanted()
                await self._replace(snapshot, manifest)
                self._drop_diff(snapshot)

        async with self._folded(snapshot.manifest, snapshot.diff, check) as manifest:
            await to_its_end(take_over(manifest))

    async def _fold_template(self, template: Snapshot) -> None:
        async def take_over(manifest: Manifest) -> None:
            async with self.replacing:
                await self._replace(template, manifest)

        check = self._check(template.path.exists)
        async with self._folded(template.manifest, template.diff, check) as manifest:
            await to_its_end(take_over(manifest))
            # Whoever has read the old manifest is an operation that runs now.
            await self._machine.tasks.outlast()
            async with self.replacing:
                self._drop_diff(template)

    def _check(self, wanted: Callable[[], bool]) -> _Check:
        tasks = self._machine.tasks
        return _Check(wanted, lambda: tasks.busy)

    async def _replace(self, old: Snapshot, manifest: Manifest) -> None:
        if not await asyncio.to_thread(self._machine.storage.snapshots.replace, old, manifest):
            raise _UnwantedError
        self._machine.step("fold:replaced")

    def _drop_diff(self, snapshot: Snapshot) -> None:
        self._machine.storage.snapshots.drop_folded(snapshot.path)
        self._machine.step("fold:dropped")

    @contextlib.asynccontextmanager
    async def _folded(self, old: Manifest, diff: Path, check: _Check) -> AsyncIterator[Manifest]:
        """The manifest of the same RAM as a base alone; in the context both bases are pinned."""
        assert old.diff is not None
        key, written, storage = (old.base, old.diff.digest), old.diff, self._machine.storage
        base = storage.base(old.base, old.memory_mb)

        def make(target: Path) -> Base:
            # The new one will be trusted, and the old one may have suffered since it was.
            if get_base(base.path, check).digest != base.digest:
                raise Invalid(f"base {base.path} is damaged")
            with open_diff(diff, written.digest) as opened:
                return fold(base, opened, target, check)

        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(storage.pinned([base.digest, *self._known(key)]))
            self._machine.step("fold:began")
            if not (digests := self._known(key)):
                new = storage.new_base(
                    lambda target: to_its_end(asyncio.to_thread(make, target), check.stop)
                )
                digests = [(await stack.enter_async_context(new)).digest]
                self._made[key] = digests[0]
            self._machine.step("fold:base")
            yield replace(old, base=digests[0], diff=None, folded_bytes=written.size_bytes)

    def _known(self, key: Hashable) -> list[str]:
        """What this was folded into before, if it is there still."""
        name = self._made.get(key)
        return [name] if name is not None and name in self._machine.storage.names() else []

    # Disk.

    async def _merge_layers(self, sandbox: Sandbox) -> None:
        storage, old = self._machine.storage, sandbox.entry.layers
        size_mb = sandbox.entry.spec.disk_size_mb
        begin, end = _lower(storage.layers.path(name) for name in old)
        key = (old[begin:end], size_mb)
        known = self._known(key)
        name = known[0] if known else f"layer-{random_id(12)}"
        check = self._check(lambda: sandbox.state in _THERE)
        with storage.pinned([*old, name]):
            self._machine.step("fold:began")
            if not known:
                await self._merge(old[begin:end], size_mb, name, check)
                self._made[key] = name
            self._machine.step("fold:merged")
            await to_its_end(self._take_over(sandbox, old[:begin], old[begin:end], name))

    async def _merge(self, names: Sequence[str], size_mb: int, merged: str, check: _Check) -> None:
        async def pause() -> None:
            self._machine.step("fold:layer")
            check.raise_if_unwanted()
            await self._quiet(0)

        await self._machine.storage.layers.merge(names, size_mb, merged, pause)

    async def _take_over(
        self, sandbox: Sandbox, below: tuple[str, ...], merged: tuple[str, ...], name: str
    ) -> None:
        lowest = below + merged
        async with sandbox.lifecycle:
            now = sandbox.entry.layers
            if sandbox.state not in _SETTLED or now[: len(lowest)] != lowest:
                raise _UnwantedError
            # The entry first: a VM may use the old layers for as long as it runs, named or not.
            sandbox.replace_layers((*below, name, *now[len(lowest) :]))
            self._machine.step("fold:recorded")
            await asyncio.to_thread(self._follow, sandbox)
            await sandbox.relink()
            self._machine.step("fold:relinked")

    def _follow(self, sandbox: Sandbox) -> None:
        """Have the snapshot of a pause name the layers that the entry names. Raises DiskFull."""
        asleep, layers = sandbox.asleep_in(), sandbox.entry.layers
        if asleep is not None and asleep.manifest.layers != layers:
            manifest = replace(asleep.manifest, layers=layers)
            self._machine.storage.snapshots.replace(asleep, manifest)


def _key(snapshot: Snapshot) -> Hashable:
    manifest = snapshot.manifest
    return (snapshot.path, manifest.base, manifest.diff)


def _is_large(manifest: Manifest) -> bool:
    limit_bytes = min(_LARGE_BYTES, manifest.memory_mb << 18)
    return manifest.diff is not None and manifest.diff.size_bytes > limit_bytes


def _lower(layers: Iterator[Path]) -> tuple[int, int]:
    """Which of many layers to merge: the first of them, and the first that is left alone again."""
    sizes = [disk.allocated_bytes(path) for path in layers]
    begin, end = 0, len(sizes) - _NEWEST
    while begin < _LOWEST and sizes[begin] > sum(sizes[begin + 1 : end]):
        begin += 1
    return begin, end
