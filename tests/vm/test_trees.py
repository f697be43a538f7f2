"""Whole directories in and out of a real VM, and what its programs cannot do about it."""

from __future__ import annotations

import asyncio
import io
import re
import tarfile
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import Invalid
from tests.vm.conftest import RunningAgent, execute

MIB = 1 << 20
#: The two names are never missing: each is now the directory, now the link.
SWAPPING = """
import ctypes, os
os.chdir("/home/user")
os.mkdir("way")
os.symlink("/root/target", "link")
open("ready", "w").close()
system, here, exchange = ctypes.CDLL(None), -100, 2
while not os.path.exists("stop"):
    assert system.renameat2(here, b"way", here, b"link", exchange) == 0
"""


async def packed(*members: tuple[str, int]) -> AsyncIterator[bytes]:
    """A tar of files of such sizes, never whole in memory."""
    for name, size in members:
        made = tarfile.TarInfo(name)
        made.size, made.mode, made.mtime = size, 0o4755, 10**9
        yield made.tobuf()
        for at in range(0, size, MIB):
            yield bytes(min(MIB, size - at))
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def members(agent: RunningAgent, sandbox: AsyncSandbox, path: str) -> list[tarfile.TarInfo]:
    reading = agent.transport.read_tree(sandbox.sandbox_id, path)
    async with aclosing(reading) as pieces:
        content = b"".join([piece async for piece in pieces])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmembers()


async def test_a_tree_goes_in_and_out(agent: RunningAgent, sandbox: AsyncSandbox) -> None:
    tree = packed(("app/tool", 5), *((f"app/many/{n}", n) for n in range(300)), ("app/l", 96 * MIB))
    count = await agent.transport.write_tree(
        sandbox.sandbox_id, "/srv/there", tree, owner="user:root"
    )
    assert count == 302
    shown = await execute(sandbox, "stat", "-c", "%U:%G %a %Y %s", "/srv/there/app/tool")
    assert shown.text.split() == ["user:root", "4755", "1000000000", "5"]
    # By way of links that root made: /bin is one to usr/bin.
    assert await agent.transport.write_tree(sandbox.sandbox_id, "/", packed(("bin/made", 3))) == 1
    shown = await execute(sandbox, "stat", "-c", "%F %s", "/usr/bin/made")
    assert shown.text.split() == ["regular", "file", "3"]
    found = {each.name: each for each in await members(agent, sandbox, "/srv/there/app")}
    assert len(found) == 2 + 302
    assert found["app/l"].size == 96 * MIB
    assert found["app/many/299"].size == 299
    assert (found["app/tool"].mode, found["app/tool"].gid) == (0o4755, 0)
    # What was written large has not stayed in the VM's memory.
    cached = await execute(sandbox, "awk", "/^Cached:/ {print $2}", "/proc/meminfo")
    assert int(cached.text) < 96 << 10
    whole = await members(agent, sandbox, "/etc")
    assert {"etc", "etc/passwd", "etc/shadow"} <= {each.name for each in whole}


async def test_a_users_program_leads_no_write_of_roots_elsewhere(
    agent: RunningAgent, sandbox: AsyncSandbox
) -> None:
    """A program swaps a directory of its own for a link to root's, over and over."""
    await execute(sandbox, "mkdir", "-p", "/root/target")
    swapping = asyncio.create_task(execute(sandbox, "python3", "-c", SWAPPING, user="user"))
    waiting = "until [ -e /home/user/ready ]; do sleep 0.05; done"
    assert (await execute(sandbox, "sh", "-c", waiting)).exit_code == 0
    written = refused = 0
    while written < 30 or not refused:
        assert written + refused < 1000
        tree = packed((f"way/{written}", 1))
        try:
            written += await agent.transport.write_tree(sandbox.sandbox_id, "/home/user", tree)
        except Invalid as error:
            assert re.search(
                "'way': it (is a link that others than root may have made|was a link, and became)",
                error.message,
            )
            refused += 1
    await execute(sandbox, "touch", "/home/user/stop")
    assert (await swapping).exit_code == 0
    found = await execute(sandbox, "find", "/root/target", "-mindepth", "1")
    assert found.text == ""


async def test_an_unknown_owner_and_an_evil_member_are_told(
    agent: RunningAgent, sandbox: AsyncSandbox
) -> None:
    for owner, name, why in (
        ("unheard-of", "x", "invalid username"),
        ("", "../x", "its name leads up"),
        ("", "/x", "its name is absolute"),
    ):
        with pytest.raises(Invalid, match=why):
            await agent.transport.write_tree(
                sandbox.sandbox_id, "/srv/evil", packed((name, 1)), owner=owner
            )
