"""Who asks: every route that needs a caller takes one of these.

A key is taken before a cookie. What a cookie may change needs the session's CSRF token in
`X-CSRF-Token`; a WebSocket, which cannot send one, must come from a page of ours.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Header, Request, Response
from fastapi.security import APIKeyHeader
from starlette.requests import HTTPConnection

from sandmartin.control.caller import ActorKind, Caller, Whence
from sandmartin.control.platform import Platform
from sandmartin.control.sessions import LIFE_S, LoggedIn, cookie_name
from sandmartin.errors import Denied, Unauthenticated

_KEY = APIKeyHeader(
    name="X-API-Key",
    auto_error=False,
    description="An API key of a team. People who are logged in send their session's cookie.",
)
_BEARER = "bearer "
#: Characters of an idempotency key.
MAX_KEY = 200
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def platform_of(connection: HTTPConnection) -> Platform:
    platform = connection.app.state.platform
    assert isinstance(platform, Platform)
    return platform


def request_id_of(connection: HTTPConnection) -> str:
    return str(connection.scope.get("sandmartin.request_id", ""))


def whence(connection: HTTPConnection) -> Whence:
    address = connection.client.host if connection.client else ""
    return Whence(request_id=request_id_of(connection), address=address)


# Who it is.


def key_of(connection: HTTPConnection) -> str:
    """The API key that comes with a request; empty for none."""
    authorization = connection.headers.get("authorization", "")
    if authorization.lower().startswith(_BEARER):
        authorization = authorization[len(_BEARER) :].strip()
    else:
        authorization = ""
    return connection.headers.get("x-api-key", "") or authorization


async def caller_of(connection: HTTPConnection) -> Caller:
    """Who makes a request or opens a WebSocket. Raises Unauthenticated, Denied."""
    key = key_of(connection)
    if not key:
        return (await logged_in_of(connection)).caller
    at = whence(connection)
    keys = platform_of(connection).keys
    return await keys.caller(key, request_id=at.request_id, address=at.address)


async def logged_in_of(connection: HTTPConnection) -> LoggedIn:
    """Whose cookie comes with a request. Raises Unauthenticated, Denied."""
    platform = platform_of(connection)
    cookie = session_cookie(connection)
    if not cookie:
        raise Unauthenticated(
            "no API key is given, and nobody is logged in",
            hint="send a key as X-API-Key; `sandmartin up` prints one",
        )
    found = await platform.sessions.find(cookie, whence(connection))
    if connection.scope["type"] == "websocket":
        check_origin(connection, needed=True)
    elif connection.scope["method"] not in _SAFE:
        found.check_csrf(connection.headers.get("x-csrf-token", ""))
    return found


def check_origin(connection: HTTPConnection, *, needed: bool = False) -> None:
    """Raises Denied when a page of somebody else's made the browser ask."""
    origin = connection.headers.get("origin", "")
    ours = {
        urlsplit(platform_of(connection).settings.base_url).netloc,
        connection.headers.get("host", ""),
    }
    if (origin or needed) and urlsplit(origin).netloc not in ours:
        raise Denied("this comes from a page that is not ours")


# The session's cookie.


def session_cookie(connection: HTTPConnection) -> str:
    name = cookie_name(platform_of(connection).settings.base_url)
    return connection.cookies.get(name, "")


def set_cookie(response: Response, platform: Platform, name: str, value: str, life_s: int) -> None:
    """A cookie that no script can read and no other site can have sent but by a link."""
    response.set_cookie(
        name,
        value,
        max_age=life_s,
        path="/",
        secure=platform.settings.base_url.startswith("https:"),
        httponly=True,
        samesite="lax",
    )


def drop_cookie(response: Response, platform: Platform, name: str) -> None:
    set_cookie(response, platform, name, "", 0)


def set_session(response: Response, platform: Platform, token: str) -> None:
    name = cookie_name(platform.settings.base_url)
    set_cookie(response, platform, name, token, LIFE_S)


# What routes take.


async def _caller(request: Request, _key: Annotated[str | None, Depends(_KEY)]) -> Caller:
    return await caller_of(request)


async def _logged_in(request: Request) -> LoggedIn:
    if key_of(request):
        await caller_of(request)
        raise Denied("this is for people who are logged in, not for API keys")
    return await logged_in_of(request)


async def _person(logged_in: Annotated[LoggedIn, Depends(_logged_in)]) -> Caller:
    assert logged_in.caller.kind is ActorKind.USER
    return logged_in.caller


async def _admin(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    caller.require_admin()
    return caller


async def _platform(request: Request) -> Platform:
    # Not `platform_of` itself: what is no coroutine costs a thread at each request.
    return platform_of(request)


ThePlatform = Annotated[Platform, Depends(_platform)]
#: A key, or somebody who is logged in.
TheCaller = Annotated[Caller, Depends(_caller)]
#: Somebody who is logged in, and their session.
TheSession = Annotated[LoggedIn, Depends(_logged_in)]
ThePerson = Annotated[Caller, Depends(_person)]
#: An administrator of the platform, or a key of one.
TheAdmin = Annotated[Caller, Depends(_admin)]
#: Of a request that may be sent again.
TheKey = Annotated[str, Header(alias="Idempotency-Key", max_length=MAX_KEY)]
