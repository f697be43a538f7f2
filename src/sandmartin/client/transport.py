"""The seam between the client and whatever serves sandboxes: its words, and nothing of a wire.

A transport is safe to use from many tasks of one event loop. Every failure it raises is a
SandmartinError; a stream that is cut raises Unavailable and never ends as if it were complete.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sandmartin.model import SandboxSpec


@dataclass(frozen=True, kw_only=True)
class NewSandbox:
    """A sandbox to create. What is None is left to the other side's defaults.

    The caller chooses the id, so that it can destroy what it asked for even when the answer to
    its request never arrived. Raises Invalid when it can never work.
    """

    sandbox_id: str
    template: str = "base"
    vcpus: int | None = None
    memory_mb: int | None = None
    disk_size_mb: int | None = None
    #: Idle time after which the sandbox is paused; 0 is never.
    timeout_s: int = 0
    #: Environment of every command run in the sandbox.
    envs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = {
            "vcpus": self.vcpus,
            "memory_mb": self.memory_mb,
            "disk_size_mb": self.disk_size_mb,
        }
        # The rules stand in SandboxSpec; asking it here refuses a bad request before any start.
        SandboxSpec(
            sandbox_id=self.sandbox_id,
            template=self.template,
            timeout_s=self.timeout_s,
            **{name: value for name, value in shape.items() if value is not None},
        )


@dataclass(frozen=True, kw_only=True)
class CreatedSandbox:
    """What a create answers."""

    sandbox_id: str
    #: A `State` value, or a word of a newer release.
    state: str
    #: Address at which the host itself reaches the guest; empty when there is none.
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class SandboxInfo:
    """One line of a listing."""

    sandbox_id: str
    #: A `State` value, or a word of a newer release.
    state: str
    template: str
    vcpus: int
    memory_mb: int
    disk_size_mb: int
    timeout_s: int
    address: str
    #: Seconds since the epoch, as is `last_active_at`.
    created_at: int
    last_active_at: int
    #: Why the state is `error`; empty otherwise.
    reason: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program to run in a sandbox."""

    cmd: str
    args: tuple[str, ...] = ()
    envs: Mapping[str, str] = field(default_factory=dict)
    #: Empty is the user's home.
    cwd: str = ""
    #: Name or number; empty is root.
    user: str = ""
    #: Keep standard input open for `send_stdin`; otherwise it is empty.
    stdin: bool = False
    #: Seconds after which the command is killed; None is never.
    timeout_s: int | None = None


@dataclass(frozen=True)
class Started:
    """The command runs; always the first event."""

    pid: int


@dataclass(frozen=True)
class Stdout:
    data: bytes


@dataclass(frozen=True)
class Stderr:
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The command ended; always the last event."""

    #: 128 + signal when a signal ended the command.
    exit_code: int
    #: Number of the signal that ended it; 0 for none.
    signal: int = 0
    #: Why it ended otherwise than by itself (its time limit); empty when it simply exited.
    error: str = ""


ExecEvent = Started | Stdout | Stderr | Ended


class Transport(Protocol):
    """Everything a client can ask of sandboxes."""

    async def create(self, new: NewSandbox) -> CreatedSandbox:
        """Start a sandbox. Raises AlreadyExists, NotFound (template), Exhausted."""

    async def destroy(self, sandbox_id: str) -> None:
        """Destroy a sandbox and all it held. Already gone is success."""

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        """Every sandbox there is."""

    async def ping(self, sandbox_id: str) -> None:
        """Reset the idle clock of a sandbox. Raises NotFound."""

    async def terminate(self) -> None:
        """Destroy every sandbox and end the other side."""

    def exec_stream(self, sandbox_id: str, command: Command) -> AsyncGenerator[ExecEvent, None]:
        """Run a command: Started, any output, Ended. Raises NotStarted, NotFound.

        Closing the generator stops listening; the command goes on until its time limit.
        """

    async def send_stdin(self, sandbox_id: str, pid: int, chunks: AsyncIterator[bytes]) -> None:
        """Feed the standard input of a command started with `stdin`, and close it at the end."""

    async def send_signal(self, sandbox_id: str, pid: int, signal: int) -> None:
        """Send a signal to a running command. Raises NotFound when it is gone."""

    async def write_file(
        self, sandbox_id: str, path: str, chunks: AsyncIterator[bytes], user: str = ""
    ) -> None:
        """Write a file of any size. Raises NotFound, DiskFull."""

    def read_file(self, sandbox_id: str, path: str, user: str = "") -> AsyncGenerator[bytes, None]:
        """Read a file of any size, chunk by chunk. Raises NotFound."""

    async def aclose(self) -> None:
        """Close the connections; what runs over them ends as Unavailable."""
