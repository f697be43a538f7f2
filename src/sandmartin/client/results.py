"""How a command ended, and the errors that tell it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from sandmartin.errors import SandmartinError, TimedOut
from sandmartin.transport import Ended, Stderr, Stdout

#: What is kept of a command's output; of more, the oldest is forgotten.
MAX_OUTPUT_BYTES = 64 << 20
_MAX_TOLD_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """How a command ended, and what it said."""

    #: 128 + signal when a signal ended it.
    exit_code: int
    #: Decoded as UTF-8; what is none is replaced.
    stdout: str
    stderr: str
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    #: Number of the signal that ended it; 0 for none.
    signal: int = 0
    #: There was more output than is kept, 64 MiB; the oldest is missing.
    truncated: bool = False


class CommandFailed(SandmartinError):
    """The command ended with an exit code other than 0; `result` has all that it said."""

    code: ClassVar[str] = "command_failed"

    def __init__(self, result: CommandResult) -> None:
        said = (result.stderr.strip() or result.stdout.strip())[-_MAX_TOLD_CHARS:]
        ended = f"signal {result.signal}" if result.signal else f"exit code {result.exit_code}"
        super().__init__(f"the command ended with {ended}{': ' if said else ''}{said}")
        self.result = result

    @property
    def exit_code(self) -> int:
        """128 + signal when a signal ended it."""
        return self.result.exit_code

    @property
    def stdout(self) -> str:
        """What it said, as text."""
        return self.result.stdout

    @property
    def stderr(self) -> str:
        """What it said of errors, as text."""
        return self.result.stderr

    def __reduce__(self) -> tuple[type[CommandFailed], tuple[CommandResult]]:
        return type(self), (self.result,)


class CommandTimedOut(TimedOut):
    """The command did not end within its limit and was killed; `result` has what it said."""

    def __init__(self, result: CommandResult, timeout_s: float | None = None) -> None:
        within = "its time limit" if timeout_s is None else f"{timeout_s:g} s"
        super().__init__(
            f"the command did not end within {within} and was killed",
            hint="give it a larger `timeout`, or None for no limit",
        )
        self.result = result
        self.timeout_s = timeout_s

    def __reduce__(self) -> tuple[type[CommandTimedOut], tuple[CommandResult, float | None]]:
        return type(self), (self.result, self.timeout_s)


class Output:
    """What a command said, in order; bounded, so that the oldest may be missing."""

    def __init__(self) -> None:
        self._events: deque[Stdout | Stderr] = deque()
        self._forgotten = 0
        self._size = 0

    def add(self, event: Stdout | Stderr) -> None:
        """Keep what was said; the oldest is forgotten when it is too much."""
        self._events.append(event)
        self._size += len(event.data)
        while self._size > MAX_OUTPUT_BYTES:
            self._size -= len(self._events.popleft().data)
            self._forgotten += 1

    def after(self, count: int) -> tuple[int, Stdout | Stderr | None]:
        """What comes next for whoever has seen so many, and how many that then makes."""
        at = max(count - self._forgotten, 0)
        if at >= len(self._events):
            return count, None
        return self._forgotten + at + 1, self._events[at]

    def result(self, ended: Ended) -> CommandResult:
        """All that is kept, and how it ended."""
        out, err = (
            b"".join(each.data for each in self._events if isinstance(each, kind))
            for kind in (Stdout, Stderr)
        )
        return CommandResult(
            exit_code=ended.exit_code,
            signal=ended.signal,
            stdout=out.decode(errors="replace"),
            stderr=err.decode(errors="replace"),
            stdout_bytes=out,
            stderr_bytes=err,
            truncated=self._forgotten > 0,
        )
