"""The agent under test: a process of its own, as a user has it, on directories of its own.

It ends with us: its standard input is ours to close. What it logs is read for the times that only
the driver knows.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bench.figures import Figures
from sandmartin.client.agent_socket import AgentSocket
from sandmartin.model import Settings

_COMMAND = (sys.executable, "-P", "-m", "sandmartin", "agent", "--until-stdin-closes")
_READY_S = 60.0
_END_S = 120.0
_STOPPED = re.compile(r"a VM stood still for ([0-9.]+) ms")
_ACCEL = re.compile(r"accelerator (\w+):")


@dataclass
class Agent:
    """An agent that serves, and a client of it."""

    settings: Settings
    transport: AgentSocket
    pid: int
    log: Path

    @property
    def data_dir(self) -> Path:
        return self.settings.data_dir

    def stops_ms(self) -> list[float]:
        """How long VMs stood still, each time, as the driver saw it."""
        return [float(found) for found in _STOPPED.findall(self.log.read_text())]

    @property
    def accel(self) -> str:
        found = _ACCEL.search(self.log.read_text())
        return found[1] if found else "unknown"


@dataclass
class Bench:
    """One run of the benchmark: its place, its figures, and how often each is taken."""

    figures: Figures
    runs: int
    directory: Path
    accel: str = "unknown"

    @asynccontextmanager
    async def agent(self, **changes: object) -> AsyncIterator[Agent]:
        """An agent with other settings than the default ones; all it had is destroyed at the end.

        Raises TypeError for a setting that this release does not know.
        """
        data_dir = Path(tempfile.mkdtemp(dir=self.directory))
        settings = replace(Settings.load(), **{**changes, "data_dir": data_dir})  # type: ignore[arg-type]
        with (self.directory / f"{data_dir.name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(settings),
                # A Ctrl-C is ours to handle; the agent would leave its VMs running.
                start_new_session=True,
            )
        try:
            await _ready(process, Path(log.name))
            async with aclosing(AgentSocket(settings.socket)) as transport:
                agent = Agent(settings, transport, process.pid, Path(log.name))
                self.accel = agent.accel
                yield agent
        finally:
            await _end(process)
            shutil.rmtree(data_dir, ignore_errors=True)


def _environment(settings: Settings) -> dict[str, str]:
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    told = {name: value for name, value in values.items() if value != getattr(Settings(), name)}
    return os.environ | {f"SANDMARTIN_{name.upper()}": str(told[name]) for name in told}


async def _ready(process: asyncio.subprocess.Process, log: Path) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(_READY_S):
        if not await process.stdout.readline():
            raise RuntimeError(f"the agent did not start: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text()[-2000:]


async def _end(process: asyncio.subprocess.Process) -> None:
    """All of its sandboxes are destroyed when its input ends."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RuntimeError("the agent did not end; it may have left VMs") from None


@contextmanager
def directory() -> Iterator[Path]:
    """A place for the files of one run."""
    # Not under /tmp, which may be memory: what is synced must go to a disk.
    path = Path(tempfile.mkdtemp(prefix="sandmartin-bench-", dir="/var/tmp"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)
