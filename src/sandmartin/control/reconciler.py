"""The reconciler: rows and VMs become one again, whatever happened to either.

Every row that is not over is compared with what its host reports, and every VM that a host
reports with the rows. A row to which something is being done is left to its operation. What a host
says may be older than a row, and clocks differ: only rows are judged that were read before the
host was asked, and only what is still as it was read is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import events, tables
from sandmartin.control.caller import system
from sandmartin.control.db import Database, uncut
from sandmartin.control.hosts import Hosts, mark_unreachable
from sandmartin.control.operations import Overtaken
from sandmartin.control.rows import Row, observe, state_of
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.states import ALIVE, TRANSITIONAL, HostState
from sandmartin.control.templates import Templates
from sandmartin.control.terms import differences
from sandmartin.errors import NotFound, SandmartinError, Unavailable
from sandmartin.model import State
from sandmartin.transport import SandboxInfo
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often is looked, and how long is waited before something is believed."""

    period_s: float = 5.0
    #: A host that does not answer within this time is silent.
    answer_s: float = 10.0
    #: How long a look at all hosts waits for the slow ones, which are not looked at anew meanwhile.
    patience_s: float = 2.0
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
        #: Since when it is seen: VMs and templates that no row knows, by host and id, and
        #: deletions that do not end.
        self._unknown = _Sightings(pace.unknown_s)
        self._unknown_templates = _Sightings(pace.unknown_s)
        self._half_deleted = _Sightings(pace.unknown_s)
        #: By host, what a look before did not wait for.
        self._looking: dict[str, asyncio.Task[None]] = {}
        #: When all hosts were looked at last by this replica; 0 before.
        self.looked_at = 0.0

    async def run(self) -> None:
        try:
            while True:
                try:
                    await uncut(self.tick())
                except SandmartinError as error:
                    _log.warning("rows and VMs are not compared: %s", error)
                await asyncio.sleep(self._pace.period_s)
        finally:
            await self._stop_looking()

    async def tick(self) -> None:
        """Look at every host once, all at the same time, but for those that a look is still at.

        One that fails or is slow must not keep the others from being looked at.
        """
        hosts = await self._hosts.list_reachable()
        for host in hosts:
            if host.host_id not in self._looking:
                look = asyncio.create_task(self._look_at(host), name=f"look at {host.name}")
                self._looking[host.host_id] = look
        rest = [self._settle_homeless(), self._finish_deletions()]
        failures = await asyncio.gather(*rest, return_exceptions=True)
        if self._looking:
            await asyncio.wait(self._looking.values(), timeout=self._pace.patience_s)
        for host_id, look in list(self._looking.items()):
            if look.done():
                del self._looking[host_id]
                failures.append(look.exception())
        self.looked_at = time.time()
        for failure in failures:
            if isinstance(failure, SandmartinError):
                _log.warning("not all is compared: %s", failure)
            elif failure is not None:
                raise failure

    async def _stop_looking(self) -> None:
        looks = set(self._looking.values())
        self._looking.clear()
        for look in looks:
            look.cancel()
        if looks:
            await asyncio.wait(looks)

    async def _look_at(self, host: tables.Host) -> None:
        rows = await self._idle_rows(Row.host_id == host.host_id)
        placed = await self._templates.placed_on(host.host_id)
        try:
            agent = await self._hosts.agent(host.host_id)
            async with self._answering(host):
                about = await agent.describe()
                infos = {each.sandbox_id: each for each in await agent.list_sandboxes()}
                templates = await agent.list_templates()
        except SandmartinError as error:
            await self._note_silence(host, error)
            return
        if await self._hosts.mark_online(host.host_id, about):
            _log.info("host %s is online", host.name)
        await self._templates.sync(host.host_id, templates, placed)
        judged = await asyncio.gather(*(self._judge(host, row, infos) for row in rows))
        unchanged = [row for row, changed in zip(rows, judged, strict=True) if not changed]
        await self._refresh(unchanged, infos)
        await asyncio.gather(*(self._hold(row, infos) for row in unchanged))
        await self._end_unknown(host, agent, infos)
        unknown = {(host.host_id, name) for name in await self._templates.unknown(templates)}
        for _, name in self._unknown_templates.lasting(unknown, of=host.host_id):
            _log.warning("template %s on host %s belongs to nobody", name, host.name)
            await self._templates.end_unknown(agent, name)

    @contextlib.asynccontextmanager
    async def _answering(self, host: tables.Host) -> AsyncIterator[None]:
        """Raises Unavailable when it takes a host too long to answer."""
        try:
            async with asyncio.timeout(self._pace.answer_s):
                yield
        except TimeoutError as error:
            within = f"within {self._pace.answer_s:g} s"
            raise Unavailable(f"host {host.name} does not answer {within}") from error

    async def _idle_rows(self, *conditions: Any) -> list[Row]:
        """Rows to which nothing is being done."""
        query = select(Row).where(Row.state.in_(ALIVE), *conditions)
        async with self._db.read() as session:
            rows = (await session.scalars(query)).all()
            working = await self._worked_on(session, [row.operation_id for row in rows])
        return [row for row in rows if row.operation_id not in working]

    async def _worked_on(self, session: AsyncSession, ids: list[str | None]) -> set[str]:
        """Those operations that are not finished: whoever has their lease knows best."""
        operation = tables.Operation
        query = select(operation.operation_id).where(
            operation.operation_id.in_({each for each in ids if each is not None}),
            operation.finished_at.is_(None),
        )
        return set(await session.scalars(query))

    async def _settle_homeless(self) -> None:
        """What was on a host that is deleted is over."""
        deleted = select(tables.Host.host_id).where(tables.Host.state == HostState.DELETED)
        for row in await self._idle_rows(Row.host_id.in_(deleted)):
            await self._believe(row, State.STOPPED, "its host was deleted", None)

    async def _finish_deletions(self) -> None:
        """Deletions of templates that their replica did not live to finish."""
        rows = await self._templates.half_deleted()
        for _, template_id in self._half_deleted.lasting({("", each) for each in rows}, of=""):
            await self._templates.finish_deletion(rows[template_id])

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
            for row in (await session.scalars(query.with_for_update())).all():
                reason = f"its host {host.name} cannot be reached"
                await observe(session, row, State.MISSING, reason=reason)
                events.record(
                    session, row.team_id, "sandbox.missing", row.sandbox_id, state=row.state
                )
        self._events.wake()

    # One host that answers.

    async def _judge(self, host: tables.Host, row: Row, infos: Mapping[str, SandboxInfo]) -> bool:
        """Whether the row was not what its host has, and so is dealt with."""
        state, info = State(row.state), infos.get(row.sandbox_id)
        if state in TRANSITIONAL and time.time() - row.state_at < self._pace.grace_s:
            return True
        if state is State.STOPPING:
            await self._stop(row, info)
            return True
        seen = state_of(info) if info is not None else None
        if seen in TRANSITIONAL:
            return True
        to, reason = _verdict(host, state, info)
        if to is state:
            return False
        if state is State.RUNNING and info is not None and _timed_out(row, info):
            await self._sandboxes.destroy(system(row.team_id), row.sandbox_id, seen=row)
        else:
            await self._believe(row, to, reason, info)
        return True

    async def _believe(self, row: Row, to: State, reason: str, info: SandboxInfo | None) -> None:
        values: dict[str, Any] = {"host_ip": info.address if info is not None else ""}
        if to is State.STOPPED:
            values["ended_at"] = time.time()
        elif to is State.RUNNING and row.started_at is None:
            values["started_at"] = time.time()
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
            await self._sandboxes.destroy(system(row.team_id), row.sandbox_id, seen=row)

    async def _refresh(self, rows: list[Row], infos: Mapping[str, SandboxInfo]) -> None:
        """Keep what changes by itself, of all in one transaction: address, last activity."""
        changed = [
            (row, info)
            for row in rows
            if (info := infos.get(row.sandbox_id)) is not None
            and (row.host_ip, row.last_active_at) != (info.address, float(info.last_active_at))
        ]
        if not changed:
            return
        async with self._db.write() as session:
            for row, info in changed:
                await session.execute(
                    update(Row)
                    .where(Row.sandbox_id == row.sandbox_id, Row.state_at == row.state_at)
                    .values(host_ip=info.address, last_active_at=float(info.last_active_at))
                )

    async def _hold(self, row: Row, infos: Mapping[str, SandboxInfo]) -> None:
        """Have a running sandbox held to its terms, where its host was not told of a change."""
        info = infos.get(row.sandbox_id)
        if row.state != State.RUNNING or info is None or not differences(row, info):
            return
        try:
            await self._sandboxes.hold_again(row.sandbox_id, info)
        except SandmartinError as error:
            _log.warning("sandbox %s is not held to its terms: %s", row.sandbox_id, error)

    async def _end_unknown(
        self, host: tables.Host, agent: Agent, infos: Mapping[str, SandboxInfo]
    ) -> None:
        """End VMs that belong to no row, when they have been there for a while."""
        # Read after the host was asked: a row is there before its VM is.
        query = select(Row.sandbox_id).where(
            Row.sandbox_id.in_(infos), Row.state.in_(ALIVE), Row.host_id == host.host_id
        )
        async with self._db.read() as session:
            known = set(await session.scalars(query))
        unknown = {(host.host_id, each) for each in infos if each not in known}
        for _, sandbox_id in self._unknown.lasting(unknown, of=host.host_id):
            _log.warning("sandbox %s on host %s belongs to nobody", sandbox_id, host.name)
            try:
                await agent.destroy(sandbox_id)
            except NotFound:
                pass
            except SandmartinError as error:
                _log.warning("sandbox %s cannot be ended: %s", sandbox_id, error)


class _Sightings:
    """What ought not to be there, and since when it is seen."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since: dict[tuple[str, str], float] = {}

    def lasting(self, seen: set[tuple[str, str]], *, of: str) -> list[tuple[str, str]]:
        """All that is seen of one host, and has been for long enough."""
        now = time.monotonic()
        for key in [key for key in self._since if key[0] == of and key not in seen]:
            del self._since[key]
        return [key for key in seen if now - self._since.setdefault(key, now) >= self._patience_s]


def _timed_out(row: Row, info: SandboxInfo) -> bool:
    """Whether it idled past a limit that is to end it; the host has put it to sleep."""
    # With a reason it sleeps because of that: a host that was restarted, say.
    idled = state_of(info) is State.PAUSED and row.timeout_s > 0 and not info.reason
    return idled and row.on_timeout == "kill"


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
