"""The portal and the blocking faces: what whoever waits may rely on."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from sandmartin.client.facade import Facade, blocking, iterating, making, wrapping
from sandmartin.client.portal import portal
from sandmartin.errors import Conflict, NotFound

DEADLINE_S = 30.0
whose = contextvars.ContextVar("whose", default="nobody's")


class AsyncCounter:
    """Something asynchronous."""

    def __init__(self) -> None:
        self.undone: list[str] = []
        self.closed = threading.Event()
        self.waited_for = asyncio.Event()

    async def add(self, number: int, *, more: int = 0) -> int:
        """Add two numbers."""
        await asyncio.sleep(0)
        return number + more

    async def fail(self) -> None:
        raise NotFound("there is none")

    async def whose(self) -> str:
        return whose.get()

    async def tell(self, *, on_word: Callable[[str], Any]) -> str:
        answer = on_word("one")
        return str(await answer)

    async def tell_later(self, *, on_word: Callable[[str], Any]) -> asyncio.Task[Any]:
        async def later() -> Any:
            await self.waited_for.wait()
            return await on_word("later")

        return asyncio.create_task(later())

    async def wait_for(self, task: asyncio.Task[Any]) -> Any:
        self.waited_for.set()
        return await task

    async def hang(self, *, on_word: Callable[[str], Any]) -> None:
        try:
            await on_word("begun")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            self.undone.append("hang")

    async def count(self, to: int) -> AsyncGenerator[int, None]:
        try:
            for number in range(to):
                yield number
        finally:
            self.closed.set()

    async def child(self) -> AsyncCounter:
        return AsyncCounter()


class Counter(Facade[AsyncCounter]):
    add = blocking(AsyncCounter.add)
    fail = blocking(AsyncCounter.fail)
    whose = blocking(AsyncCounter.whose)
    tell = blocking(AsyncCounter.tell)
    tell_later = blocking(AsyncCounter.tell_later)
    wait_for = blocking(AsyncCounter.wait_for)
    hang = blocking(AsyncCounter.hang)
    count = iterating(AsyncCounter.count)
    child = wrapping(AsyncCounter.child, lambda made: Counter(made))
    make = staticmethod(making(AsyncCounter().child, lambda made: Counter(made)))


@pytest.fixture
def counter() -> Counter:
    return Counter(AsyncCounter())


def test_what_is_asked_is_answered(counter: Counter) -> None:
    assert counter.add(1, more=2) == 3
    assert isinstance(counter.child(), Counter) and isinstance(Counter.make(), Counter)
    assert Counter.add.__doc__ == AsyncCounter.add.__doc__
    with pytest.raises(NotFound, match="there is none"):
        counter.fail()
    token = whose.set("mine")
    assert counter.whose() == "mine"
    whose.reset(token)


async def test_it_works_where_a_loop_runs(counter: Counter) -> None:
    assert counter.add(1) == 1
    assert list(counter.count(3)) == [0, 1, 2]


def test_many_threads_share_it(counter: Counter) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda each=each: found.append(counter.add(each)))
        for each in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(found) == list(range(20))


def test_callbacks_run_where_one_waits(counter: Counter) -> None:
    def heard(word: str) -> str:
        # From there the blocking interface may be used, too.
        return f"{word} {threading.current_thread().name} {counter.add(1)}"

    here = threading.current_thread().name
    assert counter.tell(on_word=heard) == f"one {here} 1"
    later = counter.wait_for(counter.tell_later(on_word=lambda _: threading.current_thread().name))
    assert later not in {here, "sandmartin portal"}
    with pytest.raises(ZeroDivisionError):
        counter.tell(on_word=lambda _: 1 // 0)


def test_the_loop_itself_cannot_wait(counter: Counter) -> None:
    async def nested(_: object) -> None:
        counter.add(1)

    with pytest.raises(Conflict, match="cannot wait for itself"):
        portal().call(nested)


def test_an_iterator_that_is_left_is_closed(counter: Counter) -> None:
    for _ in counter.count(10):
        break
    inner = counter._inner
    items = counter.count(10)
    inner.closed.clear()
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert inner.closed.wait(DEADLINE_S)


@pytest.mark.parametrize("where", ["callback", "waiting"])
def test_an_interrupt_undoes_what_was_half_done(counter: Counter, where: str) -> None:
    def heard(_: str) -> None:
        if where == "callback":
            raise KeyboardInterrupt
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()

    with pytest.raises(KeyboardInterrupt):
        counter.hang(on_word=heard)
    assert counter._inner.undone == ["hang"]
    assert counter.add(1) == 1


def test_a_child_that_was_forked_has_its_own(counter: Counter) -> None:
    items = counter.count(3)
    assert next(items) == 0
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(counter.add(40, more=2))
            try:
                next(items)
            except Conflict:
                said += " refused"
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"42 refused"
    os.waitpid(pid, 0)
    assert list(items) == [1, 2] and counter.add(1) == 1


_LEFT = """
from sandmartin.client.portal import portal
import asyncio
kept = []
async def work(_):
    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            print("ended", flush=True)
    kept.append(asyncio.create_task(forever()))
    await asyncio.sleep(0)
portal().call(work)
"""


def test_what_goes_on_ends_with_the_process() -> None:
    words = [sys.executable, "-P", "-X", "dev", "-W", "error", "-c", _LEFT]
    done = subprocess.run(words, capture_output=True, timeout=DEADLINE_S, check=True)
    assert (done.stdout, done.stderr) == (b"ended\n", b"")
