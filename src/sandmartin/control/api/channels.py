"""`/v1/channels`: where a team hears of events."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.notifications import NewChannel

router = APIRouter(tags=["channels"])

Strict = ConfigDict(extra="forbid")
_KINDS = "`webhook`, `slack`, `discord`, `teams`, `googlechat`, `telegram`, `matrix`, `apprise`."
_CONFIG = (
    "Of telegram `bot_token` and `chat_id`; of matrix `homeserver`, `access_token` and `room_id`;"
    " of all others `url`. It is never shown again."
)
_EVENTS = "Kinds of events: `*`, such as `sandbox.*`, or such as `sandbox.paused`."


class ChannelRequest(BaseModel):
    model_config = Strict

    name: str = Field(max_length=100)
    type: str = Field(max_length=20, description=_KINDS)
    config: dict[str, str] = Field(description=_CONFIG)
    events: list[str] = Field(default=["*"], max_length=50, description=_EVENTS)


class ChannelChange(BaseModel):
    model_config = Strict

    name: str | None = Field(None, max_length=100)
    events: list[str] | None = Field(None, max_length=50, description=_EVENTS)
    active: bool | None = None


class ConfigRequest(BaseModel):
    model_config = Strict

    config: dict[str, str] = Field(description=_CONFIG)


class ChannelBody(BaseModel):
    """A channel, without its config."""

    id: str
    name: str
    type: str
    events: list[str]
    active: bool
    created_at: float

    @classmethod
    def of(cls, row: tables.Channel) -> ChannelBody:
        return cls(
            id=row.channel_id,
            name=row.name,
            type=row.kind,
            events=row.events,
            active=row.active,
            created_at=row.created_at,
        )


class ConfiguredChannel(ChannelBody):
    secret: str = Field(description="Signs what goes to a webhook; shown this once.")

    @classmethod
    def made(cls, row: tables.Channel, secret: str) -> ConfiguredChannel:
        return cls(**ChannelBody.of(row).model_dump(), secret=secret)


class DeliveryBody(BaseModel):
    """An event on its way to a channel, or at its end."""

    id: str
    event_id: int
    event: str
    sandbox_id: str | None
    status: str = Field(description="`pending`, `delivered` or `failed`.")
    attempts: int
    next_at: float | None
    finished_at: float | None
    error: str = Field(description="Why the last attempt did not arrive.")

    @classmethod
    def of(cls, row: tables.Delivery, kind: str) -> DeliveryBody:
        over = row.finished_at is not None
        return cls(
            id=row.delivery_id,
            event_id=row.event_id,
            event=kind,
            sandbox_id=row.sandbox_id,
            status=("failed" if row.error else "delivered") if over else "pending",
            attempts=row.attempts,
            next_at=None if over else row.next_at,
            finished_at=row.finished_at,
            error=row.error,
        )


@router.post("/channels", status_code=201)
async def create(
    body: ChannelRequest, caller: TheCaller, platform: ThePlatform
) -> ConfiguredChannel:
    new = NewChannel(name=body.name, kind=body.type, config=body.config, events=body.events)
    return ConfiguredChannel.made(*await platform.notifications.create(caller, new))


@router.get("/channels")
async def list_channels(caller: TheCaller, platform: ThePlatform) -> list[ChannelBody]:
    return [ChannelBody.of(row) for row in await platform.notifications.list(caller)]


@router.get("/channels/{channel_id}")
async def get(channel_id: str, caller: TheCaller, platform: ThePlatform) -> ChannelBody:
    return ChannelBody.of(await platform.notifications.get(caller, channel_id))


@router.patch("/channels/{channel_id}")
async def change(
    channel_id: str, body: ChannelChange, caller: TheCaller, platform: ThePlatform
) -> ChannelBody:
    """Rename it, choose other events, switch it off or on."""
    row = await platform.notifications.change(
        caller, channel_id, name=body.name, wanted=body.events, active=body.active
    )
    return ChannelBody.of(row)


@router.put("/channels/{channel_id}/config")
async def configure(
    channel_id: str, body: ConfigRequest, caller: TheCaller, platform: ThePlatform
) -> ConfiguredChannel:
    """Another address and another secret; the old secret signs nothing any more."""
    made = await platform.notifications.configure(caller, channel_id, body.config)
    return ConfiguredChannel.made(*made)


@router.delete("/channels/{channel_id}", status_code=204)
async def delete(channel_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    await platform.notifications.delete(caller, channel_id)
    return Response(status_code=204)


@router.post("/channels/{channel_id}/test", status_code=204)
async def test(channel_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """Send a message of the kind `channel.test` now; an error says why it did not arrive."""
    await platform.notifications.test(caller, channel_id)
    return Response(status_code=204)


@router.get("/channels/{channel_id}/deliveries")
async def list_deliveries(
    channel_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[DeliveryBody]:
    """What was sent and what is to be, newest first."""
    found = await platform.notifications.deliveries(caller, channel_id, limit=limit)
    return [DeliveryBody.of(row, kind) for row, kind in found]
