"""One kernel: a process of its own that runs code in a language and keeps its state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import shutil
import tempfile
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from code_interpreter.languages import Language

_log = logging.getLogger(__name__)

Message = Mapping[str, Any]

_START_DEADLINE_S = 60.0
#: How often a kernel that says nothing is asked whether it lives.
_LOOK_S = 1.0
#: Between two interrupts: one that comes before the code has begun is lost.
_INTERRUPT_PAUSE_S = 0.5
_INTERRUPTS = 20
#: The kernel goes before the server when memory runs out.
_OOM_SCORE = "300"


class KernelDied(Exception):
    """The kernel ended while it ran something."""


class Kernel:
    """The kernel of one context. Only one execution at a time may be asked of it."""

    def __init__(self, language: Language, cwd: str) -> None:
        self.language = language
        self._cwd = cwd
        self._directory = ""
        self._manager: AsyncKernelManager | None = None
        self._client: AsyncKernelClient | None = None
        self._interrupting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start its process and wait until it answers. Raises KernelDied."""
        self._directory = tempfile.mkdtemp(prefix="kernel-")
        self._manager = manager = AsyncKernelManager(
            transport=self.language.transport,
            connection_file=f"{self._directory}/connection.json",
        )
        if self.language.transport == "ipc":
            manager.ip = f"{self._directory}/socket"
        manager._kernel_spec = KernelSpec(
            argv=list(self.language.argv),
            display_name=self.language.name,
            language=self.language.name,
            interrupt_mode=self.language.interrupts_by,
        )
        try:
            await manager.start_kernel(cwd=self._cwd, env=_environment())
            self._spare_server()
            self._client = client = manager.client()
            client.start_channels(stdin=False, hb=False)
            await client.wait_for_ready(timeout=_START_DEADLINE_S)
        except BaseException as error:
            # Who asked may have hung up meanwhile.
            await asyncio.shield(self.stop())
            if not isinstance(error, RuntimeError | OSError):
                raise
            raise KernelDied(f"the {self.language.name} kernel did not start: {error}") from error

    def _spare_server(self) -> None:
        pid = getattr(self._manager and self._manager.provisioner, "pid", None)
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text(_OOM_SCORE)

    async def kill(self) -> None:
        """End its process, whatever it does; who listens to it hears that it died."""
        if self._manager is not None:
            await self._manager.shutdown_kernel(now=True)

    async def stop(self) -> None:
        """End it, once nobody listens to it any more. Idempotent."""
        if self._interrupting is not None:
            self._interrupting.cancel()
        await self.kill()
        self._manager = None
        if self._client is not None:
            client, self._client = self._client, None
            client.stop_channels()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def alive(self) -> bool:
        return self._manager is not None and await self._manager.is_alive()

    def send(self, code: str, *, silent: bool = False) -> str:
        """Have code run once all that was sent before is through; its id. Raises KernelDied."""
        sent: str = self._reach().execute(
            code,
            silent=silent,
            store_history=not silent,
            allow_stdin=False,
            # Or what takes a change back would be dropped when the code is interrupted.
            stop_on_error=False,
        )
        return sent

    async def listen(self, sent: str) -> AsyncGenerator[Message, None]:
        """What it says of what was sent, until it is through with it. Raises KernelDied.

        Who stops to listen before has it interrupted.
        """
        finished = False
        try:
            # Answers to what was sent before are of no use any more.
            await self._answered("")
            last = sent
            while not finished:
                message = await self._next()
                if message is None:
                    # What is said may get lost where there is very much of it; the answer does not.
                    finished = await self._answered(last)
                elif _is_end(message, last):
                    finished = last != sent or not self.language.hasty
                    # By the end of something else it has said all of this.
                    last = last if finished else self.send("", silent=True)
                elif message["parent_header"].get("msg_id") == sent:
                    yield message
        except KernelDied:
            finished = True
            raise
        finally:
            if not finished:
                self._interrupting = asyncio.create_task(self._interrupt(sent), name="interrupt")

    async def _next(self) -> Message | None:
        """The next that it says; None when it is silent for a while. Raises KernelDied."""
        with contextlib.suppress(queue.Empty):
            message: Message = await self._reach().get_iopub_msg(timeout=_LOOK_S)
            return message
        if not await self.alive():
            raise KernelDied(f"the {self.language.name} kernel ended")
        return None

    async def _answered(self, sent: str) -> bool:
        """Whether it has answered for good; reads all answers that are there."""
        found = False
        with contextlib.suppress(queue.Empty):
            while True:
                reply = await self._reach().get_shell_msg(timeout=0)
                found = found or reply["parent_header"].get("msg_id") == sent
        return found

    def _reach(self) -> AsyncKernelClient:
        if self._client is None:
            raise KernelDied(f"the {self.language.name} kernel was ended")
        return self._client

    async def _interrupt(self, sent: str) -> None:
        """Interrupt what was sent, again and again until it is through."""
        with contextlib.suppress(RuntimeError, OSError, KernelDied):
            for _ in range(_INTERRUPTS):
                assert self._manager is not None
                await self._manager.interrupt_kernel()
                if await self._ends(sent, _INTERRUPT_PAUSE_S):
                    return
        _log.warning("the %s kernel does not heed an interrupt", self.language.name)

    async def _ends(self, sent: str, deadline_s: float) -> bool:
        """Whether it is through with what was sent in time."""
        clock = asyncio.get_running_loop().time
        until = clock() + deadline_s
        with contextlib.suppress(queue.Empty):
            while (left := until - clock()) > 0:
                if _is_end(await self._reach().get_iopub_msg(timeout=left), sent):
                    return True
        return False

    async def settle(self) -> None:
        """Wait until nothing is interrupted any more."""
        if self._interrupting is not None:
            await asyncio.wait({self._interrupting})
            self._interrupting = None


def _is_end(message: Message, sent: str) -> bool:
    if message["parent_header"].get("msg_id") != sent or message["msg_type"] != "status":
        return False
    return bool(message["content"]["execution_state"] == "idle")


def _environment() -> dict[str, str]:
    """Of kernels: as a login's, and no colours where a program reads."""
    return os.environ | {"NO_COLOR": "1", "DENO_NO_UPDATE_CHECK": "1"}
