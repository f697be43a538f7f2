"""Names of templates as E2B has them: `[namespace/]name[:tag]`."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Path

from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.caller import Caller
from sandmartin.control.platform import Platform
from sandmartin.errors import NotFound
from sandmartin.model import DEFAULT_TAG


def full_name(name: str) -> str:
    """What their clients call a template of ours."""
    return name if ":" in name else f"{name}:{DEFAULT_TAG}"


async def plain_name(platform: Platform, caller: Caller, template: str) -> str:
    """Our name of what a client calls a template. Raises NotFound."""
    namespace, slash, name = template.rpartition("/")
    name, colon, tag = name.partition(":")
    missing = NotFound(f"there is no template {template[:80]!r}")
    if slash:
        teams = [each.team for each in await platform.teams.list(caller)]
        ours = [each.name for each in teams if each.team_id == caller.team_id]
        if namespace not in {caller.team_id, *ours}:
            raise missing
    return f"{name}:{tag}" if colon and tag != DEFAULT_TAG else name


async def _name(
    name: Annotated[str, Path(description="`[namespace/]name[:tag]`.")],
    caller: TheCaller,
    platform: ThePlatform,
) -> str:
    return await plain_name(platform, caller, unquote(name))


#: The template that a path names, in our words.
TheName = Annotated[str, Depends(_name)]
