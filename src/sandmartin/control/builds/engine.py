"""The work of one build: its stages in order, and its template with its names at the end.

What each stage comes to is settled first, as that needs no sandbox but for what it starts from;
then only those stages do something whose work is not there already.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import update

from sandmartin.control import audit, events
from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Action, Place, Settled, settle
from sandmartin.control.builds.contexts import Contexts
from sandmartin.control.builds.grounds import Ground, Grounds
from sandmartin.control.builds.layers import Layers
from sandmartin.control.builds.lease import Lease, lease_of
from sandmartin.control.builds.log import Log
from sandmartin.control.builds.placing import Placing, digest_of_other
from sandmartin.control.builds.request import NewBuild
from sandmartin.control.builds.service import tell_end
from sandmartin.control.builds.settings import BuildSettings
from sandmartin.control.builds.stage import Shape, Shop, StageAtWork
from sandmartin.control.caller import Caller
from sandmartin.control.db import Database
from sandmartin.control.defaults import defaults_to_dict
from sandmartin.control.operations import LeaseLost
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.states import BuildState, TemplateState
from sandmartin.control.tables import Build, Template
from sandmartin.control.tags import move_tags
from sandmartin.transport.agent import Agent


@dataclass(frozen=True, kw_only=True)
class Work:
    """A build that is this replica's to do."""

    lease: Lease
    row: Build
    new: NewBuild
    log: Log
    caller: Caller
    #: When it must be over.
    until: float


class Engine:
    """Builds templates."""

    def __init__(
        self,
        db: Database,
        sandboxes: Sandboxes,
        layers: Layers,
        grounds: Grounds,
        contexts: Contexts,
        settings: BuildSettings,
    ) -> None:
        self._db = db
        self._sandboxes = sandboxes
        self._layers = layers
        self._grounds = grounds
        self.contexts = contexts
        self._settings = settings

    async def build(self, work: Work) -> None:
        """Do it all, and publish the template.

        Raises StepFailed, InvalidBuild, what hosts refuse, and LeaseLost.
        """
        shop = self._shop(work)
        what = work.new.read()
        for note in what.notes:
            await work.log.say(f"{note.position}: {note.sentence}", "warn")
        async with contextlib.AsyncExitStack() as stack:
            stages = Stages(self, work, shop, what, stack)
            try:
                last = await stages.do()
                template = await last.finish(defaults_to_dict(last.settled.defaults, what))
                await self._publish(work, template)
            finally:
                await stages.end()

    def _shop(self, work: Work) -> Shop:
        new = work.new
        return Shop(
            build_id=work.row.build_id,
            caller=work.caller,
            sandboxes=self._sandboxes,
            layers=self._layers,
            log=work.log,
            shape=Shape(vcpus=new.vcpus, memory_mb=new.memory_mb, disk_size_mb=new.disk_size_mb),
            secrets=new.secrets,
            no_cache=new.no_cache,
            layer_after_s=self._settings.layer_after_s,
            until=work.until,
        )

    async def ground(self, work: Work, ground: plan.Ground) -> Ground:
        """What a stage starts from that is no stage."""
        return await self._grounds.prepare(work.row, work.new, work.log, ground)

    async def note(self, work: Work, **values: int) -> None:
        """Note how far it is. Raises LeaseLost."""
        async with self._db.write() as session:
            done = await session.execute(update(Build).where(*lease_of(work.lease)).values(values))
            if not done.rowcount:  # type: ignore[attr-defined]
                raise LeaseLost(f"build {work.row.build_id} is another replica's now")

    async def _publish(self, work: Work, template: Template) -> None:
        """Give it its names and end the build, in one transaction. Raises LeaseLost."""
        new, log, row = work.new, work.log, work.row
        names = ", ".join(f"{row.name}:{tag}" for tag in row.tags)
        await log.say(f"template {names} is ready", always=True)
        async with log.turn, self._db.write() as session:
            await log.write(session)
            made = await session.get(Template, template.template_id, with_for_update=True)
            if made is None or made.state != TemplateState.HIDDEN:
                raise LeaseLost(f"the template of build {row.build_id} is gone")
            made.state, made.layer_key = TemplateState.READY, None
            made.created_at, made.created_by = time.time(), row.created_by
            if made.kind == "image":
                made.vcpus, made.memory_mb = new.vcpus or 0, new.memory_mb or 0
            await session.flush()
            await move_tags(session, made, row.name, row.tags)
            await session.execute(
                update(Build)
                .where(*lease_of(work.lease))
                .values(
                    state=BuildState.READY,
                    template_id=made.template_id,
                    steps_done=Build.steps_total,
                    finished_at=time.time(),
                    sealed_request=None,
                )
                .execution_options(synchronize_session=False)
            )
            over = await session.get(Build, row.build_id, populate_existing=True)
            assert over is not None
            tell_end(session, over)
            events.record(session, row.team_id, "template.created", name=made.name)
            audit.record(session, work.caller, "template.built", "template", made.name)
            await self._layers.undo(session, row.build_id)
        log.written()


