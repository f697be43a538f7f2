"""Operations at once, and in an order in which they make no sense, on real VMs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from sandmartin.agent.journal import DataDir
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import Conflict, NotFound
from sandmartin.model import new_sandbox_id
from sandmartin.transport import NewSandbox
from tests.vm.conftest import RunningAgent, execute


async def call(agent: RunningAgent, method: str, **message: Any) -> dict[str, Any]:
    return await agent.transport._call(method, message, deadline_s=60)


def _entry(agent: RunningAgent, sandbox_id: str) -> tuple[str, str]:
    """What tells in a journal that something is being done."""
    entry = dict(DataDir(agent.settings.data_dir).read_all())[sandbox_id]
    assert entry is not None
    return entry.state, entry.next_top


async def states(agent: RunningAgent) -> dict[str, str]:
    return {each.sandbox_id: each.state for each in await agent.transport.list_sandboxes()}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("PauseSandbox", {}),
        ("ResumeSandbox", {"keepTimeout": True}),
        ("ForkSandbox", {"childIds": ["sbchild1", "sbchild2"]}),
        ("CreateSnapshot", {"name": "taken"}),
        ("CreateSnapshot", {"name": "taken", "live": True}),
    ],
    ids=["pause", "resume", "fork", "snapshot", "live snapshot"],
)
async def test_destroy_wins(agent: RunningAgent, method: str, message: dict[str, Any]) -> None:
    name = new_sandbox_id()
    await agent.transport.create(NewSandbox(sandbox_id=name))
    if method == "ResumeSandbox":
        await call(agent, "PauseSandbox", sandboxId=name)
    before = _entry(agent, name)
    doing = asyncio.create_task(call(agent, method, sandboxId=name, **message))
    async with asyncio.timeout(30):
        while _entry(agent, name) == before and not doing.done():
            await asyncio.sleep(0.001)
    await agent.transport.destroy(name)
    assert name not in await states(agent)
    with contextlib.suppress(Conflict, NotFound):
        await doing
    # What came of it is whole, and outlives what it came from.
    for child in [each for each in await states(agent) if each.startswith("sbchild")]:
        told = await execute(AsyncSandbox(agent.transport, child), "hostname")
        assert told.text == f"{child}\n"
        await agent.transport.destroy(child)
    templates = (await call(agent, "ListTemplates"))["templates"]
    if "taken" in {each["name"] for each in templates}:
        async with agent.sandbox(template="taken") as sandbox:
            assert (await execute(sandbox, "true")).exit_code == 0
        await call(agent, "DeleteSnapshot", name="taken")


async def test_what_is_so_already_is_success_and_what_cannot_be_is_told(
    agent: RunningAgent,
) -> None:
    async with agent.sandbox() as sandbox:
        name = sandbox.sandbox_id
        await call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True)
        pauses = (call(agent, "PauseSandbox", sandboxId=name) for _ in range(2))
        assert all(set(each) <= {"phases"} for each in await asyncio.gather(*pauses))
        await call(agent, "PauseSandbox", sandboxId=name)
        assert await states(agent) == {name: "paused"}
        for method, message in (
            ("ForkSandbox", {"count": 1}),
            ("CreateCheckpoint", {}),
            ("CreateSnapshot", {"name": "none", "live": True}),
        ):
            with pytest.raises(Conflict, match="is paused"):
                await call(agent, method, sandboxId=name, **message)
        resumes = (call(agent, "ResumeSandbox", sandboxId=name, keepTimeout=True) for _ in range(2))
        assert [each["status"] for each in await asyncio.gather(*resumes)] == ["running"] * 2
        assert (await execute(sandbox, "hostname")).text == f"{name}\n"
    for method in ("PauseSandbox", "ResumeSandbox", "ForkSandbox"):
        with pytest.raises(NotFound):
            await call(agent, method, sandboxId=name)
