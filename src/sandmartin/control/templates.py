"""Templates: what sandboxes start from, each a team's or the platform's.

Hosts know no teams: there a team's template has a name made from its id. The platform's templates
are those that hosts bring with them, under their own names; they are nobody's to change. What is
half deleted when a replica dies, or is on a host without a row, is ended by the reconciler.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events, tables
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.rows import read_cursor
from sandmartin.control.states import ALIVE, TemplateState
from sandmartin.control.tables import PLATFORM_TEAM_ID, TemplatePlacement, TemplateTag
from sandmartin.errors import AlreadyExists, Conflict, Denied, NotFound, SandmartinError
from sandmartin.model import DEFAULT_TAG, check_name, random_id, split_tag
from sandmartin.transport import TemplateInfo as AgentTemplate
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)

Row = tables.Template
#: A team's template on a host.
_OF_A_TEAM = "t-"
#: Nobody deletes this one of the platform's.
_DEFAULT = "base"


async def find_template(
    session: AsyncSession,
    team_id: str,
    name: str,
    *,
    template_id: str = "",
    to_change: bool = False,
    lock: bool = True,
) -> Row:
    """The template that a team means by `name`, or `name:tag`: its own, or the platform's.

    What has no name is found by its id. It stays as it is until the transaction's end, and is
    nobody else's if it is `to_change`. Raises NotFound.
    """
    query = select(Row).where(Row.team_id.in_([team_id, PLATFORM_TEAM_ID]))
    if template_id:
        query = query.where(Row.template_id == template_id, Row.state != TemplateState.RETIRED)
    else:
        base, tag = split_tag(name)
        tagged = select(TemplateTag.template_id).where(
            TemplateTag.team_id == Row.team_id, TemplateTag.name == base, TemplateTag.tag == tag
        )
        query = query.where(
            or_(Row.name == tagged_name(base, tag), Row.template_id.in_(tagged)),
        )
    if lock:
        query = query.with_for_update(read=not to_change)
    rows = {row.team_id: row for row in await session.scalars(query)}
    row = rows.get(team_id) or rows.get(PLATFORM_TEAM_ID)
    if row is None or (row.state == TemplateState.DELETING and not to_change):
        raise NotFound(
            f"there is no template {name!r}", hint="`sandmartin template ls` shows those there are"
        )
    if row.state == TemplateState.MAKING:
        raise Conflict(f"template {name!r} is still being made", hint="try again in a moment")
    return row


def tagged_name(name: str, tag: str) -> str:
    """The shortest way to say `name:tag`."""
    return name if tag == DEFAULT_TAG else f"{name}:{tag}"


def new_agent_name() -> str:
    """A name on hosts for a template of a team."""
    return f"{_OF_A_TEAM}{random_id(20)}"


def hidden_name(template_id: str) -> str:
    """What stands in the place of a name where there is none; nobody can ask for it."""
    return f"~{template_id}"


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What a build makes, for itself and for builds to come."""

    build_id: str
    #: `snapshot`, or `image`.
    kind: str
    #: By which builds to come find it; empty for what only this one needs.
    layer_key: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


def new_row(caller: Caller, sandbox: tables.Sandbox | None, kind: str) -> Row:
    """A template that is about to be made, of a sandbox if of any, without a name."""
    template_id = str(uuid4())
    row = Row(
        template_id=template_id,
        team_id=caller.team_id,
        name=hidden_name(template_id),
        agent_name=new_agent_name(),
        kind=kind,
        state=TemplateState.MAKING,
        created_at=time.time(),
        created_by=caller.actor_id,
    )
    if sandbox is not None:
        row.disk_size_mb, row.sandbox_id = sandbox.disk_size_mb, sandbox.sandbox_id
        row.network, row.defaults = sandbox.network, dict(sandbox.defaults)
        if kind == "snapshot":
            row.vcpus, row.memory_mb = sandbox.vcpus, sandbox.memory_mb
    return row


