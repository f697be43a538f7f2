"""The lines of a build's source: joined where one goes on, with the documents that follow them.

What is read is bounded before it is looked at. A joined line knows where each of its characters
stood, so that an error points at the place in the file and not in the joined text.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sandmartin.context.source import InvalidBuild, Position, is_plain, quoted

MAX_SOURCE_BYTES = 256 * 2**10
MAX_LINES = 10_000
_DIRECTIVE = re.compile(r"#[ \t]*([A-Za-z][A-Za-z0-9]*)[ \t]*=[ \t]*(.*?)[ \t]*")
_DIRECTIVES = ("escape", "syntax", "check")
_KEYWORD = re.compile(r"[A-Za-z]+")
_DOCUMENT = re.compile(r"[0-9]*<<(-?)([^<]+)")
_DOCUMENTED = ("RUN", "COPY", "ADD")
_BLANK = " \t"
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|us|ns|h|m|s)")
MAX_DURATION_S = 24 * 3600.0


@dataclass(frozen=True)
class Document:
    """A heredoc: the lines up to its name."""

    name: str
    content: Line
    #: Whether variables in it are expanded: its name was written without quotes.
    expands: bool
    position: Position
    #: As it was written, with its last line, as a shell wants it.
    written: str


@dataclass(frozen=True)
class Line:
    """One instruction's line, joined."""

    file: str
    text: str
    #: Where pieces of `text` begin, and the line and column at which they stood.
    offsets: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    documents: tuple[Document, ...] = ()

    def at(self, offset: int) -> Position:
        """Where the character at `offset` stood."""
        if not self.places:
            return Position(self.file, 1)
        piece = max(0, bisect.bisect_right(self.offsets, offset) - 1)
        line, column = self.places[piece]
        return Position(self.file, line, column + offset - self.offsets[piece])

    @property
    def whole(self) -> Span:
        return Span(self, 0, self.text)


@dataclass(frozen=True)
class Span:
    """A stretch of a line."""

    line: Line
    start: int
    text: str

    @property
    def position(self) -> Position:
        return self.line.at(self.start)

    def part(self, start: int, end: int) -> Span:
        return Span(self.line, self.start + start, self.text[start:end])

    def strip(self) -> Span:
        left = len(self.text) - len(self.text.lstrip(_BLANK))
        return self.part(left, max(left, len(self.text.rstrip(_BLANK))))

    def partition(self, separator: str) -> tuple[Span, Span | None]:
        """What stands before and after the first `separator`, if there is one."""
        at = self.text.find(separator)
        if at < 0:
            return self, None
        return self.part(0, at), self.part(at + len(separator), len(self.text))

    def words(self) -> list[Span]:
        """What blanks divide."""
        return [self.part(*found.span()) for found in re.finditer(r"[^ \t]+", self.text)]

    def quoted_words(self, escape: str = "\\") -> list[Span]:
        """What blanks outside of quotes divide; the words keep their quotes."""
        return [self.part(start, end) for start, end in _quoted_words(self.text, escape)]

    def first_word(self) -> tuple[Span, Span]:
        """The first word, and the rest without the blanks around it."""
        whole = self.strip()
        end = next((i for i, char in enumerate(whole.text) if char in _BLANK), len(whole.text))
        return whole.part(0, end), whole.part(end, len(whole.text)).strip()

    def json_words(self) -> tuple[str, ...] | None:
        """The strings of a JSON list; None when this is none, and so is meant for a shell."""
        if not self.text.startswith("["):
            return None
        try:
            found: Any = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            return None
        if not all(map(is_plain, found)):
            raise self.error("has a character that no command can have")
        return tuple(found)

    def duration_s(self) -> float:
        """What `1m30s`, `500ms` or `0` means. Raises InvalidBuild."""
        pieces = list(_DURATION.finditer(self.text))
        if self.text != "0" and (not pieces or "".join(p[0] for p in pieces) != self.text):
            raise self.error("is no duration", hint="write one as 30s, 1m30s or 500ms")
        seconds = sum(float(piece[1]) * _UNITS_S[piece[2]] for piece in pieces)
        if seconds > MAX_DURATION_S:
            raise self.error("is too long a time", hint="24h is the longest")
        return seconds

    def error(self, sentence: str, hint: str = "") -> InvalidBuild:
        """An error about this stretch, which its sentence begins with."""
        return InvalidBuild(
            f"{quoted(self.text)} {sentence}" if self.text else sentence,
            position=self.position,
            text=self.text,
            hint=hint,
        )


