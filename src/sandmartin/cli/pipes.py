"""Our standard streams, read and written without ever blocking the event loop.

Each is served by a daemon thread with plain blocking calls. asyncio's own pipes would switch the
descriptor to non-blocking, which every process that shares the terminal or pipe with us gets to
feel and which outlives us; and they refuse regular files. A thread that is stuck at exit, because
a terminal is silent or a reader is slow, is a daemon and holds nobody up.
"""

from __future__ import annotations

import asyncio
import os
import queue
import stat
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

_STDOUT, _STDERR = 1, 2
CHUNK_BYTES = 64 * 2**10
_AHEAD = 4


def occupy_standard_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    Otherwise a file or socket of ours would get its number, and the output of a command with it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(fd)


def drop_stdout() -> None:
    """Send what is still to be written to /dev/null, or Python would complain of it at exit."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, _STDOUT)
    os.close(fd)


def stdin_is_open() -> bool:
    """Whether there is input to forward: open, not /dev/null, not another job's terminal."""
    if sys.stdin is None:
        return False
    try:
        info = os.fstat(0)
        if os.isatty(0):
            # Reading a terminal in the background would stop us with SIGTTIN.
            return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
    return not (stat.S_ISCHR(info.st_mode) and info.st_rdev == os.stat(os.devnull).st_rdev)  # noqa: PTH116


class ByteSource:
    """The bytes of a descriptor, as they come; iterate once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue()
        # Bounds the queue: the thread reads ahead by so many chunks and then waits.
        self._ahead = threading.Semaphore(_AHEAD)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        threading.Thread(target=self._read, name=f"read-{self._fd}", daemon=True).start()
        while True:
            chunk = await self._chunks.get()
            if isinstance(chunk, OSError):
                raise chunk
            if not chunk:
                return
            self._ahead.release()
            yield chunk

    def _read(self) -> None:
        chunk: bytes | OSError = b"-"
        # RuntimeError: the loop is closed, nobody listens any more.
        with suppress(RuntimeError):
            while chunk and not isinstance(chunk, OSError):
                self._ahead.acquire()
                try:
                    chunk = os.read(self._fd, CHUNK_BYTES)
                except OSError as error:
                    chunk = error
                self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)


class ByteSink:
    """Writes to a descriptor; `write` returns when the other side has taken the bytes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._write, name=f"write-{fd}", daemon=True).start()

    async def write(self, data: bytes) -> None:
        """Write all of `data`. Raises OSError, BrokenPipeError among them."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._work.put((data, done))
        await done

    def _write(self) -> None:
        with suppress(RuntimeError):
            while True:
                data, done = self._work.get()
                failure = self._write_all(data)
                self._loop.call_soon_threadsafe(_settle, done, failure)

    def _write_all(self, data: bytes) -> OSError | None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            return error
        return None


def _settle(done: asyncio.Future[None], failure: OSError | None) -> None:
    if done.done():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)
