"""Fakes that stand in for a whole neighbour, so that nothing of ours has to be patched.

`FakeTransport` is the client's seam with sandboxes that are entries in a table. `LocalAgent` is
an agent without VMs: the real contract over a real unix socket, whose commands are processes of
this machine in a directory of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import termios
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.request import RequestContext
from protobuf import Oneof

from sandmartin.errors import AlreadyExists, Conflict, NotFound, SandmartinError
from sandmartin.model import NetworkPolicy
from sandmartin.phases import Phase
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.rpc.hostagent.v1.hostagent_connect import (
    HostAgentService,
    HostAgentServiceASGIApplication,
)
from sandmartin.transport import (
    Checkpoint,
    Command,
    CreatedSandbox,
    ExecEvent,
    FileInfo,
    ForkedSandbox,
    MetricPoint,
    NewSandbox,
    Process,
    PtySize,
    SandboxInfo,
    Snapshot,
    TemplateInfo,
    find_sandbox,
)

_Context = RequestContext[Any, Any]


class FakeTransport:
    """A Transport whose failures, delays and command output a test sets.

    What lies inside a sandbox it does not have: no file, no process, no terminal.
    """

    def __init__(self) -> None:
        self.sandboxes: dict[str, NewSandbox] = {}
        self.paused: set[str] = set()
        self.kept: dict[str, list[Checkpoint]] = {}
        self.snapshots: dict[str, Snapshot] = {}
        #: What was brought, by name.
        self.contents: dict[str, bytes] = {}
        #: Raised by a create or a fork once the sandboxes are there: its answer was lost.
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

    async def undo_create(self, new: NewSandbox, failure: BaseException) -> None:
        await self.destroy(new.sandbox_id)

    async def get_sandbox(self, sandbox_id: str) -> SandboxInfo:
        return find_sandbox(await self.list_sandboxes(), sandbox_id)

    def _state(self, sandbox_id: str) -> str:
        if sandbox_id not in self.sandboxes:
            raise NotFound("no such sandbox")
        return "paused" if sandbox_id in self.paused else "running"

    def _awake(self, sandbox_id: str) -> NewSandbox:
        if self._state(sandbox_id) == "paused":
            raise Conflict(f"sandbox {sandbox_id} is paused")
        return self.sandboxes[sandbox_id]

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        return tuple(
            SandboxInfo(
                sandbox_id=each,
                state=self._state(each),
                template=new.template,
                vcpus=new.vcpus or 1,
                memory_mb=new.memory_mb or 512,
                disk_size_mb=new.disk_size_mb or 5120,
                timeout_s=new.timeout_s,
                address="",
                created_at=0,
                last_active_at=0,
                reason="",
            )
            for each, new in self.sandboxes.items()
        )

    async def ping(self, sandbox_id: str) -> None:
        self._state(sandbox_id)

    async def set_timeout(self, sandbox_id: str, timeout_s: int) -> None:
        self._state(sandbox_id)
        self.sandboxes[sandbox_id] = replace(self.sandboxes[sandbox_id], timeout_s=timeout_s)

    async def update_network(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        self._state(sandbox_id)
        self.sandboxes[sandbox_id] = replace(self.sandboxes[sandbox_id], network=policy)

    async def pause(self, sandbox_id: str) -> tuple[Phase, ...]:
        self._state(sandbox_id)
        self.paused.add(sandbox_id)
        return ()

    async def resume(self, sandbox_id: str, timeout_s: int | None) -> CreatedSandbox:
        self._state(sandbox_id)
        self.paused.discard(sandbox_id)
        if timeout_s is not None:
            new = replace(self.sandboxes[sandbox_id], timeout_s=timeout_s)
            self.sandboxes[sandbox_id] = new
        return CreatedSandbox(sandbox_id=sandbox_id, state="running")

    async def fork(
        self, sandbox_id: str, child_ids: tuple[str, ...], timeout_s: int
    ) -> tuple[ForkedSandbox, ...]:
        source = self._awake(sandbox_id)
        for each in child_ids:
            self.sandboxes[each] = replace(
                source, sandbox_id=each, timeout_s=timeout_s or source.timeout_s
            )
        await self._wait()
        if self.lost_answer is not None:
            raise self.lost_answer
        return tuple(
            ForkedSandbox(sandbox_id=each, state="running", address="") for each in child_ids
        )

    async def undo_fork(
        self,
        sandbox_id: str,
        child_ids: tuple[str, ...],
        timeout_s: int,
        failure: BaseException,
    ) -> None:
        for each in child_ids:
            await self.destroy(each)

    async def create_checkpoint(self, sandbox_id: str, comment: str) -> Checkpoint:
        self._awake(sandbox_id)
        kept = self.kept.setdefault(sandbox_id, [])
        made = Checkpoint(
            checkpoint_id=f"cp{len(kept)}", comment=comment, created_at=0, size_bytes=1
        )
        kept.append(made)
        return made

    async def list_checkpoints(self, sandbox_id: str) -> tuple[Checkpoint, ...]:
        self._state(sandbox_id)
        return tuple(self.kept.get(sandbox_id, ()))

    def _checkpoint(self, sandbox_id: str, checkpoint_id: str) -> Checkpoint:
        self._state(sandbox_id)
        for each in self.kept.get(sandbox_id, ()):
            if each.checkpoint_id == checkpoint_id:
                return each
        raise NotFound("no such checkpoint")

    async def delete_checkpoint(self, sandbox_id: str, checkpoint_id: str) -> None:
        self.kept[sandbox_id].remove(self._checkpoint(sandbox_id, checkpoint_id))

    async def rollback(self, sandbox_id: str, checkpoint_id: str) -> CreatedSandbox:
        self._checkpoint(sandbox_id, checkpoint_id)
        self.paused.discard(sandbox_id)
        return CreatedSandbox(sandbox_id=sandbox_id, state="running")

    async def create_snapshot(self, sandbox_id: str, name: str, *, live: bool) -> Snapshot:
        self._state(sandbox_id)
        if not live:
            self.paused.add(sandbox_id)
        self.snapshots[name] = Snapshot(name=name, size_bytes=1)
        return self.snapshots[name]

    async def delete_snapshot(self, name: str) -> None:
        if self.snapshots.pop(name, None) is None:
            raise NotFound("no such template")

    async def list_templates(self) -> tuple[TemplateInfo, ...]:
        return tuple(
            TemplateInfo(
                name=each.name,
                kind="snapshot",
                vcpus=1,
                memory_mb=512,
                disk_size_mb=5120,
                size_bytes=each.size_bytes,
            )
            for each in self.snapshots.values()
        )

    async def read_template(self, name: str) -> AsyncGenerator[bytes, None]:
        if name not in self.snapshots:
            raise NotFound(f"there is no template {name!r}")
        yield self.contents.get(name, f"the content of {name}".encode())

    async def write_template(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        content = b"".join([chunk async for chunk in chunks])
        if name in self.snapshots:
            raise AlreadyExists(f"template {name!r} exists already")
        self.snapshots[name] = Snapshot(name=name, size_bytes=len(content))
        self.contents[name] = content

    async def metrics(self, sandbox_id: str, time_range: str) -> tuple[MetricPoint, ...]:
        self._state(sandbox_id)
        return ()

    async def read_console(self, sandbox_id: str) -> bytes:
        self._state(sandbox_id)
        return b""

    async def list_processes(self, sandbox_id: str) -> tuple[Process, ...]:
        self._state(sandbox_id)
        return ()

    async def resize_pty(self, sandbox_id: str, pid: int, size: PtySize) -> None:
        raise NotFound("no such command")

    async def stat_file(self, sandbox_id: str, path: str, user: str = "") -> FileInfo:
        raise NotFound(f"{path} does not exist")

    async def list_files(
        self, sandbox_id: str, path: str, user: str = "", *, depth: int = 1
    ) -> tuple[FileInfo, ...]:
        raise NotFound(f"{path} does not exist")

    async def make_directory(self, sandbox_id: str, path: str, user: str = "") -> None:
        self._state(sandbox_id)

    async def move_file(
        self, sandbox_id: str, source: str, destination: str, user: str = ""
    ) -> None:
        raise NotFound(f"{source} does not exist")

    async def remove_file(self, sandbox_id: str, path: str, user: str = "") -> None:
        self._state(sandbox_id)

    async def exec_stream(
        self, sandbox_id: str, command: Command
    ) -> AsyncGenerator[ExecEvent, None]:
        for event in self.events:
            if isinstance(event, SandmartinError):
                raise event
            yield event

    async def connect_process(self, sandbox_id: str, pid: int) -> AsyncGenerator[ExecEvent, None]:
        raise NotFound("no such command")
        yield

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

    async def write_tree(
        self, sandbox_id: str, directory: str, pieces: AsyncIterator[bytes], *, owner: str = ""
    ) -> int:
        async for _ in pieces:
            pass
        return 0

    async def read_tree(self, sandbox_id: str, path: str) -> AsyncGenerator[bytes, None]:
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
        #: What templates are as archives, by name.
        self.archives: dict[str, bytes] = {}
        #: Copies of sandboxes by name: templates, and checkpoints as `ID/CHECKPOINT`.
        self._saved = root.with_name("saved")
        self._comments: dict[str, str] = {}
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._running: dict[int, pb.ExecStreamRequest] = {}
        self._terminals: dict[int, int] = {}
        self.paused: set[str] = set()
        self.resumed: list[pb.ResumeSandboxRequest] = []
        self.console = b""
        self.points: list[pb.MetricPoint] = []
        #: How many children the next forks can make.
        self.room = 100
        #: In place of what a directory holds.
        self.lies: list[pb.FileInfo] = []
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
        template = self._saved / request.template
        if template.is_dir():
            shutil.copytree(template, self._root / request.sandbox_id)
        elif request.template == "base":
            (self._root / request.sandbox_id).mkdir()
        else:
            message = f"there is no template {request.template!r}"
            raise refusal(Code.NOT_FOUND, "not_found", message, "the templates here are: base")
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
            pb.SandboxInfo(sandbox_id=each, status=self._state(each), created_at_unix=1_700_000_000)
            for each in self.sandboxes
        ]
        return pb.ListSandboxesResponse(sandboxes=sandboxes)

    def _state(self, sandbox_id: str) -> str:
        return "paused" if sandbox_id in self.paused else "running"

    def _awake(self, sandbox_id: str) -> Path:
        directory = self._directory(sandbox_id)
        if sandbox_id in self.paused:
            message = f"sandbox {sandbox_id} is paused"
            raise refusal(Code.FAILED_PRECONDITION, "conflict", message)
        return directory

    async def pause_sandbox(
        self, request: pb.PauseSandboxRequest, ctx: _Context
    ) -> pb.PauseSandboxResponse:
        self._directory(request.sandbox_id)
        self.paused.add(request.sandbox_id)
        return pb.PauseSandboxResponse()

    async def resume_sandbox(
        self, request: pb.ResumeSandboxRequest, ctx: _Context
    ) -> pb.ResumeSandboxResponse:
        self._directory(request.sandbox_id)
        self.paused.discard(request.sandbox_id)
        self.resumed.append(request)
        return pb.ResumeSandboxResponse(sandbox_id=request.sandbox_id, status="running")

    async def fork_sandbox(
        self, request: pb.ForkSandboxRequest, ctx: _Context
    ) -> pb.ForkSandboxResponse:
        source = self._awake(request.sandbox_id)
        children = []
        for each in request.child_ids:
            if self.room == 0:
                error = pb.ErrorInfo(code="exhausted", hint="destroy some")
                children.append(
                    pb.ForkedSandbox(sandbox_id=each, error=error, error_message="no room")
                )
                continue
            self.room -= 1
            shutil.copytree(source, self._root / each)
            children.append(pb.ForkedSandbox(sandbox_id=each, status="running"))
        return pb.ForkSandboxResponse(children=children)

    async def create_checkpoint(
        self, request: pb.CreateCheckpointRequest, ctx: _Context
    ) -> pb.CreateCheckpointResponse:
        source = self._awake(request.sandbox_id)
        number = len(self._comments)
        name = f"{request.sandbox_id}/cp{number}"
        shutil.copytree(source, self._saved / name)
        self._comments[name] = request.comment
        return pb.CreateCheckpointResponse(checkpoint=self._checkpoint(name))

    def _checkpoint(self, name: str) -> pb.CheckpointInfo:
        return pb.CheckpointInfo(
            checkpoint_id=name.partition("/")[2],
            comment=self._comments[name],
            created_at_unix=1_700_000_000,
            size_bytes=2**40,
        )

    async def list_checkpoints(
        self, request: pb.ListCheckpointsRequest, ctx: _Context
    ) -> pb.ListCheckpointsResponse:
        names = [each for each in self._comments if each.startswith(request.sandbox_id + "/")]
        return pb.ListCheckpointsResponse(checkpoints=[self._checkpoint(each) for each in names])

    def _saved_as(self, name: str) -> Path:
        if not (self._saved / name).is_dir():
            raise refusal(Code.NOT_FOUND, "not_found", f"there is no {name}")
        return self._saved / name

    async def delete_checkpoint(
        self, request: pb.DeleteCheckpointRequest, ctx: _Context
    ) -> pb.DeleteCheckpointResponse:
        name = f"{request.sandbox_id}/{request.checkpoint_id}"
        shutil.rmtree(self._saved_as(name))
        del self._comments[name]
        return pb.DeleteCheckpointResponse()

    async def rollback_sandbox(
        self, request: pb.RollbackSandboxRequest, ctx: _Context
    ) -> pb.RollbackSandboxResponse:
        kept = self._saved_as(f"{request.sandbox_id}/{request.checkpoint_id}")
        shutil.rmtree(self._root / request.sandbox_id)
        shutil.copytree(kept, self._root / request.sandbox_id)
        return pb.RollbackSandboxResponse(status="running")

    async def create_snapshot(
        self, request: pb.CreateSnapshotRequest, ctx: _Context
    ) -> pb.CreateSnapshotResponse:
        shutil.copytree(self._directory(request.sandbox_id), self._saved / request.name)
        if not request.live:
            self.paused.add(request.sandbox_id)
        return pb.CreateSnapshotResponse(name=request.name, size_bytes=2**40)

    async def delete_snapshot(
        self, request: pb.DeleteSnapshotRequest, ctx: _Context
    ) -> pb.DeleteSnapshotResponse:
        shutil.rmtree(self._saved_as(request.name))
        return pb.DeleteSnapshotResponse()

    async def list_templates(
        self, request: pb.ListTemplatesRequest, ctx: _Context
    ) -> pb.ListTemplatesResponse:
        saved = sorted(self._saved.iterdir()) if self._saved.is_dir() else []
        snapshots = [
            pb.TemplateInfo(name=path.name, kind="snapshot", vcpus=1, memory_mb=512)
            for path in saved
            if not any(each.startswith(path.name + "/") for each in self._comments)
        ]
        base = pb.TemplateInfo(name="base", kind="image", disk_size_mb=5120, size_bytes=2**40)
        return pb.ListTemplatesResponse(templates=[base, *snapshots])

    async def read_template(
        self, request: pb.ReadTemplateRequest, ctx: _Context
    ) -> AsyncIterator[pb.ReadTemplateResponse]:
        if request.name not in self.archives:
            raise refusal(Code.NOT_FOUND, "not_found", f"there is no template {request.name!r}")
        yield pb.ReadTemplateResponse(chunk=self.archives[request.name])

    async def write_template(
        self, request: AsyncIterator[pb.WriteTemplateRequest], ctx: _Context
    ) -> pb.WriteTemplateResponse:
        name, content = "", b""
        async for message in request:
            assert message.content is not None
            if message.content.field == "meta":
                name = message.content.value.name
            else:
                content += message.content.value
        if not content.startswith(b"archive"):
            raise refusal(Code.INVALID_ARGUMENT, "invalid", "this is no archive of a template")
        self.archives[name] = content
        return pb.WriteTemplateResponse()

    async def get_sandbox_metrics(
        self, request: pb.GetSandboxMetricsRequest, ctx: _Context
    ) -> pb.GetSandboxMetricsResponse:
        points = self.points if request.range == "2h" else []
        return pb.GetSandboxMetricsResponse(points=points)

    async def read_console(
        self, request: pb.ReadConsoleRequest, ctx: _Context
    ) -> pb.ReadConsoleResponse:
        content, self.console = self.console, b""
        return pb.ReadConsoleResponse(content=content)

    async def list_processes(
        self, request: pb.ListProcessesRequest, ctx: _Context
    ) -> pb.ListProcessesResponse:
        processes = [
            pb.ProcessInfo(pid=pid, cmd=started.cmd, args=list(started.args), cwd=started.cwd)
            for pid, started in self._running.items()
            if self._processes[pid].returncode is None
        ]
        return pb.ListProcessesResponse(processes=processes)

    async def resize_pty(self, request: pb.ResizePtyRequest, ctx: _Context) -> pb.ResizePtyResponse:
        self._process(request.pid)
        assert request.pty is not None
        _set_size(self._terminals[request.pid], request.pty)
        return pb.ResizePtyResponse()

    def _path(self, sandbox_id: str, path: str) -> Path:
        return self._directory(sandbox_id) / path.lstrip("/")

    async def stat_file(self, request: pb.StatFileRequest, ctx: _Context) -> pb.StatFileResponse:
        path = self._path(request.sandbox_id, request.path)
        if not os.path.lexists(path):
            raise refusal(Code.NOT_FOUND, "not_found", f"{request.path} does not exist")
        return pb.StatFileResponse(file=_file_info(path))

    async def list_files(self, request: pb.ListFilesRequest, ctx: _Context) -> pb.ListFilesResponse:
        if self.lies:
            return pb.ListFilesResponse(files=self.lies)
        assert request.depth == 1
        below = self._path(request.sandbox_id, request.path)
        return pb.ListFilesResponse(files=[_file_info(each) for each in below.iterdir()])

    async def make_directory(
        self, request: pb.MakeDirectoryRequest, ctx: _Context
    ) -> pb.MakeDirectoryResponse:
        try:
            self._path(request.sandbox_id, request.path).mkdir(parents=True)
        except FileExistsError as error:
            message = f"{request.path} exists already"
            raise refusal(Code.ALREADY_EXISTS, "already_exists", message) from error
        return pb.MakeDirectoryResponse()

    async def move_file(self, request: pb.MoveFileRequest, ctx: _Context) -> pb.MoveFileResponse:
        source = self._path(request.sandbox_id, request.source)
        source.rename(self._path(request.sandbox_id, request.destination))
        return pb.MoveFileResponse()

    async def remove_file(
        self, request: pb.RemoveFileRequest, ctx: _Context
    ) -> pb.RemoveFileResponse:
        path = self._path(request.sandbox_id, request.path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return pb.RemoveFileResponse()

    async def exec_stream(
        self, request: pb.ExecStreamRequest, ctx: _Context
    ) -> AsyncIterator[pb.ExecStreamResponse]:
        process = await self._start(request)
        yield _event("start", pb.ExecStreamStart(pid=process.pid))
        if self.break_off:
            return
        outputs: asyncio.Queue[pb.ExecStreamData | None] = asyncio.Queue()
        if request.pty is not None:
            reading = [_read_terminal(self._terminals[process.pid], outputs)]
        else:
            both = (("stdout", process.stdout), ("stderr", process.stderr))
            reading = [_read(stream, name, outputs) for name, stream in both]
        readers = [asyncio.create_task(each) for each in reading]
        for _ in readers:
            while (data := await outputs.get()) is not None:
                yield _event("data", data)
        code = await process.wait()
        if request.pty is not None:
            os.close(self._terminals.pop(process.pid))
        exit_code, number = (code, 0) if code >= 0 else (128 - code, -code)
        yield _event("end", pb.ExecStreamEnd(exit_code=exit_code, signal=number))

    async def _start(self, request: pb.ExecStreamRequest) -> asyncio.subprocess.Process:
        directory = self._awake(request.sandbox_id)
        pipe = asyncio.subprocess.PIPE
        theirs: dict[str, Any] = {
            "stdin": pipe if request.stdin else asyncio.subprocess.DEVNULL,
            "stdout": pipe,
            "stderr": pipe,
        }
        with contextlib.ExitStack() as stack:
            if request.pty is not None:
                ours, slave = os.openpty()
                stack.callback(os.close, slave)
                _set_size(ours, request.pty)
                theirs = dict.fromkeys(theirs, slave) | {"preexec_fn": _take_terminal}
            try:
                process = await asyncio.create_subprocess_exec(
                    request.cmd,
                    *request.args,
                    cwd=directory,
                    env=os.environ | dict(request.envs),
                    start_new_session=True,
                    **theirs,
                )
            except OSError as error:
                message = f"{request.cmd}: {error.strerror}"
                raise refusal(Code.FAILED_PRECONDITION, "command_not_started", message) from error
        self._processes[process.pid] = process
        self._running[process.pid] = request
        if request.pty is not None:
            self._terminals[process.pid] = ours
        return process

    async def stream_input(
        self, request: AsyncIterator[pb.StreamInputRequest], ctx: _Context
    ) -> pb.StreamInputResponse:
        stdin: asyncio.StreamWriter | None = None
        pid = 0
        async for message in request:
            assert message.content is not None
            if message.content.field == "meta":
                pid = message.content.value.pid
                stdin = self._process(pid).stdin
                continue
            if pid in self._terminals:
                os.write(self._terminals[pid], message.content.value)
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
        try:
            content = self._path(request.sandbox_id, request.path).read_bytes()
        except FileNotFoundError as error:
            message = f"{request.path} does not exist"
            raise refusal(Code.NOT_FOUND, "not_found", message) from error
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


async def _read_terminal(fd: int, into: asyncio.Queue[pb.ExecStreamData | None]) -> None:
    name: Any = "stdout"
    # Reading fails once nobody has the other side open any more.
    with contextlib.suppress(OSError):
        while data := await asyncio.to_thread(os.read, fd, 65536):
            await into.put(pb.ExecStreamData(output=Oneof(name, data)))
    await into.put(None)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _set_size(fd: int, size: pb.PtySize) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.cols, 0, 0))


def _file_info(path: Path) -> pb.FileInfo:
    kind = "directory" if path.is_dir() else "file" if path.is_file() else "other"
    info = path.lstat()
    return pb.FileInfo(
        name=path.name,
        path=os.fspath(path),
        type=kind,
        size_bytes=info.st_size,
        mode=info.st_mode & 0o7777,
        modified_at_unix=int(info.st_mtime),
        symlink_target=str(path.readlink()) if path.is_symlink() else "",
    )


class QuietServer(uvicorn.Server):
    """Leaves signals to the tests."""

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
    server = QuietServer(config)
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
