"""Named tasks that belong to the host and not to whoever asked for them.

An operation runs to its end even when the caller gives up waiting; its failure goes to the
callers that still wait, and into the log when nobody does. A watch is long-lived: when it dies,
the agent must stop, because something it promised is no longer done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sandmartin.errors import SandmartinError

_CANCEL_DEADLINE_S = 10.0
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Tasks:
    """The running tasks of one agent."""

    def __init__(self) -> None:
        self._operations: set[asyncio.Task[Any]] = set()
        self._watches: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None
        self._last_end = 0.0

    async def operate(self, name: str, operation: Coroutine[Any, Any, _T]) -> _T:
        """Run an operation to its end and return its result; cancelling only ends the waiting."""
        task = asyncio.create_task(operation, name=name)
        self._operations.add(task)
        task.add_done_callback(self._operation_ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_unheard)
            raise

    def _operation_ended(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        self._last_end = time.monotonic()

    async def quiet(self, quiet_s: float, limit_s: float) -> None:
        """Wait until there was no operation for `quiet_s`, for at most `limit_s`."""
        until = time.monotonic() + limit_s
        while (now := time.monotonic()) < until:
            quiet_at = quiet_s + (now if self._operations else self._last_end)
            if quiet_at <= now:
                return
            await asyncio.sleep(min(quiet_at, until) - now)

    def watch(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a long-lived task. If it fails, `failed` raises its error."""
        task = asyncio.create_task(work, name=name)
        self._watches.add(task)
        task.add_done_callback(self._watch_ended)
        return task

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        self._watches.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        _log.critical("task %s died", task.get_name(), exc_info=error)
        if not self._failure().done():
            self._failure().set_exception(error)

    def _failure(self) -> asyncio.Future[None]:
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
            # Nobody may be waiting when the agent is already on its way out.
            self._failed.add_done_callback(lambda f: f.cancelled() or f.exception())
        return self._failed

    async def failed(self) -> None:
        """Wait for a watch to die and raise its error."""
        await asyncio.shield(self._failure())

    @property
    def busy(self) -> bool:
        """Whether an operation runs."""
        return bool(self._operations)

    async def outlast(self) -> None:
        """Wait until the operations that run now have ended, whatever begins meanwhile."""
        if running := set(self._operations):
            await asyncio.wait(running)

    async def settle(self) -> None:
        """Wait until every operation has ended."""
        while self._operations:
            await asyncio.wait(set(self._operations))

    async def close(self) -> None:
        """Let operations end, then cancel the watches. New work must have stopped coming."""
        await self.settle()
        watches = set(self._watches)
        for task in watches:
            task.cancel()
        if watches:
            _, stuck = await asyncio.wait(watches, timeout=_CANCEL_DEADLINE_S)
            for task in stuck:
                _log.error("task %s does not end", task.get_name())


async def to_its_end(work: Coroutine[Any, Any, _T], stop: Callable[[], None] = lambda: None) -> _T:
    """Wait for `work`, which ends by itself even when the waiting is cancelled."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop()
        await asyncio.wait({working})
        # Looked at, so that it is not told of as unheard.
        working.exception()
        raise


def _log_unheard(task: asyncio.Task[Any]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, SandmartinError):
        _log.warning("%s failed after its caller had gone: %s", task.get_name(), error)
    else:
        _log.error("%s failed after its caller had gone", task.get_name(), exc_info=error)
