"""The transport to a host agent on this machine: `hostagent.v1` over its unix socket.

The only module that knows that contract's messages: they end here, in both directions. JSON
rules of protobuf that matter: bytes are base64, 64-bit integers are strings, a field with its
default value is left out, and unknown fields are ignored.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from sandmartin.client.connect import ConnectChannel, Message
from sandmartin.client.transport import (
    Command,
    CreatedSandbox,
    Ended,
    ExecEvent,
    NewSandbox,
    SandboxInfo,
    Started,
    Stderr,
    Stdout,
)
from sandmartin.errors import Denied, SandmartinError, Unavailable

_SERVICE = "hostagent.v1.HostAgentService"
_CONNECT_S = 5.0
#: A create is answered after the boot: with emulation on a busy host that takes its time.
_CREATE_S = 90.0
_DESTROY_S = 60.0
_CALL_S = 30.0
_FILE_S = 120.0
#: Base64 of it stays far below any frame limit.
CHUNK_BYTES = 256 * 2**10


async def agent_answers(path: Path) -> bool:
    """Whether an agent listens on the socket `path`. Raises Denied when we may not ask."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_unix_connection(path)
    except PermissionError as error:
        raise _refusal(path, error) from error
    except OSError:
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


def _refusal(path: Path, error: OSError | None) -> SandmartinError:
    """Why the socket cannot be used: forbidden, missing, or what the system says."""
    if isinstance(error, PermissionError):
        return Denied(
            f"you may not use the agent's socket {path}",
            hint="join the group `sandmartin` (usermod -aG sandmartin USER), or use sudo",
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | ConnectionRefusedError):
        return Unavailable(f"no agent listens on {path}", hint="start one: sudo sandmartin agent")
    why = f": {error.strerror or error}" if error else ""
    return Unavailable(f"the agent's socket {path} cannot be used{why}")


