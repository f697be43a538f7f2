"""Contents of templates on their way between users and hosts, of which nothing is kept here.

A host writes what it is sent under a name that no row knows, and shows it only when it is whole.
The row is written afterwards, in one transaction. So whatever is cut off, a client, a host or this
replica, leaves either a template or nothing that anybody can see: what a host then has without a
row is removed by the reconciler as any other template that is nobody's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from sqlalchemy import select

from sandmartin.control import audit, events, tables
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.scheduler import choose_store
from sandmartin.control.tables import PLATFORM_TEAM_ID, TemplatePlacement
from sandmartin.control.templates import Row, Templates, find_template, new_agent_name
from sandmartin.errors import Denied, SandmartinError, Unavailable
from sandmartin.model import check_name
from sandmartin.transport import TemplateInfo as AgentTemplate
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)


class Contents:
    """The contents of all teams' templates."""

    def __init__(self, db: Database, hosts: Hosts, templates: Templates) -> None:
        self._db = db
        self._hosts = hosts
        self._templates = templates

    async def read(self, caller: Caller, name: str) -> AsyncGenerator[bytes, None]:
        """What the team means by `name`, as an archive; it may be one of the platform's.

        Raises NotFound, Unavailable.
        """
        async with self._db.write() as session:
            row = await find_template(session, caller.team_id, name, lock=False)
            placed = select(TemplatePlacement.host_id).where(
                TemplatePlacement.template_id == row.template_id
            )
            host_ids = (await session.scalars(placed)).all()
            audit.record(session, caller, "template.downloaded", "template", name)
        failure: SandmartinError = Unavailable(f"no host has the template {name!r}")
        for host_id in host_ids:
            begun = False
            try:
                agent = await self._hosts.agent(host_id)
                async with contextlib.aclosing(agent.read_template(row.agent_name)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except SandmartinError as error:
                if begun:
                    raise
                failure = error
        raise failure

    async def write(self, caller: Caller, name: str, pieces: AsyncIterator[bytes]) -> Row:
        """Make a template of an archive.

        Raises Invalid, AlreadyExists, Denied for a name of the platform's, Exhausted, Unavailable.
        """
        host = await self._begin(caller, name)
        agent, agent_name = await self._hosts.agent(host.host_id), new_agent_name()
        await agent.write_template(agent_name, pieces)
        try:
            found = await _find(agent, agent_name)
            async with self._db.write() as session:
                row = await self._templates.brought(session, caller, name, host.host_id, found)
                audit.record(session, caller, "template.uploaded", "template", name)
                events.record(session, caller.team_id, "template.created", name=name)
        except SandmartinError:
            await self._templates.end_unknown(agent, agent_name)
            raise
        return row

    async def _begin(self, caller: Caller, name: str) -> tables.Host:
        check_name(name, "template name")
        async with self._db.write() as session:
            query = select(Row).where(Row.team_id == PLATFORM_TEAM_ID, Row.name == name)
            if caller.team_id != PLATFORM_TEAM_ID and await session.scalar(query) is not None:
                raise Denied(
                    f"template {name!r} belongs to the platform", hint="choose another name"
                )
            await self._templates.check_new(session, caller, name)
            return await choose_store(session)


async def _find(agent: Agent, name: str) -> AgentTemplate:
    for each in await agent.list_templates():
        if each.name == name:
            return each
    raise Unavailable("the template was lost as soon as it was there", hint="send it again")
