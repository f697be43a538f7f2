"""Words with variables in them: read once, with their place, and expanded when these are known.

The value of a variable may come from the image that a build starts from, so it is not known when
the source is read. Only what is named here is understood; every other form of `${...}` is refused
rather than taken as text. Nesting and length are bounded: a few lines of doubling would otherwise
fill any memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sandmartin.context.source import InvalidBuild, Position, quoted
from sandmartin.control.builds.lines import Span

MAX_EXPANDED = 64 * 2**10
_DEEPEST = 16
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+|[@*#$!?-]")
_OPERATOR = re.compile(r":?[-+?]")


@dataclass(frozen=True)
class Dialect:
    """How one language writes words."""

    #: Makes the next character literal; empty for none.
    escape: str = ""
    #: Whether quotes group, and are taken off.
    quotes: bool = False
    #: Whether `${name:-word}` and its like are known.
    operators: bool = False
    #: Whether `$$` is one `$`.
    doubled: bool = False


@dataclass(frozen=True)
class Variable:
    """`$name`, or `${name}` with an operator such as `:-` and its word."""

    name: str
    operator: str = ""
    word: tuple[Part, ...] = ()


Part = str | Variable


@dataclass(frozen=True)
class Text:
    """One word as it was written."""

    parts: tuple[Part, ...]
    position: Position

    @classmethod
    def literal(cls, text: str, position: Position) -> Text:
        return cls((text,) if text else (), position)

    def expand(self, variables: Mapping[str, str]) -> str:
        """The word with the values of its variables; one that is unknown is empty.

        Raises InvalidBuild when it becomes too long, or by the variable's own `?`.
        """
        return _expand(self.parts, variables, self.position)


def _expand(parts: tuple[Part, ...], variables: Mapping[str, str], position: Position) -> str:
    found, length = [], 0
    for part in parts:
        value = part if isinstance(part, str) else _value(part, variables, position)
        length += len(value)
        if length > MAX_EXPANDED:
            raise InvalidBuild(
                f"this becomes longer than {MAX_EXPANDED} characters",
                position=position,
                hint="a variable that is set from itself doubles each time",
            )
        found.append(value)
    return "".join(found)


def _value(variable: Variable, variables: Mapping[str, str], position: Position) -> str:
    value = variables.get(variable.name)
    is_set = value is not None and (value != "" or not variable.operator.startswith(":"))
    match variable.operator[-1:]:
        case "-" if not is_set:
            return _expand(variable.word, variables, position)
        case "+":
            return _expand(variable.word, variables, position) if is_set else ""
        case "?" if not is_set:
            said = _expand(variable.word, variables, position) or "it is not set"
            raise InvalidBuild(
                f"the variable {variable.name} is needed: {quoted(said)}",
                position=position,
                text=variable.name,
                hint="give its value as a build argument, or by ARG or ENV",
            )
    return value or ""


def read_text(span: Span, dialect: Dialect) -> Text:
    """The word that `span` is. Raises InvalidBuild for what is not closed or not known."""
    reader = _Reader(span, dialect)
    return Text(reader.read_until("", 0), span.position)


class _Reader:
    """Reads one word from left to right."""

    def __init__(self, span: Span, dialect: Dialect) -> None:
        self._span: Final = span
        self._text: Final = span.text
        self._dialect: Final = dialect
        self._at = 0

    def read_until(self, end: str, depth: int) -> tuple[Part, ...]:
        """Parts up to `end`, which is passed over, or to the word's end when it is empty."""
        parts: list[Part] = []
        start, quote = self._at, ""
        while self._at < len(self._text):
            char = self._text[self._at]
            if not quote and end and char == end:
                self._at += 1
                return _joined(parts)
            self._at += 1
            if self._dialect.quotes and char in "'\"" and quote in ("", char):
                quote = "" if quote else char
            elif char == self._dialect.escape and quote != "'":
                parts.append(self._escaped(quote))
            elif char == "$" and quote != "'":
                parts.append(self._variable(depth))
            else:
                parts.append(char)
        if quote or end:
            raise self._error(f"{quote or '${'} is not closed", start, hint="close it")
        return _joined(parts)

    def _escaped(self, quote: str) -> str:
        escape = self._dialect.escape
        following = self._text[self._at : self._at + 1]
        if self._dialect.quotes and not quote:
            literal = True
        else:
            literal = following in ("$", escape, *(['"'] if quote else []))
        if not literal:
            return escape
        self._at += 1
        return following

    def _variable(self, depth: int) -> Part:
        start = self._at - 1
        rest = self._text[self._at : self._at + 1]
        if self._dialect.doubled and rest == "$":
            self._at += 1
            return "$"
        if rest != "{":
            name = _NAME.match(self._text, self._at)
            if name is None:
                return "$"
            self._at = name.end()
            return Variable(name[0])
        if depth == _DEEPEST:
            raise self._error(f"variables are nested deeper than {_DEEPEST}", start)
        return self._braced(start, depth)

    def _braced(self, start: int, depth: int) -> Variable:
        name = _NAME.match(self._text, self._at + 1)
        if name is None:
            raise self._error("${ has no name", start, hint="write $$ or \\$ for a plain $")
        self._at = name.end()
        if self._text.startswith("}", self._at):
            self._at += 1
            return Variable(name[0])
        operator = _OPERATOR.match(self._text, self._at)
        if operator is None or not self._dialect.operators:
            known = "${V:-x}, ${V-x}, ${V:+x}, ${V+x}, ${V:?x}, ${V?x}"
            raise self._error(
                f"${{{name[0]}... is a form that is not supported",
                start,
                hint=f"use one of ${{V}}, {known}" if self._dialect.operators else "use ${V}",
            )
        self._at = operator.end()
        return Variable(name[0], operator[0], self.read_until("}", depth + 1))

    def _error(self, sentence: str, at: int, hint: str = "") -> InvalidBuild:
        where = self._span.part(at, len(self._text))
        return where.error(sentence, hint=hint)


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Neighbouring pieces of plain text become one."""
    joined: list[Part] = []
    plain: list[str] = []
    for part in parts:
        if isinstance(part, str):
            plain.append(part)
            continue
        if plain:
            joined.append("".join(plain))
            plain = []
        joined.append(part)
    if text := "".join(plain):
        joined.append(text)
    return tuple(joined)
