"""Creating and using a sandbox: alone, many at once, and out of pools."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

from bench import budgets, processes
from bench.agents import Agent, Bench
from bench.inside import TRUE, fresh, new, run
from sandmartin.agent.guest import Command, Ended, Guest
from sandmartin.client.sandbox import AsyncSandbox

_CROWD = 20
#: What is settled after this time is not the create's any more.
_SETTLE_S = 5.0
_OVER = "exec of true, over the agent"
_DIRECT = "exec of true, of the guest agent directly"
_UNCOUNTED = 4


async def _create_to_true(bench: Bench, agent: Agent, create: str, to_true: str) -> None:
    began = time.monotonic()
    async with fresh(agent.transport) as sandbox:
        created = time.monotonic()
        await run(sandbox, TRUE)
        ended = time.monotonic()
    bench.figures.add(create, (created - began) * 1000)
    bench.figures.add(to_true, (ended - began) * 1000)


async def _warm_up(agent: Agent) -> None:
    """The first create of an agent makes what is missing, and the first command loads code."""
    async with fresh(agent.transport) as sandbox:
        await run(sandbox, TRUE)


async def measure_create(bench: Bench) -> None:
    """One after the other at once: what pools there are by default are empty or half full."""
    async with bench.agent() as agent:
        await _warm_up(agent)
        for _ in range(bench.runs):
            await _create_to_true(bench, agent, budgets.CREATE, budgets.CREATE_TO_TRUE)


async def measure_exec(bench: Bench) -> None:
    """Each command over the agent, and asked of the guest agent directly, first in turns."""
    async with (
        bench.agent() as agent,
        fresh(agent.transport) as sandbox,
        _direct(agent, sandbox) as guest,
    ):
        for number in range(2 * bench.runs + _UNCOUNTED):
            took_ms = {}
            ways = [(_OVER, run(sandbox, TRUE)), (_DIRECT, _run_directly(guest))]
            for name, work in ways if number % 2 else reversed(ways):
                began = time.monotonic()
                await work
                took_ms[name] = (time.monotonic() - began) * 1000
            # The first ones load code, in the guest and here.
            if number >= _UNCOUNTED:
                bench.figures.add(_OVER, took_ms[_OVER])
                bench.figures.add(_DIRECT, took_ms[_DIRECT])
                bench.figures.add(budgets.EXEC_EXTRA, took_ms[_OVER] - took_ms[_DIRECT])


@contextlib.asynccontextmanager
async def _direct(agent: Agent, sandbox: AsyncSandbox) -> AsyncIterator[Guest]:
    """The way to the guest agent that the host agent has, past it."""
    address = (await sandbox.info()).address
    journal = agent.data_dir / "sandboxes" / sandbox.sandbox_id / "journal.json"
    guest = Guest(address, json.loads(journal.read_bytes())["token"])
    try:
        yield guest
    finally:
        await guest.close()


async def _run_directly(guest: Guest) -> None:
    async with contextlib.aclosing(guest.start(Command(cmd=TRUE, timeout_s=60))) as events:
        async for event in events:
            if isinstance(event, Ended) and event.exit_code:
                raise RuntimeError(f"{TRUE} exited {event.exit_code}")


# Many at once.


async def _crowd(bench: Bench, agent: Agent, name: str) -> list[str]:
    """That many creates at once; all must succeed. They are left running."""
    made = [new() for _ in range(_CROWD)]
    with bench.figures.timed(name):
        await asyncio.gather(*(agent.transport.create(each) for each in made))
    return [each.sandbox_id for each in made]


async def _destroy(agent: Agent, sandbox_ids: list[str]) -> None:
    await asyncio.gather(*(agent.transport.destroy(each) for each in sandbox_ids))


async def measure_crowd(bench: Bench) -> None:
    async with bench.agent() as agent:
        await _warm_up(agent)
        for number in range(rounds := max(1, bench.runs // 5)):
            made = await _crowd(bench, agent, budgets.TWENTY)
            if number == rounds - 1:
                await asyncio.sleep(_SETTLE_S)
                for each in made:
                    pid = processes.vm_pid(agent.data_dir, each)
                    bench.figures.add(budgets.PSS_20, processes.pss_mb(pid), "MB")
            await _destroy(agent, made)


# Pools.


async def measure_waiting(bench: Bench) -> None:
    """With VMMs that wait for a state; before each create the pool is full again."""
    pool = 2
    async with bench.agent(vm_pool_size=pool, ready_sandboxes="") as agent:
        # The pool grows to its size with what is asked for.
        for _ in range(pool):
            await _warm_up(agent)
        for _ in range(bench.runs):
            await processes.quiet(agent.data_dir, spare=pool)
            name = "create, VMM waiting"
            await _create_to_true(bench, agent, name, budgets.WAITING_TO_TRUE)


async def measure_ready(bench: Bench) -> None:
    """From ready sandboxes; before each create the pool is full again."""
    async with bench.agent(vm_pool_size=1, ready_sandboxes="base=4") as agent:
        await _warm_up(agent)
        for _ in range(bench.runs):
            await processes.quiet(agent.data_dir, spare=4 + 1)
            await _create_to_true(bench, agent, budgets.READY, budgets.READY_TO_TRUE)


async def measure_ready_crowd(bench: Bench) -> None:
    async with bench.agent(vm_pool_size=1, ready_sandboxes=f"base={_CROWD}") as agent:
        for _ in range(max(1, bench.runs // 5)):
            await processes.quiet(agent.data_dir, spare=_CROWD + 1)
            await _destroy(agent, await _crowd(bench, agent, budgets.TWENTY_READY))
