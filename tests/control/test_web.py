"""How the dashboard's files are served, and what its page may do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from sandmartin.control import web
from sandmartin.control.platform import Platform
from tests.control.conftest import client_of

pytestmark = pytest.mark.one_database

SCRIPT = "console.log('sand')\n" * 200


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """What a build leaves."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text('<meta name="style-nonce" content="STYLE_NONCE">')
    (tmp_path / "favicon.svg").write_text("<svg/>")
    (tmp_path / "assets/index-1234.js").write_text(SCRIPT)
    (tmp_path / "secret").write_text("none of the assets")
    return tmp_path


@pytest.fixture
async def http(built: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(web.pages(built))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
        yield client


async def test_each_page_has_a_policy_and_a_nonce_of_its_own(http: httpx.AsyncClient) -> None:
    assert (await http.get("/")).headers["location"] == "/dashboard/"
    nonces = set()
    for path in ("/dashboard", "/dashboard/", "/dashboard/sandboxes/sb1/files"):
        page = await http.get(path)
        assert page.status_code == 200
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["x-content-type-options"] == "nosniff"
        policy = page.headers["content-security-policy"]
        for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
            assert rule in policy.split("; ")
        assert "unsafe" not in policy
        nonce = re.search(r"'nonce-([^']+)'", policy)
        assert nonce
        assert page.text == f'<meta name="style-nonce" content="{nonce[1]}">'
        nonces.add(nonce[1])
    assert len(nonces) == 3


async def test_assets_are_packed_and_kept(http: httpx.AsyncClient) -> None:
    path = "/dashboard/assets/index-1234.js"
    for coding in ("gzip", "identity"):
        got = await http.get(path, headers={"accept-encoding": coding})
        assert got.text == SCRIPT
        assert got.headers.get("content-encoding") == ("gzip" if coding == "gzip" else None)
        assert got.headers["content-type"].startswith("text/javascript")
        assert "immutable" in got.headers["cache-control"]
        assert got.headers["vary"] == "accept-encoding"
    icon = await http.get("/dashboard/favicon.svg")
    assert (icon.text, icon.headers["content-type"]) == ("<svg/>", "image/svg+xml")


async def test_nothing_but_an_asset_is_one(http: httpx.AsyncClient, platform: Platform) -> None:
    for name in ("..%2Fsecret", "%2e%2e%2fsecret", "%2e%2e/secret", "//secret"):
        got = await http.get(f"/dashboard/assets/{name}")
        assert "none of the assets" not in got.text
    async with client_of(platform) as api:
        got = await api.get("/dashboard/assets/index-old.js")
    assert got.status_code == 404
    assert got.json()["error"]["hint"] == "load the page again"


async def test_without_a_build_it_says_what_to_do(tmp_path: Path) -> None:
    app = FastAPI()
    app.include_router(web.pages(tmp_path))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://control") as client:
        page = await client.get("/dashboard")
    assert page.status_code == 503
    assert "scripts/setup" in page.text
    assert "content-security-policy" in page.headers
