"""The history of a sandbox: `checkpoint`, `checkpoints` and `rollback`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sandmartin.cli.connection import add_id, ask_sandbox
from sandmartin.cli.options import add_json_flag, add_place_flags, check_utf8
from sandmartin.cli.talk import moment, print_json, print_table
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.model import check_name
from sandmartin.transport import Checkpoint


def configure_checkpoint(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "checkpoint",
        help="keep where a sandbox is, to return to",
        description="Keep where a running sandbox is, memory and disk, and print the id of that "
        "checkpoint. The sandbox goes on.",
    )
    add_id(parser)
    parser.add_argument("--comment", default="", metavar="TEXT", help="what it is for")
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_checkpoint)


def configure_checkpoints(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "checkpoints",
        help="list the checkpoints of a sandbox",
        description="List the checkpoints of a sandbox, oldest first.",
    )
    add_id(parser)
    parser.add_argument(
        "--rm", action="append", default=[], metavar="CHECKPOINT", help="delete it; repeatable"
    )
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_checkpoints)


def configure_rollback(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "rollback",
        help="return a sandbox to a checkpoint",
        description="Return a sandbox to a checkpoint, in memory and on disk. What came after it "
        "is gone.",
    )
    add_id(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_rollback)


def _checkpoint(args: argparse.Namespace) -> int:
    check_utf8(args.comment)
    made = ask_sandbox(args, lambda sandbox: sandbox.checkpoint(args.comment))
    if args.json:
        print_json(asdict(made))
    else:
        print(made.checkpoint_id)
    return 0


def _checkpoints(args: argparse.Namespace) -> int:
    unwanted = [check_name(each, "checkpoint id") for each in args.rm]

    async def act(sandbox: AsyncSandbox) -> tuple[Checkpoint, ...]:
        for each in unwanted:
            await sandbox.delete_checkpoint(each)
        return await sandbox.checkpoints()

    found = ask_sandbox(args, act)
    if args.json:
        print_json([asdict(each) for each in found])
    else:
        rows = [
            (each.checkpoint_id, moment(each.created_at), str(each.size_bytes), each.comment)
            for each in found
        ]
        print_table(("CHECKPOINT", "CREATED", "BYTES", "COMMENT"), rows)
    return 0


def _rollback(args: argparse.Namespace) -> int:
    checkpoint_id = check_name(args.checkpoint, "checkpoint id")
    placed = ask_sandbox(args, lambda sandbox: sandbox.rollback(checkpoint_id))
    if args.json:
        print_json(asdict(placed))
    else:
        print(placed.sandbox_id)
    return 0
