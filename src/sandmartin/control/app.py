"""The web application: routes, and what holds for all of them.

Every answer carries a request id; every error is `{error: {code, message, hint, retryable,
request_id}}`. Bodies are bounded before they are read. What is no error of ours is a bug: logged
once, told without detail.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from sandmartin import __version__, errors
from sandmartin.control import streams, web
from sandmartin.control.api import (
    accounts,
    admin,
    audit,
    builds,
    channels,
    commands,
    events,
    files,
    hosts,
    inside,
    keys,
    metrics,
    ports,
    sandboxes,
    tags,
    teams,
    templates,
    usage,
)
from sandmartin.control.e2b import builds as e2b_builds
from sandmartin.control.e2b import errors as e2b_errors
from sandmartin.control.e2b import network as e2b_network
from sandmartin.control.e2b import records as e2b_records
from sandmartin.control.e2b import sandboxes as e2b_sandboxes
from sandmartin.control.e2b import snapshots as e2b_snapshots
from sandmartin.control.e2b import tags as e2b_tags
from sandmartin.control.e2b import teams as e2b_teams
from sandmartin.control.e2b import templates as e2b_templates
from sandmartin.control.e2b import uploads as e2b_uploads
from sandmartin.control.e2b.paths import RawPaths, is_theirs
from sandmartin.control.limits import TooMany
from sandmartin.control.platform import Platform
from sandmartin.control.proxy import Proxy
from sandmartin.errors import SandmartinError
from sandmartin.model import random_id

_log = logging.getLogger(__name__)

#: HTTP status of each error of ours.
STATUS: Mapping[str, int] = {
    errors.SandmartinError.code: 500,
    errors.Invalid.code: 400,
    errors.Unauthenticated.code: 401,
    errors.Denied.code: 403,
    errors.NotFound.code: 404,
    errors.Conflict.code: 409,
    errors.AlreadyExists.code: 409,
    errors.NotStarted.code: 400,
    errors.Exhausted.code: 429,
    errors.DiskFull.code: 507,
    errors.Unavailable.code: 503,
    errors.GuestSilent.code: 502,
    errors.TimedOut.code: 504,
    errors.Unimplemented.code: 501,
    errors.ToolFailed.code: 502,
    "overtaken": 409,
}
#: Of what is no error of ours, by status.
_FOREIGN = {
    401: "unauthenticated",
    403: "denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "timed_out",
    413: "too_large",
}
_MAX_BODY_BYTES = 1 << 20
_MAX_BODY_S = 30.0
#: What is sent there is streamed, and may be of any size.
_CONTENT = re.compile(
    r"/v1/(?:sandboxes|capsules)/[^/]+/"
    r"(?:files(?:/(?:tree|(?:stream/)?write))?|processes/[^/]+/stdin)$"
    r"|/v1/builds/contexts/[^/]+$"
    r"|/templates/uploads/[^/]+$"
)
_REQUEST_ID = "sandmartin.request_id"


class ErrorDetail(BaseModel):
    """What went wrong, and what to do."""

    code: str = Field(description="A contract; the message is for people.")
    message: str
    hint: str
    retryable: bool
    request_id: str


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


#: Of every route: any of its errors has this form.
_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "An error; `code` says which."}
}


def create_app(platform: Platform) -> FastAPI:
    """The application that serves `platform`."""
    app = FastAPI(
        title="Sandmartin",
        version=__version__,
        description="A microVM for every AI agent, user or job, on your own hosts.",
        docs_url="/docs",
        openapi_url="/openapi.json",
        responses=_RESPONSES,
    )
    app.state.platform = platform
    # `usage` first: its paths would else be taken for ids.
    for of_sandboxes in (usage, sandboxes, commands, files, inside, ports, streams):
        app.include_router(of_sandboxes.router, prefix="/v1/sandboxes")
        # The same, for clients of the prior surface.
        app.include_router(of_sandboxes.router, prefix="/v1/capsules", include_in_schema=False)
    app.include_router(accounts.router)
    app.include_router(accounts.pages)
    app.include_router(hosts.router, prefix="/v1/hosts")
    for module in (builds, templates, tags, teams, keys, admin, events, channels, audit):
        app.include_router(module.router, prefix="/v1")
    app.include_router(metrics.router)
    _include_e2b(app)
    web.include(app)
    app.add_exception_handler(SandmartinError, _on_own_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_foreign)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(BoundedBodies)
    app.add_middleware(RawPaths)
    app.add_middleware(metrics.Measured, telemetry=platform.telemetry)
    # Around those: what they refuse has an id, too.
    app.add_middleware(RequestIds)
    # Around all of the API, of which traffic of sandboxes is no part.
    app.add_middleware(Proxy, platform=platform)

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, str]:
        """Requests can be served: the database answers."""
        await platform.events.last_id()
        return {"status": "ok"}

    return app


def _include_e2b(app: FastAPI) -> None:
    """E2B's interface, for their clients."""
    of_sandboxes = (e2b_sandboxes, e2b_network, e2b_records, e2b_snapshots)
    # `e2b_tags` before what would take `tags` for a name.
    of_templates = (e2b_tags, e2b_builds, e2b_uploads, e2b_templates)
    for module in (*of_sandboxes, *of_templates, e2b_teams):
        app.include_router(module.router, tags=["e2b"], responses=e2b_errors.RESPONSES)


