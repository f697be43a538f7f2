"""The SDK against a real control plane and a real guest agent: commands, files, folders, git."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sandmartin import (
    AsyncSandbox,
    AsyncTemplates,
    CommandFailed,
    CommandTimedOut,
    CopyProgress,
    FileEvent,
    FileEventType,
    Sandbox,
    Stderr,
    Stdout,
    Templates,
)
from sandmartin.errors import (
    Conflict,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    NotStarted,
    Unauthenticated,
    Unimplemented,
)
from tests.contract.guests import alive, wait_until
from tests.control.living import Place

pytestmark = pytest.mark.root

MIB = 1 << 20
DEADLINE_S = 30.0


@pytest.fixture
async def sandbox(place: Place) -> AsyncSandbox:
    return await AsyncSandbox.connect(place.sandbox_id, url=place.url, api_key=place.key)


# Commands.


async def test_a_command_to_its_end(sandbox: AsyncSandbox) -> None:
    heard: list[tuple[str, str]] = []

    async def on_stderr(text: str) -> None:
        heard.append(("err", text))

    result = await sandbox.commands.run(
        'printf "ü$A"; printf bad >&2; pwd',
        envs={"A": "1"},
        cwd="/tmp",
        on_stdout=lambda text: heard.append(("out", text)),
        on_stderr=on_stderr,
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ü1/tmp\n", "bad")
    assert result.stdout_bytes == "ü1/tmp\n".encode()
    assert "".join(text for kind, text in heard if kind == "out") == "ü1/tmp\n"
    assert ("err", "bad") in heard
    words = await sandbox.commands.run(["printf", "%s|", "a b", "$A", ""])
    assert words.stdout == "a b|$A||"


async def test_a_failed_command_carries_its_result(sandbox: AsyncSandbox) -> None:
    with pytest.raises(CommandFailed, match="exit code 3: why") as failed:
        await sandbox.commands.run("echo out; echo why >&2; exit 3")
    assert (failed.value.exit_code, failed.value.stdout) == (3, "out\n")
    assert (await sandbox.commands.run("exit 3", check=False)).exit_code == 3
    killed = await sandbox.commands.run("kill -9 $$", check=False)
    assert (killed.exit_code, killed.signal) == (137, 9)
    with pytest.raises(NotStarted):
        await sandbox.commands.run(["no-such-program"])
    with pytest.raises(Invalid, match="is not a directory"):
        await sandbox.commands.run("true", cwd="/no/such/directory")


async def test_a_time_limit_kills_and_tells_what_was_said(sandbox: AsyncSandbox) -> None:
    with pytest.raises(CommandTimedOut, match="within 1 s") as late:
        await sandbox.commands.run("echo begun; sleep 100", timeout=1)
    assert late.value.result.stdout == "begun\n"


async def test_input(sandbox: AsyncSandbox) -> None:
    large = os.urandom(3 * MIB)
    echoed = await sandbox.commands.run("cat", stdin=large)
    assert echoed.stdout_bytes == large
    # One that does not read is no error.
    assert (await sandbox.commands.run("true", stdin=large)).exit_code == 0
    assert (await sandbox.commands.run("wc -c", stdin="")).stdout.strip() == "0"


async def test_a_command_in_the_background(sandbox: AsyncSandbox) -> None:
    handle = await sandbox.commands.run("cat; echo end >&2", background=True, stdin=True, tag="me")
    listed = {each.pid: each.tag for each in await sandbox.commands.list()}
    assert listed[handle.pid] == "me" and handle.exit_code is None
    await handle.send_stdin("one\n")
    async with asyncio.timeout(DEADLINE_S):
        events = aiter(handle)
        assert await anext(events) == Stdout(b"one\n")
        await handle.send_stdin(b"two\n")
        assert await anext(events) == Stdout(b"two\n")
        await handle.close_stdin()
        assert [each async for each in events] == [Stderr(b"end\n")]
    assert (await handle.wait()).stdout == "one\ntwo\n"
    assert handle.exit_code == 0
    with pytest.raises(Conflict):
        await handle.send_stdin("three")
    assert await anext(aiter(handle)) == Stdout(b"one\n")
    assert not await handle.kill()


async def test_kill_connect_and_input_by_pid(sandbox: AsyncSandbox) -> None:
    first = await sandbox.commands.run("cat; sleep 100", background=True, stdin=True, timeout=None)
    await first.disconnect()
    with pytest.raises(Conflict, match="nobody listens"):
        await first.wait()
    again = await sandbox.commands.connect(first.pid)
    await sandbox.commands.send_stdin(first.pid, "hello\n")
    async with asyncio.timeout(DEADLINE_S):
        assert await anext(aiter(again)) == Stdout(b"hello\n")
        await sandbox.commands.close_stdin(first.pid)
        assert await sandbox.commands.kill(first.pid)
        assert (await again.wait(check=False)).signal == 9
    assert not await sandbox.commands.kill(first.pid)
    with pytest.raises(NotFound):
        await sandbox.commands.connect(1)


async def test_a_run_that_is_cancelled_kills_its_command(sandbox: AsyncSandbox) -> None:
    said = asyncio.Event()
    running = asyncio.create_task(
        sandbox.commands.run("echo $$; sleep 1000", on_stdout=lambda _: said.set())
    )
    async with asyncio.timeout(DEADLINE_S):
        await said.wait()
        (process,) = [
            each for each in await sandbox.commands.list() if "sleep 1000" in each.args[-1]
        ]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    wait_until(lambda: not alive(process.pid))


async def test_a_callback_that_fails_ends_the_run(sandbox: AsyncSandbox) -> None:
    def fail(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await sandbox.commands.run("echo; sleep 1000", on_stdout=fail)
    assert not [each for each in await sandbox.commands.list() if "sleep 1000" in each.args[-1]]


async def test_a_terminal(sandbox: AsyncSandbox) -> None:
    said = bytearray()
    terminal = await sandbox.pty.create(91, 17, on_data=said.extend, timeout=60)
    await terminal.send_stdin("stty size\n")
    async with asyncio.timeout(DEADLINE_S):
        while b"17 91" not in said:
            await asyncio.sleep(0.01)
        await terminal.resize(92, 18)
        await sandbox.pty.send(terminal.pid, "stty size; exit 4\n")
        with pytest.raises(CommandFailed) as ended:
            await terminal.wait()
    assert ended.value.exit_code == 4 and b"18 92" in said


# Files.


async def pieces() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x" * MIB


async def test_content(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    at = f"{tmp_path}/deep/ü"
    await sandbox.files.write(at, "täxt")
    assert await sandbox.files.read(at) == "täxt"
    await sandbox.files.write(at, b"\xff\0")
    assert await sandbox.files.read(at, format="bytes") == b"\xff\0"
    assert await sandbox.files.read(at) == "\ufffd\0"
    await sandbox.files.write(at, pieces())
    assert sum([len(each) async for each in sandbox.files.stream(at)]) == 3 * MIB
    await sandbox.files.write(at, (b"y" for _ in range(3)))
    assert await sandbox.files.read(at) == "yyy"
    with Path(at).open("rb") as file:
        await sandbox.files.write(f"{at}2", file)
    assert await sandbox.files.read(f"{at}2") == "yyy"
    many = {f"{tmp_path}/many/{number}": str(number) for number in range(20)}
    await sandbox.files.write_many(many)
    assert {path: Path(path).read_text() for path in many} == many
    with pytest.raises(NotFound):
        await sandbox.files.read(f"{tmp_path}/none")
    with pytest.raises(Denied):
        await sandbox.files.write("/root/sdk", "x", user="nobody")


async def test_directories(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    top = str(tmp_path / "a")
    assert await sandbox.files.mkdir(f"{top}/b")
    assert not await sandbox.files.mkdir(f"{top}/b")
    await sandbox.files.write(f"{top}/b/c", "1")
    assert [each.name for each in await sandbox.files.list(top)] == ["b"]
    assert [each.name for each in await sandbox.files.list(top, depth=2)] == ["b", "c"]
    await sandbox.files.rename(f"{top}/b/c", f"{top}/d")
    assert await sandbox.files.exists(f"{top}/d")
    assert not await sandbox.files.exists(f"{top}/b/c")
    assert (await sandbox.files.info(f"{top}/d")).size_bytes == 1
    await sandbox.files.remove(top)
    assert not await sandbox.files.exists(top)


# Folders.


def make_tree(top: Path) -> dict[str, tuple[int, bytes | str]]:
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    (top / "sub" / "run me").write_text("#!/bin/sh\n")
    (top / "sub" / "run me").chmod(0o750)
    (top / "sub" / "-n").write_bytes(b"")
    (top / "secret").write_text("s")
    (top / "secret").chmod(0o600)
    (top / "large").write_bytes(os.urandom(2 * MIB + 17))
    (top / "sub" / "deep" / "new\nline").write_text("n")
    (top / "sub" / "deep" / "up").symlink_to("../../large")
    (top / "link").symlink_to("sub/deep")
    (top / "dangling").symlink_to("nowhere")
    return tree_of(top)


def tree_of(top: Path) -> dict[str, tuple[int, bytes | str]]:
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = 0, f"-> {path.readlink()}"
        else:
            found[name] = mode, b"" if path.is_dir() else path.read_bytes()
    return found


async def test_a_folder_goes_up_and_comes_down_as_it_was(
    sandbox: AsyncSandbox, tmp_path: Path
) -> None:
    source, inside, back = (tmp_path / each for each in ("source", "inside", "back"))
    tree = make_tree(source)
    os.mkfifo(source / "pipe")
    told: list[CopyProgress] = []
    up = await sandbox.files.upload(source, str(inside), on_progress=told.append)
    assert (up.files, up.links, up.left_out) == (5, 3, ("pipe",))
    assert tree_of(inside) == tree
    assert told[-1].files == told[-1].total_files == 5
    assert told[-1].size_bytes == told[-1].total_bytes == up.size_bytes
    # Once more, over what is there.
    await sandbox.files.upload(str(source), str(inside))
    assert tree_of(inside) == tree
    (inside / "out").symlink_to("/etc/passwd")
    (inside / "sub" / "above").symlink_to("../../back")
    down = await sandbox.files.download(str(inside), back)
    assert down.left_out == ("out", "sub/above")
    assert (down.files, down.links, down.size_bytes) == (5, 3, up.size_bytes)
    assert tree_of(back) == tree
    await sandbox.files.download(str(inside), back)
    assert tree_of(back) == tree


def whole_seconds(top: Path) -> set[bool]:
    """Whether files have such times, as those have that came as one tar."""
    return {path.lstat().st_mtime_ns % 10**9 == 0 for path in top.rglob("*")}


async def test_a_large_new_folder_goes_up_as_one(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    for n in range(300):
        (source / "sub" / f"{n}").write_bytes(bytes(n))
    (source / "sub").chmod(0o711)
    tree, told = tree_of(source), list[CopyProgress]()
    inside = tmp_path / "on the way" / "inside"
    up = await sandbox.files.upload(source, str(inside), on_progress=told.append)
    assert tree_of(inside) == tree
    assert whole_seconds(inside) == {True}
    assert stat.S_IMODE(inside.stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
    assert (up.files, told[-1].files, told[-1].size_bytes) == (305, 305, up.size_bytes)
    # Over what is there, and by a link that anybody may have made, each goes by itself.
    (inside / "large").write_bytes(b"")
    await sandbox.files.upload(source, str(inside))
    assert tree_of(inside) == tree
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.lchown(tmp_path / "link", 1000, 1000)
    await sandbox.files.upload(source, f"{tmp_path}/link/inside")
    assert tree_of(tmp_path / "real" / "inside") == tree
    assert False in whole_seconds(tmp_path / "real" / "inside")


async def test_one_file_goes_up_and_comes_down(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    source.chmod(0o755)
    up = await sandbox.files.upload(source, f"{tmp_path}/inside")
    assert (up.files, up.directories, up.size_bytes) == (1, 0, 7)
    await sandbox.files.download(f"{tmp_path}/inside", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o755
    with pytest.raises(NotFound):
        await sandbox.files.upload(tmp_path / "none", "/x")
    with pytest.raises(NotFound):
        await sandbox.files.download(f"{tmp_path}/none", tmp_path / "x")
    assert not (tmp_path / "x").exists()


async def test_a_download_is_bounded(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for number in range(5):
        (inside / str(number)).write_bytes(b"x" * MIB)
    with pytest.raises(Exhausted, match="4 files"):
        await sandbox.files.download(str(inside), tmp_path / "a", max_files=4)
    with pytest.raises(Exhausted, match="bytes"):
        await sandbox.files.download(str(inside), tmp_path / "b", max_bytes=2 * MIB)
    # A link that somebody put here is no way out.
    (inside / "d").mkdir()
    (inside / "d" / "f").write_text("f")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d").symlink_to(tmp_path)
    with pytest.raises(Invalid, match="is a link"):
        await sandbox.files.download(str(inside), tmp_path / "c")
    assert not (tmp_path / "f").exists()


# Git.


async def test_git(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    git, bare, work = sandbox.git, f"{tmp_path}/bare.git", f"{tmp_path}/work"
    await sandbox.commands.run(["git", "init", "--quiet", "--bare", "-b", "main", bare])
    await git.clone(bare, work)
    await git.configure_user("A", "a@example.org", path=work)
    assert await git.get_config("user.email", path=work) == "a@example.org"
    assert await git.get_config("no.such", path=work) is None
    await sandbox.files.write_many({f"{work}/a b": "1\n", f"{work}/c": "2\n"})
    status = await git.status(work)
    assert (status.branch, [each.path for each in status.files]) == ("main", ["a b", "c"])
    await git.add(work, ["a b"])
    assert [each.index for each in (await git.status(work)).files] == ["A", "?"]
    await git.add(work)
    first = await git.commit(work, "One\n\n# kept\n")
    assert len(first) == 40
    await git.push(work, set_upstream=True)
    await sandbox.commands.run(["git", "mv", "c", "d"], cwd=work)
    (moved,) = (await git.status(work)).files
    assert (moved.index, moved.path, moved.renamed_from) == ("R", "d", "c")
    second = await git.commit(work, "Two", author="B <b@example.org>")
    status = await git.status(work)
    assert (status.is_clean, status.upstream, status.ahead) == (True, "origin/main", 1)
    await git.push(work)
    await git.checkout(work, "side", create=True)
    branches = await git.branches(work)
    assert (branches.current, branches.names) == ("side", ("main", "side"))
    await git.checkout(work, "main")
    await git.delete_branch(work, "side")
    other = f"{tmp_path}/other"
    await git.clone(bare, other, depth=1, branch="main")
    await git.configure_user("C", "c@example.org", path=other)
    third = await git.commit(other, "Three", allow_empty=True)
    await git.push(other)
    await git.pull(work)
    log = await sandbox.commands.run(["git", "log", "--format=%H"], cwd=work)
    assert log.stdout.split() == [third, second, first]
    with pytest.raises(CommandFailed, match="repository"):
        await git.clone(f"{tmp_path}/none", f"{tmp_path}/x")
    with pytest.raises(Invalid):
        await git.checkout(work, "--orphan")


# What goes over the sandbox's ports.


async def test_a_watch(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    async with await sandbox.files.watch(str(tmp_path), recursive=True) as watch:
        (tmp_path / "a").write_text("1")
        (tmp_path / "sub" / "b").write_text("2")
        (tmp_path / "a").unlink()
        seen: list[tuple[str, str]] = []
        async with asyncio.timeout(DEADLINE_S):
            async for event in watch:
                assert event.path == f"{tmp_path}/{event.name}"
                seen.append((event.type, event.name))
                if event.type is FileEventType.REMOVE:
                    break
    assert {("create", "a"), ("write", "a"), ("create", "sub/b"), ("remove", "a")} <= set(seen)
    async with asyncio.timeout(DEADLINE_S):
        assert [each async for each in watch] == []
    with pytest.raises(NotFound):
        await sandbox.files.watch(f"{tmp_path}/none")


async def test_a_watch_calls(sandbox: AsyncSandbox, tmp_path: Path) -> None:
    heard: asyncio.Queue[FileEvent] = asyncio.Queue()
    watch = await sandbox.files.watch(str(tmp_path), on_event=heard.put)
    (tmp_path / "a").mkdir()
    async with asyncio.timeout(DEADLINE_S):
        event = await heard.get()
    assert (event.type, event.name) == (FileEventType.CREATE, "a")
    await watch.stop()
    # One that is stopped before it has begun leaves nothing open.
    await (await sandbox.files.watch(str(tmp_path))).stop()


async def test_where_a_port_is(sandbox: AsyncSandbox, place: Place) -> None:
    port = place.url.rpartition(":")[2]
    assert await sandbox.get_host(3000) == f"3000-{sandbox.sandbox_id}.localhost:{port}"
    assert await sandbox.url(3000) == f"http://3000-{sandbox.sandbox_id}.localhost:{port}"
    assert len(await sandbox.traffic_token()) == 64


# Life, on hosts with fake VMs.


async def test_what_is_listed(place: Place) -> None:
    at: dict[str, Any] = {"url": place.url, "api_key": place.key}
    made = [
        await AsyncSandbox.create(
            metadata={"for": "list", "n": str(number)}, memory_mb=128, disk_size_mb=8, **at
        )
        for number in range(3)
    ]
    listed = AsyncSandbox.list(metadata={"for": "list"}, page_size=2, **at)
    ids = [each.sandbox_id async for each in listed]
    assert ids == [each.sandbox_id for each in reversed(made)]
    await made[0].pause()
    paused = [each async for each in AsyncSandbox.list(states=["paused"], **at)]
    assert [each.metadata["n"] for each in paused] == ["0"]
    for each in made:
        await each.kill()
        await each.kill()
    assert [each async for each in AsyncSandbox.list(metadata={"for": "list"}, **at)] == []
    with pytest.raises(NotFound):
        await AsyncSandbox.connect("sbnone", **at)
    with pytest.raises(Unauthenticated):
        await AsyncSandbox.connect(made[0].sandbox_id, url=place.url, api_key="e2b_" + "0" * 40)


async def test_life(place: Place) -> None:
    at: dict[str, Any] = {"url": place.url, "api_key": place.key}
    async with await AsyncSandbox.create(
        timeout=900, on_timeout="kill", memory_mb=128, disk_size_mb=8, **at
    ) as sandbox:
        info = await sandbox.info()
        assert (info.state, info.timeout_s, info.memory_mb) == ("running", 900, 128)
        kept = await sandbox.checkpoint("before")
        assert [each.comment for each in await sandbox.checkpoints()] == ["before"]
        await sandbox.rollback(kept)
        await sandbox.delete_checkpoint(kept)
        assert await sandbox.checkpoints() == ()
        await sandbox.pause()
        again = await AsyncSandbox.connect(sandbox.sandbox_id, timeout=60, **at)
        assert (await again.info()).timeout_s == 60
        first, second = await sandbox.fork(2, timeout=30)
        assert (await first.info()).timeout_s == 30
        await first.kill()
        await second.kill()
        name = f"sdk-{sandbox.sandbox_id[-6:]}"
        await sandbox.snapshot(name)
        assert (await sandbox.info()).state == "running"
        templates = AsyncTemplates(**at)
        assert name in [each.name for each in await templates.list()]
        with pytest.raises(Conflict, match="is needed by"):
            await templates.delete(name)
        assert isinstance(await sandbox.metrics(), tuple)
    await templates.delete(name)
    assert name not in [each.name for each in await templates.list()]
    with pytest.raises((NotFound, Conflict)):
        await AsyncSandbox.connect(sandbox.sandbox_id, **at)
    with pytest.raises(ZeroDivisionError):
        async with await AsyncSandbox.create(memory_mb=128, disk_size_mb=8, **at) as lost:
            _ = 1 / 0
    assert lost.sandbox_id not in [each.sandbox_id async for each in AsyncSandbox.list(**at)]


async def test_what_needs_a_control_plane_says_so(place: Place) -> None:
    url = place.host.address
    async with await AsyncSandbox.create(memory_mb=128, disk_size_mb=8, url=url) as sandbox:
        assert (await sandbox.commands.run("echo hi")).stdout == "hi\n"
        assert sandbox.sandbox_id in [each.sandbox_id async for each in AsyncSandbox.list(url=url)]
        for asked in (
            sandbox.url(80),
            sandbox.run_code("1"),
            sandbox.files.watch("/tmp"),
            AsyncSandbox.create(metadata={"a": "b"}, url=url),
        ):
            with pytest.raises(Unimplemented) as refused:
                await asked
            assert "SANDMARTIN_URL" in refused.value.hint
        with pytest.raises(Unimplemented):
            await anext(AsyncSandbox.list(metadata={"a": "b"}, url=url))


def blockingly(place: Place, directory: Path) -> list[str]:
    """All kinds of methods, without an event loop; in which threads callbacks came."""
    threads: list[str] = []

    def heard(_: object) -> None:
        threads.append(threading.current_thread().name)

    at: dict[str, Any] = {"url": place.url, "api_key": place.key}
    with Sandbox.create(memory_mb=128, disk_size_mb=8, metadata={"for": "sync"}, **at) as sandbox:
        (listed,) = Sandbox.list(metadata={"for": "sync"}, **at)
        assert listed.sandbox_id == sandbox.sandbox_id
        assert sandbox.commands.run("echo hi", on_stdout=heard).stdout == "hi\n"
        with pytest.raises(CommandFailed):
            sandbox.commands.run("exit 1")
        handle = sandbox.commands.run("cat", background=True, stdin=True)
        handle.send_stdin("x")
        handle.close_stdin()
        assert list(handle) == [Stdout(b"x")]
        assert handle.wait().exit_code == handle.exit_code == 0
        sandbox.files.write(f"{directory}/f", iter([b"a", b"b"]))
        assert sandbox.files.read(f"{directory}/f") == "ab"
        assert b"".join(sandbox.files.stream(f"{directory}/f")) == b"ab"
        with sandbox.files.watch(str(directory)) as watch:
            sandbox.files.write(f"{directory}/g", "g")
            assert next(iter(watch)).name == "g"
        sandbox.files.download(str(directory), directory / "back", on_progress=heard)
        assert (directory / "back" / "f").read_text() == "ab"
        terminal = sandbox.pty.create(cmd=["sh", "-c", "stty size"], cols=91, rows=17)
        assert b"17 91" in terminal.wait().stdout_bytes
        (child,) = sandbox.fork()
        child.kill()
        assert Templates(**at).list() is not None
        with pytest.raises(NotFound):
            sandbox.files.read(f"{directory}/none")
    assert not list(Sandbox.list(metadata={"for": "sync"}, **at))
    return threads


async def test_the_same_for_those_who_wait(place: Place, tmp_path: Path) -> None:
    # The server is on the loop of this thread, so whoever waits is in another.
    def act() -> list[str]:
        threading.current_thread().name = "waiting"
        return blockingly(place, tmp_path)

    async with asyncio.timeout(60):
        assert set(await asyncio.to_thread(act)) == {"waiting"}
