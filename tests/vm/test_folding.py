"""Folding under real VMs: the chain of a running one's disk, and the memory of a paused one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent import proc
from sandmartin.agent.folding import DEPTH
from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.vmm.freezer import Freezer
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.model import new_sandbox_id
from tests.vm.conftest import RunningAgent
from tests.vm.test_snapshots import call, output

_CHECKPOINTS = 12
_LARGE_MB = 160
_DEADLINE_S = 90.0


@pytest.fixture(scope="module")
async def writing(agent: RunningAgent) -> AsyncIterator[AsyncSandbox]:
    async with agent.sandbox(memory_mb=512) as sandbox:
        yield sandbox


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(_DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"never came: {what}") from None


def entry(agent: RunningAgent, sandbox_id: str) -> Entry:
    (found,) = (e for i, e in DataDir(agent.settings.data_dir).read_all() if i == sandbox_id)
    assert found is not None
    return found


def opened(agent: RunningAgent, sandbox_id: str) -> list[str]:
    """The layers that the VM's QEMU has open, as it says."""
    run_dir = DataDir(agent.settings.data_dir).sandbox(sandbox_id).vm
    with Freezer(run_dir / "freezer") as freezer:
        nodes = freezer.execute("query-named-block-nodes", {"flat": True})
    return [node["node-name"] for node in nodes if node["drv"] == "qcow2"]


def held(agent: RunningAgent, sandbox_id: str) -> set[str]:
    """The layers' files that its process really holds."""
    vm = entry(agent, sandbox_id).vm
    assert vm is not None
    links = [str(fd.readlink()) for fd in Path(f"/proc/{vm.process.pid}/fd").iterdir()]
    return {Path(link.removesuffix(" (deleted)")).stem for link in links if ".qcow2" in link}


async def shortened(agent: RunningAgent, sandbox_id: str) -> None:
    """Wait for the chain to be short, in the journal and in QEMU alike."""
    await until(lambda: len(entry(agent, sandbox_id).layers) <= DEPTH, "the merge")
    await until(lambda: len(opened(agent, sandbox_id)) <= DEPTH + 1, "the VM's new chain")
    now = entry(agent, sandbox_id)
    chain = {*now.layers, now.top}
    assert set(opened(agent, sandbox_id)) == chain == held(agent, sandbox_id)


def memory(agent: RunningAgent, sandbox_id: str) -> dict[str, Any]:
    """The manifest of what a paused one sleeps in."""
    path = DataDir(agent.settings.data_dir).sandbox(sandbox_id).paused
    manifest: dict[str, Any] = json.loads(
        json.loads((path / "manifest.json").read_bytes())["manifest"]
    )
    return manifest


_CHECK = "echo 3 >/proc/sys/vm/drop_caches; cd /root && sha256sum --quiet -c sums && wc -l <sums"


@pytest.mark.full
async def test_chain_of_a_running_vm_stays_short_and_its_files_right(
    agent: RunningAgent, writing: AsyncSandbox
) -> None:
    name = writing.sandbox_id
    first = ""
    for number in range(_CHECKPOINTS):
        script = f"""cd /root && head -c 1M /dev/urandom >file{number} && rm -f gone
            head -c 300k /dev/urandom >gone && head -c 100k /dev/urandom >same
            sed -i '/ same$/d' sums 2>/dev/null; sha256sum file{number} same >>sums; sync"""
        await output(writing, script)
        made = await call(agent, "CreateCheckpoint", sandboxId=name, comment="")
        first = first or made["checkpoint"]["checkpointId"]
        if len(entry(agent, name).layers) > DEPTH:
            # It goes on writing while its chain is merged and changed under it.
            writes = "for i in $(seq 60); do date >>/root/log; sync; done; wc -l </root/log"
            writing_on = asyncio.ensure_future(output(writing, f"rm -f /root/log; {writes}"))
            await shortened(agent, name)
            assert await writing_on == "60"
    assert len(entry(agent, name).layers) < _CHECKPOINTS
    assert await output(writing, _CHECK) == str(_CHECKPOINTS + 1)
    child = new_sandbox_id()
    await call(agent, "ForkSandbox", sandboxId=name, childIds=[child])
    await call(agent, "FlattenRootfs", sandboxId=child, name="merged")
    image = agent.settings.data_dir / "images" / "merged" / "rootfs.ext4"
    copy = image.with_name("copy.ext4")
    try:
        await proc.run(["cp", "--sparse=always", image, copy])
        copy.chmod(0o600)
        # It was mounted: what is in its journal belongs to it.
        await proc.run(["e2fsck", "-E", "journal_only", "-fy", copy], check=False)
        await proc.run(["e2fsck", "-fn", copy])
    finally:
        copy.unlink(missing_ok=True)
    await call(agent, "DeleteSnapshot", name="merged")
    await call(agent, "RollbackSandbox", sandboxId=name, checkpointId=first)
    assert await output(writing, _CHECK) == "2"
    assert await output(writing, "ls /root/file*") == "/root/file0"
    await shortened(agent, name)


@pytest.mark.full
async def test_memory_that_was_folded_comes_back_and_costs_little_from_then_on(
    agent: RunningAgent, writing: AsyncSandbox
) -> None:
    name = writing.sandbox_id
    fill = f"head -c {_LARGE_MB}M /dev/urandom >/dev/shm/big"
    check = "sha256sum </dev/shm/big"
    digest = await output(writing, f"{fill}; {check}")
    await call(agent, "PauseSandbox", sandboxId=name)
    old = memory(agent, name)
    assert old["diff"]["size_bytes"] > _LARGE_MB << 20
    await until(lambda: memory(agent, name)["diff"] is None, "the fold")
    path = DataDir(agent.settings.data_dir).sandbox(name).paused
    await until(lambda: not (path / "ram.diff").exists(), "the end of the old diff")
    await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
    assert await output(writing, check) == digest
    await call(agent, "PauseSandbox", sandboxId=name)
    again = memory(agent, name)
    assert again["base"] != old["base"]
    assert again["diff"]["size_bytes"] < (_LARGE_MB << 20) // 4
    await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
    assert await output(writing, f"{check}; rm /dev/shm/big") == digest
