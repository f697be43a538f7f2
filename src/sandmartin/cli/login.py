"""`login` and `logout`: which control plane the verbs are for from now on, and with which key.

Keys and passwords are asked for or read from standard input, never words of the command line,
which other users of a machine see.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import socket
import sys
from contextlib import aclosing
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from sandmartin.cli.options import add_debug_flag, add_json_flag
from sandmartin.cli.talk import print_json, say, say_error
from sandmartin.errors import Invalid, NotFound, SandmartinError
from sandmartin.transport.api import Api
from sandmartin.transport.fields import Message, parts, text
from sandmartin.transport.login import (
    Login,
    forget_login,
    login_file,
    store_login,
    stored_login,
)

_DESCRIPTION = """\
Log in to a control plane: from now on all verbs are for it. It takes an API key, or an e-mail
address and a password, with which a key is made that `sandmartin logout` ends. Where and with which
key is kept in ~/.config/sandmartin/login.json, which you alone can read.
"""


def configure_login(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "login", help="use a control plane from now on", description=_DESCRIPTION
    )
    add = parser.add_argument
    add("url", nargs="?", default="", metavar="URL", help="of the control plane; else asked for")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--key-stdin", action="store_true", help="read an API key from standard input")
    how.add_argument("--email", default="", help="log in with a password, which is asked for")
    add("--team", default="", metavar="NAME", help="of yours, for which the key is made")
    add("--admin", action="store_true", help="make a key that administers the platform")
    add_debug_flag(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_login)


def configure_logout(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "logout",
        help="forget the control plane",
        description="Forget the control plane, and end the key that logging in has made.",
    )
    add_debug_flag(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_logout)


def _login(args: argparse.Namespace) -> int:
    url = args.url or _ask("URL of the control plane: ")
    _warn_of_plain_http(url)
    email, key = args.email, ""
    if args.key_stdin:
        key = sys.stdin.readline().strip()
        if not key:
            raise Invalid("standard input has no API key in its first line")
    elif not email and not (key := _ask_secretly("API key (nothing for a password): ")):
        email = _ask("E-mail address: ")
    password = "" if key else _ask_secretly("Password: ")

    async def act() -> Login:
        if key:
            return await _with_key(url, key)
        return await _with_password(url, email, password, team=args.team, admin=args.admin)

    login = asyncio.run(act())
    before = stored_login(login_file())
    file = store_login(login_file(), login)
    if before is not None and before != login:
        _end_key(before)
    if args.json:
        print_json({"url": login.url, "file": str(file)})
    else:
        say(f"logged in to {login.url}; all verbs are for it now, until `sandmartin logout`")
    return 0


async def _with_key(url: str, key: str) -> Login:
    """Raises what is wrong with the key."""
    async with aclosing(Api(url, key)) as api:
        await api.ask("GET", "/v1/sandboxes", params={"limit": 1})
        return Login(url=api.url, api_key=key)


async def _with_password(url: str, email: str, password: str, *, team: str, admin: bool) -> Login:
    """A new key, made by a session that ends with it. Raises what is wrong."""
    async with aclosing(Api(url, "")) as api:
        body = {"email": email, "password": password}
        me = await api.ask("POST", "/v1/auth/login", body)
        if team:
            chosen = {"team_id": _team_id(me, team)}
            me = await api.ask("POST", "/v1/auth/switch-team", chosen, headers=_csrf_header(me))
        name = f"sandmartin login on {socket.gethostname()}"[:100]
        made = await api.ask(
            "POST", "/v1/api-keys", {"name": name, "admin": admin}, headers=_csrf_header(me)
        )
        await api.ask("POST", "/v1/auth/logout", headers=_csrf_header(me))
        return Login(url=api.url, api_key=text(made, "key"), key_id=text(made, "id"))


def _csrf_header(me: Message) -> dict[str, str]:
    return {"x-csrf-token": text(me, "csrf_token")}


def _team_id(me: Message, team: str) -> str:
    teams = parts(me, "teams")
    for each in teams:
        if team in {text(each, "id"), text(each, "name")}:
            return text(each, "id")
    names = ", ".join(text(each, "name") for each in teams)
    raise NotFound(f"you are in no team {team!r}", hint=f"your teams: {names or 'none'}")


def _logout(args: argparse.Namespace) -> int:
    before = stored_login(login_file())
    if before is None:
        say("you are not logged in")
    else:
        forget_login(login_file())
        _end_key(before)
    if args.json:
        print_json({"url": before.url if before else ""})
    return 0


def _end_key(login: Login) -> None:
    """End the key that a login has made; one that cannot be ended just now is told."""
    if not login.key_id:
        return

    async def act() -> None:
        async with aclosing(Api(login.url, login.api_key)) as api:
            await api.ask("DELETE", f"/v1/api-keys/{login.key_id}")

    try:
        asyncio.run(act())
    except SandmartinError as error:
        say_error(error)
        say(f"note: the key {login.key_id} of {login.url} may still be good")


def _ask(question: str) -> str:
    _check_terminal()
    sys.stderr.write(question)
    sys.stderr.flush()
    if not (answer := sys.stdin.readline().strip()):
        raise Invalid("there was no answer")
    return answer


def _ask_secretly(question: str) -> str:
    _check_terminal()
    try:
        return getpass.getpass(question, sys.stderr).strip()
    except EOFError as error:
        raise Invalid("there was no answer") from error


def _check_terminal() -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise Invalid(
            "nobody can be asked, for standard input is no terminal",
            hint="sandmartin login URL --key-stdin <FILE",
        )


def _warn_of_plain_http(url: str) -> None:
    parsed = urlsplit(url)
    if parsed.scheme == "http" and not _is_loopback(parsed.hostname or ""):
        say("note: this is plain HTTP: whoever is between can read the key and all you do")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
