"""Whole directories in and out of a guest, by the host agent's client and the real guest agent."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import io
import os
import pwd
import stat
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from sandmartin.agent.guest import Deadlines, Guest
from sandmartin.errors import (
    DiskFull,
    GuestSilent,
    Invalid,
    NotFound,
    ToolFailed,
    Unimplemented,
)
from tests.contract.guests import MIB, TOKEN, RunningAgent, impostor, pattern, wait_until

pytestmark = pytest.mark.root


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def packed(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for each in members:
            member, content = each if isinstance(each, tuple) else (each, b"")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: int | str) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    made.mtime = 1_000_000_000
    for field, value in fields.items():
        setattr(made, field, value)
    return made


async def read(guest: Guest, path: Path) -> bytes:
    async with contextlib.aclosing(guest.read_tree(os.fspath(path))) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_a_tree_that_tar_packed_comes_back_as_tar_unpacks_it(
    guest: Guest, tmp_path: Path
) -> None:
    source, target, back = tmp_path / "app", tmp_path / "new/place", tmp_path / "back"
    (source / "bin").mkdir(parents=True)
    (source / "bin/tool").write_bytes(os.urandom(3 * MIB + 5))
    (source / "bin/tool").chmod(0o4755)
    (source / "ü").symlink_to("bin/tool")
    os.link(source / "bin/tool", source / "again")
    os.chown(source / "bin/tool", 1234, 567)
    (source / "bin/tool").chmod(0o4755)
    os.utime(source / "bin", (10**9, 10**9))
    tar = subprocess.run(["tar", "-C", tmp_path, "-cf", "-", "app"], check=True, stdout=-1)
    assert await guest.write_tree(os.fspath(target), "", once(tar.stdout)) == 5
    back.mkdir()
    content = await read(guest, target / "app")
    subprocess.run(["tar", "-C", back, "-xpf", "-"], check=True, input=content)
    for made in (target, back):
        subprocess.run(["diff", "-r", "--no-dereference", source, made / "app"], check=True)
        status = (made / "app/bin/tool").lstat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4755, 1234, 567)
        assert status.st_nlink == 2
        assert (made / "app/bin").stat().st_mtime == 10**9
    # One file or one link is a tree too.
    for name, kind in (("again", tarfile.REGTYPE), ("ü", tarfile.SYMTYPE)):
        with tarfile.open(fileobj=io.BytesIO(await read(guest, target / "app" / name))) as found:
            assert [(each.name, each.type) for each in found] == [(name, kind)]


async def test_owners_are_names_and_numbers(guest: Guest, tmp_path: Path) -> None:
    nobody, group = pwd.getpwnam("nobody"), grp.getgrgid(1)
    tar = packed((member("file", uid=77, gid=78), b"x"), member("dir", tarfile.DIRTYPE))
    for owner, uid, gid in (
        ("", 77, 78),
        ("nobody", nobody.pw_uid, nobody.pw_gid),
        (f"nobody:{group.gr_name}", nobody.pw_uid, 1),
        ("55:66", 55, 66),
        ("4242", 4242, 4242),
    ):
        await guest.write_tree(os.fspath(tmp_path / "there"), owner, once(tar))
        status = (tmp_path / "there/file").stat()
        assert (status.st_uid, status.st_gid) == (uid, gid), owner
    for owner, why in (
        ("unheard-of", "invalid username: 'unheard-of'"),
        ("root:unheard-of", "unknown group: 'unheard-of'"),
        (":root", "invalid username: ''"),
        ("4294967295", "invalid username"),
    ):
        with pytest.raises(Invalid, match=why):
            await guest.write_tree(os.fspath(tmp_path / "there"), owner, once(tar))


async def test_what_is_refused_says_which_member_and_how_far_it_came(
    guest: Guest, tmp_path: Path
) -> None:
    good = (member("good"), b"x")
    for bad, why in (
        (member("/etc/evil"), "'/etc/evil': its name is absolute"),
        (member("a/../../evil"), "leads up, by '..'"),
        (member("dev", tarfile.CHRTYPE), "'dev': it is a device or a pipe"),
        (member("out", tarfile.LNKTYPE, linkname="/etc/passwd"), "'out': it is a hard link to"),
        (member("good/below"), "'good': it is there, and is no directory"),
    ):
        with pytest.raises(Invalid, match=why) as caught:
            await guest.write_tree(os.fspath(tmp_path), "", once(packed(good, bad)))
        assert caught.value.message.endswith("(unpacked before: 1)")
    link = member("link", tarfile.SYMTYPE, linkname=os.fspath(tmp_path))
    with pytest.raises(Invalid, match="a link that the tree itself brought"):
        await guest.write_tree(os.fspath(tmp_path), "", once(packed(link, member("link/x"))))
    whole = packed(good, (member("large"), bytes(MIB)), (member("last"), b"x"))
    with pytest.raises(Invalid, match=r"'large': the tar is cut off \(unpacked before: 1\)"):
        await guest.write_tree(os.fspath(tmp_path / "cut"), "", once(whole[: MIB // 2]))
    assert [each.name for each in (tmp_path / "cut").iterdir()] == ["good"]
    with pytest.raises(Invalid, match="invalid tar header"):
        await guest.write_tree(os.fspath(tmp_path), "", once(b"no tar at all" * 1000))
    with pytest.raises(NotFound, match="no such file"):
        await read(guest, tmp_path / "none")
    with pytest.raises(Invalid, match="neither a file, a directory nor a link"):
        await read(guest, Path("/dev/null"))
    with pytest.raises(Invalid, match="not absolute"):
        await read(guest, Path("relative"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


async def test_a_full_disk_is_told_and_keeps_what_was_whole(guest: Guest, small_disk: Path) -> None:
    tar = packed(*((member(f"f{n}"), bytes(8 * MIB)) for n in range(6)))
    with pytest.raises(DiskFull, match=r"'f\d': .*are kept free") as caught:
        await guest.write_tree(os.fspath(small_disk / "there"), "", once(tar))
    sizes = [each.stat().st_size for each in (small_disk / "there").iterdir()]
    assert sizes
    assert set(sizes) == {8 * MIB}
    assert f"(unpacked before: {len(sizes)})" in caught.value.message


async def test_large_trees_pass_in_bounded_memory(
    agent: RunningAgent, guest: Guest, tmp_path: Path
) -> None:
    def header(name: str, size: int) -> bytes:
        made = member(name)
        made.size = size
        return made.tobuf()

    async def tar() -> AsyncIterator[bytes]:
        for n in range(4000):
            yield header(f"small/{n}/file", 3) + b"abc".ljust(512, b"\0")
        yield header("large", 128 * MIB)
        async for chunk in pattern(128 * MIB):
            yield chunk
        yield bytes(1024)

    agent.forget_peak()
    before = agent.peak_bytes()
    assert await guest.write_tree(os.fspath(tmp_path / "there"), "", tar()) == 4001
    size = 0
    async with contextlib.aclosing(guest.read_tree(os.fspath(tmp_path / "there"))) as chunks:
        async for chunk in chunks:
            size += len(chunk)
    assert size > 132 * MIB
    assert agent.peak_bytes() - before < 32 * MIB


async def test_who_hangs_up_ends_the_work_inside(
    agent: RunningAgent, guest: Guest, tmp_path: Path
) -> None:
    def descriptors() -> list[str]:
        found = []
        for each in Path(f"/proc/{agent.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.fspath(each.readlink()))
        return [each for each in found if each.startswith(os.fspath(tmp_path))]

    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield packed((member("whole"), b"x"))[:1024]
        made = member("half")
        made.size = 64 * MIB
        yield made.tobuf() + bytes(2 * MIB)
        begun.set()
        await asyncio.Event().wait()

    writing = asyncio.ensure_future(guest.write_tree(os.fspath(tmp_path), "", endless()))
    await begun.wait()
    await asyncio.to_thread(wait_until, lambda: (tmp_path / "half").exists())
    writing.cancel()
    await asyncio.wait({writing})
    await asyncio.to_thread(wait_until, lambda: not descriptors())
    assert [each.name for each in tmp_path.iterdir()] == ["whole"]

    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 34)
    async with contextlib.aclosing(guest.read_tree(os.fspath(tmp_path))) as chunks:
        await anext(chunks)
        assert descriptors()
    await asyncio.to_thread(wait_until, lambda: not descriptors())


async def test_what_the_source_raises_is_passed_on(guest: Guest, tmp_path: Path) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield packed((member("whole"), b"x"))[:1024]
        raise LookupError("the source broke")

    with pytest.raises(LookupError, match="the source broke"):
        await guest.write_tree(os.fspath(tmp_path), "", breaking())


async def test_links_and_programs_outside_the_tree_stay_out_of_reach(
    guest: Guest, tmp_path: Path
) -> None:
    """A user's link below a directory of the user's leads no write of root's elsewhere."""
    outside, home = tmp_path / "outside", tmp_path / "home"
    for each in (outside, home):
        each.mkdir()
    os.chown(home, 1000, 1000)
    (home / "app").symlink_to(outside)
    os.lchown(home / "app", 1000, 1000)
    tar = packed((member("app/evil"), b"x"))
    for directory, content in ((home, tar), (home / "app", packed((member("evil"), b"x")))):
        with pytest.raises(Invalid, match="others than root may have made"):
            await guest.write_tree(os.fspath(directory), "", once(content))
    assert not list(outside.iterdir())
    # A link where the file goes is replaced, whoever made it.
    (home / "file").symlink_to(outside / "evil")
    await guest.write_tree(os.fspath(home), "1000", once(packed((member("file"), b"x"))))
    assert stat.S_ISREG((home / "file").lstat().st_mode)
    assert not list(outside.iterdir())


