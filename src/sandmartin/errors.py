"""The whole error tree of Sandmartin.

    SandmartinError            internal
    ├── Invalid                invalid             the request can never work as it is
    ├── Unauthenticated        unauthenticated     nobody we know
    ├── Denied                 denied              known, but not allowed
    ├── NotFound               not_found
    ├── Conflict               conflict            the thing is not in a state that allows it
    │   └── AlreadyExists      already_exists
    ├── NotStarted             command_not_started the command could not be started
    ├── Exhausted              exhausted           the host or a quota has too little left
    │   └── DiskFull           disk_full           no space left in the sandbox or on the host
    ├── Unavailable            unavailable         try again later, or elsewhere
    │   └── GuestSilent        guest_silent        the guest agent does not answer
    ├── TimedOut               timed_out           a deadline passed
    ├── Unimplemented          unimplemented
    └── ToolFailed             tool_failed         a child program or the kernel refused

`code` is a contract and never changes; the sentence and the hint are for people. Anything else
that escapes is a bug and leaves the agent as `internal` without detail.
"""

from __future__ import annotations

from typing import ClassVar


class SandmartinError(Exception):
    """Something went wrong inside Sandmartin."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    #: Whether the other side said so itself, and so knows what it did and did not do.
    answered: bool = False

    def __init__(self, message: str | None = None, *, hint: str = "") -> None:
        super().__init__(message or (self.__doc__ or self.code).strip())
        self.hint = hint

    @property
    def message(self) -> str:
        return str(self.args[0])


class Invalid(SandmartinError):
    """The request is not valid."""

    code = "invalid"


class Unauthenticated(SandmartinError):
    """The caller or the user is not known."""

    code = "unauthenticated"


class Denied(SandmartinError):
    """This is not allowed."""

    code = "denied"


class NotFound(SandmartinError):
    """There is no such thing."""

    code = "not_found"


class Conflict(SandmartinError):
    """The current state does not allow this."""

    code = "conflict"


class AlreadyExists(Conflict):
    """It exists already."""

    code = "already_exists"


class NotStarted(SandmartinError):
    """The command could not be started."""

    code = "command_not_started"


class Exhausted(SandmartinError):
    """Too little is left."""

    code = "exhausted"


class DiskFull(Exhausted):
    """There is not enough disk space."""

    code = "disk_full"


class Unavailable(SandmartinError):
    """This cannot be served now."""

    code = "unavailable"
    retryable = True


class GuestSilent(Unavailable):
    """The guest agent does not answer."""

    code = "guest_silent"


class TimedOut(SandmartinError):
    """A deadline passed."""

    code = "timed_out"
    retryable = True


class Unimplemented(SandmartinError):
    """This is not implemented."""

    code = "unimplemented"


class ToolFailed(SandmartinError):
    """A program that Sandmartin relies on failed."""

    code = "tool_failed"


def _tree(cls: type[SandmartinError]) -> dict[str, type[SandmartinError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


BY_CODE: dict[str, type[SandmartinError]] = _tree(SandmartinError)


def from_code(code: str, message: str, hint: str = "") -> SandmartinError:
    """The error a peer reported as `code`; an unknown code becomes a plain SandmartinError."""
    return BY_CODE.get(code, SandmartinError)(message, hint=hint)
