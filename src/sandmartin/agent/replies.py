"""What a guest agent replies, which nobody can trust: read in bounds, and its errors as ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyqwest

from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    DiskFull,
    Exhausted,
    GuestSilent,
    Invalid,
    NotFound,
    SandmartinError,
    ToolFailed,
    Unimplemented,
)

_MAX_REPLY_BYTES = 1 << 20
#: Characters of what a guest says of an error.
MAX_REASON = 500
#: What agents of earlier releases answer on a path that they do not know.
_NO_ROUTE = "there is no such route"


async def read_bounded(response: pyqwest.Response) -> bytes:
    """The whole body. Raises ToolFailed when it is too large."""
    content = bytearray()
    async for chunk in response.content:
        content += chunk
        if len(content) > _MAX_REPLY_BYTES:
            raise ToolFailed("the guest agent's answer is too large")
    return bytes(content)


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object; empty for whatever is none."""
    with contextlib.suppress(ValueError):
        parsed = json.loads(content)
        if isinstance(parsed, dict):
            return parsed
    return {}


def reason(reply: Mapping[str, Any]) -> str:
    """Why a request failed, as the guest has it."""
    return str(reply.get("message", "no reason given"))[:MAX_REASON]


_FILE_ERRORS: dict[int, type[SandmartinError]] = {
    400: Invalid,
    401: Invalid,
    403: Denied,
    404: NotFound,
    507: DiskFull,
}


def file_error(status: int, reply: Mapping[str, Any]) -> SandmartinError:
    """The error of a request for files, by its HTTP status."""
    if reason(reply) == _NO_ROUTE:
        return Unimplemented(
            "the sandbox's guest agent is of an earlier release, which cannot do this",
            hint="use a sandbox of a template that was made since",
        )
    error = _FILE_ERRORS.get(status, ToolFailed)
    hint = "remove files in the sandbox, or create it with a larger disk" if status == 507 else ""
    return error(reason(reply), hint=hint)


_CALL_ERRORS: dict[str, type[SandmartinError]] = {
    "invalid_argument": Invalid,
    "unauthenticated": Invalid,
    "not_found": NotFound,
    "already_exists": AlreadyExists,
    "permission_denied": Denied,
    "failed_precondition": Conflict,
    "resource_exhausted": Exhausted,
    "unavailable": GuestSilent,
}


def call_error(reply: Mapping[str, Any]) -> SandmartinError:
    """The error of a call, by its Connect code."""
    return _CALL_ERRORS.get(str(reply.get("code")), ToolFailed)(reason(reply))


#: What the transport raises when nobody answers.
SILENT = (
    OSError,
    TimeoutError,
    pyqwest.ReadError,
    pyqwest.WriteError,
    pyqwest.RemoteProtocolError,
)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what the transport raises into our errors."""
    try:
        yield
    except SILENT as error:
        raise GuestSilent(f"the guest agent does not answer: {error}") from error
