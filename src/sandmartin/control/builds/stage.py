"""One stage of a build at work: a sandbox of its own, in which its actions are done in order.

It begins from the last layer that is there. After each action that took its time the sandbox is
kept as a layer, as it runs; after one that had secrets only its disk is, and the next goes on in a
new sandbox with new memory, so that no memory that held a secret is ever kept. What can fail fails
before anything is kept of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sandmartin.control import tables
from sandmartin.control.builds.accounts import make_account, make_directory
from sandmartin.control.builds.actions import (
    Action,
    Execute,
    Launch,
    MakeAccount,
    MakeDirectory,
    Place,
    Settled,
)
from sandmartin.control.builds.commands import execute
from sandmartin.control.builds.failure import StepFailed
from sandmartin.control.builds.layers import Layers, layer_key
from sandmartin.control.builds.log import Log
from sandmartin.control.builds.startup import Launched, wait_until_ready
from sandmartin.control.caller import Caller
from sandmartin.control.requests import NewRow
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.templates import Hidden
from sandmartin.errors import SandmartinError
from sandmartin.transport.agent import Agent

_SHOWN_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the sandboxes of a build; what is None is left to the ground."""

    vcpus: int | None
    memory_mb: int | None
    disk_size_mb: int | None


@dataclass(frozen=True, kw_only=True)
class Shop:
    """What all stages of one build work with."""

    build_id: str
    caller: Caller
    sandboxes: Sandboxes
    layers: Layers
    log: Log
    shape: Shape
    secrets: Mapping[str, str]
    no_cache: bool
    layer_after_s: float
    until: float


class Files(Protocol):
    """Where the files of a COPY come from."""

    async def place(self, agent: Agent, sandbox_id: str, action: Place) -> None: ...


class Progress(Protocol):
    """Hears of each action that is done."""

    async def step(self, action: Action, *, cached: bool) -> int: ...


