"""An agent on fakes as a process of its own, which dies by SIGKILL at a step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from sandmartin.agent.server import serve_machine
from tests.fakes_agent import make_machine
from tests.waiting import DEADLINE_S


async def _serve(directory: Path, step: str) -> None:
    def die(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    machine = make_machine(directory, step=die).machine
    await serve_machine(
        machine, announce=lambda _: print("serves", flush=True), leave=asyncio.Event()
    )


@contextlib.asynccontextmanager
async def dying_agent(directory: Path, step: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """An agent on `directory` that serves until it comes to a step; killed at the end at least."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.control.agent_process", os.fspath(directory), step),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            assert await process.stdout.readline() == b"serves\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2]))
