"""Child processes: the only place that starts one.

A child gets an argv list, an environment rebuilt from a short allow-list, a closed stdin unless
input is given, and a deadline; TERM, a grace, then KILL, and it is always waited for. A process
that must outlive us (a VM) is known by its pid *and* its start time, so that a reused pid is
never taken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandmartin.errors import TimedOut, ToolFailed

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "APT_CONFIG", "SSL_CERT_FILE")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GRACE_S = 2.0
_OUTPUT_TAIL = 2000


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: the allow-list from ours, a full PATH, and `extra`."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # Some accounts have no sbin in their PATH, where mke2fs, nft and friends live.
    kept["PATH"] = f"{kept['PATH']}:{DEFAULT_PATH}" if "PATH" in kept else DEFAULT_PATH
    return kept | dict(extra or {})


def unprivileged(uid: int, group: int | None = None, *, outlives: bool = False) -> list[str]:
    """The words before those of a program that runs as nobody but `uid`, without any right.

    With `group` it has the rights of that group too. It ends with us unless it `outlives` us.
    """
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}"]
    words += ["--clear-groups" if group is None else f"--groups={group}"]
    words += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return [*words, *([] if outlives else ["--pdeathsig=KILL"]), "--"]


@dataclass(frozen=True)
class Finished:
    """A child that ended; `stdout` and `stderr` are bytes."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    stdin: bytes | None = None,
    deadline_s: float = 60.0,
    grace_s: float = _GRACE_S,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    merge_stderr_to: IO[bytes] | None = None,
) -> Finished:
    """Run a child to its end. `merge_stderr_to` sends both its outputs to a file instead.

    Raises ToolFailed when it cannot be started or, with `check`, exits other than 0; TimedOut
    when `deadline_s` passes: all it started is then ended, by TERM and after `grace_s` by KILL.
    """
    words = tuple(os.fspath(word) for word in argv)
    out = merge_stderr_to if merge_stderr_to is not None else subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(
            *words,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=clean_environment(env),
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise ToolFailed(f"{words[0]} could not be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(deadline_s):
            stdout, stderr = await child.communicate(stdin)
    except BaseException as error:
        # Shielded: a caller that is cancelled twice still leaves nothing running.
        await asyncio.shield(_end(child, grace_s))
        if isinstance(error, TimeoutError):
            raise TimedOut(f"{words[0]} did not end within {deadline_s:g} s") from None
        raise
    done = Finished(words, child.returncode or 0, stdout or b"", stderr or b"")
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout)[-_OUTPUT_TAIL:].decode(errors="replace").strip()
        raise ToolFailed(f"{words[0]} exited {done.returncode}: {said or 'without a word'}")
    return done


async def _end(child: asyncio.subprocess.Process, grace_s: float) -> None:
    """End a child and all of its process group: TERM, a grace, KILL, wait."""
    # The child itself may have ended and left others: the group's number is theirs until they
    # end. `wait` also waits for them to let go of the pipes, hence a deadline each time.
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await child.wait()
    # One that left the group may hold the pipes for ever; asyncio has no public way to drop them.
    child._transport.close()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ProcessId:
    """A process that outlives its starter: pid and start time (clock ticks since boot)."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of the process `pid`, None when there is none or it has ended."""
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            return None
        found = cls(pid, start_ticks)
        return found if found.alive() else None

    def alive(self) -> bool:
        with self._pinned() as handle:
            return handle is not None and not _ended(handle)

    def kill(self, sig: int = signal.SIGKILL) -> bool:
        """Send a signal to this very process; False when it is gone."""
        with self._pinned() as handle:
            if handle is None or _ended(handle):
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, sig)
                return True
        return False

    async def gone(self, deadline_s: float) -> bool:
        """Wait until it ended; False when it still runs after `deadline_s`."""
        with self._pinned() as handle:
            if handle is not None and not await _readable(handle, deadline_s):
                return False
        self.reap()
        return True

    def reap(self) -> None:
        """Collect its exit status if it is our child and has ended."""
        with self._pinned() as handle, contextlib.suppress(ChildProcessError):
            if handle is not None:
                os.waitpid(self.pid, os.WNOHANG)

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[int | None]:
        """A descriptor of this very process, which keeps its pid from being used again; or None."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError as error:
            # EINVAL and ENOENT: the number now is that of another process's thread.
            if error.errno not in {errno.ESRCH, errno.EINVAL, errno.ENOENT}:
                raise
            yield None
            return
        try:
            yield handle if _start_ticks(self.pid) == self.start_ticks else None
        finally:
            os.close(handle)


def _ended(handle: int) -> bool:
    """Whether a process has ended, all of its threads.

    The state in /proc is that of the first thread: it says "zombie" of a process whose first
    thread ended while others run on, which a hostile VM's process could do.
    """
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


async def _readable(handle: int, deadline_s: float) -> bool:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(handle, readable.set)
    try:
        async with asyncio.timeout(deadline_s):
            await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(handle)
    return True


def _start_ticks(pid: int) -> int | None:
    """Start time of `pid` from /proc/PID/stat (proc(5), field 22)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may itself contain any character.
    return int(text[text.rindex(")") + 2 :].split()[19])


def spawn_detached(
    argv: Sequence[str | os.PathLike[str]],
    *,
    output: Path,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> ProcessId:
    """Start a process that outlives us, in a session of its own, its output appended to a file.

    Raises ToolFailed when it cannot be started or ends at once.
    """
    words = [os.fspath(word) for word in argv]
    with output.open("ab") as log:
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(env),
                cwd=cwd,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolFailed(f"{words[0]} could not be started: {error.strerror}") from error
    identity = ProcessId.of(child.pid)
    # Popen would poll a forgotten child at its next start and warn about it at exit: from here
    # on the process is known by its ProcessId alone, and `gone` reaps it.
    child.returncode = 0
    if identity is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)
        raise ToolFailed(f"{words[0]} ended at once", hint=f"its output is in {output}")
    return identity
