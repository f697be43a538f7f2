"""The SDK for programs without an event loop, made from the asynchronous one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, overload

from sandmartin.client.asynchronous import AsyncSandbox
from sandmartin.client.callbacks import OnEach
from sandmartin.client.commands import DEFAULT_TIMEOUT_S, AsyncCommands
from sandmartin.client.facade import (
    Facade,
    blocking,
    iterating,
    iterating_all,
    making,
    wrapping,
)
from sandmartin.client.files import AsyncFiles
from sandmartin.client.git import AsyncGit
from sandmartin.client.handle import AsyncCommandHandle
from sandmartin.client.portal import portal
from sandmartin.client.pty import AsyncPty
from sandmartin.client.results import CommandResult
from sandmartin.client.templates import AsyncTemplates
from sandmartin.client.watch import AsyncWatch, FileEvent
from sandmartin.transport import Stderr, Stdout


class CommandHandle(Facade[AsyncCommandHandle]):
    __doc__ = AsyncCommandHandle.__doc__

    @property
    def pid(self) -> int:
        """Its number in the sandbox."""
        return self._inner.pid

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs, and when that is not known."""
        return self._inner.exit_code

    def __iter__(self) -> Iterator[Stdout | Stderr]:
        return portal().iterate(lambda: aiter(self._inner))

    wait = blocking(AsyncCommandHandle.wait)
    send_stdin = blocking(AsyncCommandHandle.send_stdin)
    close_stdin = blocking(AsyncCommandHandle.close_stdin)
    kill = blocking(AsyncCommandHandle.kill)
    resize = blocking(AsyncCommandHandle.resize)
    disconnect = blocking(AsyncCommandHandle.disconnect)


class Commands(Facade[AsyncCommands]):
    """Commands of a sandbox: `sandbox.commands`."""

    _run = blocking(AsyncCommands.run)
    list = blocking(AsyncCommands.list)
    kill = blocking(AsyncCommands.kill)
    connect = wrapping(AsyncCommands.connect, CommandHandle)
    send_stdin = blocking(AsyncCommands.send_stdin)
    close_stdin = blocking(AsyncCommands.close_stdin)

    @overload
    def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: Literal[False] = False,
        envs: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        stdin: str | bytes | bool = False,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
        check: bool = True,
        tag: str = "",
    ) -> CommandResult: ...

    @overload
    def run(
        self,
        cmd: str | Sequence[str],
        *,
        background: Literal[True],
        envs: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        stdin: str | bytes | bool = False,
        on_stdout: OnEach[str] | None = None,
        on_stderr: OnEach[str] | None = None,
        tag: str = "",
    ) -> CommandHandle: ...

    def run(self, cmd: str | Sequence[str], **options: Any) -> CommandResult | CommandHandle:
        """As `AsyncCommands.run`."""
        made: CommandResult | AsyncCommandHandle = self._run(cmd, **options)
        return CommandHandle(made) if isinstance(made, AsyncCommandHandle) else made


class Pty(Facade[AsyncPty]):
    """Terminals of a sandbox: `sandbox.pty`."""

    create = wrapping(AsyncPty.create, CommandHandle)
    connect = wrapping(AsyncPty.connect, CommandHandle)
    send = blocking(AsyncPty.send)
    resize = blocking(AsyncPty.resize)
    kill = blocking(AsyncPty.kill)


class Watch(Facade[AsyncWatch]):
    __doc__ = AsyncWatch.__doc__

    def __iter__(self) -> Iterator[FileEvent]:
        return portal().iterate(lambda: aiter(self._inner))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    stop = blocking(AsyncWatch.stop)


class Files(Facade[AsyncFiles]):
    __doc__ = AsyncFiles.__doc__

    read = blocking(AsyncFiles.read)
    stream = iterating(AsyncFiles.stream)
    write = blocking(AsyncFiles.write)
    write_many = blocking(AsyncFiles.write_many)
    list = blocking(AsyncFiles.list)
    exists = blocking(AsyncFiles.exists)
    info = blocking(AsyncFiles.info)
    mkdir = blocking(AsyncFiles.mkdir)
    rename = blocking(AsyncFiles.rename)
    remove = blocking(AsyncFiles.remove)
    watch = wrapping(AsyncFiles.watch, Watch)
    upload = blocking(AsyncFiles.upload)
    download = blocking(AsyncFiles.download)


