"""Errors as E2B's clients read them: `{code, message, error_code}`, and whether to try again.

They try again by themselves what was answered with 429, 502, 503 or 504, creates too, unless
`Should-Retry` forbids it: every error says so.
"""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from sandmartin.control.limits import TooMany
from sandmartin.control.operations import Unfinished
from sandmartin.errors import GuestSilent, SandmartinError

#: What restores or copies the guest's memory needs a guest that answers.
_NEEDS_GUEST = re.compile(r".*/(?:connect|resume|snapshots|fork)$")
_SILENT = "sandbox_snapshot_guest_agent_unresponsive"
#: Asking twice for these is asking once.
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class ErrorBody(BaseModel):
    """The body of every error."""

    code: int = Field(description="The HTTP status.")
    message: str
    error_code: str


#: Of every route of theirs.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "An error; `error_code` says which."}
}


def answer(
    status: int, code: str, message: str, *, hint: str = "", should_retry: bool = False
) -> JSONResponse:
    told = f"{message} ({hint})" if hint else message
    return JSONResponse(
        {"code": status, "message": told, "error_code": code},
        status,
        headers={"should-retry": "true" if should_retry else "false"},
    )


def answer_own(request: Request, error: SandmartinError, status: int) -> JSONResponse:
    """The answer for an error of ours, which elsewhere has this status."""
    code = error.code
    if isinstance(error, GuestSilent) and _NEEDS_GUEST.match(request.url.path):
        return answer(409, _SILENT, error.message, hint=error.hint)
    if isinstance(error, GuestSilent):
        status = 503
    should_retry = error.retryable
    if isinstance(error, Unfinished):
        # It is done, but not yet: without a key a second create makes a second sandbox.
        should_retry = request.method in _REPEATABLE or "idempotency-key" in request.headers
    told = answer(status, code, error.message, hint=error.hint, should_retry=should_retry)
    if isinstance(error, TooMany):
        told.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return told
