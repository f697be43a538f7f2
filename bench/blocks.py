"""What an emulated guest costs from its restore on: blocks of its code that QEMU translates, and
QEMU's processor time. Unlike times, both say the same on a busy machine; no figures with a budget.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from bench.agents import Agent, Bench
from bench.inside import TRUE, fresh, run
from bench.processes import cpu_s, vm_pid
from sandmartin.agent.vmm.freezer import Freezer
from sandmartin.agent.vmm.qemu import MONITORS
from sandmartin.model import Accel

_COUNT = re.compile(r"TB count\s+(\d+)")
_SETTLE_S = 1.0


@dataclass
class _Emulator:
    """The QEMU of one sandbox, and what it had done when it was looked at last."""

    bench: Bench
    pid: int
    monitor: Path
    blocks: int = 0
    cpu_ms: float = 0.0

    @classmethod
    def of(cls, bench: Bench, agent: Agent, sandbox_id: str) -> _Emulator:
        directory = agent.data_dir / "sandboxes" / sandbox_id / "vm"
        return cls(bench, vm_pid(agent.data_dir, sandbox_id), directory / MONITORS[1])

    def look(self, step: str) -> None:
        """Add what was done since the last look."""
        cpu_ms = cpu_s(self.pid) * 1000
        with Freezer(self.monitor) as monitor:
            said = monitor.execute("human-monitor-command", {"command-line": "info jit"})
        found = _COUNT.search(str(said))
        if found is None:
            raise RuntimeError("QEMU does not tell how many blocks it translated")
        blocks = int(found[1])
        self.bench.figures.add(f"{step}: blocks translated", blocks - self.blocks, "blocks")
        self.bench.figures.add(f"{step}: QEMU's CPU", cpu_ms - self.cpu_ms)
        self.blocks, self.cpu_ms = blocks, cpu_ms


async def measure_blocks(bench: Bench) -> None:
    async with bench.agent(vm_pool_size=0) as agent:
        async with fresh(agent.transport):
            pass
        if bench.accel != Accel.TCG:
            raise RuntimeError("only under emulation is anything translated")
        for _ in range(bench.runs):
            async with fresh(agent.transport) as sandbox:
                emulator = _Emulator.of(bench, agent, sandbox.sandbox_id)
                # Load and introduction; a state is loaded with nothing translated.
                emulator.look("create")
                for name in ("first command", "second command"):
                    await run(sandbox, TRUE)
                    emulator.look(name)
                await asyncio.sleep(_SETTLE_S)
                emulator.look(f"{_SETTLE_S:g} s of idling")
                await sandbox.pause()
                await sandbox.resume()
                emulator = _Emulator.of(bench, agent, sandbox.sandbox_id)
                emulator.look("resume")
                await run(sandbox, TRUE)
                emulator.look("first command after it")
