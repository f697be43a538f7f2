"""The way inside a sandbox, and what a sandbox tells of itself: its use, its console."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import APIKeyHeader
from pydantic import BaseModel, Field

from sandmartin.control.api.access import TheCaller, ThePlatform, caller_of
from sandmartin.control.caller import Caller
from sandmartin.control.entrance import enter
from sandmartin.transport.agent import Agent

router = APIRouter(tags=["inside"])
#: Only tells the documentation what `caller_of` looks for.
_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)


@dataclass(frozen=True)
class Inside:
    """A running sandbox, and the agent of its host."""

    sandbox_id: str
    agent: Agent
    caller: Caller
    #: Of its template; see `defaults`.
    defaults: Mapping[str, Any]


async def _inside(
    sandbox_id: str,
    request: Request,
    platform: ThePlatform,
    _key: Annotated[str | None, Depends(_KEY)],
) -> Inside:
    asked: list[Caller] = []

    async def who() -> Caller:
        asked.append(await caller_of(request))
        return asked[0]

    agent, defaults = await enter(platform.db, platform.sandboxes, who, sandbox_id)
    return Inside(sandbox_id, agent, asked[0], defaults)


#: A sandbox of the caller's team that runs: NotFound or Conflict otherwise.
TheInside = Annotated[Inside, Depends(_inside)]

Range = Literal["5m", "10m", "1h", "2h", "6h", "12h", "24h"]
_MINUTE_S = 60
#: How long each range is, and the tier of points that covers it.
_RANGES: dict[str, tuple[int, str]] = {
    "5m": (5 * _MINUTE_S, "10m"),
    "10m": (10 * _MINUTE_S, "10m"),
    "1h": (60 * _MINUTE_S, "2h"),
    "2h": (120 * _MINUTE_S, "2h"),
    "6h": (360 * _MINUTE_S, "24h"),
    "12h": (720 * _MINUTE_S, "24h"),
    "24h": (1440 * _MINUTE_S, "24h"),
}


class PointBody(BaseModel):
    """What the sandbox used at a time, or on average in a window."""

    timestamp: int = Field(description="Seconds since the epoch.")
    cpu_pct: float = Field(description="100 is one busy processor.")
    mem_bytes: int
    disk_bytes: int


class MetricsBody(BaseModel):
    sandbox_id: str
    range: str
    points: list[PointBody] = Field(description="Oldest first.")


@router.post("/{sandbox_id}/ping", status_code=204)
async def ping(inside: TheInside) -> Response:
    """Reset the idle clock."""
    await inside.agent.ping(inside.sandbox_id)
    return Response(status_code=204)


@router.get("/{sandbox_id}/metrics")
async def metrics(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    range_: Annotated[Range, Query(alias="range")] = "10m",
) -> MetricsBody:
    """What a sandbox used; of one that is paused or over, until then."""
    length_s, tier = _RANGES[range_]
    since = time.time() - length_s
    _, points = await platform.sandboxes.points(caller, sandbox_id, tier, since)
    return MetricsBody(
        sandbox_id=sandbox_id,
        range=range_,
        points=[PointBody(**vars(each)) for each in points],
    )


@router.get("/{sandbox_id}/console", response_class=Response)
async def console(inside: TheInside) -> Response:
    """The newest that the guest's kernel said; what is read is forgotten."""
    content = await inside.agent.read_console(inside.sandbox_id)
    return Response(content, media_type="text/plain", headers={"x-content-type-options": "nosniff"})
