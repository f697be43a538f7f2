"""What is made of a sandbox while it lives: forks, checkpoints, templates; and the way back.

Ids of children, checkpoints and templates are chosen before their host is asked, where they can
be, so that a try whose answer was lost finds what it has made.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events, tables
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.operations import Held, Kind, Operations
from sandmartin.control.quotas import Quotas
from sandmartin.control.repeats import Repeats
from sandmartin.control.requests import NewChildren, keys_of_children
from sandmartin.control.rows import (
    Row,
    child_of,
    find,
    placed,
    settle_child,
    shape_of,
    state_of,
    tell,
)
from sandmartin.control.scheduler import check_takes_new
from sandmartin.control.states import TRANSITIONAL
from sandmartin.control.templates import Hidden, Templates
from sandmartin.control.terms import Terms
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    NotFound,
    SandmartinError,
    TimedOut,
    ToolFailed,
    Unavailable,
)
from sandmartin.model import State, new_sandbox_id
from sandmartin.phases import Phase
from sandmartin.transport import Checkpoint
from sandmartin.transport.agent import Agent

Settle = Callable[[AsyncSession, Row, SandmartinError | None], Awaitable[None]]


class Copies(Terms):
    """Forks, checkpoints and templates of sandboxes."""

    def __init__(
        self,
        db: Database,
        operations: Operations,
        hosts: Hosts,
        templates: Templates,
        quotas: Quotas,
        happenings: events.Events,
    ) -> None:
        super().__init__(db, operations, hosts, quotas, happenings)
        self._templates = templates
        self._repeats = Repeats(db, operations)
        operations.register(Kind.FORK, self._do_fork)
        operations.register(Kind.SNAPSHOT, self._do_snapshot)
        operations.register(Kind.CHECKPOINT, self._do_checkpoint)
        operations.register(Kind.ROLLBACK, self._do_rollback)
        operations.register(Kind.FLATTEN, self._do_flatten)

    # Forks.

    async def fork(
        self, caller: Caller, asked: NewChildren, idempotency_key: str = ""
    ) -> Sequence[Row]:
        """Sandboxes that go on from where this one is, which goes on too.

        The same key and request give the same ones. One that could not be made is in state
        `error`. Raises NotFound, Conflict (also where its host is drained), Exhausted.
        """
        keys = keys_of_children(idempotency_key, asked.count) if idempotency_key else []
        begun = await self._repeats.begin(
            caller,
            keys,
            asked.digest(),
            lambda session: self._begin_fork(session, caller, asked, keys),
        )
        if not isinstance(begun, Held):
            return begun
        self._events.wake()
        await self._operations.run(begun)
        ids: list[str] = begun.arguments["children"]
        async with self._db.read() as session:
            rows = await session.scalars(select(Row).where(Row.sandbox_id.in_(ids)))
            return sorted(rows, key=lambda each: ids.index(each.sandbox_id))

    async def _begin_fork(
        self, session: AsyncSession, caller: Caller, asked: NewChildren, keys: Sequence[str]
    ) -> Held:
        hashed = asked.digest() if keys else None
        ids = [new_sandbox_id() for _ in range(asked.count)]
        row = await find(session, caller, asked.sandbox_id)
        await check_takes_new(session, row)
        limits = {"timeout_s": asked.timeout_s, "lifetime_s": asked.lifetime_s}
        children = [child_of(row, each, caller, **limits) for each in ids]
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
        for number, child in enumerate(children):
            child.operation_id = held.operation_id
            child.idempotency_key = keys[number] if keys else None
            child.request_hash = hashed
            session.add(child)
            tell(session, child, "sandbox.starting", parent=row.sandbox_id)
        audit.record(session, caller, "sandbox.forked", "sandbox", row.sandbox_id, children=ids)
        return held

    async def _do_fork(self, held: Held) -> None:
        made: dict[str, str | SandmartinError] = {}
        phases: dict[str, tuple[Phase, ...]] = {}

        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            ids: list[str] = held.arguments["children"]
            made.update(await self._children_there(agent, ids) if held.attempts > 1 else {})
            missing = tuple(each for each in ids if each not in made)
            if missing:
                queued = held.clock.phases
                for child in await agent.fork(row.sandbox_id, missing, held.arguments["timeout_s"]):
                    made[child.sandbox_id] = child.error or child.address
                    phases[child.sandbox_id] = (*queued, *child.phases)
                held.clock.mark("fork")
            if any(isinstance(each, AlreadyExists) for each in made.values()):
                raise Unavailable("a try before this one is still making them")
            return {}

        async def settle(session: AsyncSession, _: Row, error: SandmartinError | None) -> None:
            for each in held.arguments["children"]:
                child = await session.get(Row, each)
                if child is None or child.operation_id != held.operation_id:
                    continue
                outcome = made.get(each, error or Unavailable("it was not made"))
                await settle_child(session, child, outcome, phases.get(each, ()))

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

    # Checkpoints.

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
            held.clock.include(made[0].phases, "call")
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
            if held.state_before == State.PAUSED:
                await self._hold_asleep(agent, row)
            woken = await agent.rollback(row.sandbox_id, held.arguments["checkpoint_id"])
            held.clock.include(woken.phases, "call")
            return placed(woken)

        await self._perform(held, act, State.RUNNING, "sandbox.rolled_back")

    # Templates.

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
        return await self._made(held, template)

    async def keep(self, caller: Caller, sandbox_id: str, hidden: Hidden) -> tables.Template:
        """Keep where a running sandbox of a build is; it goes on. Raises NotFound, Conflict."""
        return await self._keep(caller, sandbox_id, hidden, Kind.SNAPSHOT, live=True)

    async def flatten(self, caller: Caller, sandbox_id: str, hidden: Hidden) -> tables.Template:
        """Make an image of the disk of a running sandbox of a build, and end it.

        Raises NotFound, Conflict.
        """
        return await self._keep(caller, sandbox_id, hidden, Kind.FLATTEN)

    async def _keep(
        self, caller: Caller, sandbox_id: str, hidden: Hidden, kind: Kind, **arguments: Any
    ) -> tables.Template:
        async with self._db.write() as session:
            row = await find(session, caller, sandbox_id)
            template = await self._templates.add_hidden(session, caller, row, hidden)
            held = await self._begin(
                session,
                row,
                kind,
                {State.RUNNING},
                State.SNAPSHOTTING,
                template_id=template.template_id,
                agent_name=template.agent_name,
                **arguments,
            )
        return await self._made(held, template)

    async def _made(self, held: Held, template: tables.Template) -> tables.Template:
        self._events.wake()
        await self._operations.run(held)
        async with self._db.read() as session:
            made = await session.get(tables.Template, template.template_id)
        if made is None:
            raise NotFound(f"template {template.name!r} was deleted as soon as it was made")
        return made

    async def _do_snapshot(self, held: Held) -> None:
        live = held.arguments["live"]
        size_bytes: list[int] = []

        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            size_bytes.append(await self._make_template(agent, row, held))
            return {} if live else {"host_ip": ""}

        done = State.RUNNING if live else State.PAUSED
        settle = self._settling(held, size_bytes)
        await self._perform(held, act, done, "template.created", settle=settle)

    async def _do_flatten(self, held: Held) -> None:
        size_bytes: list[int] = []

        async def act(agent: Agent, row: Row) -> dict[str, Any]:
            name = held.arguments["agent_name"]
            before = await _made_before(agent, row, name) if held.attempts > 1 else None
            size_bytes.append(
                await agent.flatten(row.sandbox_id, name) if before is None else before
            )
            return {"host_ip": "", "ended_at": time.time()}

        settle = self._settling(held, size_bytes)
        await self._perform(held, act, State.STOPPED, "sandbox.stopped", settle=settle)

    def _settling(self, held: Held, size_bytes: Sequence[int]) -> Settle:
        """Apply whether a template was made, with the operation that was to make it."""

        async def settle(session: AsyncSession, row: Row, error: SandmartinError | None) -> None:
            assert row.host_id is not None
            template_id = held.arguments["template_id"]
            if error is None:
                await self._templates.made(session, template_id, row.host_id, size_bytes[0])
            else:
                await self._templates.forget(session, template_id)

        return settle

    async def _make_template(self, agent: Agent, row: Row, held: Held) -> int:
        """Make it, or find what a try whose answer was lost has made; its size."""
        name, live = held.arguments["agent_name"], held.arguments["live"]
        if held.attempts > 1 and (size_bytes := await _made_before(agent, row, name)) is not None:
            return size_bytes
        if held.state_before == State.PAUSED:
            await self._hold_asleep(agent, row)
            woken = await agent.resume(row.sandbox_id, None)
            held.clock.include(woken.phases, "call")
        try:
            made = await agent.create_snapshot(row.sandbox_id, name, live=live)
            held.clock.include(made.phases, "call")
            return made.size_bytes
        except SandmartinError as error:
            if isinstance(error, Unavailable | TimedOut) and not error.answered:
                raise
            size_bytes = await _made_before(agent, row, name)
            if size_bytes is None:
                raise
            return size_bytes


async def _made_before(agent: Agent, row: Row, name: str) -> int | None:
    """Size of a template, if it was made. Raises Unavailable while somebody is at it."""
    for info in await agent.list_sandboxes():
        if info.sandbox_id == row.sandbox_id and state_of(info) in TRANSITIONAL:
            raise Unavailable(f"sandbox {row.sandbox_id} is still {info.state} on its host")
    sizes = {each.name: each.size_bytes for each in await agent.list_templates()}
    return sizes.get(name)
