"""Operations: long work on a sandbox, each a row with a lease.

Whoever begins one changes the sandbox's state in the same transaction, before anything is sent to
a host. The work is done outside any transaction and belongs to this replica, not to the request
that asked for it. Its result is applied in one transaction fenced by the lease's token; the
sandbox's row only changes while its `operation_id` names the operation, so that what was overtaken
(a destroy always wins) settles what else it made and leaves the sandbox alone. Where it cannot be
known what a host did, the operation stays open, and says why; its lease expires, and this or
another replica takes it and does it again. Every step is one that can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.db import Database, uncut
from sandmartin.errors import SandmartinError, TimedOut, Unavailable, from_code
from sandmartin.model import random_id
from sandmartin.phases import Clock

_log = logging.getLogger(__name__)

#: Operations that are taken up at a time.
_AT_ONCE = 50
_LOOK_S = 0.2


class Kind(StrEnum):
    CREATE = "create"
    PAUSE = "pause"
    RESUME = "resume"
    DESTROY = "destroy"
    FORK = "fork"
    SNAPSHOT = "snapshot"
    CHECKPOINT = "checkpoint"
    ROLLBACK = "rollback"
    FLATTEN = "flatten"

    @property
    def done(self) -> str:
        """What a sandbox is by it, for a sentence."""
        return _DONE[self]


_DONE = {
    Kind.CREATE: "created",
    Kind.PAUSE: "paused",
    Kind.RESUME: "resumed",
    Kind.DESTROY: "destroyed",
    Kind.FORK: "forked",
    Kind.SNAPSHOT: "made a template of",
    Kind.CHECKPOINT: "checkpointed",
    Kind.ROLLBACK: "rolled back",
    Kind.FLATTEN: "made an image of",
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long leases last, and how soon what is left lying is taken up."""

    lease_s: float = 30.0
    pick_up_s: float = 2.0
    #: How long what could not be done now waits before it is tried again.
    retry_s: float = 5.0
    #: How long a stopping replica waits for its own work.
    grace_s: float = 25.0
    #: How long somebody waits for what another replica does.
    wait_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """An operation whose lease this replica holds."""

    operation_id: str
    sandbox_id: str
    kind: Kind
    arguments: Mapping[str, Any] = field(repr=False)
    state_before: str
    token: str
    attempts: int
    #: What the time goes to, from when it was begun or taken over.
    clock: Clock = field(default_factory=Clock, repr=False, compare=False)

    @classmethod
    def of(cls, row: tables.Operation) -> Held:
        return cls(
            operation_id=row.operation_id,
            sandbox_id=row.sandbox_id,
            kind=Kind(row.kind),
            arguments=row.arguments,
            state_before=row.state_before,
            token=row.lease_token,
            attempts=row.attempts,
        )


#: Does the work of one kind, applies its result by `Operations.apply`, and returns what it gave.
Work = Callable[[Held], Awaitable[Any]]


class Overtaken(SandmartinError):
    """Something else was done to the sandbox meanwhile."""

    code = "overtaken"


class Unfinished(Unavailable):
    """It is taken up again by itself: to ask for it once more would be to ask for another."""

    retryable = False


class LeaseLost(Overtaken):
    """Another replica has taken the operation over."""


