"""What users of E2B's own Python package wait for, against `sandmartin up`.

The package is in an environment of its own, where its user's program runs as a process; what it
measured is what it says.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bench.agents import Bench
from clients.environments import NEWEST, variables

_PROGRAM = Path(__file__).with_name("stock") / "measure.py"
_DEADLINE_S = 900.0


async def measure_e2b(bench: Bench) -> None:
    """Creates, commands, files and a crowd, as the package does them."""
    await asyncio.to_thread(NEWEST.ensure)
    async with bench.up() as up:
        said = await _measured(bench.runs, variables(up.url, up.api_key))
    for name, values in json.loads(said).items():
        for value in values:
            bench.figures.add(f"E2B's package: {name}", value)


async def _measured(runs: int, environment: Mapping[str, str]) -> bytes:
    """What the program says. Raises RuntimeError when it fails or takes too long."""
    process = await asyncio.create_subprocess_exec(
        NEWEST.program,
        _PROGRAM,
        str(runs),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(_DEADLINE_S):
            said, complained = await process.communicate()
    except TimeoutError:
        raise RuntimeError(f"it did not end within {_DEADLINE_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"{_PROGRAM.name} failed: {complained.decode()[-2000:]}")
    return said
