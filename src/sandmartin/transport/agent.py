"""The transport to a host agent: `hostagent.v1` over its unix socket, or TLS to another machine.

With `messages` the only module that knows that contract's messages: they end here, in both
directions. Single calls are JSON. Protobuf's rules for it that matter: bytes are base64, 64-bit
integers are strings, a field with its default value is left out, and unknown fields are ignored.
The messages of streams, which carry content, are protobuf's binary form.
"""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from sandmartin.errors import Denied, SandmartinError, Unavailable, Unimplemented
from sandmartin.model import NetworkPolicy
from sandmartin.phases import Phase
from sandmartin.relay.kept import KeptLines
from sandmartin.relay.line import Line, Lines
from sandmartin.transport import (
    Artefact,
    ArtefactStore,
    Checkpoint,
    Command,
    CreatedSandbox,
    ExecEvent,
    FileInfo,
    ForkedSandbox,
    HostInfo,
    ImportedImage,
    ImportProgress,
    MetricPoint,
    NewSandbox,
    Process,
    PtySize,
    PushProgress,
    RegistryAuth,
    SandboxInfo,
    Snapshot,
    TemplateInfo,
    find_sandbox,
    messages,
)
from sandmartin.transport import protobuf as wire
from sandmartin.transport.connect import ConnectChannel
from sandmartin.transport.fields import Message
from sandmartin.transport.fields import integer as _int
from sandmartin.transport.fields import octets as _bytes
from sandmartin.transport.fields import part as _part
from sandmartin.transport.fields import parts as _parts
from sandmartin.transport.fields import text as _text

_SERVICE = "hostagent.v1.HostAgentService"
_CONNECT_S = 5.0
#: A create is answered after the boot: with emulation on a busy host that takes its time.
_CREATE_S = 90.0
_DESTROY_S = 60.0
#: What writes or reads a whole memory, on a disk that may be slow, and a fork many of them.
_SNAPSHOT_S = 300.0
#: What unpacks a whole image.
_IMPORT_S = 3600.0
#: What brings a whole template from an artefact store.
_FETCH_S = 900.0
_CALL_S = 30.0
_FILE_S = 120.0
#: Stays far below any frame limit.
CHUNK_BYTES = 512 * 2**10


async def agent_answers(path: Path) -> bool:
    """Whether an agent listens on the socket `path`. Raises Denied when we may not ask."""
    try:
        await reach_agent(path)
    except Unavailable:
        return False
    return True


