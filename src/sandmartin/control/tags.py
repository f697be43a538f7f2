"""Tags: names of one template beside others of the same name, as `app:v2` is beside `app`.

A name alone is its tag `default`. A tag is of one template at a time, and a template may have
several; the row's own name is always the first of them. One whose last tag is taken away is
retired: what was made of it goes on. What was never tagged has its name and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.states import TemplateState
from sandmartin.control.tables import Template, TemplateTag
from sandmartin.control.templates import (
    find_template,
    hidden_name,
    retire,
    tagged_name,
)
from sandmartin.errors import Denied, Invalid, NotFound
from sandmartin.model import DEFAULT_TAG, split_tag

MAX_TAGS = 32


class Tags:
    """The tags of all teams."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def of(self, template_ids: Sequence[str]) -> dict[str, list[str]]:
        """The tags of templates by their ids, the first of each being that of its name."""
        query = select(TemplateTag).where(TemplateTag.template_id.in_(template_ids))
        found: dict[str, list[str]] = {}
        async with self._db.read() as session:
            for row in await session.scalars(query):
                found.setdefault(row.template_id, []).append(row.tag)
        return {each: _in_order(tags) for each, tags in found.items()}

    async def list(self, caller: Caller, name: str) -> Sequence[TemplateTag]:
        """Tags of a name of the team, oldest first. Raises NotFound, Invalid."""
        base, _ = split_tag(name)
        async with self._db.read() as session:
            if found := await _tags_of(session, caller.team_id, base):
                return found
            row = await find_template(session, caller.team_id, base, lock=False)
        return [
            TemplateTag(
                team_id=row.team_id,
                name=base,
                tag=DEFAULT_TAG,
                template_id=row.template_id,
                created_at=row.created_at,
            )
        ]

    async def assign(self, caller: Caller, target: str, tags: Sequence[str]) -> Template:
        """Give tags to what `target` (`name` or `name:tag`) means now, taken from what had them.

        Raises NotFound, Denied for what is the platform's, Invalid.
        """
        base, _ = split_tag(target)
        async with self._db.write() as session:
            row = await self._own(session, caller, target)
            await move_tags(session, row, base, tags)
            audit.record(session, caller, "template.tagged", "template", base, tags=list(tags))
            events.record(session, caller.team_id, "template.tagged", name=base)
        return row

    async def remove(self, caller: Caller, name: str, tags: Sequence[str]) -> None:
        """Take tags of a name away. Raises NotFound, Denied, Invalid."""
        base, _ = split_tag(name)
        check_tags(base, tags)
        async with self._db.write() as session:
            for tag in dict.fromkeys(tags):
                row = await self._own(session, caller, tagged_name(base, tag))
                await _note_default(session, row, base)
                held = await _held(session, row, base)
                await session.delete(held[tag])
                await session.flush()
                await _rename(session, [row.template_id], base)
            audit.record(session, caller, "template.untagged", "template", base, tags=list(tags))
            events.record(session, caller.team_id, "template.untagged", name=base)

    async def _own(self, session: AsyncSession, caller: Caller, name: str) -> Template:
        row = await find_template(session, caller.team_id, name, to_change=True)
        if row.team_id != caller.team_id:
            raise Denied(f"template {name!r} belongs to the platform")
        if row.state != TemplateState.READY:
            raise NotFound(f"there is no template {name!r}")
        return row


def check_tags(name: str, tags: Sequence[str]) -> None:
    """Raises Invalid."""
    if not 1 <= len(tags) <= MAX_TAGS:
        raise Invalid(f"there are {len(tags)} tags", hint=f"give 1 to {MAX_TAGS}")
    for tag in tags:
        split_tag(f"{name}:{tag}")


async def move_tags(session: AsyncSession, row: Template, name: str, tags: Sequence[str]) -> None:
    """Give tags of `name` to `row`, in a transaction. Raises Invalid."""
    check_tags(name, tags)
    # What had only its name until now.
    query = select(Template).where(Template.team_id == row.team_id, Template.name == name)
    before = await session.scalar(query.with_for_update())
    if before is not None:
        await _note_default(session, before, name)
    losing = set()
    for tag in tags:
        held = await session.get(TemplateTag, (row.team_id, name, tag), with_for_update=True)
        if held is None:
            _add(session, row, name, tag)
        elif held.template_id != row.template_id:
            losing.add(held.template_id)
            held.template_id, held.created_at = row.template_id, time.time()
    await session.flush()
    await _rename(session, [*sorted(losing), row.template_id], name)


def _add(session: AsyncSession, row: Template, name: str, tag: str) -> None:
    session.add(
        TemplateTag(
            team_id=row.team_id,
            name=name,
            tag=tag,
            template_id=row.template_id,
            created_at=time.time(),
        )
    )


async def _note_default(session: AsyncSession, row: Template, name: str) -> None:
    """Say in the table what was true without."""
    if row.name == name and not await _held(session, row, name):
        _add(session, row, name, DEFAULT_TAG)
        await session.flush()


async def _tags_of(session: AsyncSession, team_id: str, name: str) -> Sequence[TemplateTag]:
    query = select(TemplateTag).where(TemplateTag.team_id == team_id, TemplateTag.name == name)
    query = query.order_by(TemplateTag.created_at, TemplateTag.tag)
    return (await session.scalars(query)).all()


async def _held(session: AsyncSession, row: Template, name: str) -> dict[str, TemplateTag]:
    found = await _tags_of(session, row.team_id, name)
    return {each.tag: each for each in found if each.template_id == row.template_id}


def _in_order(tags: Iterable[str]) -> list[str]:
    return sorted(tags, key=lambda tag: (tag != DEFAULT_TAG, tag))


async def _rename(session: AsyncSession, template_ids: Sequence[str], name: str) -> None:
    """Give rows the names that their tags are; what has none is retired."""
    rows = [await session.get(Template, each, with_for_update=True) for each in template_ids]
    there = [row for row in rows if row is not None]
    for row in there:
        # One after the other they would meet each other's names.
        row.name = hidden_name(row.template_id)
    await session.flush()
    for row in there:
        tags = _in_order(await _held(session, row, name))
        if tags:
            row.name = tagged_name(name, tags[0])
            await session.flush()
        else:
            await retire(session, row)
