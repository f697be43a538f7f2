"""Accounts in a sandbox, made by editing the files that say them: any distribution has these.

Nothing is asked of the sandbox but its files, so that one without a shell will do.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import tarfile
from collections.abc import AsyncIterator
from contextlib import aclosing

from sandmartin.control.builds.failure import StepFailed
from sandmartin.errors import NotFound
from sandmartin.transport.agent import Agent

_FIRST_ID = 1000
_SUDOERS = "/etc/sudoers.d"
_MAX_BYTES = 4 * 2**20


async def make_account(agent: Agent, sandbox_id: str, name: str) -> bool:
    """Make an account with a home and sudo that asks nothing; False if it is there already.

    Raises NotFound, Unavailable.
    """
    passwd = await _read(agent, sandbox_id, "/etc/passwd")
    group = await _read(agent, sandbox_id, "/etc/group")
    name = name.partition(":")[0]
    if name.isdecimal() or _has(passwd, name):
        return False
    number = _free(passwd, group)
    shell = "/bin/bash" if await _is_there(agent, sandbox_id, "/bin/bash") else "/bin/sh"
    home = f"/home/{name}"
    edited = {"/etc/passwd": _with(passwd, f"{name}:x:{number}:{number}::{home}:{shell}")}
    if not _has(group, name):
        edited["/etc/group"] = _with(group, f"{name}:x:{number}:")
    # Without a password that anybody could give.
    shadow = await _read(agent, sandbox_id, "/etc/shadow")
    if shadow and not _has(shadow, name):
        edited["/etc/shadow"] = _with(shadow, f"{name}:*:19000:0:99999:7:::")
    if await _is_there(agent, sandbox_id, _SUDOERS):
        edited[f"{_SUDOERS}/{name}"] = f"{name} ALL=(ALL) NOPASSWD: ALL\n"
    for path, text in edited.items():
        await agent.write_file(sandbox_id, path, _pieces(text.encode(errors="surrogateescape")))
    await make_directory(agent, sandbox_id, home, name)
    return True


async def make_directory(agent: Agent, sandbox_id: str, path: str, owner: str) -> None:
    """Make a directory, which is its owner's then, and what is above it, which is root's.

    One that is there stays as it is. Raises StepFailed.
    """
    with contextlib.suppress(NotFound):
        if (await agent.stat_file(sandbox_id, path)).type == "directory":
            return
        raise StepFailed(f"{path} is there, and is no directory")
    info = tarfile.TarInfo(posixpath.basename(path))
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(info)
    above = posixpath.dirname(path)
    await agent.write_tree(sandbox_id, above, _pieces(out.getvalue()), owner=owner)


async def _read(agent: Agent, sandbox_id: str, path: str) -> str:
    """A file's text; empty when it is not there."""
    content = bytearray()
    try:
        async with aclosing(agent.read_file(sandbox_id, path)) as pieces:
            async for piece in pieces:
                content += piece
                if len(content) > _MAX_BYTES:
                    break
    except NotFound:
        return ""
    return content.decode(errors="surrogateescape")


async def _is_there(agent: Agent, sandbox_id: str, path: str) -> bool:
    try:
        await agent.stat_file(sandbox_id, path)
    except NotFound:
        return False
    return True


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _has(text: str, name: str) -> bool:
    return any(line.partition(":")[0] == name for line in text.splitlines())


def _with(text: str, line: str) -> str:
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n"


def _free(*texts: str) -> int:
    """A number that no account and no group has."""
    taken = {
        fields[2]
        for text in texts
        for line in text.splitlines()
        if len(fields := line.split(":")) > 2
    }
    number = _FIRST_ID
    while str(number) in taken:
        number += 1
    return number
