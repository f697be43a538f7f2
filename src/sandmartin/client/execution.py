"""What running code gives: what it printed, the results it shows, and its error."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Kinds of content by the name that notebooks have for them.
_MIME: Mapping[str, str] = {
    "text": "text/plain",
    "html": "text/html",
    "markdown": "text/markdown",
    "svg": "image/svg+xml",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "pdf": "application/pdf",
    "latex": "text/latex",
    "json": "application/json",
    "javascript": "application/javascript",
}


@dataclass(frozen=True, kw_only=True)
class CodeOutput:
    """A piece of what code printed."""

    text: str
    #: Seconds since the epoch, as the sandbox has it.
    timestamp: float
    is_error: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """Something that code shows: its last value, a figure, a table. Notebooks show it, too."""

    text: str | None = None
    html: str | None = None
    markdown: str | None = None
    svg: str | None = None
    #: In base64, as are `jpeg` and `pdf`.
    png: str | None = None
    jpeg: str | None = None
    pdf: str | None = None
    latex: str | None = None
    json: Any = None
    javascript: str | None = None
    #: A table by columns.
    data: Mapping[str, Any] | None = None
    #: What a figure shows, as data.
    chart: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    #: It is the value of the last expression.
    is_main_result: bool = False

    def formats(self) -> tuple[str, ...]:
        """In which forms it is there."""
        names = (*_MIME, "data", "chart")
        return tuple(each for each in names if getattr(self, each) is not None)

    def __str__(self) -> str:
        return self.text if self.text is not None else f"Result({', '.join(self.formats())})"

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        bundle = {mime: getattr(self, name) for name, mime in _MIME.items()}
        return {mime: content for mime, content in bundle.items() if content is not None}

    def _repr_html_(self) -> str | None:
        return self.html

    def _repr_markdown_(self) -> str | None:
        return self.markdown

    def _repr_svg_(self) -> str | None:
        return self.svg

    def _repr_png_(self) -> bytes | None:
        return _decoded(self.png)

    def _repr_jpeg_(self) -> bytes | None:
        return _decoded(self.jpeg)

    def _repr_pdf_(self) -> bytes | None:
        return _decoded(self.pdf)

    def _repr_latex_(self) -> str | None:
        return self.latex

    def _repr_json_(self) -> Any:
        return self.json

    def _repr_javascript_(self) -> str | None:
        return self.javascript


def _decoded(content: str | None) -> bytes | None:
    return None if content is None else base64.b64decode(content)


@dataclass(frozen=True, kw_only=True)
class ExecutionError:
    """The error that code raised and nothing in it caught."""

    name: str
    value: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value}"


@dataclass(frozen=True, kw_only=True)
class Logs:
    """What code printed, piece by piece."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Execution:
    """What running code gave, so far while it runs."""

    results: list[Result] = field(default_factory=list)
    logs: Logs = field(default_factory=Logs)
    error: ExecutionError | None = None
    #: How many executions the context has seen.
    execution_count: int | None = None

    @property
    def text(self) -> str | None:
        """The value of the last expression, as text."""
        main = (each for each in self.results if each.is_main_result)
        return next((each.text for each in main), None)

    @property
    def stdout(self) -> str:
        """All that the code printed."""
        return "".join(self.logs.stdout)

    @property
    def stderr(self) -> str:
        """All that the code printed to standard error."""
        return "".join(self.logs.stderr)

    def __repr__(self) -> str:
        error = f", error={self.error}" if self.error else ""
        return f"Execution(text={self.text!r}, results={len(self.results)}{error})"
