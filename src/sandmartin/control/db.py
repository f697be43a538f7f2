"""The database: SQLite or PostgreSQL behind one way to read and one way to write.

Every change is made in `write`, short and with no call to anything else inside: on SQLite it
takes the one write lock at its beginning, so that what was read in it stays true. A database that
does not answer is Unavailable, and what it cannot hold is Invalid, whatever its driver calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import Connection, Double, Engine, String, event, make_url
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase

from sandmartin.control import sqlite
from sandmartin.errors import Invalid, Unavailable

#: How long a writer waits for the one before it.
_BUSY_S = 5.0
_POOL_SIZE = 10
_POOL_WAIT_S = 10.0
_CONNECT_S = 5.0
_UNCUT_S = 5.0
_IMMEDIATE = "sandmartin_immediate"
_T = TypeVar("_T")
#: Classes of PostgreSQL's own codes: the connection, its means, its operator, its locks.
_PASSING = ("08", "40", "53", "57")
#: And of what it cannot hold, such as a NUL in a text.
_UNFIT = "22"

#: PostgreSQL keeps no NUL: character_not_in_repertoire, and untranslatable_character of JSON.
_UNFIT_TEXT = frozenset({"22021", "22P05"})

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}


class Base(DeclarativeBase):
    """What all tables have in common: texts without a limit, times in seconds since the epoch."""

    type_annotation_map = {str: String(), float: Double()}  # noqa: RUF012


class Database:
    """One database. To be closed."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._read = async_sessionmaker(engine, expire_on_commit=False)
        immediate = engine.execution_options(**{_IMMEDIATE: True})
        self._write = async_sessionmaker(immediate, expire_on_commit=False)
        self._shared: ContextVar[AsyncSession | None] = ContextVar("shared", default=None)
        # SQLite has one writer: ours queue here, in order and without a connection each, rather
        # than there, where who waits asks again and again.
        self._writer = asyncio.Lock() if self.is_sqlite else None

    @classmethod
    def open(cls, url: str) -> Database:
        """The database at `url`: `sqlite:///PATH` or `postgresql://…`. Raises Invalid."""
        parsed = make_url(url)
        driver = _DRIVERS.get(parsed.get_backend_name())
        if driver is None:
            raise Invalid(
                f"no database of the kind {parsed.get_backend_name()!r} can be used",
                hint="use sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME",
            )
        parsed = parsed.set(drivername=driver)
        if driver.startswith("sqlite"):
            engine = create_async_engine(
                parsed,
                connect_args={"timeout": _BUSY_S, "async_creator_fn": sqlite.connect},
                pool_size=_POOL_SIZE,
                max_overflow=0,
                # What a statement was given may be secret; its errors go to the log.
                hide_parameters=True,
            )
            _prepare_sqlite(engine.sync_engine)
        else:
            engine = create_async_engine(
                parsed,
                pool_size=_POOL_SIZE,
                max_overflow=_POOL_SIZE,
                pool_timeout=_POOL_WAIT_S,
                # One that the server has closed meanwhile is noticed before it is used.
                pool_pre_ping=True,
                hide_parameters=True,
                connect_args={"timeout": _CONNECT_S},
            )
        return cls(engine)

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A transaction that changes nothing. Raises Unavailable."""
        if (shared := self._shared.get()) is not None:
            yield shared
            return
        with driver_errors_as_ours():
            async with self._read() as session:
                yield session

    @contextlib.asynccontextmanager
    async def one_read(self) -> AsyncIterator[AsyncSession]:
        """All reads of this task in this context are one transaction. Raises Unavailable."""
        async with self.read() as session:
            before = self._shared.set(session)
            try:
                yield session
            finally:
                self._shared.reset(before)

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction, committed at the end or undone on any error. Raises Unavailable."""
        if (shared := self._shared.get()) is not None:
            # Whoever waits for a second connection must not hold a first.
            await shared.close()
        with driver_errors_as_ours():
            async with self._turn(), self._write() as session, session.begin():
                yield session

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._writer is None:
            yield
            return
        async with asyncio.timeout(_BUSY_S):
            await self._writer.acquire()
        try:
            yield
        finally:
            self._writer.release()

    async def close(self) -> None:
        await self.engine.dispose()


async def uncut(work: Coroutine[Any, Any, _T]) -> _T:
    """Do `work`; who is cancelled meanwhile waits a moment for its end.

    A driver that is cancelled in the middle of a query loses its connection, and not always
    without a word.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait({task}, timeout=_UNCUT_S)
            task.cancel()
            await asyncio.wait({task})


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


@contextlib.contextmanager
def driver_errors_as_ours() -> Iterator[None]:
    """A database that is not there is Unavailable, what it cannot hold is Invalid."""
    try:
        yield
    except (DataError, OverflowError, UnicodeEncodeError) as error:
        raise _invalid() from error
    except (OperationalError, InterfaceError, PoolTimeout, OSError, TimeoutError) as error:
        raise _unavailable(error) from error
    except (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        code = str(getattr(getattr(error, "orig", error), "sqlstate", None) or "")
        if code.startswith(_UNFIT):
            raise _invalid() from error
        if not getattr(error, "connection_invalidated", True) and not code.startswith(_PASSING):
            raise
        raise _unavailable(error) from error


def _invalid() -> Invalid:
    return Invalid(
        "the request has a value that cannot be kept",
        hint="is there a NUL character or half a surrogate pair in a text, or a number too large?",
    )


def _unavailable(error: Exception) -> Unavailable:
    # Not the driver's own words: they may hold the address with its password.
    what = type(getattr(error, "orig", None) or error).__name__
    return Unavailable(f"the database does not answer ({what})", hint="try again in a moment")


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        # Transactions are begun below, not by the driver when it thinks that one is needed.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        # What was answered must survive a power cut.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_IMMEDIATE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
