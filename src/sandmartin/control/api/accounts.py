"""`/v1/auth` and `/v1/me`: signing up, logging in, and one's own account."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from sandmartin.control import oauth
from sandmartin.control.accounts import Entered, NewUser, Profile, SignUp
from sandmartin.control.api.access import (
    ThePerson,
    ThePlatform,
    TheSession,
    check_origin,
    drop_cookie,
    session_cookie,
    set_cookie,
    set_session,
    whence,
)
from sandmartin.control.api.teams import Email, TeamBody, Token
from sandmartin.control.oauth import Begun, NotEntered
from sandmartin.control.platform import Platform
from sandmartin.control.sessions import LoggedIn, cookie_name

router = APIRouter(prefix="/v1", tags=["accounts"])
#: Where browsers go, rather than scripts.
pages = APIRouter(prefix="/auth/oauth", tags=["accounts"])

Strict = ConfigDict(extra="forbid")
Password = Annotated[SecretStr, Field(max_length=1024)]


class SignUpBody(BaseModel):
    model_config = Strict

    email: Email
    password: Password
    name: Annotated[str, Field(max_length=100)] = ""
    invitation: Token = Field("", description="Where one is needed, or to join its team.")


class LoginBody(BaseModel):
    model_config = Strict

    email: Email
    password: Password


class TeamChoice(BaseModel):
    model_config = Strict

    team_id: str


class NameBody(BaseModel):
    model_config = Strict

    name: Annotated[str, Field(max_length=100)]


class PasswordBody(BaseModel):
    model_config = Strict

    current: Password = Field(SecretStr(""), description="None where there was none so far.")
    new: Password


class ConfirmBody(BaseModel):
    model_config = Strict

    confirm: str = Field(description="One's own e-mail address.")


class OauthBody(BaseModel):
    model_config = Strict

    invitation: Token = ""


class Goto(BaseModel):
    url: str


class AuthSettings(BaseModel):
    sign_up: SignUp
    providers: list[str]


class Me(BaseModel):
    """Who is logged in."""

    id: str
    email: str
    name: str
    admin: bool = Field(description="Administers the platform.")
    has_password: bool
    providers: list[str]
    team_id: str = Field(description="The team that one acts for; see switch-team.")
    teams: list[TeamBody]
    csrf_token: str = Field(description="To be sent as X-CSRF-Token with whatever changes.")

    @classmethod
    def of(cls, profile: Profile, logged_in: LoggedIn) -> Me:
        user = profile.user
        return cls(
            id=user.user_id,
            email=user.email,
            name=user.name,
            admin=user.is_admin,
            has_password=user.password_hash is not None,
            providers=list(profile.providers),
            team_id=logged_in.caller.team_id,
            teams=[TeamBody.of(each) for each in profile.teams],
            csrf_token=logged_in.csrf_token,
        )


# Coming and going.


@router.get("/auth/settings")
async def auth_settings(platform: ThePlatform) -> AuthSettings:
    """How one may come in."""
    return AuthSettings(sign_up=platform.accounts.policy, providers=platform.oauth.providers)


@router.post("/auth/signup", status_code=201)
async def sign_up(
    body: SignUpBody, request: Request, response: Response, platform: ThePlatform
) -> Me:
    """A new account, logged in. The first one administers the platform."""
    check_origin(request)
    new = NewUser(email=body.email, name=body.name, invitation=body.invitation)
    password = body.password.get_secret_value()
    entered = await platform.accounts.sign_up(new, password, whence(request))
    return await _start_session(request, response, platform, entered)


@router.post("/auth/login")
async def log_in(
    body: LoginBody, request: Request, response: Response, platform: ThePlatform
) -> Me:
    check_origin(request)
    password = body.password.get_secret_value()
    entered = await platform.accounts.log_in(body.email, password, whence(request))
    return await _start_session(request, response, platform, entered)


@router.post("/auth/logout", status_code=204)
async def log_out(logged_in: TheSession, platform: ThePlatform) -> Response:
    await platform.sessions.end(logged_in)
    response = Response(status_code=204)
    drop_cookie(response, platform, cookie_name(platform.settings.base_url))
    return response


@router.post("/auth/switch-team")
async def switch_team(
    body: TeamChoice, request: Request, logged_in: TheSession, platform: ThePlatform
) -> Me:
    """Act for another team from now on."""
    await platform.sessions.switch(logged_in, body.team_id)
    return await _me(request, platform, session_cookie(request))


# Oneself.


@router.get("/me")
async def me(logged_in: TheSession, platform: ThePlatform) -> Me:
    return Me.of(await platform.accounts.profile(logged_in.caller), logged_in)


@router.patch("/me")
async def rename(body: NameBody, logged_in: TheSession, platform: ThePlatform) -> Me:
    await platform.accounts.rename(logged_in.caller, body.name)
    return Me.of(await platform.accounts.profile(logged_in.caller), logged_in)


@router.delete("/me", status_code=204)
async def delete(body: ConfirmBody, caller: ThePerson, platform: ThePlatform) -> Response:
    """Forget the account, its keys, and the teams that nobody else belongs to."""
    await platform.accounts.delete(caller, body.confirm)
    response = Response(status_code=204)
    drop_cookie(response, platform, cookie_name(platform.settings.base_url))
    return response


@router.post("/me/password", status_code=204)
async def change_password(
    body: PasswordBody, logged_in: TheSession, platform: ThePlatform
) -> Response:
    """A new password. All other sessions end; keys stay."""
    await platform.accounts.change_password(
        logged_in.caller,
        body.current.get_secret_value(),
        body.new.get_secret_value(),
        session_hash=logged_in.session_hash,
    )
    return Response(status_code=204)


@router.post("/me/providers/{provider}/connect")
async def connect(
    provider: str, request: Request, response: Response, caller: ThePerson, platform: ThePlatform
) -> Goto:
    """Where to go to be able to log in there too."""
    begun = await platform.oauth.begin(provider, whence(request), user_id=caller.actor_id)
    return _goto(response, platform, begun)


@router.delete("/me/providers/{provider}", status_code=204)
async def disconnect(provider: str, caller: ThePerson, platform: ThePlatform) -> Response:
    await platform.accounts.unlink(caller, provider)
    return Response(status_code=204)


# Elsewhere.


@router.post("/auth/oauth/{provider}")
async def oauth_begin(
    provider: str,
    request: Request,
    response: Response,
    platform: ThePlatform,
    body: OauthBody | None = None,
) -> Goto:
    """Where to go to log in there, or to sign up with an invitation."""
    check_origin(request)
    invitation = body.invitation if body else ""
    begun = await platform.oauth.begin(provider, whence(request), invitation=invitation)
    return _goto(response, platform, begun)


@pages.get("/{provider}", status_code=302, response_class=RedirectResponse)
async def oauth_page(provider: str, request: Request, platform: ThePlatform) -> RedirectResponse:
    """Go there to log in."""
    begun = await platform.oauth.begin(provider, whence(request))
    response = RedirectResponse(begun.url, 302)
    _goto(response, platform, begun)
    return response


@pages.get("/{provider}/callback", status_code=302, response_class=RedirectResponse)
async def oauth_callback(
    provider: str,
    request: Request,
    platform: ThePlatform,
    state: Annotated[str, Query(max_length=200)] = "",
    code: Annotated[str, Query(max_length=1000)] = "",
    error: Annotated[str, Query(max_length=200)] = "",
) -> RedirectResponse:
    """Where providers send people back to. What went wrong is told in `?error=`."""
    name = oauth.cookie_name(platform.settings.base_url)
    cookie = request.cookies.get(name, "")
    try:
        if error:
            raise NotEntered("access_denied", "the provider has refused")
        entered = await platform.oauth.finish(
            provider, cookie=cookie, state=state, code=code, whence=whence(request)
        )
    except NotEntered as refused:
        response = RedirectResponse(f"/dashboard/login?error={refused.reason}", 302)
    else:
        response = RedirectResponse("/dashboard/" if entered else "/dashboard/settings", 302)
        if entered:
            await _start_session(request, response, platform, entered)
    drop_cookie(response, platform, name)
    return response


def _goto(response: Response, platform: Platform, begun: Begun) -> Goto:
    name = oauth.cookie_name(platform.settings.base_url)
    set_cookie(response, platform, name, begun.cookie, oauth.LIFE_S)
    return Goto(url=begun.url)


async def _start_session(
    request: Request, response: Response, platform: Platform, entered: Entered
) -> Me:
    token = await platform.sessions.start(
        entered.user_id, entered.team_id, whence(request), instead_of=session_cookie(request)
    )
    set_session(response, platform, token)
    return await _me(request, platform, token)


async def _me(request: Request, platform: Platform, token: str) -> Me:
    logged_in = await platform.sessions.find(token, whence(request))
    return Me.of(await platform.accounts.profile(logged_in.caller), logged_in)
