"""`/v1/events`: what happens, as it happens, by server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.caller import Caller
from sandmartin.control.events import Happening
from sandmartin.control.platform import Platform

router = APIRouter(tags=["events"])

#: Streams of one team at one replica.
_MAX_STREAMS = 100
_RETRY_MS = 1000


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def follow(
    caller: TheCaller,
    platform: ThePlatform,
    sandbox_id: Annotated[str, Query(max_length=64, description="Of one sandbox alone.")] = "",
    after: Annotated[
        int | None, Query(ge=0, le=1 << 62, description="Begin after this event; 0 is all.")
    ] = None,
    last_event_id: Annotated[str, Header(max_length=32)] = "",
) -> StreamingResponse:
    """The team's events as they happen, each with its id.

    Without `after` or `Last-Event-ID` they begin now. A client that reconnects sends the last id
    it saw, as browsers do by themselves, and misses nothing that is still kept.
    """
    if sandbox_id:
        await platform.sandboxes.get(caller, sandbox_id)
    if last_event_id.isdecimal():
        after = int(last_event_id)
    if after is None:
        after = await platform.events.last_id()
    # Past the greatest number of the database nothing can come.
    stream = _stream(platform, caller, min(after, 1 << 62), sandbox_id or None)
    # The first piece is made here, so that a refusal is an answer and no broken stream.
    first = await anext(stream)
    return StreamingResponse(
        _after(first, stream),
        media_type="text/event-stream",
        # Some proxies collect what they pass on unless they are told not to.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _after(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for piece in rest:
        yield piece


async def _stream(
    platform: Platform, caller: Caller, after: int, sandbox_id: str | None
) -> AsyncIterator[str]:
    listening = platform.events.listening(caller.team_id, _MAX_STREAMS)
    with listening, platform.trust.watching(caller) as lost:
        yield f"retry: {_RETRY_MS}\n\n"
        events = platform.events.follow(after, team_id=caller.team_id, sandbox_id=sandbox_id)
        async for happening in events:
            if lost.is_set():
                return
            yield _piece(happening) if happening is not None else ": nothing new\n\n"


def _piece(happening: Happening) -> str:
    data = {
        "id": happening.event_id,
        "kind": happening.kind,
        "sandbox_id": happening.sandbox_id,
        "at": happening.at,
        "data": happening.data,
    }
    return f"id: {happening.event_id}\nevent: {happening.kind}\ndata: {json.dumps(data)}\n\n"