async def reach_agent(path: Path) -> None:
    """Make sure that an agent listens on the socket `path`. Raises Denied, Unavailable."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise _refusal(path, error) from error
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _refusal(path: Path, error: OSError | None) -> SandmartinError:
    """Why the socket cannot be used: forbidden, missing, or what the system says."""
    if isinstance(error, PermissionError):
        return Denied(
            f"you may not use the agent's socket {path}",
            hint="join the group `sandmartin` (usermod -aG sandmartin USER), or use sudo",
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | ConnectionRefusedError):
        return Unavailable(f"no agent listens on {path}", hint="start one: sudo sandmartin agent")
    why = f": {error.strerror or error or 'it does not answer'}" if error else ""
    return Unavailable(f"the agent's socket {path} cannot be used{why}")


#: A stream holds its connection: any limit would be one on running commands.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=10)


class Agent(ABC):
    """A Transport to the agent at the other end of `transport`."""

    def __init__(self, transport: httpx.AsyncBaseTransport, base_url: str) -> None:
        self._http = httpx.AsyncClient(transport=transport, base_url=base_url, trust_env=False)
        self._channel = ConnectChannel(self._http, _SERVICE)

        self._lines = Lines()
        self._kept = KeptLines()

    async def aclose(self) -> None:
        self._kept.abort()
        self._lines.abort()
        await self._lines.closed()
        await self._http.aclose()

    async def dial(self, sandbox_id: str) -> Line:
        """A connection for one request of a sandbox's traffic. Raises Unavailable, Denied."""
        if (kept := self._kept.take(sandbox_id)) is not None:
            return kept
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await self._connect()
        except OSError as error:
            raise self._unreachable(error) from error

    def keep(self, sandbox_id: str, line: Line) -> None:
        """Have a connection for another request of the sandbox, after a whole exchange."""
        self._kept.keep(sandbox_id, line)

    @abstractmethod
    async def _connect(self) -> Line: ...

    @abstractmethod
    def _unreachable(self, error: OSError | None) -> SandmartinError:
        """Why no connection could be made."""

    async def create(self, new: NewSandbox) -> CreatedSandbox:
        if new.metadata or new.on_timeout or new.auto_resume or new.private:
            raise Unimplemented(
                "a host agent knows no metadata, on_timeout, auto_resume or private",
                hint="they need a control plane: run `sandmartin up`, and set SANDMARTIN_URL",
            )
        message = _without_defaults(
            sandbox_id=new.sandbox_id,
            template=new.template,
            vcpus=new.vcpus,
            memory_mb=new.memory_mb,
            disk_size_mb=new.disk_size_mb,
            timeout_sec=new.timeout_s,
            envs=dict(new.envs),
            network=None if new.network is None else new.network.to_dict(),
            default_user=new.default_user,
            default_workdir=new.default_workdir,
        )
        answer = await self._call("CreateSandbox", message, deadline_s=_CREATE_S)
        return messages.placed(answer, _text(answer, "sandboxId"))

    async def destroy(self, sandbox_id: str) -> None:
        await self._call("DestroySandbox", {"sandbox_id": sandbox_id}, deadline_s=_DESTROY_S)

    async def undo_create(self, new: NewSandbox, _failure: BaseException) -> None:
        await self.destroy(new.sandbox_id)

    async def get_sandbox(self, sandbox_id: str) -> SandboxInfo:
        return find_sandbox(await self.list_sandboxes(), sandbox_id)

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        answer = await self._call("ListSandboxes", {})
        return tuple(messages.sandbox_info(each) for each in _parts(answer, "sandboxes"))

    async def ping(self, sandbox_id: str) -> None:
        await self._call("PingSandbox", {"sandbox_id": sandbox_id})

    async def set_timeout(self, sandbox_id: str, timeout_s: int) -> None:
        message = _without_defaults(sandbox_id=sandbox_id, timeout_sec=timeout_s)
        # What is done to it at the moment ends first, as below.
        await self._call("SetTimeout", message, deadline_s=_DESTROY_S)

    async def update_network(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        message = {"sandbox_id": sandbox_id, "network": policy.to_dict()}
        await self._call("UpdateNetwork", message, deadline_s=_DESTROY_S)

    async def terminate(self) -> None:
        """Destroy every sandbox and end the agent."""
        await self._call("Terminate", {}, deadline_s=_DESTROY_S)

    async def pause(self, sandbox_id: str) -> tuple[Phase, ...]:
        message = {"sandbox_id": sandbox_id}
        return messages.phases(await self._call("PauseSandbox", message, deadline_s=_SNAPSHOT_S))

    async def resume(self, sandbox_id: str, timeout_s: int | None) -> CreatedSandbox:
        message = _without_defaults(
            sandbox_id=sandbox_id, timeout_sec=timeout_s, keep_timeout=timeout_s is None
        )
        answer = await self._call("ResumeSandbox", message, deadline_s=_SNAPSHOT_S)
        return messages.placed(answer, sandbox_id)

    async def fork(
        self, sandbox_id: str, child_ids: tuple[str, ...], timeout_s: int
    ) -> tuple[ForkedSandbox, ...]:
        message = _without_defaults(
            sandbox_id=sandbox_id, child_ids=list(child_ids), timeout_sec=timeout_s
        )
        answer = await self._call("ForkSandbox", message, deadline_s=_SNAPSHOT_S)
        return tuple(messages.forked(each) for each in _parts(answer, "children"))

    async def undo_fork(
        self,
        _sandbox_id: str,
        child_ids: tuple[str, ...],
        _timeout_s: int,
        _failure: BaseException,
    ) -> None:
        for each in child_ids:
            await self.destroy(each)

    async def create_checkpoint(self, sandbox_id: str, comment: str) -> Checkpoint:
        message = _without_defaults(sandbox_id=sandbox_id, comment=comment)
        answer = await self._call("CreateCheckpoint", message, deadline_s=_SNAPSHOT_S)
        made = messages.checkpoint(_part(answer, "checkpoint") or {})
        return replace(made, phases=messages.phases(answer))

    async def list_checkpoints(self, sandbox_id: str) -> tuple[Checkpoint, ...]:
        answer = await self._call("ListCheckpoints", {"sandbox_id": sandbox_id})
        return tuple(messages.checkpoint(each) for each in _parts(answer, "checkpoints"))

    async def delete_checkpoint(self, sandbox_id: str, checkpoint_id: str) -> None:
        message = {"sandbox_id": sandbox_id, "checkpoint_id": checkpoint_id}
        await self._call("DeleteCheckpoint", message)

    async def rollback(self, sandbox_id: str, checkpoint_id: str) -> CreatedSandbox:
        message = {"sandbox_id": sandbox_id, "checkpoint_id": checkpoint_id}
        answer = await self._call("RollbackSandbox", message, deadline_s=_SNAPSHOT_S)
        return messages.placed(answer, sandbox_id)

    async def create_snapshot(self, sandbox_id: str, name: str, *, live: bool) -> Snapshot:
        message = _without_defaults(sandbox_id=sandbox_id, name=name, live=live)
        answer = await self._call("CreateSnapshot", message, deadline_s=_SNAPSHOT_S)
        return Snapshot(
            name=_text(answer, "name"),
            size_bytes=_int(answer, "sizeBytes"),
            phases=messages.phases(answer),
        )

    async def delete_snapshot(self, name: str) -> None:
        await self._call("DeleteSnapshot", {"name": name}, deadline_s=_DESTROY_S)

    async def list_templates(self) -> tuple[TemplateInfo, ...]:
        answer = await self._call("ListTemplates", {})
        return tuple(messages.template(each) for each in _parts(answer, "templates"))

    async def read_template(self, name: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._download("ReadTemplate", wire.text(1, name))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def write_template(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        await self._upload("WriteTemplate", wire.text(1, name), chunks, deadline_s=_SNAPSHOT_S)

    async def import_image(
        self, reference: str, name: str, auth: RegistryAuth | None = None
    ) -> AsyncGenerator[ImportProgress | ImportedImage, None]:
        """Make a template of an image of a registry: what is done, and at the end what came.

        Who stops listening ends it, and nothing is left.
        """
        message = wire.text(1, reference) + wire.text(2, name)
        if auth is not None:
            whom = wire.text(1, auth.username) + wire.text(2, auth.password)
            message += wire.content(3, whom, always=True)
        with self._connect_errors_as_ours():
            async with aclosing(self._channel.server_stream("ImportImage", message)) as answers:
                async for answer in answers:
                    if (event := messages.import_event(answer)) is not None:
                        yield event

    async def import_archive(self, name: str, pieces: AsyncIterator[bytes]) -> ImportedImage:
        """Make a template of an archive of one image, of OCI's or Docker's form."""
        meta = wire.text(1, name)
        answer = await self._upload("ImportArchive", meta, pieces, deadline_s=_IMPORT_S)
        return messages.imported_image(messages.content(messages.fields(answer), 1))

    async def push_template(
        self, name: str, store: ArtefactStore
    ) -> AsyncGenerator[PushProgress | Artefact, None]:
        """Have a template stored; the last word is the artefact.

        Raises NotFound, Invalid, DiskFull, Denied, Unavailable.
        """
        async with aclosing(self._push("PushTemplate", name, store)) as events:
            async for event in events:
                yield event

    async def push_sandbox(
        self, sandbox_id: str, store: ArtefactStore
    ) -> AsyncGenerator[PushProgress | Artefact, None]:
        """Have what a paused sandbox sleeps in stored, as a template's is.

        Raises also Conflict when it has checkpoints, or does not sleep on to the end.
        """
        async with aclosing(self._push("PushSandbox", sandbox_id, store)) as events:
            async for event in events:
                yield event

    async def adopt_sandbox(self, sandbox_id: str, source: str, template: str) -> None:
        """Have a paused sandbox made of a template that such an artefact became.

        One that sleeps there already is success. Raises NotFound, Invalid, AlreadyExists.
        """
        message = {"sandbox_id": sandbox_id, "source": source, "template": template}
        await self._call("AdoptSandbox", message, deadline_s=_DESTROY_S)

    async def _push(
        self, method: str, what: str, store: ArtefactStore
    ) -> AsyncGenerator[PushProgress | Artefact, None]:
        message = wire.text(1, what) + wire.content(2, messages.store(store))
        with self._connect_errors_as_ours():
            async with aclosing(self._channel.server_stream(method, message)) as answers:
                async for answer in answers:
                    if (event := messages.push_event(answer)) is not None:
                        yield event

    async def fetch_template(self, name: str, artefact_id: str, store: ArtefactStore) -> None:
        """Have a template made of an artefact, whole or not at all.

        Raises Invalid for one that is damaged or gone, AlreadyExists, Exhausted, Denied,
        Unavailable; Conflict when it does not run there.
        """
        key = base64.b64encode(store.key).decode()
        message = {
            "name": name,
            "artefact_id": artefact_id,
            "store": {"url": store.url, "key": key},
        }
        await self._call("FetchTemplate", message, deadline_s=_FETCH_S)

    async def metrics(self, sandbox_id: str, time_range: str) -> tuple[MetricPoint, ...]:
        message = {"sandbox_id": sandbox_id, "range": time_range}
        answer = await self._call("GetSandboxMetrics", message)
        return tuple(messages.metric_point(each) for each in _parts(answer, "points"))

    async def flush_metrics(self, sandbox_id: str) -> dict[str, tuple[MetricPoint, ...]]:
        """All that is known of a sandbox by range, oldest first, which is forgotten then."""
        answer = await self._call("FlushSandboxMetrics", {"sandbox_id": sandbox_id})
        fields = {"10m": "points10m", "2h": "points2h", "24h": "points24h"}
        return {
            tier: tuple(messages.metric_point(each) for each in _parts(answer, field))
            for tier, field in fields.items()
        }

    async def describe(self) -> HostInfo:
        """What the host is, and what it has for sandboxes."""
        return messages.host_info(await self._call("DescribeHost", {}))

    async def flatten(self, sandbox_id: str, name: str) -> int:
        """Make an image of a sandbox's disk, and end it; the bytes that the image takes."""
        message = {"sandbox_id": sandbox_id, "name": name}
        answer = await self._call("FlattenRootfs", message, deadline_s=_SNAPSHOT_S)
        return _int(answer, "sizeBytes")

    async def read_console(self, sandbox_id: str) -> bytes:
        return _bytes(await self._call("ReadConsole", {"sandbox_id": sandbox_id}), "content")

    async def list_processes(self, sandbox_id: str) -> tuple[Process, ...]:
        answer = await self._call("ListProcesses", {"sandbox_id": sandbox_id})
        return tuple(messages.process(each) for each in _parts(answer, "processes"))

    async def exec_stream(
        self, sandbox_id: str, command: Command
    ) -> AsyncGenerator[ExecEvent, None]:
        events = self._listen("ExecStream", messages.exec_request(sandbox_id, command))
        async with aclosing(events):
            async for event in events:
                yield event

    async def connect_process(self, sandbox_id: str, pid: int) -> AsyncGenerator[ExecEvent, None]:
        message = wire.text(1, sandbox_id) + wire.integer(2, pid)
        async with aclosing(self._listen("ConnectProcess", message)) as events:
            async for event in events:
                yield event

    async def _listen(self, method: str, message: bytes) -> AsyncGenerator[ExecEvent, None]:
        with self._connect_errors_as_ours():
            async with aclosing(self._channel.server_stream(method, message)) as answers:
                async for answer in answers:
                    if (event := messages.exec_event(answer)) is not None:
                        yield event

    async def send_stdin(self, sandbox_id: str, pid: int, chunks: AsyncIterator[bytes]) -> None:
        # A command may read its input as slowly as it likes: no deadline.
        meta = wire.text(1, sandbox_id) + wire.integer(2, pid)
        await self._upload("StreamInput", meta, chunks, deadline_s=None)

    async def send_signal(self, sandbox_id: str, pid: int, signal: int) -> None:
        message = {"sandbox_id": sandbox_id, "pid": pid, "signal": signal}
        await self._call("SendSignal", message)

    async def resize_pty(self, sandbox_id: str, pid: int, size: PtySize) -> None:
        message = {"sandbox_id": sandbox_id, "pid": pid, "pty": asdict(size)}
        await self._call("ResizePty", message)

    async def stat_file(self, sandbox_id: str, path: str, user: str = "") -> FileInfo:
        message = _without_defaults(sandbox_id=sandbox_id, path=path, user=user)
        answer = await self._call("StatFile", message)
        return messages.file_info(_part(answer, "file") or {})

    async def list_files(
        self, sandbox_id: str, path: str, user: str = "", *, depth: int = 1
    ) -> tuple[FileInfo, ...]:
        message = _without_defaults(sandbox_id=sandbox_id, path=path, user=user, depth=depth)
        answer = await self._call("ListFiles", message, deadline_s=_FILE_S)
        return tuple(messages.file_info(each) for each in _parts(answer, "files"))

    async def make_directory(self, sandbox_id: str, path: str, user: str = "") -> None:
        message = _without_defaults(sandbox_id=sandbox_id, path=path, user=user)
        await self._call("MakeDirectory", message)

    async def move_file(
        self, sandbox_id: str, source: str, destination: str, user: str = ""
    ) -> None:
        message = _without_defaults(
            sandbox_id=sandbox_id, source=source, destination=destination, user=user
        )
        await self._call("MoveFile", message, deadline_s=_FILE_S)

    async def remove_file(self, sandbox_id: str, path: str, user: str = "") -> None:
        message = _without_defaults(sandbox_id=sandbox_id, path=path, user=user)
        await self._call("RemoveFile", message, deadline_s=_FILE_S)

    async def write_file(
        self, sandbox_id: str, path: str, chunks: AsyncIterator[bytes], user: str = ""
    ) -> None:
        meta = messages.file_request(sandbox_id, path, user)
        await self._upload("WriteFileStream", meta, chunks, deadline_s=_FILE_S)

    async def read_file(
        self, sandbox_id: str, path: str, user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        message = messages.file_request(sandbox_id, path, user)
        async with aclosing(self._download("ReadFileStream", message)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def write_tree(
        self, sandbox_id: str, directory: str, pieces: AsyncIterator[bytes], *, owner: str = ""
    ) -> int:
        meta = wire.text(1, sandbox_id) + wire.text(2, directory) + wire.text(3, owner)
        answer = await self._upload("WriteTree", meta, pieces, deadline_s=_FILE_S)
        return messages.number(messages.fields(answer), 1)

    async def read_tree(self, sandbox_id: str, path: str) -> AsyncGenerator[bytes, None]:
        message = wire.text(1, sandbox_id) + wire.text(2, path)
        async with aclosing(self._download("ReadTree", message)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _download(self, method: str, message: bytes) -> AsyncGenerator[bytes, None]:
        with self._connect_errors_as_ours():
            async with aclosing(self._channel.server_stream(method, message)) as answers:
                async for answer in answers:
                    if chunk := messages.content(messages.fields(answer), 1):
                        yield chunk

    async def _call(self, method: str, message: Message, *, deadline_s: float = _CALL_S) -> Message:
        with self._connect_errors_as_ours():
            return await self._channel.unary(method, message, deadline_s=deadline_s)

    async def _upload(
        self, method: str, meta: bytes, chunks: AsyncIterator[bytes], *, deadline_s: float | None
    ) -> bytes:
        async def messages() -> AsyncGenerator[bytes, None]:
            yield wire.content(1, meta, always=True)
            async for chunk in chunks:
                whole = memoryview(chunk)
                for at in range(0, len(whole), CHUNK_BYTES):
                    yield wire.content(2, whole[at : at + CHUNK_BYTES])

        with self._connect_errors_as_ours():
            async with aclosing(messages()) as body:
                return await self._channel.client_stream(method, body, deadline_s=deadline_s)

    @contextmanager
    def _connect_errors_as_ours(self) -> Iterator[None]:
        """Tell a missing, a silent and a forbidden agent apart; httpx has one error for all."""
        try:
            yield
        except httpx.ConnectError as error:
            raise self._unreachable(_os_error(error)) from error
        except RuntimeError as error:
            if not self._http.is_closed:
                raise
            raise Unavailable("the connection to the agent was closed") from error


class AgentSocket(Agent):
    """A Transport to the agent that listens on the unix socket `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # No TLS on a unix socket: without `verify=False` every start would load certificates.
        transport = httpx.AsyncHTTPTransport(uds=os.fspath(path), verify=False, limits=_LIMITS)
        super().__init__(transport, "http://agent")

    async def reach(self) -> None:
        """Make sure that an agent listens. Raises Denied, Unavailable."""
        await reach_agent(self._path)

    def _unreachable(self, error: OSError | None) -> SandmartinError:
        return _refusal(self._path, error)

    async def _connect(self) -> Line:
        return await self._lines.dial_unix(self._path)


class _NamedPeer(httpx.AsyncHTTPTransport):
    """HTTP to a peer that is known by a name of its own, not by its address."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self._name = name

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": self._name}
        return await super().handle_async_request(request)


class RemoteAgent(Agent):
    """A Transport to the agent at `url` on another machine; `tls` says who either side is.

    The agent's certificate must be one for `name`, whatever address it has.
    """

    def __init__(self, url: str, tls: ssl.SSLContext, name: str) -> None:
        self._url = url
        self._tls = tls
        self._name = name
        super().__init__(_NamedPeer(name, verify=tls, limits=_LIMITS), url)

    def _unreachable(self, error: OSError | None) -> SandmartinError:
        return Unavailable(
            f"the agent at {self._url} cannot be reached: {error or 'it does not answer'}",
            hint="does it run, and do its certificate and ours fit?",
        )

    async def _connect(self) -> Line:
        at = httpx.URL(self._url)
        return await self._lines.dial(at.host, at.port or 443, self._tls, self._name)


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's refusal that `error` was made of."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _without_defaults(**fields: Any) -> Message:
    return {name: value for name, value in fields.items() if value}
