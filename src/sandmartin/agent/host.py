"""The host: the table of its sandboxes, what it may still give away, and its recovery at start.

An operation belongs to the host: a caller that hangs up ends its waiting and nothing else. What
a sandbox will hold is counted from the moment it stands in the table, so that admission cannot
be passed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sandmartin.agent import disk
from sandmartin.agent.admission import Description, check_room, describe, memory_left_mb
from sandmartin.agent.content import Contents
from sandmartin.agent.disk import Image
from sandmartin.agent.folding import Folding
from sandmartin.agent.images import Growth
from sandmartin.agent.journal import Entry
from sandmartin.agent.machine import Machine
from sandmartin.agent.metrics import Point
from sandmartin.agent.oci import ImageImports, Imported
from sandmartin.agent.oci import Progress as ImportProgress
from sandmartin.agent.pools import ReadySandboxes, WaitingVms
from sandmartin.agent.registry import RegistryAuth
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Snapshot
from sandmartin.agent.startup import NotReady
from sandmartin.agent.storage import names_in
from sandmartin.agent.stored import Place, Progress, Pushed, Stored
from sandmartin.agent.templates import Templates
from sandmartin.agent.warm import WarmSnapshots
from sandmartin.errors import (
    AlreadyExists,
    DiskFull,
    Invalid,
    NotFound,
    SandmartinError,
    Unavailable,
)
from sandmartin.model import NetworkPolicy, SandboxSpec, Shape, State, check_name, random_id

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Host:
    """All sandboxes of one machine's agent."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._sandboxes: dict[str, Sandbox] = {}
        self._templates = Templates(machine.data, machine.images, machine.storage)
        self._warm = WarmSnapshots(machine)
        self._waiting = WaitingVms(machine)
        self._ready = ReadySandboxes(machine, self._make_ready, self._crowded)
        self._folding = Folding(machine, self.sandboxes, self._templates, self._needed)
        self._contents = Contents(machine, self._templates, self._folding.replacing)
        self._imports = ImageImports(machine, self._templates)
        self._stored = Stored(machine, self._templates, self._contents)
        self._closing = False
        self._termination: asyncio.Task[None] | None = None
        #: Set once `terminate` is through and the agent has nothing left to do.
        self.terminated = asyncio.Event()

    async def open(self) -> None:
        """Adopt what runs, finish or undo what was half done, remove what nobody owns."""
        machine = self._machine
        machine.groups.open()
        await asyncio.to_thread(machine.storage.clean)
        await self._read_journal()
        slots = [s.entry.slot for s in self._sandboxes.values() if s.entry.slot is not None]
        await machine.network.start(slots)
        await asyncio.gather(*(sandbox.adopt() for sandbox in self._sandboxes.values()))
        self._forget_stopped()
        self._templates.clean()
        await self._grow_images()
        self._folding.tidy()
        await machine.storage.sweep(self._needed)
        machine.tasks.watch("disk space", self._check_disk_space())
        machine.tasks.watch("activity", self._save_activity())
        machine.tasks.watch("idle sandboxes", self._reap())
        machine.tasks.watch("metrics", machine.sampler.run())
        machine.tasks.watch("waiting VMs", self._waiting.run())
        machine.tasks.watch("ready sandboxes", self._ready.run())
        machine.tasks.watch("folding", self._folding.run())
        self._warm.open()

    async def _grow_images(self) -> None:
        machine = self._machine
        growth = Growth(
            machine.data.images,
            machine.settings.layers_uid,
            floor_mb=machine.settings.disk_floor_mb,
            step=machine.step,
        )
        needed = {each.manifest.image for each in self._templates.snapshots()}
        needed |= {each.image for each in self.sandboxes() if each.image is not None}
        await growth.run(needed)

    async def _read_journal(self) -> None:
        """Fill the table, and end what no entry speaks for."""
        data, groups = self._machine.data, self._machine.groups
        strays = groups.list()
        for sandbox_id, entry in data.read_all():
            if entry is None:
                # Killed before the first entry was whole, or damaged since.
                strays.add(sandbox_id)
            else:
                strays.discard(entry.group or sandbox_id)
                self._sandboxes[sandbox_id] = self._new(entry)
        for sandbox_id in strays:
            groups.kill(sandbox_id)
            try:
                await asyncio.to_thread(groups.remove, sandbox_id)
                await asyncio.to_thread(data.remove, sandbox_id)
            except SandmartinError as error:
                _log.error("what is left of sandbox %s stays: %s", sandbox_id, error)

    def _new(self, entry: Entry) -> Sandbox:
        return Sandbox(self._machine, entry, self._waiting.take)

    async def close(self) -> None:
        """End the agent; the VMs run on and the next agent adopts them."""
        self._closing = True
        self._warm.close()
        await self._stored.close()
        if self._termination is not None:
            await asyncio.wait({self._termination})
        await self._machine.tasks.close()
        await self._end_pools()
        for sandbox in self.sandboxes():
            await sandbox.release()
        await self._machine.network.close()

    async def terminate(self) -> None:
        """Destroy every sandbox and give back all the agent made on this machine.

        Raises when a sandbox cannot be destroyed; the agent then goes on, to be told again.
        """
        if self._termination is None or self._termination.done():
            self._closing = True
            # Not one of `tasks`: it waits for those to end.
            self._termination = asyncio.create_task(self._terminate(), name="terminate")
        await asyncio.shield(self._termination)

    async def _terminate(self) -> None:
        if self.terminated.is_set():
            return
        self._warm.close()
        # A create in flight ends first, so that nothing is born behind the last destroy.
        await self._machine.tasks.settle()
        try:
            await self._destroy_all()
        except BaseException:
            self._closing = False
            raise
        try:
            await self._machine.tasks.close()
            await self._end_pools()
            await self._machine.storage.sweep(self._needed)
            await self._machine.network.destroy_all()
            self._machine.groups.close()
        except SandmartinError as error:
            _log.error("the agent leaves something behind: %s", error)
            raise
        finally:
            # Without its watches the agent must end, whatever is left.
            self.terminated.set()

    async def _end_pools(self) -> None:
        """What was made ahead is nobody's; the watches that fill the pools have ended."""
        await self._ready.close()
        await self._waiting.close()

    async def _destroy_all(self) -> None:
        """Destroy every sandbox that can be; raises the first error of those that cannot."""
        sandboxes = self.sandboxes()
        results = await asyncio.gather(*(s.destroy() for s in sandboxes), return_exceptions=True)
        self._forget_stopped()
        failures = []
        for sandbox, error in zip(sandboxes, results, strict=True):
            if error is not None:
                _log.error("sandbox %s is not destroyed: %s", sandbox.sandbox_id, error)
                failures.append(error)
        if failures:
            raise failures[0]

    def _forget_stopped(self) -> None:
        stopped = [i for i, sandbox in self._sandboxes.items() if sandbox.state is State.STOPPED]
        for sandbox_id in stopped:
            del self._sandboxes[sandbox_id]
            self._machine.sampler.remove(sandbox_id)

    def _needed(self) -> set[str]:
        """Bases and layers that anything on this host needs."""
        needed = self._warm.needed() | self._templates.needed() | self._waiting.needed()
        for sandbox in (*self._sandboxes.values(), *self._ready.all()):
            needed |= sandbox.needed()
        return needed

    # The table.

    def sandboxes(self) -> list[Sandbox]:
        return list(self._sandboxes.values())

    def get(self, sandbox_id: str) -> Sandbox:
        """The sandbox `sandbox_id`. Raises NotFound."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFound(
                f"there is no sandbox {sandbox_id[:80]!r} on this host",
                hint="`sandmartin ls` shows those that there are",
            )
        return sandbox

    def default_shape(self, template: str) -> Shape:
        """Of a sandbox for which none is asked for. Raises Invalid, NotFound."""
        found = self._templates.find(check_name(template, "template name"))
        return found.traits.shape if isinstance(found, Image) else Shape()

    # Operations.

    async def create(self, spec: SandboxSpec, envs: Mapping[str, str]) -> Sandbox:
        """Start a new sandbox. Raises NotFound, AlreadyExists, Exhausted, Invalid, ToolFailed."""
        found = self._templates.find(spec.template)
        spec = _fitting(spec, found)
        self._check_new(spec)
        if (ready := self._ready.take(spec)) is not None:
            self._sandboxes[spec.sandbox_id] = ready
            work = self._claim(ready, spec, envs, found)
        else:
            work = self._create(self._enter(spec), envs, found)
        return await self._machine.tasks.operate(f"create {spec.sandbox_id}", work)

    async def _claim(
        self, ready: Sandbox, spec: SandboxSpec, envs: Mapping[str, str], origin: Image | Snapshot
    ) -> Sandbox:
        try:
            await ready.claim(spec, envs)
        except SandmartinError as error:
            _log.warning("ready sandbox %s cannot be used: %s", ready.sandbox_id, error)
            return await self._create(self._enter(spec), envs, origin)
        return ready

    async def _make_ready(self, template: str) -> Sandbox:
        """A sandbox that is ready to be claimed; it is not in the table."""
        found, shape = self._templates.find(template), self.default_shape(template)
        spec = SandboxSpec(
            sandbox_id=f"ready-{random_id(8)}",
            template=template,
            vcpus=shape.vcpus,
            memory_mb=shape.memory_mb,
        )
        spec = _fitting(spec, found)
        ready = (each.entry.spec for each in self._ready.all())
        check_room(self._machine, spec, [*self._taken(), *ready])
        sandbox = self._record_new(spec)
        await self._start(sandbox, sandbox.prepare, found)
        return sandbox

    def _check_new(self, spec: SandboxSpec) -> None:
        """Raises Unavailable, AlreadyExists, Exhausted."""
        self._check_open()
        if spec.sandbox_id in self._sandboxes:
            raise AlreadyExists(f"sandbox {spec.sandbox_id} exists already")
        self._admit(spec)

    def _enter(self, spec: SandboxSpec) -> Sandbox:
        """A new sandbox, which has been checked, in the table and the journal. Raises DiskFull."""
        sandbox = self._sandboxes[spec.sandbox_id] = self._record_new(spec)
        return sandbox

    def _record_new(self, spec: SandboxSpec) -> Sandbox:
        now = time.time()
        entry = Entry(spec=spec, state=State.PENDING, created_at=now, last_active_at=now)
        self._machine.data.create(entry)
        self._machine.step("create:entry")
        return self._new(entry)

    async def _create(
        self, sandbox: Sandbox, envs: Mapping[str, str] | None, origin: Image | Snapshot
    ) -> Sandbox:
        await self._start(sandbox, partial(sandbox.create, envs), origin)
        return sandbox

    async def _start(
        self,
        sandbox: Sandbox,
        start: Callable[[Image | Snapshot], Awaitable[None]],
        origin: Image | Snapshot,
    ) -> None:
        try:
            async with self._warmed(origin, sandbox.entry.spec) as origin:
                sandbox.clock.mark("template")
                needed = names_in(origin.manifest) if isinstance(origin, Snapshot) else set()
                with self._machine.storage.pinned(needed):
                    await start(origin)
        except BaseException:
            # What failed before its own life began is removed here; later it undoes itself.
            if sandbox.state is State.PENDING:
                await asyncio.shield(sandbox.destroy())
            raise
        finally:
            self._forget_stopped()

    @contextlib.asynccontextmanager
    async def _warmed(
        self, origin: Image | Snapshot, spec: SandboxSpec
    ) -> AsyncIterator[Image | Snapshot]:
        """The warm snapshot of an image; the origin itself where there is none to be had."""
        shape = Shape(vcpus=spec.vcpus, memory_mb=spec.memory_mb)
        async with contextlib.AsyncExitStack() as stack:
            if isinstance(origin, Image) and self._warm.covers(shape):
                try:
                    origin = await stack.enter_async_context(self._warm.use(origin, shape))
                except NotReady:
                    # After another boot it would not be either.
                    raise
                except SandmartinError as error:
                    _log.warning("template %s boots cold: %s", spec.template, error)
            yield origin

    async def destroy(self, sandbox_id: str) -> None:
        """End a sandbox and free all it held. Already gone is success."""
        if (sandbox := self._sandboxes.get(sandbox_id)) is not None:
            await self._machine.tasks.operate(f"destroy {sandbox_id}", self._destroy(sandbox))

    async def _destroy(self, sandbox: Sandbox) -> None:
        await sandbox.destroy()
        self._forget_stopped()
        await self._machine.storage.sweep(self._needed)

    async def pause(self, sandbox_id: str) -> Sandbox:
        """Put a sandbox to sleep. Raises NotFound, Conflict, DiskFull."""
        sandbox = self.get(sandbox_id)
        await self._operate("pause", sandbox_id, sandbox.pause())
        return sandbox

    async def resume(self, sandbox_id: str, timeout_s: int | None) -> Sandbox:
        """Wake a sandbox up. Raises NotFound, Conflict, Exhausted."""
        sandbox = self.get(sandbox_id)
        if sandbox.state is State.PAUSED:
            self._admit(sandbox.entry.spec)
        await self._operate("resume", sandbox_id, sandbox.resume(timeout_s))
        return sandbox

    async def set_timeout(self, sandbox_id: str, timeout_s: int) -> None:
        """Give a sandbox another idle limit; 0 is none. Raises NotFound, Conflict, DiskFull."""
        await self._operate("limit", sandbox_id, self.get(sandbox_id).set_timeout(timeout_s))

    async def update_network(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        """Replace what a sandbox may reach. Raises NotFound, Conflict, DiskFull, ToolFailed."""
        await self._operate("restrict", sandbox_id, self.get(sandbox_id).update_network(policy))

    async def checkpoint(self, sandbox_id: str, comment: str) -> Snapshot:
        """A snapshot in a sandbox's own history. Raises NotFound, Conflict, DiskFull."""
        sandbox = self.get(sandbox_id)
        return await self._operate("checkpoint", sandbox_id, sandbox.checkpoint(comment))

    async def rollback(self, sandbox_id: str, checkpoint_id: str) -> Sandbox:
        """Return a sandbox to a checkpoint. Raises NotFound, Conflict, Exhausted."""
        sandbox = self.get(sandbox_id)
        if sandbox.state is State.PAUSED:
            self._admit(sandbox.entry.spec)
        self._folding.note_start(sandbox_id, checkpoint_id)
        await self._operate("rollback", sandbox_id, sandbox.rollback(checkpoint_id))
        await self._machine.storage.sweep(self._needed)
        return sandbox

    async def delete_checkpoint(self, sandbox_id: str, checkpoint_id: str) -> None:
        """Forget a checkpoint. Raises NotFound, Conflict."""
        sandbox = self.get(sandbox_id)
        await self._operate("forget", sandbox_id, sandbox.delete_checkpoint(checkpoint_id))
        await self._machine.storage.sweep(self._needed)

    async def _operate(self, what: str, sandbox_id: str, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await self._machine.tasks.operate(f"{what} {sandbox_id}", work)
        finally:
            self._folding.look()

    async def fork(
        self, sandbox_id: str, child_ids: Sequence[str], timeout_s: int | None
    ) -> list[Sandbox | SandmartinError]:
        """Sandboxes that go on from where this one is, which goes on too.

        One that cannot be made is its error. Raises NotFound, Conflict, DiskFull.
        """
        source = self.get(sandbox_id)
        work = self._fork(source, child_ids, timeout_s)
        return await self._operate("fork", sandbox_id, work)

    async def _fork(
        self, source: Sandbox, child_ids: Sequence[str], timeout_s: int | None
    ) -> list[Sandbox | SandmartinError]:
        path = self._machine.data.forks / f"fork-{random_id(12)}"
        snapshot = await source.snapshot(path)
        before = source.phases
        try:
            self._machine.step("fork:snapshot")
            with self._machine.storage.pinned(names_in(snapshot.manifest)):
                children = (self._child(source, each, timeout_s, snapshot) for each in child_ids)
                made = await asyncio.gather(*children)
        finally:
            await asyncio.to_thread(snapshot.remove)
        for child in made:
            if isinstance(child, Sandbox):
                child.phases = (*before, *child.phases)
        return made

    async def _child(
        self, source: Sandbox, child_id: str, timeout_s: int | None, snapshot: Snapshot
    ) -> Sandbox | SandmartinError:
        try:
            spec = replace(source.entry.spec, sandbox_id=child_id)
            if timeout_s is not None:
                spec = replace(spec, timeout_s=timeout_s)
            self._check_new(spec)
            return await self._create(self._enter(spec), None, snapshot)
        except SandmartinError as error:
            return error

    # Templates.

    async def create_snapshot(self, sandbox_id: str, name: str, *, live: bool) -> Snapshot:
        """A template from a sandbox, which is paused then, or goes on if `live`.

        Raises NotFound, Invalid, AlreadyExists, Conflict, DiskFull.
        """
        sandbox = self.get(sandbox_id)
        path = self._templates.new(name)
        work = sandbox.snapshot(path) if live else sandbox.make_template(path)
        return await self._operate("snapshot", sandbox_id, work)

    async def delete_snapshot(self, name: str) -> None:
        """Remove a template. Raises NotFound, and Conflict when something depends on it."""
        await self._ready.drop(name)
        async with self._folding.replacing:
            await asyncio.to_thread(self._templates.remove, name, self.sandboxes())
        await self._machine.storage.sweep(self._needed)

    async def flatten(self, sandbox_id: str, name: str) -> int:
        """Make an image of a sandbox's disk, and end it. Returns the bytes it takes.

        Raises NotFound, Invalid, AlreadyExists, Conflict, DiskFull.
        """
        sandbox = self.get(sandbox_id)
        if sandbox.state is State.PAUSED:
            self._admit(sandbox.entry.spec)
        target = self._templates.new_image(name)
        try:
            await self._operate("flatten", sandbox_id, sandbox.flatten(target))
        finally:
            self._templates.forget_failed(target)
            self._forget_stopped()
        await self._machine.storage.sweep(self._needed)
        return disk.allocated_bytes(target)

    def read_template(self, name: str) -> AsyncGenerator[bytes, None]:
        """A template as an archive, in pieces. Raises NotFound, Invalid."""
        return self._contents.read(check_name(name, "template name"))

    async def write_template(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Make a template of an archive, whole or not at all.

        Raises Invalid, AlreadyExists, Conflict, Exhausted, DiskFull.
        """
        await self._bring(self._contents.write(name, chunks))

    def push_template(self, name: str, place: Place) -> AsyncGenerator[Progress | Pushed, None]:
        """Put a template into an artefact store; as `Stored.push`."""
        return self._stored.push(check_name(name, "template name"), place)

    def push_sandbox(
        self, sandbox_id: str, place: Place
    ) -> AsyncGenerator[Progress | Pushed, None]:
        """Put what a paused sandbox sleeps in into a store; as `Stored.push_sandbox`."""
        return self._stored.push_sandbox(self.get(sandbox_id), place)

    async def adopt_sandbox(self, sandbox_id: str, source: str, template: str) -> None:
        """A paused sandbox that goes on from a template, which another's sleep was made.

        One of this id that sleeps here is success. Raises NotFound, Invalid, AlreadyExists.
        """
        self._check_open()
        there = self._sandboxes.get(sandbox_id)
        if there is not None and there.state is State.PAUSED:
            return
        if there is not None:
            raise AlreadyExists(f"sandbox {sandbox_id} exists already, and is {there.state}")
        origin = self._templates.find(check_name(source, "template name"))
        if not isinstance(origin, Snapshot):
            raise Invalid(f"template {source!r} has no memory that a sandbox could go on from")
        manifest = origin.manifest
        spec = SandboxSpec(
            sandbox_id=sandbox_id,
            template=template,
            vcpus=manifest.vcpus,
            memory_mb=manifest.memory_mb,
            disk_size_mb=manifest.disk_size_mb,
            network=manifest.network,
        )
        work = self._adopt(self._enter(spec), origin)
        await self._machine.tasks.operate(f"adopt {sandbox_id}", work)

    async def _adopt(self, sandbox: Sandbox, origin: Snapshot) -> None:
        try:
            with self._machine.storage.pinned(names_in(origin.manifest)):
                await sandbox.sleep_as(origin)
        except BaseException:
            await asyncio.shield(sandbox.destroy())
            raise
        finally:
            self._forget_stopped()

    async def fetch_template(self, name: str, artefact_id: str, place: Place) -> None:
        """Make a template of an artefact, whole or not at all; as `Stored.fetch`."""
        await self._bring(self._stored.fetch(name, artefact_id, place))

    async def _bring(self, work: Coroutine[Any, Any, None]) -> None:
        """Have a template come in. Raises Unavailable."""
        try:
            self._check_open()
            await work
        finally:
            work.close()
            self._folding.look()
            await self._machine.storage.sweep(self._needed)

    def import_image(
        self, reference: str, name: str, auth: RegistryAuth | None
    ) -> AsyncGenerator[ImportProgress | Imported, None]:
        """Make a template of an image of a registry, as `ImageImports.from_registry` has it."""
        self._check_open()
        return self._imports.from_registry(reference, name, auth)

    async def import_archive(self, name: str, pieces: AsyncIterator[bytes]) -> Imported:
        """Make a template of an archive, as `ImageImports.from_archive` has it."""
        self._check_open()
        return await self._imports.from_archive(name, pieces)

    def _check_open(self) -> None:
        if self._closing:
            raise Unavailable("this agent is ending", hint="try again once it has started anew")

    # What is told.

    def describe(self) -> Description:
        """What this host is, and what it has for sandboxes."""
        states = Counter(sandbox.state for sandbox in self.sandboxes())
        return describe(self._machine, running=states[State.RUNNING], paused=states[State.PAUSED])

    def templates(self) -> list[Image | Snapshot]:
        """All that sandboxes can start from."""
        return self._templates.all()

    def drain_auto_paused(self) -> list[str]:
        """Sandboxes that the reaper has paused since the last call."""
        return [each.sandbox_id for each in self.sandboxes() if each.drain_auto_paused()]

    def metrics(self, sandbox_id: str, tier: str) -> list[Point]:
        """Points of a sandbox, oldest first. Raises NotFound, Invalid."""
        self.get(sandbox_id)
        return self._machine.sampler.get(sandbox_id, tier)

    def flush_metrics(self, sandbox_id: str) -> Mapping[str, list[Point]]:
        """All points of a sandbox, which are forgotten then. Raises NotFound."""
        self.get(sandbox_id)
        return self._machine.sampler.flush(sandbox_id)

    # Admission.

    def _taken(self) -> list[SandboxSpec]:
        """What sandboxes hold of processors and memory."""
        idle = {State.STOPPED, State.PAUSED}
        return [s.entry.spec for s in self._sandboxes.values() if s.state not in idle]

    def _admit(self, spec: SandboxSpec) -> None:
        check_room(self._machine, spec, self._taken())

    def _crowded(self) -> bool:
        """Whether what is ready takes memory that was promised to sandboxes by now."""
        ready = (each.entry.spec for each in self._ready.all())
        return memory_left_mb(self._machine, [*self._taken(), *ready]) < 0

    # What is looked after all the time.

    async def _check_disk_space(self) -> None:
        """Let sandboxes that stopped for want of host disk space go on once there is some."""
        enough_mb = self._machine.settings.disk_floor_mb // 2
        while True:
            await asyncio.sleep(self._machine.patience.disk_check_s)
            has_space = disk.free_mb(self._machine.data.path) >= enough_mb
            # At once: a monitor that does not answer must not keep the others waiting.
            checks = (_check_disk_space(each, has_space) for each in self.sandboxes())
            await asyncio.gather(*checks)

    async def _reap(self) -> None:
        """Pause what has idled past its time, all at once."""
        while True:
            await asyncio.sleep(self._machine.patience.reap_s)
            idle = [each for each in self.sandboxes() if each.idles()]
            await asyncio.gather(*(self._pause_idle(sandbox) for sandbox in idle))

    async def _pause_idle(self, sandbox: Sandbox) -> None:
        limit_s = sandbox.entry.spec.timeout_s
        try:
            work = sandbox.pause(idle_s=limit_s, auto=True)
            await self._operate("pause idle", sandbox.sandbox_id, work)
        except SandmartinError as error:
            _log.warning("sandbox %s cannot be paused: %s", sandbox.sandbox_id, error)

    async def _save_activity(self) -> None:
        while True:
            await asyncio.sleep(self._machine.patience.activity_save_s)
            for sandbox in self.sandboxes():
                # It is tried again soon, and who needs the space hears of it.
                with contextlib.suppress(DiskFull):
                    sandbox.save_activity()


def _fitting(spec: SandboxSpec, origin: Image | Snapshot) -> SandboxSpec:
    """What a sandbox that starts from `origin` takes from it. Raises Invalid."""
    if isinstance(origin, Image):
        disk.check_size(origin, spec.disk_size_mb)
        return spec
    manifest = origin.manifest
    return replace(
        spec,
        vcpus=manifest.vcpus,
        memory_mb=manifest.memory_mb,
        disk_size_mb=max(spec.disk_size_mb, manifest.disk_size_mb),
        network=spec.network or manifest.network,
    )


async def _check_disk_space(sandbox: Sandbox, has_space: bool) -> None:
    try:
        await sandbox.check_disk_space(has_space=has_space)
    except SandmartinError as error:
        _log.warning("sandbox %s: %s", sandbox.sandbox_id, error)
