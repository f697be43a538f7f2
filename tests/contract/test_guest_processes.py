"""Processes in the guest, by the host agent's client and as the stock SDKs ask for them."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import struct
import time
from pathlib import Path

import httpx
import pytest

from sandmartin.agent.guest import Command, Ended, Guest, Output
from sandmartin.errors import (
    Invalid,
    NotFound,
    NotStarted,
    SandmartinError,
)
from tests.contract.guests import (
    ME,
    MIB,
    STREAM,
    RunningAgent,
    alive,
    collect,
    framed,
    frames,
    shell,
    started,
    stream,
    wait_until,
)

START = "/process.Process/Start"


async def test_exec_tells_exit_code_and_keeps_both_outputs_apart_and_8_bit_clean(
    guest: Guest,
) -> None:
    every_byte = "".join(f"\\{n:03o}" for n in range(256))
    script = f"printf '{every_byte}'; printf 'to stderr' >&2; exit 7"
    out, err, end = await collect(guest.start(shell(script)))
    assert (out, err) == (bytes(range(256)), b"to stderr")
    assert end == Ended(exit_code=7)


async def test_a_signal_is_told_apart_from_an_exit_code(guest: Guest) -> None:
    events = guest.start(shell("kill -TERM $$"))
    assert (await collect(events))[2] == Ended(exit_code=143, signal=15)
    assert (await collect(guest.start(shell("exit 143"))))[2] == Ended(exit_code=143)


async def test_environment_and_directory(guest: Guest, tmp_path: Path) -> None:
    script = 'echo "$SANDBOX_VAR|$MINE|$USER|$PWD"'
    command = shell(script, envs={"MINE": "a=b c\n'"}, cwd=os.fspath(tmp_path))
    out, _, _ = await collect(guest.start(command))
    assert out.decode() == f"of the sandbox|a=b c\n'|{ME}|{tmp_path}\n"


@pytest.mark.parametrize(
    ("command", "error", "says"),
    [
        (Command(cmd="no-such-command", user=ME), NotStarted, "not found in PATH"),
        (Command(cmd="/no/such/file", user=ME), NotStarted, "was not found"),
        (Command(cmd="/etc", user=ME), NotStarted, "is a directory"),
        (Command(cmd="/etc/passwd", user=ME), NotStarted, "not executable"),
        (Command(cmd="true", user="nobody-knows-me"), Invalid, "nobody-knows-me"),
        (Command(cmd="true", user="4294967295"), Invalid, "invalid username"),
        (shell("true", cwd="/no/such/dir"), Invalid, "cwd"),
        (shell("true", envs={"A=B": "c"}), Invalid, "environment variable"),
        (shell("a\0b"), Invalid, "NUL"),
        (Command(cmd="", user=ME), Invalid, "no command"),
    ],
)
async def test_what_cannot_start_is_an_error_and_not_an_exit_code(
    guest: Guest, command: Command, error: type[SandmartinError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        await collect(guest.start(command))
    assert type(caught.value) is error


async def test_a_script_without_its_interpreter_does_not_start(
    guest: Guest, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(NotStarted):
        await collect(guest.start(Command(cmd=os.fspath(script), user=ME)))


async def test_the_time_limit_ends_the_whole_group(guest: Guest) -> None:
    command = shell("sleep 300 & echo $!; sleep 300 & echo $!; wait", timeout_s=0.5)
    out, _, end = await collect(guest.start(command))
    assert end.timed_out
    assert end.signal == signal.SIGKILL
    assert "deadline" in end.error
    children = [int(pid) for pid in out.split()]
    assert len(children) == 2
    wait_until(lambda: not any(alive(pid) for pid in children))


async def test_input_is_read_to_its_end_and_refused_after(guest: Guest) -> None:
    events = guest.start(shell("cat; read again; echo $?", stdin=True))
    pid = await started(events)
    content = os.urandom(3 * MIB)
    listening = asyncio.ensure_future(collect(events))
    for offset in range(0, len(content), MIB):
        await guest.send_input(pid, content[offset : offset + MIB])
    await guest.close_input(pid)
    out, _, end = await listening
    assert out == content + b"1\n"
    assert end.exit_code == 0
    with pytest.raises(SandmartinError, match="takes no input"):
        await guest.send_input(pid, b"late")


async def test_a_blocked_writer_does_not_hide_the_end(guest: Guest) -> None:
    """A grandchild that holds the input open and never reads used to keep the end back."""
    events = guest.start(shell("sleep 300 <&0 & echo $!; read line", stdin=True))
    pid = await started(events)
    grandchild = await anext(events)
    assert isinstance(grandchild, Output)
    writing = asyncio.ensure_future(guest.send_input(pid, b"line\n" + bytes(MIB)))
    end = (await asyncio.wait_for(collect(events), 10))[2]
    assert end == Ended(exit_code=0)
    with pytest.raises(SandmartinError, match="takes no input"):
        await writing
    os.kill(int(grandchild.data), signal.SIGKILL)


async def test_signals(guest: Guest) -> None:
    events = guest.start(shell("trap 'echo caught; exit 3' TERM; echo ready; while :; do :; done"))
    pid = await started(events)
    assert await anext(events) == Output(b"ready\n")
    await guest.signal(pid, signal.SIGTERM)
    assert await collect(events) == (b"caught\n", b"", Ended(exit_code=3))
    with pytest.raises(NotFound):
        await guest.signal(pid, signal.SIGKILL)
    with pytest.raises(NotFound):
        await collect(guest.attach(2**31))


async def test_a_process_left_in_the_background_does_not_keep_the_stream(guest: Guest) -> None:
    """It goes on, and may go on printing; one that prints without end changes nothing."""
    out, _, end = await collect(guest.start(shell("yes >&2 & echo $!; exit 4")))
    assert end == Ended(exit_code=4)
    printing = int(out)
    before = written_by(printing)
    wait_until(lambda: written_by(printing) > before + 4 * MIB)
    os.kill(printing, signal.SIGKILL)


async def test_a_client_that_leaves_ends_nothing_and_misses_nothing(guest: Guest) -> None:
    script = "echo before; read go; echo after; echo error >&2; exit 5"
    events = guest.start(shell(script, stdin=True))
    pid = await started(events)
    assert await anext(events) == Output(b"before\n")
    await events.aclose()
    await guest.send_input(pid, b"go\n")
    wait_until(lambda: not alive(pid))
    again = guest.attach(pid)
    assert await started(again) == pid
    assert await collect(again) == (b"after\n", b"error\n", Ended(exit_code=5))


async def test_a_cancelled_listener_is_cancelled_and_not_told_of_silence(guest: Guest) -> None:
    events = guest.start(shell("echo $$; sleep 300"))
    pid = await started(events)
    listening = asyncio.ensure_future(collect(events))
    for waiting in (listening, asyncio.ensure_future(guest.send_input(pid, b""))):
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await guest.signal(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))


async def test_a_slow_reader_holds_the_process_back_and_not_the_memory(
    agent: RunningAgent, guest: Guest
) -> None:
    total = 100 * MIB
    agent.forget_peak()
    before = agent.peak_bytes()
    events = guest.start(Command(cmd="head", args=("-c", str(total), "/dev/zero"), user=ME))
    pid = await started(events)
    assert isinstance(await anext(events), Output)
    written = await _settled(pid)
    assert 0 < written < total / 2
    size = 0
    async for event in events:
        size += len(event.data) if isinstance(event, Output) else 0
    # One chunk was taken above.
    assert total - 64 * 1024 <= size < total
    assert agent.peak_bytes() - before < 32 * MIB


def written_by(pid: int) -> int:
    """How many bytes a process has written to pipes and files."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


