"""The queue of builds: which of them this replica does, and what becomes of those that end.

A build is a row with a lease. Whoever has room takes the next that waits, of the team first that
has the fewest under way, or one whose replica is gone: that one goes on from the last layer that
was kept. What a build leaves in sandboxes is destroyed with its end, by whoever ends it, and by
the leader where nobody did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import aliased

from sandmartin.control import events
from sandmartin.control.builds.engine import Engine, Work
from sandmartin.control.builds.failure import StillBroken
from sandmartin.control.builds.layers import Layers
from sandmartin.control.builds.lease import Lease, lease_of
from sandmartin.control.builds.log import Log
from sandmartin.control.builds.request import NewBuild
from sandmartin.control.builds.service import Builds, tell, tell_end
from sandmartin.control.builds.settings import BuildSettings
from sandmartin.control.caller import system
from sandmartin.control.db import Database, uncut
from sandmartin.control.operations import LeaseLost, Overtaken
from sandmartin.control.sandboxes import Sandboxes
from sandmartin.control.seal import Sealer
from sandmartin.control.states import ALIVE, BuildState
from sandmartin.control.tables import Build, Sandbox
from sandmartin.errors import SandmartinError, TimedOut, Unavailable
from sandmartin.model import random_id

_log = logging.getLogger(__name__)
_SWEEP_S = 5.0
_PRUNE_EACH = 120


@dataclass
class _Running:
    """What is known of a build under way beside its work."""

    lease: Lease
    row: Build
    log: Log
    #: Why it is to end before its work does.
    end: BuildState | None = None
    lost: bool = False
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class Queue:
    """The builds that one replica, whose name is `owner`, does."""

    def __init__(
        self,
        db: Database,
        owner: str,
        sealer: Sealer,
        happenings: events.Events,
        sandboxes: Sandboxes,
        layers: Layers,
        builds: Builds,
        engine: Engine,
        settings: BuildSettings,
    ) -> None:
        self._db = db
        self._owner = owner
        self._sealer = sealer
        self._events = happenings
        self._sandboxes = sandboxes
        self._layers = layers
        self._builds = builds
        self._engine = engine
        self._settings = settings
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Take what waits, for ever."""
        while True:
            try:
                while len(self._tasks) < self._settings.at_once and (
                    row := await uncut(self.take())
                ):
                    self._start(row)
            except Unavailable as error:
                _log.warning("builds are not looked at: %s", error)
            except Exception:  # noqa: BLE001
                # A supervisor: without it nothing would ever be built again.
                _log.exception("builds are not looked at")
            await self._events.changed(self._settings.pick_up_s)
            # An event says nothing of builds, mostly; many of them are no reason to hurry.
            await asyncio.sleep(0.05)

    def _start(self, row: Build) -> None:
        task = asyncio.create_task(self._do(row), name=f"build {row.build_id}")
        self._tasks[row.build_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(row.build_id, None))

    async def close(self) -> None:
        """Leave what is under way to other replicas, at once."""
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Leases.

    async def take(self) -> Build | None:
        """The next build, which is this replica's then."""
        now = time.time()
        open_to_us = or_(
            and_(
                Build.state == BuildState.WAITING,
                Build.finished_at.is_(None),
                Build.awaited_until.is_(None),
            ),
            and_(Build.state == BuildState.BUILDING, Build.lease_expires_at < now),
        )
        other = aliased(Build)
        under_way = (
            select(func.count())
            .where(other.team_id == Build.team_id, other.state == BuildState.BUILDING)
            .scalar_subquery()
        )
        query = (
            select(Build)
            .where(open_to_us, Build.build_id.not_in(list(self._tasks)))
            .order_by(under_way, Build.created_at)
            .limit(1)
        )
        # Looking costs nobody his turn to write.
        async with self._db.read() as session:
            found = await session.scalar(query)
        return None if found is None else await self._take(found, open_to_us)

    async def _take(self, found: Build, condition: ColumnElement[bool]) -> Build | None:
        now = time.time()
        async with self._db.write() as session:
            done = await session.execute(
                update(Build)
                .where(Build.build_id == found.build_id, condition)
                .values(
                    state=BuildState.BUILDING,
                    started_at=func.coalesce(Build.started_at, now),
                    lease_owner=self._owner,
                    lease_token=random_id(20),
                    lease_expires_at=now + self._settings.lease_s,
                    attempts=Build.attempts + 1,
                )
                .execution_options(synchronize_session=False)
            )
            if not done.rowcount:  # type: ignore[attr-defined]
                return None
            row = await session.get(Build, found.build_id, populate_existing=True)
            assert row is not None
            if row.attempts == 1:
                tell(session, row, "build.started")
        self._events.wake()
        return row

    async def _hold(self, running: _Running) -> None:
        """Keep the lease, and see whether somebody wants the build to end; ends when it must."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._settings.look_s)
            with contextlib.suppress(Unavailable):
                if time.monotonic() - renewed > self._settings.lease_s / 3:
                    await self._renew(running.lease)
                    renewed = time.monotonic()
                async with self._db.read() as session:
                    query = select(Build.cancelling).where(*lease_of(running.lease))
                    cancelling = await session.scalar(query)
                if cancelling is None:
                    raise LeaseLost(f"build {running.lease.build_id} is another replica's now")
                if cancelling:
                    running.end = BuildState.CANCELLED
                    return

    async def _renew(self, lease: Lease) -> None:
        async with self._db.write() as session:
            await session.execute(
                update(Build)
                .where(*lease_of(lease))
                .values(lease_expires_at=time.time() + self._settings.lease_s)
            )

    async def _release(self, lease: Lease, in_s: float) -> None:
        """Let any replica take it up, in so many seconds."""
        with contextlib.suppress(SandmartinError):
            async with self._db.write() as session:
                await session.execute(
                    update(Build)
                    .where(*lease_of(lease))
                    .values(lease_expires_at=time.time() + in_s)
                )

    # One build.

    async def _do(self, row: Build) -> None:
        lease = Lease(build_id=row.build_id, team_id=row.team_id, token=row.lease_token)
        log = Log(self._db, self._events, lease, row, self._settings.log)
        running = _Running(lease, row, log)
        try:
            await self._try(running)
        except asyncio.CancelledError:
            # This replica stops; its sandboxes are ended by whoever takes it up.
            await uncut(self._release(lease, 0.0))
            raise
        except LeaseLost as error:
            _log.info("%s", error)
        except Unavailable as error:
            _log.warning("build %s is left for now: %s", row.build_id, error)
            await self._release(lease, self._settings.retry_s)
        except Exception:  # noqa: BLE001 - a bug must not keep a build under way for ever
            _log.exception("build %s failed", row.build_id)
            failure = SandmartinError("internal error; the server's log says more")
            with contextlib.suppress(SandmartinError):
                await self._end(running, BuildState.FAILED, failure)

    async def _try(self, running: _Running) -> None:
        """Do the work for as long as it may be done, and note its end. Raises LeaseLost."""
        row, log = running.row, running.log
        await self._end_sandboxes(row)
        if row.cancelling:
            await self._end(running, BuildState.CANCELLED, None)
            return
        if row.attempts > self._settings.attempts:
            raise_last = StillBroken(f"it was interrupted {row.attempts - 1} times, and given up")
            await self._end(running, BuildState.FAILED, raise_last)
            return
        if row.attempts > 1:
            await log.say("it was interrupted, and goes on from what was kept", "warn")
        assert row.started_at is not None and row.sealed_request is not None
        left_s = row.started_at + self._settings.most_s - time.time()
        error: SandmartinError | None = None
        try:
            async with asyncio.timeout(left_s):
                await self._work(running, left_s)
        except TimeoutError:
            error = TimedOut(
                f"the build took longer than {self._settings.most_s:g} s", hint="do less in it"
            )
        except (LeaseLost, asyncio.CancelledError):
            raise
        except SandmartinError as failure:
            error = failure
        if running.end is BuildState.CANCELLED:
            await self._end(running, BuildState.CANCELLED, None)
        elif error is not None:
            await self._failed(running, error)
        else:
            await self._end_sandboxes(row)

    async def _work(self, running: _Running, left_s: float) -> None:
        row = running.row
        new = NewBuild.from_json(self._sealer.unseal(row.sealed_request or b""))
        work = Work(
            lease=running.lease,
            row=row,
            new=new,
            log=running.log,
            caller=system(row.team_id),
            until=time.time() + left_s,
        )
        running.log.hidden = tuple(
            each for each in (*new.secrets.values(), *(new.registry or ())[1:]) if len(each) > 3
        )
        tasks = {
            asyncio.create_task(self._engine.build(work)),
            asyncio.create_task(self._hold(running)),
            asyncio.create_task(running.log.write_out()),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            task.result()

    async def _failed(self, running: _Running, error: SandmartinError) -> None:
        passing = isinstance(error, Unavailable | Overtaken)
        if passing and running.row.attempts < self._settings.attempts:
            await running.log.say(f"{error.message}; it is tried again", "warn", always=True)
            with contextlib.suppress(Unavailable):
                await running.log.flush()
            await self._release(running.lease, self._settings.retry_s)
            return
        await self._end(running, BuildState.FAILED, error)

    async def _end(
        self, running: _Running, state: BuildState, error: SandmartinError | None
    ) -> None:
        """Note that it is over without a template. Raises LeaseLost, Unavailable."""
        log = running.log
        said = error.message if error is not None else "it was cancelled"
        await log.say(said, "error" if error is not None else "warn", always=True)
        async with log.turn, self._db.write() as session:
            await log.write(session)
            await session.execute(
                update(Build)
                .where(*lease_of(running.lease))
                .values(
                    state=state,
                    finished_at=time.time(),
                    sealed_request=None,
                    error_code=error.code if error else "",
                    error_message=error.message if error else "",
                    error_hint=error.hint if error else "",
                    error_step=(log.step or None) if error else None,
                )
                .execution_options(synchronize_session=False)
            )
            row = await session.get(Build, running.lease.build_id, populate_existing=True)
            assert row is not None
            tell_end(session, row)
            await self._layers.undo(session, running.lease.build_id)
        log.written()
        await self._end_sandboxes(running.row)

    # What builds leave.

    async def _end_sandboxes(self, row: Build) -> None:
        await self._destroy(await self._sandboxes_of(Sandbox.build_id == row.build_id))

    async def _sandboxes_of(self, condition: ColumnElement[bool]) -> Sequence[Sandbox]:
        query = select(Sandbox).where(condition, Sandbox.state.in_(ALIVE))
        async with self._db.read() as session:
            return (await session.scalars(query)).all()

    async def _destroy(self, rows: Sequence[Sandbox]) -> None:
        ends = [self._sandboxes.destroy(system(each.team_id), each.sandbox_id) for each in rows]
        for failure in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(failure, SandmartinError):
                _log.info("a sandbox of a build is destroyed later: %s", failure)
            elif failure is not None:
                raise failure

    async def sweep(self) -> None:
        """End what nobody ended, and forget what is old, for as long as this replica leads."""
        looks = 0
        while True:
            try:
                over = select(Build.build_id).where(Build.finished_at.is_not(None))
                gone = and_(
                    Sandbox.build_id.is_not(None),
                    or_(
                        Sandbox.build_id.in_(over),
                        Sandbox.build_id.not_in(select(Build.build_id)),
                    ),
                )
                await uncut(self._builds.cancel_of_deleted_teams())
                await uncut(self._destroy_all(gone))
                if looks % _PRUNE_EACH == 0:
                    await uncut(self._builds.prune(time.time(), self._settings.keep_s))
                looks += 1
            except SandmartinError as error:
                _log.warning("what builds left is not looked at: %s", error)
            await asyncio.sleep(_SWEEP_S)

    async def _destroy_all(self, condition: ColumnElement[bool]) -> None:
        await self._destroy(await self._sandboxes_of(condition))
        await self._layers.evict()
