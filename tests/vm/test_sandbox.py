"""A sandbox as its user has it, on a real VM: commands, files, limits, and what goes wrong."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    DiskFull,
    Exhausted,
    GuestSilent,
    Invalid,
    NotFound,
    NotStarted,
)
from sandmartin.model import new_sandbox_id
from sandmartin.transport import Command, Ended, NewSandbox, Stdout
from tests.vm.conftest import RunningAgent, execute

MB = 1 << 20


async def chunks(size: int, seen: hashlib._Hash | None = None) -> AsyncIterator[bytes]:
    """Content that does not repeat soon, in pieces."""
    for start in range(0, size, MB):
        piece = start.to_bytes(8, "big") * (min(MB, size - start) // 8)
        if seen is not None:
            seen.update(piece)
        yield piece


async def test_it_is_a_machine_of_its_own(sandbox: AsyncSandbox) -> None:
    script = "uname -r; hostname; cat /etc/machine-id /proc/1/comm; nproc; id -u; pwd"
    result = await execute(sandbox, "sh", "-c", script)
    kernel, hostname, machine_id, init, cpus, uid, home = result.text.splitlines()
    assert kernel != platform.release()
    assert hostname == sandbox.sandbox_id
    assert len(machine_id) == 32
    assert (init, cpus, uid, home) == ("guest", "1", "0", "/root")
    root = (await execute(sandbox, "grep", " / ext4 ", "/proc/mounts")).text
    assert {"rw", "lazytime", "noatime"} <= set(root.split()[3].split(","))


async def test_the_clock_is_the_hosts(sandbox: AsyncSandbox) -> None:
    result = await execute(sandbox, "date", "+%s.%N")
    assert abs(float(result.text) - time.time()) < 2


async def test_output_is_clean_and_codes_are_the_commands(sandbox: AsyncSandbox) -> None:
    script = "import os,sys; os.write(1, bytes(range(256))); os.write(2, b'err'); sys.exit(7)"
    result = await execute(sandbox, "python3", "-c", script)
    assert (result.exit_code, result.stdout, result.stderr) == (7, bytes(range(256)), b"err")
    killed = await execute(sandbox, "sh", "-c", "kill -9 $$")
    assert killed.exit_code == 128 + signal.SIGKILL


async def test_a_command_has_its_user_environment_and_directory(sandbox: AsyncSandbox) -> None:
    script = "id -un; pwd; echo $GREETING; sudo -n id -u"
    result = await execute(
        sandbox, "sh", "-c", script, user="user", cwd="/usr", envs={"GREETING": "hello there"}
    )
    assert result.text.splitlines() == ["user", "/usr", "hello there", "0"]
    assert (await execute(sandbox, "pwd", user="user")).text == "/home/user\n"


async def test_input_is_fed_and_ends(sandbox: AsyncSandbox) -> None:
    async def words() -> AsyncIterator[bytes]:
        yield b"one\n"
        yield b"two\n"

    async with sandbox.exec(Command(cmd="sort", args=("-r",), stdin=True)) as execution:
        await execution.send_stdin(words())
        events = [event async for event in execution]
    assert b"".join(e.data for e in events if isinstance(e, Stdout)) == b"two\none\n"


async def test_a_time_limit_ends_all_that_was_started(sandbox: AsyncSandbox) -> None:
    result = await execute(sandbox, "sh", "-c", "sleep 1000 & sleep 1000", timeout_s=1)
    assert result.exit_code == 128 + signal.SIGKILL
    assert "limit" in result.error
    assert (await execute(sandbox, "pgrep", "-c", "sleep")).text == "0\n"


async def test_output_comes_while_the_command_runs(sandbox: AsyncSandbox) -> None:
    script = "echo first; read line; echo $line"
    async with sandbox.exec(Command(cmd="sh", args=("-c", script), stdin=True)) as execution:
        events = aiter(execution)
        first = await anext(events)
        assert isinstance(first, Stdout) and first.data == b"first\n"
        await execution.send_stdin(_once(b"second\n"))
        rest = [event async for event in events]
    assert isinstance(rest[0], Stdout) and rest[0].data == b"second\n"
    assert isinstance(rest[-1], Ended) and rest[-1].exit_code == 0


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_64_mb_come_back_as_they_went(sandbox: AsyncSandbox) -> None:
    went, came = hashlib.sha256(), hashlib.sha256()
    await sandbox.write_file("/root/deep/er/file.bin", chunks(64 * MB, went))
    async for piece in sandbox.read_file("/root/deep/er/file.bin"):
        came.update(piece)
    inside = await execute(sandbox, "sha256sum", "/root/deep/er/file.bin")
    assert inside.text.split()[0] == went.hexdigest() == came.hexdigest()
    await execute(sandbox, "rm", "-r", "/root/deep")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (Command(cmd="no-such-command"), NotStarted),
        (Command(cmd="/etc/passwd"), NotStarted),
        (Command(cmd="/root"), NotStarted),
        (Command(cmd="true", user="nobody-knows"), Invalid),
        (Command(cmd="true", cwd="/no/such/directory"), Invalid),
        (Command(cmd="true", args=("a\0b",)), Invalid),
    ],
)
async def test_what_cannot_start_says_so(
    sandbox: AsyncSandbox, command: Command, error: type[Exception]
) -> None:
    with pytest.raises(error):
        async with sandbox.exec(command):
            pass


@pytest.mark.parametrize(
    ("path", "user", "error"),
    [
        ("/no/such/file", "", NotFound),
        ("/root", "", Invalid),
        ("/root/../etc/passwd", "", Invalid),
        ("/tmp/a\0b", "", Invalid),
        ("", "", Invalid),
        ("/etc/passwd", "nobody-knows", Invalid),
    ],
)
async def test_what_cannot_be_read_says_so(
    sandbox: AsyncSandbox, path: str, user: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        async for _ in sandbox.read_file(path, user):
            pass


async def test_a_user_cannot_write_where_it_may_not(sandbox: AsyncSandbox) -> None:
    with pytest.raises(Exception, match="permission denied"):
        await sandbox.write_file("/etc/mine", _once(b"x"), user="user")
    await sandbox.write_file("mine", _once(b"x"), user="user")
    result = await execute(sandbox, "stat", "-c", "%U %G %a", "/home/user/mine")
    assert result.text == "user user 644\n"


async def test_control_routes_are_closed_from_inside(sandbox: AsyncSandbox) -> None:
    script = """
