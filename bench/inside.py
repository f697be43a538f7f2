"""What the benchmark does inside sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from sandmartin.client.sandbox import AsyncSandbox, temporary_sandbox
from sandmartin.model import new_sandbox_id
from sandmartin.transport import Command, Ended, NewSandbox, Stdout, Transport

MB = 1 << 20
DIRTY_MB = 32
TRUE = "/bin/true"
_TIMEOUT_S = 120


def new(memory_mb: int | None = None) -> NewSandbox:
    """The default sandbox, or one with another size of memory."""
    return NewSandbox(sandbox_id=new_sandbox_id(), memory_mb=memory_mb)


def fresh(
    transport: Transport, memory_mb: int | None = None
) -> AbstractAsyncContextManager[AsyncSandbox]:
    """A sandbox for as long as the context lasts."""
    return temporary_sandbox(transport, new(memory_mb))


async def run(sandbox: AsyncSandbox, *words: str) -> bytes:
    """What a command says, to its end. Raises RuntimeError when it fails."""
    out = bytearray()
    command = Command(cmd=words[0], args=words[1:], timeout_s=_TIMEOUT_S)
    async with sandbox.exec(command) as execution:
        async for event in execution:
            if isinstance(event, Stdout):
                out += event.data
            elif isinstance(event, Ended) and event.exit_code:
                raise RuntimeError(f"{words} exited {event.exit_code}")
    return bytes(out)


async def dirty_memory(sandbox: AsyncSandbox, megabytes: int = DIRTY_MB) -> None:
    """Write to the same pages of memory each time; none of them is a file's on disk."""
    await _overwrite(sandbox, "/dev/shm/dirty", megabytes)  # noqa: S108 - inside the guest


async def dirty_disk(sandbox: AsyncSandbox) -> None:
    """Write to a file, past the guest's page cache: only the disk is dirtied."""
    await _overwrite(sandbox, "/root/dirty", DIRTY_MB, "oflag=direct")


async def _overwrite(sandbox: AsyncSandbox, path: str, megabytes: int, *words: str) -> None:
    arguments = (f"of={path}", "bs=1M", f"count={megabytes}", "conv=notrunc", *words)
    await run(sandbox, "dd", "if=/dev/urandom", *arguments)


async def content(megabytes: int, block: bytes) -> AsyncIterator[bytes]:
    for _ in range(megabytes):
        yield block
