"""The beginning of a platform on one machine: a team, and a key for whoever started it.

The key administers the platform: whoever can read it is root on this machine. Until somebody has
an account, each start offers one in the same team, and that first account is an administrator's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import tables
from sandmartin.control.accounts import Accounts, SignUp
from sandmartin.control.caller import Role
from sandmartin.control.db import Database
from sandmartin.control.invitations import add_invitation, drop_invitations
from sandmartin.control.keys import Keys, add_key
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.errors import Unauthenticated

_TEAM = "default"
_KEY_NAME = "first key"
_MAKER = "system"


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
        team_id = await _ensure_team(session)
        _, key = add_key(session, team_id, _MAKER, _KEY_NAME, is_admin=True)
    await asyncio.to_thread(_write, file, key)
    return key


async def ensure_first_invitation(db: Database, accounts: Accounts) -> str:
    """Where the first account is made, as the default team's owner; empty once there is one."""
    if accounts.policy is SignUp.CLOSED:
        return ""
    async with db.write() as session:
        if await session.scalar(select(tables.User.user_id).limit(1)) is not None:
            return ""
        # Of an earlier start.
        await drop_invitations(session, _MAKER)
        team_id = await _ensure_team(session)
        _, token = add_invitation(session, _MAKER, team_id=team_id, role=Role.OWNER)
    return accounts.invitation_url(token)


async def _ensure_team(session: AsyncSession) -> str:
    row = tables.Team
    query = select(row.team_id).where(row.name == _TEAM, row.deleted_at.is_(None))
    team_id = await session.scalar(query.order_by(row.created_at).limit(1))
    if team_id is None:
        team_id = str(uuid4())
        session.add(row(team_id=team_id, name=_TEAM, created_at=time.time()))
        await session.flush()
    return team_id


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _write(file: Path, key: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(key + "\n")
