"""SQLite for SQLAlchemy with one turn of its thread per statement.

`aiosqlite` runs a database in a thread of its own, and each call to it is a turn there and back. A
query through SQLAlchemy's adapter takes four of them: a cursor made, executed, read and closed.
Ours is run and read in one, and the end of a transaction that is none takes no turn at all.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any

import aiosqlite

_CHUNK_ROWS = 64


def connect(database: str, **options: Any) -> Awaitable[aiosqlite.Connection]:
    """A connection, as `aiosqlite.connect` gives it: SQLAlchemy's `async_creator_fn`."""
    connection = _Connection(partial(sqlite3.connect, database, **options), _CHUNK_ROWS)
    # As SQLAlchemy has it: one that was left open keeps no process from ending.
    connection._thread.daemon = True
    return connection


class _Connection(aiosqlite.Connection):
    def cursor(self) -> Any:
        return _Cursor(self)

    async def commit(self) -> None:
        if self.in_transaction:
            await super().commit()

    async def rollback(self) -> None:
        if self.in_transaction:
            await super().rollback()

    async def run(self, cursor: _Cursor, many: bool, sql: str, parameters: Sequence[Any]) -> None:
        await self._execute(self._run, cursor, many, sql, parameters)  # type: ignore[no-untyped-call]

    def _run(self, into: _Cursor, many: bool, sql: str, parameters: Sequence[Any]) -> None:
        """In the database's thread."""
        cursor = self._conn.cursor()
        try:
            (cursor.executemany if many else cursor.execute)(sql, parameters)
            into.rows = cursor.fetchall() if cursor.description else []
            into.description, into.rowcount = cursor.description, cursor.rowcount
            into.lastrowid = cursor.lastrowid
        finally:
            cursor.close()


class _Cursor:
    """What SQLAlchemy's adapter asks of a cursor; all rows are there once it has executed."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self.rows: list[Any] = []
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self.arraysize = 1

    async def __aenter__(self) -> _Cursor:
        return self

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        await self._connection.run(self, False, sql, parameters)

    async def executemany(self, sql: str, parameters: Sequence[Any]) -> None:
        await self._connection.run(self, True, sql, parameters)

    async def fetchall(self) -> list[Any]:
        return self.rows

    async def close(self) -> None:
        self.rows = []
