"""The messages of `hostagent.v1`, between their wire form and the transport's dataclasses.

Answers of single calls are JSON; what streams carry is protobuf's binary form.
"""

from __future__ import annotations

from sandmartin.errors import SandmartinError, from_code
from sandmartin.model import INTERNET, NetworkPolicy
from sandmartin.phases import Phase
from sandmartin.transport import (
    Artefact,
    ArtefactStore,
    Checkpoint,
    Command,
    CreatedSandbox,
    Ended,
    ExecEvent,
    FileInfo,
    ForkedSandbox,
    HostInfo,
    ImportedImage,
    ImportProgress,
    MetricPoint,
    Process,
    PushProgress,
    SandboxInfo,
    Started,
    Stderr,
    Stdout,
    TemplateInfo,
)
from sandmartin.transport import protobuf as wire
from sandmartin.transport.connect import malformed
from sandmartin.transport.fields import Message
from sandmartin.transport.fields import integer as _int
from sandmartin.transport.fields import number as _float
from sandmartin.transport.fields import part as _part
from sandmartin.transport.fields import parts as _parts
from sandmartin.transport.fields import text as _text
from sandmartin.transport.fields import texts as _texts

#: What is kept of an operation must not grow with what a host tells.
_MOST_PHASES = 50
_LONGEST_NAME = 40

# Messages of streams.


def exec_request(sandbox_id: str, command: Command) -> bytes:
    # 0 would be the agent's default limit; below 0 is none.
    timeout_s = -1 if command.timeout_s is None else command.timeout_s
    pty = command.pty
    size = None if pty is None else wire.integer(1, pty.cols) + wire.integer(2, pty.rows)
    return b"".join(
        (
            wire.text(1, sandbox_id),
            wire.text(2, command.cmd),
            wire.texts(3, command.args),
            wire.integer(4, timeout_s),
            wire.pairs(100, command.envs),
            wire.text(101, command.cwd),
            wire.text(102, command.user),
            wire.integer(103, command.stdin),
            b"" if size is None else wire.content(104, size, always=True),
            wire.text(105, command.tag),
        )
    )


def file_request(sandbox_id: str, path: str, user: str) -> bytes:
    """A request for a stream of a file, or the meta data of one."""
    return wire.text(1, sandbox_id) + wire.text(2, path) + wire.text(100, user)


def fields(message: bytes) -> wire.Fields:
    try:
        return wire.decode(message)
    except ValueError as error:
        raise malformed(str(error)) from error


def content(fields: wire.Fields, number: int) -> bytes:
    value = fields.get(number, b"")
    if isinstance(value, int):
        raise SandmartinError(f"the agent's answer has a number in field {number}")
    return value


def number(fields: wire.Fields, number: int) -> int:
    value = fields.get(number, 0)
    if isinstance(value, bytes):
        raise SandmartinError(f"the agent's answer has no number in field {number}")
    return wire.signed(value)


def store(store: ArtefactStore) -> bytes:
    return wire.text(1, store.url) + wire.content(2, store.key)


def push_event(message: bytes) -> PushProgress | Artefact | None:
    """The event in a PushTemplateResponse, None for a kind that this release does not know."""
    event = fields(message)
    if 1 in event:
        told = fields(content(event, 1))
        return PushProgress(chunks_done=_size(told, 1), chunks_total=_size(told, 2))
    if 2 in event:
        told = fields(content(event, 2))
        return Artefact(
            artefact_id=content(told, 1).decode(errors="replace"),
            size_bytes=_size(told, 2),
            added_bytes=_size(told, 3),
        )
    return None


def _size(fields: wire.Fields, number: int) -> int:
    """A 64-bit number that is never below 0."""
    value = fields.get(number, 0)
    if isinstance(value, bytes):
        raise SandmartinError(f"the agent's answer has no number in field {number}")
    return value


def exec_event(message: bytes) -> ExecEvent | None:
    """The event in an ExecStreamResponse, None for a kind that this release does not know."""
    event = fields(message)
    if 1 in event:
        return Started(number(fields(content(event, 1)), 1))
    if 2 in event:
        data = fields(content(event, 2))
        return Stdout(content(data, 1)) if 1 in data else Stderr(content(data, 2))
    if 3 in event:
        end = fields(content(event, 3))
        return Ended(
            exit_code=number(end, 1),
            signal=number(end, 100),
            error=content(end, 2).decode(errors="replace"),
        )
    return None


def import_event(message: bytes) -> ImportProgress | ImportedImage | None:
    """The event in an ImportImageResponse, None for a kind that this release does not know."""
    event = fields(message)
    if 1 in event:
        return ImportProgress(_string(fields(content(event, 1)), 1))
    return imported_image(content(event, 2)) if 2 in event else None


