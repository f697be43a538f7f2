"""Operations outlive their callers, and a watch that dies is heard."""

from __future__ import annotations

import asyncio
import logging

import pytest

from sandmartin.agent.tasks import Tasks
from sandmartin.errors import ToolFailed


async def test_operation_outlives_a_caller_that_gives_up() -> None:
    tasks, go_on, done = Tasks(), asyncio.Event(), asyncio.Event()

    async def work() -> str:
        await go_on.wait()
        done.set()
        return "result"

    caller = asyncio.ensure_future(tasks.operate("work", work()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    settling = asyncio.ensure_future(tasks.settle())
    await asyncio.sleep(0)
    assert not settling.done()
    go_on.set()
    await settling
    assert done.is_set()


async def test_result_and_failure_go_to_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()

    async def succeed() -> int:
        return 7

    async def fail() -> None:
        raise ToolFailed("no")

    assert await tasks.operate("succeed", succeed()) == 7
    with pytest.raises(ToolFailed):
        await tasks.operate("fail", fail())
    assert caplog.records == []


@pytest.mark.parametrize(
    ("error", "level"), [(ToolFailed("no"), logging.WARNING), (KeyError("bug"), logging.ERROR)]
)
async def test_failure_that_nobody_waits_for_is_logged_once(
    caplog: pytest.LogCaptureFixture, error: Exception, level: int
) -> None:
    tasks, go_on = Tasks(), asyncio.Event()

    async def fail() -> None:
        await go_on.wait()
        raise error

    caller = asyncio.ensure_future(tasks.operate("create sbone", fail()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    await tasks.settle()
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.levelno == level
    assert "create sbone" in record.getMessage()
    # A bug is told with its traceback, one of our errors by its sentence.
    assert bool(record.exc_info) == (level == logging.ERROR)


async def test_watch_that_dies_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()

    async def ends() -> None:
        return None

    async def dies() -> None:
        raise KeyError("bug")

    reported = asyncio.ensure_future(tasks.failed())
    await asyncio.wait({tasks.watch("ends", ends())})
    await asyncio.sleep(0)
    assert not reported.done()
    tasks.watch("reaper", dies())
    with pytest.raises(KeyError, match="bug"):
        await asyncio.wait_for(reported, 5)
    # Also for one that asks later.
    with pytest.raises(KeyError, match="bug"):
        await asyncio.wait_for(tasks.failed(), 5)
    assert "reaper" in caplog.text
    await tasks.close()


async def test_close_lets_operations_end_and_cancels_watches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks, go_on = Tasks(), asyncio.Event()
    steps = []

    async def work() -> None:
        await go_on.wait()
        steps.append("operation ended")

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("watch cancelled")

    caller = asyncio.ensure_future(tasks.operate("work", work()))
    watch = tasks.watch("forever", forever())
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(tasks.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    await caller
    assert steps == ["operation ended", "watch cancelled"]
    assert watch.cancelled()
    assert caplog.records == []
