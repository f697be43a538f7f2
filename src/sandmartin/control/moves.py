"""Moves: a paused sandbox is brought to another host, where it is to wake up.

What it sleeps in goes through the artefact store as a template does, under a template's row that
nobody sees, so all that holds for artefacts holds for it. The other host has it asleep before the
row names that host, in one transaction: from then on it is that host's, until then it was the
first one's. A host that has what its row does not give it ends it, as any VM that no row knows.
"""

from __future__ import annotations

import logging
import time
from uuid import uuid4

from sqlalchemy import delete, select

from sandmartin.control import tables
from sandmartin.control.artefacts import Artefacts
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.operations import Overtaken
from sandmartin.control.rows import Row, observe, tell
from sandmartin.control.scheduler import Choice, Need, choose_host
from sandmartin.control.states import HostState, TemplateState
from sandmartin.control.templates import Templates, new_agent_name
from sandmartin.errors import SandmartinError
from sandmartin.model import State
from sandmartin.transport.agent import Agent

_log = logging.getLogger(__name__)


class Moves:
    """Brings sandboxes of all teams from host to host."""

    def __init__(
        self, db: Database, hosts: Hosts, templates: Templates, artefacts: Artefacts
    ) -> None:
        self._db = db
        self._hosts = hosts
        self._templates = templates
        self._artefacts = artefacts

    async def is_due(self, sandbox: Row) -> bool:
        """Whether it is to wake up elsewhere if it can: its host is drained."""
        if not self._artefacts.stores or sandbox.host_id is None:
            return False
        async with self._db.read() as session:
            host = await session.get(tables.Host, sandbox.host_id)
        return host is not None and host.draining

    async def bring(self, source: Agent, sandbox: Row) -> Agent | None:
        """Have a paused sandbox on another host; its agent, or None where that cannot be.

        The operation that wakes it up is under way. Raises Overtaken.
        """
        if not self._artefacts.stores or not await self._has_elsewhere(sandbox):
            return None
        template: tables.Template | None = None
        try:
            template = await self._note(sandbox)
            await self._artefacts.push_asleep(source, sandbox, template)
            choice = await self._choose(sandbox, template)
            agent = await self._hosts.agent(choice.host.host_id)
            await self._artefacts.bring_to(agent, choice.host.host_id, template)
            await agent.adopt_sandbox(
                sandbox.sandbox_id, template.agent_name, sandbox.agent_template
            )
            await self._hand_over(sandbox, choice, template)
        except Overtaken:
            raise
        except SandmartinError as error:
            _log.warning("sandbox %s stays on its host: %s", sandbox.sandbox_id, error)
            if template is not None:
                await self._forget(template)
            return None
        return agent

    async def _has_elsewhere(self, sandbox: Row) -> bool:
        """Whether there is another host that could do: before anything is sent."""
        host = tables.Host
        async with self._db.read() as session:
            own = await session.get(host, sandbox.host_id)
            query = select(host.host_id).where(
                host.state == HostState.ONLINE,
                host.draining.is_(False),
                host.host_id != sandbox.host_id,
                host.accel == (own.accel if own is not None else ""),
                host.vmm_version == (own.vmm_version if own is not None else ""),
            )
            return await session.scalar(query.limit(1)) is not None

    async def leave(self, source: Agent, sandbox: Row) -> None:
        """Free what the host still has that a sandbox was brought from, which runs elsewhere."""
        try:
            await source.destroy(sandbox.sandbox_id)
        except SandmartinError as error:
            # The reconciler ends it when the host can be reached.
            _log.info("sandbox %s is ended later where it was: %s", sandbox.sandbox_id, error)
            return
        for row in await self._earlier(sandbox):
            await self._templates.finish_deletion(row)

    async def _note(self, sandbox: Row) -> tables.Template:
        """A template's row that goes when its sandbox is over and no other needs it."""
        template_id = str(uuid4())
        row = tables.Template(
            template_id=template_id,
            team_id=sandbox.team_id,
            name=f"~{template_id}",
            agent_name=new_agent_name(),
            kind="snapshot",
            state=TemplateState.RETIRED,
            vcpus=sandbox.vcpus,
            memory_mb=sandbox.memory_mb,
            disk_size_mb=sandbox.disk_size_mb,
            sandbox_id=sandbox.sandbox_id,
            network=sandbox.network,
            created_at=time.time(),
        )
        async with self._db.write() as session:
            session.add(row)
        return row

    async def _choose(self, sandbox: Row, template: tables.Template) -> Choice:
        """Another host. Raises Exhausted, Unavailable."""
        need = Need(
            template_id=template.template_id,
            template=sandbox.template,
            vcpus=sandbox.vcpus,
            memory_mb=sandbox.memory_mb,
            stored=True,
        )
        assert sandbox.host_id is not None
        async with self._db.write() as session:
            choice = await choose_host(session, need, without={sandbox.host_id})
            tell(session, sandbox, "sandbox.moving", host=choice.host.name)
            return choice

    async def _hand_over(self, sandbox: Row, choice: Choice, template: tables.Template) -> None:
        async with self._db.write() as session:
            state = State(sandbox.state)
            await observe(session, sandbox, state, host_id=choice.host.host_id)
            tell(session, sandbox, "sandbox.moved", host=choice.host.name)
            # What it slept in is of no use to anybody once it has woken up.
            row = tables.Artefact
            await session.execute(delete(row).where(row.template_id == template.template_id))

    async def _earlier(self, sandbox: Row) -> list[tables.Template]:
        """What moves of a sandbox before the last have left on hosts."""
        row = tables.Template
        async with self._db.read() as session:
            query = select(row).where(
                row.sandbox_id == sandbox.sandbox_id,
                row.state == TemplateState.RETIRED,
                row.name == "~" + row.template_id,
            )
            found = (await session.scalars(query.order_by(row.created_at))).all()
        return list(found[:-1])

    async def _forget(self, template: tables.Template) -> None:
        row = tables.Template
        async with self._db.write() as session:
            await session.execute(delete(row).where(row.template_id == template.template_id))
