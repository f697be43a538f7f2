"""Places in what a user wrote, and the error that names one.

An error about a build says where it is (file, line, column), what stands there, and what to do.
What users wrote may be long and hostile, so it is cut and quoted before it is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandmartin.errors import Invalid

_LONGEST_QUOTE = 80


@dataclass(frozen=True, order=True)
class Position:
    """A place in a build's source. `line` and `column` count from 1."""

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class InvalidBuild(Invalid):
    """The build can never work as it is written."""

    def __init__(
        self, sentence: str, *, position: Position | None = None, text: str = "", hint: str = ""
    ) -> None:
        where = f"{position}: " if position else ""
        super().__init__(f"{where}{sentence}", hint=hint)
        self.position = position
        #: What is wrong there, cut.
        self.text = text[:_LONGEST_QUOTE]


def quoted(text: str) -> str:
    """`text` as an error may repeat it: one line, cut, with nothing that a terminal obeys."""
    return ascii(text[:_LONGEST_QUOTE]) + ("..." if len(text) > _LONGEST_QUOTE else "")


def is_plain(text: str) -> bool:
    """Whether `text` can be an argument, a variable or a path: UTF-8 without a zero byte."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class Note:
    """Something that was written, is no error, and has no effect here."""

    position: Position
    sentence: str
