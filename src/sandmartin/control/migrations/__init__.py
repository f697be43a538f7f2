"""Migrations: how a database of an earlier release gets this one's form. They only grow."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config


def configuration(url: str) -> Config:
    """Alembic's configuration for the database at `url`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    # Not an option: its interpolation would read a password's percent signs.
    config.attributes["url"] = url
    return config


def upgrade(url: str) -> None:
    """Bring a database to this release's form; one after the other where several ask."""
    command.upgrade(configuration(url), "head")
