"""The transport to a control plane: the REST API `/v1`.

The only module that knows its bodies: they end here, in both directions. Output of commands comes
as server-sent events, input goes in a request of its own, so everything passes whatever passes
HTTP, over one pool of connections. Ids of sandboxes are the other side's: those that a caller
chooses go as idempotency keys, under which what was made can be found again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from sandmartin.errors import (
    Conflict,
    Denied,
    Invalid,
    NotFound,
    SandmartinError,
    Unauthenticated,
    Unavailable,
)
from sandmartin.model import INTERNET, NetworkPolicy, State, check_name
from sandmartin.phases import Phase
from sandmartin.transport import (
    Checkpoint,
    Command,
    CreatedSandbox,
    Ended,
    ExecEvent,
    FileInfo,
    ForkedSandbox,
    MetricPoint,
    NewSandbox,
    Process,
    PtySize,
    SandboxInfo,
    Snapshot,
    Started,
    Stderr,
    Stdout,
    TemplateInfo,
)
from sandmartin.transport.api import CALL_S, Api, Unreached
from sandmartin.transport.fields import (
    Message,
    integer,
    number,
    octets,
    part,
    parts,
    text,
    texts,
)

#: What a host is given for it, and something for the way.
_CREATE_S = 120.0
_DESTROY_S = 90.0
_SNAPSHOT_S = 330.0
_FILE_S = 120.0
_PAGE = 1000
_THERE = [each.value for each in State if each is not State.STOPPED]
#: Refusals of a request as such: nothing was made.
_REFUSALS = (Unreached, Unauthenticated, Denied, Invalid, NotFound)


class Rest:
    """A Transport to the control plane at `url`, for whoever has `api_key`."""

    def __init__(self, url: str, api_key: str) -> None:
        """Raises Invalid."""
        self._api = Api(url, api_key)

    @property
    def api(self) -> Api:
        """The same control plane, for what is no Transport's: keys, hosts, accounts."""
        return self._api

    async def aclose(self) -> None:
        await self._api.aclose()

    # Life.

    async def create(self, new: NewSandbox) -> CreatedSandbox:
        body = _without_none(
            template=new.template,
            vcpus=new.vcpus,
            memory_mb=new.memory_mb,
            disk_size_mb=new.disk_size_mb,
            timeout_sec=new.timeout_s,
            network=None if new.network is None else new.network.to_dict(),
            envs=dict(new.envs),
            # What is as it would be anyway is left out, for servers that do not know it yet.
            on_timeout=new.on_timeout or None,
            metadata=dict(new.metadata) or None,
            auto_resume=new.auto_resume or None,
            public_traffic=False if new.private else None,
        )
        answer = await self._api.ask(
            "POST", "/v1/sandboxes", body, deadline_s=_CREATE_S, key=new.sandbox_id
        )
        return _placed(answer)

    async def undo_create(self, new: NewSandbox, failure: BaseException) -> None:
        await self._undo(new.sandbox_id, failure, lambda: self.create(new))

    async def _undo(
        self, key: str, failure: BaseException, ask_again: Callable[[], Awaitable[object]]
    ) -> None:
        if isinstance(failure, _REFUSALS):
            return
        made = await self._made_with(key)
        if not made and not (isinstance(failure, SandmartinError) and failure.answered):
            # The request may still be on its way. This one has the same key, so whichever
            # comes first makes them, and the other finds them.
            try:
                await ask_again()
            except SandmartinError as error:
                if not error.answered:
                    raise
            made = await self._made_with(key)
        for each in made:
            await self.destroy(each.sandbox_id)

    async def _made_with(self, key: str) -> tuple[SandboxInfo, ...]:
        return await self._list(idempotency_key=key)

    async def destroy(self, sandbox_id: str) -> None:
        try:
            await self._api.ask("DELETE", _path(sandbox_id), deadline_s=_DESTROY_S, repeatable=True)
        except NotFound:
            return

    async def get_sandbox(self, sandbox_id: str) -> SandboxInfo:
        return sandbox_info(await self._api.ask("GET", _path(sandbox_id)))

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        return await self._list()

    async def _list(self, **conditions: str) -> tuple[SandboxInfo, ...]:
        found: list[SandboxInfo] = []
        cursor = ""
        while True:
            params = {"state": _THERE, "limit": _PAGE, "cursor": cursor, **conditions}
            page = await self._api.ask("GET", "/v1/sandboxes", params=params)
            found += map(sandbox_info, parts(page, "items"))
            if not (cursor := text(page, "next")):
                return tuple(found)

    async def ping(self, sandbox_id: str) -> None:
        await self._api.ask("POST", _path(sandbox_id, "ping"))

    async def set_timeout(self, sandbox_id: str, timeout_s: int) -> None:
        path, body = _path(sandbox_id, "timeout"), {"timeout_sec": timeout_s}
        await self._api.ask("POST", path, body, deadline_s=_DESTROY_S, repeatable=True)

    async def update_network(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        path = _path(sandbox_id, "network")
        await self._api.ask("PUT", path, policy.to_dict(), deadline_s=_DESTROY_S, repeatable=True)

    async def pause(self, sandbox_id: str) -> tuple[Phase, ...]:
        await self._unless_already(sandbox_id, State.PAUSED, "pause")
        return ()

    async def resume(self, sandbox_id: str, timeout_s: int | None) -> CreatedSandbox:
        body = _without_none(timeout_sec=timeout_s)
        return await self._unless_already(sandbox_id, State.RUNNING, "resume", body)

    async def _unless_already(
        self, sandbox_id: str, done: State, verb: str, body: Message | None = None
    ) -> CreatedSandbox:
        """What it is after `verb`; one that was already so is no conflict."""
        path = _path(sandbox_id, verb)
        try:
            return _placed(await self._api.ask("POST", path, body, deadline_s=_SNAPSHOT_S))
        except Conflict:
            now = await self.get_sandbox(sandbox_id)
            if now.state != done:
                raise
            return CreatedSandbox(sandbox_id=sandbox_id, state=now.state, address=now.address)

    async def fork(
        self, sandbox_id: str, child_ids: tuple[str, ...], timeout_s: int
    ) -> tuple[ForkedSandbox, ...]:
        body = _without_none(count=len(child_ids), timeout_sec=timeout_s or None)
        answer = await self._api.ask(
            "POST",
            _path(sandbox_id, "fork"),
            body,
            deadline_s=_SNAPSHOT_S,
            key=_key_of(child_ids),
        )
        return tuple(_forked(each) for each in parts(answer, "items"))

    async def undo_fork(
        self,
        sandbox_id: str,
        child_ids: tuple[str, ...],
        timeout_s: int,
        failure: BaseException,
    ) -> None:
        await self._undo(
            _key_of(child_ids), failure, lambda: self.fork(sandbox_id, child_ids, timeout_s)
        )

    # History and templates.

    async def create_checkpoint(self, sandbox_id: str, comment: str) -> Checkpoint:
        answer = await self._api.ask(
            "POST", _path(sandbox_id, "checkpoints"), {"comment": comment}, deadline_s=_SNAPSHOT_S
        )
        return _checkpoint(answer)

    async def list_checkpoints(self, sandbox_id: str) -> tuple[Checkpoint, ...]:
        found = await self._api.ask("GET", _path(sandbox_id, "checkpoints"))
        return tuple(_checkpoint(each) for each in _all(found))

    async def delete_checkpoint(self, sandbox_id: str, checkpoint_id: str) -> None:
        check_name(checkpoint_id, "checkpoint id")
        await self._api.ask("DELETE", _path(sandbox_id, "checkpoints", checkpoint_id))

    async def rollback(self, sandbox_id: str, checkpoint_id: str) -> CreatedSandbox:
        check_name(checkpoint_id, "checkpoint id")
        path = _path(sandbox_id, "checkpoints", checkpoint_id, "rollback")
        return _placed(await self._api.ask("POST", path, deadline_s=_SNAPSHOT_S))

    async def create_snapshot(self, sandbox_id: str, name: str, *, live: bool) -> Snapshot:
        body = {"sandbox_id": sandbox_id, "name": name, "live": live}
        made = await self._api.ask("POST", "/v1/snapshots", body, deadline_s=_SNAPSHOT_S)
        return Snapshot(name=text(made, "name"), size_bytes=integer(made, "size_bytes"))

    async def delete_snapshot(self, name: str) -> None:
        path = f"/v1/templates/{check_name(name, 'template name')}"
        await self._api.ask("DELETE", path, deadline_s=_DESTROY_S)

    async def list_templates(self) -> tuple[TemplateInfo, ...]:
        return tuple(_template(each) for each in _all(await self._api.ask("GET", "/v1/templates")))

    async def read_template(self, name: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._api.read("GET", _content_path(name))) as pieces:
            async for piece in pieces:
                yield piece

    async def write_template(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        await self._api.write("PUT", _content_path(name), chunks, deadline_s=_SNAPSHOT_S)

    # What it tells of itself.

    async def metrics(self, sandbox_id: str, time_range: str) -> tuple[MetricPoint, ...]:
        path, params = _path(sandbox_id, "metrics"), {"range": time_range}
        answer = await self._api.ask("GET", path, params=params)
        return tuple(_metric_point(each) for each in parts(answer, "points"))

    async def read_console(self, sandbox_id: str) -> bytes:
        pieces = self._api.read("GET", _path(sandbox_id, "console"))
        async with aclosing(pieces):
            return b"".join([piece async for piece in pieces])

    # Commands.

    async def exec_stream(
        self, sandbox_id: str, command: Command
    ) -> AsyncGenerator[ExecEvent, None]:
        path = _path(sandbox_id, "exec", "stream")
        async with aclosing(self._listen("POST", path, _exec_body(command))) as events:
            async for event in events:
                yield event

    async def connect_process(self, sandbox_id: str, pid: int) -> AsyncGenerator[ExecEvent, None]:
        path = _path(sandbox_id, "processes", str(pid), "stream")
        async with aclosing(self._listen("GET", path)) as events:
            async for event in events:
                yield event

    async def _listen(
        self, method: str, path: str, body: Message | None = None
    ) -> AsyncGenerator[ExecEvent, None]:
        async with aclosing(self._api.events(method, path, body)) as events:
            async for kind, fields in events:
                event = _exec_event(kind, fields)
                if event is not None:
                    yield event
                if isinstance(event, Ended):
                    return
        raise Unavailable("the connection to the control plane was lost")

    async def list_processes(self, sandbox_id: str) -> tuple[Process, ...]:
        answer = await self._api.ask("GET", _path(sandbox_id, "processes"))
        return tuple(_process(each) for each in parts(answer, "processes"))

    async def send_stdin(self, sandbox_id: str, pid: int, chunks: AsyncIterator[bytes]) -> None:
        # A command may read its input as slowly as it likes: no deadline.
        path = _path(sandbox_id, "processes", str(pid), "stdin")
        await self._api.write("POST", path, chunks, deadline_s=None)

    async def send_signal(self, sandbox_id: str, pid: int, signal: int) -> None:
        path, params = _path(sandbox_id, "processes", str(pid)), {"signal": signal}
        await self._api.ask("DELETE", path, params=params)

    async def resize_pty(self, sandbox_id: str, pid: int, size: PtySize) -> None:
        await self._api.ask(
            "POST", _path(sandbox_id, "processes", str(pid), "resize"), asdict(size)
        )

    # Files.

    async def stat_file(self, sandbox_id: str, path: str, user: str = "") -> FileInfo:
        return _file_info(await self._on_file(sandbox_id, "stat", path, user, deadline_s=CALL_S))

    async def list_files(
        self, sandbox_id: str, path: str, user: str = "", *, depth: int = 1
    ) -> tuple[FileInfo, ...]:
        answer = await self._on_file(sandbox_id, "list", path, user, depth=depth)
        return tuple(_file_info(each) for each in parts(answer, "entries"))

    async def make_directory(self, sandbox_id: str, path: str, user: str = "") -> None:
        await self._on_file(sandbox_id, "mkdir", path, user, deadline_s=CALL_S)

    async def remove_file(self, sandbox_id: str, path: str, user: str = "") -> None:
        await self._on_file(sandbox_id, "remove", path, user)

    async def _on_file(
        self,
        sandbox_id: str,
        verb: str,
        path: str,
        user: str,
        *,
        deadline_s: float = _FILE_S,
        **more: Any,
    ) -> Any:
        body = {"path": path, "user": user, **more}
        return await self._api.ask(
            "POST", _path(sandbox_id, "files", verb), body, deadline_s=deadline_s
        )

    async def move_file(
        self, sandbox_id: str, source: str, destination: str, user: str = ""
    ) -> None:
        body = {"source": source, "destination": destination, "user": user}
        await self._api.ask("POST", _path(sandbox_id, "files", "move"), body, deadline_s=_FILE_S)

    async def write_file(
        self, sandbox_id: str, path: str, chunks: AsyncIterator[bytes], user: str = ""
    ) -> None:
        params = {"path": path, "user": user}
        await self._api.write(
            "PUT", _path(sandbox_id, "files"), chunks, params=params, deadline_s=_FILE_S
        )

    async def read_file(
        self, sandbox_id: str, path: str, user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        params = {"path": path, "user": user}
        pieces = self._api.read("GET", _path(sandbox_id, "files"), params=params)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def write_tree(
        self, sandbox_id: str, directory: str, pieces: AsyncIterator[bytes], *, owner: str = ""
    ) -> int:
        path, params = _path(sandbox_id, "files", "tree"), {"path": directory, "owner": owner}
        answer = await self._api.write("PUT", path, pieces, params=params, deadline_s=_FILE_S)
        return integer(answer or {}, "members")

    async def read_tree(self, sandbox_id: str, path: str) -> AsyncGenerator[bytes, None]:
        reading = self._api.read("GET", _path(sandbox_id, "files", "tree"), params={"path": path})
        async with aclosing(reading) as pieces:
            async for piece in pieces:
                yield piece


def _path(sandbox_id: str, *below: str) -> str:
    return "/".join(["/v1/sandboxes", check_name(sandbox_id, "sandbox id"), *below])


def _content_path(name: str) -> str:
    return f"/v1/templates/{check_name(name, 'template name')}/content"


def _key_of(child_ids: tuple[str, ...]) -> str:
    """The idempotency key of a fork whose children a caller would name so."""
    if not child_ids:
        raise Invalid("a fork makes one sandbox at least")
    return child_ids[0]


def _without_none(**fields: Any) -> Message:
    return {name: value for name, value in fields.items() if value is not None}


def _all(answer: Any) -> list[Message]:
    """The objects of an answer that is a list."""
    return parts({"answer": answer}, "answer")


def _exec_body(command: Command) -> Message:
    return _without_none(
        cmd=command.cmd,
        args=list(command.args),
        envs=dict(command.envs),
        cwd=command.cwd,
        user=command.user,
        tag=command.tag,
        stdin=command.stdin,
        timeout_sec=command.timeout_s,
        pty=asdict(command.pty) if command.pty else None,
    )


def _exec_event(kind: str, fields: Message) -> ExecEvent | None:
    """The event, None for a kind that this release does not know."""
    match kind:
        case "start":
            return Started(integer(fields, "pid"))
        case "stdout":
            return Stdout(octets(fields, "data"))
        case "stderr":
            return Stderr(octets(fields, "data"))
        case "exit":
            return Ended(
                exit_code=integer(fields, "exit_code"),
                signal=integer(fields, "signal"),
                error=text(fields, "error"),
            )
    return None


def sandbox_info(body: Message) -> SandboxInfo:
    """A sandbox as the API shows it."""
    return SandboxInfo(
        sandbox_id=text(body, "id"),
        state=text(body, "status"),
        template=text(body, "template"),
        vcpus=integer(body, "vcpus"),
        memory_mb=integer(body, "memory_mb"),
        disk_size_mb=integer(body, "disk_size_mb"),
        timeout_s=integer(body, "timeout_sec"),
        address=text(body, "host_ip"),
        created_at=integer(body, "created_at"),
        last_active_at=integer(body, "last_active_at") or integer(body, "created_at"),
        reason=text(body, "reason"),
        metadata={name: str(value) for name, value in (part(body, "metadata") or {}).items()},
        network=_network(part(body, "network")),
    )


def _network(body: Message | None) -> NetworkPolicy:
    if body is None:
        return INTERNET
    return NetworkPolicy(
        allow_internet_access=body.get("allow_internet_access") is not False,
        allow_out=texts(body, "allow_out"),
        deny_out=texts(body, "deny_out"),
    )


def _placed(body: Message) -> CreatedSandbox:
    return CreatedSandbox(
        sandbox_id=text(body, "id"), state=text(body, "status"), address=text(body, "host_ip")
    )


def _forked(body: Message) -> ForkedSandbox:
    failed = text(body, "status") == State.ERROR
    return ForkedSandbox(
        sandbox_id=text(body, "id"),
        state=text(body, "status"),
        address=text(body, "host_ip"),
        error=SandmartinError(text(body, "reason")) if failed else None,
    )


def _checkpoint(body: Message) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=text(body, "id"),
        comment=text(body, "comment"),
        created_at=integer(body, "created_at"),
        size_bytes=integer(body, "size_bytes"),
    )


def _template(body: Message) -> TemplateInfo:
    kind = text(body, "type")
    return TemplateInfo(
        name=text(body, "name"),
        kind="image" if kind == "base" else kind,
        vcpus=integer(body, "vcpus"),
        memory_mb=integer(body, "memory_mb"),
        disk_size_mb=integer(body, "disk_size_mb"),
        size_bytes=integer(body, "size_bytes"),
    )


def _metric_point(body: Message) -> MetricPoint:
    return MetricPoint(
        timestamp=integer(body, "timestamp"),
        cpu_pct=number(body, "cpu_pct"),
        mem_bytes=integer(body, "mem_bytes"),
        disk_bytes=integer(body, "disk_bytes"),
    )


def _process(body: Message) -> Process:
    return Process(
        pid=integer(body, "pid"),
        cmd=text(body, "cmd"),
        args=texts(body, "args"),
        cwd=text(body, "cwd"),
        tag=text(body, "tag"),
    )


def _file_info(body: Message) -> FileInfo:
    return FileInfo(
        name=text(body, "name"),
        path=text(body, "path"),
        type=text(body, "type"),
        size_bytes=integer(body, "size"),
        mode=integer(body, "mode"),
        owner=text(body, "owner"),
        group=text(body, "group"),
        modified_at=integer(body, "modified_at"),
        symlink_target=text(body, "symlink_target"),
    )
