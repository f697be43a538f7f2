"""The content of a request on its way to a guest agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator


class Body:
    """The content of an upload. Only the guest's slowness counts as silence, not the source's."""

    def __init__(self, chunks: AsyncIterable[bytes], silence_s: float) -> None:
        self._chunks = chunks
        self._silence_s = silence_s
        self.silence = asyncio.timeout(silence_s)
        #: What the source raised.
        self.failure: Exception | None = None

    async def read(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._chunks)
        while True:
            self._wait_for_guest(None)
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except Exception as error:
                self.failure = error
                raise
            finally:
                self._wait_for_guest(self._silence_s)
            yield chunk

    def _wait_for_guest(self, at_most_s: float | None) -> None:
        now = asyncio.get_running_loop().time()
        # The guest may have answered already, and then there is nothing to wait for.
        with contextlib.suppress(RuntimeError):
            self.silence.reschedule(None if at_most_s is None else now + at_most_s)
