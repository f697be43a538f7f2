"""The dashboard: the files that `dashboard/` was built into, below `/dashboard`.

It is one page, whatever path below is asked for; what it shows it asks the API for, as anybody
else does. No script, style or connection of another origin's is let in, and nothing that is
written into the page itself; styles that a script makes carry the nonce of their page (the
terminal's do).
"""

from __future__ import annotations

import gzip
import mimetypes
import secrets
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from sandmartin.errors import NotFound

PATH = "/dashboard"

#: Of `dashboard/index.html`.
_NONCE = "STYLE_NONCE"
_YEAR_S = 365 * 24 * 3600
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'nonce-{nonce}'",
        # Previews of a sandbox's pictures are `blob:`.
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "font-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_MISSING = """<!doctype html>
<title>Sandmartin</title>
<p>The dashboard is not built. In a checkout, run <code>scripts/setup</code>.
"""


def include(app: FastAPI) -> None:
    """Serve the dashboard, and lead whoever asks for `/` there."""
    app.include_router(pages(Path(str(files("sandmartin.control").joinpath("web")))))


def pages(built: Path) -> APIRouter:
    """The routes of what was built into a directory."""
    router = APIRouter(include_in_schema=False)
    index = built / "index.html"
    page = index.read_text() if index.exists() else ""
    assets = {path.name: _Asset(path) for path in built.glob("assets/*")}
    icon = _Asset(built / "favicon.svg")

    @router.get("/")
    async def root() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/", 302)

    @router.get(f"{PATH}/assets/{{name}}")
    async def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise NotFound("there is no such file", hint="load the page again")
        return assets[name].answer(request, f"public, max-age={_YEAR_S}, immutable")

    @router.get(f"{PATH}/favicon.svg")
    async def favicon(request: Request) -> Response:
        return icon.answer(request, "max-age=86400")

    @router.get(PATH)
    @router.get(f"{PATH}/{{path:path}}")
    async def dashboard() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        headers = _HEADERS | {
            "content-security-policy": _POLICY.format(nonce=nonce),
            "cache-control": "no-store",
        }
        if not page:
            return HTMLResponse(_MISSING, 503, headers=headers)
        return HTMLResponse(page.replace(_NONCE, nonce), headers=headers)

    return router


class _Asset:
    """A file that is read and packed when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"

    @cached_property
    def _packed(self) -> bytes:
        return gzip.compress(self._path.read_bytes())

    def answer(self, request: Request, caching: str) -> Response:
        """Packed for who can unpack it."""
        headers = _HEADERS | {"cache-control": caching, "vary": "accept-encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(self._packed, media_type=self._type, headers=headers)
        return Response(gzip.decompress(self._packed), media_type=self._type, headers=headers)
