"""Commands in a sandbox that is there: `exec` and `ps`."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.connection import add_id, ask_sandbox, sandbox_of
from sandmartin.cli.execution import ended_with_us, exit_code_of, relay
from sandmartin.cli.interrupts import Interrupts, carry_out
from sandmartin.cli.options import (
    Parser,
    add_command_flags,
    add_json_flag,
    add_place_flags,
    check_utf8,
    environment,
    positive,
)
from sandmartin.cli.pipes import stdin_is_open
from sandmartin.cli.talk import print_json, print_table
from sandmartin.transport import Command

_DESCRIPTION = """\
Run a command in a sandbox, with our standard input, output and error. The exit code is the
command's. The first Ctrl-C interrupts the command; when exec itself is ended, the command is
killed.
"""


def configure_exec(verbs: Any) -> None:
    parser: Parser = verbs.add_parser(
        "exec",
        help="run a command in a sandbox",
        usage="sandmartin exec [options] ID -- CMD [ARG...]",
        description=_DESCRIPTION,
        epilog=exitcode.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.passes_exit_on = True
    parser.add_argument(
        "--timeout", type=positive, metavar="S", help="kill the command after S seconds"
    )
    add_command_flags(parser)
    add_place_flags(parser)
    add_id(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help=argparse.SUPPRESS)
    parser.set_defaults(act=_exec)


def configure_ps(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ps",
        help="list the commands of a sandbox",
        description="List the commands that were started in a sandbox and run.",
    )
    add_id(parser)
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_ps)


def command_of(args: argparse.Namespace) -> Command:
    """The command that `args` ask for. Raises Invalid."""
    if not args.command:
        args.parser.error("exec needs a command")
    if args.command[0].startswith("-"):
        args.parser.error(f"{args.command[0]} stands behind the sandbox; options come before it")
    check_utf8(*args.command, *args.env, args.user, args.cwd)
    return Command(
        cmd=args.command[0],
        args=tuple(args.command[1:]),
        envs=environment(args.env),
        cwd=args.cwd,
        user=args.user,
        stdin=stdin_is_open(),
        timeout_s=args.timeout,
    )


def _exec(args: argparse.Namespace) -> int:
    command = command_of(args)

    async def act(stack: AsyncExitStack, interrupts: Interrupts) -> int:
        sandbox = await stack.enter_async_context(sandbox_of(args))
        async with (
            sandbox.exec(command) as execution,
            ended_with_us(execution, signal.SIGKILL),
        ):
            return exit_code_of(await relay(execution, interrupts, stdin=command.stdin))

    return asyncio.run(carry_out(act))


def _ps(args: argparse.Namespace) -> int:
    found = ask_sandbox(args, lambda sandbox: sandbox.processes())
    if args.json:
        print_json([asdict(each) for each in found])
    else:
        rows = [
            (str(each.pid), each.cwd or "-", shlex.join([each.cmd, *each.args])) for each in found
        ]
        print_table(("PID", "CWD", "COMMAND"), rows)
    return 0
