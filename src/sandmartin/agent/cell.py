"""Cells: where programs parse what strangers made.

A program in a cell is root of a user namespace whose 65536 users are nobody's on this host, so
that owners and modes come out right and harm nobody. It sees the system's programs and one
directory, which is all that it can write to; it has no network unless it is given one, no other
processes, few capabilities, and limits on memory, file size and time. What it makes belongs to
those users: whoever takes it from there opens it without following links, and only after the
program has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pyroute2 import IPRoute

from sandmartin.agent import namespace, proc
from sandmartin.agent.proc import Finished
from sandmartin.errors import TimedOut, ToolFailed
from sandmartin.relay.guard import Guard

_INIT = Path(__file__).with_name("cell_init.py")
#: A cell's ids, which begin at a setting.
IDS = 65536
_MEMORY_BYTES = 4 << 30
_MAX_OPEN = 4096
_MAX_PROCESSES = 512
_NOT_STARTED = 125


@dataclass(frozen=True)
class Way:
    """A network that leads nowhere but through a guard."""

    #: Names the namespace for whoever may look into our process.
    namespace: str
    #: Address of the proxy in it, with its password.
    proxy: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The one directory that programs in it can write to, the first of their users' ids."""

    work: Path
    uid: int
    #: Largest file.
    file_bytes: int

    def open(self) -> None:
        """Make the directory, closed to everybody else. Raises DiskFull, OSError."""
        self.work.mkdir(mode=0o700)
        os.chown(self.work, self.uid, self.uid)

    @contextlib.contextmanager
    def opened(self, *names: str) -> Iterator[int | None]:
        """A plain file below the directory, without following a link; None when there is none.

        Each name is that of one step.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.ExitStack() as stack:
            handle = os.open(self.work, flags | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            for name in names:
                if "/" in name or name == "..":
                    yield None
                    return
                try:
                    handle = os.open(name, flags, dir_fd=handle)
                except OSError:
                    yield None
                    return
                stack.callback(os.close, handle)
            yield handle if stat.S_ISREG(os.fstat(handle).st_mode) else None

    async def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        deadline_s: float,
        way: Way | None = None,
        files: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> Finished:
        """Run a program to its end, whatever it exits with.

        `files` are there below /run, for it alone, and on no disk. `log` takes both its outputs.
        Raises ToolFailed when it cannot be started, TimedOut.
        """
        env = {"PATH": proc.DEFAULT_PATH, "HOME": "/run", "TMPDIR": os.fspath(self.work)}
        if way is not None:
            env |= {"HTTP_PROXY": way.proxy, "HTTPS_PROXY": way.proxy}
        order = {
            "argv": [os.fspath(word) for word in argv],
            "env": env,
            "uid": self.uid,
            "network": None if way is None else way.namespace,
            "work": os.fspath(self.work),
            "files": dict(files or {}),
            "limits": {
                "AS": _MEMORY_BYTES,
                "FSIZE": self.file_bytes,
                "NOFILE": _MAX_OPEN,
                "NPROC": _MAX_PROCESSES,
                "CORE": 0,
            },
        }
        try:
            done = await proc.run(
                [sys.executable, "-I", "-S", _INIT],
                stdin=json.dumps(order).encode(),
                deadline_s=deadline_s,
                check=False,
                merge_stderr_to=log,
            )
        except TimedOut as error:
            raise TimedOut(f"{argv[0]} did not end within {deadline_s:g} s") from error
        if done.returncode == _NOT_STARTED:
            said = done.stderr.decode(errors="replace").strip()
            raise ToolFailed(
                f"{argv[0]} could not be started in a cell: {said}",
                hint="allow user namespaces (`sysctl user.max_user_namespaces=65536`); in a "
                "chroot there are none",
            )
        return done


@contextlib.asynccontextmanager
async def guarded_way(guard: Guard, loopback: tuple[str, int] | None) -> AsyncIterator[Way]:
    """A network with the guard's proxy alone; `loopback` is one place of this host's to have too.

    Programs take no proxy to a loopback address: what leads there is in its place.
    """
    # The named one first: the other takes any that is free.
    places = [*([] if loopback is None else [loopback]), ("127.0.0.1", 0)]
    handle, listeners = await asyncio.to_thread(namespace.run_in_new, lambda _: _dig(places))
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, handle)
        for each in listeners:
            stack.enter_context(contextlib.closing(each))
        if loopback is not None:
            await stack.enter_async_context(guard.forward(listeners[0], *loopback))
        proxy = await stack.enter_async_context(guard.proxy(listeners[-1]))
        yield Way(namespace=f"/proc/{os.getpid()}/fd/{handle}", proxy=proxy)


def _dig(places: Sequence[tuple[str, int]]) -> tuple[int, list[socket.socket]]:
    """In a new namespace: a descriptor that keeps it, and sockets bound to its loopback."""
    with contextlib.ExitStack() as stack:
        with IPRoute() as routes:
            routes.link("set", index=1, state="up")
        listeners = []
        for place in places:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            stack.callback(listener.close)
            listener.bind(place)
            listeners.append(listener)
        handle = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.pop_all()
        return handle, listeners
