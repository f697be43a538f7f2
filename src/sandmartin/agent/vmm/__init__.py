"""Virtual machine monitors: one small interface, drivers beside it.

A driver starts a VM as a process that outlives the agent and hands back a `Vm`. After a restart
of the agent the same `Vm` is won back by `adopt` from what the journal kept (`VmRecord`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from sandmartin.agent.proc import ProcessId
from sandmartin.model import Accel


@dataclass(frozen=True, kw_only=True)
class VmSpec:
    """All that a VM is made of. Paths are the host's; the VM's user can read or write them."""

    #: Directory of the VM's sockets and logs, writable by root alone.
    run_dir: Path
    vcpus: int
    memory_mb: int
    kernel: Path
    initramfs: Path
    #: Appended to what the driver itself needs on the kernel command line.
    command_line: str
    #: qcow2 layer, written by the VM; None only for the accelerator probe.
    disk: Path | None
    #: Network namespace the VM lives in (a path to enter), and the tap inside it.
    netns: Path | None
    tap: str | None
    mac: str | None
    #: User and group id of the VM's process.
    uid: int
    accel: Accel
    #: Directories of cgroups to put the process in, before it runs.
    cgroups: tuple[Path, ...] = ()
    #: A guest that ends leaves a stopped VM with its console, instead of none.
    stay_at_end: bool = False


@dataclass(frozen=True, kw_only=True)
class VmRecord:
    """What must be kept to find a VM again."""

    process: ProcessId
    run_dir: Path
    vmm_version: str
    machine: str
    accel: Accel


class VmStatus(StrEnum):
    """What the monitor says of its VM."""

    RUNNING = "running"
    STOPPED = "stopped"
    #: Stopped by the monitor because the host's disk is full; goes on with `cont`.
    DISK_FULL = "disk_full"
    GONE = "gone"


class Vm(Protocol):
    """One virtual machine.

    Every call has a deadline; a monitor that does not answer is TimedOut, one that cannot be
    reached is Unavailable, and one that refuses is ToolFailed.
    """

    @property
    def record(self) -> VmRecord: ...

    async def status(self) -> VmStatus: ...

    async def wait_gone(self) -> None:
        """Return when the process ended, for whatever reason.

        Whoever runs a VM waits here for as long: what the monitor logs is kept bounded meanwhile.
        """
        ...

    async def stop(self) -> None:
        """Stop the virtual processors."""
        ...

    async def cont(self) -> None:
        """Let the virtual processors go on. Raises DiskFull when the host still has no space."""
        ...

    async def resize_disk(self, size_bytes: int) -> None:
        """Grow the disk, and tell the guest. Raises Invalid when it would shrink."""
        ...

    async def read_console(self) -> bytes:
        """What the guest wrote to its console since the last call, the newest 64 KiB at most."""
        ...

    async def kill(self) -> None:
        """End the process, whatever state it is in, and wait until it is gone. Idempotent."""
        ...

    async def close(self) -> None:
        """Let go of the VM without ending it."""
        ...


class Vmm(Protocol):
    """A way to run VMs."""

    async def start(self, spec: VmSpec) -> Vm:
        """Boot a VM from its kernel. Raises ToolFailed with what the monitor said."""
        ...

    async def adopt(self, record: VmRecord) -> Vm | None:
        """The VM of `record` if it still runs, None when it is gone."""
        ...
