"""Runs the benchmark and prints its table. Times are seconds unless a name says otherwise."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from sandmartin.agent.server import serve
from sandmartin.agent.vmm.freezer import Freezer
from sandmartin.client.sandbox import AsyncSandbox, temporary_sandbox
from sandmartin.model import Settings, new_sandbox_id
from sandmartin.transport import Command, Ended, NewSandbox, Stdout
from sandmartin.transport.agent import AgentSocket

MB = 1 << 20
_DIRTY_MB = 32


@dataclass
class Figure:
    """What was measured of one thing."""

    name: str
    values: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Figures:
    """All figures of a run."""

    def __init__(self) -> None:
        self.by_name: dict[str, Figure] = {}

    def add(self, name: str, value: float) -> None:
        self.by_name.setdefault(name, Figure(name)).values.append(value)

    async def time(self, name: str, work: Awaitable[object]) -> None:
        began = time.monotonic()
        await work
        self.add(name, time.monotonic() - began)

    def median(self, name: str) -> float:
        return self.by_name[name].median if name in self.by_name else float("nan")


class StopTimes(logging.Handler):
    """Collects how long VMs stood still, from the driver's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (value := getattr(record, "s", None)) is not None:
            self.values.append(value)


@asynccontextmanager
async def agent(settings: Settings) -> AsyncIterator[AgentSocket]:
    """An agent, and a client of it."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(settings, announce=lambda _: ready.set_result(None)))
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    async with aclosing(AgentSocket(settings.socket)) as transport:
        try:
            yield transport
        finally:
            await transport.terminate()
            await serving


def new(**shape: object) -> NewSandbox:
    return NewSandbox(sandbox_id=new_sandbox_id(), **shape)  # type: ignore[arg-type]


async def run(sandbox: AsyncSandbox, *words: str) -> bytes:
    out = bytearray()
    async with sandbox.exec(Command(cmd=words[0], args=words[1:], timeout_s=120)) as execution:
        async for event in execution:
            if isinstance(event, Stdout):
                out += event.data
            elif isinstance(event, Ended) and event.exit_code:
                raise RuntimeError(f"{words} exited {event.exit_code}")
    return bytes(out)


async def create_to_true(transport: AgentSocket) -> None:
    async with temporary_sandbox(transport, new()) as sandbox:
        await run(sandbox, "/bin/true")


async def call(transport: AgentSocket, method: str, **message: object) -> dict[str, object]:
    return await transport._call(method, message, deadline_s=120)


async def dirty(sandbox: AsyncSandbox) -> None:
    """Have so much memory dirtied that is not on disk."""
    await run(sandbox, "dd", "if=/dev/urandom", "of=/dev/shm/dirty", "bs=1M", f"count={_DIRTY_MB}")


# What is measured.


async def measure_boot(figures: Figures, settings: Settings, runs: int) -> None:
    cold = replace(settings, warm=False, data_dir=settings.data_dir.with_name("cold"))
    async with agent(cold) as transport:
        for _ in range(max(3, runs // 4)):
            began = time.monotonic()
            async with temporary_sandbox(transport, new()) as sandbox:
                await run(sandbox, "/bin/true")
                figures.add("boot to exit of true", time.monotonic() - began)


async def measure_create(figures: Figures, transport: AgentSocket, runs: int) -> None:
    await create_to_true(transport)
    for _ in range(runs):
        began = time.monotonic()
        async with temporary_sandbox(transport, new()) as sandbox:
            figures.add("create", time.monotonic() - began)
            await run(sandbox, "/bin/true")
            figures.add("create to exit of true", time.monotonic() - began)
            await figures.time("exec of true, warm", run(sandbox, "/bin/true"))


async def measure_pause(figures: Figures, transport: AgentSocket, runs: int) -> None:
    async with temporary_sandbox(transport, new()) as sandbox:
        name = sandbox.sandbox_id
        for _ in range(runs):
            await dirty(sandbox)
            pausing = call(transport, "PauseSandbox", sandboxId=name)
            await figures.time(f"pause, {_DIRTY_MB} MB dirty", pausing)
            began = time.monotonic()
            await call(transport, "ResumeSandbox", sandboxId=name, keepTimeout=True)
            await run(sandbox, "/bin/true")
            figures.add("resume to exit of true", time.monotonic() - began)


async def measure_full_save(
    figures: Figures, transport: AgentSocket, settings: Settings, runs: int
) -> None:
    """QEMU's own `migrate` of the same VM to a file, synced: the baseline of a pause."""
    async with temporary_sandbox(transport, new()) as sandbox:
        await dirty(sandbox)
        monitor = settings.data_dir / "sandboxes" / sandbox.sandbox_id / "vm" / "freezer"
        for _ in range(max(3, runs // 4)):
            took = await asyncio.to_thread(_full_save, monitor, settings.data_dir / "full.save")
            figures.add(f"full save, {_DIRTY_MB} MB dirty", took)


def _full_save(monitor: Path, target: Path) -> float:
    with Freezer(monitor) as freezer, target.open("wb") as file:
        began = time.monotonic()
        freezer.execute("stop")
        freezer.execute("getfd", {"fdname": "full"}, fd=file.fileno())
        freezer.execute("migrate", {"uri": "fd:full"})
        while (state := freezer.execute("query-migrate").get("status")) != "completed":
            if state in {"failed", "cancelled"}:
                raise RuntimeError("QEMU did not save")
            time.sleep(0.005)
        os.fsync(file.fileno())
        took = time.monotonic() - began
        freezer.execute("cont")
    target.unlink()
    return took


async def measure_forks(
    figures: Figures, transport: AgentSocket, stops: StopTimes, runs: int
) -> None:
    async with temporary_sandbox(transport, new()) as sandbox:
        name = sandbox.sandbox_id
        for _ in range(runs):
            await dirty(sandbox)
            await run(sandbox, "dd", "if=/dev/urandom", "of=/root/d", "bs=1M", f"count={_DIRTY_MB}")
            stops.values.clear()
            made = await call(transport, "CreateCheckpoint", sandboxId=name)
            figures.add("source stopped, 32 MB RAM and 32 MB disk dirty", stops.values[-1])
            checkpoint = made["checkpoint"]["checkpointId"]  # type: ignore[index]
            forget = {"sandboxId": name, "checkpointId": checkpoint}
            await call(transport, "DeleteCheckpoint", **forget)
        for _ in range(2):
            began = time.monotonic()
            answer = await call(transport, "ForkSandbox", sandboxId=name, count=8)
            figures.add("fork, each of 8", (time.monotonic() - began) / 8)
            for child in answer["children"]:  # type: ignore[attr-defined]
                await transport.destroy(child["sandboxId"])


async def measure_many(figures: Figures, transport: AgentSocket, settings: Settings) -> None:
    began = time.monotonic()
    made = [new() for _ in range(20)]
    await asyncio.gather(*(transport.create(each) for each in made))
    figures.add("20 creates at once", time.monotonic() - began)
    await asyncio.sleep(5)
    for each in made:
        figures.add("PSS of an idle sandbox of 20, MB", _pss_mb(settings, each.sandbox_id))
    for each in made:
        await transport.destroy(each.sandbox_id)


def _pss_mb(settings: Settings, sandbox_id: str) -> float:
    journal = settings.data_dir / "sandboxes" / sandbox_id / "journal.json"
    pid = json.loads(journal.read_bytes())["vm"]["pid"]
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no PSS")


async def measure_files(figures: Figures, transport: AgentSocket) -> None:
    async def content() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(MB)

    async with temporary_sandbox(transport, new()) as sandbox:
        for _ in range(3):
            await figures.time("write of 64 MB", sandbox.write_file("/root/f", content()))
            began = time.monotonic()
            async for _chunk in sandbox.read_file("/root/f"):
                pass
            figures.add("read of 64 MB", time.monotonic() - began)


def measure_runsc(figures: Figures, runs: int) -> None:
    """gVisor running the same command on the host's own files."""
    runsc = shutil.which("runsc")
    if runsc is None:
        return
    command = [runsc, "--platform=ptrace", "--network=none", "--ignore-cgroups", "do", "/bin/true"]
    for number in range(runs + 1):
        began = time.monotonic()
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return
        if number:
            figures.add("gVisor's runsc do of true", time.monotonic() - began)


# The table.

_BUDGETS: tuple[tuple[str, str, float], ...] = (
    ("create to exit of true", "boot to exit of true", 0.08),
    ("resume to exit of true", "boot to exit of true", 0.08),
    ("fork, each of 8", "boot to exit of true", 0.08),
    (f"pause, {_DIRTY_MB} MB dirty", f"full save, {_DIRTY_MB} MB dirty", 0.25),
    ("20 creates at once", "create to exit of true", 8),
    ("create to exit of true", "gVisor's runsc do of true", 1.5),
)


def table(figures: Figures) -> str:
    lines = [f"{'figure':<52}{'n':>4}{'p50':>10}{'p95':>10}{'p99':>10}"]
    for figure in figures.by_name.values():
        # Seconds are told in milliseconds; what is no time says so in its name.
        scale = 1 if "MB" in figure.name and "PSS" in figure.name else 1000
        row = [figure.quantile(share) * scale for share in (0.5, 0.95, 0.99)]
        cells = "".join(f"{value:10.1f}" for value in row)
        lines.append(f"{figure.name:<52}{len(figure.values):>4}{cells}")
    lines += ["", f"{'ratio of medians':<76}{'found':>8}{'budget':>8}"]
    for name, baseline, budget in _BUDGETS:
        if name in figures.by_name and baseline in figures.by_name:
            ratio = figures.median(name) / figures.median(baseline)
            lines.append(f"{name + ' / ' + baseline:<76}{ratio:8.3f}{budget:8.2f}")
    return "\n".join(lines)


def _directory() -> Path:
    # Not under /tmp, which may be memory: what is synced must go to a disk.
    directory = Path(tempfile.mkdtemp(prefix="sandmartin-bench-", dir="/var/tmp"))
    directory.chmod(0o711)
    return directory


async def measure(figures: Figures, runs: int) -> None:
    stops = StopTimes()
    logging.getLogger("sandmartin.agent.vmm.qemu").addHandler(stops)
    logging.getLogger("sandmartin.agent.vmm.qemu").setLevel(logging.INFO)
    directory = _directory()
    settings = replace(Settings.load(), data_dir=directory / "data")
    try:
        measure_runsc(figures, runs)
        await measure_boot(figures, settings, runs)
        async with agent(settings) as transport:
            steps: tuple[Callable[[], Awaitable[None]], ...] = (
                lambda: measure_create(figures, transport, runs),
                lambda: measure_pause(figures, transport, runs),
                lambda: measure_full_save(figures, transport, settings, runs),
                lambda: measure_forks(figures, transport, stops, runs),
                lambda: measure_files(figures, transport),
                lambda: measure_many(figures, transport, settings),
            )
            for step in steps:
                await step()
                print(".", end="", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(directory)
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs of each figure; default 20")
    parser.add_argument("--out", type=Path, default=Path("bench/results/latest.json"))
    args = parser.parse_args()
    figures = Figures()
    asyncio.run(measure(figures, args.runs))
    print(table(figures))
    machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "at": int(time.time())}
    raw = {name: figure.values for name, figure in figures.by_name.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "seconds": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
