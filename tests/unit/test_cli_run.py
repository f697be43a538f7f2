"""`sandmartin run` as a process of its own, against an agent whose sandboxes are processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.command_line import DEADLINE_S, Line, finish, say_ready, until
from tests.fakes_localagent import LocalAgent, serving

READY_AND_WAIT = "echo ready; while :; do sleep 0.05; done"


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[LocalAgent, None]:
    (tmp_path / "root").mkdir()
    agent = LocalAgent(tmp_path / "root")
    async with serving(agent, tmp_path / "agent.sock"):
        yield agent
    assert agent.sandboxes == []


@pytest.fixture
async def line(tmp_path: Path, agent: LocalAgent) -> AsyncGenerator[Line, None]:
    line = Line(tmp_path)
    yield line
    await line.end()


# What passes through.


async def test_output_files_environment_and_exit_code_are_the_commands(
    line: Line, agent: LocalAgent, tmp_path: Path
) -> None:
    content = os.urandom(600_000)
    (tmp_path / "upload").write_bytes(content)
    flags = ("-e", "WHO=me", "--file", f"{tmp_path}/upload:/data", "--memory", "256")
    script = 'cat data; echo "$WHO" >&2; exit 7'
    child = await line.run("sh", "-c", script, flags=flags)
    assert await finish(child) == (7, content, b"me\n")
    assert agent.created[0].memory_mb == 256
    assert agent.destroyed == [agent.created[0].sandbox_id]


async def test_input_and_output_are_live(line: Line) -> None:
    child = await line.run("cat", stdin=PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        for said in (b"one\n", b"two\n"):
            child.stdin.write(said)
            assert await child.stdout.readline() == said
    big = os.urandom(3_000_000)
    code, out, err = await finish(child, big)
    assert (code, err) == (0, b"")
    assert hashlib.sha256(out).digest() == hashlib.sha256(big).digest()


async def test_a_command_may_leave_its_input_unread(line: Line, tmp_path: Path) -> None:
    zero = os.open("/dev/zero", os.O_RDONLY)
    try:
        child = await line.run("head", "-c", "3", stdin=zero)
        assert await finish(child) == (0, b"\0\0\0", b"")
        # Closed by a command that goes on.
        child = await line.run("sh", "-c", "exec <&-; sleep 0.3; echo on", stdin=zero)
        assert await finish(child) == (0, b"on\n", b"")
    finally:
        os.close(zero)


async def test_closed_streams_of_ours_lead_nowhere_else(line: Line) -> None:
    command = ("--", "sh", "-c", "cat; echo out; echo err >&2; exit 3")
    child = await line.start("run", *command, shell="exec LINE <&- 2>&-")
    assert await finish(child) == (3, b"out\n", b"")
    child = await line.start("run", *command, shell="exec LINE >&-")
    assert await finish(child) == (3, b"", b"err\n")


@pytest.mark.parametrize("words", [("run", "--", "yes"), ("ls",), ("ls", "--json")])
async def test_without_a_reader_we_end_as_others_do(line: Line, words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        child = await line.start(*words, stdout=write)
    finally:
        os.close(write)
    assert await finish(child) == (141, b"", b"")


async def test_listing_and_killing(line: Line, agent: LocalAgent, tmp_path: Path) -> None:
    for sandbox_id in ("sb1", "sb2"):
        (tmp_path / "root" / sandbox_id).mkdir()
    _, out, _ = await finish(await line.start("ls"))
    head, *rows = out.decode().splitlines()
    assert head.split()[:2] == ["ID", "STATE"]
    assert [row.split()[0] for row in rows] == ["sb1", "sb2"]
    assert rows[0].endswith("2023-11-14T22:13:20Z")
    _, out, _ = await finish(await line.start("ls", "--json"))
    assert [each["sandbox_id"] for each in json.loads(out)] == ["sb1", "sb2"]
    assert await finish(await line.start("kill", "sb1", "sb2")) == (0, b"sb1\nsb2\n", b"")


# What goes wrong.


@pytest.mark.parametrize(
    ("flags", "command", "code", "says"),
    [
        ((), "nope", 126, "sandmartin: nope: No such file or directory\n"),
        (
            ("-t", "none"),
            "true",
            125,
            "sandmartin: there is no template 'none'\nhint: the templates here are: base\n",
        ),
        (("--file", "/proc/self/mem:/x"), "true", 125, "sandmartin: /proc/self/mem cannot be read"),
    ],
)
async def test_failures_have_a_code_and_a_sentence(
    line: Line, flags: tuple[str, ...], command: str, code: int, says: str
) -> None:
    ended, out, err = await finish(await line.run(command, flags=flags))
    assert (ended, out) == (code, b"")
    assert err.decode().startswith(says)


async def test_an_agent_that_breaks_off_is_no_exit_code_of_the_command(
    line: Line, agent: LocalAgent
) -> None:
    agent.break_off = True
    code, _, err = await finish(await line.run("true"))
    assert code == 125
    assert err == b"sandmartin: the agent did not say how the command ended\n"


# Signals.


async def test_the_first_interrupt_is_the_commands(line: Line, agent: LocalAgent) -> None:
    child = await line.run("sh", "-c", f"trap 'echo caught; exit 3' INT; {READY_AND_WAIT}")
    await say_ready(child)
    child.send_signal(signal.SIGINT)
    assert await finish(child) == (3, b"caught\n", b"")
    assert agent.signals == [signal.SIGINT]


async def test_a_command_that_an_interrupt_ends_is_130(line: Line) -> None:
    child = await line.run("sh", "-c", READY_AND_WAIT)
    await say_ready(child)
    child.send_signal(signal.SIGINT)
    assert (await finish(child))[0] == 130


async def test_the_second_interrupt_gives_the_run_up(line: Line, agent: LocalAgent) -> None:
    child = await line.run("sh", "-c", f"trap '' INT; {READY_AND_WAIT}", stdin=PIPE)
    await say_ready(child)
    child.send_signal(signal.SIGINT)
    await until(lambda: agent.signals)
    assert child.returncode is None
    child.send_signal(signal.SIGINT)
    assert (await finish(child))[0] == 130
    assert agent.destroyed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_other_signals_give_the_run_up_at_once(
    line: Line, agent: LocalAgent, number: signal.Signals
) -> None:
    child = await line.run("sh", "-c", READY_AND_WAIT)
    await say_ready(child)
    child.send_signal(number)
    assert (await finish(child))[0] == 128 + number
    assert (agent.signals, len(agent.destroyed)) == ([], 1)


async def test_nohup_is_respected(line: Line) -> None:
    child = await line.start(
        "run", "--", "sh", "-c", "echo ready; cat", shell="trap '' HUP; exec LINE", stdin=PIPE
    )
    await say_ready(child)
    child.send_signal(signal.SIGHUP)
    assert await finish(child, b"still here") == (0, b"still here", b"")


async def test_an_interrupted_create_leaves_no_sandbox(line: Line, agent: LocalAgent) -> None:
    agent.may_create.clear()
    agent.may_destroy.clear()
    child = await line.run("true")
    await until(lambda: agent.created)
    child.send_signal(signal.SIGINT)
    # Once the cleaning up has begun, no signal changes anything.
    await until(lambda: agent.destroying)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child.send_signal(number)
    await asyncio.sleep(0)
    agent.may_destroy.set()
    assert await finish(child) == (130, b"", b"")
    agent.may_create.set()
    assert agent.destroyed == [agent.created[0].sandbox_id]
