"""A build's log as people read it: steps, what they say, how long they took.

In colours on a terminal, unless NO_COLOR is set; the same lines without them elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

from sandmartin.cli.talk import plain
from sandmartin.client.template import Template
from sandmartin.transport.builds import BuildLog, Script

_RESET = "\x1b[0m"
_COLOURS = {"debug": "\x1b[2m", "warn": "\x1b[33m", "error": "\x1b[31m"}
_STEP, _CACHED = "\x1b[36m", "\x1b[32m"
_CACHED_WORD = "(cached)"
_PLACE = re.compile(r"(?P<file>[^:\n]+):(?P<line>[0-9]{1,6}):(?P<column>[0-9]{1,6}): ")
_MAX_SHOWN = 200


def has_colours(out: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `out` is a terminal that shows colours, and nobody minds."""
    if environ.get("NO_COLOR") or environ.get("TERM", "dumb") == "dumb":
        return False
    return out is not None and out.isatty()


class BuildLogText:
    """Writes entries of a log to `out`, of which nobody need hear."""

    def __init__(self, out: TextIO | None, steps: int = 0) -> None:
        self._out = out
        self._has_colours = has_colours(out)
        #: How many there are; 0 when that is not known.
        self.steps = steps

    def __call__(self, entry: BuildLog) -> None:
        for line in self.lines(entry):
            if self._out is not None:
                with suppress(OSError):
                    print(line, file=self._out, flush=True)

    def lines(self, entry: BuildLog) -> list[str]:
        """What is written for one entry: a line for each of its own."""
        begin = f"{entry.elapsed_ms / 1000:6.1f} s  {self._in(_STEP, self._step(entry.step))}"
        colour = _COLOURS.get(entry.level, "")
        if entry.level == "info" and entry.message.endswith(_CACHED_WORD):
            colour = _CACHED
        lines = plain(entry.message.replace("\r", "\n")).splitlines() or [""]
        return [f"{begin}{self._in(colour, each)}".rstrip() for each in lines]

    def _step(self, step: str) -> str:
        if not step:
            return ""
        of = f"/{self.steps}" if step.isdecimal() and self.steps else ""
        return f"[{plain(step)}{of}] "

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_RESET}" if colour and text and self._has_colours else text


def excerpt(template: Template, message: str) -> list[str]:
    """The line of a Dockerfile or recipe that an error is about, and a caret below its column."""
    place = _PLACE.match(message)
    if place is None or not isinstance(template.source, Script):
        return []
    lines = template.source.text.splitlines()
    number, column = int(place["line"]), int(place["column"])
    if place["file"] != template.source.file or not 1 <= number <= len(lines):
        return []
    line = lines[number - 1].expandtabs(1)
    # Of a long line, what is around the place.
    begin = max(0, column - _MAX_SHOWN // 2)
    shown, margin = plain(line[begin : begin + _MAX_SHOWN]), " " * len(str(number))
    return [f"{number} | {shown}", f"{margin} | {' ' * (column - 1 - begin)}^"]
