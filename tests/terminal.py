"""A real terminal, and `sandmartin` on it as a process of its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import sys
import termios
from asyncio.subprocess import Process

from tests.command_line import DEADLINE_S


class Terminal:
    """A terminal with a verb on it, seen from the user's side."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self.ours, self.theirs = os.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self._shown = self.all_shown = b""

    async def start(self, *words: str) -> Process:
        self.resize(100, 40)
        argv = [sys.executable, "-m", "sandmartin", *words]
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | self._environment,
        )

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    async def shows(self, text: str) -> None:
        """Wait until `text` is shown, and forget what came up to it."""
        os.set_blocking(self.ours, False)
        async with asyncio.timeout(DEADLINE_S):
            while text.encode() not in self._shown:
                try:
                    piece = os.read(self.ours, 65536)
                    self._shown += piece
                    self.all_shown += piece
                except BlockingIOError:
                    await asyncio.sleep(0.01)
        self._shown = self._shown.partition(text.encode())[2]

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.theirs) == self.before

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


async def ended(child: Process) -> int:
    async with asyncio.timeout(DEADLINE_S):
        return await child.wait()
