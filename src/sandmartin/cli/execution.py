"""A command in a sandbox on our own standard streams: what `run`, `exec` and `shell` share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, suppress

from sandmartin.cli import exitcode
from sandmartin.cli.background import background
from sandmartin.cli.interrupts import Interrupts
from sandmartin.cli.pipes import ByteSink, ByteSource
from sandmartin.cli.talk import say
from sandmartin.client.sandbox import Execution
from sandmartin.errors import Conflict, NotFound, SandmartinError
from sandmartin.transport import Ended, Stdout

_END_S = 5.0


async def relay(
    execution: Execution,
    interrupts: Interrupts,
    *beside: Coroutine[None, None, None],
    stdin: bool,
) -> Ended:
    """Pass our streams and the first Ctrl-C through until the command ends.

    `beside` is work that goes on meanwhile.
    """
    stdout, stderr = ByteSink(1), ByteSink(2)
    work = [interrupts.relay_to(execution), *beside]
    if stdin:
        work.append(_feed_stdin(execution))
    async with background(*work):
        async for event in execution:
            if isinstance(event, Ended):
                return event
            await _write(stdout if isinstance(event, Stdout) else stderr, event.data)
    raise AssertionError("an execution ends with Ended or an error")


def exit_code_of(ended: Ended) -> int:
    """The exit code to pass on, after saying why the command ended if not by itself."""
    if ended.error:
        say(f"sandmartin: {ended.error}")
        return ended.exit_code or exitcode.RUN_FAILED
    return ended.exit_code


@asynccontextmanager
async def ended_with_us(execution: Execution, number: int) -> AsyncGenerator[None, None]:
    """Signal the command when the body fails or is given up: nobody listens to it any more."""
    try:
        yield
    except BaseException:
        with suppress(SandmartinError, TimeoutError):
            async with asyncio.timeout(_END_S):
                await execution.signal(number)
        raise


async def _feed_stdin(execution: Execution) -> None:
    """Forward our standard input.

    A command that ended or closed its input needs no more of it. Any other failure ends the verb:
    a command that took a cut input for a whole one would look like a success.
    """
    try:
        with suppress(NotFound, Conflict):
            await execution.send_stdin(aiter(ByteSource(0)))
    except OSError as error:
        raise SandmartinError(f"standard input cannot be read: {error.strerror}") from error


async def _write(sink: ByteSink, data: bytes) -> None:
    try:
        await sink.write(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SandmartinError(f"our output cannot be written: {error.strerror}") from error
