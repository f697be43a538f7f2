"""A database that has gone through all migrations has the form that the models have."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from sandmartin.control.db import Base, Database
from sandmartin.control.migrations import configuration
from sandmartin.control.tables import Sandbox
from sandmartin.model import random_id
from tests import postgres

_UPGRADE = "import sys; from sandmartin.control.migrations import upgrade; upgrade(sys.argv[1])"


def _differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(
        connection, opts={"compare_type": True, "compare_server_default": True}
    )
    return list(compare_metadata(context, Base.metadata))


async def test_migrations_make_what_the_models_are(database_url: str) -> None:
    db = Database.open(database_url)
    try:
        async with db.engine.connect() as connection:
            assert await connection.run_sync(_differences) == []
            # The comparison sees something: a column that only the model has.
            await connection.exec_driver_sql(f"ALTER TABLE {Sandbox.__tablename__} DROP reason")
            assert len(await connection.run_sync(_differences)) == 1
            await connection.rollback()
    finally:
        await db.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.sqlite3'}"
        return
    server: postgres.Server = request.getfixturevalue("postgres_server")
    name = f"empty_{random_id(12)}"
    yield server.create(name)
    server.drop(name)


async def test_it_is_migrated_once_by_however_many(empty_url: str) -> None:
    # Several replicas start at once.
    words = (sys.executable, "-c", _UPGRADE, empty_url)
    starts = (asyncio.create_subprocess_exec(*words) for _ in range(3))
    processes = await asyncio.gather(*starts)
    assert await asyncio.gather(*(each.wait() for each in processes)) == [0, 0, 0]
    head = ScriptDirectory.from_config(configuration(empty_url)).get_current_head()
    db = Database.open(empty_url)
    try:
        async with db.engine.connect() as connection:
            found = await connection.exec_driver_sql("SELECT version_num FROM alembic_version")
            assert found.scalars().all() == [head]
            names = await connection.run_sync(lambda each: inspect(each).get_table_names())
    finally:
        await db.close()
    assert set(names) == {*Base.metadata.tables, "alembic_version"}
