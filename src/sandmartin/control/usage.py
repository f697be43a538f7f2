"""Usage: the metric points of sandboxes that are not there to be asked any more.

A host keeps the newest points in memory; they are fetched before a sandbox leaves it, and kept
packed, a block for each tier and time.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Sequence

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.db import Database
from sandmartin.errors import SandmartinError
from sandmartin.transport import MetricPoint
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)
#: Time in seconds, CPU in percent, memory and disk in bytes.
_POINT = struct.Struct("<ddqq")


class Usage:
    """What sandboxes used, as the database has it."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def flush(self, agent: Agent, row: tables.Sandbox) -> None:
        """Keep what a host knows of a sandbox that is about to leave it; never in its way."""
        try:
            tiers = await agent.flush_metrics(row.sandbox_id)
        except SandmartinError as error:
            _log.info("metrics of sandbox %s are lost: %s", row.sandbox_id, error)
            return
        async with self._db.write() as session:
            for tier, points in tiers.items():
                if points:
                    session.add(
                        tables.MetricBlock(
                            sandbox_id=row.sandbox_id,
                            tier=tier,
                            begins_at=points[0].timestamp,
                            ends_at=points[-1].timestamp,
                            points=pack(points),
                        )
                    )

    async def points(self, sandbox_id: str, tier: str, since: float) -> list[MetricPoint]:
        """Points that were kept, oldest first."""
        block = tables.MetricBlock
        query = select(block).where(
            block.sandbox_id == sandbox_id, block.tier == tier, block.ends_at >= since
        )
        async with self._db.read() as session:
            blocks = (await session.scalars(query.order_by(block.begins_at))).all()
        points = [point for each in blocks for point in unpack(each.points)]
        return [point for point in points if point.timestamp >= since]


def pack(points: Sequence[MetricPoint]) -> bytes:
    return b"".join(
        _POINT.pack(each.timestamp, each.cpu_pct, each.mem_bytes, each.disk_bytes)
        for each in points
    )


def unpack(packed: bytes) -> Iterable[MetricPoint]:
    for timestamp, cpu_pct, mem_bytes, disk_bytes in _POINT.iter_unpack(packed):
        yield MetricPoint(
            timestamp=int(timestamp), cpu_pct=cpu_pct, mem_bytes=mem_bytes, disk_bytes=disk_bytes
        )
