"""Logging in elsewhere: OAuth 2 with PKCE at GitHub, or at one's own GitHub Enterprise.

What must come back to us between the two requests, the state and the verifier, is sealed in a
cookie, so that any replica can take the answer and only the browser that asked can bring it. An
account is found by the provider's own id of a person, never by an address: addresses here were
not proven, so that whoever has one there might get another's account here.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit
from sandmartin.control.accounts import Accounts, Entered, NewUser
from sandmartin.control.caller import Whence
from sandmartin.control.db import Database
from sandmartin.control.limits import OAUTH, Limits, Use
from sandmartin.control.seal import Sealer
from sandmartin.control.sessions import person
from sandmartin.control.settings import ControlSettings
from sandmartin.control.tables import PLATFORM_TEAM_ID, OauthIdentity, User
from sandmartin.errors import Denied, Invalid, NotFound, SandmartinError

#: How long somebody may take at the provider.
LIFE_S = 600
_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 1 << 20
_SCOPE = "read:user user:email"
_SECURE_COOKIE = "__Host-sandmartin-oauth"
_PLAIN_COOKIE = "sandmartin_oauth"
COOKIES = frozenset({_SECURE_COOKIE, _PLAIN_COOKIE})


def cookie_name(base_url: str) -> str:
    return _SECURE_COOKIE if base_url.startswith("https:") else _PLAIN_COOKIE


class NotEntered(Denied):
    """Logging in elsewhere did not work; `reason` says why to the page that shows it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where people may log in."""

    name: str
    authorize_url: str
    token_url: str
    api_url: str
    client_id: str
    client_secret: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Where the browser must go, and the cookie that it must bring back."""

    url: str
    cookie: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody as a provider knows them."""

    subject: str
    name: str
    #: Their address, proven there; empty for none.
    email: str


class Oauth:
    """Logging in at the providers that are set up."""

    def __init__(
        self,
        db: Database,
        sealer: Sealer,
        accounts: Accounts,
        limits: Limits,
        settings: ControlSettings,
    ) -> None:
        self._db = db
        self._sealer = sealer
        self._accounts = accounts
        self._limits = limits
        self._base_url = settings.base_url
        self._providers = {each.name: each for each in _providers(settings)}

    @property
    def providers(self) -> list[str]:
        return sorted(self._providers)

    async def begin(
        self, name: str, whence: Whence, *, invitation: str = "", user_id: str = ""
    ) -> Begun:
        """Send somebody to a provider, to log in, or as `user_id` to be linked.

        Raises NotFound, TooMany.
        """
        provider = self._provider(name)
        await self._limits.take(Use(OAUTH, whence.address))
        state, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(64)
        url = prepare_grant_uri(
            provider.authorize_url,
            client_id=provider.client_id,
            response_type="code",
            redirect_uri=self._callback_url(provider),
            scope=_SCOPE,
            state=state,
            code_challenge=create_s256_code_challenge(verifier),
            code_challenge_method="S256",
        )
        kept = {
            "provider": name,
            "state": state,
            "verifier": verifier,
            "invitation": invitation,
            "user_id": user_id,
            "expires_at": time.time() + LIFE_S,
        }
        return Begun(url=str(url), cookie=self._sealer.seal(kept).decode())

    async def finish(
        self, name: str, *, cookie: str, state: str, code: str, whence: Whence
    ) -> Entered | None:
        """Who came back from a provider; None for one who was logged in, and is linked now.

        Raises NotEntered, NotFound, TooMany.
        """
        provider = self._provider(name)
        await self._limits.take(Use(OAUTH, whence.address))
        kept = self._kept(name, cookie, state)
        if not code:
            raise NotEntered("missing_code", "the provider has sent no code")
        try:
            found = await self._ask(provider, code, kept["verifier"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            # Not its words: they may hold the code.
            raise NotEntered(
                "exchange_failed", f"{name} did not answer as expected ({type(error).__name__})"
            ) from None
        if kept["user_id"]:
            await self._link(name, found, kept["user_id"], whence)
            return None
        return await self._enter(name, found, kept["invitation"], whence)

    def _kept(self, name: str, cookie: str, state: str) -> dict[str, Any]:
        refused = NotEntered("invalid_state", "this login was not begun here, or took too long")
        try:
            kept: dict[str, Any] = self._sealer.unseal(cookie.encode())
        except Invalid:
            raise refused from None
        right = secrets.compare_digest(str(kept.get("state")).encode(), state.encode())
        if not right or kept.get("provider") != name or kept["expires_at"] < time.time():
            raise refused
        return kept

    # At the provider.

    async def _ask(self, provider: Provider, code: str, verifier: str) -> Person:
        """Trade a code for a person. No database is open meanwhile."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False) as http:
            token = await self._trade(http, provider, code, verifier)
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
            user = await _fetch(http, "GET", f"{provider.api_url}/user", headers)
            emails = await _fetch(http, "GET", f"{provider.api_url}/user/emails", headers)
        proven = [each["email"] for each in emails if each["primary"] and each["verified"]]
        return Person(
            subject=str(int(user["id"])),
            name=str(user.get("name") or user["login"]),
            email=str(proven[0]) if proven else "",
        )

    async def _trade(
        self, http: httpx.AsyncClient, provider: Provider, code: str, verifier: str
    ) -> str:
        body = prepare_token_request(
            "authorization_code",
            code=code,
            redirect_uri=self._callback_url(provider),
            code_verifier=verifier,
        )
        auth = ClientAuth(provider.client_id, provider.client_secret, "client_secret_post")
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        url, headers, body = auth.prepare("POST", provider.token_url, headers, body)
        return str((await _fetch(http, "POST", url, headers, body))["access_token"])

    # Here.

    async def _enter(self, name: str, found: Person, invitation: str, whence: Whence) -> Entered:
        async with self._db.read() as session:
            identity = await session.get(OauthIdentity, (name, found.subject))
        try:
            if identity is not None:
                return await self._accounts.enter(identity.user_id, whence)
        except Denied as error:
            raise NotEntered("account_deactivated", error.message) from error
        if not found.email:
            raise NotEntered("no_email", f"{name} knows no verified e-mail address of yours")
        new = NewUser(email=found.email, name=_printable(found.name), invitation=invitation)
        try:
            async with self._db.write() as session:
                entered = await self._accounts.add(session, new, None, whence)
                session.add(
                    OauthIdentity(provider=name, subject=found.subject, user_id=entered.user_id)
                )
            return entered
        except IntegrityError as error:
            raise NotEntered("email_taken", "the account was made meanwhile") from error
        except SandmartinError as error:
            reason = {"already_exists": "email_taken", "invalid": "invalid_invitation"}
            raise NotEntered(reason.get(error.code, "no_account"), error.message) from error

    async def _link(self, name: str, found: Person, user_id: str, whence: Whence) -> None:
        try:
            async with self._db.write() as session:
                user = await session.get(User, user_id)
                if user is None or not user.active:
                    raise NotEntered("account_deactivated", "this account is disabled")
                taken = select(OauthIdentity).where(
                    OauthIdentity.provider == name,
                    (OauthIdentity.subject == found.subject) | (OauthIdentity.user_id == user_id),
                )
                if (known := (await session.scalars(taken)).all()) and {
                    (each.subject, each.user_id) for each in known
                } != {(found.subject, user_id)}:
                    raise NotEntered("already_linked", "it is linked to another account already")
                if not known:
                    session.add(
                        OauthIdentity(provider=name, subject=found.subject, user_id=user_id)
                    )
                    _note_link(session, user, name, whence)
        except IntegrityError as error:
            raise NotEntered("already_linked", "it was linked meanwhile") from error

    def _provider(self, name: str) -> Provider:
        if name not in self._providers:
            raise NotFound(f"one cannot log in by {name[:40]!r} here")
        return self._providers[name]

    def _callback_url(self, provider: Provider) -> str:
        return f"{self._base_url}/auth/oauth/{provider.name}/callback"


