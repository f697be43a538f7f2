"""What the host does, in the words of `hostagent.v1`.

The only module that knows both the wire messages and the host: requests are checked and become
our own types here, and what comes back becomes messages again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any, Literal, TypeVar

from connectrpc.request import RequestContext
from protobuf import Oneof

from sandmartin import model
from sandmartin.agent.disk import Image, allocated_bytes
from sandmartin.agent.guest import Command, Ended, FileInfo, Output, ProcessEvent, Started, Terminal
from sandmartin.agent.host import Host
from sandmartin.agent.metrics import Point
from sandmartin.agent.oci import Imported
from sandmartin.agent.oci import Progress as ImportProgress
from sandmartin.agent.registry import RegistryAuth
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Signer, Snapshot
from sandmartin.agent.stored import Place, Progress, Pushed
from sandmartin.artefacts.store import Store
from sandmartin.errors import Exhausted, Invalid, SandmartinError, TimedOut
from sandmartin.model import INTERNET, NetworkPolicy, SandboxSpec, Shape
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.rpc.hostagent.v1.hostagent_connect import HostAgentService

_T = TypeVar("_T")
_Context = RequestContext[Any, Any]

#: Largest message taken or sent in one piece; longer content goes through the streams.
MAX_MESSAGE_BYTES = 32 * 2**20
_MAX_MESSAGE_HINT = "use the streaming call for content of any size"
_MAX_CHILDREN = 100
_MAX_COMMENT = 1000
_KEY_BYTES = 32


# Requests.


def check_guest_path(path: str) -> str:
    """Return a path in the guest if it is plain. Raises Invalid."""
    if not path:
        raise Invalid("the path is empty")
    if "\0" in path:
        raise Invalid("the path contains a NUL character")
    if ".." in path.split("/"):
        raise Invalid(f"path {path[:200]!r} contains '..'", hint="give the path it leads to")
    if len(path) > 4096:
        raise Invalid("the path is longer than 4096 characters")
    return path


def check_absolute(path: str) -> str:
    """Return a path in the guest if it is plain and begins at its root. Raises Invalid."""
    if not check_guest_path(path).startswith("/"):
        raise Invalid(f"path {path[:200]!r} is not absolute")
    return path


def spec_of(request: pb.CreateSandboxRequest, shape_of: Callable[[str], Shape]) -> SandboxSpec:
    """The specification a request asks for, defaults filled in. Raises Invalid.

    `shape_of` gives the shape that a template recommends.
    """
    if not request.template:
        raise Invalid("no template is named", hint="`base` is there after setup")
    usual = shape_of(request.template)
    return SandboxSpec(
        sandbox_id=request.sandbox_id or model.new_sandbox_id(),
        template=request.template,
        vcpus=request.vcpus or usual.vcpus,
        memory_mb=request.memory_mb or usual.memory_mb,
        disk_size_mb=request.disk_size_mb or model.DEFAULT_DISK_SIZE_MB,
        timeout_s=request.timeout_sec,
        network=None if request.network is None else policy_of(request.network),
        default_user=_plain(request.default_user),
        default_workdir=_plain(request.default_workdir),
    )


def _plain(text: str) -> str:
    """Raises Invalid."""
    if "\0" in text:
        raise Invalid("the default user or directory contains a NUL character")
    return text


def policy_of(message: pb.NetworkPolicy | None) -> NetworkPolicy:
    """The network policy a request asks for. Raises Invalid."""
    if message is None:
        return INTERNET
    denies = message.has_field("allow_internet_access") and not message.allow_internet_access
    return NetworkPolicy(
        allow_internet_access=not denies,
        allow_out=tuple(message.allow_out),
        deny_out=tuple(message.deny_out),
    )


def envs_of(
    request: pb.CreateSandboxRequest | pb.ExecRequest | pb.ExecStreamRequest,
) -> dict[str, str]:
    """The environment variables that a request sets. Raises Invalid."""
    for name, value in request.envs.items():
        if not name or "=" in name:
            raise Invalid("a name in envs is empty or contains '='")
        if "\0" in name + value:
            raise Invalid(f"variable {name[:80]!r} in envs contains a NUL character")
    return dict(request.envs)


def command_of(request: pb.ExecRequest | pb.ExecStreamRequest) -> Command:
    """The command a request asks for. Raises Invalid."""
    if not request.cmd:
        raise Invalid("no command is given")
    tag = request.tag if isinstance(request, pb.ExecStreamRequest) else ""
    if any("\0" in word for word in (request.cmd, *request.args, request.cwd, request.user, tag)):
        raise Invalid("the command contains a NUL character")
    timeout_s = request.timeout_sec or model.DEFAULT_EXEC_TIMEOUT_S
    return Command(
        cmd=request.cmd,
        args=tuple(request.args),
        envs=envs_of(request),
        cwd=request.cwd,
        user=request.user or "root",
        stdin=isinstance(request, pb.ExecStreamRequest) and request.stdin,
        timeout_s=timeout_s if timeout_s > 0 else None,
        terminal=_terminal_of(request),
        tag=tag,
    )


def _terminal_of(request: pb.ExecRequest | pb.ExecStreamRequest) -> Terminal | None:
    if isinstance(request, pb.ExecStreamRequest) and request.pty is not None:
        return terminal_of(request.pty)
    return None


def terminal_of(size: pb.PtySize | None) -> Terminal:
    """The size of a terminal. Raises Invalid."""
    if size is None or not (1 <= size.cols <= 4096 and 1 <= size.rows <= 4096):
        raise Invalid("the terminal's size is missing or not between 1 and 4096")
    return Terminal(cols=size.cols, rows=size.rows)


def child_ids_of(request: pb.ForkSandboxRequest) -> list[str]:
    """The ids of the children to make. Raises Invalid."""
    ids = list(request.child_ids)
    count = request.count or len(ids) or 1
    if not 1 <= count <= _MAX_CHILDREN or (ids and len(ids) != count):
        raise Invalid(
            f"count is {request.count} and {len(ids)} child ids are given",
            hint=f"ask for 1 to {_MAX_CHILDREN} children, with an id for each or for none",
        )
    ids = [model.check_name(each, "sandbox id") for each in ids]
    if len(set(ids)) != len(ids):
        raise Invalid("a child id is given twice")
    return ids or [model.new_sandbox_id() for _ in range(count)]


def _timeout_of(request: pb.ResumeSandboxRequest | pb.SetTimeoutRequest) -> int:
    """An idle limit. Raises Invalid."""
    if request.timeout_sec < 0:
        raise Invalid(f"timeout_sec is {request.timeout_sec}", hint="use 0 for no idle limit")
    return request.timeout_sec


_StartOf = Oneof[Literal["start"], pb.ExecStreamStart]
_DataOf = Oneof[Literal["data"], pb.ExecStreamData]
_EndOf = Oneof[Literal["end"], pb.ExecStreamEnd]
_StdoutOf = Oneof[Literal["stdout"], bytes]
_StderrOf = Oneof[Literal["stderr"], bytes]
_ProgressOf = Oneof[Literal["progress"], pb.PushProgress]
_ArtefactOf = Oneof[Literal["artefact"], pb.Artefact]


def _event_message(event: ProcessEvent) -> pb.ExecStreamResponse:
    match event:
        case Started(pid):
            return pb.ExecStreamResponse(event=_StartOf("start", pb.ExecStreamStart(pid=pid)))
        case Output(data, stdout=True):
            output = pb.ExecStreamData(output=_StdoutOf("stdout", data))
        case Output(data):
            output = pb.ExecStreamData(output=_StderrOf("stderr", data))
        case Ended(exit_code=code, error=error, signal=number):
            end = pb.ExecStreamEnd(exit_code=code, error=error, signal=number)
            return pb.ExecStreamResponse(event=_EndOf("end", end))
    return pb.ExecStreamResponse(event=_DataOf("data", output))


async def _first(messages: AsyncIterator[_T], what: str) -> _T:
    async for message in messages:
        return message
    raise Invalid(f"the stream ended before {what} came")


async def _chunks(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.content is None or message.content.field != "chunk":
            raise Invalid("only the first message of the stream may carry meta data")
        yield message.content.value


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


# The service.


class HostAgent(HostAgentService):
    """`hostagent.v1` on one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        #: Artefact stores that were named, by URL.
        self._stores: dict[str, Store] = {}

    async def create_sandbox(
        self, request: pb.CreateSandboxRequest, _ctx: _Context
    ) -> pb.CreateSandboxResponse:
        spec = spec_of(request, self._host.default_shape)
        sandbox = await self._host.create(spec, envs_of(request))
        return pb.CreateSandboxResponse(
            sandbox_id=sandbox.sandbox_id,
            status=sandbox.state,
            host_ip=sandbox.host_ip,
            envd_version=sandbox.entry.envd_version,
            phases=_phases(sandbox),
        )

    async def destroy_sandbox(
        self, request: pb.DestroySandboxRequest, _ctx: _Context
    ) -> pb.DestroySandboxResponse:
        await self._host.destroy(request.sandbox_id)
        return pb.DestroySandboxResponse()

    async def list_sandboxes(
        self, _request: pb.ListSandboxesRequest, _ctx: _Context
    ) -> pb.ListSandboxesResponse:
        return pb.ListSandboxesResponse(
            sandboxes=[_info(each) for each in self._host.sandboxes()],
            auto_paused_sandbox_ids=self._host.drain_auto_paused(),
        )

    async def ping_sandbox(
        self, request: pb.PingSandboxRequest, _ctx: _Context
    ) -> pb.PingSandboxResponse:
        self._host.get(request.sandbox_id).touch()
        return pb.PingSandboxResponse()

    async def exec(self, request: pb.ExecRequest, _ctx: _Context) -> pb.ExecResponse:
        command = command_of(request)
        sandbox = self._host.get(request.sandbox_id)
        stdout, stderr, end = bytearray(), bytearray(), None
        async with contextlib.aclosing(sandbox.exec(command)) as events:
            async for event in events:
                if isinstance(event, Output):
                    (stdout if event.stdout else stderr).extend(event.data)
                elif isinstance(event, Ended):
                    end = event
                if len(stdout) + len(stderr) > MAX_MESSAGE_BYTES:
                    raise Exhausted(
                        f"the command's output is larger than {MAX_MESSAGE_BYTES} bytes",
                        hint=_MAX_MESSAGE_HINT,
                    )
        assert end is not None
        if end.timed_out:
            raise TimedOut(
                f"the command did not end within {command.timeout_s} s and was killed",
                hint="set timeout_sec, or use ExecStream",
            )
        return pb.ExecResponse(stdout=bytes(stdout), stderr=bytes(stderr), exit_code=end.exit_code)

    async def exec_stream(
        self, request: pb.ExecStreamRequest, _ctx: _Context
    ) -> AsyncIterator[pb.ExecStreamResponse]:
        sandbox = self._host.get(request.sandbox_id)
        async with contextlib.aclosing(sandbox.exec(command_of(request))) as events:
            async for event in events:
                yield _event_message(event)

    async def connect_process(
        self, request: pb.ConnectProcessRequest, _ctx: _Context
    ) -> AsyncIterator[pb.ExecStreamResponse]:
        sandbox = self._host.get(request.sandbox_id)
        async with contextlib.aclosing(sandbox.attach(request.pid)) as events:
            async for event in events:
                yield _event_message(event)

    async def stream_input(
        self, request: AsyncIterator[pb.StreamInputRequest], _ctx: _Context
    ) -> pb.StreamInputResponse:
        content = (await _first(request, "the meta data")).content
        if content is None or content.field != "meta":
            raise Invalid("the first message of the stream must carry meta data")
        meta = content.value
        sandbox = self._host.get(meta.sandbox_id)
        await sandbox.send_input(meta.pid, _chunks(request))
        return pb.StreamInputResponse()

    async def send_signal(
        self, request: pb.SendSignalRequest, _ctx: _Context
    ) -> pb.SendSignalResponse:
        if not 1 <= request.signal <= 64:
            raise Invalid(f"signal is {request.signal}", hint="use 1 to 64")
        await self._host.get(request.sandbox_id).signal(request.pid, request.signal)
        return pb.SendSignalResponse()

    async def write_file(
        self, request: pb.WriteFileRequest, _ctx: _Context
    ) -> pb.WriteFileResponse:
        sandbox = self._host.get(request.sandbox_id)
        path = check_guest_path(request.path)
        await sandbox.write_file(path, request.user or "root", _once(request.content))
        return pb.WriteFileResponse()

    async def read_file(self, request: pb.ReadFileRequest, _ctx: _Context) -> pb.ReadFileResponse:
        sandbox = self._host.get(request.sandbox_id)
        content = bytearray()
        reading = sandbox.read_file(check_guest_path(request.path), request.user or "root")
        async with contextlib.aclosing(reading) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > MAX_MESSAGE_BYTES:
                    raise Exhausted(
                        f"the file is larger than {MAX_MESSAGE_BYTES} bytes",
                        hint=_MAX_MESSAGE_HINT,
                    )
        return pb.ReadFileResponse(content=bytes(content))

    async def write_file_stream(
        self, request: AsyncIterator[pb.WriteFileStreamRequest], _ctx: _Context
    ) -> pb.WriteFileStreamResponse:
        content = (await _first(request, "the meta data")).content
        if content is None or content.field != "meta":
            raise Invalid("the first message of the stream must carry meta data")
        meta = content.value
        sandbox = self._host.get(meta.sandbox_id)
        path = check_guest_path(meta.path)
        await sandbox.write_file(path, meta.user or "root", _chunks(request))
        return pb.WriteFileStreamResponse()

    async def read_file_stream(
        self, request: pb.ReadFileStreamRequest, _ctx: _Context
    ) -> AsyncIterator[pb.ReadFileStreamResponse]:
        sandbox = self._host.get(request.sandbox_id)
        reading = sandbox.read_file(check_guest_path(request.path), request.user or "root")
        async with contextlib.aclosing(reading) as chunks:
            async for chunk in chunks:
                yield pb.ReadFileStreamResponse(chunk=chunk)

    async def write_tree(
        self, request: AsyncIterator[pb.WriteTreeRequest], _ctx: _Context
    ) -> pb.WriteTreeResponse:
        content = (await _first(request, "the meta data")).content
        if content is None or content.field != "meta":
            raise Invalid("the first message of the stream must carry meta data")
        meta = content.value
        sandbox = self._host.get(meta.sandbox_id)
        directory = check_absolute(meta.directory)
        members = await sandbox.write_tree(directory, meta.owner, _chunks(request))
        return pb.WriteTreeResponse(members=members)

    async def read_tree(
        self, request: pb.ReadTreeRequest, _ctx: _Context
    ) -> AsyncIterator[pb.ReadTreeResponse]:
        sandbox = self._host.get(request.sandbox_id)
        reading = sandbox.read_tree(check_absolute(request.path))
        async with contextlib.aclosing(reading) as chunks:
            async for chunk in chunks:
                yield pb.ReadTreeResponse(chunk=chunk)

    # Pausing, forking, snapshots.

    async def pause_sandbox(
        self, request: pb.PauseSandboxRequest, _ctx: _Context
    ) -> pb.PauseSandboxResponse:
        sandbox = await self._host.pause(request.sandbox_id)
        return pb.PauseSandboxResponse(phases=_phases(sandbox))

    async def resume_sandbox(
        self, request: pb.ResumeSandboxRequest, _ctx: _Context
    ) -> pb.ResumeSandboxResponse:
        timeout_s = None if request.keep_timeout else _timeout_of(request)
        sandbox = await self._host.resume(request.sandbox_id, timeout_s)
        return pb.ResumeSandboxResponse(
            sandbox_id=sandbox.sandbox_id,
            status=sandbox.state,
            host_ip=sandbox.host_ip,
            envd_version=sandbox.entry.envd_version,
            phases=_phases(sandbox),
        )

    async def set_timeout(
        self, request: pb.SetTimeoutRequest, _ctx: _Context
    ) -> pb.SetTimeoutResponse:
        await self._host.set_timeout(request.sandbox_id, _timeout_of(request))
        return pb.SetTimeoutResponse()

    async def update_network(
        self, request: pb.UpdateNetworkRequest, _ctx: _Context
    ) -> pb.UpdateNetworkResponse:
        await self._host.update_network(request.sandbox_id, policy_of(request.network))
        return pb.UpdateNetworkResponse()

    async def fork_sandbox(
        self, request: pb.ForkSandboxRequest, _ctx: _Context
    ) -> pb.ForkSandboxResponse:
        ids = child_ids_of(request)
        timeout_s = request.timeout_sec or None
        children = await self._host.fork(request.sandbox_id, ids, timeout_s)
        forked = [_forked(each, child) for each, child in zip(ids, children, strict=True)]
        return pb.ForkSandboxResponse(children=forked)

    async def create_checkpoint(
        self, request: pb.CreateCheckpointRequest, _ctx: _Context
    ) -> pb.CreateCheckpointResponse:
        if len(request.comment) > _MAX_COMMENT:
            raise Invalid(f"the comment is longer than {_MAX_COMMENT} characters")
        sandbox = self._host.get(request.sandbox_id)
        made = _checkpoint(await self._host.checkpoint(request.sandbox_id, request.comment))
        return pb.CreateCheckpointResponse(checkpoint=made, phases=_phases(sandbox))

    async def list_checkpoints(
        self, request: pb.ListCheckpointsRequest, _ctx: _Context
    ) -> pb.ListCheckpointsResponse:
        found = self._host.get(request.sandbox_id).checkpoints()
        return pb.ListCheckpointsResponse(checkpoints=[_checkpoint(each) for each in found])

    async def delete_checkpoint(
        self, request: pb.DeleteCheckpointRequest, _ctx: _Context
    ) -> pb.DeleteCheckpointResponse:
        await self._host.delete_checkpoint(request.sandbox_id, request.checkpoint_id)
        return pb.DeleteCheckpointResponse()

    async def rollback_sandbox(
        self, request: pb.RollbackSandboxRequest, _ctx: _Context
    ) -> pb.RollbackSandboxResponse:
        sandbox = await self._host.rollback(request.sandbox_id, request.checkpoint_id)
        return pb.RollbackSandboxResponse(
            status=sandbox.state, host_ip=sandbox.host_ip, phases=_phases(sandbox)
        )

    async def create_snapshot(
        self, request: pb.CreateSnapshotRequest, _ctx: _Context
    ) -> pb.CreateSnapshotResponse:
        sandbox = self._host.get(request.sandbox_id)
        snapshot = await self._host.create_snapshot(
            request.sandbox_id, request.name, live=request.live
        )
        return pb.CreateSnapshotResponse(
            name=request.name, size_bytes=snapshot.manifest.size_bytes, phases=_phases(sandbox)
        )

    async def delete_snapshot(
        self, request: pb.DeleteSnapshotRequest, _ctx: _Context
    ) -> pb.DeleteSnapshotResponse:
        await self._host.delete_snapshot(request.name)
        return pb.DeleteSnapshotResponse()

    async def flatten_rootfs(
        self, request: pb.FlattenRootfsRequest, _ctx: _Context
    ) -> pb.FlattenRootfsResponse:
        size_bytes = await self._host.flatten(request.sandbox_id, request.name)
        return pb.FlattenRootfsResponse(size_bytes=size_bytes)

    async def read_template(
        self, request: pb.ReadTemplateRequest, _ctx: _Context
    ) -> AsyncIterator[pb.ReadTemplateResponse]:
        async with contextlib.aclosing(self._host.read_template(request.name)) as chunks:
            async for chunk in chunks:
                yield pb.ReadTemplateResponse(chunk=chunk)

    async def write_template(
        self, request: AsyncIterator[pb.WriteTemplateRequest], _ctx: _Context
    ) -> pb.WriteTemplateResponse:
        content = (await _first(request, "the meta data")).content
        if content is None or content.field != "meta":
            raise Invalid("the first message of the stream must carry meta data")
        await self._host.write_template(content.value.name, _chunks(request))
        return pb.WriteTemplateResponse()

    async def import_image(
        self, request: pb.ImportImageRequest, _ctx: _Context
    ) -> AsyncIterator[pb.ImportImageResponse]:
        auth = None
        if request.auth is not None:
            auth = RegistryAuth(request.auth.username, request.auth.password)
        importing = self._host.import_image(request.reference, request.name, auth)
        async with contextlib.aclosing(importing) as events:
            async for event in events:
                yield _import_message(event)

    async def import_archive(
        self, request: AsyncIterator[pb.ImportArchiveRequest], _ctx: _Context
    ) -> pb.ImportArchiveResponse:
        content = (await _first(request, "the meta data")).content
        if content is None or content.field != "meta":
            raise Invalid("the first message of the stream must carry meta data")
        imported = await self._host.import_archive(content.value.name, _chunks(request))
        return pb.ImportArchiveResponse(image=_imported(imported))

    async def push_template(
        self, request: pb.PushTemplateRequest, _ctx: _Context
    ) -> AsyncIterator[pb.PushTemplateResponse]:
        events = self._host.push_template(request.name, self._place(request.store))
        async with contextlib.aclosing(events):
            async for event in events:
                yield _push_event(event)

    async def fetch_template(
        self, request: pb.FetchTemplateRequest, _ctx: _Context
    ) -> pb.FetchTemplateResponse:
        place = self._place(request.store)
        await self._host.fetch_template(request.name, request.artefact_id, place)
        return pb.FetchTemplateResponse()

    async def push_sandbox(
        self, request: pb.PushSandboxRequest, _ctx: _Context
    ) -> AsyncIterator[pb.PushTemplateResponse]:
        events = self._host.push_sandbox(request.sandbox_id, self._place(request.store))
        async with contextlib.aclosing(events):
            async for event in events:
                yield _push_event(event)

    async def adopt_sandbox(
        self, request: pb.AdoptSandboxRequest, _ctx: _Context
    ) -> pb.AdoptSandboxResponse:
        await self._host.adopt_sandbox(request.sandbox_id, request.source, request.template)
        return pb.AdoptSandboxResponse()

    def _place(self, told: pb.ArtefactStore | None) -> Place:
        """The artefact store that a request names. Raises Invalid."""
        if told is None or len(told.key) != _KEY_BYTES:
            raise Invalid(f"no artefact store is named, or its key has not {_KEY_BYTES} bytes")
        store = self._stores.get(told.url)
        if store is None:
            # Whoever may ask for this is the platform, and has one; connections are kept.
            store = self._stores[told.url] = Store.open(told.url)
        return Place(store, Signer(told.key))

    async def list_templates(
        self, _request: pb.ListTemplatesRequest, _ctx: _Context
    ) -> pb.ListTemplatesResponse:
        found = []
        for each in self._host.templates():
            # One that is deleted meanwhile is not there.
            with contextlib.suppress(FileNotFoundError):
                found.append(_template(each))
        return pb.ListTemplatesResponse(templates=found)

    # What it tells of itself.

    async def get_sandbox_metrics(
        self, request: pb.GetSandboxMetricsRequest, _ctx: _Context
    ) -> pb.GetSandboxMetricsResponse:
        points = self._host.metrics(request.sandbox_id, request.range)
        return pb.GetSandboxMetricsResponse(points=_points(points))

    async def flush_sandbox_metrics(
        self, request: pb.FlushSandboxMetricsRequest, _ctx: _Context
    ) -> pb.FlushSandboxMetricsResponse:
        tiers = self._host.flush_metrics(request.sandbox_id)
        return pb.FlushSandboxMetricsResponse(
            points_10m=_points(tiers["10m"]),
            points_2h=_points(tiers["2h"]),
            points_24h=_points(tiers["24h"]),
        )

    async def read_console(
        self, request: pb.ReadConsoleRequest, _ctx: _Context
    ) -> pb.ReadConsoleResponse:
        content = await self._host.get(request.sandbox_id).read_console()
        return pb.ReadConsoleResponse(content=content)

    async def list_processes(
        self, request: pb.ListProcessesRequest, _ctx: _Context
    ) -> pb.ListProcessesResponse:
        running = await self._host.get(request.sandbox_id).processes()
        processes = [
            pb.ProcessInfo(
                pid=each.pid, cmd=each.cmd, args=list(each.args), cwd=each.cwd, tag=each.tag
            )
            for each in running
        ]
        return pb.ListProcessesResponse(processes=processes)

    async def resize_pty(
        self, request: pb.ResizePtyRequest, _ctx: _Context
    ) -> pb.ResizePtyResponse:
        size = terminal_of(request.pty)
        await self._host.get(request.sandbox_id).resize(request.pid, size)
        return pb.ResizePtyResponse()

    # Directories.

    async def stat_file(self, request: pb.StatFileRequest, _ctx: _Context) -> pb.StatFileResponse:
        sandbox = self._host.get(request.sandbox_id)
        found = await sandbox.stat(check_guest_path(request.path), request.user or "root")
        return pb.StatFileResponse(file=_file(found))

    async def list_files(
        self, request: pb.ListFilesRequest, _ctx: _Context
    ) -> pb.ListFilesResponse:
        sandbox = self._host.get(request.sandbox_id)
        path, user = check_guest_path(request.path), request.user or "root"
        found = await sandbox.list_files(path, user, request.depth or 1)
        return pb.ListFilesResponse(files=[_file(each) for each in found])

    async def make_directory(
        self, request: pb.MakeDirectoryRequest, _ctx: _Context
    ) -> pb.MakeDirectoryResponse:
        sandbox = self._host.get(request.sandbox_id)
        await sandbox.make_directory(check_guest_path(request.path), request.user or "root")
        return pb.MakeDirectoryResponse()

    async def move_file(self, request: pb.MoveFileRequest, _ctx: _Context) -> pb.MoveFileResponse:
        sandbox = self._host.get(request.sandbox_id)
        both = check_guest_path(request.source), check_guest_path(request.destination)
        await sandbox.move_file(*both, request.user or "root")
        return pb.MoveFileResponse()

    async def remove_file(
        self, request: pb.RemoveFileRequest, _ctx: _Context
    ) -> pb.RemoveFileResponse:
        sandbox = self._host.get(request.sandbox_id)
        await sandbox.remove_file(check_guest_path(request.path), request.user or "root")
        return pb.RemoveFileResponse()

    async def describe_host(
        self, _request: pb.DescribeHostRequest, _ctx: _Context
    ) -> pb.DescribeHostResponse:
        return pb.DescribeHostResponse(**asdict(self._host.describe()))

    async def terminate(
        self, _request: pb.TerminateRequest, _ctx: _Context
    ) -> pb.TerminateResponse:
        await self._host.terminate()
        return pb.TerminateResponse()


