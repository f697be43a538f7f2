"""What a sandbox is held to while it lives: how long it may idle, and what it may reach.

Changed under the lock of its life cycle, and written down before it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from sandmartin.agent.inside import Inside
from sandmartin.agent.journal import Entry
from sandmartin.agent.machine import Machine
from sandmartin.model import NetworkPolicy, State
from sandmartin.phases import Clock


class Terms(Inside):
    """The part of a sandbox that has terms, and the lock that orders its life cycle."""

    def __init__(self, machine: Machine, entry: Entry) -> None:
        super().__init__(machine, entry)
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def _measured(self) -> AsyncIterator[None]:
        """An operation's turn in the life cycle, whose phases are told once it is over."""
        clock = Clock()
        async with self._lock:
            clock.mark("turn")
            self.clock = clock
            try:
                yield
            finally:
                self.phases = clock.phases

    async def set_timeout(self, timeout_s: int) -> None:
        """Have another idle limit; 0 is none. Raises Conflict, DiskFull."""
        async with self._lock:
            self._require_settled()
            self.touch()
            with self._all_or_nothing():
                self._record(sync=True, spec=replace(self._entry.spec, timeout_s=timeout_s))

    async def update_network(self, policy: NetworkPolicy) -> None:
        """Reach what another policy allows: at once, or from when it is woken.

        Raises Conflict, DiskFull, ToolFailed; it then reaches what it reached before.
        """
        async with self._lock:
            self._require_settled()
            before = self._entry.spec
            with self._all_or_nothing():
                self._record(sync=True, spec=replace(before, network=policy))
            self._machine.step("network:recorded")
            try:
                await self._microvm.restrict(policy)
            except BaseException:
                with self._disk_may_be_full():
                    self._record(sync=True, spec=replace(self._entry.spec, network=before.network))
                raise
            self._machine.step("network:changed")

    def _require_settled(self) -> None:
        if self.state not in {State.RUNNING, State.PAUSED}:
            raise self._unusable()
