"""Commands of a sandbox: run to their end, in the background, or as a stream of events.

A command goes on when its client hangs up; its time limit ends it, or a signal. What a command
says is kept up to a bound, and what is left out is told.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import signal as signals
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sandmartin.control.api.access import ThePlatform
from sandmartin.control.api.bodies import RAW_BODY, Streamed, begun, pieces_of
from sandmartin.control.api.inside import Inside, TheInside
from sandmartin.control.defaults import with_defaults
from sandmartin.errors import Invalid, NotFound, SandmartinError, TimedOut
from sandmartin.model import DEFAULT_EXEC_TIMEOUT_S
from sandmartin.transport import (
    Command,
    Ended,
    ExecEvent,
    Process,
    PtySize,
    Started,
    Stderr,
    Stdout,
)
from sandmartin.transport.agent import Agent

router = APIRouter(tags=["commands"])

#: What is kept of the output of one command; base64 and JSON make half as much again of it.
_MAX_OUTPUT_BYTES = 16 << 20
_QUIET_S = 15.0
_MAX_TIMEOUT_S = 7 * 24 * 3600
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")
_T = TypeVar("_T")


class Run(BaseModel):
    """A program to run, found in the user's PATH; no shell is between."""

    model_config = ConfigDict(extra="forbid")

    cmd: str = Field(min_length=1, max_length=1 << 17)
    args: list[str] = Field(default_factory=list, max_length=1 << 14)
    envs: dict[str, str] = Field(default_factory=dict)
    cwd: str = Field("", max_length=4096, description="Empty is that of the template, or the home.")
    user: str = Field("", max_length=256, description="Empty is the template's, or root.")
    tag: str = Field("", description="A name for it: letters, digits, `.`, `_` and `-`.")
    timeout_sec: int | None = Field(
        None, ge=0, le=_MAX_TIMEOUT_S, description="When it is killed; 0 is never."
    )

    @field_validator("tag")
    @classmethod
    def _is_a_name(cls, tag: str) -> str:
        if tag and not _TAG.fullmatch(tag):
            raise ValueError("a tag begins with a letter and has letters, digits, . _ and - only")
        return tag

    def command(self, default_timeout_s: int = 0, **more: Any) -> Command:
        """The same for an agent; without a limit when that is 0."""
        timeout_s = default_timeout_s if self.timeout_sec is None else self.timeout_sec
        return Command(
            cmd=self.cmd,
            args=tuple(self.args),
            envs=self.envs,
            cwd=self.cwd,
            user=self.user,
            tag=self.tag,
            timeout_s=timeout_s or None,
            **more,
        )


class PtyBody(BaseModel):
    """A terminal, in characters."""

    model_config = ConfigDict(extra="forbid")

    cols: int = Field(80, ge=1, le=4096)
    rows: int = Field(24, ge=1, le=4096)

    def size(self) -> PtySize:
        return PtySize(self.cols, self.rows)


class Stream(Run):
    stdin: bool = Field(False, description="Keep standard input open; else it is empty.")
    pty: PtyBody | None = Field(
        None, description="Run it on a terminal: all output is `stdout`, and input is open."
    )


class Exec(Run):
    background: bool = Field(False, description="Answer as soon as it runs.")


class ResultBody(BaseModel):
    """How a command ended, and what it said."""

    stdout: str
    stderr: str
    exit_code: int = Field(description="128 + signal when a signal ended it.")
    duration_ms: int
    encoding: Literal["utf-8", "base64"] = Field(description="Of stdout and stderr.")
    truncated: bool = Field(description="There was more output than is kept.")


class BackgroundBody(BaseModel):
    """A command that runs."""

    pid: int
    tag: str


class ProcessBody(BaseModel):
    """A process that was started by a call and runs."""

    pid: int
    tag: str
    cmd: str
    args: list[str]
    cwd: str

    @classmethod
    def of(cls, process: Process) -> ProcessBody:
        return cls(**{**vars(process), "args": list(process.args)})


class Processes(BaseModel):
    processes: list[ProcessBody]


