"""Notifications: events on their way to webhooks and chat services.

Each channel remembers up to which event it has looked; what it wants becomes a delivery, in the
transaction that moves that mark, so none is missed and none made twice. A delivery is leased while
it is sent: replicas share the work, and what a killed one was sending is sent again, with the same
delivery id (at least once). Those of one sandbox and channel go one after the other: a later one
waits until the earlier one arrived or was given up.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from sandmartin.control import audit, chat
from sandmartin.control.caller import ActorKind, Caller, Role
from sandmartin.control.db import Database
from sandmartin.control.events import Events, Happening
from sandmartin.control.guarded import Outgoing
from sandmartin.control.seal import Sealer
from sandmartin.control.tables import Channel, Delivery, Event
from sandmartin.errors import Conflict, Invalid, NotFound, SandmartinError, Unavailable
from sandmartin.model import random_id

_log = logging.getLogger(__name__)

WEBHOOK = "webhook"
KINDS = frozenset({WEBHOOK, *chat.KINDS})
_WANTED = re.compile(r"\*|[a-z_]{1,40}\.(\*|[a-z_]{1,40})")
_MAX_WANTED = 50
_MAX_CHANNELS = 50
_MAX_NAME = 100
_BATCH = 200
_OFF = "the channel was switched off"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When what did not arrive is sent again, and how long one replica may take to send it."""

    waits_s: Sequence[float] = (10.0, 30.0, 120.0, 600.0, 3600.0)
    #: Longer than any attempt.
    lease_s: float = 60.0
    #: Deliveries that one replica sends at a time, and of those to one channel: a receiver that
    #: does not answer must not hold up the others.
    at_once: int = 16
    at_once_to_channel: int = 2
    #: How often is looked for deliveries whose time has come.
    poll_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NewChannel:
    """A channel that somebody asks for. Raises Invalid."""

    name: str
    kind: str
    config: Mapping[str, str] = field(repr=False)
    events: Sequence[str] = ("*",)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_wanted(self.events)
        if self.kind not in KINDS:
            raise Invalid(
                f"no channel of the kind {self.kind[:20]!r} can be made",
                hint=f"use one of {', '.join(sorted(KINDS))}",
            )


@dataclass(frozen=True, kw_only=True)
class _Leased:
    """A delivery that this replica sends, and what it needs to."""

    delivery_id: str
    channel_id: str
    token: str
    attempts: int
    kind: str
    sealed_config: bytes = field(repr=False)
    happening: Happening | None


def check_name(name: str) -> None:
    """Raises Invalid."""
    if not 0 < len(name) <= _MAX_NAME:
        raise Invalid("the channel's name is empty or too long", hint="use 1 to 100 characters")


def check_wanted(wanted: Sequence[str]) -> None:
    """Raises Invalid for what are no kinds of events."""
    if not 0 < len(wanted) <= _MAX_WANTED:
        raise Invalid("a channel wants some events", hint="use * for all")
    for each in wanted:
        if not _WANTED.fullmatch(each):
            raise Invalid(
                f"{each[:40]!r} is no kind of event",
                hint="use *, such as sandbox.*, or such as sandbox.paused",
            )


def wants(wanted: Sequence[str], kind: str) -> bool:
    return any(each in ("*", kind, f"{kind.partition('.')[0]}.*") for each in wanted)


