"""The scheduler: on which host a sandbox is to be.

The host on which its scarcest resource is least used. What every sandbox will hold counts from
the moment its row is there; the choice is made in the transaction that writes the row, so two
creates at once see each other. The agent has the last word: it admits or refuses by what is real.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.hosts import Load, loads_of
from sandmartin.control.states import HostState
from sandmartin.errors import Conflict, Exhausted, NotFound, Unavailable

_UNDRAIN = "add a host, or `sandmartin host drain NAME --undo`"


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a sandbox takes of a host."""

    template_id: str
    template: str
    vcpus: int
    memory_mb: int
    disk_floor_mb: int = 1024
    #: Whether a host can get the template from the artefact store.
    stored: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A host, and why it was chosen."""

    host: tables.Host
    #: Share of its scarcest resource that is then in use.
    load: float
    #: Which that is: `vcpus`, `memory` or `disk`.
    bottleneck: str
    #: What of others: their load, or why not.
    others: dict[str, Any]


async def choose_host(
    session: AsyncSession, need: Need, *, without: Collection[str] = ()
) -> Choice:
    """The best host for `need`, in a writing transaction: of those that have the template.

    Where none of them has room, one that can fetch it. Raises Unavailable when no host that has
    the template or could fetch it is there, NotFound when none has it, Exhausted.
    """
    hosts = await _online(session)
    artefact = await _artefact(session, need) if need.stored else None
    having = await _having(session, need, hosts, artefact)
    loads = await loads_of(session)
    fitting: dict[str, tuple[float, str]] = {}
    refused: dict[str, str] = {}
    for host in hosts:
        if host.host_id in without:
            refused[host.name] = "it refused"
        elif host.draining:
            refused[host.name] = "it is drained"
        elif host.host_id not in having and artefact is None:
            refused[host.name] = "it lacks the template"
        elif host.host_id not in having and artefact is not None and not _runs(artefact, host):
            refused[host.name] = f"the template was saved on {artefact.accel or 'another VMM'}"
        else:
            load, bottleneck = _load(host, loads.get(host.host_id, Load()), need)
            if load <= 1.0:
                fitting[host.name] = load, bottleneck
            else:
                refused[host.name] = f"its {bottleneck} would be used by {load:.0%}"
    if all(host.draining for host in hosts):
        raise Exhausted(
            f"no host takes new sandboxes: {', '.join(sorted(refused))} are drained", hint=_UNDRAIN
        )
    if not fitting:
        why = "; ".join(sorted(set(refused.values())))
        raise Exhausted(
            f"no host has room for {need.vcpus} vCPUs and {need.memory_mb} MB ({why})",
            hint="destroy or pause sandboxes, use less, or add a host",
        )
    fetching = {host.name for host in hosts if host.host_id not in having}
    best = min(fitting, key=lambda name: (name in fetching, fitting[name][0], name))
    load, bottleneck = fitting.pop(best)
    return Choice(
        host=next(host for host in hosts if host.name == best),
        load=round(load, 3),
        bottleneck=bottleneck,
        others={name: round(each, 3) for name, (each, _) in fitting.items()} | refused,
    )


async def choose_store(session: AsyncSession) -> tables.Host:
    """The host with the most room on its disk, for a template. Raises Unavailable, Exhausted."""
    hosts = [host for host in await _online(session) if not host.draining]
    if not hosts:
        raise Exhausted("no host takes new templates: all are drained", hint=_UNDRAIN)
    return max(hosts, key=lambda host: host.disk_free_mb)


async def check_takes_new(session: AsyncSession, sandbox: tables.Sandbox) -> None:
    """Raises Conflict when a sandbox's host takes nothing new, and so no fork of it."""
    # Where transactions write side by side, nobody drains it before this one's end.
    host = await session.get(tables.Host, sandbox.host_id, with_for_update={"read": True})
    if host is not None and host.draining:
        raise Conflict(
            f"host {host.name} of sandbox {sandbox.sandbox_id} is drained and takes no forks",
            hint=_UNDRAIN,
        )


async def _online(session: AsyncSession) -> Sequence[tables.Host]:
    query = select(tables.Host).where(tables.Host.state == HostState.ONLINE)
    # Where transactions write side by side, choices are made one after the other.
    hosts = (await session.scalars(query.order_by(tables.Host.name).with_for_update())).all()
    if not hosts:
        raise Unavailable(
            "no host is online", hint="look at `sandmartin host ls`; add one with `host add`"
        )
    return hosts


async def _artefact(session: AsyncSession, need: Need) -> tables.Artefact | None:
    """The template in the artefact store; None where it is not."""
    row = await session.get(tables.Artefact, need.template_id)
    return row if row is not None and row.artefact_id is not None else None


def _runs(artefact: tables.Artefact, host: tables.Host) -> bool:
    """Whether what is in an artefact may run on a host, as far as is known; it looks itself."""
    needs = (artefact.accel, host.accel), (artefact.vmm_version, host.vmm_version)
    return all(not of_artefact or of_artefact == of_host for of_artefact, of_host in needs)


async def _having(
    session: AsyncSession,
    need: Need,
    hosts: Sequence[tables.Host],
    artefact: tables.Artefact | None,
) -> Collection[str]:
    """The hosts that have the template, one of `hosts` at least if it is in no store."""
    placed = tables.TemplatePlacement
    having = set(
        await session.scalars(select(placed.host_id).where(placed.template_id == need.template_id))
    )
    if artefact is not None:
        return having
    if not having:
        raise NotFound(f"no host has the template {need.template!r}")
    if not having & {host.host_id for host in hosts}:
        raise Unavailable(
            f"no host that has the template {need.template!r} can be reached",
            hint="look at `sandmartin host ls`",
        )
    return having


def _load(host: tables.Host, used: Load, need: Need) -> tuple[float, str]:
    """Share of the scarcest resource with one more sandbox; above 1 there is too little."""
    if need.vcpus > host.cpus:
        # Overcommitted or not, one VM has no more processors than its host.
        return need.vcpus / host.cpus if host.cpus else float("inf"), "vcpus"
    overhead_mb = host.memory_overhead_mb * (used.running + 1)
    shares = {
        "vcpus": (used.vcpus + need.vcpus) / max(1.0, host.cpus * host.cpu_overcommit),
        "memory": (used.memory_mb + need.memory_mb + overhead_mb) / max(1, host.memory_mb),
        "disk": need.disk_floor_mb / max(1, host.disk_free_mb),
    }
    bottleneck = max(shares, key=lambda name: shares[name])
    return shares[bottleneck], bottleneck
