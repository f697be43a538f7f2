"""The host: the table of its sandboxes, what it may still give away, and its recovery at start.

An operation belongs to the host: a caller that hangs up ends its waiting and nothing else. What
a sandbox will hold is counted from the moment it stands in the table, so that admission cannot
be passed twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from sandmartin.agent import disk
from sandmartin.agent.journal import Entry
from sandmartin.agent.limits import OVERHEAD_MB
from sandmartin.agent.sandbox import Machine, Sandbox
from sandmartin.errors import AlreadyExists, Exhausted, NotFound, SandmartinError, Unavailable
from sandmartin.model import SandboxSpec, State

_log = logging.getLogger(__name__)

#: How often a sandbox that stands still for want of disk space is tried again.
_DISK_RETRY_S = 2.0


class Host:
    """All sandboxes of one machine's agent."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._sandboxes: dict[str, Sandbox] = {}
        self._closing = False

    async def open(self) -> None:
        """Adopt what runs, finish or undo what was half done, remove what nobody owns."""
        machine = self._machine
        machine.groups.open()
        strays = machine.groups.list()
        for sandbox_id, entry in machine.data.read_all():
            strays.discard(sandbox_id)
            if entry is None:
                # Killed before the first entry was whole: only the directory can be there.
                machine.data.remove_directory(sandbox_id)
            else:
                self._sandboxes[sandbox_id] = Sandbox(machine, entry)
        for sandbox_id in strays:
            machine.groups.kill(sandbox_id)
            await asyncio.to_thread(machine.groups.remove, sandbox_id)
        slots = [s.entry.slot for s in self._sandboxes.values() if s.entry.slot is not None]
        await machine.network.start(slots)
        await asyncio.gather(*(sandbox.adopt() for sandbox in self._sandboxes.values()))
        self._forget_stopped()
        machine.tasks.watch("disk space", self._retry_full_disks())

    async def close(self) -> None:
        """End the agent; the VMs run on and the next agent adopts them."""
        self._closing = True
        await self._machine.tasks.close()
        for sandbox in self._sandboxes.values():
            await sandbox.release()
        await self._machine.network.close()

    async def terminate(self) -> None:
        """Destroy every sandbox and give back all the agent made on this machine."""
        self._closing = True
        # A create in flight ends first, so that nothing is born behind the last destroy.
        await self._machine.tasks.settle()
        await asyncio.gather(*(sandbox.destroy() for sandbox in self._sandboxes.values()))
        self._forget_stopped()
        await self._machine.tasks.close()
        await self._machine.network.destroy_all()
        self._machine.groups.close()

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

    # Disk space.

    async def _retry_full_disks(self) -> None:
        """Let sandboxes that stopped for want of host disk space go on once there is some."""
        floor_mb = self._machine.settings.disk_floor_mb // 2
        while True:
            await asyncio.sleep(_DISK_RETRY_S)
            if disk.free_mb(self._machine.data.path) < floor_mb:
                continue
            for sandbox in self.list():
                try:
                    await sandbox.continue_after_full_disk()
                except SandmartinError as error:
                    _log.warning("sandbox %s: %s", sandbox.sandbox_id, error)


def memory_total_mb() -> int:
    """The host's memory, from /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0
