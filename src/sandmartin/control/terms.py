"""Terms: what a sandbox is held to while it lives, which may change while it runs.

They are its network policy and its idle limit. What the row says is what is wanted; the host of a
running sandbox is told at once, and again by the reconciler for as long as it has something else.
One that sleeps is held to them before it wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

from sandmartin.control import audit, events
from sandmartin.control.acts import Acts
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.hosts import Hosts
from sandmartin.control.operations import Operations
from sandmartin.control.quotas import Quotas
from sandmartin.control.rows import Row, find, tell, unfit
from sandmartin.errors import Invalid, TimedOut, Unavailable
from sandmartin.model import NetworkPolicy, State
from sandmartin.transport import SandboxInfo
from sandmartin.transport.agent import Agent


class Terms(Acts):
    """The terms of all sandboxes."""

    def __init__(
        self,
        db: Database,
        operations: Operations,
        hosts: Hosts,
        quotas: Quotas,
        happenings: events.Events,
    ) -> None:
        super().__init__(db, operations, hosts, quotas, happenings)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def network(self, caller: Caller, sandbox_id: str) -> NetworkPolicy:
        """What a sandbox may reach. Raises NotFound."""
        return policy_of(await self.get(caller, sandbox_id))

    async def set_network(self, caller: Caller, sandbox_id: str, policy: NetworkPolicy) -> Row:
        """Replace what a sandbox that runs or is paused may reach, on open connections too.

        Raises NotFound, Conflict; Unavailable when it is noted and its host does not know yet.
        """
        rules = policy.to_dict()
        told = {
            "allow_internet_access": policy.allow_internet_access,
            "rules": len(policy.allow_out) + len(policy.deny_out),
        }
        return await self._change(caller, sandbox_id, "network_changed", {"network": rules}, told)

    async def set_timeout(self, caller: Caller, sandbox_id: str, timeout_s: int) -> Row:
        """Give a sandbox that runs or is paused another idle limit, in seconds; 0 is never.

        The idle clock of one that runs begins anew. Raises NotFound, Conflict, Invalid;
        Unavailable when it is noted and its host does not know yet.
        """
        if timeout_s < 0:
            raise Invalid(f"timeout_s is {timeout_s}", hint="use 0 for no idle limit")
        values = {"timeout_s": timeout_s}
        return await self._change(caller, sandbox_id, "timeout_changed", values, values)

    async def _change(
        self,
        caller: Caller,
        sandbox_id: str,
        action: str,
        values: Mapping[str, Any],
        told: Mapping[str, Any],
    ) -> Row:
        kind = f"sandbox.{action}"
        async with self._turn(sandbox_id):
            async with self._db.write() as session:
                row = await find(session, caller, sandbox_id, to_change=True)
                if row.state not in {State.RUNNING, State.PAUSED}:
                    raise unfit(row, "be changed")
                for name, value in values.items():
                    setattr(row, name, value)
                tell(session, row, kind, **told)
                audit.record(session, caller, kind, "sandbox", sandbox_id, **values)
            self._events.wake()
            if row.state == State.RUNNING:
                try:
                    await self._hold(row, values)
                except (Unavailable, TimedOut) as error:
                    raise Unavailable(
                        f"it is noted, but the host of sandbox {sandbox_id} does not know yet:"
                        f" {error.message}",
                        hint="the host is told as soon as it answers",
                    ) from error
        return row

    async def hold_again(self, sandbox_id: str, info: SandboxInfo) -> None:
        """Tell a host of those terms of a running sandbox that it has otherwise, as `info` says."""
        # After what is just being changed, whose words would else be followed by older ones.
        async with self._turn(sandbox_id):
            async with self._db.read() as session:
                row = await session.get(Row, sandbox_id)
            if row is not None and row.state == State.RUNNING:
                await self._hold(row, differences(row, info))

    async def _hold(self, row: Row, changed: Mapping[str, Any]) -> None:
        agent = await self._agent(row)
        if "network" in changed:
            await agent.update_network(row.sandbox_id, policy_of(row))
        if "timeout_s" in changed:
            await agent.set_timeout(row.sandbox_id, row.timeout_s)

    async def _hold_asleep(self, agent: Agent, row: Row) -> None:
        """Have a sandbox that sleeps wake up under the policy of its row."""
        if row.network is not None:
            await agent.update_network(row.sandbox_id, policy_of(row))

    @contextlib.asynccontextmanager
    async def _turn(self, sandbox_id: str) -> AsyncIterator[None]:
        """What is noted first is told first."""
        lock = self._turns.setdefault(sandbox_id, asyncio.Lock())
        async with lock:
            yield


def policy_of(row: Row) -> NetworkPolicy:
    return NetworkPolicy.from_dict(row.network)


def differences(row: Row, info: SandboxInfo) -> dict[str, Any]:
    """Terms of a row that its host has otherwise."""
    wanted = {"network": policy_of(row), "timeout_s": row.timeout_s}
    has = {"network": info.network, "timeout_s": info.timeout_s}
    return {name: value for name, value in wanted.items() if value != has[name]}
