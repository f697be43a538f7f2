"""One replica of the control plane: its parts, put together and taken apart in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sandmartin.artefacts.store import Store
from sandmartin.context.archive import Limits as ArchiveLimits
from sandmartin.control.accounts import Accounts
from sandmartin.control.artefacts import Artefacts
from sandmartin.control.authority import Authority
from sandmartin.control.blobs import Blobs
from sandmartin.control.builds.contexts import Contexts
from sandmartin.control.builds.engine import Engine
from sandmartin.control.builds.grounds import Grounds
from sandmartin.control.builds.layers import LayerLimits, Layers
from sandmartin.control.builds.queue import Queue
from sandmartin.control.builds.service import Builds
from sandmartin.control.builds.settings import BuildSettings
from sandmartin.control.contents import Contents
from sandmartin.control.db import Database
from sandmartin.control.deadlines import Deadlines
from sandmartin.control.events import Events
from sandmartin.control.garbage import Garbage
from sandmartin.control.guarded import Outgoing, allowed_networks
from sandmartin.control.hosts import Hosts
from sandmartin.control.keys import Keys
from sandmartin.control.leader import Leader
from sandmartin.control.limits import Limits
from sandmartin.control.migrations import upgrade
from sandmartin.control.notifications import Notifications, Patience
from sandmartin.control.oauth import Oauth
from sandmartin.control.operations import Operations, Timing
from sandmartin.control.quotas import Quotas
from sandmartin.control.reconciler import Pace, Reconciler
from sandmartin.control.retention import Keep, Retention
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.seal import Sealer
from sandmartin.control.sessions import Sessions
from sandmartin.control.settings import ControlSettings
from sandmartin.control.tags import Tags
from sandmartin.control.teams import Teams
from sandmartin.control.telemetry import Telemetry
from sandmartin.control.templates import Templates
from sandmartin.control.tokens import Tokens
from sandmartin.control.trust import Trust
from sandmartin.control.usage import Usage
from sandmartin.control.waking import Waking
from sandmartin.model import random_id
from sandmartin.transport import ArtefactStore

_log = logging.getLogger(__name__)

#: Nobody's end comes later than this, and what the hosts take for it.
_DEADLINES_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How long the parts wait, and how much they do at once."""

    timing: Timing
    pace: Pace
    patience: Patience
    building: BuildSettings