class Templates:
    """The templates of all teams."""

    def __init__(self, db: Database, hosts: Hosts) -> None:
        self._db = db
        self._hosts = hosts

    async def list(self, caller: Caller, kind: str = "") -> Sequence[Row]:
        """The team's own and the platform's, newest first."""
        query = select(Row).where(
            Row.team_id.in_([caller.team_id, PLATFORM_TEAM_ID]), Row.state == TemplateState.READY
        )
        if kind:
            query = query.where(Row.kind == kind)
        async with self._db.read() as session:
            return (await session.scalars(query.order_by(Row.created_at.desc()))).all()

    async def get(self, caller: Caller, name: str) -> Row:
        """What the caller's team means by a name. Raises NotFound, Conflict."""
        async with self._db.read() as session:
            return await find_template(session, caller.team_id, name, lock=False)

    async def snapshots(
        self, caller: Caller, *, sandbox_id: str, name: str, limit: int, cursor: str
    ) -> tuple[Sequence[Row], str]:
        """The team's templates that were made of sandboxes, newest first, and the next cursor.

        Raises Invalid.
        """
        key = tuple_(Row.created_at, Row.template_id)
        query = select(Row).where(
            Row.team_id == caller.team_id,
            Row.state == TemplateState.READY,
            Row.sandbox_id.is_not(None),
            Row.build_id.is_(None),
        )
        if sandbox_id:
            query = query.where(Row.sandbox_id == sandbox_id)
        if name:
            query = query.where(Row.name == name)
        if cursor:
            query = query.where(key < read_cursor(cursor))
        query = query.order_by(Row.created_at.desc(), Row.template_id.desc()).limit(limit + 1)
        async with self._db.read() as session:
            rows = (await session.scalars(query)).all()
        shown = rows[:limit]
        more = len(rows) > limit
        return shown, f"{shown[-1].created_at!r}_{shown[-1].template_id}" if more else ""

    # Made of a sandbox, in the transactions of the operation that makes it.

    async def add(
        self, session: AsyncSession, caller: Caller, name: str, sandbox: tables.Sandbox
    ) -> Row:
        """A template that is about to be made. Raises Invalid, AlreadyExists."""
        await self.check_new(session, caller, name)
        row = new_row(caller, sandbox, "snapshot")
        row.name = name
        await self._add(session, row)
        return row

    async def add_hidden(
        self,
        session: AsyncSession,
        caller: Caller,
        sandbox: tables.Sandbox | None,
        hidden: Hidden,
    ) -> Row:
        """One that is about to be made for the builds of a team, and has no name."""
        row = new_row(caller, sandbox, hidden.kind)
        row.defaults = dict(hidden.defaults)
        row.build_id, row.layer_key, row.used_at = hidden.build_id, hidden.layer_key, time.time()
        await self._add(session, row)
        return row

    async def _add(self, session: AsyncSession, row: Row) -> None:
        session.add(row)
        try:
            await session.flush()
        except IntegrityError as error:
            # Somebody was faster.
            raise _taken(row.name) from error

    async def check_new(self, session: AsyncSession, caller: Caller, name: str) -> None:
        """Raises Invalid, and AlreadyExists when the team or the platform has it."""
        check_name(name, "template name")
        teams = [caller.team_id, PLATFORM_TEAM_ID]
        tagged = select(TemplateTag.tag).where(
            TemplateTag.team_id.in_(teams), TemplateTag.name == name
        )
        query = select(Row.name).where(Row.team_id.in_(teams), Row.name == name)
        if await session.scalar(query) or await session.scalar(tagged.limit(1)):
            raise _taken(name)

    async def made(
        self, session: AsyncSession, template_id: str, host_id: str, size_bytes: int
    ) -> None:
        """It is there, on one host."""
        row = await session.get(Row, template_id)
        if row is not None:
            hidden = row.name == hidden_name(row.template_id)
            row.state = TemplateState.HIDDEN if hidden else TemplateState.READY
            row.size_bytes = size_bytes
            session.add(TemplatePlacement(template_id=template_id, host_id=host_id))

    async def brought(
        self, session: AsyncSession, caller: Caller, name: str, host_id: str, found: AgentTemplate
    ) -> Row:
        """What somebody has brought is on a host. Raises AlreadyExists."""
        await self.check_new(session, caller, name)
        row = Row(
            template_id=str(uuid4()),
            team_id=caller.team_id,
            name=name,
            agent_name=found.name,
            kind=found.kind,
            state=TemplateState.READY,
            vcpus=found.vcpus,
            memory_mb=found.memory_mb,
            disk_size_mb=found.disk_size_mb,
            size_bytes=found.size_bytes,
            network=None if found.network is None else found.network.to_dict(),
            created_at=time.time(),
            created_by=caller.actor_id,
        )
        await self._add(session, row)
        session.add(TemplatePlacement(template_id=row.template_id, host_id=host_id))
        return row

    async def forget(self, session: AsyncSession, template_id: str) -> None:
        """It was not made."""
        await session.execute(delete(Row).where(Row.template_id == template_id))

    # Deleting.

    async def delete(self, caller: Caller, name: str) -> None:
        """Delete a template of the caller's team, here and on every host that has it.

        Raises NotFound, Denied for one of the platform's, Conflict while something needs it,
        Unavailable when a host that has it cannot be reached.
        """
        async with self._db.write() as session:
            row = await _find_to_delete(session, caller, name)
            await _check_unneeded(session, row)
            row.state = TemplateState.DELETING
            audit.record(session, caller, "template.deleted", "template", name)
        await self._finish_deletion(row)

    async def retire(self, caller: Caller, name: str) -> None:
        """Delete a template as far as anybody can see; its name is free at once.

        Hosts keep it for as long as something needs it. Raises NotFound, Denied.
        """
        async with self._db.write() as session:
            row = await _find_to_delete(session, caller, name)
            await retire(session, row)
            audit.record(session, caller, "template.deleted", "template", name)
            events.record(session, row.team_id, "template.deleted", name=name)
        await self.finish_deletion(row)

    async def _finish_deletion(self, row: Row) -> None:
        """Remove what is marked from every host that has it. Raises what keeps it there."""
        placed = select(TemplatePlacement.host_id).where(
            TemplatePlacement.template_id == row.template_id
        )
        async with self._db.read() as session:
            host_ids = (await session.scalars(placed)).all()
        try:
            for host_id in host_ids:
                # A host that is gone has taken it along.
                with contextlib.suppress(NotFound):
                    await (await self._hosts.agent(host_id)).delete_snapshot(row.agent_name)
        except SandmartinError as error:
            async with self._db.write() as session:
                await session.execute(
                    update(Row)
                    .where(Row.template_id == row.template_id, Row.state == TemplateState.DELETING)
                    .values(state=TemplateState.READY)
                )
            if isinstance(error, Conflict):
                # Whoever asked knows it by another name than the host.
                said = error.message.replace(row.agent_name, row.name)
                raise Conflict(said, hint=error.hint) from error
            raise
        async with self._db.write() as session:
            if await session.get(Row, row.template_id, with_for_update=True) is not None:
                await self.forget(session, row.template_id)
                if row.state != TemplateState.RETIRED:
                    events.record(session, row.team_id, "template.deleted", name=row.name)

    # What a replica that died left, and what no row knows.

    async def half_deleted(self) -> dict[str, Row]:
        """Templates on their way out, by id; not those that are known to be needed."""
        sandbox = tables.Sandbox
        user = select(sandbox.sandbox_id).where(
            sandbox.state.in_(ALIVE),
            or_(
                sandbox.agent_template == Row.agent_name,
                # What it was made of goes on from where it was cut.
                sandbox.sandbox_id == Row.sandbox_id,
            ),
        )
        unneeded = (Row.state == TemplateState.RETIRED) & ~user.exists()
        query = select(Row).where(or_(Row.state == TemplateState.DELETING, unneeded))
        async with self._db.read() as session:
            rows = await session.scalars(query)
            return {row.template_id: row for row in rows}

    async def finish_deletion(self, row: Row) -> None:
        """Delete to the end what nobody does any more; what cannot be deleted stays."""
        try:
            await self._finish_deletion(row)
        except SandmartinError as error:
            _log.info("template %s is not deleted: %s", row.name, error)

    async def unknown(self, found: Sequence[AgentTemplate]) -> set[str]:
        """Which of a host's templates are a team's and have no row, by their names there."""
        names = {each.name for each in found if each.name.startswith(_OF_A_TEAM)}
        async with self._db.read() as session:
            query = select(Row.agent_name).where(Row.agent_name.in_(names))
            return names - set(await session.scalars(query))

    async def end_unknown(self, agent: Agent, name: str) -> None:
        """Delete on a host what no row knows."""
        try:
            await agent.delete_snapshot(name)
        except NotFound:
            pass
        except SandmartinError as error:
            _log.warning("template %s, which is nobody's, is not deleted: %s", name, error)

    # What hosts bring.

    async def placed_on(self, host_id: str) -> set[str]:
        """Ids of the templates that a host is known to have."""
        async with self._db.read() as session:
            return await _placed_on(session, host_id)

    async def sync(
        self, host_id: str, found: Sequence[AgentTemplate], placed_before: Collection[str]
    ) -> None:
        """Note which templates a host has; what it brings itself is the platform's.

        It can only have lost what it was known to have before it was asked.
        """
        try:
            await self._sync(host_id, found, placed_before)
        except IntegrityError:
            # Another replica notes the same just now.
            _log.info("templates of host %s are looked at again later", host_id)

    async def _sync(
        self, host_id: str, found: Sequence[AgentTemplate], placed_before: Collection[str]
    ) -> None:
        by_name = {each.name: each for each in found}
        async with self._db.write() as session:
            query = select(Row).where(
                or_(Row.agent_name.in_(by_name), Row.template_id.in_(placed_before))
            )
            known = {row.agent_name: row for row in await session.scalars(query)}
            placed = await _placed_on(session, host_id)
            for name, each in by_name.items():
                row = known.get(name)
                if row is None and not name.startswith(_OF_A_TEAM):
                    row = _of_the_platform(each)
                    session.add(row)
                    await session.flush()
                there = {TemplateState.READY, TemplateState.HIDDEN}
                ready = row is not None and row.state in there
                if row is not None and ready and row.template_id not in placed:
                    session.add(TemplatePlacement(template_id=row.template_id, host_id=host_id))
            gone = [
                row.template_id
                for row in known.values()
                if row.template_id in placed_before and row.agent_name not in by_name
            ]
            if gone:
                await session.execute(
                    delete(TemplatePlacement).where(
                        TemplatePlacement.host_id == host_id,
                        TemplatePlacement.template_id.in_(gone),
                    )
                )


