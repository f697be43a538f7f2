"""Commands of a build: run in its sandbox, their output in the log as it comes.

A secret is there for its one command: in a variable, or in a file in memory, to which what the
command expects leads. Both are gone before anything of the sandbox is kept.
"""

from __future__ import annotations

import io
import math
import posixpath
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

from sandmartin.context.source import InvalidBuild
from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Execute
from sandmartin.control.builds.failure import StepFailed
from sandmartin.control.builds.log import Lines, Log
from sandmartin.control.defaults import account
from sandmartin.errors import NotFound, NotStarted
from sandmartin.model import random_id
from sandmartin.transport import Command, Ended, Stderr, Stdout
from sandmartin.transport.agent import Agent

#: Both are in memory, in any sandbox.
_SECRETS = "/run/sandmartin-secrets"
_SCRIPTS = "/dev/shm"  # noqa: S108 - in a sandbox of ours
_TAIL_LINES = 10


async def execute(
    agent: Agent, sandbox_id: str, action: Execute, log: Log, secrets: Mapping[str, str]
) -> None:
    """Run a command to its end. Raises StepFailed, InvalidBuild for a secret that lacks."""
    given = _given(action, secrets)
    envs = dict(action.envs)
    envs |= {each.variable: value for each, value in given if each.variable}
    files = [(each, value) for each, value in given if each.target]
    async with _secret_files(agent, sandbox_id, files), _program(agent, sandbox_id, action) as argv:
        command = Command(
            cmd=argv[0],
            args=tuple(argv[1:]),
            envs=envs,
            cwd=action.workdir,
            user=account(action.user),
            timeout_s=math.ceil(action.timeout_s) if action.timeout_s else None,
        )
        await run(agent, sandbox_id, command, log)


async def run(agent: Agent, sandbox_id: str, command: Command, log: Log) -> None:
    """Run one command, and log what it says. Raises StepFailed."""
    lines = {Stdout: Lines(), Stderr: Lines()}
    tail: list[str] = []
    end: Ended | None = None

    async def say(found: Sequence[str]) -> None:
        for line in found:
            tail.append(line)
            del tail[:-_TAIL_LINES]
            await log.say(line, "info")

    try:
        async with aclosing(agent.exec_stream(sandbox_id, command)) as events:
            async for event in events:
                if isinstance(event, Stdout | Stderr):
                    await say(lines[type(event)].take(event.data))
                elif isinstance(event, Ended):
                    end = event
    except NotStarted as error:
        raise StepFailed(f"the command cannot start: {error.message}") from error
    for each in lines.values():
        await say(each.end())
    if end is None:
        raise StepFailed("the command's end was not told")
    if end.error:
        raise StepFailed(
            f"the command did not end within {command.timeout_s} s",
            hint="give it more time, where its language has a timeout",
        )
    if end.exit_code:
        # Masked as a whole before, as a secret may have several lines.
        said = "\n".join(map(log.shown, log.masked("\n".join(tail).strip()).split("\n")))
        raise StepFailed(
            f"the command exited with {end.exit_code}" + (f": {said[-1000:]}" if said else "")
        )


def _given(action: Execute, secrets: Mapping[str, str]) -> list[tuple[plan.Secret, str]]:
    for each in action.secrets:
        if each.required and each.name not in secrets:
            raise InvalidBuild(
                f"the secret {each.name!r} is required, and was not given",
                position=action.step.position,
            )
    return [(each, secrets[each.name]) for each in action.secrets if each.name in secrets]


@asynccontextmanager
async def _secret_files(
    agent: Agent, sandbox_id: str, files: Sequence[tuple[plan.Secret, str]]
) -> AsyncIterator[None]:
    if not files:
        yield
        return
    directory = f"{_SECRETS}-{random_id(12)}"
    made = []
    try:
        for number, (secret, value) in enumerate(files):
            member = _member(str(number), secret.mode, secret.uid, secret.gid, value.encode())
            await agent.write_tree(sandbox_id, directory, _pieces(member))
            link = _link(posixpath.basename(secret.target), f"{directory}/{number}")
            await agent.write_tree(sandbox_id, posixpath.dirname(secret.target), _pieces(link))
            made.append(secret.target)
        yield
    finally:
        for path in (*made, directory):
            await agent.remove_file(sandbox_id, path)


@asynccontextmanager
async def _program(agent: Agent, sandbox_id: str, action: Execute) -> AsyncIterator[Sequence[str]]:
    """What is to be executed: the words, or a script that names its own interpreter."""
    if not action.script:
        yield action.argv
        return
    name = f".step-{random_id(12)}"
    member = _member(name, 0o755, 0, 0, action.script.encode())
    await agent.write_tree(sandbox_id, _SCRIPTS, _pieces(member))
    try:
        yield [f"{_SCRIPTS}/{name}"]
    finally:
        await agent.remove_file(sandbox_id, f"{_SCRIPTS}/{name}")


def _member(name: str, mode: int, uid: int, gid: int, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid, info.size = mode, uid, gid, len(content)
    return _tar(info, content)


def _link(name: str, target: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return _tar(info, b"")


def _tar(info: tarfile.TarInfo, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def is_directory(agent: Agent, sandbox_id: str, path: str) -> bool:
    try:
        return (await agent.stat_file(sandbox_id, path)).type == "directory"
    except NotFound:
        return False
