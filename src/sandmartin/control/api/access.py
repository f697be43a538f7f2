"""Who asks: every route that needs a caller takes one of these."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader
from starlette.requests import HTTPConnection

from sandmartin.control.caller import Caller
from sandmartin.control.platform import Platform
from sandmartin.errors import Unauthenticated

_KEY = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key of a team.")
_BEARER = "bearer "


def platform_of(connection: HTTPConnection) -> Platform:
    platform = connection.app.state.platform
    assert isinstance(platform, Platform)
    return platform


def request_id_of(connection: HTTPConnection) -> str:
    return str(connection.scope.get("sandmartin.request_id", ""))


def key_of(connection: HTTPConnection) -> str:
    """The API key that comes with a request; empty for none."""
    authorization = connection.headers.get("authorization", "")
    if authorization.lower().startswith(_BEARER):
        authorization = authorization[len(_BEARER) :].strip()
    else:
        authorization = ""
    return connection.headers.get("x-api-key", "") or authorization


async def caller_of(connection: HTTPConnection) -> Caller:
    """Who makes a request or opens a WebSocket. Raises Unauthenticated."""
    key = key_of(connection)
    if not key:
        raise Unauthenticated(
            "no API key is given", hint="send it as X-API-Key; `sandmartin up` prints one"
        )
    address = connection.client.host if connection.client else ""
    return await platform_of(connection).keys.caller(
        key, request_id=request_id_of(connection), address=address
    )


async def _caller(request: Request, _key: Annotated[str | None, Depends(_KEY)]) -> Caller:
    return await caller_of(request)


async def _platform(request: Request) -> Platform:
    # Not `platform_of` itself: what is no coroutine costs a thread at each request.
    return platform_of(request)


ThePlatform = Annotated[Platform, Depends(_platform)]
#: A key, or somebody who is logged in.
TheCaller = Annotated[Caller, Depends(_caller)]
