"""States of rows, and what they mean for capacity and for the reconciler."""

from __future__ import annotations

from enum import StrEnum

from sandmartin.model import TRANSITIONS, State

#: Sandboxes that take a host's processors and memory, or may.
HOLDING = frozenset(
    {
        State.PENDING,
        State.STARTING,
        State.RUNNING,
        State.PAUSING,
        State.RESUMING,
        State.SNAPSHOTTING,
        State.STOPPING,
        State.MISSING,
    }
)
#: While something is done to it.
TRANSITIONAL = frozenset(
    {
        State.PENDING,
        State.STARTING,
        State.PAUSING,
        State.RESUMING,
        State.SNAPSHOTTING,
        State.STOPPING,
    }
)
ALIVE = frozenset(State) - {State.STOPPED}
#: What a list shows when nobody asks for a state.
LISTED = ALIVE - {State.ERROR}


def sources_of(to: State) -> frozenset[State]:
    """States that may be followed by `to`."""
    return frozenset(state for state, followers in TRANSITIONS.items() if to in followers)


class HostState(StrEnum):
    #: Has a token, and has not used it yet.
    PENDING = "pending"
    ONLINE = "online"
    UNREACHABLE = "unreachable"
    DELETED = "deleted"


class TemplateState(StrEnum):
    MAKING = "making"
    READY = "ready"
    DELETING = "deleting"
    #: There, for builds alone.
    HIDDEN = "hidden"
    #: Deleted as far as anybody can see; hosts keep it for what still needs it.
    RETIRED = "retired"


class BuildState(StrEnum):
    WAITING = "waiting"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"
