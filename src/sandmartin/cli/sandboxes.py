"""`sandmartin ls` and `sandmartin kill`: the sandboxes of the agent on this machine."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.options import add_json_flag, add_settings_flags, load_settings
from sandmartin.cli.talk import print_json, print_table, say_error
from sandmartin.client.agent_socket import AgentSocket
from sandmartin.client.transport import SandboxInfo
from sandmartin.errors import SandmartinError
from sandmartin.model import check_name

_HEAD = ("ID", "STATE", "TEMPLATE", "VCPUS", "MEMORY_MB", "DISK_MB", "ADDRESS", "CREATED")


def configure_ls(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ls", help="list sandboxes", description="List the sandboxes of the agent."
    )
    add_settings_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_list)
    return parser


def configure_kill(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "kill",
        help="destroy sandboxes",
        description="Destroy sandboxes and all they hold. One that is gone already is no error.",
    )
    parser.add_argument("ids", nargs="+", metavar="ID")
    add_settings_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_kill)
    return parser


def _list(args: argparse.Namespace) -> int:
    async def ask() -> tuple[SandboxInfo, ...]:
        async with aclosing(AgentSocket(load_settings(args).socket)) as agent:
            return await agent.list_sandboxes()

    found = asyncio.run(ask())
    if args.json:
        print_json([asdict(info) for info in found])
    else:
        print_table(_HEAD, [_row(info) for info in found])
    return 0


def _row(info: SandboxInfo) -> tuple[str, ...]:
    state = f"{info.state} ({info.reason})" if info.reason else info.state
    shape = (str(info.vcpus), str(info.memory_mb), str(info.disk_size_mb))
    created = _moment(info.created_at)
    return (info.sandbox_id, state, info.template, *shape, info.address or "-", created)


def _moment(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "-"


def _kill(args: argparse.Namespace) -> int:
    ids = [check_name(each, "sandbox id") for each in args.ids]
    killed, failed = asyncio.run(_destroy_each(args, ids))
    if args.json:
        print_json({"killed": killed, "failed": failed})
    elif killed:
        print("\n".join(killed))
    return exitcode.FAILED if failed else 0


async def _destroy_each(args: argparse.Namespace, ids: list[str]) -> tuple[list[str], list[str]]:
    killed: list[str] = []
    failed: list[str] = []
    async with aclosing(AgentSocket(load_settings(args).socket)) as agent:
        for sandbox_id in ids:
            try:
                await agent.destroy(sandbox_id)
                killed.append(sandbox_id)
            except SandmartinError as error:
                # The others are destroyed all the same.
                say_error(error)
                failed.append(sandbox_id)
    return killed, failed
