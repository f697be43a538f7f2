"""An agent of our own, for one `run` on a machine where none is running.

It is a child in a session of its own, so that Ctrl-C on the terminal does not reach it, and it
lives by its standard input: closing that, or dying, makes it destroy its sandboxes and exit. It
works on a private data directory. So any number of runs go side by side without waiting for each
other's lock, and an agent that destroys everything at its end never touches what an earlier agent
left in the shared data directory. Images come from the assets directory, which all agents share.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sandmartin.cli.background import background
from sandmartin.cli.talk import say
from sandmartin.errors import Denied, SandmartinError, TimedOut, Unavailable

_TAIL_LINES = 20
_LINE_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long the agent is waited for."""

    #: The first start on a machine probes the accelerator and makes a warm snapshot.
    ready_s: float = 120.0
    #: From the end of its input on: it destroys its sandboxes then.
    end_s: float = 60.0
    #: After a signal, and for its last words.
    grace_s: float = 5.0


def require_root() -> None:
    """Raise Denied with what to do unless we are root."""
    if os.geteuid() != 0:
        raise Denied(
            "no agent is running, and only root can start one",
            hint="put sudo before this command, or keep an agent running: sudo sandmartin agent",
        )


@asynccontextmanager
async def own_agent(
    argv: Sequence[str], *, verbose: bool, deadlines: Deadlines = Deadlines()
) -> AsyncGenerator[OwnAgent, None]:
    """An agent started as `argv`, perhaps not ready yet; it ends with the context."""
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    agent = OwnAgent(child, verbose=verbose, deadlines=deadlines)
    async with background(agent.follow_log()):
        try:
            yield agent
        finally:
            await agent.end()


class OwnAgent:
    """The child process, and the end of what it said on stderr."""

    def __init__(
        self, child: asyncio.subprocess.Process, *, verbose: bool, deadlines: Deadlines
    ) -> None:
        self._child = child
        self._verbose = verbose
        self._deadlines = deadlines
        self._socket: Path | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._silent = asyncio.Event()

    async def follow_log(self) -> None:
        """Keep the end of the agent's log, and show it all when verbose."""
        assert self._child.stderr is not None
        unfinished = ""
        # In pieces, because a line may be longer than any limit of readline.
        while piece := await self._child.stderr.read(65536):
            *lines, unfinished = (unfinished + piece.decode(errors="replace")).split("\n")
            unfinished = unfinished[-_LINE_CHARS:]
            self._heard(lines)
        self._heard([unfinished] if unfinished else [])
        self._silent.set()

    def _heard(self, lines: Sequence[str]) -> None:
        self._tail.extend(line[:_LINE_CHARS] for line in lines)
        if self._verbose:
            for line in lines:
                say(f"agent: {line}")

    async def _last_words(self) -> None:
        """Wait until the agent has said all it will; what it leaves behind may hold its stderr."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._deadlines.grace_s):
                await self._silent.wait()

    async def ready(self) -> Path:
        """Wait until the agent serves and return its socket. Raises Unavailable, TimedOut."""
        assert self._child.stdout is not None
        try:
            async with asyncio.timeout(self._deadlines.ready_s):
                line = await self._child.stdout.readline()
        except TimeoutError as error:
            waited = f"{self._deadlines.ready_s:g} s"
            raise TimedOut(
                f"the agent was not ready within {waited}", hint="--verbose shows what it does"
            ) from error
        except ValueError as error:
            raise Unavailable("the agent's announcement is endless") from error
        try:
            self._socket = Path(json.loads(line)["socket"])
        except (ValueError, TypeError, KeyError):
            raise await self._failure() from None
        return self._socket

    async def _failure(self) -> SandmartinError:
        """What the agent's last words say, with its hint as ours."""
        await self._last_words()
        words = [line for line in self._tail if line.strip()]
        self._tail.clear()
        hint = "run `sandmartin doctor`"
        if words and words[-1].startswith("hint: "):
            hint = words.pop().removeprefix("hint: ")
        if words and words[-1].startswith("sandmartin: "):
            words = [words[-1].removeprefix("sandmartin: ")]
        said = "\n  ".join(words) or "it said nothing"
        return Unavailable(f"the agent did not start: {said}", hint=hint)

    async def end(self) -> None:
        """End the agent and wait for it: end of its input, then TERM, then KILL."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        if await self._ended_within(self._deadlines.end_s):
            await self._last_words()
            if self._child.returncode != 0 and self._tail:
                say(f"sandmartin: the agent exited {self._child.returncode}")
                for line in self._tail:
                    say(f"agent: {line}")
            return
        waited = f"{self._deadlines.end_s:g} s"
        say(f"sandmartin: the agent did not end within {waited}; its sandboxes may be left")
        if self._socket is not None:
            say(f"hint: adopt them with: sandmartin agent --data-dir {self._socket.parent}")
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self._child.send_signal(number)
            if await self._ended_within(self._deadlines.grace_s):
                return

    async def _ended_within(self, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                await self._child.wait()
        except TimeoutError:
            return False
        return True
