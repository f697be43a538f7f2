"""Sandboxes: their rows, what may be done to them, and how a row and its VM stay one.

A row changes state in the transaction that begins or ends an operation, as `rows` has it. A destroy
takes a sandbox from whatever else is done to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events, tables
from sandmartin.control.caller import Caller, system
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.operations import Held, Kind, Operations, Overtaken
from sandmartin.control.quotas import Quotas
from sandmartin.control.requests import Filter, NewRow, Page, need_of, spec_of
from sandmartin.control.rows import (
    Row,
    child_of,
    cursor_of,
    find,
    moment,
    move,
    observe,
    read_cursor,
    settle_child,
    shape_of,
    state_of,
    tell,
    unfit,
)
from sandmartin.control.scheduler import Need, choose_host
from sandmartin.control.seal import Sealer
from sandmartin.control.states import HOLDING, TRANSITIONAL
from sandmartin.control.templates import Templates, find_template
from sandmartin.control.usage import Usage
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    TimedOut,
    ToolFailed,
    Unavailable,
)
from sandmartin.model import (
    State,
    new_sandbox_id,
)
from sandmartin.transport import Checkpoint, CreatedSandbox, NewSandbox
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)

_MAX_CHILDREN = 100


@dataclass(frozen=True)
class _Outcome:
    """What a sandbox is after an operation, and what it failed with."""

    state: State
    event: str
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    error: SandmartinError | None = None


class Sandboxes:
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
    ) -> None:
        self._db = db
        self._operations = operations
        self._hosts = hosts
        self._templates = templates
        self._quotas = quotas
        self._events = happenings
        self._usage = usage
        self._sealer = sealer
        works = {
            Kind.CREATE: self._do_create,
            Kind.PAUSE: self._do_pause,
            Kind.RESUME: self._do_resume,
            Kind.DESTROY: self._do_destroy,
            Kind.FORK: self._do_fork,
            Kind.SNAPSHOT: self._do_snapshot,
            Kind.CHECKPOINT: self._do_checkpoint,
            Kind.ROLLBACK: self._do_rollback,
        }
        for kind, work in works.items():
            operations.register(kind, work)

    # Looking.

    async def get(self, caller: Caller, sandbox_id: str) -> Row:
        """A sandbox of the caller's team, whatever its state. Raises NotFound."""
        async with self._db.read() as session:
            return await find(session, caller, sandbox_id)

    async def list(self, caller: Caller, wanted: Filter) -> Page:
        """Sandboxes of the caller's team, newest first. Raises Invalid, Denied."""
        query = select(Row).where(Row.state.in_(sorted(wanted.states)))
        if wanted.all_teams:
            caller.require_admin()
        else:
            query = query.where(Row.team_id == caller.team_id)
        for key, value in wanted.labels.items():
            query = query.where(Row.labels[key].as_string() == value)
        if wanted.cursor:
            query = query.where(tuple_(Row.created_at, Row.sandbox_id) < read_cursor(wanted.cursor))
        query = query.order_by(Row.created_at.desc(), Row.sandbox_id.desc())
        async with self._db.read() as session:
            rows = (await session.scalars(query.limit(wanted.limit + 1))).all()
        shown = rows[: wanted.limit]
        more = len(rows) > wanted.limit
        return Page(rows=shown, next=cursor_of(shown[-1]) if more else "")

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

    async def checkpoints(self, caller: Caller, sandbox_id: str) -> tuple[Checkpoint, ...]:
        """Oldest first. Raises NotFound, Unavailable."""
        row = await self.get(caller, sandbox_id)
        if row.state == State.STOPPED:
            return ()
        return await (await self._agent(row)).list_checkpoints(sandbox_id)

    async def delete_checkpoint(self, caller: Caller, sandbox_id: str, checkpoint_id: str) -> None:
        """Forget a checkpoint. Raises NotFound, Conflict, Unavailable."""
        row = await self.get(caller, sandbox_id)
        await (await self._agent(row)).delete_checkpoint(sandbox_id, checkpoint_id)
        async with self._db.write() as session:
            audit.record(
                session,
                caller,
                "checkpoint.deleted",
                "sandbox",
                sandbox_id,
                checkpoint_id=checkpoint_id,
            )

    async def _agent(self, row: Row) -> Agent:
        if row.host_id is None:
            raise Unavailable(f"sandbox {row.sandbox_id} has no host")
        return await self._hosts.agent(row.host_id)

    # Creating.

    async def create(self, caller: Caller, new: NewRow, idempotency_key: str = "") -> Row:
        """Start a sandbox; the same key and request give the same sandbox.

        Raises NotFound (template), Invalid, Exhausted, Unavailable; Conflict when the key was
        used for another request.
        """
        if idempotency_key and (row := await self._repeated(caller, new, idempotency_key)):
            return row
        try:
            async with self._db.write() as session:
                held = await self._begin_create(session, caller, new, idempotency_key)
        except IntegrityError:
            # Somebody was faster with the same key.
            if idempotency_key and (row := await self._repeated(caller, new, idempotency_key)):
                return row
            raise
        return await self._finished(caller, held)

    async def _repeated(self, caller: Caller, new: NewRow, key: str) -> Row | None:
        """What a request with the same key has made, once it is there. Raises what it raised."""
        operation = tables.Operation
        query = (
            select(Row, operation.operation_id)
            .outerjoin(
                operation,
                (operation.sandbox_id == Row.sandbox_id) & (operation.kind == Kind.CREATE),
            )
            .where(Row.team_id == caller.team_id, Row.idempotency_key == key)
        )
        async with self._db.read() as session:
            found = (await session.execute(query)).first()
        if found is None:
            return None
        row, operation_id = found
        if row.request_hash != new.digest():
            raise Conflict(
                "this idempotency key was used for another request",
                hint="use a new key for each request",
            )
        if operation_id is not None:
            await self._operations.wait(operation_id)
        return await self.get(caller, row.sandbox_id)

    async def _begin_create(
        self, session: AsyncSession, caller: Caller, new: NewRow, key: str
    ) -> Held:
        template = await find_template(session, caller.team_id, new.template)
        spec = spec_of(new, template)
        await self._quotas.check(session, caller.team_id, [spec])
        need = need_of(spec, template)
        choice = await choose_host(session, need)
        now = time.time()
        row = Row(
            sandbox_id=spec.sandbox_id,
            team_id=caller.team_id,
            host_id=choice.host.host_id,
            template=new.template,
            agent_template=template.agent_name,
            state=State.STARTING,
            state_at=now,
            vcpus=spec.vcpus,
            memory_mb=spec.memory_mb,
            disk_size_mb=spec.disk_size_mb,
            timeout_s=spec.timeout_s,
            on_timeout=new.on_timeout,
            labels=dict(new.labels),
            created_by=caller.actor_id,
            created_at=now,
            idempotency_key=key or None,
            request_hash=new.digest() if key else None,
        )
        session.add(row)
        await session.flush()
        held = self._operations.begin(
            session,
            row.sandbox_id,
            Kind.CREATE,
            state_before=State.STARTING,
            envs=self._sealer.seal(dict(new.envs)).decode(),
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
            )
            made = await self._create_somewhere(agent, row, new, held)
            return {"host_ip": made.address, "started_at": time.time()}

        await self._perform(held, act, State.RUNNING, "sandbox.running")

    async def _create_somewhere(
        self, agent: Agent, row: Row, new: NewSandbox, held: Held
    ) -> CreatedSandbox:
        """Create it where it was placed, or on another host when that one has too little left."""
        refused: set[str] = set()
        while True:
            try:
                return await agent.create(new)
            except AlreadyExists:
                # Made by a try whose answer was lost; what it is now is seen afterwards.
                there = {each.sandbox_id: each for each in await agent.list_sandboxes()}
                info = there.get(row.sandbox_id)
                if info is None or info.state != State.RUNNING:
                    raise
                return CreatedSandbox(
                    sandbox_id=info.sandbox_id, state=info.state, address=info.address
                )
            except Exhausted as error:
                assert row.host_id is not None
                refused.add(row.host_id)
                agent = await self._place_elsewhere(row, held, refused, error)

    async def _place_elsewhere(
        self, row: Row, held: Held, refused: set[str], error: Exhausted
    ) -> Agent:
        """Another host for a sandbox that its own has refused. Raises `error` without one."""
        need = Need(
            template_id=held.arguments["template_id"],
            template=row.template,
            vcpus=row.vcpus,
            memory_mb=row.memory_mb,
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

    async def pause(self, caller: Caller, sandbox_id: str) -> Row:
        """Put a sandbox to sleep. Raises NotFound, Conflict, Unavailable."""
        return await self._operate(
            caller, sandbox_id, Kind.PAUSE, {State.RUNNING}, State.PAUSING, "paused"
        )

    async def _do_pause(self, held: Held) -> None:
        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            await self._usage.flush(agent, row)
            await agent.pause(row.sandbox_id)
            return {"host_ip": ""}

        await self._perform(held, act, State.PAUSED, "sandbox.paused")

    async def resume(self, caller: Caller, sandbox_id: str, timeout_s: int | None = None) -> Row:
        """Wake a sandbox up, with a new idle limit or its own. Raises NotFound, Conflict."""
        if timeout_s is not None and timeout_s < 0:
            raise Invalid(f"timeout_s is {timeout_s}", hint="use 0 for no idle limit")
        values = {} if timeout_s is None else {"timeout_s": timeout_s}
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
            woken = await agent.resume(row.sandbox_id, row.timeout_s)
            return {"host_ip": woken.address}

        await self._perform(held, act, State.RUNNING, "sandbox.resumed")

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
            await agent.destroy(row.sandbox_id)
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

    # Forks, checkpoints, templates.

    async def fork(
        self, caller: Caller, sandbox_id: str, count: int, timeout_s: int | None = None
    ) -> Sequence[Row]:
        """Sandboxes that go on from where this one is, which goes on too.

        One that could not be made is in state `error`. Raises NotFound, Conflict, Exhausted.
        """
        if not 1 <= count <= _MAX_CHILDREN:
            raise Invalid(f"count is {count}", hint=f"use 1 to {_MAX_CHILDREN}")
        ids = [new_sandbox_id() for _ in range(count)]
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id)
            children = [child_of(row, each, caller, timeout_s) for each in ids]
            await self._quotas.check(session, caller.team_id, [shape_of(each) for each in children])
            held = await self._begin(
                session,
                row,
                Kind.FORK,
                {State.RUNNING},
                State.SNAPSHOTTING,
                children=ids,
                timeout_s=children[0].timeout_s,
            )
            for child in children:
                child.operation_id = held.operation_id
                session.add(child)
                tell(session, child, "sandbox.starting", parent=sandbox_id)
            audit.record(session, caller, "sandbox.forked", "sandbox", sandbox_id, children=ids)
        self._events.wake()
        await self._operations.run(held)
        async with self._db.read() as session:
            rows = await session.scalars(select(Row).where(Row.sandbox_id.in_(ids)))
            return sorted(rows, key=lambda each: ids.index(each.sandbox_id))

    async def _do_fork(self, held: Held) -> None:
        made: dict[str, str | SandmartinError] = {}

        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            ids: list[str] = held.arguments["children"]
            made.update(await self._children_there(agent, ids) if held.attempts > 1 else {})
            missing = tuple(each for each in ids if each not in made)
            if missing:
                for child in await agent.fork(row.sandbox_id, missing, held.arguments["timeout_s"]):
                    made[child.sandbox_id] = child.error or child.address
            if any(isinstance(each, AlreadyExists) for each in made.values()):
                raise Unavailable("a try before this one is still making them")
            return {}

        async def settle(session: AsyncSession, _: Row, error: SandmartinError | None) -> None:
            for each in held.arguments["children"]:
                child = await session.get(Row, each)
                if child is None or child.operation_id != held.operation_id:
                    continue
                outcome = made.get(each, error or Unavailable("it was not made"))
                await settle_child(session, child, outcome)

        await self._perform(held, act, State.RUNNING, "sandbox.forked", settle=settle)

    async def _children_there(
        self, agent: Agent, ids: Collection[str]
    ) -> dict[str, str | SandmartinError]:
        """What a try whose answer was lost has made. Raises Unavailable while it is at it."""
        there = [each for each in await agent.list_sandboxes() if each.sandbox_id in ids]
        for each in there:
            if state_of(each) in TRANSITIONAL:
                raise Unavailable(f"sandbox {each.sandbox_id} is still {each.state} on its host")
        return {
            each.sandbox_id: each.address
            if state_of(each) is not State.ERROR
            else ToolFailed(each.reason)
            for each in there
        }

    async def checkpoint(self, caller: Caller, sandbox_id: str, comment: str = "") -> Checkpoint:
        """A snapshot in a sandbox's own history; it goes on. Raises NotFound, Conflict."""
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id)
            held = await self._begin(
                session,
                row,
                Kind.CHECKPOINT,
                {State.RUNNING},
                State.SNAPSHOTTING,
                comment=comment[:1000],
            )
            audit.record(session, caller, "checkpoint.created", "sandbox", sandbox_id)
        self._events.wake()
        checkpoint = await self._operations.run(held)
        if not isinstance(checkpoint, Checkpoint):
            raise Unavailable(
                "the checkpoint was made by another replica", hint="list the checkpoints"
            )
        return checkpoint

    async def _do_checkpoint(self, held: Held) -> Checkpoint:
        made: list[Checkpoint] = []

        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            if held.attempts > 1:
                # Whoever asked is gone, and it may be there already.
                raise Conflict("the answer to a checkpoint was lost")
            made.append(await agent.create_checkpoint(row.sandbox_id, held.arguments["comment"]))
            return {}

        await self._perform(held, act, State.RUNNING, "checkpoint.created")
        return made[0]

    async def rollback(self, caller: Caller, sandbox_id: str, checkpoint_id: str) -> Row:
        """Return to a checkpoint; what came after it is gone. Raises NotFound, Conflict."""
        row = await self.get(caller, sandbox_id)
        known = await (await self._agent(row)).list_checkpoints(sandbox_id)
        if checkpoint_id not in {each.checkpoint_id for each in known}:
            raise NotFound(f"sandbox {sandbox_id} has no checkpoint {checkpoint_id[:80]!r}")
        during = State.PAUSING if row.state == State.RUNNING else State.RESUMING
        return await self._operate(
            caller,
            sandbox_id,
            Kind.ROLLBACK,
            {State(row.state)} & {State.RUNNING, State.PAUSED},
            during,
            "rolled_back",
            checkpoint_id=checkpoint_id,
        )

    async def _do_rollback(self, held: Held) -> None:
        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            woken = await agent.rollback(row.sandbox_id, held.arguments["checkpoint_id"])
            return {"host_ip": woken.address}

        await self._perform(held, act, State.RUNNING, "sandbox.rolled_back")

    async def snapshot(
        self, caller: Caller, sandbox_id: str, name: str, *, live: bool = False
    ) -> tables.Template:
        """Make a template of a sandbox, which is paused then, or goes on if `live`.

        Raises NotFound, Invalid, AlreadyExists, Conflict.
        """
        sources = {State.RUNNING} if live else {State.RUNNING, State.PAUSED}
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id)
            template = await self._templates.add(session, caller, name, row)
            held = await self._begin(
                session,
                row,
                Kind.SNAPSHOT,
                sources,
                State.SNAPSHOTTING,
                template_id=template.template_id,
                agent_name=template.agent_name,
                live=live,
            )
            audit.record(
                session, caller, "template.created", "template", name, sandbox_id=sandbox_id
            )
        self._events.wake()
        await self._operations.run(held)
        async with self._db.read() as session:
            made = await session.get(tables.Template, template.template_id)
        if made is None:
            raise NotFound(f"template {name!r} was deleted as soon as it was made")
        return made

    async def _do_snapshot(self, held: Held) -> None:
        live = held.arguments["live"]
        size_bytes: list[int] = []

        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            size_bytes.append(await self._make_template(agent, row, held))
            return {} if live else {"host_ip": ""}

        async def settle(session: AsyncSession, row: Row, error: SandmartinError | None) -> None:
            assert row.host_id is not None
            template_id = held.arguments["template_id"]
            if error is None:
                await self._templates.made(session, template_id, row.host_id, size_bytes[0])
            else:
                await self._templates.forget(session, template_id)

        done = State.RUNNING if live else State.PAUSED
        await self._perform(held, act, done, "template.created", settle=settle)

    async def _make_template(self, agent: Agent, row: Row, held: Held) -> int:
        """Make it, or find what a try whose answer was lost has made; its size."""
        name, live = held.arguments["agent_name"], held.arguments["live"]
        if held.attempts > 1 and (size_bytes := await _made_before(agent, row, name)) is not None:
            return size_bytes
        if held.state_before == State.PAUSED:
            await agent.resume(row.sandbox_id, None)
        try:
            return (await agent.create_snapshot(row.sandbox_id, name, live=live)).size_bytes
        except SandmartinError as error:
            if isinstance(error, Unavailable | TimedOut) and not error.answered:
                raise
            size_bytes = await _made_before(agent, row, name)
            if size_bytes is None:
                raise
            return size_bytes

    # How all of it goes.

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
        **arguments: Any,
    ) -> Row:
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id)
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
                await observe(session, row, outcome.state, **changes)
                told = {"error": error.message} if error else {}
                tell(session, row, outcome.event, **told)
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
        try:
            return replace(outcome, values=await act(agent, row))
        except SandmartinError as error:
            if isinstance(error, Unavailable | TimedOut) and not error.answered:
                raise
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


async def _made_before(agent: Agent, row: Row, name: str) -> int | None:
    """Size of a template, if it was made. Raises Unavailable while somebody is at it."""
    for info in await agent.list_sandboxes():
        if info.sandbox_id == row.sandbox_id and state_of(info) in TRANSITIONAL:
            raise Unavailable(f"sandbox {row.sandbox_id} is still {info.state} on its host")
    sizes = {each.name: each.size_bytes for each in await agent.list_templates()}
    return sizes.get(name)


def _overtaken(held: Held) -> Overtaken:
    return Overtaken(f"{held.kind} of sandbox {held.sandbox_id} was overtaken by its end")
