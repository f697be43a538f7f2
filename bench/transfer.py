"""Files in and out, beside as many bytes over plain TCP."""

from __future__ import annotations

import os

from bench import budgets
from bench.agents import Bench
from bench.baselines import measure_raw_tcp
from bench.inside import MB, content, fresh

_SIZE_MB = 64
_PATH = "/root/file"


async def measure_transfer(bench: Bench) -> None:
    async with bench.agent() as agent, fresh(agent.transport) as sandbox:
        block = os.urandom(MB)
        for _ in range(max(3, bench.runs // 4)):
            with bench.figures.timed(budgets.WRITE):
                await sandbox.write_file(_PATH, content(_SIZE_MB, block))
            size = 0
            with bench.figures.timed(budgets.READ):
                async for chunk in sandbox.read_file(_PATH):
                    size += len(chunk)
            if size != _SIZE_MB * MB:
                raise RuntimeError(f"{size} bytes were read")
        address = (await sandbox.info()).address
        await measure_raw_tcp(bench, sandbox, address, _SIZE_MB)
