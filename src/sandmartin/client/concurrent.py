"""Several things done at once, but not too many."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")
AT_ONCE = 8


async def at_once(works: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Do all of it, and give the results in order. The first that fails ends the others."""
    waiting = enumerate(works)
    results: dict[int, _T] = {}

    async def work_off() -> None:
        for number, work in waiting:
            results[number] = await work

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work_off())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [results[number] for number in sorted(results)]
