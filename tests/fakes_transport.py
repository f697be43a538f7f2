"""The client's seam with sandboxes that are entries in a table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from sandmartin.errors import AlreadyExists, Conflict, NotFound, SandmartinError
from sandmartin.model import NetworkPolicy
from sandmartin.phases import Phase
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
