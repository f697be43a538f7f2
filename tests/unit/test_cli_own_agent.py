"""An agent that lives for one run, played by small scripts; and our standard streams."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandmartin.cli.own_agent import Deadlines, own_agent
from sandmartin.cli.pipes import CHUNK_BYTES, ByteSink, ByteSource
from sandmartin.errors import SandmartinError, TimedOut, Unavailable

ANNOUNCE = """
import json, os, signal, sys, time
def mark(text): open(sys.argv[1], "a").write(text + "\\n")
def announce(): print(json.dumps({"socket": "/d/agent.sock", "pid": os.getpid()}), flush=True)
mark(f"pid {os.getpid()} session {os.getsid(0)}")
"""
BRIEF = Deadlines(ready_s=0.5, end_s=0.3, grace_s=0.5)


class Script:
    """The argv of an agent, and what it noted of its life."""

    def __init__(self, notes: Path, body: str) -> None:
        self._notes = notes
        self.argv = [sys.executable, "-I", "-S", "-c", ANNOUNCE + body, os.fspath(notes)]

    @property
    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines()

    def gone(self) -> bool:
        pid = int(self.notes[0].split()[1])
        return not Path(f"/proc/{pid}").exists()


async def test_an_agent_ends_with_its_input(tmp_path: Path) -> None:
    script = Script(tmp_path / "notes", "announce(); sys.stdin.read(); mark('end of input')")
    async with asyncio.timeout(30), own_agent(script.argv, verbose=False) as agent:
        assert await agent.ready() == Path("/d/agent.sock")
        assert not script.gone()
    assert script.gone()
    assert script.notes[1:] == ["end of input"]
    # A session of its own: Ctrl-C on the terminal is not for it.
    words = script.notes[0].split()
    assert words[1] == words[3] != str(os.getsid(0))


async def test_an_agent_ends_when_the_run_fails_or_is_given_up(tmp_path: Path) -> None:
    for error in (SandmartinError("x"), asyncio.CancelledError()):
        script = Script(tmp_path / "notes", "announce(); sys.stdin.read(); mark('end of input')")
        with pytest.raises(type(error)):
            async with asyncio.timeout(30), own_agent(script.argv, verbose=False) as agent:
                await agent.ready()
                raise error
        assert script.gone()
        assert script.notes[-1] == "end of input"
        (tmp_path / "notes").unlink()


@pytest.mark.parametrize(
    ("body", "says", "hint"),
    [
        (
            "sys.exit('a log line\\nsandmartin: there is no kernel\\nhint: run setup')",
            "the agent did not start: there is no kernel",
            "run setup",
        ),
        ("sys.exit('one\\ntwo')", "the agent did not start: one\n  two", "run `sandmartin doctor`"),
        ("sys.exit(3)", "the agent did not start: it said nothing", "run `sandmartin doctor`"),
        ("print('hello')", "the agent did not start: it said nothing", "run `sandmartin doctor`"),
        ("print('[]')", "the agent did not start: it said nothing", "run `sandmartin doctor`"),
        ("print('x' * 200000)", "the agent's announcement is endless", ""),
    ],
)
async def test_an_agent_that_does_not_start_says_why(
    tmp_path: Path, body: str, says: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(tmp_path / "notes", body)
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable) as failed:
            async with own_agent(script.argv, verbose=False) as agent:
                await agent.ready()
    assert (failed.value.message, failed.value.hint) == (says, hint)
    assert script.gone()
    # Said once, and by the error.
    assert capsys.readouterr().err == ""


async def test_an_agent_that_is_never_ready_is_timed_out(tmp_path: Path) -> None:
    script = Script(tmp_path / "notes", "sys.stdin.read()")
    with pytest.raises(TimedOut, match=r"not ready within 0.5 s"):
        async with own_agent(script.argv, verbose=False, deadlines=BRIEF) as agent:
            await agent.ready()
    assert script.gone()


@pytest.mark.parametrize(
    ("on_term", "last"),
    [("lambda *_: (mark('TERM'), os._exit(0))", "TERM"), ("signal.SIG_IGN", "up")],
)
async def test_an_agent_that_does_not_end_is_ended(
    tmp_path: Path, on_term: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f"signal.signal(15, {on_term}); mark('up'); announce()\nwhile True: time.sleep(60)"
    script = Script(tmp_path / "notes", body)
    async with own_agent(script.argv, verbose=False, deadlines=BRIEF) as agent:
        await agent.ready()
    assert script.gone()
    assert script.notes[-1] == last
    assert "hint: adopt them with: sandmartin agent --data-dir /d\n" in capsys.readouterr().err


async def test_the_end_of_its_log_is_told_when_it_fails_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = (
        "announce(); sys.stdin.read()\n"
        "for n in range(99): print('line', n, 'x' * 9000, file=sys.stderr)\n"
        "sys.stderr.write('last words'); sys.stderr.flush(); os._exit(4)"
    )
    async with own_agent(Script(tmp_path / "notes", body).argv, verbose=False) as agent:
        await agent.ready()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "sandmartin: the agent exited 4"
    assert said[-1] == "agent: last words"
    assert len(said) == 21
    assert max(map(len, said)) < 5000


async def test_verbose_shows_the_log_to_its_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "announce(); print('one', file=sys.stderr); sys.stdin.read(); sys.stderr.write('two')"
    async with own_agent(Script(tmp_path / "notes", body).argv, verbose=True) as agent:
        await agent.ready()
    assert capsys.readouterr().err == "agent: one\nagent: two\n"


# Standard streams.


@pytest.fixture
def pipe() -> Iterator[Callable[[int], int]]:
    """The read end (0) and the write end (1) of a pipe; closing one early is allowed."""
    ends = dict(enumerate(os.pipe()))
    yield lambda end: ends[end]
    for fd in ends.values():
        try:
            os.close(fd)
        except OSError:
            continue


async def test_a_source_gives_bytes_as_they_come_until_the_end(pipe: Callable[[int], int]) -> None:
    async with asyncio.timeout(10):
        chunks = aiter(ByteSource(pipe(0)))
        for said in (b"one", b"two"):
            os.write(pipe(1), said)
            assert await anext(chunks) == said
        os.close(pipe(1))
        assert await anext(chunks, None) is None
    # Whoever shares the descriptor with us would feel it.
    assert os.get_blocking(pipe(0))


async def test_a_source_reads_little_ahead(tmp_path: Path) -> None:
    content = os.urandom(20 * CHUNK_BYTES)
    (tmp_path / "file").write_bytes(content)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        chunks = aiter(ByteSource(fd))
        got = [await anext(chunks)]
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            assert os.lseek(fd, 0, os.SEEK_CUR) <= 6 * CHUNK_BYTES
            await asyncio.sleep(0.01)
        got += [chunk async for chunk in chunks]
        assert b"".join(got) == content
    finally:
        os.close(fd)


async def test_a_source_raises_what_the_system_says(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            async for _ in ByteSource(fd):
                pass
    finally:
        os.close(fd)


async def test_a_sink_waits_for_its_reader_and_keeps_the_order(pipe: Callable[[int], int]) -> None:
    content = os.urandom(1_000_000)
    sink, got = ByteSink(pipe(1)), bytearray()
    async with asyncio.timeout(20):
        writing = asyncio.create_task(sink.write(content))
        done, _ = await asyncio.wait({writing}, timeout=0.05)
        assert not done
        while len(got) < len(content):
            got += await asyncio.to_thread(os.read, pipe(0), 65536)
        await writing
    assert bytes(got) == content
    os.close(pipe(0))
    with pytest.raises(BrokenPipeError):
        await sink.write(b"x")


def test_which_input_is_forwarded(tmp_path: Path) -> None:
    code = """
import os
from sandmartin.cli.pipes import stdin_is_open
def check(fd):
    os.dup2(fd, 0)
    return stdin_is_open()
print(check(os.pipe()[0]), check(os.open(os.devnull, 0)), check(os.open(os.devnull, 2)),
      check(os.open(__import__("sys").executable, 0)), check(os.open("/dev/zero", 0)))
os.close(0)
print(stdin_is_open())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "True False False True True\nFalse\n"
