"""A guest agent as a plain process, for tests: built once, started on loopback, always ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sandmartin.agent.guest import (
    Command,
    Deadlines,
    Ended,
    Guest,
    Identity,
    Output,
    ProcessEvent,
    Started,
)

ME = pwd.getpwuid(os.geteuid()).pw_name
MIB = 1 << 20
TOKEN = "token-of-the-first-introduction"


@dataclass(frozen=True)
class RunningAgent:
    """One agent process and where it listens."""

    pid: int
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, token: str = TOKEN, deadlines: Deadlines | None = None) -> Guest:
        return Guest(self.host, token, self.port, deadlines)

    def peak_bytes(self) -> int:
        """The most memory it had since the last `forget_peak`."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def running(
    binary: Path, gateway: str = "127.0.0.1", prefix: Sequence[str] = ()
) -> Iterator[RunningAgent]:
    """An agent that nobody has introduced yet. `prefix` is a command that executes the agent."""
    command = [*prefix, os.fspath(binary), "agent", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, "--gateway", gateway], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        host, _, port = json.loads(process.stdout.readline())["listening"].rpartition(":")
        yield RunningAgent(process.pid, host, int(port))
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.asynccontextmanager
async def impostor(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Whatever `answer` says to each connection, and its port.

    At the end all connections are closed and their tasks have ended.
    """
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
            await writer.drain()
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            try:
                if writer.is_closing():
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()
            finally:
                # What is left has nobody who reads it.
                writer.transport.abort()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)


def identity(token: str = TOKEN, **envs: str) -> Identity:
    return Identity(
        sandbox_id="sbcontract",
        template="base",
        hostname="sbcontract",
        machine_id="0123456789abcdef0123456789abcdef",
        token=token,
        envs=envs,
    )


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


# Commands.


def shell(script: str, **options: Any) -> Command:
    return Command(cmd="sh", args=("-c", script), **({"user": ME} | options))


async def collect(events: AsyncIterator[ProcessEvent]) -> tuple[bytes, bytes, Ended]:
    out, err = b"", b""
    async for event in events:
        match event:
            case Output(data, stdout=True):
                out += data
            case Output(data):
                err += data
            case Ended():
                return out, err, event
    raise AssertionError("the stream had no end event")


async def started(events: AsyncIterator[ProcessEvent]) -> int:
    first = await anext(events)
    assert isinstance(first, Started)
    return first.pid


async def pattern(size: int, digest: Any = None) -> AsyncIterator[bytes]:
    block = os.urandom(MIB)
    for n in range(size // MIB):
        chunk = struct.pack(">Q", n) + block[8:]
        if digest is not None:
            digest.update(chunk)
        yield chunk


# What the stock SDKs send and get.


STREAM = "application/connect+json"


def framed(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">BI", 0, len(body)) + body


def frames(content: bytes) -> list[dict[str, Any]]:
    found = []
    while content:
        flags, size = struct.unpack_from(">BI", content)
        found.append(json.loads(content[5 : 5 + size]))
        content = content[5 + size :]
        assert (flags == 2) == (not content)
    return found


def stream(sdk: httpx.Client, method: str, message: dict[str, Any], **headers: str) -> list[Any]:
    """The messages of a stream that `service.Service/Method` answers with."""
    answer = sdk.post(
        f"/{method}",
        content=framed(message),
        headers={"content-type": STREAM} | {k.replace("_", "-"): v for k, v in headers.items()},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == STREAM
    return frames(answer.content)
