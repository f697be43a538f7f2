"""Pools on real VMs: what is taken from them is a sandbox like any other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.client.sandbox import AsyncSandbox, temporary_sandbox
from sandmartin.model import Settings
from sandmartin.transport import NewSandbox
from tests import world
from tests.vm.conftest import DEADLINE_S, RunningAgent, execute, run_agent

_SMALL = {"memory_mb": 256}


@pytest.fixture(scope="module")
async def pooled(settings: Settings, internet: world.Internet) -> AsyncIterator[RunningAgent]:
    """An agent with two VMs that wait, and a sandbox that is ready."""
    pools = replace(settings, vm_pool_size=2, ready_sandboxes="base=1")
    async with run_agent(pools) as agent:
        yield agent


def _groups(agent: RunningAgent, prefix: str) -> set[str]:
    """Control groups of the agent with this beginning, each with its process in it."""
    found = set()
    for path in Path("/sys/fs/cgroup").glob(f"**/sandmartin-{agent.instance_id}/{prefix}*"):
        if path.is_dir() and (path / "cgroup.procs").read_text():
            found.add(path.name)
    return found


async def _until_filled(agent: RunningAgent) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while len(_groups(agent, "waiting-")) < 2 or not _ready(agent):
            await asyncio.sleep(0.1)


def _ready(agent: RunningAgent) -> list[Path]:
    """Sandboxes that are nobody's, and know who they are."""
    entries = (agent.settings.data_dir / "sandboxes").glob("ready-*/journal.json")
    return [path for path in entries if '"token": ""' not in path.read_text()]


async def _text(sandbox: AsyncSandbox, script: str) -> str:
    result = await execute(sandbox, "sh", "-c", script)
    assert result.exit_code == 0, result
    return result.text.strip()


async def test_one_that_waited_gets_its_own_disk_and_memory(pooled: RunningAgent) -> None:
    for _ in range(2):
        # Another shape than what is ready, so that it is restored; the second has one waiting.
        async with pooled.sandbox(**_SMALL) as sandbox:
            await _text(sandbox, "echo mine >/root/own; echo mine >/dev/shm/own")
            group = _groups(pooled, "waiting-")
            await pooled.transport.pause(sandbox.sandbox_id)
            await _until_filled(pooled)
            await pooled.transport.resume(sandbox.sandbox_id, None)
            assert await _text(sandbox, "cat /root/own /dev/shm/own; sync; hostname") == (
                f"mine\nmine\n{sandbox.sandbox_id}"
            )
            # It took one of those that waited.
            assert _groups(pooled, "waiting-") != group
    assert await _text_of_new(pooled, "ls /root/own || echo none", **_SMALL) == "none"


async def _text_of_new(agent: RunningAgent, script: str, **shape: object) -> str:
    async with agent.sandbox(**shape) as sandbox:
        return await _text(sandbox, script)


async def test_a_ready_one_is_who_it_was_asked_to_be(pooled: RunningAgent) -> None:
    await _until_filled(pooled)
    (ready,) = _ready(pooled)
    began = time.monotonic()
    new = NewSandbox(sandbox_id="claimed", envs={"COLOUR": "sand"})
    async with temporary_sandbox(pooled.transport, new) as sandbox:
        took = time.monotonic() - began
        assert not ready.exists()
        script = 'echo "$COLOUR $(hostname) $(cat /etc/machine-id)"; date +%s.%N'
        named, now = (await _text(sandbox, script)).splitlines()
        colour, hostname, machine_id = named.split()
        assert (colour, hostname, len(machine_id)) == ("sand", "claimed", 32)
        assert abs(float(now) - time.time()) < 1
        # Nothing is started for it; far below what a restore takes.
        assert took < 0.2, took
        other = await _text_of_new(pooled, "cat /etc/machine-id /proc/sys/kernel/random/uuid")
        assert machine_id not in other
    assert not (pooled.settings.data_dir / "sandboxes" / "claimed").exists()
