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
import re
import secrets
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import unquote

import pyqwest
from protobuf import Message, Oneof

from sandmartin.agent import replies
from sandmartin.agent.body import Body
from sandmartin.agent.passage import Passage
from sandmartin.errors import (
    Denied,
    Exhausted,
    GuestSilent,
    NotFound,
    NotStarted,
    SandmartinError,
    TimedOut,
    ToolFailed,
    Unimplemented,
)
from sandmartin.relay.line import Line
from sandmartin.relay.target import GUEST_PORT
from sandmartin.rpc.envd.filesystem import filesystem_pb as fs
from sandmartin.rpc.envd.process import process_pb as pb

PORT = GUEST_PORT

_CONNECT_S = 5.0
_INTRODUCE_TRY_S = 10.0
_INTRODUCE_PAUSE_S = 0.02
#: A guest whose clock is later, the way of its answer included, is told the time again.
_CLOCK_TOLERANCE_S = 0.12
_CLOCK_TRIES = 1
#: Until a stream closes that has told the command's end.
_FINISH_S = 0.5
#: Output comes in chunks of 32 KiB at most.
_MAX_MESSAGE_BYTES = 1 << 20
_ENTROPY_BYTES = 64
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}")

#: Said after the last byte of a tree.
_OUTCOME, _WHOLE = "sandmartin-outcome", "whole"

