"""The verbs over the real contract, against an agent whose sandboxes are directories."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from sandmartin.cli import main
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from tests.command_line import DEADLINE_S, Line, finish, say_ready, until
from tests.fakes_localagent import LocalAgent, serving

READY_AND_WAIT = "echo ready; while :; do sleep 0.05; done"


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[LocalAgent, None]:
    (tmp_path / "root" / "sb1").mkdir(parents=True)
    agent = LocalAgent(tmp_path / "root")
    async with serving(agent, tmp_path / "agent.sock"):
        yield agent


@pytest.fixture
async def line(tmp_path: Path, agent: LocalAgent) -> AsyncGenerator[Line, None]:
    line = Line(tmp_path)
    yield line
    await line.end()


class Verbs:
    """Verbs that take no signals: they run in a thread of this process."""

    def __init__(self, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._flags = ["--data-dir", os.fspath(data_dir)]
        self._capsys = capsys

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        async with asyncio.timeout(DEADLINE_S):
            code = await asyncio.to_thread(main, [*words, *self._flags])
        return code, *self._capsys.readouterr()

    async def json(self, *words: str) -> Any:
        code, out, err = await self(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def verbs(agent: LocalAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verbs:
    return Verbs(tmp_path, capsys)


# Life.


async def test_a_created_sandbox_is_the_one_that_was_asked_for(
    line: Line, agent: LocalAgent
) -> None:
    flags = ("--memory", "256", "--vcpus", "2", "--disk", "6000", "--timeout", "60", "-e", "A=b=c")
    code, out, err = await finish(await line.start("create", *flags))
    assert (code, err) == (0, b"")
    (asked,) = agent.created
    assert out.decode() == f"{asked.sandbox_id}\n"
    assert (asked.template, asked.memory_mb, asked.vcpus) == ("base", 256, 2)
    assert (asked.disk_size_mb, asked.timeout_sec, dict(asked.envs)) == (6000, 60, {"A": "b=c"})
    code, out, err = await finish(await line.start("create", "-t", "none", "--json"))
    assert (code, out) == (1, b"")
    assert err.decode().startswith("sandmartin: there is no template 'none'\nhint: ")


async def test_a_create_that_never_reached_an_agent_leaves_nothing_to_warn_of(
    tmp_path: Path, agent: LocalAgent
) -> None:
    line = Line(tmp_path / "elsewhere")
    code, out, err = await finish(await line.start("create"))
    assert (code, out) == (1, b"")
    assert err.decode().splitlines() == [
        f"sandmartin: no agent listens on {tmp_path}/elsewhere/agent.sock",
        "hint: start one: sudo sandmartin agent",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_create_that_is_given_up_is_undone(
    line: Line, agent: LocalAgent, number: signal.Signals
) -> None:
    agent.may_create.clear()
    child = await line.start("create")
    await until(lambda: agent.created)
    child.send_signal(number)
    assert await finish(child) == (128 + number, b"", b"")
    agent.may_create.set()
    assert agent.sandboxes == ["sb1"]


async def test_pausing_and_resuming_do_what_they_can(verbs: Verbs, agent: LocalAgent) -> None:
    assert await verbs("pause", "sb1") == (0, "sb1\n", "")
    code, out, err = await verbs("pause", "none", "sb1", "--json")
    assert (code, json.loads(out)) == (1, {"paused": ["sb1"], "failed": ["none"]})
    assert err == "sandmartin: there is no sandbox none\n"
    code, _, err = await verbs("checkpoint", "sb1")
    assert (code, err) == (1, "sandmartin: sandbox sb1 is paused\n")
    code, out, err = await verbs("info", "sb1")
    assert (code, err) == (0, "")
    assert ["state", "paused"] in [row.split() for row in out.splitlines()]
    assert await verbs("resume", "sb1") == (0, "sb1\n", "")
    assert (await verbs("pause", "sb1"))[0] == 0
    assert await verbs.json("resume", "sb1", "--timeout", "0") == {"resumed": ["sb1"], "failed": []}
    asked = [(each.keep_timeout, each.timeout_sec) for each in agent.resumed]
    assert asked == [(True, 0), (False, 0)]
    assert (await verbs("info", "none"))[0] == 1


async def test_a_fork_prints_the_children_there_are(line: Line, agent: LocalAgent) -> None:
    agent.room = 2
    code, out, err = await finish(await line.start("fork", "sb1", "-n", "3"))
    assert (code, err) == (1, b"sandmartin: no room\nhint: destroy some\n")
    children = out.decode().split()
    assert agent.sandboxes == sorted(["sb1", *children])
    assert len(children) == 2
    code, out, _ = await finish(await line.start("fork", "sb1", "--json"))
    (child,) = json.loads(out)
    assert (code, child["state"]) == (1, "")
    assert child["error"] == {"code": "exhausted", "message": "no room"}


async def test_a_rollback_returns_to_its_checkpoint(
    verbs: Verbs, agent: LocalAgent, tmp_path: Path
) -> None:
    file = tmp_path / "root" / "sb1" / "file"
    file.write_text("before")
    code, out, _ = await verbs("checkpoint", "sb1", "--comment", "ü good")
    first = out.strip()
    file.write_text("after")
    second = await verbs.json("checkpoint", "sb1")
    assert isinstance(second, dict)
    _, out, _ = await verbs("checkpoints", "sb1")
    rows = out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [first, second["checkpoint_id"]]
    assert rows[0].split(maxsplit=3)[1:] == ["2023-11-14T22:13:20Z", str(2**40), "ü good"]
    assert await verbs("rollback", "sb1", first) == (0, "sb1\n", "")
    assert file.read_text() == "before"
    left = await verbs.json("checkpoints", "sb1", "--rm", first)
    assert left == [second]
    code, _, err = await verbs("rollback", "sb1", first)
    assert (code, err) == (1, f"sandmartin: there is no sb1/{first}\n")


async def test_a_template_is_fetched_and_brought(
    verbs: Verbs, agent: LocalAgent, tmp_path: Path
) -> None:
    content = b"archive" + os.urandom(300_000)
    agent.archives["mine"] = content
    file = tmp_path / "mine.tar"
    told = await verbs.json("template", "pull", "mine", "-o", str(file))
    assert told == {"name": "mine", "file": str(file), "bytes": len(content)}
    assert file.read_bytes() == content
    code, out, _ = await verbs("template", "push", str(file), "back")
    assert (code, out, agent.archives["back"]) == (0, "back\n", content)
    # What cannot be fetched leaves the old file, and no other.
    code, _, err = await verbs("template", "pull", "none", "-o", str(file))
    assert code != 0 and "there is no template 'none'" in err
    assert file.read_bytes() == content
    assert [each.name for each in tmp_path.glob("*mine.tar*")] == ["mine.tar"]
    file.write_bytes(b"something else")
    code, _, err = await verbs("template", "push", str(file), "bad")
    assert code != 0 and "this is no archive" in err and "bad" not in agent.archives
    code, _, err = await verbs("template", "push", str(tmp_path / "none.tar"), "bad")
    assert code != 0 and "cannot be read" in err


async def test_a_snapshot_is_a_template_until_it_is_removed(
    verbs: Verbs, line: Line, agent: LocalAgent, tmp_path: Path
) -> None:
    (tmp_path / "root" / "sb1" / "file").write_text("kept")
    assert await verbs("snapshot", "sb1", "mine", "--live") == (0, "mine\n", "")
    assert not agent.paused
    made = await verbs.json("snapshot", "sb1", "other")
    assert made == {"name": "other", "size_bytes": 2**40, "phases": []}
    assert agent.paused == {"sb1"}
    _, out, _ = await verbs("template", "ls")
    rows = [row.split()[:3] for row in out.splitlines()[1:]]
    assert rows == [["base", "image", "-"], ["mine", "snapshot", "1"], ["other", "snapshot", "1"]]
    _, made_from_it, _ = await finish(await line.start("create", "-t", "mine"))
    copied = tmp_path / "root" / made_from_it.decode().strip() / "file"
    assert copied.read_text() == "kept"
    code, out, err = await verbs("template", "rm", "none", "mine")
    assert (code, out, err) == (1, "mine\n", "sandmartin: there is no none\n")
    listed = await verbs.json("template", "ls")
    assert isinstance(listed, list)
    assert [each["name"] for each in listed] == ["base", "other"]


# Commands.


async def test_exec_passes_streams_environment_and_exit_code(line: Line) -> None:
    script = 'cat; echo "$WHO" >&2; exit 7'
    child = await line.start("exec", "-e", "WHO=me", "sb1", "--", "sh", "-c", script, stdin=PIPE)
    given = os.urandom(300_000)
    assert await finish(child, given) == (7, given, b"me\n")
    code, out, err = await finish(await line.start("exec", "sb1", "nope"))
    assert (code, out, err) == (126, b"", b"sandmartin: nope: No such file or directory\n")
    code, _, err = await finish(await line.start("exec", "none", "true"))
    assert (code, err) == (125, b"sandmartin: there is no sandbox none\n")


async def test_the_first_interrupt_is_the_commands(line: Line, agent: LocalAgent) -> None:
    script = f"trap 'echo caught; exit 3' INT; {READY_AND_WAIT}"
    child = await line.start("exec", "sb1", "--", "sh", "-c", script)
    await say_ready(child)
    child.send_signal(signal.SIGINT)
    assert await finish(child) == (3, b"caught\n", b"")
    assert agent.signals == [signal.SIGINT]


async def test_a_command_ends_with_the_exec_that_is_ended(
    line: Line, agent: LocalAgent, verbs: Verbs
) -> None:
    child = await line.start("exec", "sb1", "--", "sh", "-c", READY_AND_WAIT)
    await say_ready(child)
    listed = await verbs.json("ps", "sb1")
    assert isinstance(listed, list)
    (running,) = listed
    assert (running["cmd"], running["args"]) == ("sh", ["-c", READY_AND_WAIT])
    child.send_signal(signal.SIGTERM)
    assert (await finish(child))[0] == 143
    assert agent.signals == [signal.SIGKILL]
    read, write = os.pipe()
    os.close(read)
    try:
        child = await line.start("exec", "sb1", "--", "yes", stdout=write)
    finally:
        os.close(write)
    assert await finish(child) == (141, b"", b"")
    assert agent.signals == [signal.SIGKILL] * 2
    async with asyncio.timeout(DEADLINE_S):
        while await verbs.json("ps", "sb1"):
            await asyncio.sleep(0.01)


async def test_commands_that_run_are_listed_as_a_shell_would_take_them(
    verbs: Verbs, line: Line
) -> None:
    child = await line.start("exec", "--cwd", "/w", "sb1", "--", "sh", "-c", READY_AND_WAIT)
    await say_ready(child)
    _, out, _ = await verbs("ps", "sb1")
    (row,) = out.splitlines()[1:]
    assert row.split(maxsplit=2)[1:] == ["/w", f"sh -c '{READY_AND_WAIT}'"]
    child.send_signal(signal.SIGTERM)
    await finish(child)


# Records.


async def test_the_console_comes_as_it_is_and_cannot_steer_a_terminal(
    verbs: Verbs, line: Line, agent: LocalAgent
) -> None:
    said = b"boot\r\n\x1b]0;owned\x07\xff"
    agent.console = said
    assert await finish(await line.start("logs", "sb1")) == (0, said, b"")
    agent.console = said
    assert await verbs.json("logs", "sb1") == {"console": said.decode(errors="replace")}
    agent.console = said
    ours, theirs = os.openpty()
    try:
        child = await line.start("logs", "sb1", stdout=theirs)
        assert await finish(child) == (0, b"", b"")
        shown = await asyncio.to_thread(os.read, ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"\x1b" not in shown
    assert b"\x07" not in shown
    assert shown.decode().replace("\r\n", "\n").startswith("boot\n\N{REPLACEMENT CHARACTER}]0;ow")


async def test_metrics_are_those_of_the_range(verbs: Verbs, agent: LocalAgent) -> None:
    agent.points = [
        pb.MetricPoint(
            timestamp_unix=1_700_000_000, cpu_pct=12.34, mem_bytes=2**33, disk_bytes=2**40
        ),
        pb.MetricPoint(timestamp_unix=1_700_000_030),
    ]
    _, out, _ = await verbs("metrics", "sb1", "--range", "2h")
    assert [row.split() for row in out.splitlines()[1:]] == [
        ["2023-11-14T22:13:20Z", "12.3", str(2**33), str(2**40)],
        ["2023-11-14T22:13:50Z", "0.0", "0", "0"],
    ]
    points = await verbs.json("metrics", "sb1", "--range", "2h")
    assert isinstance(points, list)
    assert points[0] == {
        "timestamp": 1_700_000_000,
        "cpu_pct": 12.34,
        "mem_bytes": 2**33,
        "disk_bytes": 2**40,
    }
    assert await verbs.json("metrics", "sb1") == []
