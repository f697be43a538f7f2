"""Commands of a sandbox: to their end or in the background."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, overload

from sandmartin.client.callbacks import Listeners, OnEach
from sandmartin.client.feed import Feeds
from sandmartin.client.handle import (
    SIGKILL,
    AsyncCommandHandle,
    give_all,
    listen,
    send_signal,
    start,
)
from sandmartin.client.results import CommandFailed, CommandResult, CommandTimedOut
from sandmartin.errors import (
    Invalid,
    NotStarted,
    SandmartinError,
    TimedOut,
    Unavailable,
)
from sandmartin.transport import Command, Process

DEFAULT_TIMEOUT_S = 60.0
#: Beyond a command's own limit: the other side ends it, and needs time to say so.
_GRACE_S = 30.0
_KILL_S = 10.0
_BASH, _SH = "/bin/bash", "/bin/sh"


class AsyncCommands:
    """Commands of a sandbox: `sandbox.commands`."""

    def __init__(self, feeds: Feeds) -> None:
        self._link = feeds.link
        self._feeds = feeds
        self._shell = _BASH

    @overload
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: Literal[False] = False,
        envs: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        stdin: str | bytes | bool = False,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
        check: bool = True,
        tag: str = "",
    ) -> CommandResult: ...

    @overload
    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: Literal[True],
        envs: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        stdin: str | bytes | bool = False,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
        tag: str = "",
    ) -> AsyncCommandHandle: ...

    async def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: bool = False,
        envs: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        stdin: str | bytes | bool = False,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
        check: bool = True,
        tag: str = "",
    ) -> CommandResult | AsyncCommandHandle:
        """Run a command to its end, or in the background.

        A text is for a login shell (bash, or sh where there is none); a sequence of words is run
        as it is. `user` is a name or a number (root by default), `cwd` that user's home.
        `timeout` is in seconds: then the command is killed; None is never. `stdin` is what it
        reads; True leaves its input open for `send_stdin`. `on_stdout` and `on_stderr` are called
        with each piece of text. `tag` is a name under which it is listed.

            result = await sandbox.commands.run("ls -l", cwd="/tmp")
            print(result.stdout)

        Raises CommandFailed for an exit code other than 0 unless `check` is False, and
        CommandTimedOut; in the background `wait` does. Raises NotStarted when it cannot be
        started. A run that is cancelled kills its command.
        """
        command = Command(
            cmd="",
            envs=dict(envs or {}),
            cwd=cwd,
            user=user,
            timeout_s=max(1, math.ceil(timeout)) if timeout else None,
            stdin=stdin is not False,
            tag=tag,
        )
        handle = await self._start(cmd, command, Listeners(on_stdout, on_stderr))
        async with _killed_with_its_run(handle, command.timeout_s):
            if not isinstance(stdin, bool):
                await give_all(handle, stdin)
            return handle if background else await handle.wait(check=check)

    async def _start(
        self, cmd: str | Sequence[str], command: Command, listeners: Listeners
    ) -> AsyncCommandHandle:
        if not cmd:
            raise Invalid("the command is empty")
        if not isinstance(cmd, str):
            return await start(self._feeds, _of_words(command, *cmd), listeners)
        try:
            words = (self._shell, "-l", "-c", cmd)
            return await start(self._feeds, _of_words(command, *words), listeners)
        except NotStarted:
            if self._shell == _SH:
                raise
        handle = await start(self._feeds, _of_words(command, _SH, "-l", "-c", cmd), listeners)
        self._shell = _SH
        return handle

    async def list(self) -> tuple[Process, ...]:
        """What was started by a call, and runs."""
        return await self._link.transport.list_processes(self._link.sandbox_id)

    async def kill(self, pid: int, signal: int = SIGKILL) -> bool:
        """Send a signal to a command; SIGKILL ends all that it started, too. False: it is gone."""
        return await send_signal(self._link, pid, signal)

    async def connect(
        self,
        pid: int,
        *,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
    ) -> AsyncCommandHandle:
        """Listen to a command that runs; what nobody heard yet comes first. Raises NotFound."""
        return await listen(self._feeds, pid, Listeners(on_stdout, on_stderr))

    async def send_stdin(self, pid: int, data: str | bytes) -> None:
        """Give input to a command that was started with `stdin`, or on a terminal."""
        await self._feeds.of(pid).send(data)

    async def close_stdin(self, pid: int) -> None:
        """Let a command read the end of its input, after all that was sent to it."""
        await self._feeds.of(pid).close()


def _of_words(command: Command, cmd: str, *args: str) -> Command:
    return replace(command, cmd=cmd, args=args)


@contextlib.asynccontextmanager
async def _killed_with_its_run(
    handle: AsyncCommandHandle, timeout_s: float | None
) -> AsyncGenerator[None, None]:
    """Kill the command when its run is cancelled or one of its callbacks fails."""
    limit_s = None if timeout_s is None else timeout_s + _GRACE_S
    try:
        async with asyncio.timeout(limit_s):
            yield
    except (CommandFailed, CommandTimedOut, Unavailable):
        # It has ended, or cannot be reached.
        raise
    except BaseException as error:
        with contextlib.suppress(SandmartinError, TimeoutError):
            async with asyncio.timeout(_KILL_S):
                await handle.kill()
        await handle.disconnect()
        if isinstance(error, TimeoutError):
            raise TimedOut("it was not said how the command ended") from error
        raise
