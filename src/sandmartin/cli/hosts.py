"""`sandmartin host`: the hosts of a platform, for its administrators."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sandmartin.cli.connection import ask_control_plane
from sandmartin.cli.options import add_debug_flag, add_json_flag, add_server_flag
from sandmartin.cli.talk import print_json, print_table, say
from sandmartin.errors import NotFound
from sandmartin.transport.api import Api

_PATH = "/v1/hosts"
#: Its agent ends all that is on it first.
_REMOVE_S = 90.0
_HEAD = ("NAME", "STATUS", "ADDRESS", "VCPUS", "MEMORY_MB", "DISK_FREE_MB", "RUNNING", "PAUSED")
_Host = dict[str, Any]


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "host",
        help="list, add and remove hosts",
        description="The hosts of the platform. That takes an administrator's key.",
    )
    nouns = parser.add_subparsers(dest="host_verb", metavar="VERB", required=True)
    _verb(nouns, "ls", _list, "list hosts")
    _verb(nouns, "add", _add, "make a token with which a machine becomes a host", name=True)
    _verb(nouns, "token", _reissue, "make a new token for a host", name=True)
    removal = _verb(nouns, "rm", _remove, "end a host's agent and forget the host", name=True)
    removal.add_argument(
        "--force", action="store_true", help="with all that is on it, reached or not"
    )
    drain = _verb(nouns, "drain", _drain, "let a host take nothing new", name=True)
    drain.add_argument("--undo", action="store_true", help="let it take new sandboxes again")
    _verb(nouns, "revoke", _revoke, "let a host's certificates count no more", name=True)


def _verb(
    nouns: Any,
    word: str,
    act: Callable[[argparse.Namespace], int],
    help_: str,
    *,
    name: bool = False,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = nouns.add_parser(
        word, help=help_, description=f"{help_[0].upper()}{help_[1:]}."
    )
    if name:
        parser.add_argument("name", metavar="NAME")
    parser.set_defaults(act=act)
    add_server_flag(parser)
    add_debug_flag(parser)
    add_json_flag(parser)
    return parser


def _list(args: argparse.Namespace) -> int:
    hosts = ask_control_plane(args, lambda api: api.ask("GET", _PATH))
    if args.json:
        print_json(hosts)
    else:
        print_table(_HEAD, [_row(each) for each in hosts])
    return 0


def _row(host: _Host) -> tuple[str, ...]:
    status = f"{host['status']}{', drained' if host['draining'] else ''}"
    vcpus = f"{host['used_vcpus']}/{host['cpus'] * host['cpu_overcommit']:g}"
    memory = f"{host['used_memory_mb']}/{host['memory_mb']}"
    numbers = (host["disk_free_mb"], host["running"], host["paused"])
    return (host["name"], status, host["address"] or "-", vcpus, memory, *map(str, numbers))


def _add(args: argparse.Namespace) -> int:
    async def add(api: Api) -> int:
        return _tell_token(args, api, await api.ask("POST", _PATH, {"name": args.name}))

    return ask_control_plane(args, add)


def _reissue(args: argparse.Namespace) -> int:
    async def reissue(api: Api) -> int:
        path = f"{await _path(api, args.name)}/token"
        return _tell_token(args, api, await api.ask("POST", path))

    return ask_control_plane(args, reissue)


def _tell_token(args: argparse.Namespace, api: Api, made: _Host) -> int:
    if args.json:
        print_json(made)
        return 0
    say("It works once, within an hour. On the machine that is to be the host, as root:")
    say(f"  SANDMARTIN_HOST_TOKEN=TOKEN sandmartin agent --control {api.url} --listen ADDRESS:7443")
    print(made["token"])
    return 0


def _remove(args: argparse.Namespace) -> int:
    params = {"force": "true"} if args.force else {}

    async def remove(api: Api) -> None:
        path = await _path(api, args.name)
        await api.ask("DELETE", path, params=params, deadline_s=_REMOVE_S)

    ask_control_plane(args, remove)
    if args.json:
        print_json({"removed": [args.name]})
    else:
        print(args.name)
    return 0


def _drain(args: argparse.Namespace) -> int:
    return _act(args, "undrain" if args.undo else "drain")


def _revoke(args: argparse.Namespace) -> int:
    return _act(args, "revoke")


def _act(args: argparse.Namespace, verb: str) -> int:
    async def ask(api: Api) -> _Host:
        host: _Host = await api.ask("POST", f"{await _path(api, args.name)}/{verb}")
        return host

    host = ask_control_plane(args, ask)
    if args.json:
        print_json(host)
    else:
        print_table(_HEAD, [_row(host)])
    return 0


async def _path(api: Api, name: str) -> str:
    """The path of the host of this name, or id. Raises NotFound."""
    for host in await api.ask("GET", _PATH):
        if name in {host["name"], host["id"]}:
            return f"{_PATH}/{host['id']}"
    raise NotFound(f"there is no host {name!r}", hint="`sandmartin host ls` shows those there are")
