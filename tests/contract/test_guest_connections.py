"""How the client of a guest agent uses its connections, and what it makes of a guest's clock."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent import assets
from sandmartin.agent.guest import Command, Ended, Guest
from tests.contract.guests import ME, TOKEN, RunningAgent, identity, impostor, running

#: What ends a response in chunks.
_LAST_CHUNK = b"0\r\n\r\n"


@pytest.fixture(scope="module")
async def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("guest")
    await assets._build_guest(into)
    return into / "sandmartin-guest"


@dataclass
class _Between:
    """Passes on what a client and an agent say, and keeps back the ends of responses."""

    agent: RunningAgent
    connections: int = 0
    #: Set: ends of responses may go.
    may_end: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        theirs, ours = await asyncio.open_connection(self.agent.host, self.agent.port)
        with contextlib.closing(ours):
            asking = asyncio.create_task(self._pass_on(reader, ours))
            try:
                while said := await theirs.read(65536):
                    head, end, _ = said.partition(_LAST_CHUNK)
                    writer.write(head)
                    if end:
                        await self.may_end.wait()
                        writer.write(end)
            finally:
                asking.cancel()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(65536):
            writer.write(said)
        writer.close()


@contextlib.asynccontextmanager
async def _between(binary: Path) -> AsyncIterator[tuple[_Between, Guest]]:
    with running(binary) as agent:
        between = _Between(agent)
        between.may_end.set()
        async with impostor(between.serve) as port:
            guest = Guest("127.0.0.1", TOKEN, port)
            await guest.introduce(identity(), 10)
            try:
                yield between, guest
            finally:
                await guest.close()


async def _run_until_its_end(guest: Guest) -> None:
    """As the SDK does, which leaves with the end of the command and not of the stream."""
    async with contextlib.aclosing(guest.start(Command(cmd="true", user=ME))) as events:
        async for event in events:
            if isinstance(event, Ended):
                assert event.exit_code == 0
                return


async def test_one_command_after_another_takes_one_connection(binary: Path) -> None:
    async with _between(binary) as (between, guest):
        for _ in range(3):
            between.may_end.clear()
            await _run_until_its_end(guest)
            # The listener has left, and only now does the response end.
            between.may_end.set()
            await asyncio.wait(guest._ending)
        assert between.connections == 1


async def test_a_response_that_never_ends_is_left(binary: Path) -> None:
    async with _between(binary) as (between, guest):
        between.may_end.clear()
        await _run_until_its_end(guest)
        begun = time.monotonic()
        async with asyncio.timeout(5):
            await asyncio.wait(guest._ending)
        assert time.monotonic() - begun < 2
        await _run_until_its_end(guest)
        begun = time.monotonic()
    # To close the client waits for nobody.
    assert time.monotonic() - begun < 0.4


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat()


@pytest.mark.parametrize(
    ("clocks", "introductions"),
    [
        pytest.param(lambda: {"unixNano": time.time_ns()}, 1, id="right"),
        pytest.param(lambda: {"unixNano": time.time_ns() - 10**9}, 2, id="late"),
        pytest.param(lambda: {"time": _iso(time.time())}, 1, id="right, of an earlier release"),
        pytest.param(lambda: {"time": _iso(time.time() - 1)}, 2, id="late, of an earlier release"),
        pytest.param(lambda: {"unixNano": 10**400}, 1, id="no time"),
        pytest.param(lambda: {"unixNano": "now", "time": 7}, 1, id="no number"),
        pytest.param(dict, 1, id="nothing"),
    ],
)
async def test_a_guest_whose_clock_is_late_is_told_again(clocks: Any, introductions: int) -> None:
    told = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked = await reader.readuntil(b"0\r\n\r\n")
            told.append(json.loads(asked[asked.index(b"{") : asked.rindex(b"}") + 1]))
            names = {name: told[-1][name] for name in ("sandboxId", "hostname", "machineId")}
            body = json.dumps(names | clocks())
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            writer.write(body.encode())

    async with impostor(serve) as port:
        guest = Guest("127.0.0.1", TOKEN, port)
        await guest.introduce(identity(), 5)
        await guest.close()
    assert len(told) == introductions
    for each in told:
        # Who was frozen by an earlier release reads the one, and its successors the other.
        stamp = datetime.fromisoformat(each["timestamp"]).timestamp()
        assert abs(stamp - each["unixNano"] / 1e9) < 0.001
        assert abs(stamp - time.time()) < 10
