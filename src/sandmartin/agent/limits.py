"""Control groups: what one VM may take of the host's processors, memory and processes.

Works on the unified hierarchy (v2) and on the separate ones (v1), whichever the host has the
controllers on. Every group carries the instance id, so that clean-up touches only our own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandmartin.errors import ToolFailed
from sandmartin.model import Accel

_CONTROLLERS = ("cpu", "memory", "pids")
_PERIOD_US = 100_000
#: What the monitor itself needs beside the guest's memory. Under TCG most of it is translated code.
OVERHEAD_MB = {Accel.KVM: 96, Accel.TCG: 384}
#: The monitor's own threads (disk, main loop) beside the virtual processors.
_EXTRA_CPU = 0.5
_MAX_PROCESSES = 96
_REMOVE_DEADLINE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What one VM is given. `memory_mb` includes the monitor's overhead."""

    cpus: float
    memory_mb: int
    processes: int = _MAX_PROCESSES

    @classmethod
    def of(cls, vcpus: int, memory_mb: int, accel: Accel) -> Allowance:
        return cls(cpus=vcpus + _EXTRA_CPU, memory_mb=memory_mb + OVERHEAD_MB[accel])


class ControlGroups:
    """The control groups of one agent."""

    def __init__(self, instance_id: str, root: Path = Path("/sys/fs/cgroup")) -> None:
        self._name = f"sandmartin-{instance_id}"
        self._root = root
        self._unified = (root / "cgroup.controllers").exists()

    @property
    def version(self) -> int:
        return 2 if self._unified else 1

    def _tops(self) -> Iterator[Path]:
        if self._unified:
            yield self._root / self._name
            return
        for controller in _CONTROLLERS:
            if (self._root / controller).is_dir():
                yield self._root / controller / self._name

    def open(self) -> None:
        """Make the agent's own groups. Raises ToolFailed when the host does not let us."""
        try:
            if self._unified:
                _enable_controllers(self._root)
            for top in self._tops():
                top.mkdir(exist_ok=True)
                if self._unified:
                    _enable_controllers(top)
        except OSError as error:
            raise ToolFailed(
                f"control groups cannot be made: {error}",
                hint="run the agent as root, outside a container without its own cgroup tree",
            ) from error

    def create(self, sandbox_id: str, allowance: Allowance) -> tuple[Path, ...]:
        """Make the group of a VM, limits set, and return the directories to put it in.

        Raises ToolFailed, and then leaves none.
        """
        groups = tuple(top / sandbox_id for top in self._tops())
        try:
            for group in groups:
                group.mkdir(exist_ok=True)
                for name, value in self._values(group, allowance):
                    (group / name).write_text(value)
        except OSError as error:
            for group in groups:
                with contextlib.suppress(OSError):
                    group.rmdir()
            raise ToolFailed(f"control group of {sandbox_id} cannot be made: {error}") from error
        return groups

    def _values(self, group: Path, allowance: Allowance) -> Iterator[tuple[str, str]]:
        quota = int(allowance.cpus * _PERIOD_US)
        weight = max(1, int(allowance.cpus * 100))
        memory = str(allowance.memory_mb * 2**20)
        if self._unified:
            yield "cpu.max", f"{quota} {_PERIOD_US}"
            yield "cpu.weight", str(min(weight, 10_000))
            yield "memory.max", memory
            # Absent where the kernel or the host has no swap.
            if (group / "memory.swap.max").exists():
                yield "memory.swap.max", memory
            yield "memory.oom.group", "1"
            yield "pids.max", str(allowance.processes)
            return
        match group.parent.parent.name:
            case "cpu":
                yield "cpu.cfs_period_us", str(_PERIOD_US)
                yield "cpu.cfs_quota_us", str(quota)
                yield "cpu.shares", str(max(2, int(allowance.cpus * 1024)))
            case "memory":
                yield "memory.limit_in_bytes", memory
                # Memory and swap together; it can only be set after the memory's own limit.
                if (group / "memory.memsw.limit_in_bytes").exists():
                    yield "memory.memsw.limit_in_bytes", memory
            case "pids":
                yield "pids.max", str(allowance.processes)

    def paths(self, sandbox_id: str) -> tuple[Path, ...]:
        """Directories of a VM's group."""
        return tuple(top / sandbox_id for top in self._tops())

    def list(self) -> set[str]:
        """The sandboxes that have a group."""
        found: set[str] = set()
        for top in self._tops():
            with contextlib.suppress(FileNotFoundError):
                found |= {child.name for child in top.iterdir() if child.is_dir()}
        return found

    def kill(self, sandbox_id: str) -> None:
        """Kill whatever still runs in a group: a VM started by an agent that died at once."""
        for top in self._tops():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for pid in (top / sandbox_id / "cgroup.procs").read_text().split():
                    # 0 stands for a process of a namespace we cannot see, and would be ourselves.
                    if pid != "0":
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)

    def remove(self, sandbox_id: str, deadline_s: float = _REMOVE_DEADLINE_S) -> None:
        """Remove the group of an ended VM. Idempotent. Raises ToolFailed when it is held."""
        for top in self._tops():
            _remove_group(top / sandbox_id, deadline_s)

    def close(self) -> None:
        """Remove the agent's own groups if nothing is left in them."""
        for top in self._tops():
            with contextlib.suppress(OSError):
                top.rmdir()


def _enable_controllers(group: Path) -> None:
    for controller in _CONTROLLERS:
        (group / "cgroup.subtree_control").write_text(f"+{controller}")


def _remove_group(group: Path, deadline_s: float) -> None:
    # The kernel lets go of a group a moment after its last process was reaped.
    until = time.monotonic() + deadline_s
    while True:
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise ToolFailed(f"control group {group} cannot be removed: {error}") from error
            time.sleep(0.005)
