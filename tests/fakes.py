"""Fakes that stand in for a whole neighbour, so that nothing of ours has to be patched.

`FakeTransport` is the client's seam with sandboxes that are entries in a table. `LocalAgent` is
an agent without VMs: the real contract over a real unix socket, whose commands are processes of
this machine in a directory of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.request import RequestContext
from protobuf import Oneof

from sandmartin.client.transport import (
    Command,
    CreatedSandbox,
    ExecEvent,
    NewSandbox,
    SandboxInfo,
)
from sandmartin.errors import AlreadyExists, NotFound, SandmartinError
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.rpc.hostagent.v1.hostagent_connect import (
    HostAgentService,
    HostAgentServiceASGIApplication,
)

_Context = RequestContext[Any, Any]


class FakeTransport:
    """A Transport whose failures, delays and command output a test sets."""

    def __init__(self) -> None:
        self.sandboxes: dict[str, NewSandbox] = {}
        #: Raised by a create once the sandbox is there: its answer was lost.
        self.lost_answer: SandmartinError | None = None
        self.destroy_error: SandmartinError | None = None
        #: What a command says; an error in its place is raised.
        self.events: list[ExecEvent | SandmartinError] = []
        self.arrived = asyncio.Event()
        #: While not set, creates and destroys wait here after their arrival.
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def _wait(self) -> None:
        self.arrived.set()
        await self.may_go_on.wait()
        self.arrived.clear()

    async def create(self, new: NewSandbox) -> CreatedSandbox:
        if new.sandbox_id in self.sandboxes:
            raise AlreadyExists(f"sandbox {new.sandbox_id} exists already")
        self.sandboxes[new.sandbox_id] = new
        await self._wait()
        if self.lost_answer is not None:
            raise self.lost_answer
        return CreatedSandbox(sandbox_id=new.sandbox_id, state="running")

    async def destroy(self, sandbox_id: str) -> None:
        await self._wait()
        if self.destroy_error is not None:
            raise self.destroy_error
        self.sandboxes.pop(sandbox_id, None)

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        return ()

    async def ping(self, sandbox_id: str) -> None:
        if sandbox_id not in self.sandboxes:
            raise NotFound("no such sandbox")

    async def terminate(self) -> None:
        self.sandboxes.clear()

    async def exec_stream(
        self, sandbox_id: str, command: Command
    ) -> AsyncGenerator[ExecEvent, None]:
        for event in self.events:
            if isinstance(event, SandmartinError):
                raise event
            yield event

    async def send_stdin(self, sandbox_id: str, pid: int, chunks: AsyncIterator[bytes]) -> None:
        async for _ in chunks:
            pass

    async def send_signal(self, sandbox_id: str, pid: int, signal: int) -> None:
        raise NotFound("no such command")

    async def write_file(
        self, sandbox_id: str, path: str, chunks: AsyncIterator[bytes], user: str = ""
    ) -> None:
        async for _ in chunks:
            pass

    async def read_file(
        self, sandbox_id: str, path: str, user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        raise NotFound(f"{path} does not exist")
        yield b""

    async def aclose(self) -> None:
        pass


def refusal(code: Code, name: str, message: str, hint: str = "") -> ConnectError:
    """An error as the agent sends it."""
    return ConnectError(code, message, [pb.ErrorInfo(code=name, hint=hint)])


class LocalAgent(HostAgentService):
    """`hostagent.v1` with processes for VMs, as far as the client's tests ask for it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self.created: list[pb.CreateSandboxRequest] = []
        self.destroyed: list[str] = []
        self.signals: list[int] = []
        #: Commands have no end: their streams stop behind the start.
        self.break_off = False
        #: While not set, creates wait when the sandbox is there already.
        self.may_create = asyncio.Event()
        self.may_create.set()
        #: While not set, destroys wait before they do anything.
        self.may_destroy = asyncio.Event()
        self.may_destroy.set()
        self.destroying: list[str] = []

    @property
    def sandboxes(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir())

    def _directory(self, sandbox_id: str) -> Path:
        path = self._root / sandbox_id
        if not path.is_dir():
            raise refusal(Code.NOT_FOUND, "not_found", f"there is no sandbox {sandbox_id}")
        return path

    def _process(self, pid: int) -> asyncio.subprocess.Process:
        process = self._processes.get(pid)
        if process is None or process.returncode is not None:
            raise refusal(Code.NOT_FOUND, "not_found", f"there is no command {pid}")
        return process

    async def create_sandbox(
        self, request: pb.CreateSandboxRequest, ctx: _Context
    ) -> pb.CreateSandboxResponse:
        if request.template != "base":
            message = f"there is no template {request.template!r}"
            raise refusal(Code.NOT_FOUND, "not_found", message, "the templates here are: base")
        (self._root / request.sandbox_id).mkdir()
        self.created.append(request)
        await self.may_create.wait()
        return pb.CreateSandboxResponse(
            sandbox_id=request.sandbox_id, status="running", host_ip="10.11.0.1"
        )

    async def destroy_sandbox(
        self, request: pb.DestroySandboxRequest, ctx: _Context
    ) -> pb.DestroySandboxResponse:
        self.destroying.append(request.sandbox_id)
        await self.may_destroy.wait()
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        shutil.rmtree(self._root / request.sandbox_id, ignore_errors=True)
        self.destroyed.append(request.sandbox_id)
        return pb.DestroySandboxResponse()

    async def list_sandboxes(
        self, request: pb.ListSandboxesRequest, ctx: _Context
    ) -> pb.ListSandboxesResponse:
        sandboxes = [
            pb.SandboxInfo(sandbox_id=each, status="running", created_at_unix=1_700_000_000)
            for each in self.sandboxes
        ]
        return pb.ListSandboxesResponse(sandboxes=sandboxes)

    async def exec_stream(
        self, request: pb.ExecStreamRequest, ctx: _Context
    ) -> AsyncIterator[pb.ExecStreamResponse]:
        process = await self._start(request)
        yield _event("start", pb.ExecStreamStart(pid=process.pid))
        if self.break_off:
            return
        outputs: asyncio.Queue[pb.ExecStreamData | None] = asyncio.Queue()
        readers = [
            asyncio.create_task(_read(stream, name, outputs))
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr))
        ]
        for _ in readers:
            while (data := await outputs.get()) is not None:
                yield _event("data", data)
        code = await process.wait()
        exit_code, number = (code, 0) if code >= 0 else (128 - code, -code)
        yield _event("end", pb.ExecStreamEnd(exit_code=exit_code, signal=number))

    async def _start(self, request: pb.ExecStreamRequest) -> asyncio.subprocess.Process:
        directory = self._directory(request.sandbox_id)
        try:
            process = await asyncio.create_subprocess_exec(
                request.cmd,
                *request.args,
                cwd=directory,
                env=os.environ | dict(request.envs),
                stdin=asyncio.subprocess.PIPE if request.stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            message = f"{request.cmd}: {error.strerror}"
            raise refusal(Code.FAILED_PRECONDITION, "command_not_started", message) from error
        self._processes[process.pid] = process
        return process

    async def stream_input(
        self, request: AsyncIterator[pb.StreamInputRequest], ctx: _Context
    ) -> pb.StreamInputResponse:
        stdin: asyncio.StreamWriter | None = None
        async for message in request:
            assert message.content is not None
            if message.content.field == "meta":
                stdin = self._process(message.content.value.pid).stdin
                continue
            assert stdin is not None
            try:
                stdin.write(message.content.value)
                await stdin.drain()
            except (BrokenPipeError, ConnectionResetError) as error:
                closed = "standard input is not open"
                raise refusal(Code.FAILED_PRECONDITION, "conflict", closed) from error
        if stdin is not None:
            stdin.close()
        return pb.StreamInputResponse()

    async def send_signal(
        self, request: pb.SendSignalRequest, ctx: _Context
    ) -> pb.SendSignalResponse:
        os.killpg(self._process(request.pid).pid, request.signal)
        self.signals.append(request.signal)
        return pb.SendSignalResponse()

    async def write_file_stream(
        self, request: AsyncIterator[pb.WriteFileStreamRequest], ctx: _Context
    ) -> pb.WriteFileStreamResponse:
        path: Path | None = None
        async for message in request:
            assert message.content is not None
            if message.content.field == "meta":
                meta = message.content.value
                path = self._directory(meta.sandbox_id) / meta.path.lstrip("/")
                path.write_bytes(b"")
                continue
            assert path is not None
            with path.open("ab") as file:
                file.write(message.content.value)
        return pb.WriteFileStreamResponse()

    async def read_file_stream(
        self, request: pb.ReadFileStreamRequest, ctx: _Context
    ) -> AsyncIterator[pb.ReadFileStreamResponse]:
        content = (self._directory(request.sandbox_id) / request.path.lstrip("/")).read_bytes()
        for at in range(0, len(content), 100_000):
            yield pb.ReadFileStreamResponse(chunk=content[at : at + 100_000])


def _event(kind: Any, event: Any) -> pb.ExecStreamResponse:
    return pb.ExecStreamResponse(event=Oneof(kind, event))


async def _read(
    stream: asyncio.StreamReader | None, name: Any, into: asyncio.Queue[pb.ExecStreamData | None]
) -> None:
    assert stream is not None
    while data := await stream.read(65536):
        await into.put(pb.ExecStreamData(output=Oneof(name, data)))
    await into.put(None)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(agent: HostAgentService, path: Path) -> AsyncGenerator[None, None]:
    """`agent` serves on the unix socket `path`."""
    application: Any = HostAgentServiceASGIApplication(agent)
    config = uvicorn.Config(
        application, lifespan="off", log_config=None, ws="none", timeout_graceful_shutdown=2
    )
    server = _Server(config)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            # It listens already: who connects before the server is up waits in the backlog.
            yield
        finally:
            server.should_exit = True
            await task