def imported_image(message: bytes) -> ImportedImage:
    found = fields(message)
    envs = [fields(each) for each in wire.repeated(message, 3)]

    def strings(number: int) -> tuple[str, ...]:
        return tuple(each.decode(errors="replace") for each in wire.repeated(message, number))

    return ImportedImage(
        digest=_string(found, 1),
        size_bytes=_size(found, 2),
        envs={_string(each, 1): _string(each, 2) for each in envs},
        user=_string(found, 4),
        workdir=_string(found, 5),
        entrypoint=strings(6),
        cmd=strings(7),
        ports=strings(8),
    )


def _string(fields: wire.Fields, number: int) -> str:
    return content(fields, number).decode(errors="replace")


def sandbox_info(message: Message) -> SandboxInfo:
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
        network=_network(_part(message, "network")),
        envd_version=_text(message, "envdVersion"),
    )


def _network(message: Message | None) -> NetworkPolicy:
    if message is None:
        return INTERNET
    return NetworkPolicy(
        allow_internet_access=message.get("allowInternetAccess") is not False,
        allow_out=_texts(message, "allowOut"),
        deny_out=_texts(message, "denyOut"),
    )


def phases(message: Message) -> tuple[Phase, ...]:
    """What the time of an operation went to; nothing of an agent of an earlier release."""
    return tuple(
        Phase(_text(each, "name")[:_LONGEST_NAME], max(0, _int(each, "durationUs")) / 1e6)
        for each in _parts(message, "phases")[:_MOST_PHASES]
    )


def placed(message: Message, sandbox_id: str) -> CreatedSandbox:
    return CreatedSandbox(
        sandbox_id=sandbox_id,
        state=_text(message, "status"),
        address=_text(message, "hostIp"),
        envd_version=_text(message, "envdVersion"),
        phases=phases(message),
    )


def forked(message: Message) -> ForkedSandbox:
    error = None
    if (info := _part(message, "error")) is not None:
        said = _text(message, "errorMessage")
        error = from_code(_text(info, "code"), said, _text(info, "hint"))
    return ForkedSandbox(
        sandbox_id=_text(message, "sandboxId"),
        state=_text(message, "status"),
        address=_text(message, "hostIp"),
        error=error,
        envd_version=_text(message, "envdVersion"),
        phases=phases(message),
    )


def checkpoint(message: Message) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=_text(message, "checkpointId"),
        comment=_text(message, "comment"),
        created_at=_int(message, "createdAtUnix"),
        size_bytes=_int(message, "sizeBytes"),
    )


def template(message: Message) -> TemplateInfo:
    kind = _text(message, "kind")
    return TemplateInfo(
        name=_text(message, "name"),
        kind=kind,
        vcpus=_int(message, "vcpus"),
        memory_mb=_int(message, "memoryMb"),
        disk_size_mb=_int(message, "diskSizeMb"),
        size_bytes=_int(message, "sizeBytes"),
        network=_network(_part(message, "network")) if kind == "snapshot" else None,
    )


def metric_point(message: Message) -> MetricPoint:
    return MetricPoint(
        timestamp=_int(message, "timestampUnix"),
        cpu_pct=_float(message, "cpuPct"),
        mem_bytes=_int(message, "memBytes"),
        disk_bytes=_int(message, "diskBytes"),
    )


def host_info(message: Message) -> HostInfo:
    return HostInfo(
        cpus=_int(message, "cpus"),
        memory_mb=_int(message, "memoryMb"),
        memory_overhead_mb=_int(message, "memoryOverheadMb"),
        disk_free_mb=_int(message, "diskFreeMb"),
        cpu_overcommit=_float(message, "cpuOvercommit"),
        accel=_text(message, "accel"),
        vmm_version=_text(message, "vmmVersion"),
        agent_version=_text(message, "agentVersion"),
        running=_int(message, "running"),
        paused=_int(message, "paused"),
    )


def process(message: Message) -> Process:
    return Process(
        pid=_int(message, "pid"),
        cmd=_text(message, "cmd"),
        args=_texts(message, "args"),
        cwd=_text(message, "cwd"),
        tag=_text(message, "tag"),
    )


def file_info(message: Message) -> FileInfo:
    return FileInfo(
        name=_text(message, "name"),
        path=_text(message, "path"),
        type=_text(message, "type"),
        size_bytes=_int(message, "sizeBytes"),
        mode=_int(message, "mode"),
        owner=_text(message, "owner"),
        group=_text(message, "group"),
        modified_at=_int(message, "modifiedAtUnix"),
        symlink_target=_text(message, "symlinkTarget"),
    )
