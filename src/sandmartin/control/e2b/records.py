"""What a sandbox tells of itself: its use, and what happened to it."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.bodies import moment_of
from sandmartin.control.e2b.steps import get_there
from sandmartin.control.events import Happening
from sandmartin.transport import MetricPoint

router = APIRouter()

_MIB = 1 << 20
#: How far back each tier of points goes, the finest first.
_TIERS = ((600, "10m"), (7200, "2h"), (86400, "24h"))
_MAX_LINES = 1000
Second = Annotated[int | None, Query(ge=0, lt=1 << 40)]


@router.get("/sandboxes/{sandbox_id}/metrics")
async def metrics(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    start: Second = None,
    end: Second = None,
) -> list[bodies.Metric]:
    """What it used, oldest first, in seconds since the epoch; since its start unless told."""
    there = await get_there(platform, caller, sandbox_id)
    since = float(start if start is not None else there.started_at or there.created_at)
    age_s = time.time() - since
    tier = next((name for length_s, name in _TIERS if age_s <= length_s), _TIERS[-1][1])
    row, points = await platform.sandboxes.points(caller, sandbox_id, tier, since)
    return [_metric(row, each) for each in points if end is None or each.timestamp <= end]


def _metric(row: tables.Sandbox, point: MetricPoint) -> bodies.Metric:
    return bodies.Metric(
        timestamp=moment_of(point.timestamp),
        timestamp_unix=int(point.timestamp),
        cpu_count=row.vcpus,
        cpu_used_pct=round(min(point.cpu_pct / row.vcpus, 100.0), 2),
        mem_used=point.mem_bytes,
        mem_total=row.memory_mb * _MIB,
        # Its host does not tell the guest's cache from what else it uses.
        mem_cache=0,
        disk_used=point.disk_bytes,
        disk_total=row.disk_size_mb * _MIB,
    )


@router.get("/sandboxes/{sandbox_id}/logs")
async def logs(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    start: Annotated[int, Query(ge=0, lt=1 << 50, description="Milliseconds.")] = 0,
    limit: Annotated[int, Query(ge=0, le=_MAX_LINES)] = _MAX_LINES,
) -> bodies.Logs:
    """What happened to it, oldest first."""
    await platform.sandboxes.get(caller, sandbox_id)
    found: list[Happening] = []
    last = 0
    while len(found) < limit:
        batch = await platform.events.since(last, sandbox_id=sandbox_id)
        if not batch:
            break
        last = batch[-1].event_id
        found += [each for each in batch if each.at * 1000 >= start]
    entries = [_entry(each) for each in found[:limit]]
    lines = [bodies.LogLine(timestamp=each.timestamp, line=each.message) for each in entries]
    return bodies.Logs(logs=lines, log_entries=entries)


def _entry(happening: Happening) -> bodies.LogEntry:
    data = happening.data
    why = data.get("error") or data.get("reason") or ""
    level: Literal["info", "error"] = "error" if "error" in {data.get("state"), *data} else "info"
    return bodies.LogEntry(
        timestamp=moment_of(happening.at),
        level=level,
        message=f"{happening.kind}: {why}" if why else happening.kind,
        fields={name: str(value) for name, value in data.items()},
    )