def _note_link(session: AsyncSession, user: User, provider: str, whence: Whence) -> None:
    caller = person(user, PLATFORM_TEAM_ID, whence)
    audit.record(
        session, caller, "user.linked", "user", user.user_id, scope="admin", provider=provider
    )


def _providers(settings: ControlSettings) -> list[Provider]:
    if not (settings.github_client_id and settings.github_client_secret):
        return []
    login = f"{settings.github_url.rstrip('/')}/login/oauth"
    return [
        Provider(
            name="github",
            authorize_url=f"{login}/authorize",
            token_url=f"{login}/access_token",
            api_url=settings.github_api_url.rstrip("/"),
            client_id=settings.github_client_id,
            client_secret=settings.github_client_secret,
        )
    ]


async def _fetch(
    http: httpx.AsyncClient, method: str, url: str, headers: dict[str, str], body: str = ""
) -> Any:
    """A JSON answer. Raises httpx.HTTPError, ValueError."""
    async with http.stream(method, url, headers=headers, content=body or None) as answer:
        answer.raise_for_status()
        content = b""
        async for chunk in answer.aiter_bytes():
            content += chunk
            if len(content) > _MAX_ANSWER_BYTES:
                raise ValueError("the answer is too long")
    return json.loads(content)


def _printable(name: str) -> str:
    return "".join(char for char in name if char.isprintable())[:100]
