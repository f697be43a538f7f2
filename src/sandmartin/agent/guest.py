"""The agent's way to a guest agent: introduction, processes and files over the tap.

What a guest answers is hostile: every reply is bounded in size, no redirect is followed, nothing
is unpacked, and every wait has a deadline. A guest that does not answer at all is GuestSilent;
whoever owns the sandbox decides what that means.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyqwest
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from protobuf import Oneof

from sandmartin.errors import (
    Conflict,
    Denied,
    DiskFull,
    Exhausted,
    GuestSilent,
    Invalid,
    NotFound,
    NotStarted,
    SandmartinError,
    TimedOut,
    ToolFailed,
)
from sandmartin.rpc.envd.process import process_pb as pb
from sandmartin.rpc.envd.process.process_connect import ProcessClient

PORT = 49983

_CALL_DEADLINE_S = 15.0
_INTRODUCE_TRY_S = 10.0
_INTRODUCE_PAUSE_S = 0.02
_KEEPALIVE_S = 10
#: A stream that brought nothing, not even a keepalive, for this long has no guest behind it.
_STREAM_SILENCE_S = 35.0
#: An upload may stall while the guest's disk catches up, but not for ever.
_UPLOAD_SILENCE_S = 120.0
_MAX_REPLY_BYTES = 1 << 20
_MAX_MESSAGE_BYTES = 4 << 20
_ENTROPY_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a sandbox is told to be."""

    sandbox_id: str
    template: str
    hostname: str
    machine_id: str
    token: str = field(repr=False)
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Let the root file system fill its disk.
    grow_root: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command to run. An empty `cwd` is the user's home; `timeout_s` None is no limit."""

    cmd: str
    args: tuple[str, ...] = ()
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str = ""
    user: str = "root"
    stdin: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True)
class Started:
    pid: int


@dataclass(frozen=True)
class Output:
    data: bytes
    #: False is standard error.
    stdout: bool = True


@dataclass(frozen=True, kw_only=True)
class Ended:
    """`exit_code` is 128 + signal when a signal ended the command."""

    exit_code: int
    signal: int = 0
    error: str = ""
    timed_out: bool = False


ProcessEvent = Started | Output | Ended


