"""A sandbox as programs see it that have an event loop: all of the SDK for one microVM."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal

from sandmartin.client import sandbox as core
from sandmartin.client.callbacks import OnEach
from sandmartin.client.code import DEFAULT_TIMEOUT_S as CODE_TIMEOUT_S
from sandmartin.client.code import AsyncCode, CodeContext
from sandmartin.client.commands import AsyncCommands
from sandmartin.client.connection import connection_to
from sandmartin.client.execution import CodeOutput, Execution, ExecutionError, Result
from sandmartin.client.feed import Feeds
from sandmartin.client.files import AsyncFiles
from sandmartin.client.git import AsyncGit
from sandmartin.client.link import Link
from sandmartin.client.pty import AsyncPty
from sandmartin.errors import Unimplemented
from sandmartin.model import State, check_name, new_sandbox_id
from sandmartin.transport import Checkpoint, MetricPoint, NewSandbox, SandboxInfo, Snapshot
from sandmartin.transport.place import find_place

DEFAULT_TIMEOUT_S = 300.0
_PAGE = 100


class AsyncSandbox:
    """A microVM of its own.

        async with await AsyncSandbox.create() as sandbox:
            result = await sandbox.commands.run("uname -r")
            print(result.stdout)

    Leaving the context kills it; without one it lives until `kill`. It may be used from any event
    loop, and from many tasks at once.
    """

    def __init__(self, link: Link) -> None:
        """`create` and `connect` make it."""
        self._link = link
        feeds = Feeds(link)
        self.commands = AsyncCommands(feeds)
        self.pty = AsyncPty(feeds)
        self.files = AsyncFiles(link)
        self.git = AsyncGit(self.commands)
        self._code = AsyncCode(link)

    def __repr__(self) -> str:
        return f"AsyncSandbox({self.sandbox_id!r})"

    @property
    def sandbox_id(self) -> str:
        """Its id: `sb` and 20 characters."""
        return self._link.sandbox_id

    @property
    def _core(self) -> core.AsyncSandbox:
        return core.AsyncSandbox(self._link.transport, self.sandbox_id)

    @classmethod
    async def create(
        cls,
        template: str = "base",
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        on_timeout: Literal["pause", "kill"] | None = None,
        envs: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        vcpus: int | None = None,
        memory_mb: int | None = None,
        disk_size_mb: int | None = None,
        auto_resume: bool = False,
        private: bool = False,
        url: str | None = None,
        api_key: str | None = None,
    ) -> AsyncSandbox:
        """Create a sandbox and wait until it runs.

        `timeout` is the idle time in seconds after which it is paused, or killed as `on_timeout`
        says; None is never. `envs` is the environment of all its commands, `metadata` what it is
        found by. `memory_mb` and `disk_size_mb` are in MiB. With `auto_resume` a request to one
        of its ports wakes it; with `private` these need its traffic token.

        `url` and `api_key` say where: by default SANDMARTIN_URL and SANDMARTIN_API_KEY, then the
        stored login, then the agent of this machine. `unix:/path` is an agent's socket.

        Raises NotFound (template), Invalid, Exhausted, Unauthenticated, Unavailable. One that
        failed or was cancelled leaves nothing behind.
        """
        place = find_place(url, api_key)
        new = NewSandbox(
            sandbox_id=new_sandbox_id(),
            template=template,
            vcpus=vcpus,
            memory_mb=memory_mb,
            disk_size_mb=disk_size_mb,
            timeout_s=_whole_seconds(timeout),
            envs=dict(envs or {}),
            metadata=dict(metadata or {}),
            on_timeout=on_timeout or "",
            auto_resume=auto_resume,
            private=private,
        )
        made = await core.AsyncSandbox.create(connection_to(place).transport, new)
        return cls(Link(place, made.sandbox_id))

    @classmethod
    async def connect(
        cls,
        sandbox_id: str,
        *,
        timeout: float | None = None,
        url: str | None = None,
        api_key: str | None = None,
    ) -> AsyncSandbox:
        """A sandbox that exists; one that is paused is resumed.

        `timeout` is its new idle time in seconds, 0 for none; None leaves it as it is.
        Raises NotFound, Conflict, Exhausted.
        """
        link = Link(find_place(url, api_key), check_name(sandbox_id, "sandbox id"))
        connected = cls(link)
        await connected.resume(timeout=timeout)
        return connected

    @classmethod
    async def list(
        cls,
        *,
        states: Sequence[State | str] = (),
        metadata: Mapping[str, str] | None = None,
        page_size: int = _PAGE,
        url: str | None = None,
        api_key: str | None = None,
    ) -> AsyncGenerator[SandboxInfo, None]:
        """The team's sandboxes, newest first, fetched page by page as they are asked for.

        Only those in one of `states` (without any, those that are not over), and with all of
        `metadata`.

            async for info in AsyncSandbox.list(states=["running"]):
                print(info.sandbox_id)
        """
        place = find_place(url, api_key)
        wanted = [State(each) for each in states]
        if place.socket is not None:
            if metadata:
                raise Unimplemented("a host agent knows no metadata")
            for info in await connection_to(place).transport.list_sandboxes():
                if not wanted or info.state in wanted:
                    yield info
            return
        cursor, is_first = "", True
        while cursor or is_first:
            server, is_first = connection_to(place).server("listing by pages"), False
            page, cursor = await server.page(wanted, metadata or {}, page_size, cursor)
            for info in page:
                yield info

    # Life.

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        await core.destroy_after(self._core, error)

    async def kill(self) -> None:
        """Destroy it and all it held. Already gone is success."""
        await self._core.destroy()

    async def pause(self) -> None:
        """Write it to disk, memory and all, and free its memory. Raises Conflict, DiskFull."""
        await self._core.pause()

    async def resume(self, *, timeout: float | None = None) -> None:
        """Go on after a pause, with a new idle time in seconds (0 is none), or with its own."""
        await self._core.resume(None if timeout is None else _whole_seconds(timeout))

    async def set_timeout(self, timeout: float | None) -> None:
        """Give it another idle time, in seconds (None is none), that begins now."""
        await self._core.set_timeout(_whole_seconds(timeout))

    async def fork(
        self, count: int = 1, *, timeout: float | None = None
    ) -> tuple[AsyncSandbox, ...]:
        """Make sandboxes that go on from where this one is, which goes on, too.

        `timeout` is their idle time in seconds; None is that of this one. When one cannot be
        made, the others are killed, and its error is raised.
        """
        made = await self._core.fork(count, timeout_s=_whole_seconds(timeout))
        children = [
            AsyncSandbox(Link(self._link.place, each.sandbox_id)) for each in made if not each.error
        ]
        for failed in made:
            if failed.error is not None:
                for child in children:
                    await core.destroy_after(child._core, failed.error)
                raise failed.error
        return tuple(children)

    async def checkpoint(self, comment: str = "") -> Checkpoint:
        """Keep where it is now, memory and disk, to `rollback` to; it goes on."""
        return await self._core.checkpoint(comment)

    async def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Its checkpoints, oldest first."""
        return await self._core.checkpoints()

    async def delete_checkpoint(self, checkpoint: Checkpoint | str) -> None:
        """Forget a checkpoint. Raises NotFound."""
        await self._core.delete_checkpoint(_id_of(checkpoint))

    async def rollback(self, checkpoint: Checkpoint | str) -> None:
        """Return to a checkpoint, in memory and on disk. What came after it is gone."""
        await self._core.rollback(_id_of(checkpoint))

    async def snapshot(self, name: str, *, live: bool = True) -> Snapshot:
        """Make a template of it. It stays running if `live`, and is paused if not.

        Raises AlreadyExists, Conflict, DiskFull.
        """
        return await self._core.snapshot(name, live=live)

    # What it is.

    async def info(self) -> SandboxInfo:
        """Its state, its shape, its metadata. Raises NotFound."""
        return await self._core.info()

    async def metrics(self, time_range: str = "10m") -> tuple[MetricPoint, ...]:
        """What it used, oldest first; the ranges are `10m`, `2h` and `24h`."""
        return await self._core.metrics(time_range)

    async def console(self) -> bytes:
        """The newest that its console said; what is read is forgotten."""
        return await self._core.read_console()

    async def url(self, port: int) -> str:
        """The URL under which a port is served. Of a private one it needs the traffic token.

        Raises Invalid where the control plane is known by a bare address, below which there can
        be no names.
        """
        server = self._link.connection.server("the address of a port")
        return await server.url_of(self.sandbox_id, port)

    async def get_host(self, port: int) -> str:
        """The same without `http://` or `https://`."""
        return (await self.url(port)).partition("://")[2]

    async def traffic_token(self) -> str:
        """What requests to the ports of a private sandbox carry in `X-Traffic-Token`."""
        server = self._link.connection.server("the token of a port")
        return (await server.tokens(self.sandbox_id)).traffic

    # Code.

    async def run_code(
        self,
        code: str,
        *,
        language: str | None = None,
        context: CodeContext | str | None = None,
        envs: Mapping[str, str] | None = None,
        timeout: float | None = CODE_TIMEOUT_S,
        on_stdout: OnEach[CodeOutput] | None = None,
        on_stderr: OnEach[CodeOutput] | None = None,
        on_result: OnEach[Result] | None = None,
        on_error: OnEach[ExecutionError] | None = None,
    ) -> Execution:
        """Run code in the sandbox's interpreter (template `code-interpreter-v1`).

        `language` is `python` unless another is named; its variables are kept from one run to the
        next. `context` is one made by `create_code_context` and has a language already. `envs`
        holds for this run. `timeout` is in seconds: then the code is interrupted; None is never.

            execution = await sandbox.run_code("x = 6 * 7; x")
            print(execution.text)

        What code raises is `error` of the answer. Raises TimedOut, Unavailable, NotFound.
        """
        return await self._code.run(
            code,
            language=language,
            context=context,
            envs=envs,
            timeout=timeout,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            on_result=on_result,
            on_error=on_error,
        )

    async def create_code_context(self, *, language: str = "python", cwd: str = "") -> CodeContext:
        """A new interpreter with variables of its own."""
        return await self._code.create_context(language=language, cwd=cwd)

    async def list_code_contexts(self) -> tuple[CodeContext, ...]:
        """The interpreters that run."""
        return await self._code.contexts()

    async def remove_code_context(self, context: CodeContext | str) -> None:
        """End an interpreter. Raises NotFound."""
        await self._code.remove_context(context)

    async def restart_code_context(self, context: CodeContext | str) -> None:
        """Restart an interpreter, whose variables are gone then. Raises NotFound."""
        await self._code.restart_context(context)


def _whole_seconds(timeout: float | None) -> int:
    return math.ceil(timeout) if timeout else 0


def _id_of(checkpoint: Checkpoint | str) -> str:
    return checkpoint if isinstance(checkpoint, str) else checkpoint.checkpoint_id
