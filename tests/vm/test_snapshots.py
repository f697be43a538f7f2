"""Pausing, resuming, forking, going back, and templates, on real VMs with real memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import AlreadyExists, Conflict, Denied, Invalid, NotFound
from sandmartin.model import new_sandbox_id
from sandmartin.transport import NewSandbox
from tests.vm.conftest import RunningAgent, execute

#: Counts in memory alone, and answers each line with its count.
_COUNTER = """
import os, sys
os.mkfifo("/dev/shm/ask"); os.mkfifo("/dev/shm/answer")
count = 0
while True:
    with open("/dev/shm/ask") as ask:
        ask.read()
    count += 1
    with open("/dev/shm/answer", "w") as answer:
        answer.write(f"{os.getpid()} {count}\\n")
"""


async def call(agent: RunningAgent, method: str, **message: Any) -> dict[str, Any]:
    return await agent.transport._call(method, message, deadline_s=60)


async def start_counter(sandbox: AsyncSandbox) -> None:
    script = f"python3 -c '{_COUNTER}' >/dev/null 2>&1 & until [ -p /dev/shm/answer ]; do :; done"
    assert (await execute(sandbox, "sh", "-c", script)).exit_code == 0


async def count(sandbox: AsyncSandbox) -> tuple[str, int]:
    """Pid and count of the counter, which counts at that."""
    result = await execute(sandbox, "sh", "-c", "echo >/dev/shm/ask; cat /dev/shm/answer")
    pid, counted = result.text.split()
    return pid, int(counted)


async def output(sandbox: AsyncSandbox, script: str) -> str:
    result = await execute(sandbox, "sh", "-c", script)
    assert result.exit_code == 0, result
    return result.text.strip()


async def state(agent: RunningAgent, sandbox_id: str) -> str:
    infos = {each.sandbox_id: each for each in await agent.transport.list_sandboxes()}
    return infos[sandbox_id].state if sandbox_id in infos else "gone"


async def test_what_the_time_went_to_is_told(agent: RunningAgent) -> None:
    sandbox_id = new_sandbox_id()
    began_at = time.monotonic()
    made = await agent.transport.create(NewSandbox(sandbox_id=sandbox_id))
    took_s = time.monotonic() - began_at
    told = {each.name: each.duration_s for each in made.phases}
    assert {"slot", "vmm", "restore", "guest"} <= set(told)
    assert took_s / 2 < sum(told.values()) <= took_s
    paused = {each.name for each in await agent.transport.pause(sandbox_id)}
    assert {"freeze", "write", "end"} <= paused
    woken = {each.name for each in (await agent.transport.resume(sandbox_id, None)).phases}
    assert {"restore", "guest"} <= woken and not woken & paused - {"record", "turn"}
    await agent.transport.destroy(sandbox_id)


@pytest.fixture(scope="module")
async def counting(agent: RunningAgent) -> AsyncIterator[AsyncSandbox]:
    """A sandbox with a counter in its memory and a file on its disk."""
    async with agent.sandbox() as sandbox:
        await start_counter(sandbox)
        await output(sandbox, "echo one >/root/file; echo one >/dev/shm/file")
        yield sandbox


async def test_twenty_pauses_keep_processes_and_files_and_cost_the_same(
    agent: RunningAgent, counting: AsyncSandbox
) -> None:
    pid, before = await count(counting)
    name, took = counting.sandbox_id, []
    for cycle in range(20):
        began = time.monotonic()
        await call(agent, "PauseSandbox", sandboxId=name)
        took.append(time.monotonic() - began)
        assert await state(agent, name) == "paused"
        with pytest.raises(Conflict, match="paused"):
            await execute(counting, "true")
        await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
        assert await count(counting) == (pid, before + cycle + 1)
    assert await output(counting, "cat /root/file /dev/shm/file; hostname") == f"one\none\n{name}"
    # Diffs are cumulative against one base: later ones may not grow with the number of pauses.
    assert sorted(took[-5:])[2] < 3 * sorted(took[:5])[2], took
    await call(agent, "PauseSandbox", sandboxId=name)
    await call(agent, "PauseSandbox", sandboxId=name)
    await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
    await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)


async def test_forks_go_on_as_others_and_the_source_as_itself(
    agent: RunningAgent, counting: AsyncSandbox
) -> None:
    pid, before = await count(counting)
    ids = [new_sandbox_id(), new_sandbox_id()]
    answer = await call(agent, "ForkSandbox", sandboxId=counting.sandbox_id, childIds=ids)
    assert [(each["sandboxId"], each["status"]) for each in answer["children"]] == [
        (each, "running") for each in ids
    ]
    family = [counting, *(AsyncSandbox(agent.transport, each) for each in ids)]
    try:
        for member in family:
            assert await count(member) == (pid, before + 1)
        await output(family[1], "echo two >/root/file")
        files = [await output(member, "cat /root/file") for member in family]
        assert files == ["one", "two", "one"]
        for probe in (
            "hostname",
            "cat /etc/machine-id",
            "head -c 16 /dev/urandom | od -An -tx1",
            "cat /proc/sys/kernel/random/uuid",
        ):
            assert len({await output(member, probe) for member in family}) == 3, probe
        assert await output(family[1], "hostname") == ids[0]
        clock = float(await output(family[2], "date +%s.%N"))
        assert abs(clock - time.time()) < 2
    finally:
        for each in ids:
            await agent.transport.destroy(each)
    assert await count(counting) == (pid, before + 2)


async def test_a_checkpoint_is_returned_to_as_often_as_wanted(
    agent: RunningAgent, counting: AsyncSandbox
) -> None:
    name = counting.sandbox_id
    pid, before = await count(counting)
    made = await call(agent, "CreateCheckpoint", sandboxId=name, comment="before the change")
    checkpoint = made["checkpoint"]["checkpointId"]
    for _ in range(2):
        assert await count(counting) == (pid, before + 1)
        await output(counting, "echo changed >/root/file; echo more >/root/other; sync")
        await call(agent, "RollbackSandbox", sandboxId=name, checkpointId=checkpoint)
        assert await output(counting, "cat /root/file; ls /root/other || true") == "one"
    assert await count(counting) == (pid, before + 1)
    listed = (await call(agent, "ListCheckpoints", sandboxId=name))["checkpoints"]
    assert [(each["checkpointId"], each["comment"]) for each in listed] == [
        (checkpoint, "before the change")
    ]
    await call(agent, "DeleteCheckpoint", sandboxId=name, checkpointId=checkpoint)
    with pytest.raises(NotFound):
        await call(agent, "RollbackSandbox", sandboxId=name, checkpointId=checkpoint)
    assert await count(counting) == (pid, before + 2)


async def test_a_live_snapshot_and_a_paused_one_become_templates(
    agent: RunningAgent, counting: AsyncSandbox
) -> None:
    name = counting.sandbox_id
    pid, before = await count(counting)
    await call(agent, "CreateSnapshot", sandboxId=name, name="living", live=True)
    assert await count(counting) == (pid, before + 1)
    await call(agent, "CreateSnapshot", sandboxId=name, name="asleep")
    assert await state(agent, name) == "paused"
    with pytest.raises(AlreadyExists):
        await call(agent, "CreateSnapshot", sandboxId=name, name="living")
    with pytest.raises(Invalid):
        await call(agent, "CreateSnapshot", sandboxId=name, name="../up")
    with pytest.raises(Denied):
        await call(agent, "DeleteSnapshot", name="base")
    async with agent.sandbox(template="asleep") as first, agent.sandbox(template="living") as other:
        assert await count(first) == (pid, before + 2)
        assert await count(other) == (pid, before + 1)
        assert await output(first, "hostname") == first.sandbox_id
        with pytest.raises(Conflict, match=name):
            await call(agent, "DeleteSnapshot", name="asleep")
    await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
    assert await count(counting) == (pid, before + 2)
    listed = (await call(agent, "ListTemplates"))["templates"]
    kinds = {each["name"]: each["kind"] for each in listed}
    # Setup may have built further images.
    kinds = {each: kind for each, kind in kinds.items() if each == "base" or kind == "snapshot"}
    assert kinds == {"base": "image", "asleep": "snapshot", "living": "snapshot"}


async def test_a_disk_becomes_an_image_of_its_own(agent: RunningAgent) -> None:
    async with agent.sandbox() as sandbox:
        await output(sandbox, "echo kept >/root/kept")
        answer = await call(agent, "FlattenRootfs", sandboxId=sandbox.sandbox_id, name="flat")
        size_bytes = int(answer["sizeBytes"])
        assert 100 << 20 < size_bytes < 1500 << 20
        assert await state(agent, sandbox.sandbox_id) == "gone"
    async with agent.sandbox(template="flat") as sandbox:
        assert await output(sandbox, "cat /root/kept") == "kept"
        with pytest.raises(Conflict, match=sandbox.sandbox_id):
            await call(agent, "DeleteSnapshot", name="flat")
    await call(agent, "DeleteSnapshot", name="flat")
    with pytest.raises(NotFound):
        async with agent.sandbox(template="flat"):
            pass


async def test_an_idle_sandbox_is_paused_and_that_is_told_once(agent: RunningAgent) -> None:
    async with agent.sandbox(timeout_s=2) as sandbox:
        name = sandbox.sandbox_id
        async with asyncio.timeout(30):
            while await state(agent, name) != "paused":
                await asyncio.sleep(0.1)
        await call(agent, "ResumeSandbox", sandboxId=name, timeoutSec=0)
        assert await output(sandbox, "echo here") == "here"


async def test_a_larger_disk_is_grown_after_the_restore(agent: RunningAgent) -> None:
    async with agent.sandbox(disk_size_mb=8000) as sandbox:
        size = int(await output(sandbox, "df -m --output=size / | tail -1"))
        assert 7400 < size <= 8000


async def test_metrics_tell_what_a_sandbox_does(
    agent: RunningAgent, counting: AsyncSandbox
) -> None:
    await output(counting, "timeout 2 sh -c 'while :; do :; done' || true")
    name = counting.sandbox_id
    points = (await call(agent, "GetSandboxMetrics", sandboxId=name, range="10m"))["points"]
    assert max(float(point.get("cpuPct", 0)) for point in points) > 50
    assert max(int(point.get("memBytes", 0)) for point in points) > 20 << 20
    assert int(points[-1]["diskBytes"]) > 0
    with pytest.raises(Invalid) as refused:
        await call(agent, "GetSandboxMetrics", sandboxId=name, range="1y")
    assert "10m" in refused.value.hint
    flushed = await call(agent, "FlushSandboxMetrics", sandboxId=name)
    assert len(flushed["points10m"]) >= len(points)


async def test_a_damaged_memory_is_refused_and_the_disk_goes_on(agent: RunningAgent) -> None:
    async with agent.sandbox() as sandbox:
        await output(sandbox, "echo kept >/root/kept; sync")
        name = sandbox.sandbox_id
        await call(agent, "PauseSandbox", sandboxId=name)
        diff = agent.settings.data_dir / "sandboxes" / name / "paused" / "ram.diff"
        content = bytearray(diff.read_bytes())
        content[len(content) // 2] ^= 1
        diff.write_bytes(content)
        await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
        assert await output(sandbox, "cat /root/kept") == "kept"
