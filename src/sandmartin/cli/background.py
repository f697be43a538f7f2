"""Work beside a body of code that ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def background(*work: Coroutine[Any, Any, None]) -> AsyncGenerator[None, None]:
    """Run `work` while the body runs; what is unfinished at its end is cancelled and waited for.

    The first error, of the work or of the body, ends both and comes out bare, not in a group.
    """
    own: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
            try:
                yield
            except Exception as error:
                # In the group it stands last, behind what its coming made of the work.
                own = error
                raise
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failed:
        raise own or failed.exceptions[0] from None
