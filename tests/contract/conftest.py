"""A host on fake VMs; the guest agent as a plain process, built once, and its clients."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from sandmartin.agent import assets
from sandmartin.agent.guest import Guest
from sandmartin.agent.host import Host
from tests.contract.guests import ME, TOKEN, RunningAgent, identity, running
from tests.fakes_agent import Fakes, machine_directory, make_machine


@pytest.fixture
def directory() -> Iterator[Path]:
    with machine_directory() as path:
        yield path


@pytest.fixture
def fakes(directory: Path) -> Fakes:
    return make_machine(directory)


@pytest.fixture
async def host(fakes: Fakes) -> AsyncIterator[Host]:
    async with fakes.host() as host:
        yield host


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("guest")
    asyncio.run(assets._build_guest(into))
    return into / "sandmartin-guest"


@pytest.fixture(scope="module")
def agent(binary: Path) -> Iterator[RunningAgent]:
    """An agent that has been introduced, shared by the tests that leave it as it is."""
    with running(binary) as started:
        asyncio.run(_introduce(started))
        yield started


async def _introduce(agent: RunningAgent) -> None:
    guest = agent.client()
    await guest.introduce(identity(SANDBOX_VAR="of the sandbox"), 10)
    await guest.close()


@pytest.fixture
async def guest(agent: RunningAgent) -> AsyncIterator[Guest]:
    client = agent.client()
    yield client
    await client.close()


@pytest.fixture
def sdk(agent: RunningAgent) -> Iterator[httpx.Client]:
    """Requests as E2B's SDK makes them: Connect with JSON, the user in basic authentication."""
    user = base64.b64encode(f"{ME}:".encode()).decode()
    headers = {
        "X-Access-Token": TOKEN,
        "Authorization": f"Basic {user}",
        "connect-protocol-version": "1",
    }
    with httpx.Client(base_url=agent.url, headers=headers, timeout=10) as client:
        yield client
