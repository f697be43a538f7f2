"""What must be true once nothing is under way: rows, hosts and processes agree."""

from __future__ import annotations

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.platform import Platform
from sandmartin.control.states import TemplateState
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.model import State
from tests.control.conftest import RunningHost, eventually
from tests.fakes_agent import find_vms

_SETTLED = {State.RUNNING, State.PAUSED}


async def rows_of(platform: Platform) -> dict[str, tables.Sandbox]:
    async with platform.db.read() as session:
        return {row.sandbox_id: row for row in await session.scalars(select(tables.Sandbox))}


async def state_of(platform: Platform, sandbox_id: str) -> str:
    return (await rows_of(platform))[sandbox_id].state


async def templates_of(platform: Platform) -> list[tables.Template]:
    """Those of teams."""
    query = select(tables.Template).where(tables.Template.team_id != PLATFORM_TEAM_ID)
    async with platform.db.read() as session:
        return list(await session.scalars(query))


async def open_operations(platform: Platform) -> list[str]:
    operation = tables.Operation
    query = select(operation.kind, operation.error_message).where(operation.finished_at.is_(None))
    async with platform.db.read() as session:
        return [f"open: {kind} ({why})" for kind, why in await session.execute(query)]


async def disagreements(platform: Platform, *hosts: RunningHost) -> list[str]:
    """What is under way or half done, or is not the same in a row and on a host."""
    found = await open_operations(platform)
    rows, templates = await rows_of(platform), await templates_of(platform)
    expected = {i: row.state for i, row in rows.items() if row.state in _SETTLED}
    found += [f"{i} is {row.state}" for i, row in rows.items() if row.operation_id is not None]
    found += [
        f"template {t.name} is {t.state}" for t in templates if t.state != TemplateState.READY
    ]
    there: dict[str, str] = {}
    named: set[str] = set()
    for host in await platform.hosts.list_reachable():
        agent = await platform.hosts.agent(host.host_id)
        there |= {each.sandbox_id: each.state for each in await agent.list_sandboxes()}
        named |= {each.name for each in await agent.list_templates() if each.name[:2] == "t-"}
    if there != expected:
        found.append(f"rows say {expected}, hosts {there}")
    if named != {each.agent_name for each in templates}:
        found.append(f"hosts have the templates {named}")
    running = sum(len(find_vms(host.directory)) for host in hosts)
    if running != list(expected.values()).count(State.RUNNING):
        found.append(f"{running} VMs run")
    return found


async def agree(platform: Platform, *hosts: RunningHost) -> None:
    """Wait until rows, hosts and processes are one."""
    found: list[str] = ["never looked at"]

    async def all_agree() -> bool:
        found[:] = await disagreements(platform, *hosts)
        return not found

    try:
        await eventually(all_agree, "agreement")
    except AssertionError:
        raise AssertionError(f"no agreement: {found}") from None
