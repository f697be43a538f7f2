"""Trust: whoever has something open is still the one who opened it.

A key that is revoked, a session that ends, a user who is disabled, a member who is removed: what
they have open ends within a second, at every replica. All of a replica are looked after together,
in the same few queries however many they are, and in none while nobody has anything open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.caller import ActorKind, Caller
from sandmartin.control.db import Database, uncut
from sandmartin.control.events import Events
from sandmartin.control.tables import ApiKey, BrowserSession, Member, Team, User
from sandmartin.errors import SandmartinError

_log = logging.getLogger(__name__)

_LOOK_S = 0.4


@dataclass(frozen=True)
class _Who:
    """What a caller was let in by."""

    kind: ActorKind
    actor_id: str
    team_id: str
    session_hash: str = field(repr=False)

    @classmethod
    def of(cls, caller: Caller) -> _Who:
        return cls(caller.kind, caller.actor_id, caller.team_id, caller.session_hash)


@dataclass
class _Watch:
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: int = 0


class Trust:
    """Those who have something open at one replica."""

    def __init__(self, db: Database, happenings: Events, look_s: float = _LOOK_S) -> None:
        self._db = db
        self._events = happenings
        self._look_s = look_s
        self._watches: dict[_Who, _Watch] = {}
        self._someone = asyncio.Event()

    @contextlib.contextmanager
    def watching(self, caller: Caller) -> Iterator[asyncio.Event]:
        """An event that is set once the caller would not be let in any more."""
        who = _Who.of(caller)
        watch = self._watches.setdefault(who, _Watch())
        watch.watchers += 1
        self._someone.set()
        try:
            yield watch.lost
        finally:
            watch.watchers -= 1
            if not watch.watchers and self._watches.get(who) is watch:
                del self._watches[who]

    async def run(self) -> None:
        """Look after all of them, for ever."""
        while True:
            await self._someone.wait()
            await asyncio.sleep(self._look_s)
            try:
                await uncut(self._look())
            except SandmartinError as error:
                # Nobody can have been shut out meanwhile either.
                _log.debug("nobody is looked after: %s", error)

    async def _look(self) -> None:
        asked = set(self._watches)
        if not asked:
            self._someone.clear()
            return
        async with self._db.read() as session:
            trusted = await _trusted(session, asked)
        for who in asked - trusted:
            # Who comes with the same again is judged anew.
            if (watch := self._watches.pop(who, None)) is not None:
                watch.lost.set()
        if asked - trusted:
            self._events.wake()


async def _trusted(session: AsyncSession, asked: Collection[_Who]) -> set[_Who]:
    """Those who would still be let in."""
    keys = [who for who in asked if who.kind is ActorKind.KEY]
    people = [who for who in asked if who.kind is ActorKind.USER]
    trusted = set()
    if keys:
        there = (
            select(ApiKey.key_id, ApiKey.team_id)
            .join(Team, Team.team_id == ApiKey.team_id)
            .outerjoin(User, User.user_id == ApiKey.created_by)
            .where(
                ApiKey.key_id.in_({who.actor_id for who in keys}),
                Team.deleted_at.is_(None),
                or_(User.user_id.is_(None), User.active),
            )
        )
        known = {tuple(row) for row in await session.execute(there)}
        trusted |= {who for who in keys if (who.actor_id, who.team_id) in known}
    if people:
        there = (
            select(BrowserSession.session_hash, Member.team_id)
            .join(User, User.user_id == BrowserSession.user_id)
            .join(Member, Member.user_id == User.user_id)
            .join(Team, Team.team_id == Member.team_id)
            .where(
                BrowserSession.session_hash.in_({who.session_hash for who in people}),
                BrowserSession.expires_at > time.time(),
                User.active,
                Team.deleted_at.is_(None),
            )
        )
        known = {tuple(row) for row in await session.execute(there)}
        trusted |= {who for who in people if (who.session_hash, who.team_id) in known}
    return trusted
