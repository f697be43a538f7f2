"""The seam between the client and whatever serves sandboxes: its words, and nothing of a wire.

A transport is safe to use from many tasks of one event loop. Every failure it raises is a
SandmartinError; a stream that is cut raises Unavailable and never ends as if it were complete.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sandmartin.errors import NotFound, SandmartinError
from sandmartin.model import INTERNET, NetworkPolicy, SandboxSpec, split_tag
from sandmartin.phases import Phase


@dataclass(frozen=True, kw_only=True)
class NewSandbox:
    """A sandbox to create. What is None is left to the other side's defaults.

    Raises Invalid when it can never work.
    """

    #: By which it can be found again even when the answer to the request never arrived. A host
    #: agent makes it the sandbox's id; a control plane gives ids itself and only remembers it.
    sandbox_id: str
    template: str = "base"
    vcpus: int | None = None
    memory_mb: int | None = None
    disk_size_mb: int | None = None
    #: Idle time after which the sandbox is paused; 0 is never.
    timeout_s: int = 0
    #: Environment of every command run in the sandbox.
    envs: Mapping[str, str] = field(default_factory=dict)
    network: NetworkPolicy | None = None
    #: What a host agent alone is told, by a control plane: whom the guest takes for a request that
    #: names nobody, and where that one's relative paths begin.
    default_user: str = ""
    default_workdir: str = ""
    #: What a control plane alone knows; a host agent refuses it. By metadata it is found again.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: What becomes of it then: `pause` or `kill`; empty is the other side's default.
    on_timeout: str = ""
    #: A request to one of its ports wakes it when it is paused.
    auto_resume: bool = False
    #: Its ports are open only to who has its token.
    private: bool = False

    def __post_init__(self) -> None:
        shape: dict[str, Any] = {
            "vcpus": self.vcpus,
            "memory_mb": self.memory_mb,
            "disk_size_mb": self.disk_size_mb,
        }
        # The rules stand in SandboxSpec; asking it here refuses a bad request before any start.
        SandboxSpec(
            sandbox_id=self.sandbox_id,
            template=split_tag(self.template)[0],
            timeout_s=self.timeout_s,
            network=self.network,
            **{name: value for name, value in shape.items() if value is not None},
        )


@dataclass(frozen=True, kw_only=True)
class CreatedSandbox:
    """Where a sandbox is now: what creating it, resuming it or rolling it back answers."""

    sandbox_id: str
    #: A `State` value, or a word of a newer release.
    state: str
    #: Address at which the host itself reaches the guest; empty when there is none.
    address: str = ""
    #: Version of the guest protocol, as E2B counts it; empty when it is not known.
    envd_version: str = ""
    #: What the time went to, where the other side tells it.
    phases: tuple[Phase, ...] = ()


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
    network: NetworkPolicy = INTERNET
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Version of the guest protocol, as E2B counts it; empty when it is not known.
    envd_version: str = ""


@dataclass(frozen=True, kw_only=True)
class ForkedSandbox:
    """One child of a fork, or why it could not be made."""

    sandbox_id: str
    state: str
    address: str
    error: SandmartinError | None = None
    #: Version of the guest protocol, as E2B counts it; empty when it is not known.
    envd_version: str = ""
    #: What the time went to, where the other side tells it.
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A moment of a sandbox that it can return to."""

    checkpoint_id: str
    comment: str
    #: Seconds since the epoch.
    created_at: int
    size_bytes: int
    #: What the time went to, where the other side tells it.
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A template made from a sandbox."""

    name: str
    size_bytes: int
    #: What the time went to, where the other side tells it.
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TemplateInfo:
    """What sandboxes start from."""

    name: str
    #: `image` (a disk) or `snapshot` (disk and memory).
    kind: str
    #: Of a snapshot, which fixes them; 0 for an image.
    vcpus: int
    memory_mb: int
    disk_size_mb: int
    #: What it takes on the host.
    size_bytes: int
    #: Of a snapshot: what its source might reach; None where that is not told.
    network: NetworkPolicy | None = None


@dataclass(frozen=True)
class RegistryAuth:
    """Whom to be for a registry of images."""

    username: str = field(repr=False)
    password: str = field(repr=False)


@dataclass(frozen=True)
class ImportProgress:
    """What is done to take an image in."""

    message: str


@dataclass(frozen=True, kw_only=True)
class ImportedImage:
    """An image that became a template, and what it says of itself."""

    #: `sha256:...` of its manifest.
    digest: str
    #: What the template takes on the host.
    size_bytes: int
    envs: Mapping[str, str] = field(repr=False)
    user: str
    workdir: str
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    #: Ports that it exposes, as `80/tcp`.
    ports: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """What a sandbox used at one time, or on average in one window."""

    #: Seconds since the epoch.
    timestamp: int
    cpu_pct: float
    mem_bytes: int
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """What a host is, and what it has for sandboxes."""

    cpus: int
    #: For all sandboxes together.
    memory_mb: int
    #: What each of them takes beside its own memory.
    memory_overhead_mb: int
    disk_free_mb: int
    #: Virtual CPUs granted for each CPU.
    cpu_overcommit: float
    #: `kvm` or `tcg`.
    accel: str
    vmm_version: str
    agent_version: str
    #: Sandboxes in these states.
    running: int
    paused: int


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that was started by a call and runs."""

    pid: int
    cmd: str
    args: tuple[str, ...]
    cwd: str
    tag: str = ""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file of a sandbox, in the words of its guest, which may lie."""

    name: str
    path: str
    #: `file`, `directory`, `symlink` or `other`; of a link, its target's.
    type: str
    size_bytes: int
    mode: int
    owner: str
    group: str
    #: Seconds since the epoch.
    modified_at: int
    #: Empty for all but a symbolic link.
    symlink_target: str


@dataclass(frozen=True)
class PtySize:
    """Size of a terminal, in characters."""

    cols: int
    rows: int


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
    #: Run it on a terminal of this size: its output is Stdout alone, and its input is open.
    pty: PtySize | None = None
    #: A name by which it can be found while it runs.
    tag: str = ""


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


@dataclass(frozen=True, kw_only=True)
class ArtefactStore:
    """Where an agent is to put artefacts, and the platform's key, by which hosts know them."""

    url: str
    key: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PushProgress:
    """How far an agent is with storing a template, in chunks of 1 MiB."""

    chunks_done: int
    chunks_total: int


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A template in an artefact store."""

    artefact_id: str
    #: Of its chunks before compression, and what of that was not there before, compressed.
    size_bytes: int
    added_bytes: int


def find_sandbox(listed: Iterable[SandboxInfo], sandbox_id: str) -> SandboxInfo:
    """The one with this id. Raises NotFound."""
    for info in listed:
        if info.sandbox_id == sandbox_id:
            return info
    raise NotFound(f"there is no sandbox {sandbox_id}")


class Transport(Protocol):
    """Everything a client can ask of sandboxes."""

    async def create(self, new: NewSandbox) -> CreatedSandbox:
        """Start a sandbox; the answer has its id.

        Raises AlreadyExists, NotFound (template), Exhausted.
        """

    async def undo_create(self, new: NewSandbox, failure: BaseException, /) -> None:
        """Destroy what a create has made, or may yet make, that ended with `failure`."""

    async def destroy(self, sandbox_id: str) -> None:
        """Destroy a sandbox and all it held. Already gone is success."""

    async def get_sandbox(self, sandbox_id: str) -> SandboxInfo:
        """Raises NotFound."""

    async def list_sandboxes(self) -> tuple[SandboxInfo, ...]:
        """Every sandbox there is."""

    async def ping(self, sandbox_id: str) -> None:
        """Reset the idle clock of a sandbox. Raises NotFound."""

    async def set_timeout(self, sandbox_id: str, timeout_s: int) -> None:
        """Give a sandbox that runs or is paused another idle limit, and reset its idle clock.

        0 is never. Raises NotFound, Conflict.
        """

    async def update_network(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        """Replace what a sandbox that runs or is paused may reach, on open connections too.

        Raises NotFound, Conflict.
        """

    async def pause(self, sandbox_id: str) -> tuple[Phase, ...]:
        """Write a sandbox to disk and free its memory. Already paused is success.

        Returns what the time went to, where the other side tells it. Raises Conflict, DiskFull;
        it then still runs.
        """

    async def resume(self, sandbox_id: str, timeout_s: int | None) -> CreatedSandbox:
        """Let a paused sandbox go on, with a new idle limit, or with its own for None.

        Already running is success. Raises Conflict, Exhausted; it then is still paused.
        """

    async def fork(
        self, sandbox_id: str, child_ids: tuple[str, ...], timeout_s: int
    ) -> tuple[ForkedSandbox, ...]:
        """Make children that go on from where a running sandbox is, which goes on too.

        An idle limit of 0 is that of the source. A child that could not be made is an error in
        its place. The answer has the ids; those given are what `NewSandbox.sandbox_id` is.
        """

    async def undo_fork(
        self,
        sandbox_id: str,
        child_ids: tuple[str, ...],
        timeout_s: int,
        failure: BaseException,
        /,
    ) -> None:
        """Destroy what a fork has made, or may yet make, that ended with `failure`."""

    async def create_checkpoint(self, sandbox_id: str, comment: str) -> Checkpoint:
        """Keep where a running sandbox is; it goes on."""

    async def list_checkpoints(self, sandbox_id: str) -> tuple[Checkpoint, ...]:
        """The checkpoints of a sandbox, oldest first."""

    async def delete_checkpoint(self, sandbox_id: str, checkpoint_id: str) -> None: ...

    async def rollback(self, sandbox_id: str, checkpoint_id: str) -> CreatedSandbox:
        """Return to a checkpoint, in memory and on disk. What came after it is gone."""

    async def create_snapshot(self, sandbox_id: str, name: str, *, live: bool) -> Snapshot:
        """Make a template of a sandbox, which stays running if `live`, and is paused if not."""

    async def delete_snapshot(self, name: str) -> None:
        """Delete a template. Raises Conflict while something depends on it."""

    async def list_templates(self) -> tuple[TemplateInfo, ...]: ...

    def read_template(self, name: str) -> AsyncGenerator[bytes, None]:
        """The whole of a template as one archive, chunk by chunk. Raises NotFound."""

    async def write_template(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Make a template of such an archive, whole or not at all.

        Raises Invalid, AlreadyExists, Denied, Exhausted; Conflict when it cannot run there.
        """

    async def metrics(self, sandbox_id: str, time_range: str) -> tuple[MetricPoint, ...]:
        """What a sandbox used, oldest first; the ranges are `10m`, `2h` and `24h`."""

    async def read_console(self, sandbox_id: str) -> bytes:
        """The newest that the guest's console said; what is read is forgotten."""

    async def list_processes(self, sandbox_id: str) -> tuple[Process, ...]: ...

    async def resize_pty(self, sandbox_id: str, pid: int, size: PtySize) -> None:
        """Resize the terminal of a command. Raises NotFound, Conflict when it has none."""

    async def stat_file(self, sandbox_id: str, path: str, user: str = "") -> FileInfo:
        """Raises NotFound, Denied."""

    async def list_files(
        self, sandbox_id: str, path: str, user: str = "", *, depth: int = 1
    ) -> tuple[FileInfo, ...]:
        """What is below a directory, so many levels down."""

    async def make_directory(self, sandbox_id: str, path: str, user: str = "") -> None:
        """Make a directory and its missing parents. Raises AlreadyExists."""

    async def move_file(
        self, sandbox_id: str, source: str, destination: str, user: str = ""
    ) -> None: ...

    async def remove_file(self, sandbox_id: str, path: str, user: str = "") -> None:
        """Remove a file or a whole tree. One that is not there is no error."""

    def exec_stream(self, sandbox_id: str, command: Command) -> AsyncGenerator[ExecEvent, None]:
        """Run a command: Started, any output, Ended. Raises NotStarted, NotFound.

        Closing the generator stops listening; the command goes on until its time limit.
        """

    def connect_process(self, sandbox_id: str, pid: int) -> AsyncGenerator[ExecEvent, None]:
        """Listen to a command that runs; what nobody heard yet comes first. Raises NotFound."""

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

    async def write_tree(
        self, sandbox_id: str, directory: str, pieces: AsyncIterator[bytes], *, owner: str = ""
    ) -> int:
        """Unpack a plain tar below an absolute directory, made if missing; the number of members.

        It is done with root's rights. All becomes the owner's: `user`, `user:group` or numbers;
        empty keeps the numbers of the tar. Raises Invalid (which member, and why), DiskFull,
        NotFound, and Unimplemented where the other side is of an earlier release; what was
        unpacked before stays.
        """

    def read_tree(self, sandbox_id: str, path: str) -> AsyncGenerator[bytes, None]:
        """A file, a link or a whole directory as a plain tar, read with root's rights.

        Names are relative to the directory above the absolute path. Raises NotFound, Invalid;
        ToolFailed or Unavailable in the end when it is not whole.
        """

    async def aclose(self) -> None:
        """Close the connections; what runs over them ends as Unavailable."""
