"""Templates, and the snapshots that become some: `snapshot` and `template ls|rm`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sandmartin.cli.connection import add_id, ask, ask_sandbox, connected, do_each
from sandmartin.cli.options import add_json_flag, add_place_flags
from sandmartin.cli.talk import print_json, print_table
from sandmartin.model import check_name
from sandmartin.transport import Template

_HEAD = ("NAME", "KIND", "VCPUS", "MEMORY_MB", "DISK_MB", "BYTES")


def configure_snapshot(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "snapshot",
        help="make a template of a sandbox",
        description="Make a template of a sandbox, memory and disk, and print its name. The "
        "sandbox is paused by it, or goes on with --live.",
    )
    add_id(parser)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--live", action="store_true", help="leave the sandbox running")
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_snapshot)


def configure_template(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "template", help="list and delete templates", description="What sandboxes start from."
    )
    nouns = parser.add_subparsers(dest="template_verb", metavar="VERB", required=True)
    listing = nouns.add_parser("ls", help="list templates", description="List the templates.")
    add_place_flags(listing)
    add_json_flag(listing)
    listing.set_defaults(act=_list)
    removal = nouns.add_parser(
        "rm",
        help="delete templates",
        description="Delete templates. One that something still depends on stays.",
    )
    removal.add_argument("names", nargs="+", metavar="NAME")
    add_place_flags(removal)
    add_json_flag(removal)
    removal.set_defaults(act=_remove)


def _snapshot(args: argparse.Namespace) -> int:
    name = check_name(args.name, "template name")
    made = ask_sandbox(args, lambda sandbox: sandbox.snapshot(name, live=args.live))
    if args.json:
        print_json(asdict(made))
    else:
        print(made.name)
    return 0


def _list(args: argparse.Namespace) -> int:
    found = ask(args, lambda transport: transport.list_templates())
    if args.json:
        print_json([asdict(each) for each in found])
    else:
        print_table(_HEAD, [_row(each) for each in found])
    return 0


def _row(template: Template) -> tuple[str, ...]:
    shape = (template.vcpus, template.memory_mb, template.disk_size_mb)
    numbers = [str(number or "-") for number in shape]
    return (template.name, template.kind, *numbers, str(template.size_bytes))


def _remove(args: argparse.Namespace) -> int:
    names = [check_name(each, "template name") for each in args.names]
    return do_each(
        args,
        connected(args),
        names,
        "removed",
        lambda transport, name: transport.delete_snapshot(name),
    )