def _info(sandbox: Sandbox) -> pb.SandboxInfo:
    entry = sandbox.entry
    return pb.SandboxInfo(
        sandbox_id=sandbox.sandbox_id,
        status=entry.state,
        template=entry.spec.template,
        vcpus=entry.spec.vcpus,
        memory_mb=entry.spec.memory_mb,
        host_ip=sandbox.host_ip,
        created_at_unix=int(entry.created_at),
        last_active_at_unix=int(entry.last_active_at),
        timeout_sec=entry.spec.timeout_s,
        disk_size_mb=entry.spec.disk_size_mb,
        status_reason=sandbox.reason,
        network=_policy(entry.network),
        envd_version=entry.envd_version,
    )


def _policy(policy: NetworkPolicy) -> pb.NetworkPolicy | None:
    if policy == INTERNET:
        return None
    return pb.NetworkPolicy(
        allow_internet_access=policy.allow_internet_access,
        allow_out=list(policy.allow_out),
        deny_out=list(policy.deny_out),
    )


def _forked(sandbox_id: str, child: Sandbox | SandmartinError) -> pb.ForkedSandbox:
    if isinstance(child, SandmartinError):
        error = pb.ErrorInfo(code=child.code, hint=child.hint)
        return pb.ForkedSandbox(sandbox_id=sandbox_id, error=error, error_message=child.message)
    return pb.ForkedSandbox(
        sandbox_id=sandbox_id,
        status=child.state,
        host_ip=child.host_ip,
        envd_version=child.entry.envd_version,
        phases=_phases(child),
    )


