"""`sandmartin shell` on a real terminal, against an agent whose commands have real ones, too."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.command_line import Line, finish
from tests.fakes_localagent import LocalAgent, serving
from tests.terminal import Terminal, ended


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[LocalAgent, None]:
    (tmp_path / "root" / "sb1").mkdir(parents=True)
    agent = LocalAgent(tmp_path / "root")
    async with serving(agent, tmp_path / "agent.sock"):
        yield agent


@pytest.fixture
async def terminal(agent: LocalAgent, tmp_path: Path) -> AsyncGenerator[Terminal, None]:
    terminal = Terminal(SANDMARTIN_DATA_DIR=os.fspath(tmp_path), PS1="$ ")
    yield terminal
    terminal.close()


async def test_every_key_is_the_shells_until_it_exits(terminal: Terminal) -> None:
    child = await terminal.start("shell", "-e", "WHO=me", "sb1")
    terminal.type("echo $((6*7))-$WHO-$TERM; stty size\n")
    await terminal.shows(f"42-me-{os.environ.get('TERM') or 'xterm'}")
    await terminal.shows("40 100")
    assert not terminal.is_as_before
    terminal.resize(120, 30)
    # The shell is told of it in its own time.
    terminal.type("while [ \"$(stty size)\" != '30 120' ]; do sleep 0.02; done; echo re''sized\n")
    await terminal.shows("resized")
    # Ctrl-C is a key like the others: it ends what the shell runs, and neither of the two.
    terminal.type("echo go''ing; sleep 1000\n")
    await terminal.shows("going")
    terminal.type("\x03")
    terminal.type("echo still''here\n")
    await terminal.shows("stillhere")
    terminal.type("exit 7\n")
    assert await ended(child) == 7
    assert terminal.is_as_before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_the_terminal_is_as_it_was_however_the_shell_is_ended(
    terminal: Terminal, agent: LocalAgent, number: signal.Signals
) -> None:
    child = await terminal.start("shell", "sb1")
    terminal.type("echo re''ady\n")
    await terminal.shows("ready")
    child.send_signal(number)
    assert await ended(child) == 128 + number
    assert terminal.is_as_before
    # Nobody listens to the shell any more.
    assert agent.signals == [signal.SIGHUP]


async def test_the_terminal_is_as_it_was_when_the_agent_breaks_off(
    terminal: Terminal, agent: LocalAgent
) -> None:
    agent.break_off = True
    child = await terminal.start("shell", "sb1")
    assert await ended(child) == 125
    await terminal.shows("sandmartin: the agent did not say how the command ended\r\n")
    assert terminal.is_as_before


async def test_without_a_terminal_there_is_no_shell(agent: LocalAgent, tmp_path: Path) -> None:
    line = Line(tmp_path)
    code, out, err = await finish(await line.start("shell", "sb1"))
    assert (code, out) == (125, b"")
    assert err.startswith(b"sandmartin: a shell needs a terminal")
    assert b"hint: without one: sandmartin exec sb1 -- sh\n" in err