# Errors.


def error_body(
    code: str, message: str, *, hint: str = "", retryable: bool = False, request_id: str = ""
) -> dict[str, Any]:
    told = {"code": code, "message": message, "hint": hint, "retryable": retryable}
    return {"error": told | {"request_id": request_id}}


def _answer(request: Request, status: int, code: str, message: str, **more: Any) -> JSONResponse:
    if is_theirs(request.url.path):
        return e2b_errors.answer(status, code, message, hint=more.get("hint", ""))
    request_id = str(request.scope.get(_REQUEST_ID, ""))
    return JSONResponse(error_body(code, message, request_id=request_id, **more), status)


async def _on_own_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SandmartinError)
    status = STATUS.get(error.code, 500)
    if status == 500:
        _log.error("request %s: %s", request.scope.get(_REQUEST_ID), error, exc_info=error)
    if is_theirs(request.url.path):
        return e2b_errors.answer_own(request, error, status)
    answer = _answer(
        request, status, error.code, error.message, hint=error.hint, retryable=error.retryable
    )
    if isinstance(error, TooMany):
        answer.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return answer


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5]]
    return _answer(
        request, 400, errors.Invalid.code, "; ".join(found), hint="see /docs for what is expected"
    )


async def _on_foreign(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _FOREIGN.get(error.status_code, "invalid")
    return _answer(request, error.status_code, code, str(error.detail))


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    _log.error("request %s failed", request.scope.get(_REQUEST_ID), exc_info=error)
    return _answer(request, 500, "internal", "internal error; the server's log says more")


# Middleware, as plain ASGI: it costs nothing per chunk.


class RequestIds:
    """Gives each request an id, which goes back in `X-Request-Id` and into the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request_id = scope[_REQUEST_ID] = f"rq{random_id(16)}"

        async def tell(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        await self._app(scope, receive, tell)


class BoundedBodies:
    """Refuses a body that is larger or slower than any of ours, as soon as that is known."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _CONTENT.match(scope["path"]):
            await self._app(scope, receive, send)
        elif _declared_bytes(scope) > _MAX_BODY_BYTES:
            await (await _on_foreign(Request(scope), _too_large()))(scope, receive, send)
        else:
            await self._app(scope, _bounded(receive), send)


def _declared_bytes(scope: Scope) -> int:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if lengths and lengths[0].isdigit() else 0


def _too_large() -> HTTPException:
    # Not one of ours: while a body is read, the framework takes all but its own for bad JSON.
    return HTTPException(413, f"the body is larger than {_MAX_BODY_BYTES} bytes")


def _bounded(receive: Receive) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    size, more = 0, True
    until = asyncio.get_running_loop().time() + _MAX_BODY_S

    async def count() -> MutableMapping[str, Any]:
        nonlocal size, more
        if not more:
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body took longer than {_MAX_BODY_S:.0f} s") from error
        size += len(message.get("body", b""))
        more = bool(message.get("more_body"))
        if size > _MAX_BODY_BYTES:
            raise _too_large()
        return message

    return count
