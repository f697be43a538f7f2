"""Sandboxes as a whole: `create`, `ls`, `info`, `pause`, `resume`, `fork` and `kill`."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.connection import (
    add_id,
    add_ids,
    ask,
    ask_sandbox,
    connected,
    do_each,
    sandbox_of,
)
from sandmartin.cli.interrupts import Interrupts, carry_out
from sandmartin.cli.options import (
    add_env_flag,
    add_json_flag,
    add_place_flags,
    add_shape_flags,
    check_utf8,
    environment,
    positive,
    seconds,
)
from sandmartin.cli.talk import moment, print_fields, print_json, print_table, say_error
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.model import check_name, new_sandbox_id
from sandmartin.transport import ForkedSandbox, NewSandbox, SandboxInfo, Transport
from sandmartin.transport.agent import AgentSocket

_HEAD = ("ID", "STATE", "TEMPLATE", "VCPUS", "MEMORY_MB", "DISK_MB", "ADDRESS", "CREATED")
_IDLE = "idle time after which it is paused; 0 is never"


def configure_create(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "create",
        help="create a sandbox",
        description="Create a sandbox and print its id. One that did not succeed leaves nothing.",
    )
    add_shape_flags(parser)
    add_env_flag(parser)
    parser.add_argument("--timeout", type=seconds, default=0, metavar="S", help=_IDLE)
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_create)


def configure_ls(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ls", help="list sandboxes", description="List the sandboxes that are there."
    )
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_list)


def configure_info(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "info", help="show a sandbox", description="Show the state and the shape of a sandbox."
    )
    add_id(parser)
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_info)


def configure_pause(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "pause",
        help="pause sandboxes",
        description="Write sandboxes to disk, memory and all, and free what they use. Prints "
        "the id of each that is paused.",
    )
    add_ids(parser)
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_pause)


def configure_resume(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "resume",
        help="resume paused sandboxes",
        description="Let paused sandboxes go on from where they were. Prints the id of each.",
    )
    add_ids(parser)
    parser.add_argument("--timeout", type=seconds, metavar="S", help=f"{_IDLE}; default: as before")
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_resume)


def configure_fork(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "fork",
        help="make sandboxes from a running one",
        description="Make sandboxes that go on from where a running one is, which goes on too. "
        "Prints their ids. Exits 1 when not all could be made.",
    )
    add_id(parser)
    parser.add_argument("-n", "--count", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=0,
        metavar="S",
        help="idle time after which they are paused; default: as the source's",
    )
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_fork)


def configure_kill(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "kill",
        help="destroy sandboxes",
        description="Destroy sandboxes and all they hold. One that is gone already is no error.",
    )
    add_ids(parser)
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_kill)


def _create(args: argparse.Namespace) -> int:
    check_utf8(*args.env)
    new = NewSandbox(
        sandbox_id=new_sandbox_id(),
        template=args.template,
        vcpus=args.vcpus,
        memory_mb=args.memory,
        disk_size_mb=args.disk,
        timeout_s=args.timeout,
        envs=environment(args.env),
    )

    async def act(stack: AsyncExitStack, _interrupts: Interrupts) -> int:
        transport = await stack.enter_async_context(connected(args))
        if isinstance(transport, AgentSocket):
            # Only then is a failed create one that may have left something.
            await transport.reach()
        sandbox = await AsyncSandbox.create(transport, new)
        if args.json:
            print_json({"sandbox_id": sandbox.sandbox_id})
        else:
            print(sandbox.sandbox_id, flush=True)
        return 0

    return asyncio.run(carry_out(act))


def _list(args: argparse.Namespace) -> int:
    found = ask(args, lambda transport: transport.list_sandboxes())
    if args.json:
        print_json([asdict(info) for info in found])
    else:
        print_table(_HEAD, [_row(info) for info in found])
    return 0


def _row(info: SandboxInfo) -> tuple[str, ...]:
    shape = (str(info.vcpus), str(info.memory_mb), str(info.disk_size_mb))
    created = moment(info.created_at)
    return (info.sandbox_id, _state(info), info.template, *shape, info.address or "-", created)


def _state(info: SandboxInfo) -> str:
    return f"{info.state} ({info.reason})" if info.reason else info.state


def _info(args: argparse.Namespace) -> int:
    info = ask_sandbox(args, lambda sandbox: sandbox.info())
    if args.json:
        print_json(asdict(info))
        return 0
    print_fields(
        {
            "id": info.sandbox_id,
            "state": _state(info),
            "template": info.template,
            "vcpus": str(info.vcpus),
            "memory": f"{info.memory_mb} MiB",
            "disk": f"{info.disk_size_mb} MiB",
            "idle limit": f"{info.timeout_s} s" if info.timeout_s else "none",
            "address": info.address or "-",
            "created": moment(info.created_at),
            "last active": moment(info.last_active_at),
        }
    )
    return 0


def _each(
    args: argparse.Namespace, done_word: str, act: Callable[[Transport, str], Awaitable[object]]
) -> int:
    ids = [check_name(each, "sandbox id") for each in args.ids]
    return do_each(args, connected(args), ids, done_word, act)


def _pause(args: argparse.Namespace) -> int:
    return _each(args, "paused", lambda transport, each: transport.pause(each))


def _resume(args: argparse.Namespace) -> int:
    return _each(args, "resumed", lambda transport, each: transport.resume(each, args.timeout))


def _kill(args: argparse.Namespace) -> int:
    return _each(args, "killed", lambda transport, each: transport.destroy(each))


def _fork(args: argparse.Namespace) -> int:
    async def act(stack: AsyncExitStack, _interrupts: Interrupts) -> int:
        sandbox = await stack.enter_async_context(sandbox_of(args))
        children = await sandbox.fork(args.count, timeout_s=args.timeout)
        return _tell_children(args, children)

    return asyncio.run(carry_out(act))


def _tell_children(args: argparse.Namespace, children: Sequence[ForkedSandbox]) -> int:
    errors = [each.error for each in children if each.error is not None]
    for error in errors:
        say_error(error)
    if args.json:
        print_json([_child(each) for each in children])
    else:
        for each in children:
            if each.error is None:
                print(each.sandbox_id, flush=True)
    return exitcode.FAILED if errors else 0


def _child(child: ForkedSandbox) -> dict[str, Any]:
    fields = {"sandbox_id": child.sandbox_id, "state": child.state, "address": child.address}
    if child.error is None:
        return fields
    return fields | {"error": {"code": child.error.code, "message": child.error.message}}
