"""Cells: what a program in one can see, do and leave. No VM is needed, but root."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandmartin.agent.cell import Cell, guarded_way
from sandmartin.errors import TimedOut, ToolFailed
from sandmartin.relay.guard import Guard, parse_networks

pytestmark = pytest.mark.root

UID = 2_800_000
SECRET = "not to be told"


@pytest.fixture
def cell() -> Iterator[Cell]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        cell = Cell(work=Path(directory, "work"), uid=UID, file_bytes=1 << 20)
        cell.open()
        yield cell


async def said(cell: Cell, command: str) -> str:
    done = await cell.run(["sh", "-c", command], deadline_s=20)
    return (done.stdout + done.stderr).decode()


async def test_owners_are_nobody_of_this_host(cell: Cell) -> None:
    assert await said(cell, "id -u; touch one two; chown 7:65535 two; chmod 4755 two") == "0\n"
    one, two = (cell.work / name for name in ("one", "two"))
    assert one.stat().st_uid == UID
    assert (two.stat().st_uid, two.stat().st_gid) == (UID + 7, UID + 65535)
    assert "Invalid argument" in await said(cell, "chown 65536 one")
    assert "not permitted" in await said(cell, "mknod device c 1 3")


async def test_nothing_of_the_host_is_seen_but_its_programs(cell: Cell) -> None:
    assert (await said(cell, "ls /etc/shadow /root /home /var/lib")).count("No such file") == 4
    assert (await said(cell, "ls /var/tmp")).split() == [cell.work.parent.name]
    assert "Permission denied" in await said(cell, "touch /usr/bin/mine")
    assert await said(cell, "ls -d /proc/[0-9]*") == "/proc/1\n"
    assert await said(cell, "env | grep -c .") == "4\n"
    assert "CapEff:\t000000008000001b" in await said(cell, "cat /proc/self/status")
    assert "NoNewPrivs:\t1" in await said(cell, "cat /proc/self/status")


async def test_a_file_of_its_own_is_on_no_disk(cell: Cell) -> None:
    done = await cell.run(
        ["cat", "/run/secret", "/proc/self/cmdline"], deadline_s=20, files={"secret": SECRET}
    )
    assert done.stdout.decode().startswith(SECRET)
    assert not list(cell.work.iterdir())


async def test_files_and_time_are_bounded(cell: Cell) -> None:
    assert (
        "File size limit" in await said(cell, "head -c 2m /dev/zero >big")
        or (cell.work / "big").stat().st_size == 1 << 20
    )
    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"^sleep "):
        await cell.run(["sleep", "1000"], deadline_s=0.5)
    assert time.monotonic() - began < 10
    with pytest.raises(ToolFailed, match="no-such-program"):
        await cell.run(["no-such-program"], deadline_s=20)


async def test_nothing_is_left_of_what_is_ended(cell: Cell) -> None:
    """A program that would not hear of its end, and has children."""
    mark = f"{os.getpid()}1234"
    work = f"trap '' TERM; setsid sleep {mark} & setsid sleep {mark}"
    running = asyncio.create_task(cell.run(["sh", "-c", work], deadline_s=60))
    async with asyncio.timeout(20):
        while not _sleeping(mark):
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    async with asyncio.timeout(20):
        while _sleeping(mark):
            await asyncio.sleep(0.01)


def _sleeping(mark: str) -> bool:
    found = b""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += process.read_bytes()
    return f"sleep\0{mark}".encode() in found


async def test_what_links_lead_to_is_never_opened(cell: Cell) -> None:
    await said(cell, "ln -s /etc/passwd link; ln -s /etc etc; mkfifo pipe; echo 1 >plain; mkdir d")
    wrong = [("link",), ("etc", "passwd"), ("pipe",), ("d",), ("none",), ("plain", "none"), ()]
    for names in (*wrong, ("etc/passwd",), ("/etc/passwd",), ("..", "work", "plain")):
        with cell.opened(*names) as handle:
            assert handle is None
    with cell.opened("plain") as handle:
        assert handle is not None
        assert os.read(handle, 10) == b"1\n"


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1]


@pytest.mark.skipif(not Path("/usr/bin/curl").exists(), reason="needs curl")
async def test_a_way_leads_only_where_the_guard_lets(cell: Cell) -> None:
    async with server() as port:
        ask = f"curl -sS --max-time 5 http://127.0.0.1:{port}/"
        proxied = f"{ask} -x $HTTP_PROXY"
        assert "Couldn't connect" in await said(cell, ask)
        loopback = ("127.0.0.1", port)
        allowed = Guard(parse_networks("127.0.0.0/8", "tests"), "tests")
        async with guarded_way(allowed, loopback) as way:
            assert await _asked(cell, way, ask) == "hello"
            # By the proxy too, which is asked for its password.
            assert await _asked(cell, way, proxied) == "hello"
            plain = "http://${HTTP_PROXY#*@}"
            assert "407" in await _asked(cell, way, f"curl -si --max-time 5 -x {plain} http://x/")
        async with guarded_way(Guard((), "tests"), loopback) as way:
            assert "hello" not in await _asked(cell, way, ask)
            assert "hello" not in await _asked(cell, way, proxied)


async def _asked(cell: Cell, way: object, command: str) -> str:
    done = await cell.run(["sh", "-c", command], deadline_s=20, way=way)  # type: ignore[arg-type]
    return (done.stdout + done.stderr).decode()
