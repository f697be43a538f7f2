"""Alembic's entry: runs the migrations on the database of its configuration."""

from __future__ import annotations

import asyncio

from alembic import context
from sqlalchemy import Connection, text

from sandmartin.control import tables  # noqa: F401  (fills the metadata)
from sandmartin.control.db import Base, Database

#: Taken while migrations run, so that replicas that start at once do not run them twice.
_LOCK = 0x5A4D4152


def _run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()


async def _run_all() -> None:
    db = Database.open(context.config.attributes["url"])
    try:
        engine = db.engine.execution_options(sandmartin_immediate=True)
        async with engine.begin() as connection:
            await connection.run_sync(_run)
    finally:
        await db.close()


asyncio.run(_run_all())
