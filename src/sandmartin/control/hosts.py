"""Hosts: the machines that run agents, and the way to each agent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.db import Database
from sandmartin.control.states import HostState
from sandmartin.errors import Invalid, NotFound, Unavailable
from sandmartin.transport.agent import Agent, AgentSocket


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What a host is and has."""

    name: str
    address: str
    cpus: int
    memory_mb: int
    disk_free_mb: int
    cpu_overcommit: float
    memory_overhead_mb: int
    accel: str
    version: str


class Hosts:
    """The hosts of this platform. To be closed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        #: By host, with the address that each was made for.
        self._agents: dict[str, tuple[str, Agent]] = {}

    async def agent(self, host_id: str) -> Agent:
        """The way to a host's agent. Raises NotFound, Unavailable."""
        async with self._db.read() as session:
            host = await session.get(tables.Host, host_id)
        if host is None or host.state == HostState.DELETED:
            raise NotFound("the host of this sandbox is gone")
        if not host.address:
            raise Unavailable(f"host {host.name} has not registered yet")
        known = self._agents.get(host_id)
        if known is None or known[0] != host.address:
            self._agents[host_id] = known = host.address, self._connect(host)
        return known[1]

    def _connect(self, host: tables.Host) -> Agent:
        scheme, _, rest = host.address.partition(":")
        if scheme == "unix":
            return AgentSocket(Path(rest))
        raise Invalid(f"host {host.name} has the address {host.address!r}")

    async def ensure_local(self, facts: HostFacts) -> str:
        """The host on this machine, whose agent runs beside us; its id."""
        async with self._db.write() as session:
            query = select(tables.Host).where(tables.Host.name == facts.name)
            host = await session.scalar(query)
            if host is None:
                host = tables.Host(
                    host_id=str(uuid4()),
                    name=facts.name,
                    state=HostState.ONLINE,
                    created_at=time.time(),
                )
                session.add(host)
            for name, value in vars(facts).items():
                setattr(host, name, value)
            host.state, host.heartbeat_at = HostState.ONLINE, time.time()
            return host.host_id

    async def list_reachable(self) -> list[tables.Host]:
        """All hosts that have an address and are not deleted."""
        query = select(tables.Host).where(
            tables.Host.state.in_([HostState.ONLINE, HostState.UNREACHABLE]),
            tables.Host.address != "",
        )
        async with self._db.read() as session:
            return list(await session.scalars(query.order_by(tables.Host.name)))

    async def mark_online(self, host_id: str) -> bool:
        """It was reached just now; whether it was not online before."""
        async with self._db.write() as session:
            host = await session.get(tables.Host, host_id)
            if host is None or host.state == HostState.DELETED:
                return False
            came = host.state != HostState.ONLINE
            host.state, host.heartbeat_at = HostState.ONLINE, time.time()
            return came

    async def close(self) -> None:
        agents = [agent for _, agent in self._agents.values()]
        self._agents.clear()
        with contextlib.suppress(Exception):
            await asyncio.gather(*(agent.aclose() for agent in agents))
