"""`sandmartin host`: the hosts of a platform, for its administrators."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from sandmartin.cli.options import add_json_flag
from sandmartin.cli.rest import Rest, rest
from sandmartin.cli.talk import print_json, print_table, say
from sandmartin.errors import NotFound

_HEAD = ("NAME", "STATUS", "ADDRESS", "VCPUS", "MEMORY_MB", "DISK_FREE_MB", "RUNNING", "PAUSED")
_Host = dict[str, Any]


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "host",
        help="list, add and remove hosts",
        description="The hosts of the platform at SANDMARTIN_URL, with the key in "
        "SANDMARTIN_API_KEY, which must be an administrator's.",
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
    # As `add_settings_flags` has it.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.set_defaults(act=act, parser=parser)
    add_json_flag(parser)
    return parser


def _list(args: argparse.Namespace) -> int:
    with rest() as control:
        hosts = control.ask("GET", "/v1/hosts")
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
    with rest() as control:
        made = control.ask("POST", "/v1/hosts", {"name": args.name})
    return _tell_token(args, made)


def _reissue(args: argparse.Namespace) -> int:
    with rest() as control:
        made = control.ask("POST", f"{_path(control, args.name)}/token")
    return _tell_token(args, made)


def _tell_token(args: argparse.Namespace, made: dict[str, Any]) -> int:
    if args.json:
        print_json(made)
        return 0
    say("It works once, within an hour. On the machine that is to be the host, as root:")
    say(
        f"  SANDMARTIN_HOST_TOKEN=TOKEN sandmartin agent --control {os.environ['SANDMARTIN_URL']}"
        " --listen ADDRESS:7443"
    )
    print(made["token"])
    return 0


def _remove(args: argparse.Namespace) -> int:
    with rest() as control:
        force = "?force=true" if args.force else ""
        control.ask("DELETE", f"{_path(control, args.name)}{force}")
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
    with rest() as control:
        host = control.ask("POST", f"{_path(control, args.name)}/{verb}")
    if args.json:
        print_json(host)
    else:
        print_table(_HEAD, [_row(host)])
    return 0


def _path(control: Rest, name: str) -> str:
    """The path of the host of this name, or id. Raises NotFound."""
    for host in control.ask("GET", "/v1/hosts"):
        if name in {host["name"], host["id"]}:
            return f"/v1/hosts/{host['id']}"
    raise NotFound(f"there is no host {name!r}", hint="`sandmartin host ls` shows those there are")