class Git(Facade[AsyncGit]):
    __doc__ = AsyncGit.__doc__

    clone = blocking(AsyncGit.clone)
    init = blocking(AsyncGit.init)
    status = blocking(AsyncGit.status)
    add = blocking(AsyncGit.add)
    commit = blocking(AsyncGit.commit)
    push = blocking(AsyncGit.push)
    pull = blocking(AsyncGit.pull)
    branches = blocking(AsyncGit.branches)
    checkout = blocking(AsyncGit.checkout)
    delete_branch = blocking(AsyncGit.delete_branch)
    get_config = blocking(AsyncGit.get_config)
    set_config = blocking(AsyncGit.set_config)
    configure_user = blocking(AsyncGit.configure_user)


class Templates(Facade[AsyncTemplates]):
    """The templates of a place.

        print([each.name for each in Templates().list()])

    `url` and `api_key` are as in `Sandbox.create`.
    """

    def __init__(self, *, url: str | None = None, api_key: str | None = None) -> None:
        super().__init__(AsyncTemplates(url=url, api_key=api_key))

    list = blocking(AsyncTemplates.list)
    build = blocking(AsyncTemplates.build)
    builds = blocking(AsyncTemplates.builds)
    get_build = blocking(AsyncTemplates.get_build)
    build_log = iterating(AsyncTemplates.build_log)
    cancel_build = blocking(AsyncTemplates.cancel_build)
    tags = blocking(AsyncTemplates.tags)
    tag = blocking(AsyncTemplates.tag)
    untag = blocking(AsyncTemplates.untag)
    from_snapshot = blocking(AsyncTemplates.from_snapshot)
    delete = blocking(AsyncTemplates.delete)
    download = iterating(AsyncTemplates.download)
    upload = blocking(AsyncTemplates.upload)


class Sandbox(Facade[AsyncSandbox]):
    """A microVM of its own.

        with Sandbox.create() as sandbox:
            print(sandbox.commands.run("uname -r").stdout)

    Leaving the context kills it; without one it lives until `kill`. It may be used from many
    threads at once, and in a child that was forked.
    """

    def __init__(self, inner: AsyncSandbox) -> None:
        """`create` and `connect` make it."""
        super().__init__(inner)
        self.commands = Commands(inner.commands)
        self.pty = Pty(inner.pty)
        self.files = Files(inner.files)
        self.git = Git(inner.git)

    @property
    def sandbox_id(self) -> str:
        """Its id: `sb` and 20 characters."""
        return self._inner.sandbox_id

    create = staticmethod(making(AsyncSandbox.create, lambda made: Sandbox(made)))
    connect = staticmethod(making(AsyncSandbox.connect, lambda made: Sandbox(made)))
    list = staticmethod(iterating_all(AsyncSandbox.list))

    def __enter__(self) -> Self:
        return self

    __exit__ = blocking(AsyncSandbox.__aexit__)

    kill = blocking(AsyncSandbox.kill)
    pause = blocking(AsyncSandbox.pause)
    resume = blocking(AsyncSandbox.resume)
    set_timeout = blocking(AsyncSandbox.set_timeout)
    fork = wrapping(AsyncSandbox.fork, lambda made: tuple(map(Sandbox, made)))
    checkpoint = blocking(AsyncSandbox.checkpoint)
    checkpoints = blocking(AsyncSandbox.checkpoints)
    delete_checkpoint = blocking(AsyncSandbox.delete_checkpoint)
    rollback = blocking(AsyncSandbox.rollback)
    snapshot = blocking(AsyncSandbox.snapshot)
    info = blocking(AsyncSandbox.info)
    metrics = blocking(AsyncSandbox.metrics)
    console = blocking(AsyncSandbox.console)
    get_host = blocking(AsyncSandbox.get_host)
    url = blocking(AsyncSandbox.url)
    traffic_token = blocking(AsyncSandbox.traffic_token)
    run_code = blocking(AsyncSandbox.run_code)
    create_code_context = blocking(AsyncSandbox.create_code_context)
    list_code_contexts = blocking(AsyncSandbox.list_code_contexts)
    remove_code_context = blocking(AsyncSandbox.remove_code_context)
    restart_code_context = blocking(AsyncSandbox.restart_code_context)
