"""Artefacts: templates in the artefact store, and on their way into it and out of it.

What a host has and the store has not is pushed in the background: a row with a lease, so that one
replica at a time has it done, and another takes it up when that one dies. A host that is to start
a sandbox of what it lacks fetches it first. What nothing refers to is swept by the leader: pushes
rely on chunks that are there already, so that no sweep removes anything while one is under way,
and none begins meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from sqlalchemy import exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import events, tables
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.rows import tell
from sandmartin.control.states import HostState, TemplateState
from sandmartin.control.tables import TemplatePlacement
from sandmartin.errors import (
    AlreadyExists,
    Exhausted,
    Invalid,
    SandmartinError,
    Unavailable,
)
from sandmartin.model import random_id
from sandmartin.transport import Artefact, ArtefactStore, PushProgress
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)

Row = tables.Artefact
#: Of templates that hosts bring with them all have their own.
_OF_A_TEAM = "t-%"
_AT_ONCE = 2
LEASE_S = 60.0
#: The longest between two tries of what failed, which is longer each time.
_MAX_RETRY_S = 600.0
#: The lease of whoever removes something from the store.
SWEEP = "artefact sweep"
#: Its owner while whoever wants it waits for pushes to end, and for how long others hold back.
_WAITING, _WAIT_S = "waiting", 30.0


class NotBrought(SandmartinError):
    """A host cannot get a template; another may."""

    def __init__(self, cause: SandmartinError) -> None:
        super().__init__(cause.message, hint=cause.hint)
        self.cause = cause


class Artefacts:
    """The templates of all teams in the artefact store, as one replica looks after them."""

    def __init__(
        self,
        db: Database,
        hosts: Hosts,
        store: ArtefactStore | None,
        *,
        look_s: float,
        retry_s: float,
    ) -> None:
        self._db = db
        self._hosts = hosts
        #: None where templates stay on their hosts.
        self._store = store
        #: How often is looked for what is to be pushed, and how soon a first try is repeated.
        self._look_s = look_s
        self._retry_s = retry_s
        self._pushing: set[asyncio.Task[None]] = set()

    @property
    def stores(self) -> bool:
        """Whether templates go into a store that all hosts reach."""
        return self._store is not None

    # In.

    async def run(self) -> None:
        """Push what is not in the store yet, for ever."""
        if self._store is None:
            return
        try:
            while True:
                try:
                    await self._look(self._store)
                except (SandmartinError, IntegrityError) as error:
                    _log.warning("templates are stored later: %s", error)
                await asyncio.sleep(self._look_s)
        finally:
            for task in self._pushing:
                task.cancel()
            if self._pushing:
                await asyncio.wait(self._pushing)

    async def _look(self, store: ArtefactStore) -> None:
        await self._note_new()
        while len(self._pushing) < _AT_ONCE:
            claimed = await self._claim()
            if claimed is None:
                return
            task = asyncio.create_task(self._push(*claimed, store), name="push")
            self._pushing.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._pushing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a push died", exc_info=error)

    async def _note_new(self) -> None:
        """A row for each template of a team that has none."""
        template = tables.Template
        known = exists().where(Row.template_id == template.template_id)
        query = select(template.template_id).where(
            template.state == TemplateState.READY, template.agent_name.like(_OF_A_TEAM), ~known
        )
        async with self._db.read() as session:
            new = (await session.scalars(query)).all()
        for template_id in new:
            # Another replica may note it too, and it may be deleted just now.
            with contextlib.suppress(IntegrityError):
                async with self._db.write() as session:
                    session.add(Row(template_id=template_id, created_at=time.time()))

    async def _claim(self) -> tuple[tables.Template, tables.Host, str] | None:
        """A template that is to be pushed, a host that has it, and the token of its lease."""
        now, token = time.time(), random_id(20)
        template, host, placed = tables.Template, tables.Host, TemplatePlacement
        query = (
            select(template, host)
            .join(Row, Row.template_id == template.template_id)
            .join(placed, placed.template_id == template.template_id)
            .join(host, host.host_id == placed.host_id)
            .where(
                Row.artefact_id.is_(None),
                Row.next_at <= now,
                Row.lease_expires_at < now,
                template.state == TemplateState.READY,
                host.state == HostState.ONLINE,
            )
            .order_by(Row.next_at, Row.created_at, func.random())
        )
        async with self._db.write() as session:
            if await _sweeping(session, now):
                return None
            found = (await session.execute(query.limit(1))).first()
            if found is None:
                return None
            done = await session.execute(
                update(Row)
                .where(
                    Row.template_id == found[0].template_id,
                    Row.artefact_id.is_(None),
                    Row.lease_expires_at < now,
                )
                .values(
                    lease_token=token,
                    lease_expires_at=now + LEASE_S,
                    attempts=Row.attempts + 1,
                )
            )
            if not done.rowcount:  # type: ignore[attr-defined]
                return None
        return found[0], found[1], token

    async def _push(
        self, template: tables.Template, host: tables.Host, token: str, store: ArtefactStore
    ) -> None:
        held = _held(template.template_id, token)
        try:
            agent = await self._hosts.agent(host.host_id)
            made = await self._watch(agent.push_template(template.agent_name, store), held)
            await self._note_stored(held, made, host if template.kind == "snapshot" else None)
        except SandmartinError as error:
            _log.warning("template %s is not stored yet: %s", template.name, error)
            await self._put_off(template.template_id, held, error)
            return
        async with self._db.write() as session:
            events.record(
                session,
                template.team_id,
                "template.stored",
                name=template.name,
                size_bytes=made.size_bytes,
                added_bytes=made.added_bytes,
            )

    async def _note_stored(
        self, held: tuple[Any, ...], made: Artefact, host: tables.Host | None
    ) -> None:
        """It is in the store; `host` made a device state in it. Raises Unavailable."""
        now = time.time()
        values = {
            "artefact_id": made.artefact_id,
            "size_bytes": made.size_bytes,
            "accel": host.accel if host is not None else "",
            "vmm_version": host.vmm_version if host is not None else "",
            "stored_at": now,
            "lease_expires_at": 0.0,
            "error": "",
        }
        async with self._db.write() as session:
            # Whose lease ran out in between may rely on chunks that were swept.
            done = await session.execute(
                update(Row).where(*held, Row.lease_expires_at > now).values(values)
            )
        if not done.rowcount:  # type: ignore[attr-defined]
            raise Unavailable("it took too long to store it")

    async def _watch(
        self, told: AsyncGenerator[PushProgress | Artefact, None], held: tuple[Any, ...]
    ) -> Artefact:
        """What a host has stored. Raises Unavailable when the lease is lost meanwhile."""
        renewed_at = time.monotonic()
        async with aclosing(told) as progress:
            async for each in progress:
                if isinstance(each, Artefact):
                    return each
                if time.monotonic() - renewed_at > LEASE_S / 4:
                    await self._renew(held)
                    renewed_at = time.monotonic()
        raise Unavailable("the host did not say what it has stored")

    async def _renew(self, held: tuple[Any, ...]) -> None:
        now = time.time()
        async with self._db.write() as session:
            done = await session.execute(
                update(Row)
                .where(*held, Row.lease_expires_at > now)
                .values(lease_expires_at=now + LEASE_S)
            )
        if not done.rowcount:  # type: ignore[attr-defined]
            raise Unavailable("it took too long to say that it is still being stored")

    async def _put_off(
        self, template_id: str, held: tuple[Any, ...], error: SandmartinError
    ) -> None:
        async with self._db.write() as session:
            row = await session.get(Row, template_id)
            wait_s = self._retry_s * 2 ** min(10, (row.attempts if row is not None else 1) - 1)
            await session.execute(
                update(Row)
                .where(*held)
                .values(
                    lease_expires_at=0.0,
                    next_at=time.time() + min(wait_s, _MAX_RETRY_S),
                    error=error.message,
                )
            )

    async def push_asleep(
        self, agent: Agent, sandbox: tables.Sandbox, template: tables.Template
    ) -> None:
        """Store what a paused sandbox sleeps in, as a template of which there is a row.

        Raises what keeps its host from it; Unavailable while something is removed from the store.
        """
        assert self._store is not None
        now, token = time.time(), random_id(20)
        async with self._db.write() as session:
            if await _sweeping(session, now):
                raise Unavailable("the artefact store is being tidied up")
            host = await session.get(tables.Host, sandbox.host_id)
            session.add(
                Row(
                    template_id=template.template_id,
                    created_at=now,
                    lease_token=token,
                    lease_expires_at=now + LEASE_S,
                    attempts=1,
                )
            )
        held = _held(template.template_id, token)
        made = await self._watch(agent.push_sandbox(sandbox.sandbox_id, self._store), held)
        await self._note_stored(held, made, host)

    # Out.

    async def bring_to(self, agent: Agent, host_id: str, template: tables.Template) -> None:
        """Have a stored template on a host. Raises what keeps the host from fetching it."""
        assert self._store is not None
        async with self._db.read() as session:
            row = await session.get(Row, template.template_id)
        if row is None or row.artefact_id is None:
            raise Unavailable("the artefact is gone")
        await agent.fetch_template(template.agent_name, row.artefact_id, self._store)
        async with self._db.write() as session:
            session.add(TemplatePlacement(template_id=template.template_id, host_id=host_id))

    async def bring(self, agent: Agent, sandbox: tables.Sandbox, template_id: str) -> None:
        """Have a template on the host that is to start a sandbox of it, if it lacks it.

        Raises NotBrought when the host cannot fetch it, Unavailable when it does not answer.
        """
        if self._store is None or sandbox.host_id is None:
            return
        async with self._db.read() as session:
            key = template_id, sandbox.host_id
            if await session.get(TemplatePlacement, key) is not None:
                return
            row = await session.get(Row, template_id)
        if row is None or row.artefact_id is None:
            # The host says itself that it lacks it.
            return
        async with self._db.write() as session:
            tell(session, sandbox, "sandbox.fetching", size_bytes=row.size_bytes)
        began_at = time.monotonic()
        try:
            await agent.fetch_template(sandbox.agent_template, row.artefact_id, self._store)
        except AlreadyExists:
            # By a try whose answer was lost.
            pass
        except Invalid as error:
            await self._doubt(row, error)
            raise NotBrought(_told(error)) from error
        except SandmartinError as error:
            if isinstance(error, Unavailable) and not error.answered:
                raise
            raise NotBrought(_told(error)) from error
        took_s = round(time.monotonic() - began_at, 3)
        with contextlib.suppress(IntegrityError):
            async with self._db.write() as session:
                if await session.get(TemplatePlacement, key) is None:
                    placed = TemplatePlacement(template_id=template_id, host_id=key[1])
                    session.add(placed)
                tell(session, sandbox, "sandbox.fetched", seconds=took_s)

    async def _doubt(self, row: Row, error: SandmartinError) -> None:
        """What could not be taken out whole is put in anew, by a host that has it."""
        _log.error("artefact %s: %s", (row.artefact_id or "")[:12], error)
        async with self._db.write() as session:
            await session.execute(
                update(Row)
                .where(Row.template_id == row.template_id, Row.artefact_id == row.artefact_id)
                .values(artefact_id=None, next_at=0.0, error=error.message)
            )


def _told(error: SandmartinError) -> SandmartinError:
    """What whoever wants a sandbox is told: that it cannot be had now, and why."""
    told = error if isinstance(error, Exhausted) else Unavailable(error.message, hint=error.hint)
    # Nothing was begun, so nothing has to be found out.
    told.answered = True
    return told


# Sweeping and pushing keep out of each other's way.


async def _sweeping(session: AsyncSession, now: float) -> bool:
    """Whether something is removed from the store just now; nobody begins to before the end.

    Of the transaction, that is, which is a writing one.
    """
    lease = await session.get(tables.Lease, SWEEP, with_for_update=True)
    return lease is not None and lease.expires_at > now


async def begin_sweep(session: AsyncSession, owner: str, lease_s: float) -> bool:
    """Whether nobody pushes, so that `owner` may remove something for the time of a lease.

    Where somebody does, nobody begins to push for a while, so that it comes to its turn.
    """
    now = time.time()
    lease = await session.get(tables.Lease, SWEEP, with_for_update=True)
    if lease is None:
        # Locked by whoever comes next only once it is there.
        session.add(tables.Lease(name=SWEEP, owner="", expires_at=0.0))
        return False
    if lease.expires_at > now and lease.owner not in {owner, _WAITING}:
        return False
    pushing = select(func.count()).where(Row.lease_expires_at > now)
    if await session.scalar(pushing):
        lease.owner, lease.expires_at = _WAITING, now + _WAIT_S
        return False
    lease.owner, lease.expires_at = owner, now + lease_s
    return True


@contextlib.asynccontextmanager
async def sweeping(db: Database, owner: str, lease_s: float) -> AsyncIterator[bool]:
    """Whether something may be removed; given back at the end."""
    async with db.write() as session:
        mine = await begin_sweep(session, owner, lease_s)
    try:
        yield mine
    finally:
        if mine:
            async with db.write() as session:
                await session.execute(
                    update(tables.Lease)
                    .where(tables.Lease.name == SWEEP, tables.Lease.owner == owner)
                    .values(expires_at=0.0)
                )


def _held(template_id: str, token: str) -> tuple[Any, ...]:
    return (Row.template_id == template_id, Row.lease_token == token)
