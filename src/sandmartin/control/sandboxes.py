"""Sandboxes: how they are found, created, put to sleep, woken, and ended.

A destroy takes a sandbox from whatever else is done to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events
from sandmartin.control.artefacts import Artefacts, NotBrought
from sandmartin.control.caller import Caller, system
from sandmartin.control.copies import Copies
from sandmartin.control.db import Database
from sandmartin.control.defaults import account
from sandmartin.control.hosts import Hosts
from sandmartin.control.moves import Moves
from sandmartin.control.operations import Held, Kind, Operations, Unfinished
from sandmartin.control.quotas import Quotas
from sandmartin.control.requests import (
    Filter,
    NewRow,
    Page,
    first_envs,
    keys_of_children,
    need_of,
    row_of,
    spec_of,
)
from sandmartin.control.rows import (
    Row,
    cursor_of,
    find,
    moment,
    observe,
    placed,
    read_cursor,
    tell,
    unfit,
)
from sandmartin.control.scheduler import Need, choose_host
from sandmartin.control.seal import Sealer
from sandmartin.control.templates import Templates, find_template
from sandmartin.control.terms import policy_of
from sandmartin.control.usage import Usage
from sandmartin.errors import (
    AlreadyExists,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    Unavailable,
)
from sandmartin.model import State
from sandmartin.transport import CreatedSandbox, MetricPoint, NewSandbox
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)


class Sandboxes(Copies):
    """The sandboxes of all teams."""

    def __init__(
        self,
        db: Database,
        operations: Operations,
        hosts: Hosts,
        templates: Templates,
        quotas: Quotas,
        happenings: events.Events,
        usage: Usage,
        sealer: Sealer,
        artefacts: Artefacts,
    ) -> None:
        super().__init__(db, operations, hosts, templates, quotas, happenings)
        self._artefacts = artefacts
        self._moves = Moves(db, hosts, templates, artefacts)
        self._usage = usage
        self._sealer = sealer
        operations.register(Kind.CREATE, self._do_create)
        operations.register(Kind.PAUSE, self._do_pause)
        operations.register(Kind.RESUME, self._do_resume)
        operations.register(Kind.DESTROY, self._do_destroy)

    # Looking.

    async def list(self, caller: Caller, wanted: Filter) -> Page:
        """Sandboxes of the caller's team in order of creation. Raises Invalid, Denied."""
        query = select(Row).where(Row.state.in_(sorted(wanted.states)), Row.build_id.is_(None))
        if wanted.all_teams:
            caller.require_admin()
        else:
            query = query.where(Row.team_id == caller.team_id)
        if key := wanted.idempotency_key:
            query = query.where(Row.idempotency_key.in_([key, *keys_of_children(key)]))
        for key, value in wanted.labels.items():
            query = query.where(Row.labels[key].as_string() == value)
        if wanted.template:
            query = query.where(Row.template == wanted.template)
        if wanted.started_after is not None:
            started_at = func.coalesce(Row.started_at, Row.created_at)
            query = query.where(started_at > wanted.started_after)
        query = _in_order(query, wanted)
        async with self._db.read() as session:
            rows = (await session.scalars(query.limit(wanted.limit + 1))).all()
        shown = rows[: wanted.limit]
        more = len(rows) > wanted.limit
        return Page(rows=shown, next=cursor_of(shown[-1]) if more else "")

    async def count(self, caller: Caller, states: Collection[State]) -> int:
        """How many sandboxes of the caller's team are in these states."""
        query = select(func.count()).where(
            Row.team_id == caller.team_id,
            Row.state.in_(sorted(states)),
            Row.build_id.is_(None),
        )
        async with self._db.read() as session:
            return await session.scalar(query) or 0

    async def settled(self, caller: Caller, sandbox_id: str) -> Row:
        """A sandbox once nothing is being done to it, or it is over.

        What came of that is for whoever had asked for it. Raises NotFound, and Unavailable when
        it does not end.
        """
        while True:
            row = await self.get(caller, sandbox_id)
            if row.operation_id is None or row.state in {State.STOPPING, State.STOPPED}:
                return row
            try:
                await self._operations.wait(row.operation_id)
            except Unfinished:
                raise
            except SandmartinError as error:
                _log.info("sandbox %s is as it is: %s", sandbox_id, error)

    async def points(
        self, caller: Caller, sandbox_id: str, tier: str, since: float
    ) -> tuple[Row, Sequence[MetricPoint]]:
        """A sandbox, and what it used since a time; of one that sleeps or is over, until then.

        Raises NotFound, Unavailable.
        """
        row = await self.get(caller, sandbox_id)
        points = await self._usage.points(sandbox_id, tier, since)
        if row.state == State.RUNNING:
            # Its host knows what came after the last pause.
            known_until = points[-1].timestamp if points else 0
            live = await (await self._agent(row)).metrics(sandbox_id, tier)
            points += [each for each in live if each.timestamp > max(since, known_until)]
        return row, points

    async def on_behalf(self, caller: Caller, sandbox_id: str) -> Caller:
        """An administrator of the platform, acting for the team that has a sandbox.

        Raises NotFound, Denied.
        """
        caller.require_admin()
        async with self._db.read() as session:
            row = await session.get(Row, sandbox_id)
        if row is None:
            raise NotFound(f"there is no sandbox {sandbox_id[:80]!r}")
        return caller.for_team(row.team_id)

    async def reach(self, caller: Caller, sandbox_id: str) -> Agent:
        """The agent of a running sandbox, to do something inside it.

        Raises NotFound, Conflict, Unavailable.
        """
        async with self._db.read() as session:
            row = await find(session, caller, sandbox_id)
        if row.state != State.RUNNING:
            raise unfit(row, "be used")
        return await self._agent(row)

    # Creating.

    async def create(self, caller: Caller, new: NewRow, idempotency_key: str = "") -> Row:
        """Start a sandbox; the same key and request give the same sandbox.

        Raises NotFound (template), Invalid, Exhausted, Unavailable; Conflict when the key was
        used for another request.
        """
        keys = [idempotency_key] if idempotency_key else []
        begun = await self._repeats.begin(
            caller,
            keys,
            new.digest(),
            lambda session: self._begin_create(session, caller, new, idempotency_key),
        )
        return await self._finished(caller, begun) if isinstance(begun, Held) else begun[0]

    async def _begin_create(
        self, session: AsyncSession, caller: Caller, new: NewRow, key: str
    ) -> Held:
        template = await find_template(
            session, caller.team_id, new.template, template_id=new.template_id
        )
        spec = spec_of(new, template)
        await self._quotas.check(session, caller.team_id, [spec])
        need = need_of(spec, template, stored=self._artefacts.stores)
        choice = await choose_host(session, need)
        row = row_of(new, template, spec, caller, choice.host.host_id)
        if key:
            row.idempotency_key, row.request_hash = key, new.digest()
        session.add(row)
        await session.flush()
        held = self._operations.begin(
            session,
            row.sandbox_id,
            Kind.CREATE,
            state_before=State.STARTING,
            envs=self._sealer.seal(first_envs(new, template)).decode(),
            template_id=template.template_id,
        )
        row.operation_id = held.operation_id
        data = {"host": choice.host.name, "load": choice.load, "bottleneck": choice.bottleneck}
        tell(session, row, "sandbox.starting", template=row.template, others=choice.others, **data)
        audit.record(
            session,
            caller,
            "sandbox.created",
            "sandbox",
            row.sandbox_id,
            template=row.template,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
        )
        return held

    async def _do_create(self, held: Held) -> None:
        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            envs = self._sealer.unseal(held.arguments["envs"].encode())
            new = NewSandbox(
                sandbox_id=row.sandbox_id,
                template=row.agent_template,
                vcpus=row.vcpus,
                memory_mb=row.memory_mb,
                disk_size_mb=row.disk_size_mb,
                timeout_s=row.timeout_s,
                envs=envs,
                network=policy_of(row),
                default_user=account(row.defaults.get("user", "")),
                default_workdir=row.defaults.get("workdir", ""),
            )
            made = await self._create_somewhere(agent, row, new, held)
            return {**placed(made), "started_at": time.time()}

        await self._perform(held, act, State.RUNNING, "sandbox.running")

    async def _create_somewhere(
        self, agent: Agent, row: Row, new: NewSandbox, held: Held
    ) -> CreatedSandbox:
        """Create it where it was placed, or on another host when that one has too little left."""
        refused: set[str] = set()
        while True:
            try:
                await self._artefacts.bring(agent, row, held.arguments["template_id"])
                held.clock.mark("template")
                made = await agent.create(new)
                held.clock.include(made.phases, "call")
                return made
            except AlreadyExists:
                # Made by a try whose answer was lost; what it is now is seen afterwards.
                there = {each.sandbox_id: each for each in await agent.list_sandboxes()}
                info = there.get(row.sandbox_id)
                if info is None or info.state != State.RUNNING:
                    raise
                return CreatedSandbox(
                    sandbox_id=info.sandbox_id,
                    state=info.state,
                    address=info.address,
                    envd_version=info.envd_version,
                )
            except (Exhausted, NotBrought) as error:
                assert row.host_id is not None
                refused.add(row.host_id)
                why = error.cause if isinstance(error, NotBrought) else error
                agent = await self._place_elsewhere(row, held, refused, why)
                held.clock.mark("refused")

    async def _place_elsewhere(
        self, row: Row, held: Held, refused: set[str], error: SandmartinError
    ) -> Agent:
        """Another host for a sandbox that its own has refused. Raises `error` without one."""
        need = Need(
            template_id=held.arguments["template_id"],
            template=row.template,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
            stored=self._artefacts.stores,
        )
        async with self._db.write() as session:
            try:
                choice = await choose_host(session, need, without=refused)
            except SandmartinError:
                raise error from None
            host_id = choice.host.host_id
            await observe(session, row, State.STARTING, host_id=host_id)
            tell(session, row, "sandbox.moved", host=choice.host.name, reason=error.message)
        return await self._hosts.agent(host_id)

    # Pausing, resuming, ending.

    async def pause(self, caller: Caller, sandbox_id: str, *, seen: Row | None = None) -> Row:
        """Put a sandbox to sleep; with `seen` only if it still is as it was seen.

        Raises NotFound, Conflict, Unavailable.
        """
        return await self._operate(
            caller, sandbox_id, Kind.PAUSE, {State.RUNNING}, State.PAUSING, "paused", seen=seen
        )

    async def _do_pause(self, held: Held) -> None:
        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            await self._usage.flush(agent, row)
            held.clock.mark("metrics")
            held.clock.include(await agent.pause(row.sandbox_id), "call")
            return {"host_ip": ""}

        await self._perform(held, act, State.PAUSED, "sandbox.paused")

    async def resume(
        self,
        caller: Caller,
        sandbox_id: str,
        timeout_s: int | None = None,
        lifetime_s: int | None = None,
    ) -> Row:
        """Wake a sandbox up, with new limits or its own. Raises NotFound, Conflict."""
        if timeout_s is not None and timeout_s < 0:
            raise Invalid(f"timeout_s is {timeout_s}", hint="use 0 for no idle limit")
        limits = {"timeout_s": timeout_s, "lifetime_s": lifetime_s}
        values = {name: value for name, value in limits.items() if value is not None}
        return await self._operate(
            caller,
            sandbox_id,
            Kind.RESUME,
            {State.PAUSED},
            State.RESUMING,
            "resumed",
            values=values,
        )

    async def _do_resume(self, held: Held) -> None:
        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            source, due = agent, await self._moves.is_due(row)
            if due:
                agent = await self._moves.bring(source, row) or source
                held.clock.mark("move")
            try:
                woken = await self._wake(agent, row)
            except Exhausted:
                # Where it is has no room for it.
                agent = (None if due else await self._moves.bring(source, row)) or source
                if agent is source:
                    raise
                held.clock.mark("move")
                woken = await self._wake(agent, row)
            held.clock.include(woken.phases, "call")
            if agent is not source:
                await self._moves.leave(source, row)
            return placed(woken)

        await self._perform(held, act, State.RUNNING, "sandbox.resumed")

    async def _wake(self, agent: Agent, row: Row) -> CreatedSandbox:
        await self._hold_asleep(agent, row)
        return await agent.resume(row.sandbox_id, row.timeout_s)

    async def destroy(self, caller: Caller, sandbox_id: str, *, seen: Row | None = None) -> None:
        """End a sandbox, whatever is done to it. Already gone is success.

        With `seen` only if it still is as it was seen. Raises NotFound, Unavailable when it could
        not be noted. Where its host cannot be reached it is ended as soon as it can.
        """
        held = await self._begin_destroy(caller, sandbox_id, seen)
        try:
            if isinstance(held, Held):
                await self._operations.run(held)
            elif held:
                await self._operations.wait(held)
        except Unavailable as error:
            _log.info("sandbox %s is destroyed later: %s", sandbox_id, error)

    async def _begin_destroy(
        self, caller: Caller, sandbox_id: str, seen: Row | None
    ) -> Held | str | None:
        """A new operation, or the id of one that is under way; None when it is gone already."""
        async with self._db.write() as session:
            # Nothing else gets between reading and writing: a destroy never loses.
            row = await find(session, caller, sandbox_id, to_change=True)
            if row.state == State.STOPPED or (seen is not None and moment(row) != moment(seen)):
                return None
            if row.state == State.STOPPING and row.operation_id is not None:
                return row.operation_id
            held = self._operations.begin(session, sandbox_id, Kind.DESTROY, state_before=row.state)
            await observe(session, row, State.STOPPING, operation_id=held.operation_id)
            tell(session, row, "sandbox.stopping")
            audit.record(session, caller, "sandbox.destroyed", "sandbox", sandbox_id)
        self._events.wake()
        return held

    async def _do_destroy(self, held: Held) -> None:
        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            await self._usage.flush(agent, row)
            held.clock.mark("metrics")
            await agent.destroy(row.sandbox_id)
            held.clock.mark("end")
            return {"host_ip": "", "ended_at": time.time()}

        await self._perform(held, act, State.STOPPED, "sandbox.stopped")

    async def end_all(self, *, kill: bool) -> int:
        """Pause or destroy all that runs, at once; how many that were."""
        async with self._db.read() as session:
            rows = (await session.scalars(select(Row).where(Row.state == State.RUNNING))).all()
        act = self.destroy if kill else self.pause
        ends = [act(system(row.team_id), row.sandbox_id) for row in rows]
        results = await asyncio.gather(*ends, return_exceptions=True)
        failures = [each for each in results if isinstance(each, BaseException)]
        for failure in failures:
            _log.warning("a sandbox is left as it is: %s", failure)
        return len(rows) - len(failures)


def _in_order(query: Select[Row], wanted: Filter) -> Select[Row]:
    """After the page before, if there was one."""
    key, columns = tuple_(Row.created_at, Row.sandbox_id), (Row.created_at, Row.sandbox_id)
    after = read_cursor(wanted.cursor) if wanted.cursor else None
    if wanted.oldest_first:
        query = query if after is None else query.where(key > after)
        return query.order_by(*columns)
    query = query if after is None else query.where(key < after)
    return query.order_by(*(each.desc() for each in columns))
