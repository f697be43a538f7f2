"""Where the time of a create, its first command and a resume goes: no figures with a budget.

Here the agent runs in our own process, with a watch on its steps, so the sums are not those of the
other groups. Each figure is the time from the step before it.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from bench.agents import Bench
from bench.inside import TRUE, dirty_memory, fresh, run
from sandmartin.agent.machine import open_machine
from sandmartin.agent.server import serve_machine
from sandmartin.model import Settings
from sandmartin.transport.agent import AgentSocket


class Steps:
    """The steps since the last look, each with its time."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def mark(self, name: str) -> None:
        self.seen.append((name, time.monotonic()))

    def tell(self, bench: Bench, what: str) -> None:
        """Add what was seen, and forget it."""
        steps, self.seen = self.seen, []
        for (_, before), (name, at) in pairwise(steps):
            bench.figures.add(f"{what}, to {name}", (at - before) * 1000)
        bench.figures.add(f"{what}, all", (steps[-1][1] - steps[0][1]) * 1000)


@asynccontextmanager
async def _agent(bench: Bench, steps: Steps) -> AsyncIterator[AgentSocket]:
    data_dir = Path(tempfile.mkdtemp(dir=bench.directory))
    settings = replace(Settings.load(), data_dir=data_dir)
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with open_machine(settings) as machine:
        watched = replace(machine, step=steps.mark)
        work = serve_machine(watched, announce=lambda _: ready.set_result(None))
        serving = asyncio.create_task(work, name="agent")
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        async with aclosing(AgentSocket(settings.socket)) as transport:
            try:
                yield transport
            finally:
                await transport.terminate()
                await serving


async def measure_steps(bench: Bench) -> None:
    steps = Steps()
    async with _agent(bench, steps) as transport:
        async with fresh(transport):
            pass
        for _ in range(bench.runs):
            await asyncio.sleep(0.3)
            steps.seen.clear()
            steps.mark("asked")
            async with fresh(transport) as sandbox:
                for name in ("answered", "first command", "second command"):
                    if name != "answered":
                        await run(sandbox, TRUE)
                    steps.mark(name)
                steps.tell(bench, "create")
                await dirty_memory(sandbox)
                steps.seen.clear()
                steps.mark("asked")
                await sandbox.pause()
                steps.mark("answered")
                steps.tell(bench, "pause")
                steps.mark("asked")
                await sandbox.resume()
                steps.mark("answered")
                await run(sandbox, TRUE)
                steps.mark("first command")
                steps.tell(bench, "resume")