import json, urllib.request, urllib.error
for address in ("127.0.0.1", "169.254.0.21", "localhost"):
    introduction = json.dumps({"accessToken": "stolen"}).encode()
    request = urllib.request.Request(f"http://{address}:49983/init", introduction, method="POST")
    try:
        print(urllib.request.urlopen(request, timeout=5).status)
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError as error:
        print("refused")
"""
    result = await execute(sandbox, "python3", "-c", script)
    assert set(result.text.split()) <= {"403", "refused"}, result
    # And it still serves who may.
    assert (await execute(sandbox, "true")).exit_code == 0


async def test_a_slow_reader_costs_bounded_memory(
    agent: RunningAgent, sandbox: AsyncSandbox
) -> None:
    command = Command(cmd="head", args=("-c", str(100 * MB), "/dev/zero"), timeout_s=60)
    received, before = 0, _rss_mb()
    async with sandbox.exec(command) as execution:
        async for event in execution:
            if isinstance(event, Stdout):
                received += len(event.data)
                if received < 2 * MB:
                    # Long enough for a producer that nobody slows down to run far ahead.
                    await asyncio.sleep(0.02)
                    assert _rss_mb() - before < 60
    assert received == 100 * MB


def _rss_mb() -> float:
    """Resident memory of this process, which is agent and client at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


async def test_a_client_that_hangs_up_does_not_end_the_command(sandbox: AsyncSandbox) -> None:
    script = "echo begun; sleep 0.5; touch /tmp/finished"
    async with sandbox.exec(Command(cmd="sh", args=("-c", script), timeout_s=30)) as execution:
        await anext(aiter(execution))
    async with asyncio.timeout(20):
        while (await execute(sandbox, "test", "-e", "/tmp/finished")).exit_code:
            await asyncio.sleep(0.05)


