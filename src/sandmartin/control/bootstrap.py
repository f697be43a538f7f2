"""The beginning of a platform on one machine: a team, and a key for whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from uuid import uuid4

from sqlalchemy import select

from sandmartin.control import tables
from sandmartin.control.db import Database
from sandmartin.control.keys import Keys, add_key
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.errors import Unauthenticated

_TEAM = "default"
_KEY_NAME = "first key"


async def ensure_platform(db: Database) -> None:
    """The platform's own team, which owns what comes with Sandmartin."""
    async with db.write() as session:
        if await session.get(tables.Team, PLATFORM_TEAM_ID) is None:
            session.add(
                tables.Team(team_id=PLATFORM_TEAM_ID, name="platform", created_at=time.time())
            )


async def ensure_first_key(db: Database, keys: Keys, file: Path) -> str:
    """The key in `file`, readable by us alone; made, with a team, if there is none that works."""
    if key := await asyncio.to_thread(_read, file):
        with contextlib.suppress(Unauthenticated):
            await keys.caller(key)
            return key
    async with db.write() as session:
        team = await session.scalar(
            select(tables.Team).where(tables.Team.name == _TEAM, tables.Team.deleted_at.is_(None))
        )
        if team is None:
            team = tables.Team(team_id=str(uuid4()), name=_TEAM, created_at=time.time())
            session.add(team)
            await session.flush()
        _, key = add_key(session, team.team_id, "system", _KEY_NAME)
    await asyncio.to_thread(_write, file, key)
    return key


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _write(file: Path, key: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(key + "\n")
