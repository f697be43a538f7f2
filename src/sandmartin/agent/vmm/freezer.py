"""The second monitor of a VM, for moments that must be short.

A freeze stops a VM, takes its device state and its dirtied pages, puts a new layer under its
disk, and lets it go on: one thread does all of it with plain blocking calls, so that no other
work of the agent can come between. Whatever fails, the VM goes on, or it is told that it did not.

What answers may be a QEMU that its guest has taken over: each call has a deadline, each message a
limit, and an answer is matched to its call.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from sandmartin.agent.vmm.monitor import connect
from sandmartin.errors import TimedOut, ToolFailed, Unavailable

_DEADLINE_S = 10.0
_LOAD_DEADLINE_S = 60.0
_MESSAGE_LIMIT = 1 << 20
#: Device state of a microvm is 13 to 25 kB; that of any machine stays far below this.
_STATE_LIMIT = 64 << 20
_POLL_S = 0.002
_URGENT_NICE = -15


@dataclass(frozen=True)
class StateFile:
    """Memory of ours that QEMU can write a device state to."""

    #: By which QEMU opens it.
    name: str
    saved: BinaryIO

    def read(self) -> bytes:
        """The state that was saved."""
        self.saved.seek(0)
        return self.saved.read(_STATE_LIMIT)


@contextlib.contextmanager
def urgent() -> Iterator[None]:
    """This thread, and each that it starts, goes before the others of a busy host."""
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    # Not everywhere may an agent do so, and then it is just slower.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, _URGENT_NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, thread, before)


class Freezer:
    """A blocking QMP connection; for one thread at a time. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0
        self._pending = b""
        self._socket: socket.socket | None = None

    def __enter__(self) -> Freezer:
        self._socket = connect(self._path, _DEADLINE_S)
        try:
            self._read(time.monotonic() + _DEADLINE_S)
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> Any:
        """The answer to a command; `fd` goes with it.

        Raises ToolFailed when QEMU refuses it, TimedOut, Unavailable.
        """
        assert self._socket is not None
        self._number += 1
        call = {"execute": command, "arguments": dict(arguments or {}), "id": self._number}
        words = json.dumps(call).encode() + b"\n"
        until = time.monotonic() + _DEADLINE_S
        try:
            if fd is None:
                self._socket.sendall(words)
            else:
                socket.send_fds(self._socket, [words], [fd])
        except OSError as error:
            raise Unavailable(f"the monitor broke off {command}: {error}") from error
        while True:
            answer = self._read(until)
            if answer.get("id") != self._number:
                continue
            if "error" in answer:
                said = str(answer["error"])[:400]
                raise ToolFailed(f"QEMU refused {command}: {said}")
            return answer.get("return")

    def _read(self, until: float) -> dict[str, Any]:
        assert self._socket is not None
        while b"\n" not in self._pending:
            left = until - time.monotonic()
            if left <= 0:
                raise TimedOut("QEMU did not answer the freezer in time")
            if len(self._pending) > _MESSAGE_LIMIT:
                raise Unavailable("the monitor's answer is endless")
            self._socket.settimeout(left)
            try:
                piece = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise Unavailable(f"the monitor broke off: {error}") from error
            if not piece:
                raise Unavailable("the monitor broke off")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Unavailable("the monitor speaks no JSON") from error
        if not isinstance(message, dict):
            raise Unavailable("the monitor speaks no QMP")
        return message

    # What a freeze is made of.

    @contextlib.contextmanager
    def passed(self, fd: int) -> Iterator[str]:
        """A name by which QEMU opens `fd`, for as long as the context lasts."""
        added = self.execute("add-fd", fd=fd)
        number = int(added["fdset-id"])
        try:
            yield f"/dev/fdset/{number}"
        finally:
            # What QEMU has opened by then stays open.
            with contextlib.suppress(ToolFailed):
                self.execute("remove-fd", {"fdset-id": number, "fd": int(added["fd"])})

    @contextlib.contextmanager
    def stopped(self, *, cont: bool) -> Iterator[None]:
        """The VM stands still; at the end it goes on if `cont`, and in any case after an error."""
        self.execute("stop")
        try:
            yield
        except BaseException:
            self.execute("cont")
            raise
        if cont:
            self.execute("cont")

    @contextlib.contextmanager
    def state_file(self) -> Iterator[StateFile]:
        """Where `save_state` puts what it saves; made, as all that can be, before a VM is stopped.

        It is gone when the context ends.
        """
        memory = os.memfd_create("sandmartin-state", os.MFD_CLOEXEC)
        with os.fdopen(memory, "rb") as saved, contextlib.ExitStack() as stack:
            # QEMU takes a descriptor for writing alone.
            writable = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                name = stack.enter_context(self.passed(writable))
            finally:
                os.close(writable)
            yield StateFile(name, saved)

    def save_state(self, to: StateFile) -> None:
        """Save the device state of the VM, which stands still."""
        # Live, the default, would give up the disks after a stop.
        self.execute("xen-save-devices-state", {"filename": to.name, "live": False})

    def load_state(self, state: bytes) -> None:
        """Load a device state into a VM that waits for one; it then stands still.

        Raises ToolFailed when QEMU does not take it.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self.execute("getfd", {"fdname": "state"}, fd=theirs.fileno())
            self.execute("migrate-incoming", {"uri": "fd:state"})
            ours.settimeout(_LOAD_DEADLINE_S)
            try:
                ours.sendall(state)
            except OSError as error:
                raise ToolFailed(f"QEMU did not take the device state: {error}") from error
        until = time.monotonic() + _LOAD_DEADLINE_S
        while True:
            answer = self.execute("query-migrate")
            match answer.get("status") if isinstance(answer, dict) else None:
                case "completed":
                    return
                case "failed" | "cancelled":
                    raise ToolFailed(f"QEMU did not take the device state: {answer}"[:500])
            if time.monotonic() > until:
                raise TimedOut("QEMU did not load the device state in time")
            time.sleep(_POLL_S)