def _quoted_words(text: str, escape: str) -> Iterator[tuple[int, int]]:
    start, quote, skip = -1, "", False
    for index, char in enumerate(text):
        if skip:
            skip = False
        elif not quote and char in _BLANK:
            if start >= 0:
                yield start, index
            start = -1
            continue
        elif char == escape and quote != "'":
            skip = True
        elif char in "'\"" and quote in ("", char):
            quote = "" if quote else char
        start = index if start < 0 else start
    if start >= 0:
        yield start, len(text)


def checked_source(text: str, file: str) -> list[str]:
    """The lines of a source that is not too large. Raises InvalidBuild."""
    if len(text.encode(errors="replace")) > MAX_SOURCE_BYTES:
        raise InvalidBuild(f"{file} is larger than {MAX_SOURCE_BYTES} bytes")
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if len(lines) > MAX_LINES:
        raise InvalidBuild(f"{file} has more than {MAX_LINES} lines")
    for number, line in enumerate(lines, 1):
        if not is_plain(line):
            at = next(at for at, char in enumerate(line) if not is_plain(char))
            raise InvalidBuild(
                "a zero byte, or what is not UTF-8", position=Position(file, number, at + 1)
            )
    return lines


@dataclass
class _Joined:
    """A line while it is read."""

    text: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def add(self, text: str, line: int, column: int) -> None:
        self.text.append(text)
        self.offsets.append(self.length)
        self.places.append((line, column))
        self.length += len(text)

    def line(self, file: str) -> Line:
        return Line(file, "".join(self.text), tuple(self.offsets), tuple(self.places))


class Source:
    """A source's lines, by the rules that Dockerfiles have. Raises InvalidBuild."""

    def __init__(
        self, text: str, file: str, *, directives: bool = True, documents: bool = True
    ) -> None:
        self.file = file
        #: Goes on with a line, and makes a character literal.
        self.escape = "\\"
        self._rows = checked_source(text, file)
        self._next = 0
        self._has_documents = documents
        if directives:
            self._read_directives()

    def _read_directives(self) -> None:
        seen: set[str] = set()
        for row in self._rows:
            found = _DIRECTIVE.fullmatch(row.strip())
            if found is None or (name := found[1].lower()) not in _DIRECTIVES:
                return
            position = Position(self.file, self._next + 1)
            if name in seen:
                raise InvalidBuild(f"{name} is given twice", position=position, text=row)
            if name == "escape":
                if found[2] not in ("\\", "`"):
                    raise InvalidBuild(
                        f"escape is {quoted(found[2])}",
                        position=position,
                        text=row,
                        hint="it can be \\ or `",
                    )
                self.escape = found[2]
            seen.add(name)
            self._next += 1

    def lines(self) -> Iterator[Line]:
        """Each line that holds an instruction."""
        while self._next < len(self._rows):
            joined = self._join()
            if joined.text:
                whole = joined.line(self.file)
                bare = replace(whole, text=whole.text.rstrip())
                yield replace(bare, documents=tuple(self._documents(bare)))

    def _join(self) -> _Joined:
        joined = _Joined()
        while self._next < len(self._rows):
            row = self._rows[self._next]
            self._next += 1
            bare = row.lstrip()
            if not bare or bare.startswith("#"):
                # Also between the pieces of a line, where they do not end it.
                if joined.text:
                    continue
                break
            kept = row if joined.text else bare
            piece = self._going_on(kept)
            joined.add(kept if piece is None else piece, self._next, len(row) - len(kept) + 1)
            if piece is None:
                break
        return joined

    def _going_on(self, row: str) -> str | None:
        """`row` without the mark that it goes on; None without one."""
        end = row.rstrip(_BLANK)
        if not end.endswith(self.escape) or end.endswith(self.escape * 2):
            return None
        return end[:-1]

    def _documents(self, line: Line) -> Iterator[Document]:
        keyword = _KEYWORD.match(line.text)
        if keyword is None or not self._has_documents or keyword[0].upper() not in _DOCUMENTED:
            return
        for word in line.whole.quoted_words(self.escape):
            found = _DOCUMENT.fullmatch(word.text)
            if found is None:
                continue
            name = found[2]
            bare = re.sub(r"""(['"])(.*)\1""", r"\2", name).replace(self.escape, "")
            yield self._document(word, bare, strip=found[1] == "-", expands=bare == name)

    def _document(self, word: Span, name: str, *, strip: bool, expands: bool) -> Document:
        body = _Joined()
        written: list[str] = []
        while self._next < len(self._rows):
            row = self._rows[self._next]
            self._next += 1
            written.append(f"{row}\n")
            kept = row.lstrip("\t") if strip else row
            if kept == name:
                content = body.line(self.file)
                return Document(name, content, expands, word.position, "".join(written))
            body.add(f"{kept}\n", self._next, len(row) - len(kept) + 1)
        raise word.error("is not closed", hint=f"end it by a line that is only {name}")
