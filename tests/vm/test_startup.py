"""What an image starts, on real VMs: there at once in what is restored, and in what boots."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from sandmartin.agent.assets import Assets
from sandmartin.agent.traits import Ready, Start, Traits
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import ToolFailed
from sandmartin.model import Settings, Shape
from tests import world
from tests.vm.conftest import DEADLINE_S, RunningAgent, execute, run_agent

PORT = 8080
WARM, COLD = {"memory_mb": 256}, {"memory_mb": 320}
SERVES = Traits(
    start=Start(
        command=f'echo "$COLOUR $(id -un) $PWD" >who; exec python3 -m http.server {PORT}',
        user="user",
        cwd="/home/user",
        envs={"COLOUR": "sand"},
    ),
    ready=Ready(port=PORT, path="/who", deadline_s=DEADLINE_S),
)
FAILS = Traits(start=Start(command="echo no such thing >&2; exit 3"), ready=Ready(port=PORT))


@pytest.fixture(scope="module")
async def agent(settings: Settings, internet: world.Internet) -> AsyncIterator[RunningAgent]:
    """An agent with images that start something over the disk of `base`."""
    base = Assets.find(settings).images["base"]
    for name, traits in (("serves", SERVES), ("fails", FAILS)):
        directory = settings.data_dir / "images" / name
        directory.mkdir(parents=True)
        (directory / "rootfs.ext4").symlink_to(base)
        traits.write(directory / "rootfs.ext4")
    shapes = (Shape(memory_mb=WARM["memory_mb"]),)
    async with run_agent(replace(settings, warm_shapes=shapes)) as agent:
        yield agent


async def _served(agent: RunningAgent, sandbox: AsyncSandbox, path: str = "who") -> str:
    """What is served in a sandbox, asked once and without patience."""
    url = f"http://{agent.host_ip(sandbox.sandbox_id)}:{PORT}/{path}"
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        return (await client.get(url)).raise_for_status().text


@pytest.mark.parametrize("shape", [WARM, COLD], ids=["restored", "booted"])
async def test_is_there_when_a_create_answers(agent: RunningAgent, shape: dict[str, int]) -> None:
    pids = set()
    for number in range(2):
        async with agent.sandbox(template="serves", envs={"N": str(number)}, **shape) as sandbox:
            assert await _served(agent, sandbox) == "sand user /home/user\n"
            (process,) = await sandbox.processes()
            assert process.tag == "start"
            pids.add(process.pid)
            # The sandbox is itself all the same.
            result = await execute(sandbox, "sh", "-c", 'echo "$N $(hostname)"; pgrep -c python3')
            assert result.text == f"{number} {sandbox.sandbox_id}\n1\n"
            await agent.transport.pause(sandbox.sandbox_id)
            await agent.transport.resume(sandbox.sandbox_id, None)
            assert await _served(agent, sandbox) == "sand user /home/user\n"
    if shape is WARM:
        assert len(pids) == 1


async def test_what_fails_is_told(agent: RunningAgent) -> None:
    with pytest.raises(ToolFailed, match="exited 3; it said: 'no such thing'"):
        async with agent.sandbox(template="fails", **WARM):
            raise AssertionError("it was created")
