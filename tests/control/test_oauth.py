"""Logging in at GitHub, of which a small one runs on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse

from sandmartin.control import tables
from sandmartin.control.invitations import add_invitation
from sandmartin.control.platform import Platform
from sandmartin.control.server import listen
from tests.control.conftest import client_of, running_platform
from tests.control.test_accounts import log_in, sign_up

SECRET = "the client's secret"


@dataclass
class GitHub:
    """Somebody who has an account there, and what the server was asked."""

    url: str = ""
    user: dict[str, Any] = field(default_factory=lambda: {"id": 7, "login": "ann", "name": "Ann"})
    emails: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"email": "spam@example.org", "primary": False, "verified": True},
            {"email": "Ann@Example.org", "primary": True, "verified": True},
        ]
    )
    #: By code: the challenge, and where it may be used.
    codes: dict[str, tuple[str, str]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    redirects: bool = False

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/login/oauth/authorize")
        async def authorize(request: Request) -> RedirectResponse:
            asked = request.query_params
            assert asked["code_challenge_method"] == "S256"
            code = secrets.token_urlsafe(8)
            self.codes[code] = asked["code_challenge"], asked["redirect_uri"]
            back = f"{asked['redirect_uri']}?code={code}&state={asked['state']}"
            return RedirectResponse(back, 302)

        @app.post("/login/oauth/access_token")
        async def trade(request: Request) -> Any:
            if self.redirects:
                return RedirectResponse("/elsewhere", 307)
            asked = {
                key: each[0] for key, each in parse_qs((await request.body()).decode()).items()
            }
            challenge, uri = self.codes.pop(asked["code"], ("", ""))
            hashed = hashlib.sha256(asked["code_verifier"].encode()).digest()
            proven = urlsafe_b64encode(hashed).rstrip(b"=").decode() == challenge
            if not proven or asked["client_secret"] != SECRET or asked["redirect_uri"] != uri:
                return JSONResponse({"error": "bad_verification_code"})
            token = secrets.token_urlsafe(8)
            self.tokens.add(token)
            return {"access_token": token, "token_type": "bearer", "scope": "user:email"}

        @app.get("/user")
        async def user(request: Request) -> Any:
            return self.user if self.knows(request) else JSONResponse({}, 401)

        @app.get("/user/emails")
        async def emails(request: Request) -> Any:
            return self.emails if self.knows(request) else JSONResponse({}, 401)

        return app

    def knows(self, request: Request) -> bool:
        return request.headers["authorization"].removeprefix("Bearer ") in self.tokens


@pytest.fixture
async def github() -> AsyncIterator[GitHub]:
    github = GitHub()
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        github.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(github.app(), lifespan="off", log_config=None)
        server = Loopback(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        yield github
        server.should_exit = True
        await asyncio.wait({task})


class Loopback(uvicorn.Server):
    """Signals are the tests' own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@pytest.fixture
async def platform(database_url: str, tmp_path: Path, github: GitHub) -> AsyncIterator[Platform]:
    async with platform_at(database_url, tmp_path, github, sign_up="open") as platform:
        yield platform


@contextlib.asynccontextmanager
async def platform_at(
    database_url: str, tmp_path: Path, github: GitHub, **settings: Any
) -> AsyncIterator[Platform]:
    async with running_platform(
        database_url,
        tmp_path,
        github_client_id="sandmartin",
        github_client_secret=SECRET,
        github_url=github.url,
        github_api_url=github.url,
        public_url="http://control",
        **settings,
    ) as platform:
        yield platform


async def come_back(http: httpx.AsyncClient, url: str) -> str:
    """Go to the provider and back, as a browser does; where one arrives."""
    async with httpx.AsyncClient() as browser:
        sent_back = (await browser.get(url)).headers["location"]
    assert sent_back.startswith("http://control/auth/oauth/github/callback?")
    return await arrive(http, sent_back)


async def arrive(http: httpx.AsyncClient, url: str) -> str:
    answer = await http.get(url)
    assert answer.status_code == 302, answer.text
    return answer.headers["location"]


async def begin(http: httpx.AsyncClient, **body: str) -> str:
    answer = await http.post("/v1/auth/oauth/github", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["url"])


async def test_one_comes_in_by_github(platform: Platform, github: GitHub) -> None:
    ids = set()
    for _ in range(2):
        async with client_of(platform) as http:
            page = await http.get("/auth/oauth/github")
            assert page.status_code == 302
            assert await come_back(http, page.headers["location"]) == "/dashboard/"
            assert "sandmartin_oauth" not in http.cookies
            me = (await http.get("/v1/me")).json()
            assert (me["email"], me["name"]) == ("ann@example.org", "Ann")
            assert (me["has_password"], me["providers"]) == (False, ["github"])
            ids.add(me["id"])
            csrf = {"x-csrf-token": me["csrf_token"]}
            only = await http.delete("/v1/me/providers/github", headers=csrf)
            assert only.status_code == 409, "there is no other way in"
    assert len(ids) == 1
    async with client_of(platform) as http:
        assert (await log_in(http, "ann@example.org", "")).status_code == 401
        assert (await http.get("/auth/oauth/elsewhere")).status_code == 404