async def retire(session: AsyncSession, row: Row) -> None:
    """Nobody sees it any more; the reconciler removes it when nothing needs it."""
    row.state, row.name = TemplateState.RETIRED, hidden_name(row.template_id)
    await session.execute(delete(TemplateTag).where(TemplateTag.template_id == row.template_id))
    await session.flush()


async def _placed_on(session: AsyncSession, host_id: str) -> set[str]:
    placement = TemplatePlacement
    query = select(placement.template_id).where(placement.host_id == host_id)
    return set(await session.scalars(query))


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(
        f"template {name!r} exists already", hint="choose another name, or delete it first"
    )


async def _find_to_delete(session: AsyncSession, caller: Caller, name: str) -> Row:
    """A template that the caller may delete. Raises NotFound, Denied."""
    row = await find_template(session, caller.team_id, name, to_change=True)
    if row.team_id == PLATFORM_TEAM_ID and caller.team_id != PLATFORM_TEAM_ID:
        raise Denied(
            f"template {name!r} belongs to the platform",
            hint="only an administrator of the platform can delete it",
        )
    if row.team_id == PLATFORM_TEAM_ID and row.name == _DEFAULT:
        raise Denied(f"template {name!r} is what sandboxes start from by default")
    return row


async def _check_unneeded(session: AsyncSession, row: Row) -> None:
    sandbox = tables.Sandbox
    query = select(sandbox.sandbox_id).where(
        sandbox.agent_template == row.agent_name, sandbox.state.in_(ALIVE)
    )
    users = (await session.scalars(query.limit(6))).all()
    if users:
        more = " and more" if len(users) > 5 else ""
        raise Conflict(
            f"template {row.name!r} is needed by {', '.join(users[:5])}{more}",
            hint="destroy them first",
        )


def _of_the_platform(found: AgentTemplate) -> Row:
    return Row(
        template_id=str(uuid4()),
        team_id=PLATFORM_TEAM_ID,
        name=found.name,
        agent_name=found.name,
        kind=found.kind,
        state=TemplateState.READY,
        vcpus=found.vcpus,
        memory_mb=found.memory_mb,
        disk_size_mb=found.disk_size_mb,
        size_bytes=found.size_bytes,
        created_at=time.time(),
    )
