"""Rate limits on what can be guessed, as passwords are, and on what strangers make us do.

Kept in the database, so that all replicas count together and a restart forgets nothing. Each
party has so many tries, and gets one back per period; what is kept of it is one moment, the one
at which it has all of them again. A try is taken before it is made, so that many at once are
counted too, and may be given back when it was none.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import case, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control.db import Database
from sandmartin.control.seal import digest
from sandmartin.control.tables import Attempt
from sandmartin.errors import Exhausted

#: What is forgotten is removed once in so many tries.
_PRUNE_EACH = 100


class TooMany(Exhausted):
    """Too much was tried."""

    retryable = True

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("too many attempts", hint=f"try again in {retry_after_s:.0f} s")
        #: When one more try is allowed.
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Rate:
    """So many tries at once, and one more each period."""

    kind: str
    burst: int
    period_s: float


#: Of one address, and of one account from wherever.
LOGIN_BY_ADDRESS = Rate("login-address", 30, 10.0)
LOGIN_BY_ACCOUNT = Rate("login-account", 10, 60.0)
SIGN_UP = Rate("sign-up", 20, 60.0)
INVITATION = Rate("invitation", 20, 30.0)
OAUTH = Rate("oauth", 30, 10.0)
#: Of sandboxes by requests that anybody can send: one, and all of a team.
WAKE = Rate("wake", 20, 60.0)
WAKE_OF_TEAM = Rate("wake-team", 200, 0.5)


@dataclass(frozen=True)
class Use:
    """A try of one kind by one party: an address, or an account."""

    rate: Rate
    party: str

    @property
    def key(self) -> str:
        return digest(f"{self.rate.kind} {_network(self.party)}")


class Limits:
    """What was tried lately, by all replicas of one database."""

    def __init__(self, db: Database, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._clock = clock
        self._taken = 0

    async def take(self, *uses: Use) -> None:
        """Count one try of each, or of none. Raises TooMany."""
        async with self._db.write() as session:
            for use in uses:
                await self._take(session, use)
        self._taken += 1
        if self._taken % _PRUNE_EACH == 0:
            await self._prune()

    async def _take(self, session: AsyncSession, use: Use) -> None:
        now, rate = self._clock(), use.rate
        insert = sqlite.insert if self._db.is_sqlite else postgresql.insert
        begin = case((Attempt.clear_at > now, Attempt.clear_at), else_=now)
        statement = (
            insert(Attempt)
            .values(attempt_key=use.key, clear_at=now + rate.period_s)
            .on_conflict_do_update(
                index_elements=[Attempt.attempt_key],
                set_={"clear_at": begin + rate.period_s},
                # Of several at once, each counts what those before it have left.
                where=begin + rate.period_s <= now + rate.burst * rate.period_s,
            )
            .returning(Attempt.clear_at)
        )
        if await session.scalar(statement) is not None:
            return
        clear_at = await session.scalar(
            select(Attempt.clear_at).where(Attempt.attempt_key == use.key)
        )
        raise TooMany(max(1.0, (clear_at or now) - now - (rate.burst - 1) * rate.period_s))

    async def give_back(self, *uses: Use) -> None:
        """It was no guess."""
        async with self._db.write() as session:
            for use in uses:
                await session.execute(
                    update(Attempt)
                    .where(Attempt.attempt_key == use.key)
                    .values(clear_at=Attempt.clear_at - use.rate.period_s)
                )

    async def _prune(self) -> None:
        old = select(Attempt.attempt_key).where(Attempt.clear_at < self._clock())
        async with self._db.write() as session:
            await session.execute(
                delete(Attempt).where(
                    Attempt.attempt_key.in_(old.with_for_update(skip_locked=True))
                )
            )


def _network(party: str) -> str:
    """Of an IPv6 address the part that its owner cannot choose."""
    try:
        address = ipaddress.ip_address(party)
    except ValueError:
        return party
    if isinstance(address, ipaddress.IPv4Address):
        return party
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.ip_network((address, 64), strict=False))
