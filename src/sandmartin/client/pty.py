"""Terminals of a sandbox: a program that believes somebody sits in front of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sandmartin.client.callbacks import Listeners, OnEach
from sandmartin.client.feed import Feeds
from sandmartin.client.handle import AsyncCommandHandle, listen, send_signal, start
from sandmartin.errors import Invalid
from sandmartin.transport import Command, PtySize

_SHELL = ("/bin/bash", "-i", "-l")
_ENVS = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


class AsyncPty:
    """Terminals of a sandbox: `sandbox.pty`."""

    def __init__(self, feeds: Feeds) -> None:
        self._link = feeds.link
        self._feeds = feeds

    async def create(
        self,
        cols: int = 80,
        rows: int = 24,
        *,
        cmd: Sequence[str] = _SHELL,
        envs: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = None,
        on_data: OnEach[bytes] | None = None,
    ) -> AsyncCommandHandle:
        """Start a program on a terminal, an interactive bash by default.

        Its size is in characters. `on_data` is called with each piece of output. `timeout` is in
        seconds: then the program is killed; None is never.

            terminal = await sandbox.pty.create(on_data=sys.stdout.buffer.write)
            await terminal.send_stdin("ls\\n")
            await terminal.resize(120, 40)

        Raises NotStarted.
        """
        if not cmd or isinstance(cmd, str):
            raise Invalid("the program of a terminal is a sequence of words")
        command = Command(
            cmd=cmd[0],
            args=tuple(cmd[1:]),
            envs={**_ENVS, **(envs or {})},
            cwd=cwd,
            user=user,
            timeout_s=max(1, math.ceil(timeout)) if timeout else None,
            pty=PtySize(cols, rows),
        )
        return await start(self._feeds, command, Listeners(on_data=on_data))

    async def connect(
        self, pid: int, *, on_data: OnEach[bytes] | None = None
    ) -> AsyncCommandHandle:
        """Listen to a terminal; what nobody heard yet comes first. Raises NotFound."""
        return await listen(self._feeds, pid, Listeners(on_data=on_data))

    async def send(self, pid: int, data: str | bytes) -> None:
        """Type on a terminal. Raises NotFound, Conflict."""
        await self._feeds.of(pid).send(data)

    async def resize(self, pid: int, cols: int, rows: int) -> None:
        """Resize a terminal, in characters. Raises NotFound, Conflict when it is none."""
        size = PtySize(cols, rows)
        await self._link.transport.resize_pty(self._link.sandbox_id, pid, size)

    async def kill(self, pid: int) -> bool:
        """Kill the program on a terminal, and all that it started. False: it is gone."""
        return await send_signal(self._link, pid, 9)
