"""Child processes: the only place that starts one.

A child gets an argv list, an environment rebuilt from a short allow-list, a closed stdin unless
input is given, and a deadline; TERM, a grace, then KILL, and it is always waited for. A process
that must outlive us (a VM) is known by its pid *and* its start time, so that a reused pid is
never taken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandmartin.errors import TimedOut, ToolFailed

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "APT_CONFIG", "SSL_CERT_FILE")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GRACE_S = 2.0
_OUTPUT_TAIL = 2000


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: the allow-list from ours, a full PATH, and `extra`."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # Some accounts have no sbin in their PATH, where mke2fs, nft and friends live.
    kept["PATH"] = f"{kept['PATH']}:{_DEFAULT_PATH}" if "PATH" in kept else _DEFAULT_PATH
    return kept | dict(extra or {})


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
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    merge_stderr_to: IO[bytes] | None = None,
) -> Finished:
    """Run a child to its end. `merge_stderr_to` sends both its outputs to a file instead.

    Raises ToolFailed when it cannot be started or, with `check`, exits other than 0; TimedOut
    when `deadline_s` passes.
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
    except TimeoutError:
        raise TimedOut(f"{words[0]} did not end within {deadline_s:g} s") from None
    finally:
        await _end(child)
    done = Finished(words, child.returncode or 0, stdout or b"", stderr or b"")
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout)[-_OUTPUT_TAIL:].decode(errors="replace").strip()
        raise ToolFailed(f"{words[0]} exited {done.returncode}: {said or 'without a word'}")
    return done


async def _end(child: asyncio.subprocess.Process) -> None:
    """Make sure a child and its process group are gone: TERM, a grace, KILL, wait."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        await asyncio.shield(asyncio.wait_for(child.wait(), _GRACE_S))
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await asyncio.shield(child.wait())


@dataclass(frozen=True)
class ProcessId:
    """A process that outlives its starter: pid and start time (clock ticks since boot)."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of the live process `pid`, None when there is none or it is a zombie."""
        stat = _stat(pid)
        return None if stat is None else cls(pid, stat[1])

    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def kill(self, sig: int = signal.SIGKILL) -> bool:
        """Send a signal to this very process; False when it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor pins the pid, so what is checked here is what gets the signal.
            if not self.alive():
                return False
            signal.pidfd_send_signal(handle, sig)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    async def gone(self, deadline_s: float) -> bool:
        """Wait until it ended; False when it still runs after `deadline_s`."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        try:
            if not self.alive():
                return True
            loop.add_reader(handle, ended.set)
            try:
                async with asyncio.timeout(deadline_s):
                    await ended.wait()
            except TimeoutError:
                return False
            finally:
                loop.remove_reader(handle)
        finally:
            os.close(handle)
        reap(self.pid)
        return True


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time of `pid` from /proc/PID/stat (proc(5), fields 3 and 22)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may itself contain any character.
    rest = text[text.rindex(")") + 2 :].split()
    state, start_ticks = rest[0], int(rest[19])
    return None if state in "ZX" else (state, start_ticks)


def reap(pid: int) -> None:
    """Collect the exit status of `pid` if it is our child and has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


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
            child = subprocess.Popen(  # noqa: S603
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
        reap(child.pid)
        raise ToolFailed(f"{words[0]} ended at once", hint=f"its output is in {output}")
    return identity
