"""Acts on sandboxes: how an operation is begun, done on its host, and applied.

A row changes state in the transaction that begins or ends an operation, as `rows` has it. What
came of it is what the host then has.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.operations import Held, Kind, Operations, Overtaken
from sandmartin.control.quotas import Quotas
from sandmartin.control.rows import (
    Row,
    ends_at,
    find,
    moment,
    move,
    observe,
    shape_of,
    state_of,
    tell,
    told_of,
    unfit,
)
from sandmartin.control.states import HOLDING, TRANSITIONAL
from sandmartin.errors import NotFound, SandmartinError, TimedOut, Unavailable
from sandmartin.model import State
from sandmartin.transport.agent import Agent


@dataclass(frozen=True)
class _Outcome:
    """What a sandbox is after an operation, and what it failed with."""

    state: State
    event: str
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    error: SandmartinError | None = None


class Acts:
    """What all operations on sandboxes have in common."""

    def __init__(
        self,
        db: Database,
        operations: Operations,
        hosts: Hosts,
        quotas: Quotas,
        happenings: events.Events,
    ) -> None:
        self._db = db
        self._operations = operations
        self._hosts = hosts
        self._quotas = quotas
        self._events = happenings

    async def get(self, caller: Caller, sandbox_id: str) -> Row:
        """A sandbox of the caller's team, whatever its state. Raises NotFound."""
        async with self._db.read() as session:
            return await find(session, caller, sandbox_id)

    async def _agent(self, row: Row) -> Agent:
        if row.host_id is None:
            raise Unavailable(f"sandbox {row.sandbox_id} has no host")
        return await self._hosts.agent(row.host_id)

    async def _operate(
        self,
        caller: Caller,
        sandbox_id: str,
        kind: Kind,
        sources: Collection[State],
        during: State,
        action: str,
        *,
        values: Mapping[str, Any] | None = None,
        seen: Row | None = None,
        **arguments: Any,
    ) -> Row:
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id, to_change=seen is not None)
            if seen is not None and moment(row) != moment(seen):
                raise Overtaken(f"sandbox {sandbox_id} is not as it was any more")
            held = await self._begin(
                session, row, kind, sources, during, values=values, **arguments
            )
            audit.record(session, caller, f"sandbox.{action}", "sandbox", sandbox_id)
        self._events.wake()
        return await self._finished(caller, held)

    async def _finished(self, caller: Caller, held: Held) -> Row:
        self._events.wake()
        await self._operations.run(held)
        return await self.get(caller, held.sandbox_id)

    async def _begin(
        self,
        session: AsyncSession,
        row: Row,
        kind: Kind,
        sources: Collection[State],
        during: State,
        *,
        values: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Held:
        """Change the state and note the operation, in one transaction. Raises Conflict."""
        if row.state not in sources:
            raise unfit(row, f"be {kind.done}")
        if row.state not in HOLDING:
            # What sleeps is not counted, and is about to wake up.
            await self._quotas.check(session, row.team_id, [shape_of(row)])
        held = self._operations.begin(
            session, row.sandbox_id, kind, state_before=row.state, **arguments
        )
        changes = {**(values or {}), "operation_id": held.operation_id}
        await move(session, row, during, sources=sources, **changes)
        tell(session, row, f"sandbox.{during}")
        return held

    async def _perform(
        self,
        held: Held,
        act: Callable[[Agent, Row], Awaitable[dict[str, Any]]],
        done: State,
        event: str,
        *,
        settle: Callable[[AsyncSession, Row, SandmartinError | None], Awaitable[None]]
        | None = None,
    ) -> None:
        """Do an operation's work on its host and apply what came of it.

        An error that the host reports is applied as what the host then has. Raises it.
        """
        outcome = await self._try(held, act, _Outcome(done, event))
        self._operations.step(f"{held.kind}:done")
        error = outcome.error
        async with self._db.write() as session:
            await self._operations.finish(session, held, error)
            row = await session.get(Row, held.sandbox_id, with_for_update=True)
            assert row is not None
            overtaken = row.operation_id != held.operation_id
            if not overtaken:
                changes = {**outcome.values, "operation_id": None, "reason": outcome.reason}
                if outcome.state is State.RUNNING and held.state_before != State.RUNNING:
                    changes["ends_at"] = ends_at(row.lifetime_s)
                await observe(session, row, outcome.state, **changes)
                told = {"error": error.message} if error else {}
                phases = told_of(held.clock.phases)
                tell(session, row, outcome.event, phases=phases, **told)
            if settle is not None:
                await settle(session, row, error)
        self._operations.step(f"{held.kind}:applied")
        self._events.wake()
        if overtaken or settle is not None:
            await self._end_strays(row, held)
        if error is not None:
            raise error
        if overtaken and settle is None:
            raise _overtaken(held)

    async def _try(
        self,
        held: Held,
        act: Callable[[Agent, Row], Awaitable[dict[str, Any]]],
        outcome: _Outcome,
    ) -> _Outcome:
        """What came of the work. Raises Unavailable, TimedOut when that cannot be known."""
        async with self._db.read() as session:
            row = await session.get(Row, held.sandbox_id)
        if row is None or row.operation_id != held.operation_id:
            return replace(outcome, error=_overtaken(held))
        try:
            agent = await self._agent(row)
        except NotFound as error:
            # Its host was deleted, and all that was on it.
            gone = _Outcome(State.STOPPED, "sandbox.stopped", reason=error.message)
            gone = replace(gone, values={"host_ip": "", "ended_at": time.time()})
            return gone if held.kind is Kind.DESTROY else replace(gone, error=error)
        held.clock.mark("queue")
        try:
            return replace(outcome, values=await act(agent, row))
        except SandmartinError as error:
            if isinstance(error, Unavailable | TimedOut) and not error.answered:
                raise
            held.clock.mark("call")
            # It may have been placed elsewhere meanwhile.
            return await self._seen(await self._agent(row), held, error)

    async def _seen(self, agent: Agent, held: Held, error: SandmartinError) -> _Outcome:
        """What a host has of a sandbox after something failed. Raises Unavailable."""
        infos = {each.sandbox_id: each for each in await agent.list_sandboxes()}
        info = infos.get(held.sandbox_id)
        values: dict[str, Any] = {"host_ip": info.address if info else ""}
        if info is not None:
            state = state_of(info)
        elif held.kind is Kind.DESTROY:
            state = State.STOPPED
            values["ended_at"] = time.time()
        else:
            state = State.ERROR
        if state in TRANSITIONAL:
            raise Unavailable(f"sandbox {held.sandbox_id} is still {state} on its host")
        reason = error.message if state is State.ERROR else ""
        return _Outcome(state, f"sandbox.{state}", values, reason, error)

    async def _end_strays(self, row: Row, held: Held) -> None:
        """End what was made after a destroy had found nothing to end."""
        ids = [held.sandbox_id, *held.arguments.get("children", ())]
        query = select(Row.sandbox_id).where(
            Row.sandbox_id.in_(ids), Row.state.in_({State.STOPPING, State.STOPPED})
        )
        # What is not ended here is unknown to the reconciler, and so ended by it.
        with contextlib.suppress(SandmartinError):
            async with self._db.read() as session:
                ended = (await session.scalars(query)).all()
            agent = await self._agent(row)
            for each in ended:
                await agent.destroy(each)


def _overtaken(held: Held) -> Overtaken:
    return Overtaken(f"{held.kind} of sandbox {held.sandbox_id} was overtaken by its end")
