"""Patterns of file names, and the rules of `.dockerignore`.

A pattern is one of Go's `filepath.Match` (`*`, `?`, `[a-z]`, `[^a]`, a backslash before what is
meant literally; none of them matches a slash) with Docker's `**`, which also crosses directories.
Patterns and names come from users, so matching takes no longer than the product of their lengths,
whatever they are: all positions in the pattern that are possible at a time are bits of one number.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from functools import lru_cache

from sandmartin.context.source import InvalidBuild, Position, quoted

MAX_PATTERN_LENGTH = 1024
MAX_RULES = 5000
_WILD = frozenset("*?[\\")

_Accepts = Callable[[str], bool]


def is_pattern(text: str) -> bool:
    """Whether `text` can match anything but itself."""
    return not _WILD.isdisjoint(text)


class Pattern:
    """One pattern, ready to match. Raises ValueError when it is malformed."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_PATTERN_LENGTH:
            raise ValueError(f"it has more than {MAX_PATTERN_LENGTH} characters")
        self.text = text
        self._consuming: list[tuple[int, _Accepts]] = []
        self._staying: list[tuple[int, _Accepts]] = []
        #: Positions from which the next one is reached for nothing, and those that open `**/`.
        self._stars = 0
        self._openings = 0
        self._length = 0
        self._compile(text)
        self._final = 1 << self._length
        self._moves = lru_cache(maxsize=1024)(self._moves_on)

    def matches(self, path: str) -> bool:
        """Whether the whole of `path` is matched."""
        *_, last = self._walk(path)
        return last

    def matches_within(self, path: str) -> bool:
        """Whether `path` or one of the directories above it is matched."""
        ends = [*(index for index, char in enumerate(path) if char == "/"), len(path)]
        matched = list(self._walk(path))
        return any(matched[end] for end in ends)

    def _walk(self, path: str) -> Iterator[bool]:
        """Whether the first 0, 1, 2, ... characters of `path` are matched."""
        now = self._reached(1)
        yield bool(now & self._final)
        for char in path:
            on, stay = self._moves(char)
            now = self._reached(((now & on) << 1) | (now & stay))
            yield bool(now & self._final)

    def _reached(self, now: int) -> int:
        while True:
            opened = now & self._openings
            more = now | ((now & self._stars) << 1) | (opened << 1) | (opened << 3)
            if more == now:
                return now
            now = more

    def _moves_on(self, char: str) -> tuple[int, int]:
        return (
            sum(bit for bit, accepts in self._consuming if accepts(char)),
            sum(bit for bit, accepts in self._staying if accepts(char)),
        )

    def _compile(self, text: str) -> None:
        index = 0
        while index < len(text):
            if text.startswith("**/", index):
                self._openings |= 1 << self._length
                self._length += 1
                self._star(lambda _: True)
                self._one("/".__eq__)
                index += 3
            elif text.startswith("**", index):
                self._star(lambda _: True)
                index += 2
            else:
                index = self._compile_one(text, index)

    def _compile_one(self, text: str, index: int) -> int:
        char = text[index]
        if char == "*":
            self._star("/".__ne__)
        elif char == "?":
            self._one("/".__ne__)
        elif char == "[":
            accepts, index = _class(text, index + 1)
            self._one(accepts)
        elif char == "\\":
            index += 1
            if index == len(text):
                raise ValueError("it ends with a backslash")
            self._one(text[index].__eq__)
        else:
            self._one(char.__eq__)
        return index + 1

    def _one(self, accepts: _Accepts) -> None:
        self._consuming.append((1 << self._length, accepts))
        self._length += 1

    def _star(self, accepts: _Accepts) -> None:
        self._stars |= 1 << self._length
        self._staying.append((1 << self._length, accepts))
        self._length += 1


def _class(text: str, index: int) -> tuple[_Accepts, int]:
    """What `[...]` accepts, and where its closing bracket is."""
    negated = text.startswith("^", index)
    index += negated
    ranges: list[tuple[str, str]] = []
    while not (text.startswith("]", index) and ranges):
        low, index = _class_char(text, index)
        high = low
        if text.startswith("-", index):
            high, index = _class_char(text, index + 1)
        if high < low:
            raise ValueError(f"the range {low}-{high} runs backwards")
        ranges.append((low, high))

    def accepts(char: str) -> bool:
        return char != "/" and negated != any(low <= char <= high for low, high in ranges)

    return accepts, index


def _class_char(text: str, index: int) -> tuple[str, int]:
    if text.startswith("\\", index):
        index += 1
    elif text.startswith(("-", "]"), index):
        raise ValueError("a bracket has an empty part")
    if index >= len(text):
        raise ValueError("a bracket is not closed")
    return text[index], index + 1


class IgnoreRules:
    """The rules of one `.dockerignore`: the last that matches a path, or what is above it, decides.

    Raises InvalidBuild that names the line.
    """

    def __init__(self, text: str = "", file: str = ".dockerignore") -> None:
        self._rules: list[tuple[Pattern, bool]] = []
        lines = text.removeprefix("\ufeff").splitlines()
        if len(lines) > MAX_RULES:
            raise InvalidBuild(f"{file} has more than {MAX_RULES} lines")
        for number, line in enumerate(lines, 1):
            if not line.startswith("#") and line.strip():
                self._rules.append(_rule(line, Position(file, number)))
        #: Whether something below an ignored directory may be wanted all the same.
        self.has_exceptions = any(wanted for _, wanted in self._rules)

    def ignores(self, path: str) -> bool:
        """Whether `path`, relative to the context and with slashes, is left out."""
        for pattern, wanted in reversed(self._rules):
            if pattern.matches_within(path):
                return not wanted
        return False


def _rule(line: str, position: Position) -> tuple[Pattern, bool]:
    text = line.strip()
    wanted = text.startswith("!")
    text = text[wanted:].strip()
    if not text:
        raise InvalidBuild(
            "an exception names nothing", position=position, text=line, hint="write !PATTERN"
        )
    text = posixpath.normpath(text).lstrip("/") or "."
    try:
        return Pattern(text), wanted
    except ValueError as error:
        raise InvalidBuild(
            f"the pattern {quoted(text)} is malformed: {error}", position=position, text=text
        ) from error