async def _settled(pid: int) -> int:
    """What a process has written, once it is held back."""
    counted: list[int] = []
    until = time.monotonic() + 20
    while len(counted) < 8 or len(set(counted[-8:])) > 1:
        assert time.monotonic() < until
        counted.append(written_by(pid))
        await asyncio.sleep(0.03)
    return counted[-1]


# As the stock SDKs ask.


def test_the_stock_sdks_process_calls(sdk: httpx.Client, tmp_path: Path) -> None:
    # A login shell reads what is at home, and a developer's own may take its time.
    envs = {"A": "ä", "HOME": os.fspath(tmp_path)}
    process = {"cmd": "/bin/bash", "args": ["-l", "-c", "echo $A; exit 3"], "envs": envs}
    events = stream(
        sdk, "process.Process/Start", {"process": process, "stdin": False, "tag": "t", "unknown": 1}
    )
    pid = events[0]["event"]["start"]["pid"]
    assert isinstance(pid, int)
    assert base64.b64decode(events[1]["event"]["data"]["stdout"]).decode() == "ä\n"
    end = events[2]["event"]["end"]
    assert end == {"exitCode": 3, "exited": True, "status": "exit status 3"}
    assert events[3] == {}
    # The exit code is kept for a while.
    late = stream(sdk, "process.Process/Connect", {"process": {"tag": "t"}})
    assert late[0]["event"]["start"]["pid"] == pid
    assert late[-2]["event"]["end"]["exitCode"] == 3

    missing = stream(sdk, "process.Process/Start", {"process": {"cmd": "no-such-command"}})
    assert missing[-1]["error"]["code"] == "not_found"
    process = {"cmd": "sleep", "args": ["300"]}
    # A deadline is told as one, and ends what it was given for.
    late = stream(sdk, "process.Process/Start", {"process": process}, connect_timeout_ms="300")
    assert late[-1]["error"]["code"] == "deadline_exceeded"
    pid = late[0]["event"]["start"]["pid"]
    wait_until(lambda: not alive(pid))


