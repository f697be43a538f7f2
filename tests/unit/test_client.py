"""The client over a real socket and the real contract, and what it promises of sandboxes."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandmartin.client.sandbox import AsyncSandbox, temporary_sandbox
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    NotStarted,
    SandmartinError,
    TimedOut,
    Unavailable,
)
from sandmartin.transport import (
    Command,
    Ended,
    NewSandbox,
    PtySize,
    Started,
    Stderr,
    Stdout,
    Transport,
)
from sandmartin.transport.agent import CHUNK_BYTES, AgentSocket, agent_answers
from tests.fakes_localagent import LocalAgent, serving
from tests.fakes_transport import FakeTransport

NEW = NewSandbox(sandbox_id="sb1", vcpus=2, envs={"A": "b"})


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


# Sockets that nobody serves.


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, if the tests have them."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(uid)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        yield listener


async def check(path: Path, error: type[SandmartinError], says: str) -> None:
    client = AgentSocket(path)
    try:
        with pytest.raises(error, match=says) as refused:
            await client.list_sandboxes()
        assert refused.value.hint
    finally:
        await client.aclose()


async def test_a_missing_or_deserted_socket_is_unavailable(
    tmp_path: Path, listener: socket.socket
) -> None:
    for path in (tmp_path / "none", tmp_path / "s" / "below", tmp_path / "s"):
        await check(path, Unavailable, "no agent listens")
        assert not await agent_answers(path)


async def test_a_forbidden_socket_is_denied(tmp_path: Path, listener: socket.socket) -> None:
    listener.listen()
    (tmp_path / "s").chmod(0)
    with nobody():
        await check(tmp_path / "s", Denied, "may not use")
        with pytest.raises(Denied):
            await agent_answers(tmp_path / "s")


async def test_a_socket_whose_path_is_too_long_is_no_agent(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    assert not await agent_answers(path)
    client = AgentSocket(path)
    with pytest.raises(Unavailable, match=r"cannot be used: .*too long"):
        await client.list_sandboxes()
    await client.aclose()


async def test_an_agent_that_is_silent_is_timed_out(
    tmp_path: Path, listener: socket.socket
) -> None:
    listener.listen()
    client = AgentSocket(tmp_path / "s")
    assert await agent_answers(tmp_path / "s")
    with pytest.raises(TimedOut, match="ListSandboxes"):
        await client._call("ListSandboxes", {}, deadline_s=0.05)
    await client.aclose()


# The contract.


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[LocalAgent, None]:
    (tmp_path / "root").mkdir()
    agent = LocalAgent(tmp_path / "root")
    async with serving(agent, tmp_path / "s"):
        yield agent


@pytest.fixture
async def client(agent: LocalAgent, tmp_path: Path) -> AsyncGenerator[AgentSocket, None]:
    client = AgentSocket(tmp_path / "s")
    yield client
    await client.aclose()


async def test_what_is_asked_and_answered_survives_the_wire(
    agent: LocalAgent, client: AgentSocket
) -> None:
    async with temporary_sandbox(client, NEW) as sandbox:
        (asked,) = agent.created
        assert (asked.template, asked.vcpus, asked.memory_mb) == ("base", 2, 0)
        assert dict(asked.envs) == {"A": "b"}
        (info,) = await client.list_sandboxes()
        assert (info.sandbox_id, info.state, info.created_at) == ("sb1", "running", 1_700_000_000)

        content = os.urandom(2 * CHUNK_BYTES + 17)
        await sandbox.write_file("/data", pieces(content[:9], b"", content[9:]))
        assert b"".join([chunk async for chunk in sandbox.read_file("/data")]) == content

        command = Command(
            cmd="sh",
            args=("-c", 'cat; printf "$X" >&2; kill -9 $$'),
            envs={"X": "ü\n"},
            stdin=True,
        )
        async with sandbox.exec(command) as execution:
            await execution.send_stdin(pieces(b"\0\xff", b"end"))
            events = [event async for event in execution]
        assert b"".join(e.data for e in events if isinstance(e, Stdout)) == b"\0\xffend"
        assert b"".join(e.data for e in events if isinstance(e, Stderr)) == "ü\n".encode()
        assert events[-1] == Ended(exit_code=137, signal=9)
        with pytest.raises(NotFound):
            await execution.signal(15)
    assert agent.sandboxes == []


async def test_files_survive_the_wire(agent: LocalAgent, client: AgentSocket) -> None:
    async with temporary_sandbox(client, NEW) as sandbox:
        await sandbox.make_directory("/d/e")
        with pytest.raises(AlreadyExists):
            await sandbox.make_directory("/d/e")
        await sandbox.write_file("/d/ü", pieces(b"content"))
        await sandbox.move_file("/d/ü", "/d/e/moved")
        (found,) = await sandbox.list_files("/d")
        assert (found.name, found.type, found.symlink_target) == ("e", "directory", "")
        info = await sandbox.stat("/d/e/moved")
        assert (info.type, info.size_bytes, info.mode & 0o400) == ("file", 7, 0o400)
        assert info.modified_at > 1_700_000_000
        await sandbox.remove_file("/d")
        await sandbox.remove_file("/d")
        with pytest.raises(NotFound):
            await sandbox.stat("/d")


async def test_a_command_on_a_terminal_can_be_resized(
    agent: LocalAgent, client: AgentSocket
) -> None:
    script = "stty size; read _; stty size; test -t 0 && test -t 2"
    command = Command(cmd="sh", args=("-c", script), pty=PtySize(cols=91, rows=17))
    async with temporary_sandbox(client, NEW) as sandbox, sandbox.exec(command) as execution:
        events, said = aiter(execution), b""
        async with asyncio.timeout(30):
            while b"17 91" not in said:
                event = await anext(events)
                assert isinstance(event, Stdout)
                said += event.data
            await execution.resize(PtySize(cols=92, rows=18))
            await execution.send_stdin(pieces(b"\n"))
            rest = [event async for event in events]
        assert b"18 92" in b"".join(each.data for each in rest if isinstance(each, Stdout))
        assert rest[-1] == Ended(exit_code=0)
        with pytest.raises(NotFound):
            await execution.resize(PtySize(cols=1, rows=1))


async def test_a_child_that_could_not_be_made_is_its_error(
    agent: LocalAgent, client: AgentSocket
) -> None:
    async with temporary_sandbox(client, NEW) as sandbox:
        agent.room = 1
        made, failed = await sandbox.fork(2)
        assert (made.state, made.error) == ("running", None)
        assert type(failed.error) is Exhausted
        assert (failed.error.message, failed.error.hint) == ("no room", "destroy some")
        assert agent.sandboxes == sorted(["sb1", made.sandbox_id])


async def test_the_agents_refusals_are_our_errors(agent: LocalAgent, client: AgentSocket) -> None:
    with pytest.raises(NotFound) as missing:
        await client.create(NewSandbox(sandbox_id="sb1", template="none"))
    assert missing.value.hint == "the templates here are: base"
    async with temporary_sandbox(client, NEW) as sandbox:
        with pytest.raises(NotStarted, match="nope: No such file"):
            async with sandbox.exec(Command(cmd="nope")):
                pass


async def test_a_hundred_commands_leave_room_for_one_more(
    agent: LocalAgent, client: AgentSocket
) -> None:
    count = 110
    async with temporary_sandbox(client, NEW) as sandbox:
        streams = [client.exec_stream("sb1", Command(cmd="cat", stdin=True)) for _ in range(count)]
        async with asyncio.timeout(60):
            started = await asyncio.gather(*(anext(stream) for stream in streams))
            for event in started:
                assert isinstance(event, Started)
                await client.send_stdin(sandbox.sandbox_id, event.pid, pieces(b"x"))
            ends = [[event async for event in stream][-1] for stream in streams]
        assert ends == [Ended(exit_code=0)] * count


@pytest.mark.parametrize(
    "new",
    [{"sandbox_id": "../x"}, {"template": "a/b"}, {"vcpus": 0}, {"memory_mb": 1}],
)
def test_a_sandbox_that_cannot_be_is_refused_before_anything_is_asked(
    new: dict[str, object],
) -> None:
    with pytest.raises(Invalid):
        NewSandbox(**({"sandbox_id": "sb1"} | new))  # type: ignore[arg-type]


# What a temporary sandbox promises.


async def hold(transport: Transport, entered: asyncio.Event) -> None:
    async with temporary_sandbox(transport, NEW):
        entered.set()
        await asyncio.Event().wait()


async def test_a_temporary_sandbox_goes_with_its_body() -> None:
    fake = FakeTransport()
    async with temporary_sandbox(fake, NEW):
        assert set(fake.sandboxes) == {"sb1"}
    assert not fake.sandboxes
    with pytest.raises(ZeroDivisionError):
        async with temporary_sandbox(fake, NEW):
            _ = 1 / 0
    assert not fake.sandboxes


async def test_it_goes_when_the_answer_to_the_create_was_lost() -> None:
    fake = FakeTransport()
    fake.lost_answer = Unavailable("the connection was lost")
    with pytest.raises(Unavailable):
        async with temporary_sandbox(fake, NEW):
            pytest.fail("it was never there")
    assert not fake.sandboxes


async def test_somebody_elses_sandbox_stays() -> None:
    fake = FakeTransport()
    await fake.create(NEW)
    with pytest.raises(AlreadyExists):
        async with temporary_sandbox(fake, NEW):
            pytest.fail("it is not ours")
    assert set(fake.sandboxes) == {"sb1"}


@pytest.mark.parametrize("cancels", [1, 3])
@pytest.mark.parametrize("during", ["create", "body"])
async def test_it_goes_however_often_it_is_cancelled(during: str, cancels: int) -> None:
    fake, entered = FakeTransport(), asyncio.Event()
    if during == "create":
        fake.may_go_on.clear()
    async with asyncio.timeout(10):
        task = asyncio.create_task(hold(fake, entered))
        await (fake.arrived if during == "create" else entered).wait()
        fake.may_go_on.clear()
        fake.arrived.clear()
        task.cancel()
        await fake.arrived.wait()
        for _ in range(cancels - 1):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        fake.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not fake.sandboxes


async def test_a_failed_destroy_is_told_and_hides_nothing() -> None:
    fake = FakeTransport()
    fake.destroy_error = Unavailable("the connection was lost")
    with pytest.raises(Unavailable):
        async with temporary_sandbox(fake, NEW):
            pass
    fake.sandboxes.clear()
    with pytest.raises(ZeroDivisionError) as raised:
        async with temporary_sandbox(fake, NEW):
            _ = 1 / 0
    assert raised.value.__notes__ == ["sandbox sb1 may still run: the connection was lost"]


async def test_the_life_of_a_sandbox_over_any_transport() -> None:
    fake = FakeTransport()
    sandbox = await AsyncSandbox.create(fake, NEW)
    await sandbox.pause()
    assert (await sandbox.info()).state == "paused"
    with pytest.raises(Conflict):
        await sandbox.fork()
    await sandbox.resume(timeout_s=9)
    info = await sandbox.info()
    assert (info.state, info.timeout_s) == ("running", 9)
    children = await sandbox.fork(2)
    assert len({each.sandbox_id for each in children} | {"sb1"}) == 3
    assert set(fake.sandboxes) == {"sb1", *(each.sandbox_id for each in children)}
    await sandbox.destroy()
    with pytest.raises(NotFound):
        await sandbox.info()


@pytest.mark.parametrize("how", ["lost", "cancelled"])
async def test_a_fork_without_an_answer_leaves_no_children(how: str) -> None:
    fake = FakeTransport()
    sandbox = await AsyncSandbox.create(fake, NEW)
    fake.arrived.clear()
    if how == "lost":
        fake.lost_answer = Unavailable("the connection was lost")
        with pytest.raises(Unavailable):
            await sandbox.fork(3)
    else:
        fake.may_go_on.clear()
        task = asyncio.create_task(sandbox.fork(3))
        await fake.arrived.wait()
        assert len(fake.sandboxes) == 4
        task.cancel()
        fake.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert set(fake.sandboxes) == {"sb1"}


@pytest.mark.parametrize(
    "events",
    [[], [Stdout(b"x")], [Started(1)], [Started(1), Stdout(b"x")], [Started(1), TimedOut()]],
)
async def test_a_command_without_start_and_end_never_looks_finished(events: list[object]) -> None:
    fake = FakeTransport()
    fake.events = events  # type: ignore[assignment]
    with pytest.raises((Unavailable, TimedOut)):
        async with AsyncSandbox(fake, "sb1").exec(Command(cmd="x")) as execution:
            async for _ in execution:
                pass