class Stages:
    """The stages of one build, by their names."""

    def __init__(
        self,
        engine: Engine,
        work: Work,
        shop: Shop,
        what: plan.Build,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._engine = engine
        self._work = work
        self._shop = shop
        self._plan = what
        self._placing = Placing(
            engine.contexts, work.row.team_id, work.new.context, stack, self._reach
        )
        self._settled: dict[str, Settled] = {}
        self._at_work: dict[str, StageAtWork] = {}
        self._grounds: dict[plan.Ground, Ground] = {}
        self._done = self._cached = 0

    async def do(self) -> StageAtWork:
        """Do what is not there already; the last stage."""
        arguments: Mapping[str, str] = self._work.new.arguments
        await self._prepare()
        for stage in self._plan.stages:
            ground = await self._ground(stage.ground)
            self._settled[stage.name] = settle(
                stage,
                ground.key,
                ground.defaults,
                arguments,
                self._digest_of,
                is_template=stage is self._plan.template,
            )
        total = sum(len(each.actions) for each in self._settled.values())
        await self._engine.note(self._work, steps_total=total)
        return await self._stage(self._plan.template.name)

    async def _ground(self, ground: plan.Ground) -> Ground:
        if isinstance(ground, plan.FromStage):
            settled = self._settled[ground.name]
            return Ground(key=settled.key, defaults=settled.defaults)
        if ground not in self._grounds:
            self._grounds[ground] = await self._engine.ground(self._work, ground)
        return self._grounds[ground]

    async def _prepare(self) -> None:
        """Have what all stages need to be settled. Raises NotFound, InvalidBuild."""
        copies = [
            step
            for stage in self._plan.stages
            for step in stage.steps
            if isinstance(step, plan.Copy)
        ]
        await self._placing.open(copies)
        for copy in copies:
            if isinstance(copy.origin, plan.Image):
                await self._ground(copy.origin)

    def _digest_of(self, action: Place) -> str:
        match action.origin:
            case plan.FromStage(name):
                return digest_of_other(self._settled[name].key, action)
            case plan.Image():
                return digest_of_other(self._grounds[action.origin].key, action)
        return self._placing.digest_of(action)

    async def _reach(self, origin: plan.FromStage | plan.Image) -> tuple[Agent, str]:
        """The sandbox of a stage that is done, or of an image as it is."""
        if isinstance(origin, plan.FromStage):
            other = await self._stage(origin.name)
        else:
            other = await self._as_it_is(origin)
        return await other.agent(), other.sandbox_id

    async def _as_it_is(self, image: plan.Image) -> StageAtWork:
        name = f"image {image.reference}"
        if name not in self._at_work:
            ground = await self._ground(image)
            assert ground.template is not None
            settled = Settled(actions=(), key=ground.key, defaults=ground.defaults, launches=())
            stage = StageAtWork(self._shop, settled, ground.template, self, self)
            self._at_work[name] = stage
        return self._at_work[name]

    async def _stage(self, name: str, *, keep_last: bool = False) -> StageAtWork:
        """A stage that is done."""
        found = self._at_work.get(name)
        if found is None:
            stage = next(each for each in self._plan.stages if each.name == name)
            template = (await self._ground(stage.ground)).template
            if isinstance(stage.ground, plan.FromStage):
                template = (await self._stage(stage.ground.name, keep_last=True)).layer
            assert template is not None
            found = StageAtWork(self._shop, self._settled[name], template, self, self)
            self._at_work[name] = found
        await found.do(keep_last=keep_last)
        return found

    async def place(self, agent: Agent, sandbox_id: str, action: Place) -> None:
        await self._placing.place(agent, sandbox_id, action)

    async def step(self, action: Action, *, cached: bool) -> int:
        """The next step begins, or was found done; its number in the build."""
        log = self._work.log
        self._done += 1
        self._cached += cached
        log.step, log.phase = self._done, action.step.phase
        await self._engine.note(
            self._work, steps_done=self._done - (not cached), steps_cached=self._cached
        )
        return self._done

    async def end(self) -> None:
        for each in self._at_work.values():
            await each.end()
