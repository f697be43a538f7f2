"""Our client over the REST API: everything that a Transport has, against a real control plane."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

import httpx
import pytest

from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.control.platform import Platform
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Invalid,
    NotFound,
    NotStarted,
    Unauthenticated,
    Unavailable,
)
from sandmartin.model import new_sandbox_id
from sandmartin.transport import (
    Command,
    Ended,
    ExecEvent,
    NewSandbox,
    PtySize,
    Started,
    Stderr,
    Stdout,
    Transport,
)
from sandmartin.transport.api import Unreached
from sandmartin.transport.rest import Rest
from tests.contract.guests import alive, wait_until
from tests.control.conftest import RunningHost, make_team, served_platform
from tests.control.living import Place

pytestmark = pytest.mark.one_database

MIB = 1 << 20
DEADLINE_S = 20.0


def new(**more: object) -> NewSandbox:
    small = {"sandbox_id": new_sandbox_id(), "memory_mb": 128, "disk_size_mb": 8}
    return NewSandbox(**{**small, **more})  # type: ignore[arg-type]


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def collect(events: AsyncGenerator[ExecEvent, None]) -> tuple[bytes, bytes, Ended]:
    out, err = b"", b""
    async with aclosing(events), asyncio.timeout(DEADLINE_S):
        async for event in events:
            match event:
                case Stdout(data):
                    out += data
                case Stderr(data):
                    err += data
                case Ended():
                    return out, err, event
    raise AssertionError("no end was told")


# Life, on both databases.


@pytest.fixture
async def control(
    database_url: str, tmp_path: Path, host: RunningHost
) -> AsyncIterator[tuple[Platform, str]]:
    async with served_platform(database_url, tmp_path, host) as served:
        yield served


@pytest.fixture
async def rest(control: tuple[Platform, str]) -> AsyncIterator[Rest]:
    platform, url = control
    _, key = await make_team(platform)
    async with aclosing(Rest(url, key)) as rest:
        yield rest


async def test_the_life_of_a_sandbox(rest: Rest) -> None:
    transport: Transport = rest
    asked = new(timeout_s=900, envs={"A": "b"})
    sandbox = await AsyncSandbox.create(transport, asked)
    assert sandbox.sandbox_id != asked.sandbox_id
    info = await sandbox.info()
    assert (info.state, info.template, info.memory_mb, info.timeout_s) == (
        "running",
        "base",
        128,
        900,
    )
    assert info.address and info.created_at > 1_700_000_000
    # The same request is answered with what it made.
    assert (await rest.create(asked)).sandbox_id == sandbox.sandbox_id
    await sandbox.pause()
    await sandbox.pause()
    assert (await sandbox.info()).state == "paused"
    assert (await sandbox.resume(timeout_s=60)).state == "running"
    assert (await sandbox.resume()).state == "running"
    assert (await sandbox.info()).timeout_s == 60
    children = await sandbox.fork(2)
    assert [each.error for each in children] == [None, None]
    listed = {each.sandbox_id for each in await rest.list_sandboxes()}
    assert listed == {sandbox.sandbox_id, *(each.sandbox_id for each in children)}
    made = await sandbox.checkpoint("before")
    assert [each.comment for each in await sandbox.checkpoints()] == ["before"]
    assert (await sandbox.rollback(made.checkpoint_id)).state == "running"
    await sandbox.delete_checkpoint(made.checkpoint_id)
    assert await sandbox.checkpoints() == ()
    snapshot = await sandbox.snapshot("mine", live=True)
    assert snapshot.name == "mine" and snapshot.size_bytes > 0
    kinds = {each.name: each.kind for each in await rest.list_templates()}
    assert kinds == {"base": "image", "mine": "snapshot"}
    await rest.ping(sandbox.sandbox_id)
    assert isinstance(await sandbox.metrics("2h"), tuple)
    for each in (sandbox.sandbox_id, *(child.sandbox_id for child in children)):
        await rest.destroy(each)
        await rest.destroy(each)
    await rest.delete_snapshot("mine")
    assert await rest.list_sandboxes() == ()
    assert (await sandbox.info()).state == "stopped"


async def test_refusals_are_our_errors(rest: Rest, control: tuple[Platform, str]) -> None:
    with pytest.raises(NotFound, match="there is no template 'none'"):
        await AsyncSandbox.create(rest, new(template="none"))
    gone = new_sandbox_id()
    await rest.destroy(gone)
    for ask in (
        rest.get_sandbox(gone),
        rest.pause(gone),
        rest.resume(gone, None),
        rest.fork(gone, (new_sandbox_id(),), 0),
        rest.list_checkpoints(gone),
        rest.list_processes(gone),
        rest.stat_file(gone, "/"),
        rest.send_stdin(gone, 1, chunks(b"x")),
        rest.resize_pty(gone, 1, PtySize(80, 24)),
        rest.metrics(gone, "10m"),
        rest.read_console(gone),
        rest.delete_snapshot("nothing"),
    ):
        with pytest.raises(NotFound) as raised:
            await ask
        assert raised.value.answered
    for stream in (
        rest.exec_stream(gone, Command(cmd="true")),
        rest.connect_process(gone, 1),
        rest.read_file(gone, "/"),
    ):
        with pytest.raises(NotFound):
            await anext(stream)
    sandbox = await AsyncSandbox.create(rest, new())
    with pytest.raises(NotFound):
        await sandbox.rollback("cpnothing")
    await sandbox.snapshot("taken", live=True)
    with pytest.raises(AlreadyExists):
        await sandbox.snapshot("taken", live=True)
    with pytest.raises(Denied):
        await rest.api.ask("GET", "/v1/admin/users")
    await sandbox.pause()
    with pytest.raises(Conflict):
        await sandbox.fork()
    with pytest.raises(Invalid):
        await rest.get_sandbox("../templates")
    _, url = control
    async with aclosing(Rest(url, "e2b_" + "0" * 40)) as nobody:
        with pytest.raises(Unauthenticated) as refused:
            await AsyncSandbox.create(nobody, new())
    assert not hasattr(refused.value, "__notes__") and "e2b_" not in str(refused.value)


async def test_a_create_that_was_given_up_leaves_nothing(rest: Rest, host: RunningHost) -> None:
    """Whether its request had arrived or not, and whether its answer had been sent or not."""
    for asked in (0.0, 0.001, 0.02, 0.2):
        task = asyncio.create_task(AsyncSandbox.create(rest, new()))
        await asyncio.sleep(asked)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await rest.destroy((await task).sandbox_id)
    assert await rest.list_sandboxes() == ()
    wait_until(lambda: not [vm for vm in host.fakes.vmm.vms.values() if vm.record.process.alive()])


async def test_a_fork_that_was_given_up_leaves_no_children(rest: Rest) -> None:
    source = await AsyncSandbox.create(rest, new())
    ids = tuple(new_sandbox_id() for _ in range(3))
    made = await rest.fork(source.sandbox_id, ids, 0)
    again = await rest.fork(source.sandbox_id, ids, 0)
    assert [each.sandbox_id for each in again] == [each.sandbox_id for each in made]
    with pytest.raises(Conflict, match="another request"):
        await rest.fork(source.sandbox_id, ids[:1], 60)
    await rest.undo_fork(source.sandbox_id, ids, 0, Unavailable("the answer was lost"))
    assert [each.sandbox_id for each in await rest.list_sandboxes()] == [source.sandbox_id]
    # One that never arrived: it cannot make anything any more, either.
    late = tuple(new_sandbox_id() for _ in range(2))
    await rest.undo_fork(source.sandbox_id, late, 0, asyncio.CancelledError())
    await rest.fork(source.sandbox_id, late, 0)
    assert [each.sandbox_id for each in await rest.list_sandboxes()] == [source.sandbox_id]


# What is asked again, and what is not.


class Unsteady:
    """A server that takes each of the first connections, hears a request, and hangs up."""

    def __init__(self, cuts: int, answer: bytes) -> None:
        self.cuts = cuts
        self.answer = answer
        self.heard: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append((await reader.readuntil(b"\r\n\r\n")).lower())
        if len(self.heard) > self.cuts:
            writer.write(self.answer)
            await writer.drain()
        writer.close()


def http(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture
async def unsteady() -> AsyncIterator[tuple[Unsteady, Rest]]:
    server = Unsteady(0, http(200, b"{}"))
    listener = await asyncio.start_server(server, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        async with aclosing(Rest(f"http://127.0.0.1:{port}", "e2b_key")) as rest:
            yield server, rest


async def test_what_is_safe_is_asked_again(unsteady: tuple[Unsteady, Rest]) -> None:
    server, rest = unsteady
    server.cuts, server.answer = 2, http(200, b'{"id": "sb7", "status": "running"}')
    assert (await rest.get_sandbox("sb7")).state == "running"
    assert len(server.heard) == 3
    server.heard.clear()
    asked = new()
    assert (await rest.create(asked)).sandbox_id == "sb7"
    assert len(server.heard) == 3
    key = f"idempotency-key: {asked.sandbox_id}".encode()
    assert all(key in each for each in server.heard)
    server.heard.clear()
    with pytest.raises(Unavailable, match="was lost"):
        await rest.pause("sb7")
    assert len(server.heard) == 1


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (http(502, b"<html>", "text/html"), Unavailable, "HTTP 502"),
        (http(301, b""), Unavailable, "HTTP 301"),
        (http(200, b"<html>"), Unavailable, "no JSON"),
        (http(413, b'{"error": {"code": "too_large", "message": "no"}}'), Invalid, "no"),
        (http(409, b'{"error": {"code": "overtaken", "message": "late"}}'), Conflict, "late"),
        (http(200, b'{"id": 7}'), Exception, "no text in id"),
        (http(200, b"[" * 100_000), Unavailable, "no JSON"),
    ],
)
async def test_other_answers_are_told_apart(
    unsteady: tuple[Unsteady, Rest], answer: bytes, error: type[Exception], says: str
) -> None:
    server, rest = unsteady
    server.answer = answer
    with pytest.raises(error, match=says) as raised:
        await rest.rollback("sb7", "cp1")
    assert "e2b_key" not in str(raised.value)


@pytest.mark.parametrize("cut", ["", 'event: start\ndata: {"pid": 7}\n\n', "event: start\nda"])
async def test_a_cut_stream_never_looks_complete(unsteady: tuple[Unsteady, Rest], cut: str) -> None:
    server, rest = unsteady
    server.answer = http(200, cut.encode(), "text/event-stream")
    with pytest.raises(Unavailable):
        async for _ in rest.exec_stream("sb7", Command(cmd="true")):
            pass
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n"
    server.answer = chunked
    with pytest.raises(Unavailable):
        async for _ in rest.read_file("sb7", "/x"):
            pass


async def test_nobody_there() -> None:
    with socket.socket() as taken:
        # Bound and not listening: nobody else takes the port, and nobody answers.
        taken.bind(("127.0.0.1", 0))
        async with aclosing(Rest(f"http://127.0.0.1:{taken.getsockname()[1]}", "e2b_key")) as rest:
            with pytest.raises(Unreached, match="Connection refused") as raised:
                await AsyncSandbox.create(rest, new())
    # Nothing was asked for, so nothing may still run.
    assert not hasattr(raised.value, "__notes__") and raised.value.hint


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("127.0.0.1:8000", "e2b_key"),
        ("ftp://host", "e2b_key"),
        ("http://", "e2b_key"),
        ("http://user:word@host", "e2b_key"),
        ("http://host?x=y", "e2b_key"),
        ("http://host\n", "e2b_key"),
        ("http://host", "e2b\r\nx: y"),
        ("http://host", "e2b_ü"),
    ],
)
def test_what_can_be_no_control_plane_is_refused(url: str, key: str) -> None:
    with pytest.raises(Invalid) as raised:
        Rest(url, key)
    assert "word" not in str(raised.value) and "e2b" not in str(raised.value)


# Inside, with a real guest.


@pytest.fixture
async def inside(place: Place) -> AsyncIterator[AsyncSandbox]:
    async with aclosing(Rest(place.url, place.key)) as rest:
        yield AsyncSandbox(rest, place.sandbox_id)


@pytest.mark.root
async def test_a_command_talks_both_ways(inside: AsyncSandbox) -> None:
    script = "cat; echo over >&2; echo $A; pwd; exit 4"
    command = Command(
        cmd="sh", args=("-c", script), envs={"A": "b c"}, cwd="/usr", stdin=True, tag="talk"
    )
    async with inside.exec(command) as execution:
        (process,) = [each for each in await inside.processes() if each.tag == "talk"]
        assert (process.pid, process.cmd, process.args[0]) == (execution.pid, "sh", "-c")
        pieces = [bytes([n]) * 70_000 for n in range(4)]
        await execution.send_stdin(chunks(*pieces))
        events = [event async for event in execution]
    out = b"".join(each.data for each in events if isinstance(each, Stdout))
    err = b"".join(each.data for each in events if isinstance(each, Stderr))
    assert out == b"".join(pieces) + b"b c\n/usr\n" and err == b"over\n"
    assert events[-1] == Ended(exit_code=4)


@pytest.mark.root
async def test_how_a_command_ends_is_told(inside: AsyncSandbox) -> None:
    transport = inside._transport
    with pytest.raises(NotStarted, match="no-such"):
        async with inside.exec(Command(cmd="no-such")):
            pytest.fail("it cannot start")
    _, _, ended = await collect(
        transport.exec_stream(inside.sandbox_id, Command(cmd="sleep", args=("60",), timeout_s=1))
    )
    assert ended.error and ended.exit_code
    async with inside.exec(Command(cmd="sleep", args=("60",))) as execution:
        await execution.signal(15)
        events = [event async for event in execution]
    assert events == [Ended(exit_code=143, signal=15)]
    with pytest.raises(NotFound):
        await execution.signal(15)
    with pytest.raises((NotFound, Conflict)):
        await execution.send_stdin(chunks(b"x"))


@pytest.mark.root
async def test_a_terminal(inside: AsyncSandbox) -> None:
    command = Command(cmd="sh", envs={"PS1": "> "}, pty=PtySize(81, 25))

    async def keys() -> AsyncIterator[bytes]:
        yield b"stty size\n"
        async with asyncio.timeout(DEADLINE_S):
            while b"25 81" not in said:
                await asyncio.sleep(0.01)
        await execution.resize(PtySize(132, 50))
        yield b"stty size; tty -s && exit 3\n"

    said = bytearray()
    async with inside.exec(command) as execution, asyncio.timeout(DEADLINE_S):
        feeding = asyncio.create_task(execution.send_stdin(keys()))
        async for event in execution:
            if isinstance(event, Ended):
                assert event.exit_code == 3
            else:
                said += event.data
        # It has ended by itself; a terminal is closed by its own end-of-input character.
        with suppress(Conflict, NotFound):
            await feeding
    assert b"50 132" in said
    async with inside.exec(Command(cmd="cat", stdin=True)) as plain:
        with pytest.raises(Conflict):
            await plain.resize(PtySize(80, 24))
        await plain.send_stdin(chunks())


@pytest.mark.root
async def test_one_may_listen_to_what_runs_already(inside: AsyncSandbox) -> None:
    command = Command(cmd="sh", args=("-c", "echo first; read x; echo $x"), stdin=True)
    transport = inside._transport
    async with inside.exec(command) as execution:
        async for event in execution:
            assert event == Stdout(b"first\n")
            break
    events = transport.connect_process(inside.sandbox_id, execution.pid)
    assert await anext(events) == Started(execution.pid)
    await execution.send_stdin(chunks(b"second\n"))
    out, _, ended = await collect(events)
    assert (out, ended.exit_code) == (b"second\n", 0)


@pytest.mark.root
async def test_whoever_stops_listening_ends_nothing(inside: AsyncSandbox) -> None:
    async with inside.exec(Command(cmd="sleep", args=("60",))) as execution:
        assert alive(execution.pid)
    assert alive(execution.pid)
    await execution.signal(9)
    wait_until(lambda: not alive(execution.pid))


@pytest.mark.root
async def test_much_output_arrives_whole(inside: AsyncSandbox) -> None:
    transport = inside._transport
    command = Command(cmd="head", args=("-c", str(24 * MIB), "/dev/urandom"))
    seen = hashlib.sha256()
    size = 0
    async for event in transport.exec_stream(inside.sandbox_id, command):
        if isinstance(event, Stdout):
            size += len(event.data)
            seen.update(event.data)
    assert size == 24 * MIB


@pytest.mark.root
async def test_files(inside: AsyncSandbox, tmp_path: Path) -> None:
    top = str(tmp_path / "a b")
    await inside.make_directory(top)
    with pytest.raises(AlreadyExists):
        await inside.make_directory(top)
    # An empty name would be lost in a URL, and so would a plus or an ampersand.
    at = f"{top}/ü&x=+%41.bin"
    digest = hashlib.sha256()

    async def much() -> AsyncIterator[bytes]:
        for number in range(64):
            piece = bytes([number]) * MIB
            digest.update(piece)
            yield piece
            yield b""

    await inside.write_file(at, much())
    info = await inside.stat(at)
    assert (info.type, info.size_bytes, info.path) == ("file", 64 * MIB, at)
    back = hashlib.sha256()
    async for piece in inside.read_file(at):
        back.update(piece)
    assert back.digest() == digest.digest()
    await inside.write_file(f"{top}/empty", chunks())
    assert [piece async for piece in inside.read_file(f"{top}/empty")] == []
    Path(top, "link").symlink_to("empty")
    listed = {each.name: each.symlink_target for each in await inside.list_files(top, depth=2)}
    assert listed == {"ü&x=+%41.bin": "", "empty": "", "link": str(Path(top, "empty"))} or set(
        listed
    ) == {"ü&x=+%41.bin", "empty", "link"}
    await inside.move_file(f"{top}/empty", f"{top}/moved")
    with pytest.raises(NotFound):
        await inside.stat(f"{top}/empty")
    await inside.remove_file(top)
    await inside.remove_file(top)
    for missing in (inside.stat(top), inside.list_files(top)):
        with pytest.raises(NotFound):
            await missing


@pytest.mark.root
async def test_an_upload_that_breaks_off_leaves_nothing(
    inside: AsyncSandbox, tmp_path: Path
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(MIB)
        raise OSError("the disk here is gone")

    with pytest.raises(OSError, match="gone"):
        await inside.write_file(str(tmp_path / "half"), broken())
    wait_until(lambda: not list(tmp_path.iterdir()))


@pytest.mark.root
async def test_a_closed_client_says_so(place: Place) -> None:
    rest = Rest(place.url, place.key)
    sandbox = AsyncSandbox(rest, place.sandbox_id)
    assert isinstance(await sandbox.read_console(), bytes)
    async with sandbox.exec(Command(cmd="sleep", args=("60",))) as execution:
        await rest.aclose()
        with pytest.raises(Unavailable):
            async for _ in execution:
                pass
    with pytest.raises(Unavailable, match="closed"):
        await sandbox.info()
    async with httpx.AsyncClient(headers={"x-api-key": place.key}) as other:
        await other.delete(f"{place.url}{place.path}/processes/{execution.pid}?signal=9")
