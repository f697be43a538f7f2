"""Garbage of the artefact store: what no row refers to is marked, and swept when it is old enough.

Templates' rows refer to artefacts, and the manifests of these to chunks. A row stays while a
sandbox needs its template, and so while one is fetched. All is read and removed while nobody
pushes (`artefacts`), for a push relies on chunks that it finds. What is younger than the grace
time stays in any case: what a push that failed has stored is of use to the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select, update

from sandmartin.artefacts import chunks, manifest
from sandmartin.artefacts.store import Store
from sandmartin.control import tables
from sandmartin.control.artefacts import begin_sweep, sweeping
from sandmartin.control.db import Database
from sandmartin.errors import Invalid, SandmartinError, Unavailable

_log = logging.getLogger(__name__)

#: Removed at a time: far less long than the lease, whatever the store.
_BATCH = 500
_BATCH_S = 20.0
_LEASE_S = 60.0
#: How soon it is tried again where somebody pushes; others hold back for longer.
_BUSY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep has found and removed."""

    objects: int = 0
    removed: int = 0
    removed_bytes: int = 0


class Garbage:
    """Sweeps the store, for as long as this replica is the one that does."""

    def __init__(
        self,
        db: Database,
        store: Store | None,
        owner: str,
        *,
        grace_s: float,
        period_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._db = db
        self._store = store
        self._owner = owner
        self._grace_s = grace_s
        self._period_s = period_s
        self._clock = clock

    async def run(self) -> None:
        """Sweep now and then, for ever."""
        while self._store is not None:
            wait_s = self._period_s
            try:
                swept = await self.sweep()
                if swept is None:
                    wait_s = min(_BUSY_S, self._period_s)
                else:
                    _log.info("artefact store: %s", swept)
            except SandmartinError as error:
                _log.warning("the artefact store is swept later: %s", error)
            await asyncio.sleep(wait_s)

    async def sweep(self) -> Swept | None:
        """Remove what nothing refers to; None where somebody pushes just now.

        Raises Unavailable, Denied.
        """
        if self._store is None:
            return Swept()
        async with sweeping(self._db, self._owner, _LEASE_S) as mine:
            return await self._sweep(self._store) if mine else None

    async def _sweep(self, store: Store) -> Swept:
        manifests, needed = await self._mark(store)
        old = self._clock() - self._grace_s
        doomed: list[str] = []
        objects = removed = removed_bytes = 0
        for prefix, names in ((manifest.PREFIX, manifests), (chunks.PREFIX, needed)):
            async for each in store.list(prefix):
                objects += 1
                if each.name.rpartition("/")[2] in names or each.modified_at > old:
                    continue
                doomed.append(each.name)
                removed, removed_bytes = removed + 1, removed_bytes + each.size_bytes
                if len(doomed) == _BATCH:
                    await self._remove(store, doomed)
                    doomed = []
                elif objects % 1000 == 0:
                    await self._hold()
            # An artefact goes before its chunks do.
            await self._remove(store, doomed)
            doomed = []
        return Swept(objects=objects, removed=removed, removed_bytes=removed_bytes)

    async def _mark(self, store: Store) -> tuple[set[str], set[str]]:
        """The artefacts that rows refer to, and their chunks. Raises Unavailable, Denied."""
        row = tables.Artefact
        async with self._db.read() as session:
            query = select(row.artefact_id).where(row.artefact_id.is_not(None)).distinct()
            named = {each for each in await session.scalars(query) if each is not None}
        needed: set[str] = set()
        for artefact_id in named:
            await self._hold()
            try:
                needed.update((await manifest.read(store, artefact_id)).digests())
            except Invalid as error:
                # Nobody can fetch it; whoever has the template stores it anew.
                _log.error("%s; it is stored anew", error)
                async with self._db.write() as session:
                    await session.execute(
                        update(row)
                        .where(row.artefact_id == artefact_id)
                        .values(artefact_id=None, next_at=0.0, error=error.message)
                    )
        return named, needed

    async def _remove(self, store: Store, names: list[str]) -> None:
        if not names:
            return
        await self._hold()
        try:
            async with asyncio.timeout(_BATCH_S):
                await store.delete(names)
        except TimeoutError as error:
            raise Unavailable("the artefact store takes too long to remove objects") from error

    async def _hold(self) -> None:
        """Go on only as whoever alone may. Raises Unavailable."""
        async with self._db.write() as session:
            if not await begin_sweep(session, self._owner, _LEASE_S):
                raise Unavailable("the lease for sweeping was lost")
