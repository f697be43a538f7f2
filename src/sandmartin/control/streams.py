"""WebSockets into a sandbox: a command as it runs, and a terminal.

Every message is one JSON object with a `type`; bytes are base64 in `data`. A client that starts
or connects with `binary: true` is sent output as binary messages instead: one byte, 1 for
standard output and 2 for standard error, then the bytes. A binary message of a client is input.
One that starts or connects with a `window` is sent no more than about so many bytes of output
until it says, by `taken` with `bytes`, how many it is done with: a browser reads whatever comes,
and would else be flooded.

- First, unless a header or a cookie says who connects, within some seconds: `auth` with `token`.
- Then `start` with what to run, or `connect` with the `pid` or `tag` of what runs.
- A command is answered `start` (pid, tag), `stdout`, `stderr`, `exit` (exit_code, signal, error);
  it takes `stdin` (data), `stdin_close`, `signal` (signal), and `stop`, which kills it.
- A terminal is answered `started` (pid, tag), `output`, `exit`; it takes `input` (data), `resize`
  (cols, rows) and `kill`.
- `ping` comes now and then and wants no answer. `error` has `code`, `message`, `hint` and
  `retryable`; where `fatal` is true the connection ends.

Where the key is revoked, the session over, or the member removed, the connection ends within a
second.

A client that hangs up ends nothing but its own listening. A slow one slows down the command, and
one whose command does not read waits: queues are bounded, nothing in them is left out.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sandmartin.control.api.access import caller_of, key_of, platform_of, request_id_of
from sandmartin.control.api.commands import (
    Run,
    error_message,
    event_message,
    find_pid,
    signal_number,
)
from sandmartin.control.caller import Caller
from sandmartin.control.defaults import with_defaults
from sandmartin.control.entrance import enter
from sandmartin.errors import (
    Conflict,
    Denied,
    Invalid,
    NotFound,
    NotStarted,
    SandmartinError,
    TimedOut,
    Unauthenticated,
)
from sandmartin.model import random_id
from sandmartin.transport import Ended, ExecEvent, PtySize, Started, Stderr, Stdout
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)
router = APIRouter()

_AUTH_S = 5.0
#: For the message that says what to do.
_OPENING_S = 30.0
_PING_S = 30.0
_INPUTS = 64
_SIGKILL = 9
_ENDED, _REFUSED, _BROKEN = 1000, 1008, 1011
_REFUSALS = (Unauthenticated, Denied, NotFound, Conflict, Invalid, NotStarted)

Message = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)


class _Opening(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    binary: bool = False
    window: int = Field(0, ge=0, le=1 << 30, description="In bytes; 0 is without a bound.")


class _Start(_Opening, Run):
    stdin: bool = True


class _PtyStart(_Opening, Run):
    cmd: str = Field("/bin/bash", min_length=1, max_length=1 << 17)
    cols: int = Field(80, ge=1, le=4096)
    rows: int = Field(24, ge=1, le=4096)


class _Connect(_Opening):
    pid: int | None = None
    tag: str = ""


class _Resize(_Opening):
    cols: int = Field(ge=1, le=4096)
    rows: int = Field(ge=1, le=4096)


class _Taken(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    bytes: int = Field(ge=0, le=1 << 40)


class _HungUp(Exception):
    """The client is gone."""


class Socket:
    """An accepted WebSocket, and its messages."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def receive(self) -> Message:
        """The next message; a binary one is input. Raises Invalid, _HungUp."""
        try:
            received = await self._websocket.receive()
        except WebSocketDisconnect as error:
            raise _HungUp from error
        if received["type"] != "websocket.receive":
            raise _HungUp
        if (data := received.get("bytes")) is not None:
            return {"type": "binary", "data": data}
        try:
            message = json.loads(received["text"])
        except (ValueError, RecursionError) as error:
            raise Invalid("a message is no JSON") from error
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise Invalid("a message is no object with a `type`")
        return message

    async def send(self, kind: str, **fields: Any) -> None:
        """Raises _HungUp."""
        text = json.dumps({"type": kind, **fields}, separators=(",", ":"))
        await self._send({"type": "websocket.send", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        """Raises _HungUp."""
        await self._send({"type": "websocket.send", "bytes": data})

    async def _send(self, message: Message) -> None:
        try:
            await self._websocket.send(message)
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            raise _HungUp from error

    async def close(self, code: int, reason: str = "") -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            await self._websocket.close(code, reason)


# Who connects.


async def _who(websocket: WebSocket, socket: Socket) -> Caller:
    """Who connects. Raises Unauthenticated, Denied."""
    try:
        return await caller_of(websocket)
    except Unauthenticated:
        if key_of(websocket):
            raise
    keys, token = platform_of(websocket).keys, await _first_token(socket)
    address = websocket.client.host if websocket.client else ""
    return await keys.caller(token, request_id=request_id_of(websocket), address=address)


async def _found(caller: Caller) -> Caller:
    return caller


async def _no_longer(lost: asyncio.Event) -> None:
    await lost.wait()
    raise Unauthenticated("whoever opened this would not be let in any more")


async def _first_token(socket: Socket) -> str:
    try:
        async with asyncio.timeout(_AUTH_S):
            message = await socket.receive()
    except TimeoutError as error:
        raise Unauthenticated("nobody said who connects", hint="send `auth` first") from error
    token = message.get("token")
    if message["type"] != "auth" or not isinstance(token, str) or not token:
        raise Unauthenticated(
            "nobody said who connects",
            hint="send X-API-Key, or a first message `auth` with `token`",
        )
    return token


# Sessions.


@dataclass(frozen=True)
class _Words:
    """What differs between a command and a terminal on the wire."""

    start: type[Run]
    started: str
    stdout: str
    input: str
    kill: str


_COMMAND = _Words(_Start, "start", "stdout", "stdin", "stop")
_TERMINAL = _Words(_PtyStart, "started", "output", "input", "kill")


class _Window:
    """How much output is on its way to a client that says what it is done with."""

    def __init__(self) -> None:
        #: 0 is without a bound.
        self.size_bytes = 0
        self._on_its_way = 0
        self._room = asyncio.Event()

    async def sent(self, size_bytes: int) -> None:
        """Wait until there is room for more."""
        self._on_its_way += size_bytes
        while 0 < self.size_bytes <= self._on_its_way:
            self._room.clear()
            await self._room.wait()

    def taken(self, size_bytes: int) -> None:
        self._on_its_way = max(0, self._on_its_way - size_bytes)
        self._room.set()


class _Session:
    """One client and one process."""

    #: Binary messages begin with it.
    _CHANNELS: ClassVar[dict[type[ExecEvent], bytes]] = {Stdout: b"\1", Stderr: b"\2"}

    def __init__(
        self,
        socket: Socket,
        agent: Agent,
        sandbox_id: str,
        words: _Words,
        defaults: Mapping[str, Any],
    ) -> None:
        self._socket = socket
        self._agent = agent
        self._defaults = defaults
        self._sandbox_id = sandbox_id
        self._words = words
        self._pid = 0
        self._tag = ""
        self._binary = False
        self._window = _Window()
        self._started = asyncio.Event()
        #: None is the end.
        self._inputs: asyncio.Queue[bytes | None] = asyncio.Queue(_INPUTS)

    async def run(self, opening: Message | None = None) -> None:
        """Serve until the process ends. Raises what went wrong, _HungUp."""
        opening = opening or await self._opening()
        async with contextlib.aclosing(await self._open(opening)) as events:
            await _first_of(self._tell(events), self._listen(), self._feed(), self._keep_alive())

    async def _opening(self) -> Message:
        try:
            async with asyncio.timeout(_OPENING_S):
                return await self._socket.receive()
        except TimeoutError as error:
            raise TimedOut("nothing was asked for", hint="send `start` or `connect`") from error

    async def _open(self, opening: Message) -> AsyncGenerator[ExecEvent, None]:
        """What the opening message asks for. Raises Invalid, NotFound."""
        if opening["type"] == "connect":
            asked = _checked(_Connect, opening)
            named = str(asked.pid) if asked.pid is not None else asked.tag
            self._pid = await find_pid(self._agent, self._sandbox_id, named)
            self._tag = asked.tag
            self._send_as(asked)
            return self._agent.connect_process(self._sandbox_id, self._pid)
        if opening["type"] != "start":
            raise Invalid("the first message is no `start` and no `connect`")
        start = _checked(self._words.start, opening)
        if isinstance(start, _PtyStart):
            start.tag = start.tag or f"pty-{random_id(8)}"
            self._send_as(start)
            command = start.command(pty=PtySize(start.cols, start.rows))
        else:
            assert isinstance(start, _Start)
            self._send_as(start)
            command = start.command(stdin=start.stdin)
        self._tag = start.tag
        command = with_defaults(command, self._defaults)
        return self._agent.exec_stream(self._sandbox_id, command)

    def _send_as(self, opening: _Opening) -> None:
        self._binary, self._window.size_bytes = opening.binary, opening.window

    # What the process says.

    async def _tell(self, events: AsyncGenerator[ExecEvent, None]) -> None:
        async for event in events:
            if isinstance(event, Started):
                self._pid = event.pid
                await self._socket.send(self._words.started, pid=event.pid, tag=self._tag)
                self._started.set()
            elif isinstance(event, Stdout | Stderr) and self._binary:
                await self._socket.send_bytes(self._CHANNELS[type(event)] + event.data)
            else:
                kind, fields = event_message(event)
                kind = self._words.stdout if kind == "stdout" else kind
                await self._socket.send(kind, **fields)
            if isinstance(event, Stdout | Stderr):
                await self._window.sent(len(event.data))
            elif isinstance(event, Ended):
                return

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            await self._socket.send("ping")

    # What the client says.

    async def _listen(self) -> None:
        await self._started.wait()
        while True:
            try:
                await self._heed(await self._socket.receive())
            except (Invalid, NotFound, Conflict) as error:
                # The process goes on, and whoever made a mistake may try again.
                await self._socket.send("error", **error_message(error), fatal=False)

    async def _heed(self, message: Message) -> None:
        kind = message["type"]
        if kind == "binary":
            await self._inputs.put(message["data"])
        elif kind == self._words.input:
            await self._inputs.put(_decoded(message.get("data")))
        elif kind == self._words.kill:
            await self._signal(_SIGKILL)
        elif kind == "signal":
            await self._signal(signal_number(str(message.get("signal"))))
        elif kind == "taken":
            self._window.taken(_checked(_Taken, message).bytes)
        elif kind == "stdin_close" and self._words is _COMMAND:
            await self._inputs.put(None)
        elif kind == "resize" and self._words is _TERMINAL:
            size = _checked(_Resize, message)
            await self._agent.resize_pty(self._sandbox_id, self._pid, PtySize(size.cols, size.rows))
        else:
            raise Invalid(f"there is no message {kind[:40]!r} here")

    async def _signal(self, number: int) -> None:
        await self._agent.send_signal(self._sandbox_id, self._pid, number)

    async def _feed(self) -> None:
        """Input for as long as the process takes some; what comes after that is let go."""
        first = await self._inputs.get()
        try:
            if first is not None:
                await self._agent.send_stdin(self._sandbox_id, self._pid, self._fed(first))
            else:
                await self._agent.send_stdin(self._sandbox_id, self._pid, _nothing())
        except SandmartinError as error:
            await self._socket.send("error", **error_message(error), fatal=False)
        while True:
            await self._inputs.get()

    async def _fed(self, first: bytes) -> AsyncIterator[bytes]:
        data: bytes | None = first
        while data is not None:
            yield data
            data = await self._inputs.get()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def _decoded(data: object) -> bytes:
    try:
        return base64.b64decode(str(data or ""), validate=True)
    except ValueError as error:
        raise Invalid("`data` is no base64") from error


def _checked(model: type[_Model], message: Message) -> _Model:
    try:
        return model.model_validate(message)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid(f"{message['type'][:40]}: {where}: {first['msg']}") from error


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Do all until the first ends, and raise what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if task in done:
            task.result()


async def _serve(
    websocket: WebSocket, sandbox_id: str, words: _Words, opening: Message | None = None
) -> None:
    await websocket.accept()
    socket = Socket(websocket)
    try:
        caller, platform = await _who(websocket, socket), platform_of(websocket)
        with platform.trust.watching(caller) as lost:
            found = partial(_found, caller)
            agent, defaults = await enter(platform.db, platform.sandboxes, found, sandbox_id)
            session = _Session(socket, agent, sandbox_id, words, defaults)
            await _first_of(session.run(opening), _no_longer(lost))
    except _HungUp:
        return
    except SandmartinError as error:
        with contextlib.suppress(_HungUp):
            await socket.send("error", **error_message(error), fatal=True)
        await socket.close(_REFUSED if isinstance(error, _REFUSALS) else _BROKEN, error.code)
        return
    await socket.close(_ENDED)


@router.websocket("/{sandbox_id}/exec/stream")
async def execute(websocket: WebSocket, sandbox_id: str) -> None:
    await _serve(websocket, sandbox_id, _COMMAND)


@router.websocket("/{sandbox_id}/processes/{process}/stream")
async def connect(websocket: WebSocket, sandbox_id: str, process: str) -> None:
    which = {"pid": int(process)} if process.isascii() and process.isdigit() else {"tag": process}
    await _serve(websocket, sandbox_id, _COMMAND, {"type": "connect", **which})


@router.websocket("/{sandbox_id}/pty")
async def terminal(websocket: WebSocket, sandbox_id: str) -> None:
    await _serve(websocket, sandbox_id, _TERMINAL)
