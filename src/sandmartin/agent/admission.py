"""Admission: whether a host still has what one more sandbox will hold.

Memory is never promised twice: each sandbox counts with all its memory and its monitor's. CPUs
are shared, up to a factor. Of the disk a floor is kept free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sandmartin import __version__
from sandmartin.agent import disk
from sandmartin.agent.limits import OVERHEAD_MB
from sandmartin.agent.machine import Machine
from sandmartin.errors import Exhausted
from sandmartin.model import SandboxSpec


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a host is, and what it has for sandboxes. The names are the wire's."""

    cpus: int
    #: For all sandboxes together.
    memory_mb: int
    #: What each of them takes beside its own memory.
    memory_overhead_mb: int
    disk_free_mb: int
    cpu_overcommit: float
    accel: str
    vmm_version: str
    agent_version: str
    #: Sandboxes in these states.
    running: int
    paused: int


def describe(machine: Machine, *, running: int, paused: int) -> Description:
    return Description(
        cpus=os.cpu_count() or 1,
        memory_mb=max(0, memory_left_mb(machine, ())),
        memory_overhead_mb=OVERHEAD_MB[machine.accel],
        disk_free_mb=disk.free_mb(machine.data.path),
        cpu_overcommit=machine.settings.cpu_overcommit,
        accel=machine.accel,
        vmm_version=machine.platform.vmm_version,
        agent_version=__version__,
        running=running,
        paused=paused,
    )


def check_room(machine: Machine, spec: SandboxSpec, taken: Iterable[SandboxSpec]) -> None:
    """Raises Exhausted when `spec` does not fit beside what is `taken`."""
    taken = list(taken)
    settings = machine.settings
    cpus = os.cpu_count() or 1
    if spec.vcpus > cpus:
        raise Exhausted(f"vcpus is {spec.vcpus}, but this host has {cpus}", hint=f"use 1 to {cpus}")
    vcpus_left = int(cpus * settings.cpu_overcommit) - sum(each.vcpus for each in taken)
    if spec.vcpus > vcpus_left:
        raise Exhausted(
            f"{spec.vcpus} vCPUs are asked for and {vcpus_left} are left on this host",
            hint="destroy sandboxes, or raise SANDMARTIN_CPU_OVERCOMMIT",
        )
    overhead_mb = OVERHEAD_MB[machine.accel]
    left_mb = memory_left_mb(machine, taken)
    if spec.memory_mb + overhead_mb > left_mb:
        raise Exhausted(
            f"{spec.memory_mb} MB of memory (and {overhead_mb} MB for the monitor) are asked"
            f" for and {max(0, left_mb)} MB are left on this host",
            hint="use less memory, or destroy sandboxes",
        )
    disk.check_free(machine.data.path, settings.disk_floor_mb)


def memory_left_mb(machine: Machine, taken: Iterable[SandboxSpec]) -> int:
    """Memory that no sandbox was promised; below 0 when too much was."""
    overhead_mb = OVERHEAD_MB[machine.accel]
    total_mb = memory_total_mb() - machine.settings.memory_reserve_mb
    return total_mb - sum(each.memory_mb + overhead_mb for each in taken)


def memory_total_mb() -> int:
    """The host's memory, from /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0