class Notifications:
    """The channels of all teams, and what is sent to them."""

    def __init__(
        self,
        db: Database,
        sealer: Sealer,
        happenings: Events,
        outgoing: Outgoing,
        patience: Patience = Patience(),
    ) -> None:
        self._db = db
        self._sealer = sealer
        self._events = happenings
        self._outgoing = outgoing
        self._patience = patience
        #: What is being sent, and to which channel.
        self._sending: dict[asyncio.Task[None], str] = {}

    # Channels.

    async def list(self, caller: Caller) -> Sequence[Channel]:
        """The team's channels, oldest first."""
        query = select(Channel).where(Channel.team_id == caller.team_id)
        async with self._db.read() as session:
            return (await session.scalars(query.order_by(Channel.created_at))).all()

    async def get(self, caller: Caller, channel_id: str) -> Channel:
        """Raises NotFound."""
        async with self._db.read() as session:
            return await _find(session, caller, channel_id)

    async def create(self, caller: Caller, new: NewChannel) -> tuple[Channel, str]:
        """A channel, and the secret that signs what goes to a webhook, which is shown once.

        Raises Invalid, Denied, Conflict.
        """
        _require_admin(caller)
        config, secret = self._config(new.kind, new.config)
        async with self._db.write() as session:
            mine = select(func.count()).where(Channel.team_id == caller.team_id)
            if (await session.scalar(mine) or 0) >= _MAX_CHANNELS:
                raise Conflict(f"the team has {_MAX_CHANNELS} channels", hint="delete one first")
            row = Channel(
                channel_id=str(uuid4()),
                team_id=caller.team_id,
                name=new.name,
                kind=new.kind,
                sealed_config=self._sealer.seal(config),
                events=list(new.events),
                active=True,
                created_at=time.time(),
                seen_event_id=await _last_event_id(session),
            )
            session.add(row)
            audit.record(
                session, caller, "channel.created", "channel", row.channel_id, name=new.name
            )
        return row, secret

    async def change(
        self,
        caller: Caller,
        channel_id: str,
        *,
        name: str | None = None,
        wanted: Sequence[str] | None = None,
        active: bool | None = None,
    ) -> Channel:
        """Change what is not None. Raises NotFound, Invalid, Denied.

        What happens while a channel is off, and what was on its way to it, is never sent.
        """
        _require_admin(caller)
        async with self._db.write() as session:
            row = await _find(session, caller, channel_id)
            if name is not None:
                check_name(name)
                row.name = name
            if wanted is not None:
                check_wanted(wanted)
                row.events = list(wanted)
            if active is not None and active != row.active:
                row.active, row.seen_event_id = active, await _last_event_id(session)
                if not active:
                    await _give_up_all(session, channel_id)
            audit.record(session, caller, "channel.changed", "channel", channel_id, name=row.name)
        return row

    async def configure(
        self, caller: Caller, channel_id: str, config: Mapping[str, str]
    ) -> tuple[Channel, str]:
        """Another address, and another secret. Raises NotFound, Invalid, Denied."""
        _require_admin(caller)
        async with self._db.write() as session:
            row = await _find(session, caller, channel_id)
            made, secret = self._config(row.kind, config)
            row.sealed_config = self._sealer.seal(made)
            audit.record(
                session, caller, "channel.configured", "channel", channel_id, name=row.name
            )
        return row, secret

    async def delete(self, caller: Caller, channel_id: str) -> None:
        """Raises NotFound, Denied."""
        _require_admin(caller)
        async with self._db.write() as session:
            row = await _find(session, caller, channel_id)
            await session.execute(delete(Channel).where(Channel.channel_id == row.channel_id))
            audit.record(session, caller, "channel.deleted", "channel", channel_id, name=row.name)

    async def test(self, caller: Caller, channel_id: str) -> None:
        """Send something now. Raises NotFound, Denied, and Unavailable when it does not arrive."""
        _require_admin(caller)
        row = await self.get(caller, channel_id)
        happening = Happening(
            event_id=0,
            team_id=caller.team_id,
            kind="channel.test",
            sandbox_id=None,
            at=time.time(),
            data={"channel": row.name},
        )
        await self._send(row.kind, row.sealed_config, happening, f"dl{random_id(20)}")

    async def deliveries(
        self, caller: Caller, channel_id: str, *, limit: int = 100
    ) -> Sequence[tuple[Delivery, str]]:
        """The newest deliveries of a channel, each with the kind of its event. Raises NotFound."""
        query = (
            select(Delivery, func.coalesce(Event.kind, ""))
            .outerjoin(Event, Event.event_id == Delivery.event_id)
            .where(Delivery.channel_id == channel_id)
            .order_by(Delivery.event_id.desc())
            .limit(limit)
        )
        async with self._db.read() as session:
            await _find(session, caller, channel_id)
            return [(row[0], row[1]) for row in await session.execute(query)]

    def _config(self, kind: str, given: Mapping[str, str]) -> tuple[dict[str, str], str]:
        """What is sealed, and the secret of a webhook. Raises Invalid."""
        if kind != WEBHOOK:
            return {"url": chat.KINDS[kind](given)}, ""
        self._outgoing.check_url(given.get("url", ""))
        secret = f"whsec_{secrets.token_hex(32)}"
        return {"url": given["url"], "secret": secret}, secret

    # Deliveries.

    async def run(self) -> None:
        """Send what is to be sent, for ever; what is under way at the end is taken up by others."""
        try:
            while True:
                try:
                    busy = await self.spread() + await self.send_due()
                except SandmartinError as error:
                    _log.warning("nothing is sent: %s", error)
                    busy = 0
                if not busy:
                    await self._wait()
        finally:
            for task in tuple(self._sending):
                task.cancel()
            if self._sending:
                await asyncio.wait(tuple(self._sending))

    async def _wait(self) -> None:
        """Wait for an event, the end of a sending, or the time to look again."""
        changed = asyncio.ensure_future(self._events.changed(self._patience.poll_s))
        try:
            await asyncio.wait({changed, *self._sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def spread(self) -> int:
        """Make deliveries of the events that channels have not looked at; how many there were."""
        async with self._db.read() as session:
            last = await _last_event_id(session)
            query = select(Channel).where(Channel.active, Channel.seen_event_id < last)
            behind = (await session.scalars(query)).all()
        return sum([await self._spread_to(channel) for channel in behind])

    async def _spread_to(self, channel: Channel) -> int:
        query = select(Event).where(
            Event.team_id == channel.team_id, Event.event_id > channel.seen_event_id
        )
        async with self._db.read() as session:
            # Before the look, so that nothing younger is passed over.
            last = await _last_event_id(session)
            rows = (await session.scalars(query.order_by(Event.event_id).limit(_BATCH))).all()
        if len(rows) == _BATCH:
            last = rows[-1].event_id
        wanted = [row for row in rows if row.event_id <= last and wants(channel.events, row.kind)]
        async with self._db.write() as session:
            done = await session.execute(
                update(Channel)
                .where(
                    Channel.channel_id == channel.channel_id,
                    Channel.seen_event_id == channel.seen_event_id,
                    Channel.active,
                )
                .values(seen_event_id=last)
            )
            if not done.rowcount:  # type: ignore[attr-defined]
                # Another replica was faster, or it was changed.
                return 0
            session.add_all(_delivery(channel, row) for row in wanted)
        return len(rows)

    async def send_due(self) -> int:
        """Begin to send what is due, as much as may be sent at once; how much that is."""
        free = self._patience.at_once - len(self._sending)
        leased = await self._lease(free) if free > 0 else []
        for each in leased:
            task = asyncio.create_task(self._deliver(each), name=f"delivery {each.delivery_id}")
            self._sending[task] = each.channel_id
            task.add_done_callback(lambda ended: self._sending.pop(ended, None))
        return len(leased)

    async def _lease(self, limit: int) -> Sequence[_Leased]:
        now = time.time()
        to_channel = Counter(self._sending.values())
        most = self._patience.at_once_to_channel
        busy = [channel_id for channel_id, count in to_channel.items() if count >= most]
        free = (
            Delivery.finished_at.is_(None),
            Delivery.next_at <= now,
            Delivery.lease_expires_at < now,
        )
        earlier = aliased(Delivery)
        waits = (
            select(earlier.delivery_id)
            .where(
                earlier.channel_id == Delivery.channel_id,
                earlier.sandbox_id == Delivery.sandbox_id,
                earlier.event_id < Delivery.event_id,
                earlier.finished_at.is_(None),
            )
            .exists()
        )
        query = (
            select(Delivery, Channel, Event)
            .join(Channel, Channel.channel_id == Delivery.channel_id)
            .outerjoin(Event, Event.event_id == Delivery.event_id)
            .where(*free, ~waits, Delivery.channel_id.not_in(busy))
            .order_by(Delivery.next_at)
            .limit(limit)
        )
        async with self._db.read() as session:
            found = (await session.execute(query)).all()
        leased = []
        if found:
            async with self._db.write() as session:
                for delivery, channel, event in found:
                    if to_channel[channel.channel_id] >= most:
                        continue
                    if each := await self._take(session, delivery, channel, event, free):
                        leased.append(each)
                        to_channel[channel.channel_id] += 1
        return leased

    async def _take(
        self,
        session: AsyncSession,
        delivery: Delivery,
        channel: Channel,
        event: Event | None,
        free: Sequence[Any],
    ) -> _Leased | None:
        token = random_id(20)
        done = await session.execute(
            update(Delivery)
            .where(Delivery.delivery_id == delivery.delivery_id, *free)
            .values(lease_token=token, lease_expires_at=time.time() + self._patience.lease_s)
        )
        if not done.rowcount:  # type: ignore[attr-defined]
            return None
        return _Leased(
            delivery_id=delivery.delivery_id,
            channel_id=channel.channel_id,
            token=token,
            attempts=delivery.attempts,
            kind=channel.kind,
            sealed_config=channel.sealed_config,
            happening=Happening.of(event) if event is not None else None,
        )

    async def _deliver(self, leased: _Leased) -> None:
        """Send one, and note what came of it."""
        problem = ""
        try:
            if leased.happening is not None:
                await self._send(
                    leased.kind, leased.sealed_config, leased.happening, leased.delivery_id
                )
            else:
                problem = "the event is not kept any more"
        except SandmartinError as error:
            problem = error.message
        try:
            await self._note(leased, problem)
        except Unavailable as error:
            # The lease expires, and it is sent again.
            _log.warning("what came of delivery %s is not noted: %s", leased.delivery_id, error)

    async def _note(self, leased: _Leased, problem: str) -> None:
        now, waits = time.time(), self._patience.waits_s
        values: dict[str, Any] = {
            "attempts": leased.attempts + 1,
            "error": problem,
            "lease_expires_at": 0.0,
        }
        if problem and leased.attempts < len(waits) and leased.happening is not None:
            values["next_at"] = now + waits[leased.attempts]
        else:
            values["finished_at"] = now
        async with self._db.write() as session:
            await session.execute(
                update(Delivery)
                .where(
                    Delivery.delivery_id == leased.delivery_id,
                    Delivery.lease_token == leased.token,
                    Delivery.finished_at.is_(None),
                )
                .values(values)
            )

    async def _send(
        self, kind: str, sealed_config: bytes, happening: Happening, delivery_id: str
    ) -> None:
        """Raises Unavailable, Denied, Invalid when it does not arrive."""
        config = self._sealer.unseal(sealed_config)
        if kind != WEBHOOK:
            await chat.send(self._outgoing, config["url"], *_words(happening))
            return
        body = json.dumps(_body(happening), separators=(",", ":")).encode()
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "sandmartin",
            "X-Sandmartin-Delivery": delivery_id,
            "X-Sandmartin-Timestamp": timestamp,
            "X-Sandmartin-Signature": sign(config["secret"], timestamp, body),
        }
        answer = await self._outgoing.request("POST", config["url"], content=body, headers=headers)
        if not 200 <= answer.status < 300:
            raise Unavailable(f"the receiver answered {answer.status}")


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """The signature of a webhook: HMAC-SHA256 over `timestamp.body`."""
    signed = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={signed.hexdigest()}"


def _body(happening: Happening) -> dict[str, Any]:
    return {
        "id": happening.event_id,
        "kind": happening.kind,
        "team_id": happening.team_id,
        "sandbox_id": happening.sandbox_id,
        "at": happening.at,
        "data": happening.data,
    }


def _words(happening: Happening) -> tuple[str, str]:
    """Title and text of a message to people."""
    noun, _, verb = happening.kind.partition(".")
    name = happening.sandbox_id or happening.data.get("name") or ""
    title = f"{noun} {name} {verb.replace('_', ' ')}".replace("  ", " ").capitalize()
    said = {key: value for key, value in happening.data.items() if key != "phases"}
    lines = [f"{key}: {value}" for key, value in said.items() if value not in ("", None)]
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(happening.at))
    return title, "\n".join([*lines, when])


def _delivery(channel: Channel, event: Event) -> Delivery:
    return Delivery(
        delivery_id=f"dl{random_id(20)}",
        channel_id=channel.channel_id,
        event_id=event.event_id,
        sandbox_id=event.sandbox_id,
        next_at=time.time(),
    )


async def _last_event_id(session: AsyncSession) -> int:
    return await session.scalar(select(func.max(Event.event_id))) or 0


async def _give_up_all(session: AsyncSession, channel_id: str) -> None:
    await session.execute(
        update(Delivery)
        .where(Delivery.channel_id == channel_id, Delivery.finished_at.is_(None))
        .values(finished_at=time.time(), error=_OFF)
    )


async def _find(session: AsyncSession, caller: Caller, channel_id: str) -> Channel:
    row = await session.get(Channel, channel_id)
    if row is None or row.team_id != caller.team_id:
        raise NotFound(f"there is no channel {channel_id[:80]!r}")
    return row


def _require_admin(caller: Caller) -> None:
    """A key acts for its team; of members, owners and administrators may."""
    if caller.kind is ActorKind.USER:
        caller.require_role(Role.ADMIN)
