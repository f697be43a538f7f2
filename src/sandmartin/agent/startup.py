"""What an image starts in its sandboxes: started after every boot, and waited for.

A warm snapshot is made after that, so what is restored from one answers at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from sandmartin.agent.guest import Command, Ended, Guest, Output, ProcessEvent, Started
from sandmartin.agent.traits import Ready, Start, Traits
from sandmartin.errors import NotStarted, ToolFailed

#: By which it is found among the processes of a sandbox.
TAG = "start"
_PAUSE_S = 0.1
_CHECK_S = 10.0
_OUTPUT_TAIL = 600


class NotReady(ToolFailed):
    """What an image starts did not become ready. To all others it is a tool that failed."""


async def start_up(guest: Guest, traits: Traits) -> None:
    """Start what an image starts, and wait until it is ready. Raises NotReady, GuestSilent."""
    startup = _Startup(guest, traits.start, traits.ready)
    listening = asyncio.ensure_future(startup.listen())
    try:
        async with asyncio.timeout(traits.ready.deadline_s):
            await startup.wait(listening)
    except TimeoutError:
        raise NotReady(
            f"what the template starts was not ready within {traits.ready.deadline_s:g} s"
            f"{startup.last_words()}"
        ) from None
    finally:
        # Who stops to listen does not end it.
        listening.cancel()
        await asyncio.wait({listening})


class _Startup:
    def __init__(self, guest: Guest, start: Start | None, ready: Ready) -> None:
        self._guest = guest
        self._start = start
        self._ready = ready
        self._running = asyncio.Event()
        self._said = bytearray()

    async def listen(self) -> None:
        """Start it, and hear what it says until it ends. Raises NotReady when it fails."""
        if self._start is None:
            self._running.set()
            return
        try:
            async with contextlib.aclosing(self._run(self._start.command, tag=TAG)) as events:
                async for event in events:
                    match event:
                        case Started():
                            self._running.set()
                        case Output(data):
                            self._said = (self._said + data)[-_OUTPUT_TAIL:]
                        case Ended(exit_code=code) if code:
                            why = f"what the template starts exited {code}{self.last_words()}"
                            raise NotReady(why)
        except NotStarted as error:
            raise NotReady(f"the template cannot start: {error.message}") from error

    def _run(self, command: str, **more: Any) -> AsyncGenerator[ProcessEvent]:
        """Run a command of the shell as the template's user, with its environment."""
        start = self._start or Start(command=command)
        words = ("-c", command)
        envs, cwd, user = start.envs, start.cwd, start.user
        return self._guest.start(
            Command(cmd="/bin/sh", args=words, user=user, cwd=cwd, envs=envs, **more)
        )

    def last_words(self) -> str:
        """The end of what it said, for an error message."""
        text = self._said.decode(errors="replace").strip()
        return f"; it said: {text!r}" if text else ""

    async def wait(self, listening: asyncio.Future[None]) -> None:
        """Until it runs and is ready. Raises what `listening` does."""
        running = asyncio.ensure_future(self._running.wait())
        first: set[asyncio.Future[Any]] = {running, listening}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        finally:
            running.cancel()
        while True:
            if listening.done():
                # One that ends well has left something behind that goes on.
                listening.result()
            if await self._is_ready():
                return
            await asyncio.sleep(_PAUSE_S)

    async def _is_ready(self) -> bool:
        ready = self._ready
        if ready.port:
            status = await self._guest.ask(ready.port, ready.path, _CHECK_S)
            return status is not None and 200 <= status < 300
        if not ready.command:
            return True
        code = 1
        checking = self._run(ready.command, timeout_s=_CHECK_S)
        async with contextlib.aclosing(checking) as events:
            async for event in events:
                if isinstance(event, Ended):
                    code = event.exit_code
        return code == 0
