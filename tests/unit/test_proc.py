"""Children end with all they started, and a process is known by more than its pid."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.proc import ProcessId
from sandmartin.errors import TimedOut, ToolFailed


async def _eventually_dead(pid: int) -> None:
    until = time.monotonic() + 5
    while ProcessId.of(pid) is not None:
        assert time.monotonic() < until, f"process {pid} still runs"
        await asyncio.sleep(0.01)


async def test_output_and_status_come_back() -> None:
    done = await proc.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in", b"err\n")
    with pytest.raises(ToolFailed, match=r"sh exited 3: sorry"):
        await proc.run(["sh", "-c", "echo sorry >&2; exit 3"])
    with pytest.raises(ToolFailed, match="/nonexistent could not be started"):
        await proc.run(["/nonexistent"])


async def test_stdin_is_closed_unless_given() -> None:
    assert (await proc.run(["cat"], deadline_s=5)).stdout == b""


async def test_environment_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("LANG", "C.UTF-8")
    said = (await proc.run([sys.executable, "-c", _SHOW_ENVIRONMENT], env={"OWN": "1"})).stdout
    seen = dict(line.split("=", 1) for line in said.decode().splitlines())
    assert "SECRET_KEY" not in seen
    assert (seen["OWN"], seen["LANG"]) == ("1", "C.UTF-8")
    assert seen["PATH"].startswith("/usr/bin:") and "/usr/sbin" in seen["PATH"].split(":")


_SHOW_ENVIRONMENT = "import os; [print(f'{k}={v}') for k, v in os.environ.items()]"
#: Ignores TERM, and starts one that does so too; both hold the pipe.
_STUBBORN = "trap '' TERM; sleep 100 & echo $$ $! >{pids}; wait; sleep 100"


async def test_deadline_ends_the_whole_group_and_who_ignores_term(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(TimedOut, match=r"sh did not end within 0\.5 s"):
        await proc.run(["sh", "-c", _STUBBORN.format(pids=pids)], deadline_s=0.5, grace_s=0.2)
    for pid in pids.read_text().split():
        await _eventually_dead(int(pid))


async def test_deadline_ends_those_whom_a_dead_child_left(tmp_path: Path) -> None:
    # The child itself is gone at once; what it left holds its output open.
    pids = tmp_path / "pids"
    with pytest.raises(TimedOut):
        await proc.run(["sh", "-c", f"sleep 100 & echo $! >{pids}"], deadline_s=0.3)
    await _eventually_dead(int(pids.read_text()))


async def test_one_that_left_the_group_does_not_hold_us(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ >{pids}; exec sleep 100' & wait"
    began = time.monotonic()
    with pytest.raises(TimedOut):
        await proc.run(["sh", "-c", script], deadline_s=0.5, grace_s=0.2)
    assert time.monotonic() - began < 5
    os.kill(int(pids.read_text()), signal.SIGKILL)


async def test_cancelling_ends_the_child_even_when_repeated(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    running = asyncio.ensure_future(
        proc.run(["sh", "-c", f"trap 'exit 0' TERM; echo $$ >{pids}; while :; do sleep 0.01; done"])
    )
    until = time.monotonic() + 5
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await _eventually_dead(int(pids.read_text()))


async def test_detached_process_is_known_signalled_and_waited_for(tmp_path: Path) -> None:
    output = tmp_path / "log"
    output.write_text("before\n")
    process = proc.spawn_detached(["sh", "-c", "echo said; exec sleep 100"], output=output)
    assert process.alive()
    assert os.getsid(process.pid) == process.pid
    assert not await process.gone(0.05)
    waiting = asyncio.ensure_future(process.gone(5))
    assert process.kill()
    assert await waiting
    assert output.read_text() == "before\nsaid\n"
    assert not process.kill()
    assert await process.gone(0)
    # It was our child, and is not left as a zombie.
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


async def test_reused_pid_is_another_process(tmp_path: Path) -> None:
    process = proc.spawn_detached(["sleep", "100"], output=tmp_path / "log")
    earlier = ProcessId(process.pid, process.start_ticks - 1)
    assert not earlier.alive()
    assert not earlier.kill()
    assert await earlier.gone(0)
    assert process.alive()
    process.kill()
    await process.gone(5)


#: Its first thread ends while another goes on: the state in /proc is then that of a zombie.
_HEADLESS = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(100,)).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_process_without_its_first_thread_is_alive_and_endable(tmp_path: Path) -> None:
    process = proc.spawn_detached([sys.executable, "-c", _HEADLESS], output=tmp_path / "log")
    until = time.monotonic() + 5
    while _state(process.pid) != "Z":
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    assert ProcessId.of(process.pid) == process
    assert process.alive()
    assert not await process.gone(0)
    assert process.kill()
    assert await process.gone(5)


def test_what_cannot_start_or_ends_at_once_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="could not be started"):
        proc.spawn_detached(["/nonexistent"], output=tmp_path / "log")


def test_reaping_takes_nobody_elses_status() -> None:
    child = subprocess.Popen(["sh", "-c", "exit 7"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    # The same number, in another life.
    ProcessId(child.pid, 1).reap()
    assert child.wait() == 7
