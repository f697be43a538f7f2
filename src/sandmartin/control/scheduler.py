"""The scheduler: on which host a sandbox is to be.

The host on which its scarcest resource is least used. What every sandbox will hold counts from
the moment its row is there; the choice is made in the transaction that writes the row, so two
creates at once see each other. The agent has the last word: it admits or refuses by what is real.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.states import HOLDING, HostState
from sandmartin.errors import Exhausted, NotFound, Unavailable


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a sandbox takes of a host."""

    template_id: str
    template: str
    vcpus: int
    memory_mb: int
    disk_floor_mb: int = 1024


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A host, and why it was chosen."""

    host: tables.Host
    #: Share of its scarcest resource that is then in use.
    load: float
    #: What of others: their load, or why not.
    others: dict[str, Any]


@dataclass(frozen=True)
class _Used:
    vcpus: int = 0
    memory_mb: int = 0
    sandboxes: int = 0


async def choose_host(
    session: AsyncSession, need: Need, *, without: Collection[str] = ()
) -> Choice:
    """The best host for `need`, in a writing transaction.

    Raises Unavailable when no host is there, NotFound when none has the template, Exhausted.
    """
    query = select(tables.Host).where(tables.Host.state == HostState.ONLINE)
    # Where transactions write side by side, choices are made one after the other.
    hosts = (await session.scalars(query.order_by(tables.Host.name).with_for_update())).all()
    if not hosts:
        raise Unavailable(
            "no host is online", hint="look at `sandmartin host ls`; add one with `host add`"
        )
    having = set(
        await session.scalars(
            select(tables.TemplatePlacement.host_id).where(
                tables.TemplatePlacement.template_id == need.template_id
            )
        )
    )
    if not having & {host.host_id for host in hosts}:
        raise NotFound(f"no host that is online has the template {need.template!r}")
    used = await _used(session)
    loads: dict[str, float] = {}
    refused: dict[str, str] = {}
    for host in hosts:
        if host.host_id in without:
            refused[host.name] = "it refused"
        elif host.draining:
            refused[host.name] = "it is drained"
        elif host.host_id not in having:
            refused[host.name] = "it lacks the template"
        else:
            load = _load(host, used.get(host.host_id, _Used()), need)
            if load <= 1.0:
                loads[host.host_id] = load
            else:
                refused[host.name] = f"it would be used by {load:.0%}"
    if not loads:
        raise Exhausted(
            f"no host has room for {need.vcpus} vCPUs and {need.memory_mb} MB",
            hint="destroy or pause sandboxes, use less, or add a host",
        )
    by_id = {host.host_id: host for host in hosts}
    best = min(loads, key=lambda host_id: (loads[host_id], by_id[host_id].name))
    others = {by_id[host_id].name: round(load, 3) for host_id, load in loads.items()}
    others.pop(by_id[best].name)
    return Choice(host=by_id[best], load=round(loads[best], 3), others=others | refused)


async def _used(session: AsyncSession) -> dict[str, _Used]:
    row = tables.Sandbox
    query = (
        select(row.host_id, func.sum(row.vcpus), func.sum(row.memory_mb), func.count())
        .where(row.state.in_(HOLDING), row.host_id.is_not(None))
        .group_by(row.host_id)
    )
    found = await session.execute(query)
    return {
        host: _Used(int(vcpus), int(mb), count)
        for host, vcpus, mb, count in found
        if host is not None
    }


def _load(host: tables.Host, used: _Used, need: Need) -> float:
    """Share of the scarcest resource with one more sandbox; above 1 there is too little."""
    overhead_mb = host.memory_overhead_mb * (used.sandboxes + 1)
    shares = [
        (used.vcpus + need.vcpus) / max(1.0, host.cpus * host.cpu_overcommit),
        (used.memory_mb + need.memory_mb + overhead_mb) / max(1, host.memory_mb),
        need.disk_floor_mb / max(1, host.disk_free_mb),
    ]
    if need.vcpus > host.cpus:
        return float("inf")
    return max(shares)
