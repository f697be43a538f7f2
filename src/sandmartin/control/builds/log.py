"""The log of a build: lines as they come, bounded, for whoever follows it on whichever replica.

Lines are written in batches, each in a transaction that is fenced by the build's lease: what a
replica says that lost it is lost too.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.builds.lease import Lease, lease_of
from sandmartin.control.db import Database, uncut
from sandmartin.control.events import Events
from sandmartin.control.operations import LeaseLost
from sandmartin.control.tables import Build, BuildLine
from sandmartin.errors import Unavailable

_LONGEST_LINE = 2000
_FLUSH_S = 0.25
#: What commands say to terminals: colours, the cursor's place, titles (ECMA-48, CSI and OSC).
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]+[0-~]|[@-Z\\^_])"
)
#: What may wait to be written: of a command that speaks faster, the rest waits in its pipe.
_WAITING = 500


@dataclass(frozen=True, kw_only=True)
class LogLimits:
    """How much of a build's log is kept."""

    lines: int = 20_000
    size_bytes: int = 4 * 2**20


class Log:
    """The log of one build, for whoever has its lease."""

    def __init__(
        self, db: Database, happenings: Events, lease: Lease, row: Build, limits: LogLimits
    ) -> None:
        self._db = db
        self._events = happenings
        self._lease = lease
        self._limits = limits
        self._began_at = row.started_at or time.time()
        self._lines = self._written = row.log_lines
        self._bytes = row.log_bytes
        self._cut = self._lines >= limits.lines or self._bytes >= limits.size_bytes
        self._waiting: list[BuildLine] = []
        #: Held by whoever writes, until what he wrote waits no longer.
        self.turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._room.set()
        self.step, self.phase = 0, ""
        #: What must not be shown, wherever a command repeats it.
        self.hidden: tuple[str, ...] = ()

    async def say(self, message: str, level: str = "info", *, always: bool = False) -> None:
        """One line or several. `always` is for what a build must not end without."""
        await self._room.wait()
        for line in message.splitlines() or [""]:
            self._add(self.shown(line), level, always=always)
        if len(self._waiting) >= _WAITING:
            self._room.clear()

    def masked(self, text: str) -> str:
        """A text without what must not be shown."""
        for each in self.hidden:
            text = text.replace(each, "***")
        return text

    def shown(self, line: str) -> str:
        """A line as it is kept: masked, without colours, of characters that are seen."""
        # What is hidden may hold such a sequence, or have one in its midst.
        plain = self.masked(_ESCAPES.sub("", self.masked(line)))
        # Neither database nor terminal need know what else a command may say.
        clean = (char if char.isprintable() or char == "\t" else "?" for char in plain)
        shown = "".join(clean)
        return shown if len(shown) <= _LONGEST_LINE else f"{shown[:_LONGEST_LINE]}... (cut)"

    def _add(self, line: str, level: str, *, always: bool) -> None:
        if self._cut and not always:
            return
        size = len(line.encode())
        full = self._lines >= self._limits.lines or self._bytes + size > self._limits.size_bytes
        if full and not always:
            self._cut = True
            line, level, size = "the log is cut here: it is as long as one may be", "warn", 0
        self._lines += 1
        self._bytes += size
        self._waiting.append(
            BuildLine(
                build_id=self._lease.build_id,
                number=self._lines,
                at=time.time(),
                level=level,
                message=line,
                step=self.step,
                phase=self.phase,
                elapsed_ms=max(0, round((time.time() - self._began_at) * 1000)),
            )
        )

    async def write_out(self) -> None:
        """Write what waits, now and then, until cancelled. Raises LeaseLost."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            with contextlib.suppress(Unavailable):
                # Cut off after its commit, it would be written again.
                await uncut(self.flush())

    async def flush(self) -> None:
        """Write what waits. Raises LeaseLost, Unavailable."""
        async with self.turn:
            if taken := len(self._waiting):
                async with self._db.write() as session:
                    await self.write(session, taken)
                self.written(taken)

    async def write(self, session: AsyncSession, count: int | None = None) -> None:
        """The same in a transaction of somebody whose turn it is; `written` is to follow it."""
        lines = self._waiting[:count]
        if lines:
            self._written = lines[-1].number
        done = await session.execute(
            update(Build)
            .where(*lease_of(self._lease))
            .values(log_lines=self._written, log_bytes=self._bytes)
            .execution_options(synchronize_session=False)
        )
        if not done.rowcount:  # type: ignore[attr-defined]
            raise LeaseLost(f"build {self._lease.build_id} is another replica's now")
        # Copies: a transaction that is undone must not take the originals along.
        for each in lines:
            session.add(_copy(each))

    def written(self, count: int | None = None) -> None:
        del self._waiting[: len(self._waiting) if count is None else count]
        self._room.set()
        self._events.wake()


def _copy(line: BuildLine) -> BuildLine:
    return BuildLine(
        build_id=line.build_id,
        number=line.number,
        at=line.at,
        level=line.level,
        message=line.message,
        step=line.step,
        phase=line.phase,
        elapsed_ms=line.elapsed_ms,
    )


class Lines:
    """Puts the output of a command together to lines, none of them endless."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> list[str]:
        *whole, self._rest = (self._rest + data.replace(b"\r\n", b"\n")).split(b"\n")
        if len(self._rest) > 4 * _LONGEST_LINE:
            whole.append(self._rest)
            self._rest = b""
        return [_last_shown(each) for each in whole]

    def end(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return [_last_shown(rest)] if rest else []


def _last_shown(line: bytes) -> str:
    """Of what was written over itself, as progress bars are, the last."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
