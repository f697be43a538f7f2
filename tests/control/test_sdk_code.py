"""The SDK's way to the interpreter, through a real control plane, proxy and agent.

The interpreter is one of the tests, which speaks its protocol; the real one is in the template.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sandmartin import AsyncSandbox, CodeContext, CodeOutput, ExecutionError, Result, Sandbox
from sandmartin.client.server import CODE_PORT
from sandmartin.errors import Invalid, NotFound, TimedOut, Unavailable
from tests.control.conftest import make_team, running_host, served_platform
from tests.control.inside import Inside, listening

DEADLINE_S = 20.0
PNG = base64.b64encode(b"\x89PNG").decode()
RESULT = {
    "type": "result",
    "text": "42",
    "html": "<b>42</b>",
    "png": PNG,
    "data": {"a": [1, 2]},
    "chart": {"type": "line"},
    "extra": {"x/y": "z"},
    "is_main_result": True,
    "newer": 1,
}
SAID: list[dict[str, Any]] = [
    {"type": "number_of_executions", "execution_count": 3},
    {"type": "stdout", "text": "one\n", "timestamp": 1_700_000_000_000_000_000},
    {"type": "keepalive"},
    {"type": "stderr", "text": "two\n", "timestamp": 1},
    {"type": "something newer"},
    {"type": "result", "text": "shown", "is_main_result": False},
    RESULT,
    {"type": "end_of_execution"},
]


@dataclass
class Interpreter:
    """What it is asked, and what it answers."""

    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    says: list[dict[str, Any]] = field(default_factory=lambda: list(SAID))
    contexts: dict[str, str] = field(default_factory=dict)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)
    hangs: bool = False

    async def serve(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        method, target, _ = head.decode().split(" ", 2)
        lengths = [line for line in head.lower().split(b"\r\n") if b"content-length" in line]
        body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
        self.asked.append((f"{method} {target}", json.loads(body or b"{}")))
        if target == "/execute":
            await self._execute(reader, writer)
        else:
            status, answer = self._on_context(method, target, json.loads(body or b"{}"))
            _answer(writer, status, answer)

    async def _execute(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for each in self.says:
            line = json.dumps(each).encode() + b"\n"
            # In pieces that are no lines.
            for piece in (line[:5], line[5:]):
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        if self.hangs:
            await reader.read()
            self.hung_up.set()
            return
        writer.write(b"0\r\n\r\n")

    def _on_context(self, method: str, target: str, body: dict[str, Any]) -> tuple[str, object]:
        parts = target.split("/")
        if len(parts) > 2 and parts[2] not in self.contexts:
            return "404 Not Found", f"context {parts[2]} is unknown"
        if method == "POST" and len(parts) == 2:
            self.contexts["c1"] = body["language"]
            return "200 OK", {"id": "c1", **body}
        if method == "DELETE":
            self.contexts.pop(parts[2])
        if method != "GET":
            return "204 No Content", None
        found = [{"id": name, "language": each, "cwd": "/"} for name, each in self.contexts.items()]
        return "200 OK", found


def _answer(writer: asyncio.StreamWriter, status: str, answer: object) -> None:
    body = b"" if answer is None else json.dumps(answer).encode()
    body = answer.encode() if isinstance(answer, str) else body
    length = "" if answer is None else f"Content-Length: {len(body)}\r\n"
    writer.write(f"HTTP/1.1 {status}\r\n{length}Connection: close\r\n\r\n".encode() + body)


@pytest.fixture
async def served(
    migrated_sqlite: Path, tmp_path: Path
) -> AsyncIterator[tuple[AsyncSandbox, Interpreter, Inside]]:
    shutil.copy(migrated_sqlite, tmp_path / "control.sqlite3")
    url = f"sqlite:///{tmp_path / 'control.sqlite3'}"
    interpreter = Interpreter()
    async with AsyncExitStack() as stack:
        inside = await stack.enter_async_context(listening(interpreter.serve))
        host = await stack.enter_async_context(running_host())
        host.fakes.guests.ports[CODE_PORT] = inside.port
        platform, at = await stack.enter_async_context(served_platform(url, tmp_path, host))
        _, key = await make_team(platform)
        sandbox = await AsyncSandbox.create(memory_mb=128, disk_size_mb=8, url=at, api_key=key)
        yield sandbox, interpreter, inside


async def test_code_gives_results(served: tuple[AsyncSandbox, Interpreter, Inside]) -> None:
    sandbox, interpreter, inside = served
    heard: list[object] = []
    execution = await sandbox.run_code(
        "6 * 7",
        envs={"A": "1"},
        on_stdout=heard.append,
        on_stderr=heard.append,
        on_result=heard.append,
    )
    (asked,) = interpreter.asked
    assert asked == (
        "POST /execute",
        {"code": "6 * 7", "language": None, "context_id": None, "env_vars": {"A": "1"}},
    )
    assert inside.header("x-api-key") == [] and inside.header("e2b-traffic-access-token") == []
    assert (execution.text, execution.execution_count, execution.error) == ("42", 3, None)
    assert (execution.stdout, execution.stderr) == ("one\n", "two\n")
    shown, main = execution.results
    assert (str(shown), shown.is_main_result) == ("shown", False)
    assert main.formats() == ("text", "html", "png", "data", "chart")
    assert (main._repr_html_(), main._repr_png_(), main.extra) == (
        "<b>42</b>",
        b"\x89PNG",
        {"x/y": "z"},
    )
    assert main._repr_mimebundle_() == {
        "text/plain": "42",
        "text/html": "<b>42</b>",
        "image/png": PNG,
    }
    assert heard == [
        CodeOutput(text="one\n", timestamp=1_700_000_000.0, is_error=False),
        CodeOutput(text="two\n", timestamp=1e-9, is_error=True),
        shown,
        main,
    ]


async def test_an_error_is_part_of_the_answer(
    served: tuple[AsyncSandbox, Interpreter, Inside],
) -> None:
    sandbox, interpreter, _ = served
    told = {"name": "ValueError", "value": "bad", "traceback": "Traceback"}
    interpreter.says = [{"type": "error", **told}, {"type": "end_of_execution"}]
    heard: list[ExecutionError] = []
    execution = await sandbox.run_code("x", language="python", on_error=heard.append)
    assert heard == [execution.error] and str(execution.error) == "ValueError: bad"
    assert execution.text is None
    interpreter.says = [{"type": "stdout", "text": "x"}]
    with pytest.raises(Unavailable, match="how the code ended"):
        await sandbox.run_code("x")
    with pytest.raises(Invalid):
        await sandbox.run_code("x", language="r", context="c1")


async def test_a_time_limit_hangs_up(served: tuple[AsyncSandbox, Interpreter, Inside]) -> None:
    sandbox, interpreter, _ = served
    interpreter.says, interpreter.hangs = [{"type": "stdout", "text": "x"}], True
    with pytest.raises(TimedOut, match=r"within 0\.5 s"):
        await sandbox.run_code("while True: pass", timeout=0.5)
    async with asyncio.timeout(DEADLINE_S):
        await interpreter.hung_up.wait()


async def test_contexts(served: tuple[AsyncSandbox, Interpreter, Inside]) -> None:
    sandbox, interpreter, _ = served
    made = await sandbox.create_code_context(language="javascript", cwd="/tmp")
    assert made == CodeContext(id="c1", language="javascript", cwd="/tmp")
    assert [each.id for each in await sandbox.list_code_contexts()] == ["c1"]
    await sandbox.run_code("1", context=made)
    assert interpreter.asked[-1][1]["context_id"] == "c1"
    await sandbox.restart_code_context(made)
    await sandbox.remove_code_context("c1")
    with pytest.raises(NotFound, match="c1 is unknown"):
        await sandbox.remove_code_context(made)
    with pytest.raises(Invalid):
        await sandbox.remove_code_context("../health")


async def test_for_those_who_wait(served: tuple[AsyncSandbox, Interpreter, Inside]) -> None:
    sandbox, _, _ = served
    heard: list[Result] = []
    waiting = Sandbox(sandbox)
    execution = await asyncio.to_thread(lambda: waiting.run_code("1", on_result=heard.append))
    assert execution.results == heard


async def test_a_sandbox_that_does_not_run_says_so(
    served: tuple[AsyncSandbox, Interpreter, Inside],
) -> None:
    sandbox, _, _ = served
    await sandbox.pause()
    with pytest.raises(NotFound, match="does not run"):
        await sandbox.run_code("1")
