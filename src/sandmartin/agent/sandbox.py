"""One sandbox: a VM, its disk layer, its network slot and its control group.

What a sandbox holds can be found from its journal entry and its id alone, and one idempotent
teardown gives it all back: after a failed create, on destroy, and when the next agent finds what
a killed one left. One lock orders the life cycle; commands and files do not take it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sandmartin.agent import disk
from sandmartin.agent.disk import ImageStore
from sandmartin.agent.guest import Command, Guest, Identity, ProcessEvent
from sandmartin.agent.journal import DataDir, Entry, SandboxDir
from sandmartin.agent.limits import Allowance, ControlGroups
from sandmartin.agent.network import Network, Slot
from sandmartin.agent.tasks import Tasks
from sandmartin.agent.vmm import Vm, Vmm, VmSpec, VmStatus
from sandmartin.errors import (
    Conflict,
    DiskFull,
    GuestSilent,
    SandmartinError,
    TimedOut,
    ToolFailed,
)
from sandmartin.model import Accel, Settings, State, check_transition

_log = logging.getLogger(__name__)

_CONSOLE_TAIL = 600
#: States that outlive the agent; what it finds in any other was being made or removed.
_SETTLED = frozenset({State.RUNNING, State.PAUSED, State.ERROR})


class GuestFactory(Protocol):
    """Makes the client of a guest agent from its address, port and access token."""

    def __call__(self, address: str, token: str) -> Guest: ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often and how long a host waits for what may yet come right."""

    #: A guest that fails this many health checks in a row is given up.
    health_tries: int = 3
    health_deadline_s: float = 5.0
    #: Between two checks: one that is refused at once says little.
    health_pause_s: float = 1.0
    #: How often sandboxes that stand still for want of disk space are looked at.
    disk_check_s: float = 2.0
    #: How old the last activity on disk may be, which is all that a killed agent leaves of it.
    activity_save_s: float = 15.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a host has to make sandboxes with."""

    settings: Settings
    data: DataDir
    images: ImageStore
    network: Network
    groups: ControlGroups
    vmm: Vmm
    accel: Accel
    kernel: Path
    initramfs: Path
    tasks: Tasks
    guest: GuestFactory = Guest
    patience: Patience = Patience()
    #: Called with the name of each step of an operation once it is done.
    step: Callable[[str], None] = lambda _: None


class Sandbox:
    """One sandbox of this host. Made by `Host`."""

    def __init__(self, machine: Machine, entry: Entry) -> None:
        self._machine = machine
        self._entry = entry
        self._lock = asyncio.Lock()
        self._slot: Slot | None = None
        self._vm: Vm | None = None
        self._guest: Guest | None = None
        self._watch: asyncio.Task[None] | None = None
        self._disk_full = False
        self._saved_active_at = entry.last_active_at

    # What it is.

    @property
    def sandbox_id(self) -> str:
        return self._entry.spec.sandbox_id

    @property
    def entry(self) -> Entry:
        return self._entry

    @property
    def state(self) -> State:
        return self._entry.state

    @property
    def reason(self) -> str:
        """Why it cannot be used, empty when it can."""
        if self.state is State.RUNNING and self._disk_full:
            return disk.host_disk_full(self.sandbox_id).message
        return self._entry.reason

    @property
    def host_ip(self) -> str:
        """Address at which the host reaches the guest; empty when it has none."""
        return str(self._slot.host_ip) if self._slot else ""

    @property
    def _paths(self) -> SandboxDir:
        return self._machine.data.sandbox(self.sandbox_id)

    def touch(self) -> None:
        """Reset the idle clock."""
        self._entry = replace(self._entry, last_active_at=time.time())

    def save_activity(self) -> None:
        """Put the last activity on disk unless it is there. Raises DiskFull."""
        # What is being removed must not get a new entry.
        leaving = self.state in {State.STOPPING, State.STOPPED}
        if not leaving and self._entry.last_active_at != self._saved_active_at:
            self._record()

    def _record(self, *, sync: bool = False, **changes: object) -> None:
        """Change the entry, here and on disk. Raises DiskFull, changed here none the less."""
        self._entry = replace(self._entry, **changes)  # type: ignore[arg-type]
        self._machine.data.write(self._entry, sync=sync)
        self._saved_active_at = self._entry.last_active_at

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """For what must go on without its record: the next start finds the truth by itself."""
        try:
            yield
        except DiskFull as error:
            _log.warning("sandbox %s: not in its journal: %s", self.sandbox_id, error)

    def _become(self, state: State, reason: str = "", *, sync: bool = False) -> None:
        """The only place where the state changes. Raises Conflict, DiskFull."""
        check_transition(self.state, state, f"sandbox {self.sandbox_id}")
        _log.info("sandbox %s: %s -> %s %s", self.sandbox_id, self.state, state, reason)
        self._record(sync=sync, state=state, reason=reason)

    def _fail(self, reason: str) -> None:
        """A sandbox that cannot be used any more, but destroyed."""
        if self.state not in {State.ERROR, State.STOPPED}:
            with self._disk_may_be_full():
                self._become(State.ERROR, reason)

    # Life.

    async def create(self, envs: Mapping[str, str]) -> None:
        """Boot the VM and confirm its identity; what fails leaves nothing behind.

        `envs` becomes part of every command's environment.
        """
        async with self._lock:
            try:
                await self._create(envs)
            except BaseException:
                # Shielded: an agent that is told to stop still undoes what it began.
                await asyncio.shield(self._undo())
                raise

    async def _create(self, envs: Mapping[str, str]) -> None:
        machine, spec = self._machine, self._entry.spec
        self._become(State.STARTING)
        self._machine.step("create:recorded")
        slot = self._slot = await machine.network.acquire()
        self._record(slot=slot.number)
        machine.step("create:slot")
        # The VM's user may pass through to its layer, and no other VM's user may.
        self._paths.path.chmod(0o710)
        os.chown(self._paths.path, -1, slot.uid)
        image = machine.images.get(spec.template)
        await disk.create_layer(image, self._paths.layer, spec.disk_size_mb, slot.uid)
        machine.step("create:layer")
        allowance = Allowance.of(spec.vcpus, spec.memory_mb, machine.accel)
        groups = machine.groups.create(self.sandbox_id, allowance)
        machine.step("create:group")
        self._vm = await machine.vmm.start(self._vm_spec(slot, groups))
        machine.step("create:started")
        token = secrets.token_hex(20)
        self._record(vm=self._vm.record, token=token)
        machine.step("create:vm")
        self._guest = machine.guest(self.host_ip, token)
        await self._introduce(self._guest, token, envs)
        machine.step("create:confirmed")
        self._become(State.RUNNING)
        self._watch = machine.tasks.watch(f"watch {self.sandbox_id}", self._watch_vm(self._vm))
        machine.step("create:running")

    def _vm_spec(self, slot: Slot, groups: tuple[Path, ...]) -> VmSpec:
        spec, machine = self._entry.spec, self._machine
        return VmSpec(
            run_dir=self._paths.vm,
            vcpus=spec.vcpus,
            memory_mb=spec.memory_mb,
            kernel=machine.kernel,
            initramfs=machine.initramfs,
            command_line=(
                f"sandmartin.addr={slot.guest_ip}/{slot.prefix_length}"
                f" sandmartin.gateway={slot.gateway_ip}"
            ),
            disk=self._paths.layer,
            netns=slot.netns_path,
            tap=slot.tap,
            mac=slot.guest_mac,
            uid=slot.uid,
            accel=machine.accel,
            cgroups=groups,
        )

    async def _introduce(self, guest: Guest, token: str, envs: Mapping[str, str]) -> None:
        """Wait for the guest agent, tell it who it is, and have that confirmed."""
        assert self._vm is not None
        identity = Identity(
            sandbox_id=self.sandbox_id,
            template=self._entry.spec.template,
            hostname=self.sandbox_id,
            machine_id=secrets.token_hex(16),
            token=token,
            envs=envs,
            grow_root=True,
        )
        ended = asyncio.ensure_future(self._vm.wait_gone())
        introduced = asyncio.ensure_future(
            guest.introduce(identity, self._machine.settings.boot_timeout_s)
        )
        try:
            await asyncio.wait({ended, introduced}, return_when=asyncio.FIRST_COMPLETED)
            if not introduced.done():
                raise ToolFailed(f"the VM ended while it booted{await self._last_words()}")
            await introduced
        except TimedOut as error:
            raise TimedOut(f"{error.message}{await self._last_words()}", hint=error.hint) from error
        finally:
            for waiting in (ended, introduced):
                waiting.cancel()
            await asyncio.wait({ended, introduced})

    async def _last_words(self) -> str:
        """The end of the guest's console, for an error message."""
        assert self._vm is not None
        with contextlib.suppress(SandmartinError):
            console = (await self._vm.read_console())[-_CONSOLE_TAIL:]
            if text := console.decode(errors="replace").strip():
                return f"; its console ends with: {text!r}"
        return ""

    async def adopt(self) -> None:
        """Win back what an earlier agent left: a running VM goes on, anything else is settled.

        A sandbox that was half made or half destroyed is removed; one that cannot be used or
        removed becomes `error` with the reason.
        """
        async with self._lock:
            try:
                await (self._win_back() if self.state in _SETTLED else self._remove())
            except SandmartinError as error:
                _log.error("sandbox %s cannot be adopted: %s", self.sandbox_id, error)
                self._fail(error.message)

    async def _win_back(self) -> None:
        entry, machine = self._entry, self._machine
        if entry.slot is not None:
            self._slot = machine.network.adopted(entry.slot)
        if entry.vm is not None:
            self._vm = await machine.vmm.adopt(entry.vm)
        if self._vm is None:
            if self.state is State.RUNNING:
                self._fail("its VM ended while no agent was running")
            return
        self._watch = machine.tasks.watch(f"watch {self.sandbox_id}", self._watch_vm(self._vm))
        if self._slot is None:
            self._fail("its place in the network is gone")
        else:
            self._guest = machine.guest(self.host_ip, entry.token)

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
        self._machine.step("destroy:recorded")
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
        if self._vm is None and self._entry.vm is not None:
            self._vm = await machine.vmm.adopt(self._entry.vm)
        if self._vm is not None:
            await self._vm.kill()
            self._vm = None
        # A VM that was started but not yet recorded is found by its group.
        machine.groups.kill(self.sandbox_id)
        machine.step("destroy:killed")
        await asyncio.to_thread(machine.groups.remove, self.sandbox_id)
        machine.step("destroy:group")
        if self._entry.slot is not None:
            await machine.network.release(self._entry.slot)
            self._slot = None
            # Before anything else runs: the slot may be another sandbox's in a moment, and must
            # not be taken from it by whoever reads this entry.
            with self._disk_may_be_full():
                self._record(slot=None)
            machine.step("destroy:slot")
        await asyncio.to_thread(machine.data.remove, self.sandbox_id)
        machine.step("destroy:files")

    async def _let_go(self) -> None:
        """Stop watching and talking to the VM, without ending it."""
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
            await asyncio.wait({self._watch})
            self._watch = None
        if self._guest is not None:
            await self._guest.close()
            self._guest = None

    async def release(self) -> None:
        """The agent ends and the VM goes on: keep its entry true and let go."""
        async with self._lock:
            with self._disk_may_be_full():
                self.save_activity()
            await self._let_go()
            if self._vm is not None:
                await self._vm.close()

    async def _watch_vm(self, vm: Vm) -> None:
        await vm.wait_gone()
        self._note_end()

    def _note_end(self) -> None:
        if self.state is State.RUNNING:
            self._fail("its VM ended by itself")

    async def check_disk_space(self, *, has_space: bool) -> None:
        """Notice that the host's full disk stopped the VM; let it go on if the host `has_space`."""
        vm = self._vm
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

    # What is done inside it.

    def _require_guest(self) -> Guest:
        if self.state is not State.RUNNING or self._guest is None:
            raise self._unusable()
        if self._disk_full:
            raise disk.host_disk_full(self.sandbox_id)
        self.touch()
        return self._guest

    def _unusable(self) -> Conflict:
        hint = "destroy it; it cannot be used any more" if self.state is State.ERROR else ""
        why = f": {self.reason}" if self.reason else ""
        return Conflict(f"sandbox {self.sandbox_id} is {self.state}{why}", hint=hint)

    @contextlib.asynccontextmanager
    async def _talking(self) -> AsyncIterator[Guest]:
        """The guest agent for one exchange; if it falls silent, find out whether it is dead."""
        guest = self._require_guest()
        try:
            yield guest
        except GuestSilent as error:
            raise await self._explain_silence(guest, error) from error
        finally:
            self.touch()

    async def _explain_silence(self, guest: Guest, error: SandmartinError) -> SandmartinError:
        if self.state is not State.RUNNING or self._vm is None:
            return self._unusable()
        with contextlib.suppress(SandmartinError):
            match await self._vm.status():
                case VmStatus.DISK_FULL:
                    self._disk_full = True
                    return disk.host_disk_full(self.sandbox_id)
                case VmStatus.GONE:
                    self._note_end()
                    return self._unusable()
        if await self._answers(guest):
            return error
        if self.state is not State.RUNNING:
            return self._unusable()
        self._fail("its guest agent does not answer")
        return GuestSilent(
            f"the guest agent of sandbox {self.sandbox_id} does not answer",
            hint="destroy the sandbox; it cannot be used any more",
        )

    async def _answers(self, guest: Guest) -> bool:
        """Whether a guest agent that was silent once answers yet."""
        patience = self._machine.patience
        for attempt in range(patience.health_tries):
            if attempt:
                await asyncio.sleep(patience.health_pause_s)
            if await guest.healthy(patience.health_deadline_s):
                return True
        return False

    async def _active(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Each chunk that passes is activity."""
        async for chunk in chunks:
            self.touch()
            yield chunk

    async def exec(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        """Run a command; events until its end. Who stops listening does not end the command."""
        async with self._talking() as guest, contextlib.aclosing(guest.start(command)) as events:
            async for event in events:
                self.touch()
                yield event

    async def send_input(self, pid: int, chunks: AsyncIterator[bytes]) -> None:
        """Feed a command's standard input, then close it."""
        async with self._talking() as guest:
            async for chunk in chunks:
                self.touch()
                await guest.send_input(pid, chunk)
            await guest.close_input(pid)

    async def signal(self, pid: int, number: int) -> None:
        async with self._talking() as guest:
            await guest.signal(pid, number)

    async def write_file(self, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        async with self._talking() as guest:
            await guest.upload(path, user, self._active(chunks))

    async def read_file(self, path: str, user: str) -> AsyncGenerator[bytes, None]:
        async with (
            self._talking() as guest,
            contextlib.aclosing(guest.download(path, user)) as chunks,
        ):
            async for chunk in chunks:
                self.touch()
                yield chunk