def _phases(sandbox: Sandbox) -> list[pb.Phase]:
    """Of the operation on it that has just ended."""
    return [
        pb.Phase(name=each.name, duration_us=round(each.duration_s * 1e6))
        for each in sandbox.phases
    ]


def _checkpoint(snapshot: Snapshot) -> pb.CheckpointInfo:
    manifest = snapshot.manifest
    return pb.CheckpointInfo(
        checkpoint_id=snapshot.path.name,
        comment=manifest.comment,
        created_at_unix=int(manifest.created_at),
        size_bytes=manifest.size_bytes,
    )


def _template(template: Image | Snapshot) -> pb.TemplateInfo:
    if isinstance(template, Image):
        return pb.TemplateInfo(
            name=template.name,
            kind="image",
            vcpus=template.traits.vcpus,
            memory_mb=template.traits.memory_mb,
            disk_size_mb=template.size_mb,
            size_bytes=allocated_bytes(template.path),
        )
    manifest = template.manifest
    return pb.TemplateInfo(
        name=template.path.name,
        kind="snapshot",
        vcpus=manifest.vcpus,
        memory_mb=manifest.memory_mb,
        disk_size_mb=manifest.disk_size_mb,
        size_bytes=manifest.size_bytes,
        network=_policy(manifest.network),
    )