async def test_an_address_alone_opens_no_account(platform: Platform, github: GitHub) -> None:
    async with client_of(platform) as http, client_of(platform) as other:
        await sign_up(http, "ann@example.org")
        assert await come_back(other, await begin(other)) == "/dashboard/login?error=email_taken"
        assert (await other.get("/v1/me")).status_code == 401
        # Whoever is logged in may link the two.
        connect = await http.post("/v1/me/providers/github/connect")
        assert await come_back(http, connect.json()["url"]) == "/dashboard/settings"
        assert (await http.get("/v1/me")).json()["providers"] == ["github"]
        assert await come_back(other, await begin(other)) == "/dashboard/"
        # One there is nobody else's here.
        async with client_of(platform) as third:
            await sign_up(third, "bo@example.org")
            url = (await third.post("/v1/me/providers/github/connect")).json()["url"]
            assert await come_back(third, url) == "/dashboard/login?error=already_linked"
        assert (await http.delete("/v1/me/providers/github")).status_code == 204
        assert await come_back(other, await begin(other)) == "/dashboard/login?error=email_taken"


async def test_answers_that_were_not_asked_for(platform: Platform, github: GitHub) -> None:
    async with client_of(platform) as http, client_of(platform) as victim:
        url = await begin(http)
        async with httpx.AsyncClient() as browser:
            back = (await browser.get(url)).headers["location"]
        # Into a browser that did not ask, or asked something else.
        assert await arrive(victim, back) == "/dashboard/login?error=invalid_state"
        await begin(victim)
        assert await arrive(victim, back) == "/dashboard/login?error=invalid_state"
        # A code of another login: it lacks the verifier.
        state = parse_qs(urlsplit(await begin(victim)).query)["state"][0]
        code = parse_qs(urlsplit(back).query)["code"][0]
        path = "/auth/oauth/github/callback"
        stolen = await arrive(victim, f"{path}?code={code}&state={state}")
        assert stolen == "/dashboard/login?error=exchange_failed"
        assert (await victim.get("/v1/me")).status_code == 401
        state = parse_qs(urlsplit(await begin(http)).query)["state"][0]
        assert await arrive(http, f"{path}?state={state}") == "/dashboard/login?error=missing_code"
        assert await arrive(http, f"{path}?error=denied") == "/dashboard/login?error=access_denied"
        for cookie in ("x", "gAAAA" + "A" * 100):
            http.cookies.set("sandmartin_oauth", cookie)
            gone = await arrive(http, f"{path}?code=x&state=x")
            assert gone == "/dashboard/login?error=invalid_state"


async def test_odd_answers_of_the_provider(platform: Platform, github: GitHub) -> None:
    async with client_of(platform) as http:
        emails, github.emails = github.emails, [{**github.emails[1], "verified": False}]
        assert await come_back(http, await begin(http)) == "/dashboard/login?error=no_email"
        github.emails = [{"surprise": 1}]
        assert await come_back(http, await begin(http)) == "/dashboard/login?error=exchange_failed"
        github.emails, github.user = emails, {"id": "no number", "login": "x"}
        assert await come_back(http, await begin(http)) == "/dashboard/login?error=exchange_failed"
        github.user = {"id": 8, "login": "x" * (2 << 20)}
        assert await come_back(http, await begin(http)) == "/dashboard/login?error=exchange_failed"
        github.user, github.redirects = {"id": 8, "login": "bo", "name": "B\no\x00"}, True
        assert await come_back(http, await begin(http)) == "/dashboard/login?error=exchange_failed"
        github.redirects = False
        assert await come_back(http, await begin(http)) == "/dashboard/"
        assert (await http.get("/v1/me")).json()["name"] == "Bo"


async def test_it_goes_by_the_same_rules(database_url: str, tmp_path: Path, github: GitHub) -> None:
    """Invitations are needed there too, and the disabled stay outside."""
    async with platform_at(database_url, tmp_path, github) as platform:
        token = await invite(platform)
        async with client_of(platform) as http:
            assert await come_back(http, await begin(http)) == "/dashboard/login?error=no_account"
            url = await begin(http, invitation="x")
            assert await come_back(http, url) == "/dashboard/login?error=invalid_invitation"
            assert await come_back(http, await begin(http, invitation=token)) == "/dashboard/"
            me = (await http.get("/v1/me")).json()
        async with platform.db.write() as session:
            user = await session.get_one(tables.User, me["id"])
            user.active = False
        async with client_of(platform) as http:
            refused = await come_back(http, await begin(http))
            assert refused == "/dashboard/login?error=account_deactivated"
    assert SECRET not in repr(vars(platform.oauth))


async def invite(platform: Platform) -> str:
    async with platform.db.write() as session:
        return add_invitation(session, "system")[1]
