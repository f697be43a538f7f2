"""Who asks: found once per request, and passed to whatever acts on somebody's word."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from sandmartin.errors import Denied


class Role(StrEnum):
    """What a member may do in a team; each may do what those below it may."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"

    @property
    def rank(self) -> int:
        return [Role.MEMBER, Role.ADMIN, Role.OWNER].index(self)


class ActorKind(StrEnum):
    USER = "user"
    KEY = "key"
    HOST = "host"
    SYSTEM = "system"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One who asks, acting for one team."""

    kind: ActorKind
    #: Id of the user, key or host.
    actor_id: str
    #: For people: e-mail address, or name of the key.
    name: str
    team_id: str
    #: None for what is no member, such as a key.
    role: Role | None = None
    #: Administrator of the platform.
    is_admin: bool = False
    request_id: str = ""
    #: Where the request came from.
    address: str = ""
    #: Of the browser session by which a person asks.
    session_hash: str = field(default="", repr=False)

    def require_role(self, role: Role) -> None:
        """Raises Denied unless the caller has at least this role in the team."""
        if self.role is None or self.role.rank < role.rank:
            raise Denied(f"this needs the role {role} in the team", hint="ask an owner of the team")

    def require_admin(self) -> None:
        """Raises Denied unless the caller administers the platform."""
        if not self.is_admin:
            raise Denied("this is for administrators of the platform")

    def for_team(self, team_id: str) -> Caller:
        """An administrator of the platform, acting for a team. Raises Denied."""
        self.require_admin()
        return replace(self, team_id=team_id, role=Role.OWNER)


@dataclass(frozen=True, kw_only=True)
class Whence:
    """Where a request comes from, before it is known from whom."""

    request_id: str = ""
    address: str = ""


#: What is done by the control plane itself.
def system(team_id: str) -> Caller:
    return Caller(kind=ActorKind.SYSTEM, actor_id="system", name="system", team_id=team_id)