class Guest:
    """The client of one sandbox's guest agent."""

    def __init__(self, address: str, token: str, port: int = PORT) -> None:
        self._url = f"http://{address}:{port}"
        self._token = token
        self._http = pyqwest.Client(
            pyqwest.HTTPTransport(
                connect_timeout=5.0,
                follow_redirects=False,
                enable_gzip=False,
                enable_brotli=False,
                enable_zstd=False,
                enable_otel=False,
            )
        )
        self._processes = ProcessClient(
            self._url,
            http_client=self._http,
            accept_compression=(),
            send_compression=None,
            read_max_bytes=_MAX_MESSAGE_BYTES,
        )

    async def close(self) -> None:
        await self._processes.close()

    def _headers(self, user: str | None = None) -> dict[str, str]:
        headers = {"x-access-token": self._token}
        if user is not None:
            name = base64.b64encode(f"{user}:".encode()).decode()
            headers["authorization"] = f"Basic {name}"
        return headers

    # Introduction and health.

    async def introduce(self, identity: Identity, deadline_s: float) -> None:
        """Tell a guest who it is, waiting for it to boot, and have it confirmed.

        Raises TimedOut when it does not answer in time, ToolFailed when it confirms something
        else or cannot take on what it was told.
        """
        until = time.monotonic() + deadline_s
        while True:
            try:
                async with asyncio.timeout(_INTRODUCE_TRY_S):
                    status, reply = await self._post_json("/init", _introduction(identity))
                break
            except (OSError, TimeoutError, pyqwest.ReadError, pyqwest.WriteError):
                if time.monotonic() > until:
                    raise TimedOut(
                        f"the guest agent did not answer within {deadline_s:g} s of the VM's start",
                        hint="the host may be overloaded; raise SANDMARTIN_BOOT_TIMEOUT_S",
                    ) from None
                await asyncio.sleep(_INTRODUCE_PAUSE_S)
        if status != 200:
            raise ToolFailed(f"the guest did not take its identity: {_message(reply)}")
        told = (identity.sandbox_id, identity.hostname, identity.machine_id)
        if tuple(reply.get(key) for key in ("sandboxId", "hostname", "machineId")) != told:
            raise ToolFailed("the guest confirmed another identity than it was given")

    async def _post_json(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        headers = self._headers() | {"content-type": "application/json"}
        content = json.dumps(body).encode()
        async with await self._http.stream("POST", self._url + path, headers, content) as response:
            return response.status, _parse(await _read_bounded(response))

    async def healthy(self, deadline_s: float) -> bool:
        """Whether the guest agent answers at all."""
        try:
            async with (
                asyncio.timeout(deadline_s),
                await self._http.stream("GET", self._url + "/health") as response,
            ):
                return response.status == 204
        except (OSError, TimeoutError, pyqwest.ReadError, pyqwest.WriteError):
            return False

    # Processes.

    async def start(self, command: Command) -> AsyncIterator[ProcessEvent]:
        """Start a command and listen to it until its end. Raises NotStarted, Invalid, GuestSilent."""
        headers = self._headers(command.user)
        headers["keepalive-ping-interval"] = str(_KEEPALIVE_S)
        if command.timeout_s is not None:
            headers["connect-timeout-ms"] = str(max(1, int(command.timeout_s * 1000)))
        request = pb.StartRequest(
            process=pb.ProcessConfig(
                cmd=command.cmd,
                args=list(command.args),
                envs=dict(command.envs),
                cwd=command.cwd or None,
            ),
            stdin=command.stdin,
        )
        with _translated(starting=True):
            responses = self._processes.start(request, headers=headers)
            async for response in _audible(responses):
                event = _process_event(response)
                if event is not None:
                    yield event
                if isinstance(event, Ended):
                    return
        raise GuestSilent("the guest agent broke off before the command's end")

    async def send_input(self, pid: int, data: bytes) -> None:
        """Write to a command's standard input; waits while the command does not read."""
        request = pb.SendInputRequest(
            process=_selector(pid), input=pb.ProcessInput(input=Oneof("stdin", data))
        )
        with _translated():
            await self._processes.send_input(request, headers=self._headers())

    async def close_input(self, pid: int) -> None:
        request = pb.CloseStdinRequest(process=_selector(pid))
        with _translated():
            async with asyncio.timeout(_CALL_DEADLINE_S):
                await self._processes.close_stdin(request, headers=self._headers())

    async def signal(self, pid: int, number: int) -> None:
        request = pb.SendSignalRequest(process=_selector(pid), signal=pb.Signal(number))
        with _translated():
            async with asyncio.timeout(_CALL_DEADLINE_S):
                await self._processes.send_signal(request, headers=self._headers())

    # Files.

    async def upload(self, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        """Write a file of any size. Raises DiskFull, Denied, Invalid, NotFound, GuestSilent."""
        headers = self._headers() | {"content-type": "application/octet-stream"}
        progress = _Progress()
        with _translated():
            sending = self._http.stream(
                "POST",
                self._url + "/files",
                headers,
                progress.count(chunks),
                params={"path": path, "username": user},
            )
            response = await progress.watch(sending, _UPLOAD_SILENCE_S)
            async with response:
                if response.status != 200:
                    raise _file_error(response.status, await _read_bounded(response))

    async def download(self, path: str, user: str) -> AsyncIterator[bytes]:
        """Read a file of any size. Raises NotFound, Denied, Invalid, GuestSilent."""
        query = {"path": path, "username": user}
        url = self._url + "/files"
        with _translated():
            async with asyncio.timeout(_CALL_DEADLINE_S):
                response = await self._http.stream("GET", url, self._headers(), params=query)
            async with response:
                if response.status != 200:
                    raise _file_error(response.status, await _read_bounded(response))
                async for chunk in _audible(response.content):
                    yield bytes(chunk)


def _introduction(identity: Identity) -> dict[str, Any]:
    return {
        "accessToken": identity.token,
        "sandboxId": identity.sandbox_id,
        "templateId": identity.template,
        "hostname": identity.hostname,
        "machineId": identity.machine_id,
        "envVars": dict(identity.envs),
        "timestamp": datetime.now(UTC).isoformat(),
        "entropy": base64.b64encode(secrets.token_bytes(_ENTROPY_BYTES)).decode(),
        "growRoot": identity.grow_root,
    }


def _selector(pid: int) -> pb.ProcessSelector:
    return pb.ProcessSelector(selector=Oneof("pid", pid))


def _process_event(response: pb.StartResponse) -> ProcessEvent | None:
    event = response.event.event if response.event else None
    match event.field if event else None:
        case "start":
            return Started(event.value.pid)
        case "data" if event.value.output is not None:
            output = event.value.output
            return Output(output.value, stdout=output.field == "stdout")
        case "end":
            end = event.value
            code = 128 + end.signal if end.signal else end.exit_code & 0xFF
            error = (end.error or "") if end.timed_out else ""
            return Ended(
                exit_code=code, signal=end.signal, error=error, timed_out=end.timed_out
            )
    return None


async def _audible(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The messages of a stream that must not fall silent. Raises TimeoutError when it does."""
    try:
        while True:
            async with asyncio.timeout(_STREAM_SILENCE_S):
                try:
                    message = await anext(messages)
                except StopAsyncIteration:
                    return
            yield message
    finally:
        if (close := getattr(messages, "aclose", None)) is not None:
            await close()


class _Progress:
    """Notices when an upload stands still."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    async def count(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            self._last = time.monotonic()
            yield chunk
            self._last = time.monotonic()

    async def watch(self, sending: Any, silence_s: float) -> pyqwest.Response:
        task: asyncio.Future[pyqwest.Response] = asyncio.ensure_future(sending)
        try:
            while not task.done():
                left = self._last + silence_s - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait({task}, timeout=left)
            return task.result()
        finally:
            task.cancel()


async def _read_bounded(response: pyqwest.Response) -> bytes:
    content = bytearray()
    async for chunk in response.content:
        content += chunk
        if len(content) > _MAX_REPLY_BYTES:
            raise ToolFailed("the guest agent's answer is too large")
    return bytes(content)


def _parse(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        parsed = json.loads(content)
        if isinstance(parsed, dict):
            return parsed
    return {}


def _message(reply: Mapping[str, Any]) -> str:
    return str(reply.get("message", "no reason given"))[:500]


_FILE_ERRORS: dict[int, type[SandmartinError]] = {
    400: Invalid,
    401: Invalid,
    403: Denied,
    404: NotFound,
    507: DiskFull,
}


def _file_error(status: int, content: bytes) -> SandmartinError:
    error = _FILE_ERRORS.get(status, ToolFailed)
    hint = "remove files in the sandbox, or create it with a larger disk" if status == 507 else ""
    return error(_message(_parse(content)), hint=hint)


_CODES: dict[Code, type[SandmartinError]] = {
    Code.INVALID_ARGUMENT: Invalid,
    Code.UNAUTHENTICATED: Invalid,
    Code.NOT_FOUND: NotFound,
    Code.PERMISSION_DENIED: Denied,
    Code.FAILED_PRECONDITION: Conflict,
    Code.RESOURCE_EXHAUSTED: Exhausted,
    Code.UNAVAILABLE: GuestSilent,
    Code.CANCELED: GuestSilent,
    Code.DEADLINE_EXCEEDED: GuestSilent,
}


@contextlib.contextmanager
def _translated(*, starting: bool = False) -> Iterator[None]:
    """Turn what the transport and the guest raise into our errors."""
    try:
        yield
    except ConnectError as error:
        kind = _CODES.get(error.code, ToolFailed)
        if starting and kind in {NotFound, Denied, Exhausted}:
            kind = NotStarted
        raise kind(error.message[:500]) from error
    except (OSError, TimeoutError, pyqwest.ReadError, pyqwest.WriteError) as error:
        raise GuestSilent(f"the guest agent does not answer: {error}") from error
