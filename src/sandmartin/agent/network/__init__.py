"""The network places of one agent: made ahead, given out, cleaned, taken back.

Making a slot waits for locks of the kernel that all slots share, so some are always ready. A slot
that is given back is stripped of rules and connections before anyone gets it again; one that
cannot be is removed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable

from sandmartin.agent.claims import Claims
from sandmartin.agent.network import rules
from sandmartin.agent.network.reach import Reach
from sandmartin.agent.network.resolver import Gateway, Upstream
from sandmartin.agent.network.slot import Slot, list_own
from sandmartin.agent.network.uplinks import claim_uplinks, close_uplinks, open_uplinks
from sandmartin.agent.tasks import Tasks
from sandmartin.errors import SandmartinError
from sandmartin.model import NetworkPolicy, Settings

__all__ = ["Network", "Slot"]

_log = logging.getLogger(__name__)

_RETRY_S = 5.0
#: Slots are made ahead when nothing was done for so long, which is waited for so long at most.
_QUIET_S, _QUIET_LIMIT_S = 0.2, 10.0


class Network:
    """All slots of one agent."""

    def __init__(self, settings: Settings, claims: Claims, tasks: Tasks) -> None:
        self._settings = settings
        self._claims = claims
        self._tasks = tasks
        self._upstream = Upstream(settings.resolv_conf)
        self._ready: deque[Slot] = deque()
        #: Numbers of the slots that sandboxes have.
        self._given: set[int] = set()
        self._gateways: dict[int, tuple[Gateway, asyncio.Task[None]]] = {}
        self._reaches: dict[int, Reach] = {}
        self._guarded: frozenset[str] | None = None
        self._cleaning: set[asyncio.Task[None]] = set()
        self._wanted = asyncio.Event()
        self._refilling: asyncio.Task[None] | None = None

    # Beginning and end.

    async def start(self, in_use: Iterable[int]) -> None:
        """Win back the slots `in_use`, remove our other leftovers, and begin to make some ahead."""
        kept = self._given = {number for number in in_use if self._claims.keep_slot(number)}
        await self._load_host_rules()
        leftovers = await asyncio.to_thread(list_own, self._claims.instance_id)
        for number in (leftovers | set(self._claims.list_slots())) - kept:
            await self._destroy(self._slot(number))
        for number in sorted(kept & leftovers):
            await self._listen(self._slot(number))
        self._wanted.set()
        self._refilling = self._tasks.watch("network slots", self._refill())

    async def close(self) -> None:
        """End our part; slots in use stay as they are for the next agent."""
        await self._stop_refilling()
        await asyncio.gather(*self._cleaning)
        while self._ready:
            await self._destroy(self._ready.popleft())
        for number in list(self._gateways):
            await self._stop_listening(number)

    async def destroy_all(self) -> None:
        """Remove every slot and rule of ours, and what was switched on for them."""
        await self.close()
        leftovers = await asyncio.to_thread(list_own, self._claims.instance_id)
        for number in leftovers | set(self._claims.list_slots()):
            await self._destroy(self._slot(number))
        # Forwarding first: the rules guard it to the last.
        await asyncio.to_thread(close_uplinks, self._claims)
        await rules.remove_host_table(self._claims.instance_id)

    # Giving and taking.

    async def acquire(self) -> Slot:
        """A clean slot for one sandbox. Raises Exhausted, ToolFailed."""
        await self._load_host_rules()
        slot = self._ready.popleft() if self._ready else await self._make()
        self._given.add(slot.number)
        self._wanted.set()
        return slot

    def adopted(self, number: int) -> Slot | None:
        """The slot of a sandbox that an earlier agent left; None when it is gone."""
        slot = self._slot(number)
        return slot if number in self._gateways and slot.exists() else None

    async def apply(self, slot: Slot, policy: NetworkPolicy) -> None:
        """Let the guest of a slot reach what a policy allows, from now on and on open flows too.

        Until then, and after it was given back, a slot has the default policy. Raises ToolFailed.
        """
        await self._reach(slot).apply(policy)

    async def keep(self, slot: Slot, policy: NetworkPolicy) -> None:
        """The same for a slot that an earlier agent left; nothing changes if it was so."""
        await self._reach(slot).keep(policy)

    def _reach(self, slot: Slot) -> Reach:
        return self._reaches.setdefault(slot.number, Reach(slot))

    async def release(self, number: int) -> None:
        """Take a slot back. Idempotent."""
        if number not in self._given:
            return
        self._given.discard(number)
        # Nobody gets it before it is clean, so nobody has to wait for that.
        cleaning = asyncio.create_task(self._clean(number), name=f"clean slot {number}")
        self._cleaning.add(cleaning)
        cleaning.add_done_callback(self._cleaning.discard)

    async def _clean(self, number: int) -> None:
        try:
            await self._take_back(self._slot(number))
        except SandmartinError as error:
            # It stays claimed, and the next agent removes it.
            _log.error("network slot %d is lost: %s", number, error)

    async def _take_back(self, slot: Slot) -> None:
        # More than are made ahead may wait: cleaning one costs less than making one.
        room = len(self._ready) < 2 * self._settings.slot_pool_size
        if room and slot.number in self._gateways:
            try:
                await self._reach(slot).reset()
                await rules.forget_flows(slot)
            except SandmartinError as error:
                _log.warning("network slot %d is not used again: %s", slot.number, error)
            else:
                self._ready.append(slot)
                return
        await self._destroy(slot)

    # One slot.

    def _slot(self, number: int) -> Slot:
        settings = self._settings
        return Slot.of(
            number,
            self._claims.instance_id,
            settings.address_range,
            settings.link_range,
            settings.uid_base,
        )

    async def _make(self) -> Slot:
        settings = self._settings
        # The first and the last address of a range are not a host's.
        limit = min(settings.address_range.num_addresses, settings.link_range.num_addresses // 2)
        slot = self._slot(await asyncio.to_thread(self._claims.take_slot, limit - 2))
        try:
            await asyncio.to_thread(slot.make)
            await self._reach(slot).reset()
            await rules.forget_flows(slot)
            await self._listen(slot)
        except BaseException:
            await asyncio.shield(self._destroy(slot))
            raise
        return slot

    async def _destroy(self, slot: Slot) -> None:
        await self._stop_listening(slot.number)
        self._reaches.pop(slot.number, None)
        await asyncio.to_thread(slot.remove)
        self._claims.give_back_slot(slot.number)

    async def _listen(self, slot: Slot) -> None:
        gateway = await Gateway.open(self._upstream, slot, self._reach(slot).learn)
        serving = self._tasks.watch(f"resolver of slot {slot.number}", gateway.serve())
        self._gateways[slot.number] = gateway, serving

    async def _stop_listening(self, number: int) -> None:
        gateway, serving = self._gateways.pop(number, (None, None))
        if gateway is None or serving is None:
            return
        serving.cancel()
        await asyncio.wait({serving})
        gateway.close()

    # The pool.

    async def _refill(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                while len(self._ready) < self._settings.slot_pool_size:
                    await self._tasks.quiet(_QUIET_S, _QUIET_LIMIT_S)
                    await self._make_ahead()
            except SandmartinError as error:
                _log.warning("no network slot can be made ahead: %s", error)
                await asyncio.sleep(_RETRY_S)
                self._wanted.set()

    async def _make_ahead(self) -> None:
        making = asyncio.ensure_future(self._make())
        try:
            self._ready.append(await asyncio.shield(making))
        except asyncio.CancelledError:
            # A thread that makes one cannot be stopped: whoever ends the pool gets a whole slot.
            await asyncio.wait({making})
            if making.exception() is None:
                self._ready.append(making.result())
            raise

    async def _stop_refilling(self) -> None:
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.wait({self._refilling})
            self._refilling = None

    async def _load_host_rules(self) -> None:
        """Load the host's rules when they are new or the host has another way out by now."""
        guarded = await asyncio.to_thread(claim_uplinks, self._claims)
        if guarded == self._guarded:
            return
        instance, addresses = self._claims.instance_id, self._settings.address_range
        await rules.load(rules.host_rules(instance, addresses, guarded))
        await asyncio.to_thread(open_uplinks, guarded)
        self._guarded = guarded