def test_the_stock_sdks_terminal(sdk: httpx.Client) -> None:
    script = 'stty size; read line; echo "got $line"; stty size; exit 2'
    message = {
        "process": {"cmd": "/bin/bash", "args": ["-c", script], "envs": {"TERM": "xterm"}},
        "pty": {"size": {"cols": 100, "rows": 30}},
        "tag": "terminal",
    }
    content = framed(message)
    headers = {"content-type": STREAM}
    shown = b""
    with sdk.stream("POST", START, content=content, headers=headers) as answer:
        received, chunks = b"", answer.iter_raw()
        for chunk in chunks:
            received += chunk
            shown = _terminal_output(received)
            if b"30 100" in shown:
                break
        other = httpx.Client(base_url=sdk.base_url, headers=sdk.headers)
        with other:
            select = {"process": {"tag": "terminal"}}
            size = {"pty": {"size": {"cols": 55, "rows": 22}}}
            typed = {"input": {"pty": base64.b64encode(b"hello\r").decode()}}
            assert other.post("/process.Process/Update", json=select | size).json() == {}
            listed = other.post("/process.Process/List", json={}).json()["processes"]
            assert [found["config"]["cmd"] for found in listed if found.get("tag") == "terminal"]
            assert other.post("/process.Process/SendInput", json=select | typed).json() == {}
            refused = other.post("/process.Process/CloseStdin", json=select)
            assert refused.json()["code"] in {"failed_precondition", "not_found"}
        received += b"".join(chunks)
    shown = _terminal_output(received)
    assert b"got hello\r\n22 55\r\n" in shown
    assert frames(received)[-2]["event"]["end"]["exitCode"] == 2


def _terminal_output(received: bytes) -> bytes:
    shown = b""
    while len(received) >= 5:
        size = struct.unpack_from(">BI", received)[1]
        if len(received) < 5 + size:
            break
        event = json.loads(received[5 : 5 + size]).get("event", {})
        shown += base64.b64decode(event.get("data", {}).get("pty", ""))
        received = received[5 + size :]
    return shown


def test_the_stock_sdks_streamed_input(sdk: httpx.Client) -> None:
    process = {"process": {"cmd": "cat"}, "tag": "streamed"}
    headers = {"content-type": STREAM}
    with sdk.stream("POST", START, content=framed(process), headers=headers) as answer:
        chunks = answer.iter_raw()
        received = next(chunks)
        data = [
            {"data": {"input": {"stdin": base64.b64encode(each).decode()}}} for each in (b"a", b"b")
        ]
        begin = {"start": {"process": {"tag": "streamed"}}}
        sent = framed(begin) + framed(data[0]) + framed({"keepalive": {}}) + framed(data[1])
        with httpx.Client(base_url=sdk.base_url, headers=sdk.headers) as other:
            url = "/process.Process/StreamInput"
            assert frames(other.post(url, content=sent, headers=headers).content) == [{}, {}]
            select = {"process": {"tag": "streamed"}}
            assert other.post("/process.Process/CloseStdin", json=select).json() == {}
        received += b"".join(chunks)
    events = [each["event"] for each in frames(received)[:-1]]
    out = b"".join(base64.b64decode(each["data"]["stdout"]) for each in events[1:-1])
    assert (out, events[-1]["end"]["exited"]) == (b"ab", True)


def test_an_unknown_user_is_named_in_the_words_that_are_asserted(sdk: httpx.Client) -> None:
    nobody = base64.b64encode(b"nobody-knows-me:").decode()
    headers = {"authorization": f"Basic {nobody}"}
    answer = stream(sdk, "process.Process/Start", {"process": {"cmd": "true"}}, **headers)
    assert answer == [
        {"error": {"code": "unauthenticated", "message": "invalid username: 'nobody-knows-me'"}}
    ]
