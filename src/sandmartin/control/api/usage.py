"""`/v1/sandboxes/stats` and `/usage`: what a team holds, and what it and each sandbox used.

To be declared before the routes of single sandboxes, whose ids these names would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.usage import Load, Used

router = APIRouter(tags=["usage"])

_SHOWN_DAYS = 30
First = Annotated[date | None, Query(alias="from", description="YYYY-MM-DD, UTC.")]
Last = Annotated[date | None, Query(alias="to", description="The last day shown.")]


class LoadBody(BaseModel):
    running: int
    vcpus: int
    memory_mb: int


class LoadPoint(LoadBody):
    at: float = Field(description="Where the bucket begins; its figures are the highest in it.")


class QuotasBody(BaseModel):
    """What a team may hold at a time; the platform's defaults where nothing else was set."""

    max_sandboxes: int
    max_vcpus: int
    max_memory_mb: int


class StatsBody(BaseModel):
    """What a team holds now, at most in the range, and over it."""

    range: str
    current: LoadBody
    peaks: LoadBody
    quotas: QuotasBody
    series: list[LoadPoint]


class DayBody(BaseModel):
    day: date
    cpu_minutes: float
    ram_mb_minutes: float


class UsageBody(BaseModel):
    """What a team used by day (UTC); the present day until now."""

    items: list[DayBody]


@router.get("/stats")
async def stats(
    caller: TheCaller,
    platform: ThePlatform,
    range_: Annotated[Literal["5m", "1h", "6h", "24h", "30d"], Query(alias="range")] = "1h",
) -> StatsBody:
    found = await platform.usage.stats(caller.team_id, range_)
    team = (await platform.teams.get(caller, caller.team_id)).team
    return StatsBody(
        range=range_,
        current=_body(found.current),
        peaks=_body(found.peaks),
        quotas=QuotasBody(**asdict(platform.quotas.of(team))),
        series=[LoadPoint(at=at, **asdict(load)) for at, load in found.series],
    )


@router.get("/usage")
async def usage(
    caller: TheCaller,
    platform: ThePlatform,
    first: First = None,
    last: Last = None,
) -> UsageBody:
    """What was used on each day, the last thirty unless asked for others."""
    return _usage(await platform.usage.days(caller.team_id, *_days(first, last)))


@router.get("/{sandbox_id}/usage")
async def usage_of_one(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    first: First = None,
    last: Last = None,
) -> UsageBody:
    """What one sandbox used on each day, as far back as events are kept."""
    sandbox = await platform.sandboxes.get(caller, sandbox_id)
    return _usage(await platform.usage.days_of(sandbox, *_days(first, last)))


def _days(first: date | None, last: date | None) -> tuple[date, date]:
    """The days that are asked for, the last thirty where nothing is."""
    last = last or datetime.now(UTC).date()
    return first or date.fromordinal(max(1, last.toordinal() - _SHOWN_DAYS + 1)), last


def _usage(found: Sequence[Used]) -> UsageBody:
    return UsageBody(
        items=[
            DayBody(
                day=each.day,
                cpu_minutes=round(each.cpu_minutes, 3),
                ram_mb_minutes=round(each.memory_mb_minutes, 3),
            )
            for each in found
        ]
    )


def _body(load: Load) -> LoadBody:
    return LoadBody(**asdict(load))