class StageAtWork:
    """A stage, and its sandbox once there is one."""

    def __init__(
        self,
        shop: Shop,
        settled: Settled,
        ground: tables.Template,
        files: Files,
        progress: Progress,
    ) -> None:
        self._shop = shop
        self.settled = settled
        self._ground = ground
        self._files = files
        self._progress = progress
        self._launched: list[Launched] = []
        #: Since when nothing was kept.
        self._kept_at = time.monotonic()
        self._done = False
        self._start_from = ground
        self.sandbox_id = ""
        #: Whether its memory is as it was kept last, and the layer that this was.
        self.layer: tables.Template | None = None

    def key_of(self, action: Action) -> str:
        shape = self._shop.shape
        words = (str(each) for each in (shape.vcpus, shape.memory_mb, shape.disk_size_mb))
        return layer_key(action.key, *words)

    async def do(self, *, keep_last: bool = False) -> None:
        """All of its actions, once. `keep_last` has its end kept, for stages that start there.

        Raises StepFailed, InvalidBuild, and what the host refused.
        """
        if self._done:
            return
        actions = self.settled.actions
        first = await self._begin()
        for number, action in enumerate(actions[first:], first):
            last = keep_last and number == len(actions) - 1
            await self._do(action, is_last=last)
        if keep_last and self.layer is None:
            await self._keep(self._end_key(), has_secrets=False)
        self._done = True

    def _end_key(self) -> str:
        actions = self.settled.actions
        return self.key_of(actions[-1]) if actions and actions[-1].cacheable else ""

    async def _begin(self) -> int:
        """Start where somebody has been before; how many actions are done by that."""
        actions = self.settled.actions
        keys = [self.key_of(each) for each in actions if each.cacheable]
        found = None
        if keys and not self._shop.no_cache:
            found = await self._shop.layers.find(self._shop.caller.team_id, keys)
        if found is None:
            return 0
        first = keys.index(found.layer_key or "") + 1
        for action in actions[:first]:
            await self._progress.step(action, cached=True)
            await self._shop.log.say(f"{_shown(action)} (cached)")
        self._start_from = found
        if first == len(actions):
            self.layer = found
        return first

    async def agent(self) -> Agent:
        """The agent of its sandbox, which is made if there is none yet."""
        if not self.sandbox_id:
            await self._create(self._start_from)
        return await self._shop.sandboxes.reach(self._shop.caller, self.sandbox_id)

    async def _create(self, template: tables.Template) -> None:
        shape = self._shop.shape
        new = NewRow(
            template=f"build-{self._shop.build_id}",
            template_id=template.template_id,
            build_id=self._shop.build_id,
            vcpus=shape.vcpus or self._ground.vcpus or None,
            memory_mb=shape.memory_mb or self._ground.memory_mb or None,
            disk_size_mb=shape.disk_size_mb or self._ground.disk_size_mb or None,
            lifetime_s=max(1, round(self._shop.until - time.time()) + 60),
            on_timeout="kill",
        )
        row = await self._shop.sandboxes.create(self._shop.caller, new)
        self.sandbox_id = row.sandbox_id
        self._kept_at = time.monotonic()

    # One action.

    async def _do(self, action: Action, *, is_last: bool) -> None:
        log = self._shop.log
        await self._progress.step(action, cached=False)
        await log.say(_shown(action))
        agent = await self.agent()
        began_at = time.monotonic()
        try:
            await self._perform(agent, action)
        except StepFailed as error:
            where = action.step.position
            raise StepFailed(f"{where}: {error.message}", hint=error.hint) from error
        self.layer = None
        await log.say(f"done in {time.monotonic() - began_at:.1f} s", "debug")
        has_secrets = isinstance(action, Execute) and bool(action.secrets)
        took = time.monotonic() - self._kept_at
        worth = action.cacheable and (is_last or took >= self._shop.layer_after_s)
        if has_secrets or worth:
            key = self.key_of(action) if action.cacheable else ""
            await self._keep(key, has_secrets=has_secrets)

    async def _perform(self, agent: Agent, action: Action) -> None:
        match action:
            case Launch():
                await self._launch(agent, action)
            case Execute():
                secrets = self._shop.secrets
                await execute(agent, self.sandbox_id, action, self._shop.log, secrets)
            case Place():
                await self._files.place(agent, self.sandbox_id, action)
            case MakeDirectory():
                await make_directory(agent, self.sandbox_id, action.path, action.owner)
            case MakeAccount():
                await make_account(agent, self.sandbox_id, action.name)

    async def _launch(self, agent: Agent, action: Launch) -> None:
        launched = Launched(agent, self.sandbox_id, self._shop.log)
        self._launched.append(launched)
        await launched.start(action, action.argv)

    # What is kept.

    async def _keep(self, key: str, *, has_secrets: bool) -> None:
        """Keep where the sandbox is. With secrets its disk alone, and a new one goes on."""
        shop = self._shop
        await self.agent()
        hidden = Hidden(
            build_id=shop.build_id,
            kind="image" if has_secrets else "snapshot",
            layer_key=key,
            defaults={},
        )
        if has_secrets:
            self.layer = await shop.sandboxes.flatten(shop.caller, self.sandbox_id, hidden)
            # The one after it is made when there is something to do in it.
            self._start_from, self.sandbox_id = self.layer, ""
        else:
            self.layer = await shop.sandboxes.keep(shop.caller, self.sandbox_id, hidden)
        self._kept_at = time.monotonic()

    async def finish(self, defaults: dict[str, Any]) -> tables.Template:
        """Make the template of it: an image, or what runs once it is ready. It has no name yet.

        Raises StepFailed.
        """
        shop, settled = self._shop, self.settled
        warm = bool(settled.launches) or settled.defaults.check is not None
        agent = await self.agent()
        hidden = Hidden(
            build_id=shop.build_id, kind="snapshot" if warm else "image", defaults=defaults
        )
        if not warm:
            await shop.log.say("writing the image")
            return await shop.sandboxes.flatten(shop.caller, self.sandbox_id, hidden)
        try:
            await wait_until_ready(
                agent, self.sandbox_id, settled.defaults, self._launched, shop.log
            )
        finally:
            await self.leave()
        await shop.log.say("keeping it as it runs")
        return await shop.sandboxes.keep(shop.caller, self.sandbox_id, hidden)

    async def leave(self) -> None:
        for each in self._launched:
            await each.leave()
        self._launched.clear()

    async def end(self) -> None:
        """Destroy its sandbox; what cannot be destroyed now is later."""
        await self.leave()
        if self.sandbox_id:
            sandbox_id, self.sandbox_id = self.sandbox_id, ""
            try:
                await self._shop.sandboxes.destroy(self._shop.caller, sandbox_id)
            except SandmartinError as error:
                await self._shop.log.say(f"its sandbox is ended later: {error.message}", "debug")


def _shown(action: Action) -> str:
    written = " ".join(action.step.written.split())
    return written if len(written) <= _SHOWN_CHARS else f"{written[:_SHOWN_CHARS]}..."
