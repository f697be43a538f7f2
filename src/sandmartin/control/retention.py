"""Retention: what is forgotten after its time. The audit log and sandboxes' rows are kept.

An event that says in which state a sandbox is that is not over is kept while none follows it:
usage is reckoned from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import aliased

from sandmartin.control.db import Database
from sandmartin.control.tables import (
    Delivery,
    Event,
    MetricBlock,
    Operation,
    Sandbox,
    TeamSample,
)
from sandmartin.errors import SandmartinError
from sandmartin.model import State

_log = logging.getLogger(__name__)

_DAY_S = 86400.0
_PERIOD_S = 3600.0
#: Rows that one transaction removes: nobody waits long for it.
_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Keep:
    """For how many days."""

    samples: float = 60.0
    metrics: float = 30.0
    events: float = 90.0
    operations: float = 7.0
    deliveries: float = 7.0


class Retention:
    """Forgets, for as long as this replica is the one that does."""

    def __init__(self, db: Database, keep: Keep = Keep()) -> None:
        self._db = db
        self._keep = keep

    async def run(self) -> None:
        while True:
            try:
                await self.prune(time.time())
            except SandmartinError as error:
                _log.warning("what is too old is not forgotten: %s", error)
            await asyncio.sleep(_PERIOD_S)

    async def prune(self, now: float) -> int:
        """Forget what is too old; how many rows that were."""
        keep = self._keep
        old: list[tuple[Any, Callable[[float], ColumnElement[bool]], float]] = [
            (TeamSample.at, lambda before: TeamSample.at < before, keep.samples),
            (MetricBlock.block_id, lambda before: MetricBlock.ends_at < before, keep.metrics),
            (Event.event_id, _event_is_old, keep.events),
            (
                Operation.operation_id,
                lambda before: Operation.finished_at < before,
                keep.operations,
            ),
            (Delivery.delivery_id, lambda before: Delivery.finished_at < before, keep.deliveries),
        ]
        return sum(
            [await self._forget(key, is_old(now - days * _DAY_S)) for key, is_old, days in old]
        )

    async def _forget(self, key: Any, old: ColumnElement[bool]) -> int:
        count = 0
        while True:
            async with self._db.write() as session:
                some = select(key).where(old).limit(_BATCH)
                done = await session.execute(
                    delete(key.class_).where(key.in_(some)),
                    execution_options={"synchronize_session": False},
                )
            removed: int = done.rowcount  # type: ignore[attr-defined]
            count += removed
            if removed < _BATCH:
                return count


def _event_is_old(before: float) -> ColumnElement[bool]:
    newer = aliased(Event)
    followed = (
        select(newer.event_id)
        .where(
            newer.sandbox_id == Event.sandbox_id,
            newer.event_id > Event.event_id,
            newer.at < before,
            newer.data["state"].as_string().is_not(None),
        )
        .exists()
    )
    goes_on = (
        select(Sandbox.sandbox_id)
        .where(Sandbox.sandbox_id == Event.sandbox_id, Sandbox.state != State.STOPPED)
        .exists()
    )
    return (Event.at < before) & (~goes_on | followed)
