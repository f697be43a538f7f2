"""Code run by the interpreter in a sandbox, whose contexts keep their variables.

The interpreter is part of the template `code-interpreter-v1`. It answers with one JSON object a
line; each is handed on as it comes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import httpx

from sandmartin.client.callbacks import OnEach, call
from sandmartin.client.execution import CodeOutput, Execution, ExecutionError, Result
from sandmartin.client.link import Link
from sandmartin.client.server import CODE_PORT
from sandmartin.errors import Invalid, TimedOut, Unavailable

DEFAULT_TIMEOUT_S = 300.0
#: Keepalives come every 5 s.
_QUIET_S = 60.0
_CONTEXT_S = 60.0
_MAX_LINE_BYTES = 64 << 20
_RESULT_FIELDS = frozenset(each.name for each in fields(Result))


@dataclass(frozen=True, kw_only=True)
class CodeContext:
    """Where code runs: an interpreter of one language, and its variables."""

    id: str
    language: str
    cwd: str


class AsyncCode:
    """The interpreter of a sandbox."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def run(
        self,
        code: str,
        *,
        language: str | None = None,
        context: CodeContext | str | None = None,
        envs: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        on_stdout: OnEach[CodeOutput] | None = None,
        on_stderr: OnEach[CodeOutput] | None = None,
        on_result: OnEach[Result] | None = None,
        on_error: OnEach[ExecutionError] | None = None,
    ) -> Execution:
        """Run code to its end; an error of the code is in the answer, and is not raised.

        Without a context it runs in the default one of its language. `timeout` is in seconds,
        None or 0 for none. Raises Invalid, NotFound (context), TimedOut, Unavailable.
        """
        if language is not None and context is not None:
            raise Invalid("a context has a language", hint="give one of `language` and `context`")
        body = {
            "code": code,
            "language": language,
            "context_id": _id_of(context) if context is not None else None,
            "env_vars": dict(envs or {}),
        }
        listeners = _Listeners(on_stdout, on_stderr, on_result, on_error)
        try:
            async with asyncio.timeout(timeout or None):
                await self._execute(body, listeners)
        except TimeoutError as error:
            raise TimedOut(
                f"the code did not end within {timeout:g} s and was interrupted",
                hint="give it a larger `timeout`, or None for no limit",
            ) from error
        return listeners.execution

    async def _execute(self, body: Mapping[str, Any], listeners: _Listeners) -> None:
        server = self._link.connection.server("running code")
        async with server.open(
            self._link.sandbox_id, CODE_PORT, "/execute", body=body, quiet_s=_QUIET_S
        ) as response:
            async for message in _lines(response):
                if message.get("type") == "end_of_execution":
                    return
                await listeners.take(message)
        raise Unavailable("it was not said how the code ended")

    async def create_context(self, *, language: str = "python", cwd: str = "") -> CodeContext:
        """A context of its own: what is defined in it stays there. Raises Invalid, Unavailable."""
        body = {"language": language, **({"cwd": cwd} if cwd else {})}
        return _context(await self._ask("POST", "/contexts", body))

    async def contexts(self) -> tuple[CodeContext, ...]:
        """All contexts there are. Raises Unavailable."""
        answer = await self._ask("GET", "/contexts")
        if not isinstance(answer, list):
            raise _malformed()
        return tuple(_context(each) for each in answer)

    async def remove_context(self, context: CodeContext | str) -> None:
        """End a context and all it knows. Raises NotFound."""
        await self._ask("DELETE", f"/contexts/{_id_of(context)}")

    async def restart_context(self, context: CodeContext | str) -> None:
        """Begin a context anew, with nothing defined. Raises NotFound."""
        await self._ask("POST", f"/contexts/{_id_of(context)}/restart")

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        server = self._link.connection.server("running code")
        async with server.open(
            self._link.sandbox_id, CODE_PORT, path, method=method, body=body, quiet_s=_CONTEXT_S
        ) as response:
            answer = bytearray()
            async for piece in response.aiter_bytes():
                answer += piece
                if len(answer) > _MAX_LINE_BYTES:
                    raise _malformed()
        return _parsed(bytes(answer)) if answer else None


class _Listeners:
    """Whom an execution is told, and the whole of it."""

    def __init__(
        self,
        on_stdout: OnEach[CodeOutput] | None,
        on_stderr: OnEach[CodeOutput] | None,
        on_result: OnEach[Result] | None,
        on_error: OnEach[ExecutionError] | None,
    ) -> None:
        self.execution = Execution()
        self._on_output = {"stdout": on_stdout, "stderr": on_stderr}
        self._on_result = on_result
        self._on_error = on_error

    async def take(self, message: Mapping[str, Any]) -> None:
        """Note a message; one of a kind that this release does not know is let go."""
        kind = message.get("type")
        if kind in {"stdout", "stderr"}:
            await self._take_output(kind, message)
        elif kind == "result":
            known = {name: value for name, value in message.items() if name in _RESULT_FIELDS}
            result = Result(**known | {"extra": message.get("extra") or {}})
            self.execution.results.append(result)
            await call(self._on_result, result)
        elif kind == "error":
            error = ExecutionError(
                **{each.name: str(message.get(each.name, "")) for each in fields(ExecutionError)}
            )
            self.execution.error = error
            await call(self._on_error, error)
        elif kind == "number_of_executions":
            count = message.get("execution_count")
            self.execution.execution_count = count if isinstance(count, int) else None

    async def _take_output(self, kind: str, message: Mapping[str, Any]) -> None:
        said = str(message.get("text", ""))
        (self.execution.logs.stdout if kind == "stdout" else self.execution.logs.stderr).append(
            said
        )
        output = CodeOutput(
            text=said, timestamp=_seconds(message.get("timestamp")), is_error=kind == "stderr"
        )
        await call(self._on_output[kind], output)


def _seconds(timestamp: object) -> float:
    """What is told in nanoseconds."""
    return timestamp / 1e9 if isinstance(timestamp, int | float) else 0.0


def _id_of(context: CodeContext | str) -> str:
    context_id = context if isinstance(context, str) else context.id
    if not context_id or not all(each.isalnum() or each in "-_" for each in context_id):
        raise Invalid(f"{context_id[:80]!r} is no id of a context")
    return context_id


def _context(answer: object) -> CodeContext:
    if not isinstance(answer, dict):
        raise _malformed()
    return CodeContext(
        **{each.name: str(answer.get(each.name) or "") for each in fields(CodeContext)}
    )


async def _lines(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    pending = bytearray()
    async for piece in response.aiter_bytes():
        searched = len(pending)
        pending += piece
        while (end := pending.find(b"\n", searched)) >= 0:
            line, searched = bytes(memoryview(pending)[:end]), 0
            del pending[: end + 1]
            if line.strip():
                message = _parsed(line)
                if not isinstance(message, dict):
                    raise _malformed()
                yield message
        if len(pending) > _MAX_LINE_BYTES:
            raise _malformed()


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed() from error


def _malformed() -> Unavailable:
    return Unavailable(
        "what the interpreter answers is malformed",
        hint="was the sandbox made from `code-interpreter-v1`?",
    )
