"""The rows of sandboxes: how one is found, how it changes, and what is told of it.

A row changes state by one guarded UPDATE; no row matched is a Conflict. What was asked for goes by
the table of legal transitions, what was seen on a host goes without, and only while the row is
still as it was read.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import set_committed_value

from sandmartin.control import events, tables
from sandmartin.control.caller import Caller
from sandmartin.control.operations import Overtaken
from sandmartin.control.states import sources_of
from sandmartin.errors import Conflict, Invalid, NotFound, SandmartinError
from sandmartin.model import SandboxSpec, State
from sandmartin.phases import Phase
from sandmartin.transport import CreatedSandbox, SandboxInfo

Row = tables.Sandbox


async def find(
    session: AsyncSession, caller: Caller, sandbox_id: str, *, to_change: bool = False
) -> Row:
    row = await session.get(Row, sandbox_id, with_for_update=to_change or None)
    if row is None or row.team_id != caller.team_id:
        raise NotFound(f"there is no sandbox {sandbox_id[:80]!r}")
    return row


def unfit(row: Row, what: str) -> Conflict:
    hint = {State.PAUSED: "resume it first", State.ERROR: "destroy it"}.get(State(row.state), "")
    why = f" ({row.reason})" if row.reason else ""
    return Conflict(f"sandbox {row.sandbox_id} is {row.state}{why} and cannot {what}", hint=hint)


async def move(
    session: AsyncSession, row: Row, to: State, *, sources: Collection[State], **values: Any
) -> None:
    """What was asked for: one guarded change of state. Raises Conflict."""
    legal = frozenset(sources) & sources_of(to)
    await _change(session, row, to, Row.state.in_(legal), Row.operation_id.is_(None), **values)


async def observe(session: AsyncSession, row: Row, to: State, **values: Any) -> None:
    """What was seen on a host, or ended: one guarded change of state. Raises Overtaken.

    The row must be as it was read, and not only in the same state: it may have left that state
    and come back, and then what was seen is of before.
    """
    as_read = (
        Row.state == row.state,
        Row.state_at == row.state_at,
        Row.operation_id.is_not_distinct_from(row.operation_id),
    )
    try:
        await _change(session, row, to, *as_read, **values)
    except Conflict as error:
        raise Overtaken(error.message) from error


async def _change(
    session: AsyncSession, row: Row, to: State, *conditions: Any, **values: Any
) -> None:
    values = {"state": to, "state_at": time.time(), **values}
    if to is State.RUNNING:
        values.setdefault("reason", "")
    done = await session.execute(
        update(Row)
        .where(Row.sandbox_id == row.sandbox_id, *conditions)
        .values(values)
        .execution_options(synchronize_session=False)
    )
    if not done.rowcount:  # type: ignore[attr-defined]
        raise Conflict(
            f"sandbox {row.sandbox_id} is {row.state}, and something else is being done to it",
            hint="try again in a moment",
        )
    for name, value in values.items():
        # Also of a row that was read in another session.
        set_committed_value(row, name, value)


def moment(row: Row) -> tuple[str, float, str | None, float | None]:
    """What changes whenever something happens to a sandbox."""
    return row.state, row.state_at, row.operation_id, row.ends_at


def state_of(info: SandboxInfo) -> State:
    """What a host says of a sandbox, in our words."""
    try:
        return State(info.state)
    except ValueError:
        return State.ERROR


def tell(session: AsyncSession, row: Row, kind: str, **data: Any) -> None:
    events.record(session, row.team_id, kind, row.sandbox_id, state=row.state, **data)


def told_of(phases: Iterable[Phase]) -> list[dict[str, Any]]:
    """What the time of an operation went to, as events have it."""
    return [{"name": each.name, "ms": round(each.duration_s * 1000, 1)} for each in phases]


def shape_of(row: Row) -> SandboxSpec:
    return SandboxSpec(
        sandbox_id=row.sandbox_id,
        template=row.agent_template,
        vcpus=row.vcpus,
        memory_mb=row.memory_mb,
        disk_size_mb=row.disk_size_mb,
    )


def placed(made: CreatedSandbox) -> dict[str, Any]:
    """Values of one that runs now, as its host says."""
    return {"host_ip": made.address, "envd_version": made.envd_version}


def ends_at(lifetime_s: int | None) -> float | None:
    """When one that begins to run now has run for its lifetime."""
    return None if lifetime_s is None else time.time() + lifetime_s


def child_of(
    parent: Row,
    child_id: str,
    caller: Caller,
    *,
    timeout_s: int | None = None,
    lifetime_s: int | None = None,
) -> Row:
    """A child, with limits of its own or those of its parent."""
    now = time.time()
    lifetime_s = parent.lifetime_s if lifetime_s is None else lifetime_s
    return Row(
        sandbox_id=child_id,
        team_id=parent.team_id,
        host_id=parent.host_id,
        template=parent.template,
        agent_template=parent.agent_template,
        state=State.STARTING,
        state_at=now,
        vcpus=parent.vcpus,
        memory_mb=parent.memory_mb,
        disk_size_mb=parent.disk_size_mb,
        timeout_s=parent.timeout_s if timeout_s is None else timeout_s,
        lifetime_s=lifetime_s,
        ends_at=ends_at(lifetime_s),
        on_timeout=parent.on_timeout,
        auto_resume=parent.auto_resume,
        public_traffic=parent.public_traffic,
        network=parent.network,
        envd_version=parent.envd_version,
        labels=dict(parent.labels),
        defaults=dict(parent.defaults),
        build_id=parent.build_id,
        parent_id=parent.sandbox_id,
        created_by=caller.actor_id,
        created_at=now,
    )


async def settle_child(
    session: AsyncSession,
    child: Row,
    outcome: str | SandmartinError,
    phases: Iterable[Phase] = (),
) -> None:
    """A child runs at an address, or is the error why it does not."""
    if isinstance(outcome, str):
        values = {"started_at": time.time(), "ends_at": ends_at(child.lifetime_s)}
        await observe(session, child, State.RUNNING, operation_id=None, host_ip=outcome, **values)
        tell(session, child, "sandbox.running", phases=told_of(phases))
    else:
        await observe(session, child, State.ERROR, operation_id=None, reason=outcome.message)
        tell(session, child, "sandbox.error", error=outcome.message)


def cursor_of(row: Row) -> str:
    return f"{row.created_at!r}_{row.sandbox_id}"


def read_cursor(cursor: str) -> tuple[float, str]:
    created_at, _, sandbox_id = cursor.partition("_")
    try:
        return float(created_at), sandbox_id
    except ValueError as error:
        raise Invalid("the cursor is none of ours", hint="use `next` of the page before") from error
