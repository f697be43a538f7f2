"""The snapshots that a sandbox keeps: what it sleeps in while it is paused, and its checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

from sandmartin.agent import disk, files
from sandmartin.agent.snapshots import Snapshot
from sandmartin.agent.terms import Terms
from sandmartin.errors import Conflict, Invalid, NotFound
from sandmartin.model import State


class Kept(Terms):
    """The part of a sandbox that finds its snapshots."""

    def kept_snapshots(self) -> list[Snapshot]:
        """What it sleeps in while it is paused, and its checkpoints, oldest first."""
        return [*self._snapshots(self._paths.path), *self.checkpoints()]

    def _snapshots(self, directory: Path) -> list[Snapshot]:
        return self._machine.storage.snapshots.list(directory)

    def checkpoints(self) -> list[Snapshot]:
        """Its checkpoints, oldest first."""
        found = self._snapshots(self._paths.checkpoints)
        return sorted(found, key=lambda each: each.manifest.created_at)

    def get_checkpoint(self, checkpoint_id: str) -> Snapshot:
        """Raises NotFound."""
        for checkpoint in self.checkpoints():
            if checkpoint.path.name == checkpoint_id:
                return checkpoint
        raise NotFound(
            f"sandbox {self.sandbox_id} has no checkpoint {checkpoint_id[:80]!r}",
            hint="ListCheckpoints shows those that it has",
        )

    def asleep_in(self) -> Snapshot | None:
        """The snapshot of its pause, if it sleeps in that."""
        if self.state is not State.PAUSED or self._entry.sleeps_in != self._paths.paused.name:
            return None
        with contextlib.suppress(NotFound, Invalid):
            return self._machine.storage.snapshots.read(self._paths.paused)
        return None

    def asleep(self) -> tuple[Snapshot, Path | None]:
        """What it sleeps in, and its own layer over those that this names.

        That is all of it; where it is not, raises Conflict.
        """
        snapshot = self.asleep_in()
        if snapshot is None:
            raise Conflict(
                f"sandbox {self.sandbox_id} is {self.state} and sleeps in nothing that could be"
                " taken elsewhere"
            )
        if self.checkpoints():
            raise Conflict(
                f"sandbox {self.sandbox_id} has checkpoints, which stay where they are",
                hint="delete them, or leave it on its host",
            )
        top = self._entry.top
        return snapshot, self._paths.layer(top) if top else None

    async def sleep_as(self, origin: Snapshot) -> None:
        """Sleep as another host's sandbox did, of which `origin` was brought; for a new one.

        What fails is to be removed. Raises Invalid, DiskFull.
        """
        async with self._lock:
            manifest, snapshots = origin.manifest, self._machine.storage.snapshots
            async with snapshots.draft(self._paths.paused) as draft:
                with files.space_errors(draft.path):
                    if manifest.diff is not None:
                        await disk.link_or_copy(origin.diff, draft.diff)
                    state = await asyncio.to_thread(origin.read_state)
                    await snapshots.finish(draft, self._paths.paused, manifest, state)
            self._machine.step("adopt:written")
            # Until here it is nobody's, and removed by the next agent.
            self._entry = replace(self._entry, state=State.PAUSED)
            self._record(
                sync=True,
                image=manifest.image,
                layers=manifest.layers,
                token=manifest.token,
                envs=manifest.envs,
                sleeps_in=self._paths.paused.name,
                moved=True,
            )
            self._machine.step("adopt:paused")
