"""What is made of a running sandbox: pauses of it, checkpoints, live snapshots, forks."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

from bench import budgets
from bench.agents import Agent, Bench
from bench.baselines import measure_full_save
from bench.inside import DIRTY_MB, MB, TRUE, dirty_disk, dirty_memory, fresh, run
from sandmartin.client.sandbox import AsyncSandbox

_SERIES = 20


async def measure_pause(bench: Bench) -> None:
    """Sandboxes that are paused 20 times each, the same pages dirtied before each time."""
    async with bench.agent() as agent:
        for _ in range(max(1, bench.runs // 6)):
            async with fresh(agent.transport) as sandbox:
                for number in range(_SERIES):
                    await dirty_memory(sandbox)
                    names = [budgets.PAUSE]
                    names += [budgets.FIRST_PAUSE] if number == 0 else []
                    names += [budgets.LAST_PAUSE] if number == _SERIES - 1 else []
                    await _pause(bench, agent, sandbox, *names)
                    await _resume(bench, sandbox)
        await measure_full_save(bench, agent)


async def _pause(bench: Bench, agent: Agent, sandbox: AsyncSandbox, *names: str) -> None:
    with bench.figures.timed(*names):
        await sandbox.pause()
    diff = agent.data_dir / "sandboxes" / sandbox.sandbox_id / "paused" / "ram.diff"
    bench.figures.add(f"{names[0]}: really dirty", diff.stat().st_size / MB, "MB")


async def _resume(bench: Bench, sandbox: AsyncSandbox) -> None:
    began = time.monotonic()
    await sandbox.resume()
    resumed = time.monotonic()
    await run(sandbox, TRUE)
    ended = time.monotonic()
    bench.figures.add("resume", (resumed - began) * 1000)
    bench.figures.add(budgets.RESUME, (ended - began) * 1000)


async def measure_memories(bench: Bench) -> None:
    """Pauses with the same set of dirty pages in RAM of several sizes, in turns."""
    async with bench.agent() as agent, AsyncExitStack() as stack:
        sandboxes = {
            memory_mb: await stack.enter_async_context(fresh(agent.transport, memory_mb))
            for memory_mb in budgets.MEMORIES_MB
        }
        for _ in range(max(3, bench.runs // 2)):
            for memory_mb, sandbox in sandboxes.items():
                await dirty_memory(sandbox)
                await _pause(bench, agent, sandbox, budgets.pause_with(memory_mb))
                await sandbox.resume()


async def measure_checkpoint(bench: Bench) -> None:
    """How long a source stands still, and how much of its memory was dirty at that moment."""
    async with bench.agent() as agent, fresh(agent.transport) as sandbox:
        for _ in range(bench.runs):
            await _dirty(sandbox)
            made = await sandbox.checkpoint()
            _add_stop(bench, agent, budgets.STOPPED, made.size_bytes)
            await sandbox.delete_checkpoint(made.checkpoint_id)


async def measure_snapshot(bench: Bench) -> None:
    """As for a checkpoint, of a template made from a sandbox that goes on."""
    async with bench.agent() as agent, fresh(agent.transport) as sandbox:
        for number in range(max(3, bench.runs // 2)):
            await _dirty(sandbox)
            made = await sandbox.snapshot(f"bench-{number}", live=True)
            # It stays: its layer is the source's too.
            _add_stop(bench, agent, budgets.STOPPED_SNAPSHOT, made.size_bytes)


async def measure_cached(bench: Bench) -> None:
    """A checkpoint after a file was written through the guest's page cache: it is RAM as well."""
    async with bench.agent() as agent, fresh(agent.transport) as sandbox:
        for _ in range(max(3, bench.runs // 2)):
            await dirty_memory(sandbox)
            await run(sandbox, "dd", "if=/dev/urandom", "of=/root/c", "bs=1M", f"count={DIRTY_MB}")
            made = await sandbox.checkpoint()
            name = "checkpoint, files in the page cache: source stopped"
            _add_stop(bench, agent, name, made.size_bytes)
            await sandbox.delete_checkpoint(made.checkpoint_id)


async def _dirty(sandbox: AsyncSandbox) -> None:
    await dirty_memory(sandbox)
    await dirty_disk(sandbox)


def _add_stop(bench: Bench, agent: Agent, name: str, size_bytes: int) -> None:
    bench.figures.add(name, agent.stops_ms()[-1])
    what = name.partition(":")[0]
    bench.figures.add(f"{what}: really dirty", size_bytes / MB, "MB")


async def measure_fork(bench: Bench) -> None:
    """Eight children at once of one sandbox, until all of them are there."""
    async with bench.agent() as agent, fresh(agent.transport) as sandbox:
        await dirty_memory(sandbox)
        for _ in range(max(2, bench.runs // 4)):
            began = time.monotonic()
            children = await sandbox.fork(8)
            took_ms = (time.monotonic() - began) * 1000
            if failed := [child.error for child in children if child.error]:
                raise failed[0]
            bench.figures.add(budgets.FORK_EACH, took_ms / 8)
            for child in children:
                await agent.transport.destroy(child.sandbox_id)