class AgentSocket:
    """A Transport to the agent that listens on the unix socket `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._http = httpx.AsyncClient(
            # No TLS on a unix socket: without `verify=False` every start would load certificates.
            transport=httpx.AsyncHTTPTransport(
                uds=os.fspath(path),
                verify=False,
                # A stream holds its connection: any limit would be one on running commands.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=10),
            ),
            base_url="http://agent",
            trust_env=False,
        )
        self._channel = ConnectChannel(self._http, _SERVICE)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def create(self, new: NewSandbox) -> CreatedSandbox:
        message = _without_defaults(
            sandbox_id=new.sandbox_id,
            template=new.template,
            vcpus=new.vcpus,
            memory_mb=new.memory_mb,
            disk_size_mb=new.disk_size_mb,
            timeout_sec=new.timeout_s,
            envs=dict(new.envs),
        )
        answer = await self._call("CreateSandbox", message, deadline_s=_CREATE_S)
        return CreatedSandbox(
            sandbox_id=_text(answer, "sandboxId"),
            state=_text(answer, "status"),
            address=_text(answer, "hostIp"),
        )

    async def destroy(self, sandbox_id: str) -> None:
        await self._call("DestroySandbox", {"sandbox_id": sandbox_id}, deadline_s=_DESTROY_S)

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        answer = await self._call("ListSandboxes", {})
        return tuple(_sandbox_info(each) for each in _parts(answer, "sandboxes"))

    async def ping(self, sandbox_id: str) -> None:
        await self._call("PingSandbox", {"sandbox_id": sandbox_id})

    async def terminate(self) -> None:
        await self._call("Terminate", {}, deadline_s=_DESTROY_S)

    async def exec_stream(
        self, sandbox_id: str, command: Command
    ) -> AsyncGenerator[ExecEvent, None]:
        message = _without_defaults(
            sandbox_id=sandbox_id,
            cmd=command.cmd,
            args=list(command.args),
            # 0 would be the agent's default limit; below 0 is none.
            timeout_sec=-1 if command.timeout_s is None else command.timeout_s,
            envs=dict(command.envs),
            cwd=command.cwd,
            user=command.user,
            stdin=command.stdin,
        )
        with self._connect_errors_as_ours():
            answers = self._channel.server_stream("ExecStream", message)
            async with aclosing(answers):
                async for answer in answers:
                    if (event := _exec_event(answer)) is not None:
                        yield event

    async def send_stdin(self, sandbox_id: str, pid: int, chunks: AsyncIterator[bytes]) -> None:
        # A command may read its input as slowly as it likes: no deadline.
        meta = {"sandbox_id": sandbox_id, "pid": pid}
        await self._upload("StreamInput", meta, chunks, deadline_s=None)

    async def send_signal(self, sandbox_id: str, pid: int, signal: int) -> None:
        message = {"sandbox_id": sandbox_id, "pid": pid, "signal": signal}
        await self._call("SendSignal", message)

    async def write_file(
        self, sandbox_id: str, path: str, chunks: AsyncIterator[bytes], user: str = ""
    ) -> None:
        meta = _without_defaults(sandbox_id=sandbox_id, path=path, user=user)
        await self._upload("WriteFileStream", meta, chunks, deadline_s=_FILE_S)

    async def read_file(
        self, sandbox_id: str, path: str, user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        message = _without_defaults(sandbox_id=sandbox_id, path=path, user=user)
        with self._connect_errors_as_ours():
            answers = self._channel.server_stream("ReadFileStream", message)
            async with aclosing(answers):
                async for answer in answers:
                    yield _bytes(answer, "chunk")

    async def _call(self, method: str, message: Message, *, deadline_s: float = _CALL_S) -> Message:
        with self._connect_errors_as_ours():
            return await self._channel.unary(method, message, deadline_s=deadline_s)

    async def _upload(
        self,
        method: str,
        meta: Message,
        chunks: AsyncIterator[bytes],
        *,
        deadline_s: float | None,
    ) -> None:
        async def messages() -> AsyncGenerator[Message, None]:
            yield {"meta": meta}
            async for chunk in chunks:
                for at in range(0, len(chunk), CHUNK_BYTES):
                    piece = chunk[at : at + CHUNK_BYTES]
                    yield {"chunk": base64.b64encode(piece).decode("ascii")}

        with self._connect_errors_as_ours():
            async with aclosing(messages()) as body:
                await self._channel.client_stream(method, body, deadline_s=deadline_s)

    @contextmanager
    def _connect_errors_as_ours(self) -> Iterator[None]:
        """Tell a missing, a silent and a forbidden socket apart; httpx has one error for all."""
        try:
            yield
        except httpx.ConnectError as error:
            raise _refusal(self._path, _os_error(error)) from error


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's refusal that `error` was made of."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _without_defaults(**fields: Any) -> Message:
    return {name: value for name, value in fields.items() if value}


# Fields of an answer; one that is absent or null has its default.


def _text(message: Message, name: str) -> str:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise SandmartinError(f"the agent's answer has no text in {name}")
    return value or ""


def _int(message: Message, name: str) -> int:
    try:
        return int(message.get(name) or 0)
    # Python reads `Infinity` as JSON, too.
    except (TypeError, ValueError, OverflowError) as error:
        raise SandmartinError(f"the agent's answer has no number in {name}") from error


def _bytes(message: Message, name: str) -> bytes:
    try:
        return base64.b64decode(message.get(name) or "", validate=True)
    except (TypeError, ValueError) as error:
        raise SandmartinError(f"the agent's answer has no base64 in {name}") from error


def _part(message: Message, name: str) -> Message | None:
    """The message in field `name`, None when the field is absent."""
    part = message.get(name)
    if part is not None and not isinstance(part, dict):
        raise SandmartinError(f"the agent's answer has no object in {name}")
    return part


def _parts(message: Message, name: str) -> list[Message]:
    parts = message.get(name) or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise SandmartinError(f"the agent's answer has no list of objects in {name}")
    return parts


def _exec_event(message: Message) -> ExecEvent | None:
    """The event in an ExecStreamResponse, None for a kind that this release does not know."""
    if (start := _part(message, "start")) is not None:
        return Started(_int(start, "pid"))
    if (data := _part(message, "data")) is not None:
        kind = Stdout if "stdout" in data else Stderr
        return kind(_bytes(data, "stdout" if kind is Stdout else "stderr"))
    if (end := _part(message, "end")) is not None:
        return Ended(
            exit_code=_int(end, "exitCode"),
            signal=_int(end, "signal"),
            error=_text(end, "error"),
        )
    return None


def _sandbox_info(message: Message) -> SandboxInfo:
    return SandboxInfo(
        sandbox_id=_text(message, "sandboxId"),
        state=_text(message, "status"),
        template=_text(message, "template"),
        vcpus=_int(message, "vcpus"),
        memory_mb=_int(message, "memoryMb"),
        disk_size_mb=_int(message, "diskSizeMb"),
        timeout_s=_int(message, "timeoutSec"),
        address=_text(message, "hostIp"),
        created_at=_int(message, "createdAtUnix"),
        last_active_at=_int(message, "lastActiveAtUnix"),
        reason=_text(message, "statusReason"),
    )
