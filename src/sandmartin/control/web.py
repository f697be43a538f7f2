"""The dashboard: the files that `dashboard/` was built into, below `/dashboard`.

It is one page, whatever path below is asked for; what it shows it asks the API for, as anybody
else does. No script, style or connection of another origin's is let in, and nothing that is
written into the page itself; styles that a script makes carry the nonce of their page (the
terminal's do).
"""

from __future__ import annotations

import secrets
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

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
    built = Path(str(files("sandmartin.control").joinpath("web")))
    app.include_router(_pages(built), include_in_schema=False)


def _pages(built: Path) -> APIRouter:
    router = APIRouter()
    index = built / "index.html"
    page = index.read_text() if index.exists() else ""

    @router.get("/")
    async def root() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/", 302)

    if page:
        # Their names change with their content.
        router.mount(f"{PATH}/assets", _Kept(built / "assets"))

    @router.get(f"{PATH}/favicon.svg")
    async def icon() -> Response:
        picture = (built / "favicon.svg").read_bytes() if page else b""
        headers = _HEADERS | {"cache-control": "max-age=86400"}
        return Response(picture, media_type="image/svg+xml", headers=headers)

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


class _Kept:
    """ASGI: files that never change, packed for who can unpack them."""

    def __init__(self, directory: Path) -> None:
        self._files = GZipMiddleware(StaticFiles(directory=directory), minimum_size=1024)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                told = {"cache-control": f"public, max-age={_YEAR_S}, immutable"}
                told["x-content-type-options"] = "nosniff"
                more = [(name.encode(), value.encode()) for name, value in told.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self._files(scope, receive, tell)
