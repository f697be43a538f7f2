"""`/metrics`, and the middleware that measures requests."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import MutableMapping
from ipaddress import ip_address
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from sandmartin.control.api.access import ThePlatform
from sandmartin.control.telemetry import Telemetry, about, sandbox_of
from sandmartin.errors import Denied

router = APIRouter(tags=["operations"])

_log = logging.getLogger(__name__)
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
#: What a proxy in front of us adds: then loopback is no proof.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, platform: ThePlatform) -> Response:
    """Figures for Prometheus: with the token of the settings, or from this machine."""
    _check(request, platform.settings.metrics_token)
    return Response(await platform.telemetry.render(), media_type=CONTENT_TYPE_LATEST)


def _check(request: Request, token: str) -> None:
    if token:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Denied("the metrics token is missing or wrong", hint="send it as Bearer token")
        return
    if any(name in request.headers for name in _FORWARDED) or not _is_loopback(request):
        raise Denied("figures are for this machine alone", hint="set metrics_token to allow others")


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


class Measured:
    """Counts and times each request, and gives what is logged meanwhile its ids."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            with _about(scope):
                await self._app(scope, receive, send)
            return
        status, began_at = 500, time.monotonic()

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with _about(scope), self._telemetry.serving():
            try:
                await self._app(scope, receive, note)
            finally:
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route, seconds = _route(scope), time.monotonic() - began_at
                self._telemetry.served(method, route, status, seconds)
                _log.info("%s %s: %d in %.1f ms", method, route, status, seconds * 1000)


def _about(scope: Scope) -> Any:
    request_id = str(scope.get("sandmartin.request_id", ""))
    return about(request_id=request_id, sandbox_id=sandbox_of(scope["path"]))


def _route(scope: Scope) -> str:
    """The pattern of the route; a path that leads nowhere must not become a label."""
    pattern = str(getattr(scope.get("route"), "path", ""))
    if "route" not in scope or ":path}" in pattern:
        return pattern or "other"
    # A route knows its pattern below the prefix with which its router is included.
    segments = [each for each in pattern.split("/") if each]
    asked = [each for each in scope["path"].split("/") if each]
    return "/".join(["", *asked[: len(asked) - len(segments)], *segments])