class Platform:
    """All that requests are served with."""

    def __init__(
        self,
        settings: ControlSettings,
        db: Database,
        sealer: Sealer,
        owner: str,
        hosts: Hosts,
        rhythm: Rhythm,
    ) -> None:
        timing, pace = rhythm.timing, rhythm.pace
        self.settings, self.db, self.sealer, self.hosts = settings, db, sealer, hosts
        self.events = happenings = Events(db)
        self.usage = usage = Usage(db)
        self.templates = templates = Templates(db, hosts)
        self.tags = Tags(db)
        self.contents = Contents(db, hosts, templates)
        self.artefacts = artefacts = _artefacts(settings, db, hosts, sealer, pace, timing)
        self.garbage = _garbage(settings, db, owner)
        self.operations = operations = Operations(db, owner, timing)
        self.quotas = quotas = _quotas(settings)
        self.sandboxes = sandboxes = Sandboxes(
            db, operations, hosts, templates, quotas, happenings, usage, sealer, artefacts
        )
        self.reconciler = Reconciler(db, hosts, sandboxes, templates, happenings, pace)
        self.deadlines = Deadlines(db, sandboxes, min(_DEADLINES_S, pace.period_s))
        self.leader = Leader(db, owner)
        limits = Limits(db)
        self.waking = Waking(db, hosts, sandboxes, happenings, limits, settings.wake_s)
        self.teams = Teams(db, limits, sandboxes, templates, sweep_s=pace.period_s)
        self.accounts = Accounts(db, settings, limits, self.teams)
        self.oauth = Oauth(db, sealer, self.accounts, limits, settings)
        self.keys, self.sessions, self.tokens = Keys(db), Sessions(db), Tokens(sealer)
        self.trust = Trust(db, happenings)
        outgoing = Outgoing(allowed_networks(settings.outgoing_allow))
        self.notifications = Notifications(db, sealer, happenings, outgoing, rhythm.patience)
        self.retention = Retention(db, _keep(settings))
        self.telemetry = Telemetry(db, operations, self.reconciler)
        self.builds, self.queue = self._builds_and_queue(owner, rhythm.building)

    def _builds_and_queue(self, owner: str, building: BuildSettings) -> tuple[Builds, Queue]:
        """Builds that are asked for, and what works them off."""
        db, sealer, happenings, sandboxes = self.db, self.sealer, self.events, self.sandboxes
        contexts, most = _contexts(self.settings), self.settings.max_builds_per_team
        builds = Builds(db, sealer, happenings, contexts, max_open=most)
        layers = Layers(db, building.layers)
        fresh_s = building.image_fresh_s
        grounds = Grounds(db, self.hosts, self.templates, layers, contexts, fresh_s)
        engine = Engine(db, sandboxes, layers, grounds, contexts, building)
        queue = Queue(db, owner, sealer, happenings, sandboxes, layers, builds, engine, building)
        return builds, queue

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """What is done without being asked for, for as long as the context lasts."""
        tasks = [
            asyncio.create_task(self.operations.pick_up(), name="operations"),
            asyncio.create_task(self.teams.sweep(), name="deleted teams"),
            asyncio.create_task(self.leader.lead(self._lead), name="leader"),
            asyncio.create_task(self.events.watch(), name="events"),
            asyncio.create_task(self.trust.run(), name="trust"),
            asyncio.create_task(self.notifications.run(), name="notifications"),
            asyncio.create_task(self.queue.run(), name="builds"),
            asyncio.create_task(self.artefacts.run(), name="artefacts"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.queue.close()
            await self.operations.close()

    async def _lead(self) -> None:
        """What only one replica does."""
        async with asyncio.TaskGroup() as group:
            works = (self.reconciler.run, self.deadlines.run, self.usage.run, self.retention.run)
            for work in (*works, self.queue.sweep, self.garbage.run):
                group.create_task(work())


@contextlib.asynccontextmanager
async def open_platform(
    settings: ControlSettings,
    *,
    timing: Timing | None = None,
    pace: Pace | None = None,
    patience: Patience | None = None,
    building: BuildSettings | None = None,
) -> AsyncIterator[Platform]:
    """The parts of one replica, its database brought to this release's form.

    Raises Unavailable, Invalid.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    sealer = await _open_sealer(settings)
    await asyncio.to_thread(upgrade, settings.url)
    rhythm = Rhythm(
        timing=timing or Timing(),
        pace=pace or Pace(period_s=settings.reconcile_s, unreachable_s=settings.unreachable_s),
        patience=patience or Patience(),
        building=building or _builds(settings),
    )
    async with contextlib.AsyncExitStack() as stack:
        db = Database.open(settings.url)
        stack.push_async_callback(db.close)
        owner = random_id(12)
        hosts = Hosts(db, await Authority.open(db, sealer, owner))
        stack.push_async_callback(hosts.close)
        yield Platform(settings, db, sealer, owner, hosts, rhythm)


def _artefacts(
    settings: ControlSettings,
    db: Database,
    hosts: Hosts,
    sealer: Sealer,
    pace: Pace,
    timing: Timing,
) -> Artefacts:
    place, look_s = _place_of(settings, sealer), min(1.0, pace.period_s)
    return Artefacts(db, hosts, place, look_s=look_s, retry_s=timing.retry_s)


def _garbage(settings: ControlSettings, db: Database, owner: str) -> Garbage:
    store = Store.open(settings.artefact_store) if settings.artefact_store else None
    grace_s, period_s = settings.artefact_grace_s, settings.artefact_sweep_s
    return Garbage(db, store, owner, grace_s=grace_s, period_s=period_s)


async def _open_sealer(settings: ControlSettings) -> Sealer:
    if settings.secret_key:
        return Sealer(settings.secret_key)
    return await asyncio.to_thread(Sealer.open, settings.data_dir / "secret.key")


def _place_of(settings: ControlSettings, sealer: Sealer) -> ArtefactStore | None:
    """Where hosts put templates, and the key by which they know each other's."""
    if not settings.artefact_store:
        return None
    return ArtefactStore(url=settings.artefact_store, key=sealer.derive("artefacts"))


def _quotas(settings: ControlSettings) -> Quotas:
    return Quotas(
        max_sandboxes=settings.max_sandboxes,
        max_vcpus=settings.max_vcpus,
        max_memory_mb=settings.max_memory_mb,
    )


def _builds(settings: ControlSettings) -> BuildSettings:
    return BuildSettings(
        at_once=settings.builds_at_once,
        most_s=settings.max_build_s,
        layers=LayerLimits(count=settings.max_layers, size_bytes=settings.max_layers_mb << 20),
    )


def _contexts(settings: ControlSettings) -> Contexts:
    return Contexts(
        Blobs.open(settings.artefact_store_url),
        settings.data_dir,
        keep_s=settings.keep_contexts_days * 86400.0,
        limits=ArchiveLimits(),
    )


def _keep(settings: ControlSettings) -> Keep:
    return Keep(
        samples=settings.keep_samples_days,
        metrics=settings.keep_metrics_days,
        events=settings.keep_events_days,
        operations=settings.keep_operations_days,
        deliveries=settings.keep_deliveries_days,
    )