class _Output:
    """What a command said, up to the bound."""

    def __init__(self) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self.truncated = False

    def take(self, event: Stdout | Stderr) -> None:
        room = _MAX_OUTPUT_BYTES - len(self.stdout) - len(self.stderr)
        self.truncated = self.truncated or len(event.data) > room
        kept = self.stdout if isinstance(event, Stdout) else self.stderr
        kept += event.data[:room]

    def texts(self) -> tuple[str, str, Literal["utf-8", "base64"]]:
        try:
            return self.stdout.decode(), self.stderr.decode(), "utf-8"
        except UnicodeDecodeError:
            out, err = (base64.b64encode(each).decode() for each in (self.stdout, self.stderr))
            return out, err, "base64"


@router.post(
    "/{sandbox_id}/exec",
    response_model=ResultBody,
    responses={202: {"model": BackgroundBody, "description": "It runs in the background."}},
)
async def execute(body: Exec, inside: TheInside) -> ResultBody | Response:
    """Run a command to its end, or in the background."""
    if body.background:
        started = await _start(inside, with_defaults(body.command(), inside.defaults))
        return JSONResponse({"pid": started.pid, "tag": body.tag}, 202)
    command = with_defaults(body.command(DEFAULT_EXEC_TIMEOUT_S), inside.defaults)
    begun_at = time.monotonic()
    output, end = _Output(), None
    async with contextlib.aclosing(inside.agent.exec_stream(inside.sandbox_id, command)) as events:
        async for event in events:
            if isinstance(event, Stdout | Stderr):
                output.take(event)
            elif isinstance(event, Ended):
                end = event
    if end is None:
        raise SandmartinError("the command's end was not told")
    if end.error:
        raise TimedOut(
            f"the command did not end within {command.timeout_s} s and was killed",
            hint="set timeout_sec, run it in the background, or listen to /exec/stream",
        )
    stdout, stderr, encoding = output.texts()
    return ResultBody(
        stdout=stdout,
        stderr=stderr,
        exit_code=end.exit_code,
        duration_ms=round((time.monotonic() - begun_at) * 1000),
        encoding=encoding,
        truncated=output.truncated,
    )


async def _start(inside: Inside, command: Command) -> Started:
    async with contextlib.aclosing(inside.agent.exec_stream(inside.sandbox_id, command)) as events:
        async for event in events:
            if isinstance(event, Started):
                return event
    raise SandmartinError("the command's start was not told")


# Events.


def event_message(event: ExecEvent) -> tuple[str, dict[str, Any]]:
    """An event's kind and fields, as streams tell it; bytes are base64."""
    match event:
        case Started(pid):
            return "start", {"pid": pid}
        case Stdout(data):
            return "stdout", {"data": base64.b64encode(data).decode()}
        case Stderr(data):
            return "stderr", {"data": base64.b64encode(data).decode()}
        case Ended():
            return "exit", {
                "exit_code": event.exit_code,
                "signal": event.signal,
                "error": event.error,
            }


def error_message(error: SandmartinError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "retryable": error.retryable,
    }


@router.post(
    "/{sandbox_id}/exec/stream",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Its events."}},
)
async def stream(body: Stream, inside: TheInside, platform: ThePlatform) -> Response:
    """Run a command and tell of it as it happens, in server-sent events.

    `start` has a `pid`; `stdout` and `stderr` have `data` in base64; `exit` has `exit_code`,
    `signal` and `error`, which says why when the time limit ended it; `error` is an error. A
    client that hangs up does not end the command.
    """
    pty = body.pty.size() if body.pty else None
    command = with_defaults(body.command(stdin=body.stdin, pty=pty), inside.defaults)
    events = inside.agent.exec_stream(inside.sandbox_id, command)
    return _told(await begun(_server_sent(events)), platform.trust.watching(inside.caller))


@router.get(
    "/{sandbox_id}/processes/{process}/stream",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Its events."}},
)
async def connect(process: str, inside: TheInside, platform: ThePlatform) -> Response:
    """Listen to a process that runs, by pid or tag; what nobody heard yet comes first."""
    pid = await find_pid(inside.agent, inside.sandbox_id, process)
    events = inside.agent.connect_process(inside.sandbox_id, pid)
    return _told(await begun(_server_sent(events)), platform.trust.watching(inside.caller))


