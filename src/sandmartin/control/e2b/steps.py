"""Things that are done to a sandbox as E2B's clients expect it: one after the other, never 'busy'.

Their sandboxes have no states in between. Whatever is being done to one is waited for; what then
collides with somebody else's step is looked at again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandmartin.control import tables
from sandmartin.control.caller import Caller
from sandmartin.control.e2b.bodies import OVER
from sandmartin.control.platform import Platform
from sandmartin.control.rows import moment
from sandmartin.errors import Conflict, NotFound, Unavailable
from sandmartin.model import State

_T = TypeVar("_T")
_TRIES = 10


async def get_there(platform: Platform, caller: Caller, sandbox_id: str) -> tables.Sandbox:
    """A sandbox that is not over. Raises NotFound."""
    return _there(await platform.sandboxes.get(caller, sandbox_id))


def _there(row: tables.Sandbox) -> tables.Sandbox:
    if row.state in OVER:
        raise NotFound(f"there is no sandbox {row.sandbox_id!r}")
    return row


async def step(
    platform: Platform,
    caller: Caller,
    sandbox_id: str,
    act: Callable[[tables.Sandbox], Awaitable[_T]],
) -> _T:
    """What `act` gives for the sandbox once nothing else is done to it.

    Raises NotFound, Unavailable, and Conflict only when nobody else is the reason.
    """
    tries = 0
    while True:
        row = _there(await platform.sandboxes.settled(caller, sandbox_id))
        if row.state == State.MISSING:
            raise Unavailable(f"the host of sandbox {sandbox_id} cannot be reached: {row.reason}")
        tries += 1
        try:
            return await act(row)
        except Conflict:
            now = _there(await platform.sandboxes.get(caller, sandbox_id))
            if moment(now) == moment(row) or tries == _TRIES:
                raise
