"""What signals mean to a verb that must not leave things half done.

The first Ctrl-C goes to the command, if one is running; any other, SIGTERM and SIGHUP give the
work up. Giving up cancels the work and never the cleaning up: once that has begun, further signals
change nothing, since its steps have deadlines of their own.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from sandmartin.cli import exitcode
from sandmartin.cli.talk import say_notes
from sandmartin.client.sandbox import Execution
from sandmartin.errors import Conflict, NotFound

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_BROKEN_PIPE = exitcode.SIGNALLED + 13


async def carry_out(act: Callable[[AsyncExitStack, Interrupts], Awaitable[int]]) -> int:
    """Carry `act` out unless a signal gives it up, and return the exit code.

    What `act` enters on the stack is undone after it, whatever signals come.
    """
    interrupts = Interrupts()
    with interrupts.handled():
        try:
            async with AsyncExitStack() as stack, interrupts.work():
                return await act(stack, interrupts)
        except asyncio.CancelledError as error:
            if interrupts.exit_code is None:
                raise
            say_notes(error)
            return interrupts.exit_code
        except BrokenPipeError as error:
            say_notes(error)
            return _BROKEN_PIPE


class Interrupts:
    """The signals of one verb; made by the task that does its work."""

    def __init__(self) -> None:
        #: Exit code of the verb once it was given up.
        self.exit_code: int | None = None
        self._work: asyncio.Task[object] | None = None
        self._relayed: asyncio.Queue[int] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Signals come here for as long as the context lasts."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        # One that whoever started us has us ignore stays ignored: that is what nohup is for.
        ending = [each for each in _ENDING if signal.getsignal(each) is not signal.SIG_IGN]
        for number in ending:
            loop.add_signal_handler(number, self._give_up, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, *ending):
                loop.remove_signal_handler(number)

    @asynccontextmanager
    async def work(self) -> AsyncGenerator[None, None]:
        """The part that giving up cancels."""
        self._work = asyncio.current_task()
        try:
            yield
        finally:
            self._work = None

    async def relay_to(self, execution: Execution) -> None:
        """Send the first Ctrl-C to `execution`, until cancelled."""
        relayed: asyncio.Queue[int] = asyncio.Queue()
        self._relayed = relayed
        try:
            while True:
                number = await relayed.get()
                # It may have ended meanwhile.
                with suppress(NotFound, Conflict):
                    await execution.signal(number)
        finally:
            self._relayed = None

    def _interrupt(self) -> None:
        if self._relayed is None:
            self._give_up(signal.SIGINT)
            return
        self._relayed.put_nowait(signal.SIGINT)
        # The next one is meant for us.
        self._relayed = None

    def _give_up(self, number: int) -> None:
        if self._work is not None and self.exit_code is None:
            self.exit_code = exitcode.SIGNALLED + number
            self._work.cancel()
