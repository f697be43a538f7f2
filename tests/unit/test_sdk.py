"""What the SDK promises of sandboxes and connections, over the host contract without VMs."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandmartin import AsyncSandbox, CommandFailed, CommandResult, Sandbox
from sandmartin.client import connection
from sandmartin.client.results import MAX_OUTPUT_BYTES, CommandTimedOut, Output
from sandmartin.errors import Exhausted, Invalid, NotFound
from sandmartin.transport import Ended, Stderr, Stdout
from tests.fakes_localagent import LocalAgent, serving

DEADLINE_S = 30.0


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[LocalAgent]:
    """An agent on a loop of its own, so that whoever waits does not keep it from answering."""
    (tmp_path / "root").mkdir()
    ready, leave = threading.Event(), threading.Event()
    made: list[LocalAgent] = []

    async def serve() -> None:
        made.append(LocalAgent(tmp_path / "root"))
        async with serving(made[0], tmp_path / "s"):
            ready.set()
            await asyncio.to_thread(leave.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(DEADLINE_S)
    yield made[0]
    leave.set()
    thread.join(DEADLINE_S)


def test_a_fork_makes_all_or_none(agent: LocalAgent, tmp_path: Path) -> None:
    with Sandbox.create(url=f"unix:{tmp_path}/s") as sandbox:
        agent.room = 1
        with pytest.raises(Exhausted, match="no room"):
            sandbox.fork(2)
        assert agent.sandboxes == [sandbox.sandbox_id]
        agent.room = 2
        assert len(sandbox.fork(2)) == 2
        assert len(agent.sandboxes) == 3


def test_the_context_kills_whatever_happens(agent: LocalAgent, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Sandbox.create(url=f"unix:{tmp_path}/s"):
        raise KeyboardInterrupt
    assert agent.sandboxes == []
    with pytest.raises(NotFound):
        Sandbox.create("none", url=f"unix:{tmp_path}/s")
    assert agent.sandboxes == []


def test_one_sandbox_serves_several_loops(agent: LocalAgent, tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/s"

    async def create() -> AsyncSandbox:
        return await AsyncSandbox.create(url=url)

    async def use(sandbox: AsyncSandbox) -> str:
        return (await sandbox.commands.run("echo hi")).stdout

    sandbox = asyncio.run(create())
    assert [asyncio.run(use(sandbox)) for _ in range(3)] == ["hi\n"] * 3
    assert Sandbox(sandbox).commands.run("echo hi").stdout == "hi\n"
    # What a loop had open went with it.
    assert all(not loop.is_closed() or not _open(loop) for loop in connection._open)
    gc.collect()
    asyncio.run(sandbox.kill())


def _open(loop: asyncio.AbstractEventLoop) -> list[object]:
    found = connection._open[loop].values()
    return [each for each in found if not each.transport._http.is_closed]  # type: ignore[attr-defined]


_SCRIPT = """
from sandmartin import Sandbox
sandbox = Sandbox.create(url={url!r})
handle = sandbox.commands.run("sleep 1000", background=True)
print(sandbox.commands.run("echo hi").stdout, end="")
sandbox.kill()
"""


def test_a_program_that_just_ends_says_nothing(agent: LocalAgent, tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-W", "error", "-c", _SCRIPT.format(url=f"unix:{tmp_path}/s")]
    done = subprocess.run(words, capture_output=True, timeout=DEADLINE_S, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")


def test_a_url_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("SANDMARTIN_API_KEY", raising=False)
    with pytest.raises(Invalid, match="no API key") as refused:
        Sandbox.create(url="http://127.0.0.1:1")
    assert "sandmartin login" in refused.value.hint


def test_output_is_bounded() -> None:
    output, piece = Output(), b"x" * (MAX_OUTPUT_BYTES // 4)
    for _ in range(4):
        output.add(Stdout(piece))
    assert not output.result(Ended(exit_code=0)).truncated
    output.add(Stderr(b"end"))
    result = output.result(Ended(exit_code=0))
    assert (result.truncated, result.stderr) == (True, "end")
    assert len(result.stdout_bytes) == 3 * len(piece)
    # Whoever is behind goes on with the oldest that is kept.
    seen, event = output.after(0)
    assert (seen, event) == (2, Stdout(piece))
    assert output.after(5) == (5, None)


def test_errors_survive_a_pickle() -> None:
    result = CommandResult(exit_code=1, stdout="o", stderr="e")
    for error in (CommandFailed(result), CommandTimedOut(result, 3)):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.result) == (type(error), str(error), result)
