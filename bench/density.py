"""Fifty idle sandboxes: what they and their agent take, and what sampling them costs.

Sampling has two sides. The agent's is all of its processor time while nobody asks it anything,
so it is counted too high rather than too low. The guests' is what the VMs use to answer: it is
small against what an idle guest uses anyway, so the same questions are asked at ten times the
sampler's rate, in windows that alternate with windows without any, and the difference is divided
by ten.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from bench import budgets, processes
from bench.agents import Agent, Bench
from bench.inside import TRUE, new, run
from sandmartin.agent.limits import OVERHEAD_MB
from sandmartin.agent.metrics import MEMORY_PERIOD_S
from sandmartin.agent.vmm.freezer import Freezer
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.model import DEFAULT_MEMORY_MB, Accel, Settings

_COUNT = 50
_COUNTED = "sandboxes"
_SHARE = "% of a core"
_AT_ONCE = 4
#: A new VM is asked for its memory more often at first: after 1, 2, 4 and 8 seconds.
_SETTLE_S = 18.0
_IDLE_S = 30.0
_BALLOON = "/machine/peripheral/balloon"
_FASTER = 10
_WINDOW_S = 5.0


async def measure_density(bench: Bench) -> None:
    """The default shape, so many that admission alone would refuse them on a small machine."""
    async with bench.agent(memory_reserve_mb=_reserve_mb()) as agent:
        fit = (processes.memory_total_mb() - agent.settings.memory_reserve_mb) // _admitted_mb(
            agent.accel
        )
        sandboxes = await _create_all(agent, min(_COUNT, fit))
        bench.figures.add(budgets.HELD, len(sandboxes), _COUNTED)
        bench.figures.add("idle sandboxes that admission lets in", _let_in(agent.accel), _COUNTED)
        await _use(bench, agent, sandboxes)
        await asyncio.sleep(_SETTLE_S)
        pids = [processes.vm_pid(agent.data_dir, each.sandbox_id) for each in sandboxes]
        await _measure_idle(bench, agent, pids)
        for pid in pids:
            bench.figures.add(budgets.PSS_50, processes.pss_mb(pid), "MB")
        monitors = [_monitor(agent, each) for each in sandboxes]
        await asyncio.to_thread(_measure_answering, bench, monitors, pids)


def _reserve_mb() -> int:
    """What makes admission let all of them in.

    It counts what a sandbox may use at most, and idle ones use a tenth of that.
    """
    return min(Settings.load().memory_reserve_mb, processes.memory_total_mb() - _COUNT * 1024)


def _admitted_mb(accel: str) -> int:
    return DEFAULT_MEMORY_MB + OVERHEAD_MB[Accel(accel)]


def _let_in(accel: str) -> int:
    return (processes.memory_total_mb() - Settings.load().memory_reserve_mb) // _admitted_mb(accel)


async def _create_all(agent: Agent, count: int) -> list[AsyncSandbox]:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def create() -> AsyncSandbox:
        async with turn:
            return await AsyncSandbox.create(agent.transport, new())

    return list(await asyncio.gather(*(create() for _ in range(count))))


async def _use(bench: Bench, agent: Agent, sandboxes: list[AsyncSandbox]) -> None:
    for sandbox in sandboxes:
        with bench.figures.timed(f"list of {_COUNT}"):
            listed = await agent.transport.list_sandboxes()
        states = {each.state for each in listed}
        if len(listed) != len(sandboxes) or states != {"running"}:
            raise RuntimeError(f"{len(listed)} sandboxes, {states}")
        with bench.figures.timed(f"exec of true on each of {_COUNT}"):
            await run(sandbox, TRUE)


async def _measure_idle(bench: Bench, agent: Agent, pids: list[int]) -> None:
    began, agent_s, vms_s = time.monotonic(), processes.cpu_s(agent.pid), _sum_cpu_s(pids)
    await asyncio.sleep(_IDLE_S)
    agent_s, vms_s = processes.cpu_s(agent.pid) - agent_s, _sum_cpu_s(pids) - vms_s
    elapsed_s = time.monotonic() - began
    bench.figures.add(budgets.AGENT_CPU, agent_s / elapsed_s * 100, _SHARE)
    bench.figures.add("CPU of an idle sandbox", vms_s / len(pids) / elapsed_s * 100, _SHARE)
    bench.figures.add(budgets.AGENT_RSS, processes.rss_mb(agent.pid), "MB")


def _sum_cpu_s(pids: list[int]) -> float:
    return sum(map(processes.cpu_s, pids))


# What answering costs the guests.


def _monitor(agent: Agent, sandbox: AsyncSandbox) -> Path:
    return agent.data_dir / "sandboxes" / sandbox.sandbox_id / "vm" / "freezer"


def _measure_answering(bench: Bench, monitors: list[Path], pids: list[int]) -> None:
    with _connected(monitors) as connections:
        for number in range(max(2, bench.runs // 4)):
            asked, silent = 0.0, 0.0
            # In the order A B B A, so that what only changes with time falls out.
            for asking in (True, False, False, True):
                share = _window(connections, pids, asking=asking)
                asked, silent = (asked + share, silent) if asking else (asked, silent + share)
            # The first time the windows' code is new to the VMs.
            if number:
                found = (asked - silent) / 2 / _FASTER * 100
                bench.figures.add(budgets.GUEST_CPU, found, _SHARE)


@contextlib.contextmanager
def _connected(monitors: list[Path]) -> Iterator[list[Freezer]]:
    """The second monitors, which nobody else needs meanwhile."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Freezer(path)) for path in monitors]


def _window(connections: list[Freezer], pids: list[int], *, asking: bool) -> float:
    """The processors that the VMs keep busy while their guests are asked, or are not."""
    period_s = MEMORY_PERIOD_S / _FASTER
    interval = {"path": _BALLOON, "property": "guest-stats-polling-interval"}
    for connection in connections:
        connection.execute("qom-set", interval | {"value": int(period_s) if asking else 0})
    began, used_s = time.monotonic(), _sum_cpu_s(pids)
    at = began
    while at - began < _WINDOW_S:
        at += period_s
        time.sleep(max(0.0, at - time.monotonic()))
        if asking:
            for connection in connections:
                connection.execute("qom-get", {"path": _BALLOON, "property": "guest-stats"})
    return (_sum_cpu_s(pids) - used_s) / (time.monotonic() - began)
