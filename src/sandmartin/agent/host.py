"""The host: the table of its sandboxes, what it may still give away, and its recovery at start.

An operation belongs to the host: a caller that hangs up ends its waiting and nothing else. What
a sandbox will hold is counted from the moment it stands in the table, so that admission cannot
be passed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from sandmartin.agent import disk
from sandmartin.agent.journal import Entry
from sandmartin.agent.limits import OVERHEAD_MB
from sandmartin.agent.sandbox import Machine, Sandbox
from sandmartin.errors import (
    AlreadyExists,
    DiskFull,
    Exhausted,
    NotFound,
    SandmartinError,
    Unavailable,
)
from sandmartin.model import SandboxSpec, State

_log = logging.getLogger(__name__)


class Host:
    """All sandboxes of one machine's agent."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._sandboxes: dict[str, Sandbox] = {}
        self._closing = False
        self._termination: asyncio.Task[None] | None = None
        #: Set once `terminate` is through and the agent has nothing left to do.
        self.terminated = asyncio.Event()

    async def open(self) -> None:
        """Adopt what runs, finish or undo what was half done, remove what nobody owns."""
        machine = self._machine
        machine.groups.open()
        await self._read_journal()
        slots = [s.entry.slot for s in self._sandboxes.values() if s.entry.slot is not None]
        await machine.network.start(slots)
        await asyncio.gather(*(sandbox.adopt() for sandbox in self._sandboxes.values()))
        self._forget_stopped()
        machine.tasks.watch("disk space", self._check_disk_space())
        machine.tasks.watch("activity", self._save_activity())

    async def _read_journal(self) -> None:
        """Fill the table, and end what no entry speaks for."""
        data, groups = self._machine.data, self._machine.groups
        strays = groups.list()
        for sandbox_id, entry in data.read_all():
            if entry is None:
                # Killed before the first entry was whole, or damaged since.
                strays.add(sandbox_id)
            else:
                strays.discard(sandbox_id)
                self._sandboxes[sandbox_id] = Sandbox(self._machine, entry)
        for sandbox_id in strays:
            groups.kill(sandbox_id)
            try:
                await asyncio.to_thread(groups.remove, sandbox_id)
                await asyncio.to_thread(data.remove, sandbox_id)
            except SandmartinError as error:
                _log.error("what is left of sandbox %s stays: %s", sandbox_id, error)

    async def close(self) -> None:
        """End the agent; the VMs run on and the next agent adopts them."""
        self._closing = True
        if self._termination is not None:
            await asyncio.wait({self._termination})
        await self._machine.tasks.close()
        for sandbox in self.list():
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
        # A create in flight ends first, so that nothing is born behind the last destroy.
        await self._machine.tasks.settle()
        try:
            await self._destroy_all()
        except BaseException:
            self._closing = False
            raise
        try:
            await self._machine.tasks.close()
            await self._machine.network.destroy_all()
            self._machine.groups.close()
        except SandmartinError as error:
            _log.error("the agent leaves something behind: %s", error)
            raise
        finally:
            # Without its watches the agent must end, whatever is left.
            self.terminated.set()

    async def _destroy_all(self) -> None:
        """Destroy every sandbox that can be; raises the first error of those that cannot."""
        sandboxes = self.list()
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

    # The table.

    def list(self) -> list[Sandbox]:
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

    # Operations.

    async def create(self, spec: SandboxSpec, envs: Mapping[str, str]) -> Sandbox:
        """Boot a new sandbox. Raises NotFound, AlreadyExists, Exhausted, Invalid, ToolFailed."""
        if self._closing:
            raise Unavailable("this agent is ending", hint="try again once it has started anew")
        self._machine.images.get(spec.template)
        if spec.sandbox_id in self._sandboxes:
            raise AlreadyExists(f"sandbox {spec.sandbox_id} exists already")
        self._admit(spec)
        now = time.time()
        entry = Entry(spec=spec, state=State.PENDING, created_at=now, last_active_at=now)
        self._machine.data.create(entry)
        self._machine.step("create:entry")
        sandbox = self._sandboxes[spec.sandbox_id] = Sandbox(self._machine, entry)
        await self._machine.tasks.operate(f"create {spec.sandbox_id}", self._create(sandbox, envs))
        return sandbox

    async def _create(self, sandbox: Sandbox, envs: Mapping[str, str]) -> None:
        try:
            await sandbox.create(envs)
        finally:
            self._forget_stopped()

    async def destroy(self, sandbox_id: str) -> None:
        """End a sandbox and free all it held. Already gone is success."""
        if (sandbox := self._sandboxes.get(sandbox_id)) is not None:
            await self._machine.tasks.operate(f"destroy {sandbox_id}", self._destroy(sandbox))

    async def _destroy(self, sandbox: Sandbox) -> None:
        await sandbox.destroy()
        self._forget_stopped()

    # Admission.

    def _admit(self, spec: SandboxSpec) -> None:
        settings = self._machine.settings
        cpus = os.cpu_count() or 1
        if spec.vcpus > cpus:
            raise Exhausted(
                f"vcpus is {spec.vcpus}, but this host has {cpus}", hint=f"use 1 to {cpus}"
            )
        taken = [s.entry.spec for s in self._sandboxes.values() if s.state is not State.STOPPED]
        vcpus_left = int(cpus * settings.cpu_overcommit) - sum(s.vcpus for s in taken)
        if spec.vcpus > vcpus_left:
            raise Exhausted(
                f"{spec.vcpus} vCPUs are asked for and {vcpus_left} are left on this host",
                hint="destroy sandboxes, or raise SANDMARTIN_CPU_OVERCOMMIT",
            )
        overhead_mb = OVERHEAD_MB[self._machine.accel]
        total_mb = memory_total_mb() - settings.memory_reserve_mb
        memory_left_mb = total_mb - sum(s.memory_mb + overhead_mb for s in taken)
        if spec.memory_mb + overhead_mb > memory_left_mb:
            raise Exhausted(
                f"{spec.memory_mb} MB of memory (and {overhead_mb} MB for the monitor) are asked"
                f" for and {max(0, memory_left_mb)} MB are left on this host",
                hint="use less memory, or destroy sandboxes",
            )
        disk.check_free(self._machine.data.path, settings.disk_floor_mb)

    # What is looked after all the time.

    async def _check_disk_space(self) -> None:
        """Let sandboxes that stopped for want of host disk space go on once there is some."""
        enough_mb = self._machine.settings.disk_floor_mb // 2
        while True:
            await asyncio.sleep(self._machine.patience.disk_check_s)
            has_space = disk.free_mb(self._machine.data.path) >= enough_mb
            # At once: a monitor that does not answer must not keep the others waiting.
            await asyncio.gather(*(_check_disk_space(each, has_space) for each in self.list()))

    async def _save_activity(self) -> None:
        while True:
            await asyncio.sleep(self._machine.patience.activity_save_s)
            for sandbox in self.list():
                # It is tried again soon, and who needs the space hears of it.
                with contextlib.suppress(DiskFull):
                    sandbox.save_activity()


async def _check_disk_space(sandbox: Sandbox, has_space: bool) -> None:
    try:
        await sandbox.check_disk_space(has_space=has_space)
    except SandmartinError as error:
        _log.warning("sandbox %s: %s", sandbox.sandbox_id, error)


def memory_total_mb() -> int:
    """The host's memory, from /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0
