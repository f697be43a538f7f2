"""What stages start from: templates that are there, and what is brought in to become some."""

from __future__ import annotations

from dataclasses import dataclass

from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Defaults
from sandmartin.control.builds.log import Log
from sandmartin.control.builds.request import NewBuild
from sandmartin.control.db import Database
from sandmartin.control.defaults import defaults_from_dict
from sandmartin.control.tables import Build, Template
from sandmartin.control.templates import find_template
from sandmartin.errors import Invalid


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a stage starts from."""

    #: Names its content.
    key: str
    defaults: Defaults
    #: None of a stage, before that one is done.
    template: Template | None = None


class Grounds:
    """Finds them, and brings them in."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def prepare(self, row: Build, new: NewBuild, log: Log, ground: plan.Ground) -> Ground:
        """Have a ground that is no stage. Raises NotFound, Invalid, and what a host refused."""
        match ground:
            case plan.Template(name):
                return await self._template(row.team_id, name)
        raise Invalid("unknown")

    async def _template(self, team_id: str, name: str) -> Ground:
        async with self._db.read() as session:
            found = await find_template(session, team_id, name, lock=False)
        return Ground(
            key=f"template {found.template_id}",
            defaults=defaults_from_dict(found.defaults),
            template=found,
        )
