"""Pools: VMs that are started before anybody asks for them.

What waits belongs to nobody yet: it is in no journal as something to keep, so an agent that is
killed leaves what the next one removes. Pools are filled in the background, one VM at a time and
only while the host has nothing else to do, and a create never waits for one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sandmartin.agent.machine import Machine
from sandmartin.agent.memory import Base
from sandmartin.agent.microvm import MicroVm, Records, Shape
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.storage import remove
from sandmartin.errors import Exhausted, SandmartinError
from sandmartin.model import SandboxSpec, random_id

_log = logging.getLogger(__name__)

_RETRY_S = 5.0


class WaitingVms:
    """VMs that wait for a disk and a device state, over the RAM of what was last asked for.

    Whatever is restored can take one of its base and shape: a new sandbox, a resumed one, a child.
    There are as many as the setting says, spread over the bases as the last requests were.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._size = machine.settings.vm_pool_size
        self._requests: deque[tuple[Shape, Base]] = deque(maxlen=self._size)
        self._waiting: defaultdict[tuple[Shape, Base], deque[MicroVm]] = defaultdict(deque)
        self._wanted = asyncio.Event()

    def take(self, shape: Shape, base: Base) -> MicroVm | None:
        """One that maps `base`, which is the caller's from now on; None when there is none."""
        if not self._size:
            return None
        key = shape, base
        self._requests.append(key)
        self._wanted.set()
        return self._waiting[key].popleft() if self._waiting[key] else None

    def needed(self) -> set[str]:
        """Bases that those to come may ask for."""
        return {base.digest for _, base in self._requests}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def run(self) -> None:
        """Keep the pool as large and as mixed as it is to be."""
        await keep_filled("waiting VMs", self._machine, self._wanted, self._fill)

    async def _fill(self) -> bool:
        """Make one that is missing, or end those that nobody asks for any more."""
        wanted = Counter(self._requests)
        for key, waiting in list(self._waiting.items()):
            while len(waiting) > wanted[key]:
                await self._end(waiting.popleft())
            if not wanted[key]:
                del self._waiting[key]
        for key, count in wanted.items():
            if len(self._waiting[key]) < count:
                self._waiting[key].append(await self._start(*key))
                return True
        return False

    async def _start(self, shape: Shape, base: Base) -> MicroVm:
        name = f"waiting-{random_id(8)}"
        run_dir = self._machine.data.waiting / name
        run_dir.mkdir(mode=0o700)
        vm = MicroVm(self._machine, name, run_dir, Records())
        try:
            await vm.wait(shape, base)
        except BaseException:
            await asyncio.shield(self._end(vm))
            raise
        return vm

    async def _end(self, vm: MicroVm) -> None:
        await vm.end(None, None, "waiting")
        await asyncio.to_thread(remove, self._machine.data.waiting / vm.group)

    async def close(self) -> None:
        """End them all."""
        self._requests.clear()
        waiting = [vm for each in self._waiting.values() for vm in each]
        self._waiting.clear()
        await asyncio.gather(*(self._end(vm) for vm in waiting))


class ReadySandboxes:
    """Sandboxes that run and know who they are, but belong to nobody yet.

    `make` starts one of a template; while the host is `crowded` they make room.
    """

    def __init__(
        self,
        machine: Machine,
        make: Callable[[str], Awaitable[Sandbox]],
        crowded: Callable[[], bool],
    ) -> None:
        self._machine = machine
        self._make = make
        self._crowded = crowded
        self._sizes = machine.settings.ready
        self._ready: dict[str, deque[Sandbox]] = {name: deque() for name in self._sizes}
        self._wanted = asyncio.Event()
        self._wanted.set()

    def __len__(self) -> int:
        return sum(map(len, self._ready.values()))

    def all(self) -> list[Sandbox]:
        return [each for ready in self._ready.values() for each in ready]

    def take(self, spec: SandboxSpec) -> Sandbox | None:
        """One that is as `spec` wants it but for its id, the caller's from now on; or None."""
        self._wanted.set()
        for sandbox in self._ready.get(spec.template, ()):
            # What is told when it is claimed may be anything.
            own = replace(
                sandbox.entry.spec,
                sandbox_id=spec.sandbox_id,
                timeout_s=spec.timeout_s,
                network=spec.network,
                default_user=spec.default_user,
                default_workdir=spec.default_workdir,
            )
            if own == spec and sandbox.alive():
                self._ready[spec.template].remove(sandbox)
                return sandbox
        return None

    async def run(self) -> None:
        """Keep as many ready as there are to be."""
        await keep_filled("ready sandboxes", self._machine, self._wanted, self._fill)

    async def _fill(self) -> bool:
        """Make one that is missing; False when none is, or there is no room."""
        if self._crowded():
            await self._end(self.all()[:1])
            return bool(self.all())
        for template, size in self._sizes.items():
            ready = self._ready[template]
            await self._end([each for each in ready if not each.alive()])
            if len(ready) < size:
                # An operation, so that its template stays as it is meanwhile.
                adding = self._add(template)
                await self._machine.tasks.operate(f"make ready {template}", adding)
                return True
        return False

    async def _add(self, template: str) -> None:
        self._ready[template].append(await self._make(template))

    async def drop(self, template: str) -> None:
        """End those of a template, which is about to go."""
        self._wanted.set()
        await self._end([*self._ready.get(template, ())])

    async def _end(self, sandboxes: list[Sandbox]) -> None:
        for sandbox in sandboxes:
            ready = self._ready[sandbox.entry.spec.template]
            # It may have been taken while another one was ended.
            if sandbox in ready:
                ready.remove(sandbox)
                await sandbox.destroy()

    async def close(self) -> None:
        """End them all."""
        sandboxes = self.all()
        for ready in self._ready.values():
            ready.clear()
        await asyncio.gather(*(sandbox.destroy() for sandbox in sandboxes))


async def keep_filled(
    what: str, machine: Machine, wanted: asyncio.Event, make_one: Callable[[], Awaitable[bool]]
) -> None:
    """Call `make_one` until it has nothing to do, whenever it is `wanted` and the host is quiet."""
    quiet_s, limit_s = machine.patience.quiet_s, machine.patience.quiet_limit_s
    while True:
        await wanted.wait()
        wanted.clear()
        try:
            await machine.tasks.quiet(quiet_s, limit_s)
            while await make_one():
                await machine.tasks.quiet(quiet_s, limit_s)
        except SandmartinError as error:
            level = logging.DEBUG if isinstance(error, Exhausted) else logging.WARNING
            _log.log(level, "the pool of %s is not filled: %s", what, error)
            await asyncio.sleep(_RETRY_S)
            wanted.set()
