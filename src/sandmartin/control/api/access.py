"""Who asks: every route that needs a caller takes one of these."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader

from sandmartin.control.caller import Caller
from sandmartin.control.platform import Platform
from sandmartin.errors import Unauthenticated

_KEY = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key of a team.")
_BEARER = "bearer "


def platform_of(request: Request) -> Platform:
    platform = request.app.state.platform
    assert isinstance(platform, Platform)
    return platform


def request_id_of(request: Request) -> str:
    return str(request.scope.get("sandmartin.request_id", ""))


async def _caller(request: Request, key: Annotated[str | None, Depends(_KEY)]) -> Caller:
    authorization = request.headers.get("authorization", "")
    if not key and authorization.lower().startswith(_BEARER):
        key = authorization[len(_BEARER) :].strip()
    if not key:
        raise Unauthenticated(
            "no API key is given", hint="send it as X-API-Key; `sandmartin up` prints one"
        )
    address = request.client.host if request.client else ""
    return await platform_of(request).keys.caller(
        key, request_id=request_id_of(request), address=address
    )


ThePlatform = Annotated[Platform, Depends(platform_of)]
#: A key, or somebody who is logged in.
TheCaller = Annotated[Caller, Depends(_caller)]
