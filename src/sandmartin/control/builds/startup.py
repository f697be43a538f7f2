"""The end of a build that starts something: it runs, and its check passes, before it is kept."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import aclosing

from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Defaults, Launch
from sandmartin.control.builds.failure import StepFailed
from sandmartin.control.builds.log import Lines, Log
from sandmartin.control.defaults import account
from sandmartin.errors import NotFound, NotStarted
from sandmartin.transport import Command, Ended, Started, Stderr, Stdout
from sandmartin.transport.agent import Agent

#: By which it is found among the processes of a sandbox.
TAG = "start"
#: What runs that long without a check is taken to run.
_SETTLED_S = 2.0
_TAIL_CHARS = 1000


class Launched:
    """Something that was started, and is left running."""

    def __init__(self, agent: Agent, sandbox_id: str, log: Log) -> None:
        self._agent = agent
        self._sandbox_id = sandbox_id
        self._log = log
        self._tail = ""
        self._running = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    async def start(self, action: Launch, argv: Sequence[str]) -> None:
        """Returns as soon as it runs. Raises StepFailed."""
        command = Command(
            cmd=argv[0],
            args=tuple(argv[1:]),
            envs=action.envs,
            cwd=action.workdir,
            user=account(action.user),
            tag=TAG,
        )
        self._listening = asyncio.create_task(self._listen(command))
        running = asyncio.create_task(self._running.wait())
        try:
            await asyncio.wait({running, self._listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            running.cancel()
        self.check()

    async def _listen(self, command: Command) -> None:
        lines = {Stdout: Lines(), Stderr: Lines()}
        try:
            async with aclosing(self._agent.exec_stream(self._sandbox_id, command)) as events:
                async for event in events:
                    match event:
                        case Started():
                            self._running.set()
                        case Stdout(data) | Stderr(data):
                            for line in lines[type(event)].take(data):
                                self._tail = f"{self._tail}\n{line}"[-_TAIL_CHARS:]
                                await self._log.say(line)
                        case Ended(exit_code=code) if code:
                            rest = [line for each in lines.values() for line in each.end()]
                            said = self._log.masked("\n".join([self._tail, *rest]).strip())
                            raise StepFailed(
                                f"what is started exited with {code}"
                                + (f": {said}" if said else "")
                            )
        except NotStarted as error:
            raise StepFailed(f"what is to be started cannot start: {error.message}") from error

    def check(self) -> None:
        """Raises StepFailed when it has failed; one that ends well has left something behind."""
        if self._listening is not None and self._listening.done():
            self._listening.result()

    async def leave(self) -> None:
        """Listen to it no longer. It goes on."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})


async def wait_until_ready(
    agent: Agent, sandbox_id: str, defaults: Defaults, launched: Sequence[Launched], log: Log
) -> None:
    """Wait for the check to pass, or for what was started to settle. Raises StepFailed."""
    if defaults.check is not None:
        await _pass_check(agent, sandbox_id, defaults, defaults.check, launched, log)
        return
    began_at = time.monotonic()
    while time.monotonic() - began_at < _SETTLED_S or not launched:
        for each in launched:
            each.check()
        if not launched:
            return
        await asyncio.sleep(0.1)


async def _pass_check(
    agent: Agent,
    sandbox_id: str,
    defaults: Defaults,
    check: plan.Check,
    launched: Sequence[Launched],
    log: Log,
) -> None:
    began_at, failures = time.monotonic(), 0
    argv = check.command.words or (*plan.DEFAULT_SHELL, check.command.line)
    while True:
        for each in launched:
            each.check()
        code, said = await _ask(agent, sandbox_id, defaults, argv, check.timeout_s)
        if code == 0:
            await log.say(f"ready after {time.monotonic() - began_at:.1f} s")
            return
        starting = time.monotonic() - began_at < check.start_period_s
        failures += not starting
        await log.say(f"not ready yet: the check exited with {code} {said}".rstrip(), "debug")
        if check.retries and failures >= check.retries:
            raise StepFailed(
                f"the check failed {failures} times; it exited with {code}"
                + (f": {log.masked(said)}" if said else "")
            )
        await asyncio.sleep(check.start_interval_s if starting else check.interval_s)


async def _ask(
    agent: Agent, sandbox_id: str, defaults: Defaults, argv: Sequence[str], timeout_s: float
) -> tuple[int, str]:
    """How a check ended, and the end of what it said."""
    command = Command(
        cmd=argv[0],
        args=tuple(argv[1:]),
        envs=defaults.envs,
        cwd=defaults.workdir,
        user=account(defaults.user),
        timeout_s=math.ceil(timeout_s) or None,
    )
    said, code = bytearray(), 1
    try:
        async with aclosing(agent.exec_stream(sandbox_id, command)) as events:
            async for event in events:
                if isinstance(event, Stdout | Stderr):
                    said = (said + event.data)[-_TAIL_CHARS:]
                elif isinstance(event, Ended):
                    code = event.exit_code or (1 if event.error else 0)
    except (NotStarted, NotFound) as error:
        raise StepFailed(f"the check cannot start: {error.message}") from error
    return code, said.decode(errors="replace").strip()