class Operations:
    """The operations of one replica, whose name is `owner`."""

    def __init__(self, db: Database, owner: str, timing: Timing = Timing()) -> None:
        self._db = db
        self._owner = owner
        self._timing = timing
        self._works: dict[Kind, Work] = {}
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._closing = False
        #: Called with the name of each step: for tests that end the process there.
        self.step: Callable[[str], None] = lambda _: None
        #: Called at an operation's end with its kind, the error's code (or nothing), and seconds.
        self.ended: Callable[[Kind, str, float], None] = lambda *_: None

    def register(self, kind: Kind, work: Work) -> None:
        self._works[kind] = work

    # Beginning.

    def begin(
        self,
        session: AsyncSession,
        sandbox_id: str,
        kind: Kind,
        *,
        state_before: str,
        **arguments: Any,
    ) -> Held:
        """A new operation with its lease, in the transaction that changes the sandbox's state."""
        row = tables.Operation(
            operation_id=f"op{random_id(20)}",
            sandbox_id=sandbox_id,
            kind=kind,
            arguments=arguments,
            state_before=state_before,
            created_at=time.time(),
            lease_owner=self._owner,
            lease_token=random_id(20),
            lease_expires_at=time.time() + self._timing.lease_s,
            attempts=1,
        )
        session.add(row)
        return Held.of(row)

    async def run(self, held: Held) -> Any:
        """Do the work; a caller that gives up waiting does not end it. Raises what it raises."""
        return await asyncio.shield(self._start(held))

    def _start(self, held: Held) -> asyncio.Task[Any]:
        task = asyncio.create_task(self._do(held), name=f"{held.kind} {held.sandbox_id}")
        self._running[held.operation_id] = task
        began_at = time.monotonic()

        def ended(task: asyncio.Task[Any]) -> None:
            self._running.pop(held.operation_id, None)
            self.ended(held.kind, _outcome(task), time.monotonic() - began_at)
            if not task.cancelled() and (error := task.exception()) is not None:
                # Whoever waits is told as well; nobody may be left who does.
                bug = None if isinstance(error, SandmartinError) else error
                _log.log(
                    logging.ERROR if bug else logging.INFO,
                    "%s of sandbox %s failed: %s",
                    held.kind,
                    held.sandbox_id,
                    error,
                    exc_info=bug,
                )

        task.add_done_callback(ended)
        return task

    async def _do(self, held: Held) -> Any:
        self.step(f"{held.kind}:begun")
        renewing = asyncio.create_task(self._renew(held), name=f"lease {held.operation_id}")
        try:
            return await self._works[held.kind](held)
        except LeaseLost:
            return await self.wait(held.operation_id)
        except (Unavailable, TimedOut) as error:
            if error.answered:
                raise
            # What the host did is not known: it is found out when it can be asked again.
            await self._leave(held, error)
            raise _unfinished(held.kind, held.sandbox_id, error.message) from error
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})

    async def _renew(self, held: Held) -> None:
        while True:
            await asyncio.sleep(self._timing.lease_s / 3)
            with contextlib.suppress(Unavailable):
                if not await self._update(
                    held, lease_expires_at=time.time() + self._timing.lease_s
                ):
                    return

    async def _leave(self, held: Held, error: SandmartinError) -> None:
        """Let it be taken up again soon, and say why until then."""
        with contextlib.suppress(Unavailable):
            await self._update(
                held,
                lease_expires_at=time.time() + self._timing.retry_s,
                error_code=error.code,
                error_message=error.message,
            )

    async def _update(self, held: Held, **values: Any) -> bool:
        """Whether the lease is still ours."""
        async with self._db.write() as session:
            done = await session.execute(
                update(tables.Operation).where(*_held(held)).values(values)
            )
        return bool(done.rowcount)  # type: ignore[attr-defined]

    # Ending.

    async def finish(
        self, session: AsyncSession, held: Held, error: SandmartinError | None = None
    ) -> None:
        """Close an operation, in the transaction that applies its result. Raises LeaseLost."""
        done = await session.execute(
            update(tables.Operation)
            .where(*_held(held))
            .values(
                finished_at=time.time(),
                error_code=error.code if error else "",
                error_message=error.message if error else "",
                # What it needed to know may hold secrets.
                arguments={},
            )
        )
        if not done.rowcount:  # type: ignore[attr-defined]
            raise LeaseLost(f"{held.kind} of sandbox {held.sandbox_id} is another replica's now")

    # What others left.

    async def pick_up(self) -> None:
        """Take up what nobody works on, for ever."""
        while True:
            await asyncio.sleep(self._timing.pick_up_s)
            try:
                for held in await uncut(self.take_expired()):
                    self._start(held)
            except Unavailable as error:
                _log.warning("operations are not looked at: %s", error)
            except Exception:  # noqa: BLE001
                # A supervisor: without it nothing would ever be taken up again.
                _log.exception("operations are not looked at")

    async def take_expired(self) -> list[Held]:
        """Take the leases of operations whose owners are gone."""
        if self._closing:
            return []
        now = time.time()
        expired = (tables.Operation.finished_at.is_(None), tables.Operation.lease_expires_at < now)
        taken = []
        async with self._db.write() as session:
            # Ours are not among them: there only the renewal is late.
            query = select(tables.Operation).where(
                *expired, tables.Operation.operation_id.not_in(list(self._running))
            )
            query = query.order_by(tables.Operation.lease_expires_at).limit(_AT_ONCE)
            for row in (await session.scalars(query)).all():
                token = random_id(20)
                done = await session.execute(
                    update(tables.Operation)
                    .where(tables.Operation.operation_id == row.operation_id, *expired)
                    .values(
                        lease_owner=self._owner,
                        lease_token=token,
                        lease_expires_at=now + self._timing.lease_s,
                        attempts=row.attempts + 1,
                    )
                )
                if done.rowcount:  # type: ignore[attr-defined]
                    await session.refresh(row)
                    taken.append(Held.of(row))
        return taken

    async def wait(self, operation_id: str) -> None:
        """Wait for an operation's end, whoever does it. Raises the error it ended with.

        Unavailable when it cannot be finished just now.
        """
        until = time.monotonic() + self._timing.wait_s
        while True:
            task = self._running.get(operation_id)
            if task is not None and task is not asyncio.current_task():
                await asyncio.shield(task)
                return
            async with self._db.read() as session:
                row = await session.get(tables.Operation, operation_id)
            if row is None:
                return
            if row.finished_at is not None:
                if row.error_code:
                    raise _ended_with(row)
                return
            if row.error_code or time.monotonic() > until:
                why = row.error_message or "another replica works on it"
                raise _unfinished(row.kind, row.sandbox_id, why)
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """Wait for the work under way; what does not end is left to other replicas."""
        self._closing = True
        tasks = set(self._running.values())
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=self._timing.grace_s)
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)


def _outcome(task: asyncio.Task[Any]) -> str:
    """Code of the error a task ended with; empty for success."""
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return "" if error is None else getattr(error, "code", SandmartinError.code)


def _ended_with(row: tables.Operation) -> SandmartinError:
    if row.error_code == Overtaken.code:
        return Overtaken(row.error_message)
    return from_code(row.error_code, row.error_message)


def _unfinished(kind: str, sandbox_id: str, why: str) -> Unfinished:
    return Unfinished(
        f"{kind} of sandbox {sandbox_id} is not finished: {why}",
        hint="it is taken up again by itself; look at the sandbox's state",
    )


def _held(held: Held) -> tuple[Any, ...]:
    row = tables.Operation
    return (
        row.operation_id == held.operation_id,
        row.lease_token == held.token,
        row.finished_at.is_(None),
    )
