"""`sandmartin key`: the API keys of a team."""

from __future__ import annotations

import argparse
from typing import Any

from sandmartin.cli.connection import ask_control_plane, control_plane, do_each
from sandmartin.cli.options import add_debug_flag, add_json_flag, add_server_flag
from sandmartin.cli.talk import moment, print_json, print_table, say
from sandmartin.model import check_name
from sandmartin.transport.fields import Message, integer, text

_PATH = "/v1/api-keys"
_HEAD = ("ID", "NAME", "BEGINS", "ADMIN", "CREATED", "LAST_USED")


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "key",
        help="list, make and end API keys",
        description="The API keys of your team at the control plane.",
    )
    nouns = parser.add_subparsers(dest="key_verb", metavar="VERB", required=True)
    listing = nouns.add_parser("ls", help="list keys", description="List the keys of the team.")
    listing.set_defaults(act=_list)
    making = nouns.add_parser(
        "create",
        help="make a key",
        description="Make a key and print it, this once. That takes an administrator's key.",
    )
    making.add_argument("name", metavar="NAME", help="what it is for")
    making.add_argument("--admin", action="store_true", help="it administers the platform")
    making.set_defaults(act=_create)
    removal = nouns.add_parser("rm", help="end keys", description="End keys, at once.")
    removal.add_argument("ids", nargs="+", metavar="KEY", help="ids, as `key ls` shows them")
    removal.set_defaults(act=_remove)
    for each in (listing, making, removal):
        add_server_flag(each)
        add_debug_flag(each)
        add_json_flag(each)


def _list(args: argparse.Namespace) -> int:
    keys = ask_control_plane(args, lambda api: api.ask("GET", _PATH))
    if args.json:
        print_json(keys)
    else:
        print_table(_HEAD, [_row(each) for each in keys])
    return 0


def _row(key: Message) -> tuple[str, ...]:
    used = integer(key, "last_used_at")
    return (
        text(key, "id"),
        text(key, "name"),
        text(key, "prefix"),
        "yes" if key.get("admin") else "-",
        moment(integer(key, "created_at")),
        moment(used) if used else "-",
    )


def _create(args: argparse.Namespace) -> int:
    body = {"name": args.name, "admin": args.admin}
    made = ask_control_plane(args, lambda api: api.ask("POST", _PATH, body))
    if args.json:
        print_json(made)
    else:
        say("it is shown this once:")
        print(text(made, "key"))
    return 0


def _remove(args: argparse.Namespace) -> int:
    ids = [check_name(each, "key id") for each in args.ids]
    return do_each(
        args,
        control_plane(args),
        ids,
        "removed",
        lambda api, each: api.ask("DELETE", f"{_PATH}/{each}"),
    )