#: The Connect protocol's envelope: flags and size, then the message.
_ENVELOPE = struct.Struct(">BI")
_PLAIN, _LAST = 0, 2


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long a guest agent may be silent before it counts as dead."""

    #: Until it answers a call.
    call_s: float = 15.0
    #: Between two messages of a stream; while there is nothing to tell it sends keepalives.
    stream_s: float = 35.0
    #: Until it takes more of an upload: its disk may be slow.
    upload_s: float = 120.0

    @property
    def keepalive_s(self) -> int:
        return max(1, int(self.stream_s / 3))


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a sandbox is told to be."""

    sandbox_id: str
    template: str
    hostname: str
    machine_id: str
    token: str = field(repr=False)
    #: None leaves them as they are.
    envs: Mapping[str, str] | None = field(default=None, repr=False)
    #: Size of the disk that the root file system is to fill; 0 leaves it alone.
    root_bytes: int = 0
    #: It is in another place than it believes: connections to the outside are of no use any more.
    moved: bool = False
    #: Of requests that name nobody; empty leaves them as they are.
    default_user: str = ""
    default_workdir: str = ""


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """The size of a terminal, in characters."""

    cols: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Running:
    """A process that runs."""

    pid: int
    cmd: str
    args: tuple[str, ...]
    cwd: str
    tag: str = ""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file in the guest. `type` is file, directory, symlink or other; of a link, its target's."""

    name: str
    path: str
    type: str
    size_bytes: int
    #: Permission bits.
    mode: int
    owner: str
    group: str
    modified_at_unix: int
    symlink_target: str


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
    #: Run on a terminal; its output is then standard output alone.
    terminal: Terminal | None = None
    #: A name by which it can be found while it runs.
    tag: str = ""


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

    def __init__(
        self, address: str, token: str, port: int = PORT, deadlines: Deadlines | None = None
    ) -> None:
        self._address = address
        self._url = f"http://{address}:{port}"
        self._token = token
        self._deadlines = deadlines or Deadlines()
        self._passage = Passage(address, port)
        self._transport = pyqwest.HTTPTransport(
            connect_timeout=_CONNECT_S,
            follow_redirects=False,
            enable_gzip=False,
            enable_brotli=False,
            enable_zstd=False,
            enable_otel=False,
            # A proxy that plain HTTP never takes: without one the environment's would be used.
            proxy=pyqwest.Proxy("http://127.0.0.1:9", scheme="https"),
        )
        self._http = pyqwest.Client(self._transport)
        self._ending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        self.hang_up()
        await self._passage.closed()
        for task in self._ending:
            task.cancel()
        if self._ending:
            await asyncio.wait(self._ending)
        await self._transport.aclose()

    @property
    def token(self) -> str:
        """What its agent asks for."""
        return self._token

    async def dial(self, port: int) -> Line:
        """A connection to a port inside. Raises NotFound, GuestSilent, Exhausted."""
        if port == PORT:
            return await self._passage.dial_agent()
        return await self._passage.dial(port, self._token)

    def hang_up(self) -> None:
        """End the connections that were dialled."""
        self._passage.abort()

    def _headers(self, user: str | None = None) -> dict[str, str]:
        headers = {"x-access-token": self._token}
        if user is not None:
            name = base64.b64encode(f"{user}:".encode()).decode()
            headers["authorization"] = f"Basic {name}"
        return headers

    # Introduction and health.

    async def introduce(self, identity: Identity, deadline_s: float) -> str:
        """Tell a guest who it is, waiting for it to boot, and have it confirmed.

        Returns the version of the protocol that it speaks, as E2B counts it; empty when it does
        not say. Raises TimedOut when it does not answer in time, ToolFailed when it confirms
        something else or cannot take on what it was told.
        """
        until = time.monotonic() + deadline_s
        reply = await self._confirmed(identity, deadline_s, until)
        self._token = identity.token
        for _ in range(_CLOCK_TRIES):
            if _late_s(reply) < _CLOCK_TOLERANCE_S:
                break
            # Told, and the host so busy that much time passed until it was heard.
            reply = await self._confirmed(identity, deadline_s, until)
        version = str(reply.get("envdVersion", ""))
        return version if _VERSION.fullmatch(version) else ""

    async def _confirmed(
        self, identity: Identity, deadline_s: float, until: float
    ) -> dict[str, Any]:
        """What a guest answers that has taken an identity."""
        while True:
            left = max(0.0, until - time.monotonic())
            try:
                async with asyncio.timeout(min(left, _INTRODUCE_TRY_S)):
                    status, reply = await self._post_introduction(identity)
                break
            except replies.SILENT:
                if time.monotonic() >= until:
                    raise _not_booted(deadline_s) from None
                await asyncio.sleep(_INTRODUCE_PAUSE_S)
        if status != 200:
            raise ToolFailed(f"the guest did not take its identity: {replies.reason(reply)}")
        told = (identity.sandbox_id, identity.hostname, identity.machine_id)
        if tuple(reply.get(key) for key in ("sandboxId", "hostname", "machineId")) != told:
            raise ToolFailed("the guest confirmed another identity than it was given")
        return reply

    async def _post_introduction(self, identity: Identity) -> tuple[int, dict[str, Any]]:
        headers = self._headers() | {"content-type": "application/json"}

        async def content() -> AsyncIterator[bytes]:
            # Written once the guest is reached, which takes up to a second while it boots: it
            # must not be told what time it was before.
            yield json.dumps(_introduction(identity)).encode()

        async with self._http.stream("POST", f"{self._url}/init", headers, content()) as response:
            return response.status, replies.parse(await replies.read_bounded(response))

    async def awake(self, deadline_s: float) -> None:
        """Wait until the guest agent answers anything at all. Raises TimedOut."""
        until = time.monotonic() + deadline_s
        while not await self._answers():
            if time.monotonic() >= until:
                raise _not_booted(deadline_s)
            await asyncio.sleep(_INTRODUCE_PAUSE_S)

    async def _answers(self) -> bool:
        try:
            async with (
                asyncio.timeout(_CONNECT_S),
                self._http.stream("GET", f"{self._url}/health") as response,
            ):
                return response.status in {204, 503}
        except replies.SILENT:
            return False

    async def healthy(self, deadline_s: float) -> bool:
        """Whether the guest agent answers at all."""
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._http.stream("GET", f"{self._url}/health") as response,
            ):
                return response.status == 204
        except replies.SILENT:
            return False

    async def sync(self, deadline_s: float) -> None:
        """Have it write all that it has not written yet.

        Raises GuestSilent, ToolFailed, Unimplemented.
        """
        with replies.translated():
            async with (
                asyncio.timeout(deadline_s),
                self._http.stream("POST", f"{self._url}/sync", self._headers()) as response,
            ):
                if response.status == 404:
                    raise Unimplemented("the guest is of an earlier release")
                if response.status != 204:
                    raise ToolFailed(f"the guest did not write its disk ({response.status})")

    async def ask(self, port: int, path: str, deadline_s: float) -> int | None:
        """Status of what serves HTTP on a port of the sandbox; None when nothing answers."""
        # No header of ours: it is the guest's own program, and may not know the token.
        url = f"http://{self._address}:{port}{path}"
        with contextlib.suppress(*replies.SILENT):
            async with asyncio.timeout(deadline_s), self._http.stream("GET", url) as response:
                return response.status
        return None

    # Processes.

    async def start(self, command: Command) -> AsyncGenerator[ProcessEvent]:
        """Start a command and listen to it until its end.

        Raises NotStarted, Invalid, GuestSilent. Who stops to listen does not end the command.
        """
        headers = self._headers(command.user)
        if command.timeout_s is not None:
            # The second for guests that were put to sleep before there was the first.
            for name in ("sandmartin-time-limit-ms", "connect-timeout-ms"):
                headers[name] = str(max(1, int(command.timeout_s * 1000)))
        request = pb.StartRequest(
            process=pb.ProcessConfig(
                cmd=command.cmd,
                args=list(command.args),
                envs=dict(command.envs),
                cwd=command.cwd or None,
            ),
            stdin=command.stdin,
            pty=_pty(command.terminal),
            tag=command.tag or None,
        )
        try:
            async with contextlib.aclosing(self._listen("Start", request, headers)) as events:
                async for event in events:
                    yield event
        except (NotFound, Denied, Exhausted) as error:
            raise NotStarted(error.message) from error

    async def attach(self, pid: int) -> AsyncGenerator[ProcessEvent]:
        """Listen to a command that was started before; what nobody heard yet comes first.

        Raises NotFound, GuestSilent.
        """
        request = pb.ConnectRequest(process=_selector(pid))
        listening = self._listen("Connect", request, self._headers())
        async with contextlib.aclosing(listening) as events:
            async for event in events:
                yield event

    async def _listen(
        self, method: str, request: Message[Any], headers: dict[str, str]
    ) -> AsyncGenerator[ProcessEvent]:
        headers["content-type"] = "application/connect+proto"
        headers["keepalive-ping-interval"] = str(self._deadlines.keepalive_s)
        message = request.to_binary()
        content = _ENVELOPE.pack(_PLAIN, len(message)) + message
        asking = self._http.stream("POST", self._procedure(method), headers, content)
        with replies.translated():
            async with contextlib.AsyncExitStack() as stack:
                opening = _opened(asking, asyncio.timeout(self._deadlines.call_s))
                response = await stack.enter_async_context(opening)
                if response.status != 200:
                    raise replies.call_error(await self._reply(response))
                chunks = _audible(response.content, self._deadlines.stream_s)
                async for payload in _messages(chunks):
                    event = _process_event(payload)
                    if isinstance(event, Ended):
                        # Who listens leaves with this one, and its end would be cut off.
                        self._see_off(stack.pop_all(), chunks)
                        yield event
                        return
                    if event is not None:
                        yield event
        raise GuestSilent("the guest agent broke off before the command's end")

    def _see_off(self, stream: contextlib.AsyncExitStack, chunks: AsyncIterator[bytes]) -> None:
        """Read a stream to its end beside all else: only then can its connection be used again."""
        task = asyncio.create_task(_finish(stream, chunks), name="end of a stream")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def send_input(self, pid: int, data: bytes) -> None:
        """Write to a command's standard input, or its terminal; waits while it does not read."""
        stdin: Oneof[Literal["stdin"], bytes] = Oneof("stdin", data)
        request = pb.SendInputRequest(process=_selector(pid), input=pb.ProcessInput(input=stdin))
        sending = asyncio.ensure_future(self._call("SendInput", request, patient=True))
        try:
            while not sending.done():
                await asyncio.wait({sending}, timeout=self._deadlines.call_s)
                # A command that does not read and a guest that is dead look the same from here.
                if not sending.done() and not await self.healthy(self._deadlines.call_s):
                    raise GuestSilent("the guest agent does not answer")
            await sending
        finally:
            sending.cancel()
            await asyncio.wait({sending})

    async def close_input(self, pid: int) -> None:
        await self._call("CloseStdin", pb.CloseStdinRequest(process=_selector(pid)))

    async def signal(self, pid: int, number: int) -> None:
        """Signal a command; SIGKILL ends all that it started. Raises NotFound once it ended."""
        request = pb.SendSignalRequest(process=_selector(pid), signal=pb.Signal(number))
        await self._call("SendSignal", request)

    async def resize(self, pid: int, size: Terminal) -> None:
        """Resize a command's terminal. Raises NotFound, Conflict when it has none."""
        await self._call("Update", pb.UpdateRequest(process=_selector(pid), pty=_pty(size)))

    async def processes(self) -> list[Running]:
        """What was started by a call and runs."""
        listed = pb.ListResponse.from_binary(await self._call("List", pb.ListRequest()))
        found = []
        for each in listed.processes:
            config = each.config or pb.ProcessConfig()
            running = Running(
                pid=each.pid,
                cmd=config.cmd,
                args=tuple(config.args),
                cwd=config.cwd or "",
                tag=each.tag or "",
            )
            found.append(running)
        return found

    async def _call(
        self,
        method: str,
        request: Message[Any],
        *,
        user: str | None = None,
        patient: bool = False,
    ) -> bytes:
        headers = self._headers(user) | {"content-type": "application/proto"}
        asking = self._http.stream("POST", self._procedure(method), headers, request.to_binary())
        limit = asyncio.timeout(None if patient else self._deadlines.call_s)
        with replies.translated():
            async with _opened(asking, limit) as response:
                async with asyncio.timeout(self._deadlines.call_s):
                    reply = await replies.read_bounded(response)
                if response.status != 200:
                    raise replies.call_error(replies.parse(reply))
                return reply

    def _procedure(self, method: str) -> str:
        """The address of a method of the process service, or of `filesystem.` and a method."""
        service, _, name = method.rpartition(".")
        package = "filesystem.Filesystem" if service else "process.Process"
        return f"{self._url}/{package}/{name}"

    async def _reply(self, response: pyqwest.Response) -> dict[str, Any]:
        async with asyncio.timeout(self._deadlines.call_s):
            return replies.parse(await replies.read_bounded(response))

    # Directories. All raise NotFound, Denied, Invalid, GuestSilent.

    async def stat(self, path: str, user: str) -> FileInfo:
        reply = await self._call("filesystem.Stat", fs.StatRequest(path=path), user=user)
        return _file_info(fs.StatResponse.from_binary(reply).entry or fs.EntryInfo())

    async def list_files(self, path: str, user: str, depth: int) -> list[FileInfo]:
        """What is below a directory, so many levels down."""
        request = fs.ListDirRequest(path=path, depth=depth)
        reply = await self._call("filesystem.ListDir", request, user=user)
        return [_file_info(each) for each in fs.ListDirResponse.from_binary(reply).entries]

    async def make_directory(self, path: str, user: str) -> None:
        """Make a directory and its missing parents. Raises AlreadyExists."""
        await self._call("filesystem.MakeDir", fs.MakeDirRequest(path=path), user=user)

    async def move_file(self, source: str, destination: str, user: str) -> None:
        request = fs.MoveRequest(source=source, destination=destination)
        await self._call("filesystem.Move", request, user=user)

    async def remove_file(self, path: str, user: str) -> None:
        """Remove a file or a whole tree; one that is not there is no error."""
        await self._call("filesystem.Remove", fs.RemoveRequest(path=path), user=user)

    # Files.

    async def upload(self, path: str, user: str, chunks: AsyncIterable[bytes]) -> None:
        """Write a file of any size. Raises DiskFull, Denied, Invalid, NotFound, GuestSilent.

        What `chunks` raises is passed on, and nothing of the file is left.
        """
        await self._upload("files", {"path": path, "username": user}, chunks)

    async def download(self, path: str, user: str) -> AsyncGenerator[bytes]:
        """Read a file of any size. Raises NotFound, Denied, Invalid, GuestSilent."""
        query: dict[str, str | None] = {"path": path, "username": user}
        async with contextlib.aclosing(self._download("files", query)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def write_tree(self, directory: str, owner: str, chunks: AsyncIterable[bytes]) -> int:
        """Unpack a tar below a directory, with root's rights; how many members it had.

        All becomes the owner's; without one the numbers of the tar hold. Raises DiskFull, Invalid,
        NotFound, Unimplemented, GuestSilent, and what `chunks` raises; what was unpacked stays.
        """
        reply = await self._upload("tree", {"path": directory, "owner": owner}, chunks)
        members = reply.get("members")
        if not isinstance(members, int):
            raise ToolFailed("the guest agent did not say what it unpacked")
        return members

    async def read_tree(self, path: str) -> AsyncGenerator[bytes]:
        """A file, a link or a directory as a tar. Raises NotFound, Invalid, GuestSilent.

        ToolFailed says what kept it from being whole.
        """
        trailers: dict[str, str] = {}
        async with contextlib.aclosing(self._download("tree", {"path": path}, trailers)) as chunks:
            async for chunk in chunks:
                yield chunk
        outcome = unquote(trailers.get(_OUTCOME, ""))
        if not outcome:
            raise GuestSilent("the guest agent broke off before the end of the tree")
        if outcome != _WHOLE:
            raise ToolFailed(
                f"the tree could not be read to its end: {outcome[: replies.MAX_REASON]}"
            )

    async def _upload(
        self, route: str, query: dict[str, str | None], chunks: AsyncIterable[bytes]
    ) -> dict[str, Any]:
        headers = self._headers() | {"content-type": "application/octet-stream"}
        body = Body(chunks, self._deadlines.upload_s)
        sending = self._http.stream(
            "POST", f"{self._url}/{route}", headers, body.read(), params=query
        )
        try:
            with replies.translated():
                async with _opened(sending, body.silence) as response:
                    reply = await self._reply(response)
                    if response.status != 200:
                        raise replies.file_error(response.status, reply)
                    return reply
        except SandmartinError as error:
            if body.failure is not None:
                raise body.failure from error
            raise

    async def _download(
        self, route: str, query: dict[str, str | None], trailers: dict[str, str] | None = None
    ) -> AsyncGenerator[bytes]:
        """The content of an answer; what is told after it goes into `trailers`."""
        asking = self._http.stream("GET", f"{self._url}/{route}", self._headers(), params=query)
        with replies.translated():
            async with _opened(asking, asyncio.timeout(self._deadlines.call_s)) as response:
                if response.status != 200:
                    raise replies.file_error(response.status, await self._reply(response))
                async for chunk in _audible(response.content, self._deadlines.stream_s):
                    yield chunk
                if trailers is not None:
                    trailers.update(response.trailers)


def _not_booted(deadline_s: float) -> TimedOut:
    return TimedOut(
        f"the guest agent did not answer within {deadline_s:g} s of the VM's start",
        hint="the host may be overloaded; raise SANDMARTIN_BOOT_TIMEOUT_S",
    )


def _late_s(reply: Mapping[str, Any]) -> float:
    """By how much at most a guest's clock was late when it answered just now."""
    now = time.time_ns()
    told = reply.get("unixNano")
    if isinstance(told, int) and 0 < told < 1 << 63:
        return (now - told) / 1e9
    try:
        return now / 1e9 - datetime.fromisoformat(str(reply.get("time", ""))).timestamp()
    except ValueError:
        return 0.0


def _introduction(identity: Identity) -> dict[str, Any]:
    now = time.time_ns()
    return {
        "accessToken": identity.token,
        "sandboxId": identity.sandbox_id,
        "templateId": identity.template,
        "hostname": identity.hostname,
        "machineId": identity.machine_id,
        "envVars": None if identity.envs is None else dict(identity.envs),
        # A guest that was frozen by an earlier release knows the first alone.
        "timestamp": datetime.fromtimestamp(now / 1e9, UTC).isoformat(),
        "unixNano": now,
        "entropy": base64.b64encode(secrets.token_bytes(_ENTROPY_BYTES)).decode(),
        "rootBytes": identity.root_bytes,
        "moved": identity.moved,
        "defaultUser": identity.default_user,
        "defaultWorkdir": identity.default_workdir,
    }


def _pty(terminal: Terminal | None) -> pb.PTY | None:
    if terminal is None:
        return None
    return pb.PTY(size=pb.PTY.Size(cols=terminal.cols, rows=terminal.rows))


_TYPES = {
    fs.FileType.FILE: "file",
    fs.FileType.DIRECTORY: "directory",
    fs.FileType.SYMLINK: "symlink",
}


def _file_info(entry: fs.EntryInfo) -> FileInfo:
    modified = entry.modified_time
    return FileInfo(
        name=entry.name,
        path=entry.path,
        type=_TYPES.get(entry.type, "other"),
        size_bytes=entry.size,
        mode=entry.mode,
        owner=entry.owner,
        group=entry.group,
        modified_at_unix=modified.seconds if modified else 0,
        symlink_target=entry.symlink_target or "",
    )


def _selector(pid: int) -> pb.ProcessSelector:
    selector: Oneof[Literal["pid"], int] = Oneof("pid", pid)
    return pb.ProcessSelector(selector=selector)


def _process_event(payload: bytes) -> ProcessEvent | None:
    try:
        response = pb.StartResponse.from_binary(payload)
    except ValueError as error:
        raise ToolFailed("the guest agent sent what is no event") from error
    event = response.event.event if response.event else None
    match event.value if event else None:
        case pb.ProcessEvent.StartEvent() as start:
            return Started(start.pid)
        case pb.ProcessEvent.DataEvent(output=Oneof() as output):
            return Output(output.value, stdout=output.field != "stderr")
        case pb.ProcessEvent.EndEvent() as end:
            return Ended(
                exit_code=128 + end.signal if end.signal else end.exit_code & 0xFF,
                signal=end.signal,
                error=(end.error or "") if end.timed_out else "",
                timed_out=end.timed_out,
            )
    return None


@contextlib.asynccontextmanager
async def _opened(
    asking: AbstractAsyncContextManager[pyqwest.Response], limit: asyncio.Timeout
) -> AsyncIterator[pyqwest.Response]:
    """The response to a request; the limit is for its beginning."""
    async with contextlib.AsyncExitStack() as stack:
        async with limit:
            response = await stack.enter_async_context(asking)
        yield response


async def _audible(
    content: AsyncIterable[bytes | memoryview | bytearray], silence_s: float
) -> AsyncIterator[bytes]:
    """The chunks of a stream that must not fall silent. Raises TimeoutError when it does."""
    chunks = aiter(content)
    while True:
        async with asyncio.timeout(silence_s):
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
        yield bytes(chunk)


async def _finish(stream: contextlib.AsyncExitStack, chunks: AsyncIterator[bytes]) -> None:
    with contextlib.suppress(*replies.SILENT):
        async with stream, asyncio.timeout(_FINISH_S):
            async for _ in chunks:
                pass


async def _messages(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The messages of a stream, until the one that closes it. Raises what that one reports."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _ENVELOPE.size:
            flags, size = _ENVELOPE.unpack_from(buffer)
            if size > _MAX_MESSAGE_BYTES or flags not in {_PLAIN, _LAST}:
                raise ToolFailed("the guest agent sent a message that is too large or damaged")
            end = _ENVELOPE.size + size
            if len(buffer) < end:
                break
            payload = bytes(buffer[_ENVELOPE.size : end])
            del buffer[:end]
            if flags == _PLAIN:
                yield payload
            elif isinstance(error := replies.parse(payload).get("error"), dict):
                raise replies.call_error(error)
            else:
                return