# Creating.


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ({"template": "nowhere"}, NotFound),
        ({"vcpus": 64}, Exhausted),
        ({"memory_mb": 10_000_000}, Exhausted),
        ({"disk_size_mb": 100}, Invalid),
    ],
)
async def test_what_cannot_be_created_says_so(
    agent: RunningAgent, shape: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        async with agent.sandbox(**shape):
            pass
    assert getattr(caught.value, "hint", "")


@pytest.mark.parametrize("field", ["vcpus", "memory_mb", "disk_size_mb", "timeout_sec"])
async def test_negative_shapes_are_refused_by_the_agent_itself(
    agent: RunningAgent, field: str
) -> None:
    with pytest.raises(Invalid, match=field):
        await agent.transport._call("CreateSandbox", {"template": "base", field: -1})


async def test_an_id_is_used_once(agent: RunningAgent, sandbox: AsyncSandbox) -> None:
    with pytest.raises(AlreadyExists):
        await agent.transport.create(NewSandbox(sandbox_id=sandbox.sandbox_id))
    assert (await execute(sandbox, "true")).exit_code == 0


async def test_an_unknown_sandbox_is_told(agent: RunningAgent) -> None:
    unknown = new_sandbox_id()
    with pytest.raises(NotFound):
        await agent.transport.ping(unknown)
    with pytest.raises(NotFound):
        async with AsyncSandbox(agent.transport, unknown).exec(Command(cmd="true")):
            pass
    await agent.transport.destroy(unknown)


async def test_a_shape_is_what_was_asked_for(agent: RunningAgent) -> None:
    shape = {"vcpus": 2, "memory_mb": 768, "disk_size_mb": 7000, "envs": {"COLOUR": "sand"}}
    async with agent.sandbox(**shape) as sandbox:
        script = "nproc; free -m | awk '/Mem/{print $2}'; df -m --output=size / | tail -1"
        script += "; echo $COLOUR"
        cpus, memory, disk, colour = (await execute(sandbox, "sh", "-c", script)).text.split()
        assert (cpus, colour) == ("2", "sand")
        assert 640 < int(memory) <= 768
        assert 6500 < int(disk) <= 7000
        (info,) = [
            each
            for each in await agent.transport.list_sandboxes()
            if each.sandbox_id == sandbox.sandbox_id
        ]
        assert (info.state, info.vcpus, info.memory_mb, info.disk_size_mb) == (
            "running",
            2,
            768,
            7000,
        )


async def test_a_full_disk_and_a_silent_guest_are_survived(agent: RunningAgent) -> None:
    """Two faults of one sandbox, the milder first: a boot is dear."""
    async with agent.sandbox() as sandbox:
        free = "$(($(df --output=avail -B1 / | tail -1) - 100000000))"
        await execute(sandbox, "sh", "-c", f"fallocate -l {free} /filler")
        with pytest.raises(DiskFull):
            await sandbox.write_file("/root/large", chunks(3000 * MB))
        assert (await execute(sandbox, "test", "-e", "/root/large")).exit_code == 1
        await execute(sandbox, "rm", "/filler")
        await sandbox.write_file("/root/small", _once(b"x" * MB))

        stop = "kill -STOP $(pgrep -f 'guest agent' | head -1)"
        with pytest.raises(GuestSilent):
            await execute(sandbox, "sh", "-c", f"sleep 0.2; {stop}; sleep 100")
        (info,) = [
            each
            for each in await agent.transport.list_sandboxes()
            if each.sandbox_id == sandbox.sandbox_id
        ]
        assert (info.state, bool(info.reason)) == ("error", True)
        with pytest.raises(Conflict, match="error"):
            await execute(sandbox, "true")


async def test_a_vm_that_ends_is_an_error_and_destroyable(agent: RunningAgent) -> None:
    async with agent.sandbox() as sandbox:
        command = Command(cmd="sh", args=("-c", "echo b >/proc/sysrq-trigger"), timeout_s=30)
        with pytest.raises((Conflict, GuestSilent)):
            async with sandbox.exec(command) as execution:
                async for _ in execution:
                    pass
        async with asyncio.timeout(20):
            while not any(
                each.state == "error" and "ended" in each.reason
                for each in await agent.transport.list_sandboxes()
            ):
                await asyncio.sleep(0.05)