async def test_only_who_has_the_token_may(agent: RunningAgent, tmp_path: Path) -> None:
    with httpx.Client(base_url=agent.url, timeout=10) as client:
        for headers in ({}, {"X-Access-Token": "wrong"}):
            params = {"path": os.fspath(tmp_path)}
            assert client.get("/tree", params=params, headers=headers).status_code == 401
            sent = client.post("/tree", params=params, headers=headers, content=packed())
            assert sent.status_code == 401
        right = {"X-Access-Token": TOKEN}
        assert client.put("/tree", params=params, headers=right).status_code == 405


async def test_what_is_cut_or_reported_late_is_no_whole_tree() -> None:
    begin = b"Transfer-Encoding: chunked\r\nTrailer: Sandmartin-Outcome\r\n\r\n4\r\nabcd\r\n0\r\n"
    answers = {
        "cut": begin + b"\r\n",
        "late": begin + b"Sandmartin-Outcome: a%20file%20%C3%BC%20broke\r\n\r\n",
    }
    for name, error, why in (
        ("cut", GuestSilent, "broke off before the end"),
        ("late", ToolFailed, "read to its end: a file ü broke"),
    ):

        async def answer(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
        ) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + answers[name])

        async with impostor(answer) as port:
            guest = Guest("127.0.0.1", TOKEN, port, Deadlines(call_s=5, stream_s=5))
            with pytest.raises(error, match=why):
                await read(guest, Path("/x"))
            await guest.close()


async def test_a_guest_of_an_earlier_release_is_told_from_a_missing_path() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"code": 404, "message": "there is no such route"}'
        writer.write(
            b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nConnection: close\r\n"
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )

    async with impostor(answer) as port:
        guest = Guest("127.0.0.1", TOKEN, port, Deadlines(call_s=5, stream_s=5))
        with pytest.raises(Unimplemented, match="earlier release"):
            await read(guest, Path("/x"))
        await guest.close()
