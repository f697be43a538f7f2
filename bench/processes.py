"""What processes of this machine take: the agent's and its VMs'."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

_WINDOW_S = 0.3
_BUSY_SHARE = 0.5


def cpu_s(pid: int) -> float:
    """Processor time of a process, all of its threads.

    Of the clock that clock_getcpuclockid(3) tells: /proc/PID/stat counts in steps of 10 ms.
    """
    return time.clock_gettime((~pid << 3) | 2)


def rss_mb(pid: int) -> float:
    return _field_mb(Path(f"/proc/{pid}/status"), "VmRSS:")


def pss_mb(pid: int) -> float:
    return _field_mb(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def memory_total_mb() -> int:
    """All of the host's memory."""
    return int(_field_mb(Path("/proc/meminfo"), "MemTotal:"))


def _field_mb(file: Path, name: str) -> float:
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{file} has no {name}")


def vm_pid(data_dir: Path, sandbox_id: str) -> int:
    """The process of a sandbox's VM, from the journal."""
    journal = data_dir / "sandboxes" / sandbox_id / "journal.json"
    return int(json.loads(journal.read_bytes())["vm"]["pid"])


def vms(data_dir: Path) -> list[int]:
    """The processes of all VMs of an agent, those that wait in a pool among them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        program = words.partition(b"\0")[0]
        if b"qemu-system" in program and bytes(data_dir) in words:
            found.append(int(process.name))
    return found


async def quiet(data_dir: Path, spare: int, deadline_s: float = 90.0) -> None:
    """Wait until an agent has so many VMs to spare, and they have ended their start.

    A VM that starts or is introduced keeps a processor busy, and one that waits does not.
    """
    until = time.monotonic() + deadline_s
    while True:
        before = {pid: cpu_s(pid) for pid in vms(data_dir)}
        await asyncio.sleep(_WINDOW_S)
        after = vms(data_dir)
        if len(after) >= spare and set(after) == set(before):
            used_s = sum(cpu_s(pid) - before[pid] for pid in after)
            if used_s < _BUSY_SHARE * _WINDOW_S:
                return
        if time.monotonic() > until:
            raise RuntimeError(f"{len(after)} VMs instead of {spare}, or they are busy")
