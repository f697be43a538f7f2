"""One sandbox: a VM, its disk, and its place on the host, through all of its life.

What a sandbox holds can be found from its journal entry and its id alone, and one idempotent
teardown gives it all back: after a failed create, on destroy, and when the next agent finds what
a killed one left. One lock orders the life cycle; commands and files do not take it.

Memory and disk are cut at the same stopped instant. A snapshot of a sandbox that goes on has its
layer sealed under it, so it never sees what is written later; a paused sandbox keeps its layer to
itself. From the moment a resumed VM runs, the snapshot it slept in is void, and the journal says
so before that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

from sandmartin.agent import disk, files
from sandmartin.agent.guest import (
    Command,
    Identity,
)
from sandmartin.agent.journal import Entry
from sandmartin.agent.kept import Kept
from sandmartin.agent.machine import Machine
from sandmartin.agent.memory import Written, write_diff
from sandmartin.agent.microvm import Frozen, Shape, Take, new_token
from sandmartin.agent.recorded import boot_id
from sandmartin.agent.snapshots import Draft, Manifest, Snapshot, remove_snapshot, state_digest
from sandmartin.agent.storage import names_in, remove
from sandmartin.agent.traits import Traits
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import (
    Conflict,
    DiskFull,
    Invalid,
    NotFound,
    SandmartinError,
    Unimplemented,
)
from sandmartin.model import SandboxSpec, State, random_id

_log = logging.getLogger(__name__)

#: States that outlive the agent; what it finds in `starting` or `stopping` is removed.
_SETTLED = frozenset({State.RUNNING, State.PAUSED, State.ERROR})
#: From the third time on it is not faster.
_REHEARSALS = 3
#: For all that a guest has not written yet, on a disk that may be slow.
_SYNC_S = 120.0


class Sandbox(Kept):
    """One sandbox of this host. Made by `Host`."""

    def __init__(self, machine: Machine, entry: Entry, take_waiting: Take) -> None:
        super().__init__(machine, entry)
        self._take_waiting = take_waiting
        self._watch: asyncio.Task[None] | None = None

    # What it is.

    def drain_auto_paused(self) -> bool:
        """Whether the reaper has paused it and nobody was told; from now on somebody was."""
        if not self._entry.auto_paused:
            return False
        with self._disk_may_be_full():
            self._record(auto_paused=False)
        return True

    def needed(self) -> set[str]:
        """Bases and layers that it, its paused memory and its checkpoints need."""
        entry = self._entry
        needed = {*entry.layers, entry.top, entry.next_top}
        if entry.ram is not None:
            needed.add(entry.ram.base)
        for snapshot in self.kept_snapshots():
            needed |= names_in(snapshot.manifest)
        return needed

    # Creating.

    async def create(self, envs: Mapping[str, str] | None, origin: disk.Image | Snapshot) -> None:
        """Start it from its origin and confirm its identity; what fails leaves nothing behind.

        `envs` becomes part of every command's environment; None leaves what a snapshot has.
        """
        async with self._lock, self._or_nothing():
            await self._start(envs, origin)
            self._begin()
            self.phases = self.clock.phases

    async def prepare(self, origin: disk.Image | Snapshot) -> None:
        """Start it for whoever claims it; until then it is `starting`, and ends with the agent."""
        async with self._lock, self._or_nothing():
            await self._start(None, origin)
            await self._rehearse()

    async def _rehearse(self) -> None:
        """What comes first after a claim, some times: under emulation, new code takes long."""
        for _ in range(_REHEARSALS):
            await self._introduce(self._entry.token, new_token(), moved=False)
            assert self._guest is not None
            with contextlib.suppress(SandmartinError):
                async for _event in self._guest.start(Command(cmd="/bin/true", timeout_s=10)):
                    pass

    async def claim(self, spec: SandboxSpec, envs: Mapping[str, str]) -> None:
        """What was prepared becomes the sandbox of `spec`; what fails leaves nothing behind."""
        async with self._measured(), self._or_nothing():
            self._machine.data.rename(self.sandbox_id, spec.sandbox_id)
            self._step("create:renamed")
            self._entry = replace(self._entry, spec=spec)
            self._microvm.move(self._paths.vm)
            now, vm = time.time(), self._microvm.running.record
            group = self._microvm.group
            self._record(envs=envs, created_at=now, last_active_at=now, vm=vm, group=group)
            self._step("create:claimed")
            await self._microvm.narrow(self._entry.network)
            await self._introduce(self._entry.token, new_token(), envs=envs, moved=False)
            self._begin()

    @contextlib.asynccontextmanager
    async def _or_nothing(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            # Shielded: an agent that is told to stop still undoes what it began.
            await asyncio.shield(self._undo())
            raise

    async def _start(self, envs: Mapping[str, str] | None, origin: disk.Image | Snapshot) -> None:
        """Start its VM from the origin, with an identity of its own."""
        step, spec = self._step, self._entry.spec
        self._become(State.STARTING)
        step("create:recorded")
        if isinstance(origin, Snapshot):
            await self._restore_from(origin, envs)
            old_token = origin.manifest.token
        else:
            self._record(image=origin.path, envs=envs or {})
            await self._new_top(spec.disk_size_mb)
            step("create:layer")
            shape = Shape(vcpus=spec.vcpus, memory_mb=spec.memory_mb)
            await self._microvm.boot(shape, self._disk)
            old_token = ""
        await self._introduce(old_token, new_token(), envs=envs, moved=True)
        if not isinstance(origin, Snapshot):
            self.clock.mark("boot")
            await self._start_up()
            self.clock.mark("services")

    async def _start_up(self) -> None:
        """After a boot: have what its image starts run and be ready."""
        assert self._guest is not None and self._entry.image is not None
        await self._microvm.start_up(self._guest, Traits.of(self._entry.image))

    def _begin(self) -> None:
        """It knows who it is and can be used."""
        self._step("create:confirmed")
        self._become(State.RUNNING)
        self._run()
        self._step("create:running")

    async def _restore_from(self, origin: Snapshot, envs: Mapping[str, str] | None) -> None:
        manifest, spec = origin.manifest, self._entry.spec
        kept = manifest.envs if envs is None else envs
        self._record(image=manifest.image, layers=manifest.layers, envs=kept)
        # The device state is that of a disk of this size.
        await self._new_top(manifest.disk_size_mb)
        self._step("create:layer")
        await self._microvm.restore(origin, self._disk, self._take_waiting)
        await self._microvm.running.cont()
        if spec.disk_size_mb > manifest.disk_size_mb:
            await self._microvm.running.resize_disk(spec.disk_size_mb << 20)

    async def _introduce(
        self, old_token: str, token: str, *, envs: Mapping[str, str] | None = None, moved: bool
    ) -> None:
        """Tell the guest who it is now. With `moved` it is in another place than it believes."""
        self._record(token=token)
        # Nobody talks to a guest that does not know yet who it is.
        guest, self._guest = self._guest, None
        if guest is None:
            guest = self._machine.guest(self.host_ip, old_token or token)
        identity = Identity(
            sandbox_id=self.sandbox_id,
            template=self._entry.spec.template,
            hostname=self.sandbox_id,
            machine_id=hashlib.sha256(self.sandbox_id.encode()).hexdigest()[:32],
            token=token,
            envs=envs,
            root_bytes=self._entry.spec.disk_size_mb << 20,
            moved=moved,
            default_user=self._entry.spec.default_user,
            default_workdir=self._entry.spec.default_workdir,
        )
        deadline_s = self._machine.settings.boot_timeout_s
        try:
            version = await self._microvm.introduce(guest, identity, deadline_s)
        except BaseException:
            await guest.close()
            raise
        # Written with what every introduction is followed by.
        self._entry = replace(self._entry, envd_version=version)
        self._guest = guest

    def _run(self) -> None:
        """It runs: watch its VM and sample it."""
        self._watch = self._machine.tasks.watch(f"watch {self.sandbox_id}", self._watch_vm())
        self._machine.sampler.add(self.sandbox_id, self)

    # Pausing and resuming.

    async def pause(self, *, idle_s: float | None = None, auto: bool = False) -> None:
        """Put memory and disk to sleep, and free processor and RAM. Paused already is success.

        With `idle_s` only if it has idled that long. Raises Conflict, DiskFull.
        """
        async with self._measured():
            if self.state is State.PAUSED or (idle_s is not None and self.idle_s < idle_s):
                return
            self._require_running()
            with self._all_or_nothing():
                self._become(State.PAUSING)
            self._step("pause:recorded")
            await self._put_to_sleep(auto=auto)

    async def make_template(self, path: Path) -> Snapshot:
        """A snapshot at `path` that others start from; the sandbox itself is paused.

        Raises Conflict, DiskFull.
        """
        async with self._measured():
            self._require_running()
            with self._all_or_nothing():
                self._become(State.SNAPSHOTTING)
            self._step("pause:recorded")
            await self._put_to_sleep(template=path)
            return self._machine.storage.snapshots.read(path)

    async def _sync(self) -> None:
        guest = self._require_guest()
        try:
            await guest.sync(_SYNC_S)
        except Unimplemented:
            # One that was frozen by an earlier release; an image without the command has none.
            async for _ in guest.start(Command(cmd="sync", timeout_s=int(_SYNC_S))):
                pass

    async def flatten(self, target: Path) -> None:
        """Write its whole disk as an image to `target`, and end it; if that fails, it sleeps.

        Raises Conflict, DiskFull.
        """
        await self.resume()
        # Its memory is dropped, so what the guest has not written yet must be.
        await self._sync()
        async with self._lock:
            self._require_running()
            with self._all_or_nothing():
                self._become(State.SNAPSHOTTING, flattens_to=target)
            self._step("pause:recorded")
            try:
                await self._put_to_sleep(seal=True)
                entry = self._entry
                assert entry.image is not None
                # Before the image, which is there once it is whole.
                if (traits := Traits.of(entry.image)) != Traits():
                    traits.write(target)
                await self._machine.storage.layers.flatten(entry.image, entry.layers, target)
            except BaseException:
                with self._disk_may_be_full():
                    self._record(flattens_to=None)
                raise
            # From here on the next agent, too, removes the sandbox.
            self._step("flatten:written")
            await self._remove()

    async def _put_to_sleep(
        self, *, seal: bool = False, template: Path | None = None, auto: bool = False
    ) -> None:
        """Stop the VM, write its snapshot, and end it. It goes on if the writing fails.

        Once the snapshot stands, the sandbox is paused: an agent that finds it finishes the rest.
        """
        seal = seal or template is not None
        try:
            await self._stop_watching()
            await self._settle_layers()
            frozen = await self._microvm.freeze(cont=False)
            self._step("pause:frozen")
            await asyncio.to_thread(files.sync, self._paths.layer(self._entry.top))
            layers = (*self._entry.layers, self._entry.top) if seal else self._entry.layers
            if template is not None:
                await self._write(frozen, template, layers=layers)
                self._step("pause:template")
            await self._write(frozen, self._paths.paused, layers=layers)
        except BaseException:
            await asyncio.shield(self._go_on(template))
            raise
        self._step("pause:written")
        await asyncio.shield(self._fall_asleep(auto=auto))

    async def _go_on(self, template: Path | None) -> None:
        """After a failed pause: the VM runs as before."""
        for path in (template, self._paths.paused):
            if path is not None:
                await asyncio.to_thread(remove_snapshot, path)
        with self._disk_may_be_full():
            self._become(State.RUNNING)
        with contextlib.suppress(SandmartinError):
            await self._microvm.running.cont()
        self._run()

    async def _fall_asleep(self, *, auto: bool = False) -> None:
        """What is left to do once the snapshot of a pause stands."""
        snapshot = self._machine.storage.snapshots.read(self._paths.paused)
        layers, top = snapshot.manifest.layers, self._entry.top
        if top in layers:
            self._machine.storage.layers.seal(self._paths.layer(top))
            await self._machine.storage.layers.sync([top])
            top = ""
        with self._disk_may_be_full():
            self._become(
                State.PAUSED,
                sync=True,
                layers=layers,
                top=top,
                sleeps_in="paused",
                auto_paused=auto,
            )
        self._step("pause:paused")
        await self._leave_host("pause")

    async def _write(
        self, frozen: Frozen, path: Path, *, layers: tuple[str, ...], comment: str = ""
    ) -> Snapshot:
        """Write a freeze as a snapshot that survives a power cut."""
        entry, snapshots = self._entry, self._machine.storage.snapshots
        assert entry.image is not None

        def write_pages(draft: Draft) -> Written:
            pages = self._microvm.pages(frozen)
            return write_diff(draft.diff, frozen.base, frozen.runs, pages, sync=True)

        async with snapshots.draft(path) as draft:
            manifest = Manifest(
                platform=self._machine.platform,
                template=entry.spec.template,
                vcpus=entry.spec.vcpus,
                memory_mb=entry.spec.memory_mb,
                disk_size_mb=entry.spec.disk_size_mb,
                image=entry.image,
                layers=layers,
                base=frozen.base.digest,
                diff=await asyncio.to_thread(write_pages, draft),
                state=state_digest(frozen.state),
                token=entry.token,
                envs=dict(entry.envs),
                network=entry.network,
                comment=comment,
                created_at=time.time(),
            )
            self._step("write:pages")
            snapshot = await snapshots.finish(draft, path, manifest, frozen.state)
            self._step("write:whole")
            return snapshot

    async def _leave_host(self, operation: str) -> None:
        """Give back processor, RAM and network place; the files stay."""
        await self._let_go()
        await self._microvm.end(self._entry.vm, self._entry.slot, operation)
        if self._entry.vm is not None or self._entry.slot is not None:
            with self._disk_may_be_full():
                self._record(vm=None, ram=None, slot=None, group="")
        self._microvm = self._new_microvm(operation)
        self._step(f"{operation}:left")

    async def resume(self, timeout_s: int | None = None) -> None:
        """Wake it up, with a new idle limit if one is given. Running already is success.

        Raises Conflict, Exhausted; it then still sleeps.
        """
        async with self._measured():
            if self.state is State.RUNNING:
                return
            if self.state is not State.PAUSED:
                raise self._unusable()
            if self._entry.vm is not None:
                # A VM that could not be ended when it fell asleep must be gone first.
                await self._leave_host("resume")
            spec = self._entry.spec
            if timeout_s is not None:
                spec = replace(spec, timeout_s=timeout_s)
            with self._all_or_nothing():
                self._become(State.RESUMING, spec=spec, auto_paused=False)
            await self._wake("resume")

    # Its checkpoints.

    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        """Forget a checkpoint. Raises NotFound, and Conflict while it sleeps in it."""
        async with self._lock:
            checkpoint = self.get_checkpoint(checkpoint_id)
            if self._entry.sleeps_in.endswith(f"/{checkpoint_id}"):
                raise Conflict(
                    f"sandbox {self.sandbox_id} sleeps in checkpoint {checkpoint_id}",
                    hint="resume it first",
                )
            await asyncio.to_thread(checkpoint.remove)

    async def rollback(self, checkpoint_id: str) -> None:
        """Return to a checkpoint, in memory and on disk; what came after it is gone.

        Raises NotFound, Conflict.
        """
        async with self._measured():
            checkpoint = self.get_checkpoint(checkpoint_id)
            if self.state not in {State.RUNNING, State.PAUSED}:
                raise self._unusable()
            checkpoint.manifest.platform.check(self._machine.platform, "the checkpoint")
            old_top = self._entry.top
            with self._all_or_nothing():
                if self.state is State.RUNNING:
                    self._become(State.PAUSING)
                # From here on it is what it was then, asleep until it is woken.
                self._entry = replace(self._entry, state=State.PAUSED)
                self._record(
                    sync=True,
                    layers=checkpoint.manifest.layers,
                    top="",
                    token=checkpoint.manifest.token,
                    sleeps_in=f"{self._paths.checkpoints.name}/{checkpoint_id}",
                    moved=True,
                )
            self._step("rollback:recorded")
            await self._leave_host("rollback")
            if old_top:
                self._paths.layer(old_top).unlink(missing_ok=True)
            await asyncio.to_thread(remove_snapshot, self._paths.paused)
            with self._all_or_nothing():
                self._become(State.RESUMING)
            await self._wake("rollback")

    async def _wake(self, operation: str) -> None:
        """Start the VM as it slept. It sleeps on if that fails before it has run."""
        self._step(f"{operation}:waking")
        self._microvm = self._new_microvm(operation)
        try:
            if not self._entry.top:
                await self._new_top(self._entry.spec.disk_size_mb)
            booted = await self._restore_or_boot(operation)
            # From here on the VM runs, and what it slept in is void.
            with self._all_or_nothing():
                self._become(State.RUNNING, sync=True, sleeps_in="", introduced=False)
        except BaseException:
            await asyncio.shield(self._sleep_on(operation))
            raise
        self._step(f"{operation}:committed")
        self.touch()
        await self._go_on_as_itself()
        if booted:
            self.clock.mark("boot")
        self._step(f"{operation}:confirmed")
        if booted:
            await self._start_up_again()
            self.clock.mark("services")
        self._run()
        await asyncio.to_thread(remove_snapshot, self._paths.paused)
        self._step(f"{operation}:running")

    async def _go_on_as_itself(self) -> None:
        """Let a VM that stood still run, and tell its guest who it is and what time it is."""
        entry = self._entry
        try:
            await self._microvm.running.cont()
            token = entry.token or new_token()
            await self._introduce(entry.token, token, envs=entry.envs, moved=entry.moved)
        except SandmartinError as error:
            self._fail(f"it did not come back: {error.message}")
            raise
        with self._disk_may_be_full():
            self._record(introduced=True, moved=False)

    async def _start_up_again(self) -> None:
        """What its image starts is started anew; where that fails its files are there at least."""
        try:
            await self._start_up()
        except SandmartinError as error:
            _log.warning("sandbox %s does not start all it should: %s", self.sandbox_id, error)

    async def _restore_or_boot(self, operation: str) -> bool:
        """Memory and disk as they were; where the memory does not fit any more, the disk.

        Whether it booted.
        """
        entry = self._entry
        try:
            if not entry.sleeps_in:
                raise NotFound("its memory was lost")
            snapshot = self._machine.storage.snapshots.read(self._paths.path / entry.sleeps_in)
            await self._microvm.restore(snapshot, self._disk, self._take_waiting)
            return False
        except (NotFound, Conflict, Invalid) as error:
            _log.warning("sandbox %s starts from its disk: %s", self.sandbox_id, error)
            await self._leave_host(operation)
            self._record(token="")
            shape = Shape(vcpus=entry.spec.vcpus, memory_mb=entry.spec.memory_mb)
            await self._microvm.boot(shape, self._disk)
            return True

    async def _sleep_on(self, operation: str) -> None:
        """After a failed resume: nothing has run, and it sleeps as before."""
        try:
            await self._leave_host(operation)
            with self._disk_may_be_full():
                self._become(State.PAUSED, sync=True)
        except SandmartinError as error:
            self._fail(f"it could not be resumed: {error}")

    # Snapshots of a VM that goes on.

    async def snapshot(self, path: Path, comment: str = "") -> Snapshot:
        """A snapshot at `path` of the sandbox, which goes on. Raises Conflict, DiskFull."""
        async with self._measured():
            self._require_running()
            await self._settle_layers()
            layers = self._machine.storage.layers
            top = await layers.create(self._paths.path, self._entry.spec.disk_size_mb)
            self._record(next_top=top.stem)
            self._step("snapshot:recorded")
            try:
                frozen = await self._microvm.freeze(top=top)
                self._step("snapshot:frozen")
            finally:
                await asyncio.shield(self._settle_layers())
            self._step("snapshot:sealed")
            try:
                await layers.sync(self._entry.layers[-1:])
                return await self._write(frozen, path, layers=self._entry.layers, comment=comment)
            finally:
                self._microvm.forget_buffer()

    async def checkpoint(self, comment: str) -> Snapshot:
        """A snapshot that stays in its own history."""
        self._paths.checkpoints.mkdir(mode=0o700, exist_ok=True)
        return await self.snapshot(self._paths.checkpoints / f"cp{random_id(12)}", comment)

    # Folding. Whoever changes what it is made of holds `lifecycle`.

    @property
    def lifecycle(self) -> asyncio.Lock:
        """The lock that orders its life cycle."""
        return self._lock

    def replace_layers(self, layers: tuple[str, ...]) -> None:
        """Have other sealed layers, which hold the same. Raises DiskFull."""
        with self._all_or_nothing():
            self._record(sync=True, layers=layers)

    async def relink(self) -> None:
        """Have the VM, if it runs, use the layers that the entry names."""
        if self.state is State.RUNNING:
            await self._microvm.running.relink(self._disk)

    # Adopting.

    async def adopt(self) -> None:
        """Win back what an earlier agent left: a running VM goes on, anything else is settled.

        A sandbox that was half made or half destroyed is removed, one that was half put to sleep
        runs, one that was half woken sleeps; one that cannot be used or removed becomes `error`
        with the reason.
        """
        async with self._lock:
            try:
                await self._adopt()
            except (SandmartinError, OSError) as error:
                _log.error("sandbox %s cannot be adopted: %s", self.sandbox_id, error)
                # One that sleeps has all it needs; what could not be ended yet is ended first when
                # it is woken.
                if self.state is not State.PAUSED:
                    self._fail(str(error))

    async def _adopt(self) -> None:
        self._clean()
        if self._is_flattened():
            await self._remove()
            return
        match self.state:
            case State.RUNNING | State.ERROR:
                await self._win_back()
            case State.PAUSING | State.SNAPSHOTTING:
                await self._finish_or_undo_pause()
            case State.PAUSED:
                await self._leave_host("pause")
            case State.RESUMING:
                await self._sleep_on("resume")
            case _:
                await self._remove()

    def _clean(self) -> None:
        """Remove what was being written when the agent ended."""
        for directory in (self._paths.path, self._paths.checkpoints):
            for path in directory.glob(".*"):
                remove(path)
        entry = self._entry
        for path in self._paths.path.glob("layer-*.qcow2"):
            if path.stem not in {entry.top, entry.next_top}:
                remove(path)

    def _is_flattened(self) -> bool:
        """Whether its disk has become an image, which ends a sandbox. An image appears whole."""
        target = self._entry.flattens_to
        if target is None:
            return False
        if target.exists():
            return True
        with self._disk_may_be_full():
            self._record(flattens_to=None)
        return False

    async def _finish_or_undo_pause(self) -> None:
        if self._snapshots(self._paths.path):
            await self._fall_asleep()
        else:
            self._become(State.RUNNING)
            await self._win_back()

    async def _win_back(self) -> None:
        entry, machine, vm = self._entry, self._machine, self._microvm
        if entry.slot is not None:
            vm.slot = machine.network.adopted(entry.slot)
        alive = entry.vm is not None and entry.ram is not None
        if alive:
            assert entry.vm is not None and entry.ram is not None
            alive = await vm.adopt(entry.vm, entry.ram, entry.spec.memory_mb)
        if not alive:
            await self._note_loss()
            return
        if self.state is not State.RUNNING:
            return
        if vm.slot is None:
            self._fail("its place in the network is gone")
            return
        await machine.network.keep(vm.slot, entry.network)
        await self._settle_layers()
        await asyncio.to_thread(remove_snapshot, self._paths.paused)
        if await vm.running.status() is VmStatus.STOPPED:
            # The agent ended in the middle of a freeze, or before a waking VM went on; the
            # guest's clock has stood still since.
            with self._disk_may_be_full():
                self._record(introduced=False)
        if self._entry.introduced:
            self._guest = machine.guest(self.host_ip, self._entry.token)
        else:
            await self._go_on_as_itself()
        self._run()

    async def _note_loss(self) -> None:
        """Its VM is gone. With the host's power its memory was lost, and its files were not."""
        if self.state is not State.RUNNING:
            return
        if self._entry.boot_id == boot_id():
            self._fail("its VM ended while no agent was running")
            return
        await self._settle_layers_left()
        reason = "its host was restarted: its files are kept, its memory is lost"
        self._become(State.PAUSING)
        self._become(State.PAUSED, reason, sync=True, sleeps_in="")
        await self._leave_host("pause")

    # Ending.

    async def destroy(self) -> None:
        """End the VM and give back all the sandbox held. Idempotent."""
        async with self._lock:
            if self.state is not State.STOPPED:
                await self._remove()

    async def _undo(self) -> None:
        """Remove what a failed create made; the error to tell is the create's own."""
        try:
            await self._remove()
        except SandmartinError as error:
            _log.error("sandbox %s: %s", self.sandbox_id, error)

    async def _remove(self) -> None:
        """Give back whatever the entry names. Idempotent; what fails can be tried again."""
        if self.state is not State.STOPPING:
            # A full disk must not keep anybody from making room on it.
            with self._disk_may_be_full():
                self._become(State.STOPPING, sync=True)
        self._step("destroy:recorded")
        try:
            await self._give_back()
        except (SandmartinError, OSError) as error:
            self._fail(f"it could not be removed: {error}")
            raise
        # Not recorded: with the files, the entry is gone.
        self._entry = replace(self._entry, state=State.STOPPED, vm=None, token="", reason="")

    async def _give_back(self) -> None:
        """The VM first, the files last."""
        machine = self._machine
        await self._let_go()
        await self._microvm.end(self._entry.vm, self._entry.slot, "destroy")
        machine.step("destroy:ended")
        # Before anything else runs: the slot may be another sandbox's in a moment, and must
        # not be taken from it by whoever reads this entry.
        with self._disk_may_be_full():
            self._record(slot=None)
        machine.step("destroy:slot")
        await asyncio.to_thread(machine.data.remove, self.sandbox_id)
        machine.step("destroy:files")

    async def _let_go(self) -> None:
        """Stop watching and talking to the VM, without ending it."""
        await self._stop_watching()
        if self._guest is not None:
            await self._guest.close()
            self._guest = None

    async def _stop_watching(self) -> None:
        self._machine.sampler.suspend(self.sandbox_id)
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
            await asyncio.wait({self._watch})
            self._watch = None

    async def release(self) -> None:
        """The agent ends and the VM goes on: keep its entry true and let go."""
        async with self._lock:
            with self._disk_may_be_full():
                self.save_activity()
            await self._let_go()
            if self._microvm.vm is not None:
                await self._microvm.vm.close()
            self._microvm.let_go()

    async def _watch_vm(self) -> None:
        await self._microvm.running.wait_gone()
        self._note_end()

    async def check_disk_space(self, *, has_space: bool) -> None:
        """Notice that the host's full disk stopped the VM; let it go on if the host `has_space`."""
        vm = self._microvm.vm
        if vm is None or self._lock.locked() or self.state is not State.RUNNING:
            return
        async with self._lock:
            self._disk_full = await vm.status() is VmStatus.DISK_FULL
            if self._disk_full and has_space:
                # The host's space may end again before the VM's writes do.
                with contextlib.suppress(DiskFull):
                    await vm.cont()
                    self._disk_full = False
                    _log.info("sandbox %s goes on: the disk has space again", self.sandbox_id)
