"""Where E2B's clients ask; all of ours is below `/v1`."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_PATHS = re.compile(r"/(?:v2|v3|sandboxes|snapshots|templates|teams)(?:/|$)")


def is_theirs(path: str) -> bool:
    """Whether a client of E2B's asks there."""
    return _PATHS.match(path) is not None


class RawPaths:
    """Leaves the paths of E2B's interface as they were sent.

    A name of a template is one segment, encoded: a slash in it would split it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_theirs(scope["path"]) and scope.get("raw_path"):
            scope["path"] = scope["raw_path"].decode("latin-1")
        await self._app(scope, receive, send)
