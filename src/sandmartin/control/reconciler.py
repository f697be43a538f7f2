"""The reconciler: rows and VMs become one again, whatever happened to either.

Every row that is not over is compared with what its host reports, and every VM that a host
reports with the rows. A row to which something is being done is left to its operation. What a host
says may be older than a row: only rows that were as they are before the host was asked are judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import events, tables
from sandmartin.control.caller import system
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts, mark_unreachable
from sandmartin.control.operations import Overtaken
from sandmartin.control.sandboxes import Row, Sandboxes, observe, state_of
from sandmartin.control.states import ALIVE, TRANSITIONAL
from sandmartin.control.templates import Templates
from sandmartin.errors import NotFound, SandmartinError
from sandmartin.model import State
from sandmartin.transport import SandboxInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often is looked, and how long is waited before something is believed."""

    period_s: float = 5.0
    #: A host that did not answer for so long is unreachable: three heartbeats.
    unreachable_s: float = 90.0
    #: A VM that no row knows is ended when it was seen for so long.
    unknown_s: float = 30.0
    #: A row in between two states without an operation is judged after so long.
    grace_s: float = 10.0


class Reconciler:
    """Compares, for as long as this replica is the one that does."""

    def __init__(
        self,
        db: Database,
        hosts: Hosts,
        sandboxes: Sandboxes,
        templates: Templates,
        happenings: events.Events,
        pace: Pace = Pace(),
    ) -> None:
        self._db = db
        self._hosts = hosts
        self._sandboxes = sandboxes
        self._templates = templates
        self._events = happenings
        self._pace = pace
        #: When a VM that no row knows was first seen, by host and id.
        self._unknown: dict[tuple[str, str], float] = {}
        #: When all hosts were looked at last by this replica; 0 before.
        self.looked_at = 0.0

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except SandmartinError as error:
                _log.warning("rows and VMs are not compared: %s", error)
            await asyncio.sleep(self._pace.period_s)

    async def tick(self) -> None:
        """Look at every host once, all at the same time."""
        hosts = await self._hosts.list_reachable()
        await asyncio.gather(*(self._look_at(host) for host in hosts))
        self.looked_at = time.time()

    async def _look_at(self, host: tables.Host) -> None:
        asked_at = time.time()
        try:
            agent = await self._hosts.agent(host.host_id)
            about = await agent.describe()
            infos = {each.sandbox_id: each for each in await agent.list_sandboxes()}
            templates = await agent.list_templates()
        except SandmartinError as error:
            await self._note_silence(host, error)
            return
        if await self._hosts.mark_online(host.host_id, about):
            _log.info("host %s is online", host.name)
        # Another host, or another replica, may note the same just now.
        with contextlib.suppress(IntegrityError):
            await self._templates.sync(host.host_id, templates)
        await self._compare(host, infos, asked_at)

    async def _note_silence(self, host: tables.Host, error: SandmartinError) -> None:
        """A host that is silent for too long is unreachable, and its sandboxes are missing."""
        now = time.time()
        if now - (host.reached_at or host.created_at) < self._pace.unreachable_s:
            return
        async with self._db.write() as session:
            if await mark_unreachable(session, host):
                _log.warning("host %s is unreachable: %s", host.name, error)
            # What is put to sleep lies on its disk; the rest may be gone.
            query = select(Row).where(
                Row.host_id == host.host_id, Row.state == State.RUNNING, Row.operation_id.is_(None)
            )
            for row in await session.scalars(query):
                reason = f"its host {host.name} cannot be reached"
                await observe(session, row, State.MISSING, reason=reason)
                events.record(
                    session, row.team_id, "sandbox.missing", row.sandbox_id, state=row.state
                )
        self._events.wake()

    # One host that answers.

    async def _compare(
        self, host: tables.Host, infos: Mapping[str, SandboxInfo], asked_at: float
    ) -> None:
        query = select(Row).where(
            Row.host_id == host.host_id, Row.state.in_(ALIVE), Row.state_at < asked_at
        )
        async with self._db.read() as session:
            rows = (await session.scalars(query)).all()
            known = set(
                await session.scalars(
                    select(Row.sandbox_id).where(
                        Row.sandbox_id.in_(infos), Row.state.in_(ALIVE), Row.host_id == host.host_id
                    )
                )
            )
            working = await _worked_on(session, [row.operation_id for row in rows])
        for row in rows:
            if row.operation_id not in working:
                await self._judge(host, row, infos.get(row.sandbox_id), asked_at)
        await self._end_unknown(host, set(infos) - known, asked_at)

    async def _judge(
        self, host: tables.Host, row: Row, info: SandboxInfo | None, asked_at: float
    ) -> None:
        state = State(row.state)
        if state in TRANSITIONAL and asked_at - row.state_at < self._pace.grace_s:
            return
        if state is State.STOPPING:
            await self._stop(row, info)
            return
        seen = state_of(info) if info is not None else None
        if seen in TRANSITIONAL:
            return
        if seen is state:
            assert info is not None
            await self._refresh(row, info)
            return
        to, reason = _verdict(host, state, info)
        if to is state:
            return
        if seen is State.PAUSED and row.on_timeout == "kill" and state is State.RUNNING:
            await self._sandboxes.destroy(system(row.team_id), row.sandbox_id)
            return
        await self._believe(row, to, reason, info)

    async def _believe(self, row: Row, to: State, reason: str, info: SandboxInfo | None) -> None:
        values: dict[str, Any] = {"host_ip": info.address if info is not None else ""}
        if to is State.STOPPED:
            values["ended_at"] = time.time()
        _log.info("sandbox %s is %s, not %s: %s", row.sandbox_id, to, row.state, reason)
        try:
            async with self._db.write() as session:
                fresh = await session.get(Row, row.sandbox_id)
                if fresh is None or fresh.state_at != row.state_at:
                    return
                await observe(session, fresh, to, reason=reason, operation_id=None, **values)
                kind = f"sandbox.{to}"
                data = {"state": to, "seen": True, "reason": reason}
                events.record(session, row.team_id, kind, row.sandbox_id, **data)
        except Overtaken:
            # Somebody has begun something with it meanwhile, and knows better.
            return
        self._events.wake()

    async def _stop(self, row: Row, info: SandboxInfo | None) -> None:
        if info is None:
            await self._believe(row, State.STOPPED, "", None)
        else:
            await self._sandboxes.destroy(system(row.team_id), row.sandbox_id)

    async def _refresh(self, row: Row, info: SandboxInfo) -> None:
        """Keep what changes by itself: the address, the last activity."""
        if (row.host_ip, row.last_active_at) == (info.address, float(info.last_active_at)):
            return
        async with self._db.write() as session:
            await session.execute(
                update(Row)
                .where(Row.sandbox_id == row.sandbox_id, Row.state == row.state)
                .values(host_ip=info.address, last_active_at=float(info.last_active_at))
            )

    async def _end_unknown(self, host: tables.Host, ids: set[str], now: float) -> None:
        """End VMs that belong to no row, when they have been there for a while."""
        seen = {(host.host_id, each) for each in ids}
        for key in [key for key in self._unknown if key[0] == host.host_id and key not in seen]:
            del self._unknown[key]
        for key in seen:
            if now - self._unknown.setdefault(key, now) < self._pace.unknown_s:
                continue
            _log.warning("sandbox %s on host %s belongs to nobody and is ended", key[1], host.name)
            try:
                await (await self._hosts.agent(host.host_id)).destroy(key[1])
            except NotFound:
                pass
            except SandmartinError as error:
                _log.warning("sandbox %s cannot be ended: %s", key[1], error)


async def _worked_on(session: AsyncSession, operation_ids: list[str | None]) -> set[str]:
    """Those operations that are not finished: whoever has their lease knows best."""
    ids = [each for each in operation_ids if each is not None]
    operation = tables.Operation
    query = select(operation.operation_id).where(
        operation.operation_id.in_(ids), operation.finished_at.is_(None)
    )
    return set(await session.scalars(query))


def _verdict(host: tables.Host, state: State, info: SandboxInfo | None) -> tuple[State, str]:
    """What a sandbox is, after all, and why."""
    if info is not None:
        return state_of(info), info.reason
    match state:
        case State.ERROR:
            return state, ""
        case State.MISSING:
            return State.STOPPED, f"host {host.name} came back without it"
        case State.PENDING | State.STARTING:
            return State.ERROR, "it was not started"
    return State.ERROR, f"host {host.name} does not have it any more"
