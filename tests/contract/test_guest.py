"""The guest agent, as a plain process, and the host agent's client of it keep to one contract."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandmartin.agent import assets
from sandmartin.agent.guest import (
    Command,
    Deadlines,
    Ended,
    Guest,
    Output,
    ProcessEvent,
    Started,
)
from sandmartin.errors import (
    Denied,
    DiskFull,
    GuestSilent,
    Invalid,
    NotFound,
    NotStarted,
    SandmartinError,
    TimedOut,
    ToolFailed,
)
from tests.contract.guests import ME, TOKEN, RunningAgent, alive, identity, running, wait_until

MIB = 1 << 20


@pytest.fixture(scope="session")
async def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("guest")
    await assets._build_guest(into)
    return into / "sandmartin-guest"


@pytest.fixture(scope="module")
async def agent(binary: Path) -> AsyncIterator[RunningAgent]:
    """An agent that has been introduced, shared by the tests that leave it as it is."""
    with running(binary) as started:
        guest = started.client()
        await guest.introduce(identity(SANDBOX_VAR="of the sandbox"), 10)
        await guest.close()
        yield started


@pytest.fixture
async def guest(agent: RunningAgent) -> AsyncIterator[Guest]:
    client = agent.client()
    yield client
    await client.close()


def shell(script: str, **options: Any) -> Command:
    return Command(cmd="sh", args=("-c", script), **({"user": ME} | options))


async def collect(events: AsyncIterator[ProcessEvent]) -> tuple[bytes, bytes, Ended]:
    out, err = b"", b""
    async for event in events:
        match event:
            case Output(data, stdout=True):
                out += data
            case Output(data):
                err += data
            case Ended():
                return out, err, event
    raise AssertionError("the stream had no end event")


async def started(events: AsyncIterator[ProcessEvent]) -> int:
    first = await anext(events)
    assert isinstance(first, Started)
    return first.pid


# Introduction.


async def test_nothing_is_served_before_the_introduction_and_tokens_change_hands(
    binary: Path,
) -> None:
    with running(binary) as fresh:
        guest, other = fresh.client("first"), fresh.client("second")
        assert not await guest.healthy(2)
        with pytest.raises(GuestSilent, match="not been introduced"):
            await collect(guest.start(shell("true")))
        async with httpx.AsyncClient() as plain:
            assert (await plain.get(f"{fresh.url}/metrics")).status_code == 503

        await guest.introduce(identity("first"), 5)
        assert await guest.healthy(2)
        with pytest.raises(Invalid, match="access token"):
            await collect(other.start(shell("true")))
        with pytest.raises(ToolFailed, match="not the one in force"):
            await other.introduce(identity("third"), 5)

        # As after a fork: the parent's token introduces, and is refused from then on.
        parent = fresh.client("first")
        await guest.introduce(identity("second"), 5)
        assert (await collect(guest.start(shell("echo 1"))))[0] == b"1\n"
        with pytest.raises(Invalid, match="access token"):
            await parent.signal(1, 15)
        # The answer was lost and the host repeats what it said.
        await parent.introduce(identity("second"), 5)
        for client in (guest, other, parent):
            await client.close()


async def test_a_later_introduction_replaces_the_environment_only_if_it_has_one(
    binary: Path,
) -> None:
    with running(binary) as fresh:
        guest = fresh.client()
        for given, shown in (({"A": "1"}, b"1\n"), (None, b"1\n"), ({"B": "ä"}, b"\n")):
            told = replace(identity(), envs=given, root_bytes=1 << 40, moved=True)
            await guest.introduce(told, 5)
            assert (await collect(guest.start(shell("echo $A"))))[0] == shown
        assert (await collect(guest.start(shell("echo $B"))))[0].decode() == "ä\n"
        await guest.close()


async def test_only_the_gateway_introduces(binary: Path) -> None:
    with running(binary, gateway="127.0.0.2") as stranger:
        guest = stranger.client()
        with pytest.raises(ToolFailed, match="for the host alone"):
            await guest.introduce(identity(), 5)
        assert not await guest.healthy(2)
        await guest.close()


async def test_a_guest_that_never_boots_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    guest = Guest("127.0.0.1", TOKEN, port)
    begun = time.monotonic()
    with pytest.raises(TimedOut):
        await guest.introduce(identity(), 0.3)
    assert time.monotonic() - begun < 3
    await guest.close()


async def test_a_guest_that_is_reached_late_is_told_the_time_it_is_then() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = listener.getsockname()
    guest = Guest("127.0.0.1", TOKEN, address[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener).setblocking(False)
        for _ in range(3):
            # Behind these, whoever connects is not heard, and knocks again a second later.
            before = stack.enter_context(socket.socket())
            before.setblocking(False)
            before.connect_ex(address)
        introducing = asyncio.create_task(guest.introduce(identity(), 20))
        began = time.time()
        while _waiting(address[1]) < 4:
            await asyncio.sleep(0.01)
        content = b""
        while b"timestamp" not in content:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            stack.enter_context(connection).settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while piece := await asyncio.to_thread(connection.recv, 65536):
                    content += piece
        told = json.loads(content[content.index(b"{") :].splitlines()[0])["timestamp"]
        assert time.time() - began > 0.5
        assert time.time() - datetime.fromisoformat(told).timestamp() < 0.4
        introducing.cancel()
        await asyncio.wait({introducing})
    await guest.close()


def _waiting(port: int) -> int:
    """How many have connected to a port, or try to."""
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return sum(f"0100007F:{port:04X}" == line.split()[2] for line in lines)


async def test_the_environments_proxy_is_never_used(
    agent: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    guest = agent.client()
    assert await guest.healthy(5)
    await guest.close()


# Processes.


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


# Files.


async def pattern(size: int, digest: Any = None) -> AsyncIterator[bytes]:
    block = os.urandom(MIB)
    for n in range(size // MIB):
        chunk = struct.pack(">Q", n) + block[8:]
        if digest is not None:
            digest.update(chunk)
        yield chunk


def status_of(path: str) -> os.stat_result:
    return Path(path).stat()


async def test_64_mib_go_in_and_out_unchanged_in_bounded_memory(
    agent: RunningAgent, guest: Guest, tmp_path: Path
) -> None:
    path = os.fspath(tmp_path / "made" / "on the way" / "ü.bin")
    agent.forget_peak()
    before = agent.peak_bytes()
    sent, received = hashlib.sha256(), hashlib.sha256()
    await guest.upload(path, ME, pattern(64 * MIB, sent))
    assert status_of(path).st_size == 64 * MIB
    async for chunk in guest.download(path, ME):
        received.update(chunk)
    assert received.digest() == sent.digest()
    assert agent.peak_bytes() - before < 32 * MIB


async def test_short_odd_and_endless_files(guest: Guest, tmp_path: Path) -> None:
    empty = os.fspath(tmp_path / "empty")
    await guest.upload(empty, ME, pattern(0))
    assert [chunk async for chunk in guest.download(empty, ME)] == []
    for kernel in ("/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled"):
        assert b"".join([chunk async for chunk in guest.download(kernel, ME)])
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(Invalid, match="regular file"):
            await anext(guest.download(os.fspath(path), ME))
        with pytest.raises(Invalid, match="regular file"):
            await guest.upload(os.fspath(path), ME, pattern(MIB))


async def test_what_is_asked_wrongly_about_files_has_its_own_error(
    guest: Guest, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        await anext(guest.download(os.fspath(tmp_path / "missing"), ME))
    for path in ("", "a\0b"):
        with pytest.raises(Invalid, match="NUL"):
            await anext(guest.download(path, ME))
        with pytest.raises(Invalid, match="NUL"):
            await guest.upload(path, ME, pattern(MIB))
    with pytest.raises(Invalid, match="nobody-knows-me"):
        await guest.upload(os.fspath(tmp_path / "file"), "nobody-knows-me", pattern(MIB))


async def test_an_upload_whose_source_breaks_leaves_nothing(guest: Guest, tmp_path: Path) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(MIB)
        raise LookupError("the source broke")

    path = tmp_path / "file"
    with pytest.raises(LookupError, match="the source broke"):
        await guest.upload(os.fspath(path), ME, breaking())
    wait_until(lambda: not path.exists())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


@pytest.mark.root
@pytest.mark.root
async def test_a_full_disk_is_told_and_given_back(guest: Guest, small_disk: Path) -> None:
    path = small_disk / "file"
    free = os.statvfs(small_disk).f_bfree
    for _ in range(5):
        with pytest.raises(DiskFull, match="not enough disk space") as caught:
            await guest.upload(os.fspath(path), "root", pattern(256 * MIB))
        assert caught.value.hint
        assert not path.exists()
    assert os.statvfs(small_disk).f_bfree == free
    await guest.upload(os.fspath(path), "root", pattern(8 * MIB))
    assert path.stat().st_size == 8 * MIB


@pytest.fixture
def other_users(binary: Path, tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent in a mount namespace of its own, where other accounts are known."""
    # Others than root must get through to where tests work.
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    (tmp_path / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\n"
        f"ann:x:4242:4243::{tmp_path}/home:/bin/sh\n"
        "user:x:4244:4244::/no/such/home:/bin/sh\n"
    )
    (tmp_path / "group").write_text("ann:x:4243:\nclub:x:4250:bob,ann\nother:x:4251:bob\n")
    for name, mode, uid, gid in (("home", 0o755, 4242, 4243), ("club", 0o770, 0, 4250)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        os.chown(tmp_path / name, uid, gid)
    # What is mounted here must not be seen outside. Below a chroot the root is no mount of its
    # own and cannot be told so; there it must be private already.
    private = 'mount --make-rprivate / 2>/dev/null || case "$(findmnt -no PROPAGATION -T /etc)" in '
    private += "*shared*) exit 1 ;; esac; "
    inside = 'for f in passwd group; do mount --bind "$0/$f" /etc/$f || exit 1; done; exec "$@"'
    prefix = (
        "unshare",
        "--mount",
        "--propagation=unchanged",
        "sh",
        "-c",
        private + inside,
        os.fspath(tmp_path),
    )
    with running(binary, prefix=prefix) as agent:
        yield agent


@pytest.mark.root
@pytest.mark.root
async def test_work_is_done_with_the_rights_of_the_user(
    other_users: RunningAgent, tmp_path: Path
) -> None:
    guest = other_users.client()
    await guest.introduce(identity(), 10)
    command = shell("id -u; id -g; id -G; pwd; echo $HOME $USER", user="ann")
    out, _, _ = await collect(guest.start(command))
    home = f"{tmp_path}/home"
    assert out.decode().splitlines() == ["4242", "4243", "4243 4250", home, f"{home} ann"]

    out, _, _ = await collect(guest.start(shell("pwd", user="user")))
    assert out == b"/\n"

    await guest.upload("mine.txt", "ann", pattern(MIB))
    await guest.upload(f"{tmp_path}/club/by-group", "ann", pattern(MIB))
    made = status_of(f"{home}/mine.txt")
    assert (made.st_uid, made.st_gid) == (4242, 4243)
    with pytest.raises(Denied):
        await guest.upload(f"{tmp_path}/not-hers", "ann", pattern(MIB))
    with pytest.raises(Denied):
        await anext(guest.download(f"{tmp_path}/club/by-group", "user"))
    with pytest.raises(NotStarted, match="ann"):
        await collect(guest.start(Command(cmd="/root/x", user="ann")))
    with pytest.raises(Invalid, match="cwd"):
        await collect(guest.start(shell("true", user="user", cwd=f"{tmp_path}/club")))
    await guest.close()


# A guest that falls silent, and one that is hostile.


async def test_a_stopped_agent_is_silent_within_the_deadlines(binary: Path, tmp_path: Path) -> None:
    deadlines = Deadlines(call_s=0.4, stream_s=2, upload_s=0.4)
    with running(binary) as agent:
        guest = agent.client(deadlines=deadlines)
        await guest.introduce(identity(), 5)
        events = guest.start(shell("sleep 300", stdin=True))
        pid = await started(events)
        # Keepalives keep a quiet stream; a command that does not read keeps its writer.
        quiet = asyncio.ensure_future(anext(events))
        feeding = asyncio.ensure_future(guest.send_input(pid, bytes(MIB)))
        done, _ = await asyncio.wait({quiet, feeding}, timeout=2.5)
        assert not done
        os.kill(agent.pid, signal.SIGSTOP)
        begun = time.monotonic()
        for waiting in (quiet, feeding):
            with pytest.raises(GuestSilent):
                await waiting
        assert time.monotonic() - begun < 3
        await _expect_silence(guest, os.fspath(tmp_path / "file"), pid)
        os.kill(agent.pid, signal.SIGCONT)
        assert await guest.healthy(5)
        await guest.signal(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        await guest.close()


async def _expect_silence(guest: Guest, path: str, pid: int) -> None:
    begun = time.monotonic()
    assert not await guest.healthy(0.2)
    for asking in (
        guest.signal(pid, signal.SIGCONT),
        guest.close_input(pid),
        guest.upload(path, ME, pattern(64 * MIB)),
        anext(guest.download(path, ME)),
        anext(guest.start(shell("true"))),
    ):
        with pytest.raises(GuestSilent):
            await asking
    assert time.monotonic() - begun < 5


def _stream(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\n"
    return head + b"Connection: close\r\n\r\n" + body


def _chunked_forever() -> bytes:
    return b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(_stream(b"\0\xff\xff\xff\xff"), ToolFailed, id="4 GB message"),
        pytest.param(_stream(b"\1\0\0\0\2ab"), ToolFailed, id="compressed"),
        pytest.param(_stream(b"\0\0\0\0\3\xff\xff\xff"), ToolFailed, id="no protobuf"),
        pytest.param(_stream(b"\0\0\0\0\x09ab"), GuestSilent, id="cut"),
        pytest.param(_stream(b"\2\0\0\0\2{}"), GuestSilent, id="no end event"),
        pytest.param(_stream(b"\2\0\0\0\1{"), GuestSilent, id="no JSON"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", GuestSilent, id="no HTTP"),
        pytest.param(b"", GuestSilent, id="nothing"),
        pytest.param(
            b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            ToolFailed,
            id="redirect",
        ),
        pytest.param(
            b"HTTP/1.1 500 No\r\nContent-Length: 9000000\r\n\r\n" + bytes(9_000_000),
            ToolFailed,
            id="endless error",
        ),
    ],
)
async def test_whatever_a_hostile_guest_answers_is_one_of_our_errors(
    answer: bytes, error: type[SandmartinError]
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        guest = Guest("127.0.0.1", TOKEN, server.sockets[0].getsockname()[1])
        with pytest.raises(error):
            await collect(guest.start(shell("true")))
        await guest.close()


async def test_a_guest_that_confirms_another_identity_is_refused() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        body = json.dumps({"sandboxId": "sbother", "hostname": "sbother", "machineId": "0"})
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        guest = Guest("127.0.0.1", TOKEN, server.sockets[0].getsockname()[1])
        with pytest.raises(ToolFailed, match="another identity"):
            await guest.introduce(identity(), 5)
        await guest.close()


# What others than our client send.


def _request(path: str, kind: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        f"POST {path} HTTP/1.1\r\nHost: guest\r\nX-Access-Token: {TOKEN}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
    ).encode() + body


START = "/process.Process/Start"
STREAM = "application/connect+json"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (_request(START, STREAM, b"\0\xff\xff\xff\xff"), b'"error"'),
        (_request(START, STREAM, b"\0\0\0\0\x20{"), b'"error"'),
        (_request(START, STREAM, b"\0\0\0\0\4null"), b'"error"'),
        (_request(START, STREAM, b"\0\0\0\0\x05{]}{["), b'"error"'),
        (_request(START, STREAM, b"\1\0\0\0\2{}"), b'"error"'),
        (_request(START, STREAM, b""), b'"error"'),
        (_request("/process.Process/List", "application/json", b"{]"), b"HTTP/1.1 400 "),
        (_request("/process.Process/List", "text/plain", b"{}"), b"HTTP/1.1 415 "),
        (_request("/process.Process/None", "application/json", b"{}"), b"HTTP/1.1 404 "),
        (_request("/files?path=/tmp/x", "multipart/form-data", b""), b"HTTP/1.1 415 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", b"HTTP/1.1 431 "),
    ],
)
async def test_malformed_requests_are_answered_and_the_agent_lives(
    agent: RunningAgent, guest: Guest, sent: bytes, answered: bytes
) -> None:
    reader, writer = await asyncio.open_connection(agent.host, agent.port)
    writer.write(sent)
    # A body that ends early, not a connection that is idle.
    writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answered in answer
    assert await guest.healthy(5)


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


def frames(content: bytes) -> list[dict[str, Any]]:
    found = []
    while content:
        flags, size = struct.unpack_from(">BI", content)
        found.append(json.loads(content[5 : 5 + size]))
        content = content[5 + size :]
        assert (flags == 2) == (not content)
    return found


def stream(sdk: httpx.Client, method: str, message: dict[str, Any], **headers: str) -> list[Any]:
    body = json.dumps(message).encode()
    answer = sdk.post(
        f"/process.Process/{method}",
        content=struct.pack(">BI", 0, len(body)) + body,
        headers={"content-type": STREAM} | {k.replace("_", "-"): v for k, v in headers.items()},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == STREAM
    return frames(answer.content)


def test_the_stock_sdks_process_calls(sdk: httpx.Client) -> None:
    process = {"cmd": "/bin/bash", "args": ["-l", "-c", "echo $A; exit 3"], "envs": {"A": "ä"}}
    events = stream(sdk, "Start", {"process": process, "stdin": False, "tag": "t", "unknown": 1})
    pid = events[0]["event"]["start"]["pid"]
    assert isinstance(pid, int)
    assert base64.b64decode(events[1]["event"]["data"]["stdout"]).decode() == "ä\n"
    end = events[2]["event"]["end"]
    assert end == {"exitCode": 3, "exited": True, "status": "exit status 3"}
    assert events[3] == {}
    # The exit code is kept for a while.
    late = stream(sdk, "Connect", {"process": {"tag": "t"}})
    assert late[0]["event"]["start"]["pid"] == pid
    assert late[-2]["event"]["end"]["exitCode"] == 3

    missing = stream(sdk, "Start", {"process": {"cmd": "no-such-command"}})
    assert missing[-1]["error"]["code"] == "not_found"
    process = {"cmd": "sleep", "args": ["300"]}
    late = stream(sdk, "Start", {"process": process}, connect_timeout_ms="300")
    assert late[-2]["event"]["end"]["status"] == "signal: killed"
    assert late[-2]["event"]["end"]["timedOut"] is True


def test_the_stock_sdks_terminal(sdk: httpx.Client) -> None:
    script = 'stty size; read line; echo "got $line"; stty size; exit 2'
    message = {
        "process": {"cmd": "/bin/bash", "args": ["-c", script], "envs": {"TERM": "xterm"}},
        "pty": {"size": {"cols": 100, "rows": 30}},
        "tag": "terminal",
    }
    body = json.dumps(message).encode()
    content = struct.pack(">BI", 0, len(body)) + body
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


def test_the_stock_sdks_file_calls(sdk: httpx.Client, tmp_path: Path) -> None:
    def call(method: str, **message: Any) -> httpx.Response:
        return sdk.post(f"/filesystem.Filesystem/{method}", json=message)

    directory = f"{tmp_path}/a/b"
    assert call("MakeDir", path=directory).json()["entry"]["type"] == "FILE_TYPE_DIRECTORY"
    again = call("MakeDir", path=directory)
    assert (again.status_code, again.json()["code"]) == (409, "already_exists")
    file = {"path": f"{directory}/f.txt", "username": ME}
    octets = {"content-type": "application/octet-stream"}
    written = sdk.post("/files", params=file, content=b"0123456789", headers=octets)
    assert written.json() == [{"path": file["path"], "name": "f.txt", "type": "file"}]
    Path(directory, "link").symlink_to("f.txt")
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff.bin")).touch()

    entry = call("Stat", path=file["path"]).json()["entry"]
    assert entry["size"] == "10"
    assert (entry["mode"], entry["permissions"]) == (0o644, "-rw-r--r--")
    assert (entry["owner"], entry["name"]) == (ME, "f.txt")
    assert entry["modifiedTime"].endswith("Z")
    listed = call("ListDir", path=f"{tmp_path}/a", depth=2).json()["entries"]
    shown = {found["path"]: found for found in listed}
    assert sorted(shown) == [
        f"{directory}{rest}" for rest in ("", "/f.txt", "/link", "/\ufffd.bin")
    ]
    assert shown[f"{directory}/link"]["type"] == "FILE_TYPE_FILE"
    assert shown[f"{directory}/link"]["symlinkTarget"] == file["path"]
    assert len(call("ListDir", path=f"{tmp_path}/a").json()["entries"]) == 1

    moved = call("Move", source=file["path"], destination=f"{tmp_path}/new/place")
    assert moved.json()["entry"]["path"] == f"{tmp_path}/new/place"
    assert call("Move", source=file["path"], destination=f"{tmp_path}/no").status_code == 404
    assert call("Remove", path=f"{tmp_path}/a").json() == {}
    assert call("Remove", path=f"{tmp_path}/a").json() == {}
    assert call("Stat", path=directory).json()["code"] == "not_found"
    assert call("Stat", path="a\0b").json()["code"] == "invalid_argument"


def test_a_signed_url_needs_no_token(agent: RunningAgent, tmp_path: Path) -> None:
    path = tmp_path / "signed"
    path.write_bytes(b"content")

    def get(expires: int, signed_path: str) -> httpx.Response:
        text = f"{signed_path}:read:{ME}:{TOKEN}:{expires}"
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        query = {"path": os.fspath(path), "username": ME, "signature": f"v1_{digest}"}
        return httpx.get(f"{agent.url}/files", params=query | {"signature_expiration": expires})

    now = int(time.time())
    assert get(now + 60, os.fspath(path)).content == b"content"
    assert get(now + 60, "/other").json() == {"code": 401, "message": "invalid signature"}
    expired = get(now - 60, os.fspath(path))
    assert expired.json() == {"code": 401, "message": "signature is already expired"}


def test_metrics(sdk: httpx.Client) -> None:
    sample = sdk.get("/metrics").json()
    assert sample["cpu_count"] >= 1
    assert 0 < sample["mem_used"] < sample["mem_total"]
    assert 0 < sample["disk_used"] <= sample["disk_total"]
    assert sample["cpu_used_pct"] >= 0
