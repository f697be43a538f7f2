"""Functions of users that are called as something happens; they may be coroutine functions."""

from __future__ import annotations

import codecs
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandmartin.transport import Stderr, Stdout

_T = TypeVar("_T")
OnEach = Callable[[_T], Awaitable[object] | object]


async def call(function: OnEach[_T] | None, item: _T) -> None:
    """Call `function`, if there is one, and wait for it."""
    if function is not None:
        answer = function(item)
        if inspect.isawaitable(answer):
            await answer


class _Text:
    """A stream of bytes, told as text: a character that is cut is told whole."""

    def __init__(self, function: OnEach[str] | None) -> None:
        self._function = function
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    async def take(self, data: bytes, *, final: bool = False) -> None:
        if self._function is not None and (text := self._decoder.decode(data, final)):
            await call(self._function, text)


class Listeners:
    """Whom the output of a command is told."""

    def __init__(
        self,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
        on_data: OnEach[bytes] | None = None,
    ) -> None:
        self._stdout, self._stderr = _Text(on_stdout), _Text(on_stderr)
        self._on_data = on_data

    async def take(self, event: Stdout | Stderr) -> None:
        """Tell the one who wants to hear it."""
        text = self._stdout if isinstance(event, Stdout) else self._stderr
        await text.take(event.data)
        await call(self._on_data, event.data)

    async def end(self) -> None:
        """Tell what was kept back: half a character at the end."""
        for text in (self._stdout, self._stderr):
            await text.take(b"", final=True)