def _told(
    pieces: AsyncGenerator[bytes, None], lost: AbstractContextManager[asyncio.Event]
) -> Response:
    # The last tells nginx not to wait for more before it passes an event on.
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return Streamed(pieces, "text/event-stream", headers, lost)


async def _server_sent(events: AsyncGenerator[ExecEvent, None]) -> AsyncGenerator[bytes, None]:
    told = False
    try:
        async with contextlib.aclosing(or_quiet(events, _QUIET_S)) as heard:
            async for event in heard:
                # A comment, so that nobody between takes the silence for an end.
                yield b":\n\n" if event is None else _sse(*event_message(event))
                told = True
    except SandmartinError as error:
        if not told:
            raise
        yield _sse("error", error_message(error))


def _sse(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(fields, separators=(',', ':'))}\n\n".encode()


async def or_quiet(
    items: AsyncGenerator[_T, None], quiet_s: float
) -> AsyncGenerator[_T | None, None]:
    """The same items, and None whenever none came for so long."""
    async with contextlib.aclosing(items):
        upcoming: asyncio.Future[_T] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(_next(items))
                await asyncio.wait({upcoming}, timeout=quiet_s)
                if not upcoming.done():
                    yield None
                    continue
                try:
                    item = upcoming.result()
                except StopAsyncIteration:
                    return
                upcoming = None
                yield item
        finally:
            if upcoming is not None:
                upcoming.cancel()
                await asyncio.wait({upcoming})


async def _next(items: AsyncIterator[_T]) -> _T:
    return await anext(items)


# Processes.


@router.get("/{sandbox_id}/processes")
async def list_processes(inside: TheInside) -> Processes:
    """What was started by a call and runs."""
    found = await inside.agent.list_processes(inside.sandbox_id)
    return Processes(processes=[ProcessBody.of(each) for each in found])


@router.delete("/{sandbox_id}/processes/{process}", status_code=204)
async def send_signal(process: str, inside: TheInside, signal: str = "SIGTERM") -> Response:
    """Signal a process, by pid or tag; SIGKILL ends all that it started too."""
    number = signal_number(signal)
    pid = await find_pid(inside.agent, inside.sandbox_id, process)
    await inside.agent.send_signal(inside.sandbox_id, pid, number)
    return Response(status_code=204)


@router.post("/{sandbox_id}/processes/{process}/stdin", status_code=204, openapi_extra=RAW_BODY)
async def send_stdin(process: str, request: Request, inside: TheInside) -> Response:
    """Feed the standard input of a process, by pid or tag, as it comes.

    It is closed at the end of the body, which may be as long and as slow as it likes.
    """
    pid = await find_pid(inside.agent, inside.sandbox_id, process)
    await inside.agent.send_stdin(inside.sandbox_id, pid, pieces_of(request))
    return Response(status_code=204)


@router.post("/{sandbox_id}/processes/{process}/resize", status_code=204)
async def resize(process: str, body: PtyBody, inside: TheInside) -> Response:
    """Resize the terminal of a process, by pid or tag; one without a terminal is a conflict."""
    pid = await find_pid(inside.agent, inside.sandbox_id, process)
    await inside.agent.resize_pty(inside.sandbox_id, pid, body.size())
    return Response(status_code=204)


def signal_number(signal: str | int) -> int:
    """The number of a signal that is given by name or number. Raises Invalid."""
    text = str(signal).upper()
    if text.isdecimal() and 1 <= int(text[:4]) <= 64:
        return int(text)
    name = text if text.startswith("SIG") else f"SIG{text}"
    if name in signals.Signals.__members__:
        return int(signals.Signals[name])
    raise Invalid(
        f"there is no signal {str(signal)[:40]!r}", hint="use SIGTERM, SIGKILL or 1 to 64"
    )


async def find_pid(agent: Agent, sandbox_id: str, process: str) -> int:
    """The pid of a process that is given by pid or tag. Raises NotFound."""
    if process.isdecimal():
        if len(process) > 10 or not 0 < int(process) < 1 << 32:
            raise NotFound(f"there is no process {process[:80]!r}")
        return int(process)
    for each in await agent.list_processes(sandbox_id):
        if each.tag == process:
            return each.pid
    raise NotFound(f"no process with the tag {process[:80]!r} runs")
