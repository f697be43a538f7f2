"""What a guest uses of its memory, from the statistics of its balloon driver."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol

_BALLOON = "/machine/peripheral/balloon"
_INTERVAL_S = 10


class Execute(Protocol):
    """A QMP call, as `Monitor.execute` is one."""

    def __call__(
        self, command: str, arguments: Mapping[str, object] | None = None, /
    ) -> Awaitable[object]: ...


class Balloon:
    """The memory statistics that a guest's balloon driver sends to QEMU on its request.

    QEMU asks the guest's kernel every ten seconds, which costs less than waking a process in it,
    and needs none to be there. The interval is no part of a snapshot: each QEMU process is told.
    """

    def __init__(self, execute: Execute, memory_bytes: int) -> None:
        self._execute = execute
        self._memory_bytes = memory_bytes
        self._told = False

    async def used_bytes(self) -> int | None:
        """Total minus available, None when the guest has not told yet. Raises as `execute`."""
        if not self._told:
            interval = {"property": "guest-stats-polling-interval", "value": _INTERVAL_S}
            await self._execute("qom-set", {"path": _BALLOON, **interval})
            self._told = True
        answer = await self._execute("qom-get", {"path": _BALLOON, "property": "guest-stats"})
        return _used_bytes(answer, self._memory_bytes)


def _used_bytes(answer: object, memory_bytes: int) -> int | None:
    """From what a guest says, which is never believed to have more than it was given."""
    match answer:
        case {"stats": {"stat-total-memory": int(total), "stat-available-memory": int(available)}}:
            # Until the guest has told, every figure is -1 as an unsigned number.
            if 0 <= available <= total <= memory_bytes:
                return total - available
    return None
