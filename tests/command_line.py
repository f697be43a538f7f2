"""`sandmartin` as a process of its own: started, listened to, and ended at the end of the test."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 30


class Line:
    """Starts command lines, and ends those that a failing test leaves behind."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._started: list[Process] = []

    async def start(
        self, verb: str, *words: str, shell: str = "", stdin: int = DEVNULL, stdout: int = PIPE
    ) -> Process:
        """The verb; `shell` says what else a shell does around the word LINE."""
        argv = [sys.executable, "-m", "sandmartin", verb, "--data-dir", os.fspath(self._data_dir)]
        argv += words
        if shell:
            argv = ["sh", "-c", shell.replace("LINE", shlex.join(argv))]
        # As users have it: unbuffered, Python behaves differently where a reader is missing.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        child = await asyncio.create_subprocess_exec(
            *argv, stdin=stdin, stdout=stdout, stderr=PIPE, env=env
        )
        self._started.append(child)
        return child

    async def run(
        self, *command: str, flags: tuple[str, ...] = (), stdin: int = DEVNULL
    ) -> Process:
        return await self.start("run", *flags, "--", *command, stdin=stdin)

    async def end(self) -> None:
        for child in self._started:
            if child.returncode is None:
                child.kill()
                await child.communicate()


async def finish(child: Process, given: bytes | None = None) -> tuple[int | None, bytes, bytes]:
    async with asyncio.timeout(DEADLINE_S):
        out, err = await child.communicate(given)
    return child.returncode, out or b"", err


async def say_ready(child: Process) -> None:
    assert child.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await child.stdout.readline() == b"ready\n"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)
