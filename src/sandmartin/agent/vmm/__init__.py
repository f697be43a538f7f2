"""Virtual machine monitors: one small interface, drivers beside it.

A driver starts a VM as a process that outlives the agent and hands back a `Vm`. After a restart
of the agent the same `Vm` is won back by `adopt` from what the journal kept (`VmRecord`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeVar

from sandmartin.agent.proc import ProcessId
from sandmartin.model import Accel

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What a VM's disk is made of, from the bottom up: an image, sealed layers, a layer of its own.

    The agent opens them all and hands the descriptors on; the VM's user needs no right to any.
    """

    #: Raw, only read.
    image: Path
    #: qcow2, only read.
    sealed: tuple[Path, ...] = ()
    #: qcow2, written by the VM. The stem of its name is its name for the monitor.
    top: Path


@dataclass(frozen=True, kw_only=True)
class VmSpec:
    """All that a VM is made of."""

    #: Directory of the VM's sockets and logs, writable by root alone.
    run_dir: Path
    vcpus: int
    memory_mb: int
    kernel: Path
    initramfs: Path
    #: Appended to what the driver itself needs on the kernel command line.
    command_line: str
    #: None for one that is given its disk later, while it waits, and for the accelerator probe.
    disk: Disk | None
    #: Network namespace the VM lives in (a path to enter), and the tap inside it.
    netns: Path | None
    tap: str | None
    mac: str | None
    #: User and group id of the VM's process.
    uid: int
    accel: Accel
    #: Directories of cgroups to put the process in, before it runs.
    cgroups: tuple[Path, ...] = ()
    #: Descriptor of a base to map as RAM, privately; None is memory that cannot be told apart.
    ram_fd: int | None = None
    #: Wait for a device state instead of booting.
    incoming: bool = False
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
    memory_mb: int


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

    def move(self, run_dir: Path) -> None:
        """Its sockets and logs are in another directory from now on."""
        ...

    async def insert_disk(self, disk: Disk) -> None:
        """Give its disk to a VM that waits for a device state and was started without one."""
        ...

    async def resize_disk(self, size_bytes: int) -> None:
        """Grow the disk, and tell the guest. Raises Invalid when it would shrink."""
        ...

    async def top_layer(self) -> str:
        """Name of the layer that is written now."""
        ...

    async def freeze(
        self, while_stopped: Callable[[], _T], *, top: Path | None = None, cont: bool = True
    ) -> tuple[bytes, _T]:
        """The device state at a moment at which `while_stopped` was done too, in a thread.

        With `top` the VM writes to that new, empty layer from then on, and the one before is
        sealed. The VM goes on afterwards if `cont`, and in any case after an error. What has
        begun comes to its end even when the caller is cancelled.
        """
        ...

    async def relink(self, disk: Disk) -> None:
        """Use these sealed layers below the one that is written, instead of others.

        Together they must hold the same. The VM goes on meanwhile, and as before after an error.
        """
        ...

    async def only_read(self, layer: Path) -> None:
        """Give up the right to write to a layer that was the top. Idempotent."""
        ...

    async def load(self, state: bytes) -> None:
        """Load a device state into a VM that was started with `incoming`; it stands still then.

        Raises ToolFailed when it does not fit.
        """
        ...

    async def memory_used(self) -> int | None:
        """Bytes the guest uses, as it sees it; None when it does not say."""
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
