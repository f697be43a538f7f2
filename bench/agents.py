"""What is under test, an agent or `sandmartin up`, as a user has it: in a process of its own.

It has directories of its own and ends with us. What an agent logs is read for the times that only
the driver knows.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bench.figures import Figures
from sandmartin.model import Settings
from sandmartin.transport.agent import AgentSocket

_SANDMARTIN = (sys.executable, "-P", "-m", "sandmartin")
_AGENT = (*_SANDMARTIN, "agent", "--until-stdin-closes")
_UP = (*_SANDMARTIN, "up", "--json", "--port", "0", "--on-exit", "kill", "--data-dir")
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


@dataclass(frozen=True)
class Up:
    """All of it that serves, and a way to its one agent past the control plane."""

    url: str
    api_key: str
    transport: AgentSocket


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
        with self._place() as (data_dir, log):
            settings = replace(Settings.load(), **{**changes, "data_dir": data_dir})  # type: ignore[arg-type]
            async with (
                _running(_AGENT, log, _environment(settings)) as (process, _),
                aclosing(AgentSocket(settings.socket)) as transport,
            ):
                agent = Agent(settings, transport, process.pid, log)
                self.accel = agent.accel
                yield agent

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Up]:
        """`sandmartin up`; all it had is destroyed at the end."""
        with self._place() as (data_dir, log):
            async with (
                _running((*_UP, os.fspath(data_dir)), log, ending=signal.SIGTERM) as (_, said),
                aclosing(AgentSocket(data_dir / "agent" / "agent.sock")) as transport,
            ):
                told = json.loads(said)
                yield Up(told["url"], told["api_key"], transport)

    @contextmanager
    def _place(self) -> Iterator[tuple[Path, Path]]:
        """A directory for data, which ends with the context, and a file for what is logged."""
        data_dir = Path(tempfile.mkdtemp(dir=self.directory))
        # Every VM runs as a user of its own.
        data_dir.chmod(0o711)
        try:
            yield data_dir, self.directory / f"{data_dir.name}.log"
        finally:
            shutil.rmtree(data_dir, ignore_errors=True)


def _environment(settings: Settings) -> dict[str, str]:
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    told = {name: value for name, value in values.items() if value != getattr(Settings(), name)}
    return os.environ | {f"SANDMARTIN_{name.upper()}": str(told[name]) for name in told}


@asynccontextmanager
async def _running(
    command: tuple[str, ...],
    log: Path,
    environment: Mapping[str, str] = os.environ,
    ending: signal.Signals | None = None,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, bytes]]:
    """A process that serves, and the first line that it said.

    It is ended with the context: by the end of its input, and the signal `ending` if there is one.
    """
    with log.open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            # A Ctrl-C is ours to handle; the agent would leave its VMs running.
            start_new_session=True,
        )
    try:
        yield process, await _ready(process, log)
    finally:
        await _end(process, ending)


async def _ready(process: asyncio.subprocess.Process, log: Path) -> bytes:
    assert process.stdout is not None
    async with asyncio.timeout(_READY_S):
        if not (said := await process.stdout.readline()):
            raise RuntimeError(f"it did not start: {_tail(log)}")
    return said


def _tail(log: Path) -> str:
    return log.read_text()[-2000:]


async def _end(process: asyncio.subprocess.Process, ending: signal.Signals | None) -> None:
    """Wait until it has destroyed its sandboxes."""
    assert process.stdin is not None
    process.stdin.close()
    if ending is not None and process.returncode is None:
        process.send_signal(ending)
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RuntimeError("it did not end; it may have left VMs") from None


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
