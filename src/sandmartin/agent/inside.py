"""What is done inside a sandbox, over its guest agent: commands, terminals, files.

None of it takes the lock of the sandbox's life cycle, and all of it is activity.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from sandmartin.agent import disk
from sandmartin.agent.guest import Command, FileInfo, Guest, ProcessEvent, Running, Terminal
from sandmartin.agent.journal import Entry
from sandmartin.agent.machine import Machine
from sandmartin.agent.recorded import Recorded
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import Conflict, GuestSilent, SandmartinError
from sandmartin.model import State
from sandmartin.relay.line import Line

#: How exactly it is known when something last passed.
_ACTIVITY_S = 0.25


class Inside(Recorded):
    """The part of a sandbox that works inside it."""

    def __init__(self, machine: Machine, entry: Entry) -> None:
        super().__init__(machine, entry)
        #: There while it runs and knows who it is.
        self._guest: Guest | None = None

    def _require_guest(self) -> Guest:
        if self.state is not State.RUNNING or self._guest is None:
            raise self._unusable()
        if self._disk_full:
            raise disk.host_disk_full(self.sandbox_id)
        self.touch()
        return self._guest

    def _require_running(self) -> None:
        if self.state is not State.RUNNING or self._guest is None:
            raise self._unusable()

    def _unusable(self) -> Conflict:
        if self.state is State.RUNNING:
            return Conflict(f"sandbox {self.sandbox_id} is not quite awake", hint="try again")
        hint = "destroy it; it cannot be used any more" if self.state is State.ERROR else ""
        why = f": {self.reason}" if self.reason else ""
        return Conflict(f"sandbox {self.sandbox_id} is {self.state}{why}", hint=hint)

    @contextlib.asynccontextmanager
    async def _talking(self) -> AsyncIterator[Guest]:
        """The guest agent for one exchange; if it falls silent, find out whether it is dead."""
        guest = self._require_guest()
        try:
            yield guest
        except GuestSilent as error:
            raise await self._explain_silence(guest, error) from error
        finally:
            self.touch()

    async def _explain_silence(self, guest: Guest, error: SandmartinError) -> SandmartinError:
        if self.state is not State.RUNNING or self._microvm.vm is None:
            return self._unusable()
        with contextlib.suppress(SandmartinError):
            match await self._microvm.vm.status():
                case VmStatus.DISK_FULL:
                    self._disk_full = True
                    return disk.host_disk_full(self.sandbox_id)
                case VmStatus.GONE:
                    self._note_end()
                    return self._unusable()
        if await self._answers(guest):
            return error
        if self.state is not State.RUNNING:
            return self._unusable()
        self._fail("its guest agent does not answer")
        return GuestSilent(
            f"the guest agent of sandbox {self.sandbox_id} does not answer",
            hint="destroy the sandbox; it cannot be used any more",
        )

    async def _answers(self, guest: Guest) -> bool:
        """Whether a guest agent that was silent once answers yet."""
        patience = self._machine.patience
        for attempt in range(patience.health_tries):
            if attempt:
                await asyncio.sleep(patience.health_pause_s)
            if await guest.healthy(patience.health_deadline_s):
                return True
        return False

    async def read_console(self) -> bytes:
        """The newest that the guest's console said; what is read is forgotten."""
        if self._microvm.vm is None:
            raise self._unusable()
        return await self._microvm.vm.read_console()

    def _note_end(self) -> None:
        if self._guest is not None:
            # Nobody is left who could end them from the other side.
            self._guest.hang_up()
        if self.state is State.RUNNING:
            self._fail("its VM ended by itself")

    # Ports.

    async def dial(self, port: int) -> tuple[Line, str]:
        """A connection to a port inside, and the guest agent's token.

        Raises Conflict, NotFound when nothing listens there, Exhausted, GuestSilent.
        """
        async with self._talking() as guest:
            return await guest.dial(port), guest.token

    def flows(self) -> None:
        """Something passes: activity, of which there may be much in a moment."""
        if self.idle_s > _ACTIVITY_S:
            self.touch()

    # Commands and files.

    async def _active(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Each chunk that passes is activity."""
        async for chunk in chunks:
            self.touch()
            yield chunk

    async def exec(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        """Run a command; events until its end. Who stops listening does not end the command."""
        async with self._talking() as guest, contextlib.aclosing(guest.start(command)) as events:
            async for event in events:
                self.touch()
                yield event

    async def attach(self, pid: int) -> AsyncGenerator[ProcessEvent, None]:
        """Listen to a command that runs; what nobody heard yet comes first."""
        async with self._talking() as guest, contextlib.aclosing(guest.attach(pid)) as events:
            async for event in events:
                self.touch()
                yield event

    async def send_input(self, pid: int, chunks: AsyncIterator[bytes]) -> None:
        """Feed a command's standard input, then close it."""
        async with self._talking() as guest:
            async for chunk in chunks:
                self.touch()
                await guest.send_input(pid, chunk)
            await guest.close_input(pid)

    async def signal(self, pid: int, number: int) -> None:
        async with self._talking() as guest:
            await guest.signal(pid, number)

    async def write_file(self, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        async with self._talking() as guest:
            await guest.upload(path, user, self._active(chunks))

    async def read_file(self, path: str, user: str) -> AsyncGenerator[bytes, None]:
        async with (
            self._talking() as guest,
            contextlib.aclosing(guest.download(path, user)) as chunks,
        ):
            async for chunk in chunks:
                self.touch()
                yield chunk

    async def write_tree(self, directory: str, owner: str, chunks: AsyncIterator[bytes]) -> int:
        """Unpack a tar below a directory, with root's rights; how many members it had."""
        async with self._talking() as guest:
            return await guest.write_tree(directory, owner, self._active(chunks))

    async def read_tree(self, path: str) -> AsyncGenerator[bytes, None]:
        """A file, a link or a directory as a tar."""
        async with self._talking() as guest, contextlib.aclosing(guest.read_tree(path)) as chunks:
            async for chunk in chunks:
                self.touch()
                yield chunk

    async def resize(self, pid: int, size: Terminal) -> None:
        async with self._talking() as guest:
            await guest.resize(pid, size)

    async def processes(self) -> list[Running]:
        """What was started by a call and runs."""
        async with self._talking() as guest:
            return await guest.processes()

    async def stat(self, path: str, user: str) -> FileInfo:
        async with self._talking() as guest:
            return await guest.stat(path, user)

    async def list_files(self, path: str, user: str, depth: int) -> list[FileInfo]:
        async with self._talking() as guest:
            return await guest.list_files(path, user, depth)

    async def make_directory(self, path: str, user: str) -> None:
        async with self._talking() as guest:
            await guest.make_directory(path, user)

    async def move_file(self, source: str, destination: str, user: str) -> None:
        async with self._talking() as guest:
            await guest.move_file(source, destination, user)

    async def remove_file(self, path: str, user: str) -> None:
        async with self._talking() as guest:
            await guest.remove_file(path, user)