_ImportProgressOf = Oneof[Literal["progress"], pb.ImportProgress]
_ImageOf = Oneof[Literal["image"], pb.ImportedImage]


def _import_message(event: ImportProgress | Imported) -> pb.ImportImageResponse:
    if isinstance(event, ImportProgress):
        told = pb.ImportProgress(message=event.message)
        return pb.ImportImageResponse(event=_ImportProgressOf("progress", told))
    return pb.ImportImageResponse(event=_ImageOf("image", _imported(event)))


def _imported(imported: Imported) -> pb.ImportedImage:
    return pb.ImportedImage(**asdict(imported))


def _push_event(event: Progress | Pushed) -> pb.PushTemplateResponse:
    if isinstance(event, Progress):
        progress = pb.PushProgress(chunks_done=event.done, chunks_total=event.total)
        return pb.PushTemplateResponse(event=_ProgressOf("progress", progress))
    artefact = pb.Artefact(**asdict(event))
    return pb.PushTemplateResponse(event=_ArtefactOf("artefact", artefact))


def _points(points: list[Point]) -> list[pb.MetricPoint]:
    return [pb.MetricPoint(**point._asdict()) for point in points]


def _file(found: FileInfo) -> pb.FileInfo:
    return pb.FileInfo(**asdict(found))
