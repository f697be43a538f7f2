"""The portal: one event loop, in a thread of its own, on which all that blocks is done.

It is made when it is first needed, so it does not mind a loop that already runs where it is called
from, as in a notebook. A child that was forked gets a portal of its own; the parent's is kept there
untouched, for closing it would act on what both share.

Whoever calls waits. Their interrupt cancels the work and waits for its end, so that what was half
done is undone. Functions of theirs that the work calls run in their own thread while they wait,
and in a worker thread once they have gone on.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

from sandmartin.errors import Conflict

_T = TypeVar("_T")
_END: Any = object()
_EXIT_S = 5.0

#: Turns a function of whoever waits into one that the loop can await.
Callback = Callable[[Callable[..., Any]], Callable[..., Any]]


class Portal:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sandmartin portal", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._clear())
        finally:
            self._loop.close()

    async def _clear(self) -> None:
        """End what still goes on, connections included."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def close(self) -> None:
        """End the loop and the thread; what goes on is cancelled."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_EXIT_S)

    def call(self, work: Callable[[Callback], Coroutine[Any, Any, _T]]) -> _T:
        """Do what `work` makes, and wait for it. Raises what it raises.

        `work` is given what turns a function of the caller's into one that the work can await.
        """
        if threading.current_thread() is self._thread:
            raise Conflict(
                "the event loop of the blocking interface cannot wait for itself",
                hint="use AsyncSandbox in what runs on an event loop",
            )
        if not self._lives():
            raise Conflict("this was begun before the process was forked, or it is about to exit")
        return _Call(self._loop, work).wait()

    def iterate(self, make: Callable[[], AsyncIterator[_T]]) -> Iterator[_T]:
        """The same items for whoever blocks; closing the iterator closes theirs.

        `make` is called on the loop when the first item is asked for.
        """
        items: AsyncIterator[_T] | None = None

        async def following(_: Callback) -> _T:
            nonlocal items
            items = items or make()
            return await anext(items, _END)

        async def close(_: Callback) -> None:
            if (aclose := getattr(items, "aclose", None)) is not None:
                await aclose()

        try:
            while (item := self.call(following)) is not _END:
                yield item
        finally:
            # Where one cannot wait, the loop closes what nobody refers to any more.
            if self._lives() and threading.current_thread() is not self._thread:
                self.call(close)

    def _lives(self) -> bool:
        return self._pid == os.getpid() and not self._loop.is_closed()


class _Call(Generic[_T]):
    """Work on the loop for which a thread waits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Callable[[Callback], Coroutine[Any, Any, _T]],
    ) -> None:
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[_T] | None = None
        #: What the waiting thread is to do; None is the end of the work.
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waited_for = True

    def wait(self) -> _T:
        context = contextvars.copy_context()
        self._loop.call_soon_threadsafe(self._start, context=context)
        try:
            while (errand := self._errands.get()) is not None:
                errand()
        except BaseException:
            self._loop.call_soon_threadsafe(self._cancel)
            while (errand := self._errands.get()) is not None:
                errand()
            raise
        assert self._task is not None
        return self._task.result()

    def _start(self) -> None:
        self._task = self._loop.create_task(self._work(self._callback))
        self._task.add_done_callback(self._end)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _end(self, _: asyncio.Task[_T]) -> None:
        self._waited_for = False
        self._errands.put(None)

    def _callback(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` for the loop: awaited, it runs in the thread that waits, or in a worker."""

        @functools.wraps(function)
        async def run(*args: Any) -> Any:
            if not self._waited_for:
                return await asyncio.to_thread(function, *args)
            done: asyncio.Future[Any] = self._loop.create_future()
            self._errands.put(functools.partial(self._run_errand, done, function, args))
            return await done

        return run

    def _run_errand(
        self, done: asyncio.Future[Any], function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        # An interrupt passes, and cancels the work as a whole.
        try:
            result = function(*args)
        except Exception as error:  # noqa: BLE001 it is the work's to raise
            self._tell(done, error, None)
        else:
            self._tell(done, None, result)

    def _tell(self, done: asyncio.Future[Any], error: Exception | None, result: Any) -> None:
        def tell() -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)

        self._loop.call_soon_threadsafe(tell)


class _Portals:
    """The portal of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portal: Portal | None = None
        self._is_registered = False
        #: Of the processes that this one was forked from.
        self._inherited: list[Portal | None] = []

    def get(self) -> Portal:
        with self._lock:
            if not self._is_registered:
                os.register_at_fork(after_in_child=self._forget)
                atexit.register(self._close)
                self._is_registered = True
            if self._portal is None:
                self._portal = Portal()
            return self._portal

    def _forget(self) -> None:
        """In a child that was just forked: another thread may have held the lock."""
        self._lock = threading.Lock()
        self._inherited.append(self._portal)
        self._portal = None

    def _close(self) -> None:
        with self._lock:
            portal, self._portal = self._portal, None
        if portal is not None:
            portal.close()


_portals = _Portals()


def portal() -> Portal:
    """The portal of this process."""
    return _portals.get()
