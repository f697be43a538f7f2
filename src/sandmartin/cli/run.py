"""`sandmartin run`: one command in a sandbox of its own.

Create, upload, execute, destroy. On every way out the sandbox is destroyed and an agent that was
started for this run is ended and waited for; the caller sees the command's own exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.connection import place_of
from sandmartin.cli.execution import exit_code_of, relay
from sandmartin.cli.interrupts import Interrupts, carry_out
from sandmartin.cli.options import (
    Parser,
    add_accel_flag,
    add_command_flags,
    add_place_flags,
    add_shape_flags,
    check_utf8,
    environment,
    positive,
)
from sandmartin.cli.own_agent import own_agent, require_root
from sandmartin.cli.pipes import ByteSource, stdin_is_open
from sandmartin.cli.talk import say
from sandmartin.client.sandbox import AsyncSandbox, temporary_sandbox
from sandmartin.errors import Invalid
from sandmartin.model import new_sandbox_id
from sandmartin.transport import Command, NewSandbox
from sandmartin.transport.agent import agent_answers
from sandmartin.transport.place import Place

_DESCRIPTION = """\
Run a command in a new sandbox, with our standard input, output and error, and destroy the
sandbox when it ends. The exit code is the command's.

The control plane is used that SANDMARTIN_URL names or that you are logged in to; without one the
agent that listens in the data directory. When there is none either, one is started for this run
alone, on a private data directory, which takes root.
"""
_EXAMPLES = """\
examples:
  sandmartin run -- python3 -c 'print(6*7)'
  echo hi | sandmartin run -- tr a-z A-Z
  sandmartin run --file data.csv:/tmp/data.csv --timeout 60 -- wc -l /tmp/data.csv

"""


def configure(verbs: Any) -> None:
    parser: Parser = verbs.add_parser(
        "run",
        help="run a command in a new sandbox",
        usage="sandmartin run [options] -- CMD [ARG...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES + exitcode.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.passes_exit_on = True
    add = parser.add_argument
    add_shape_flags(parser)
    add_command_flags(parser)
    add("--file", action="append", default=[], metavar="LOCAL:REMOTE", help="upload; repeatable")
    add("--timeout", type=positive, metavar="S", help="kill the command after S seconds")
    add_place_flags(parser)
    add_accel_flag(parser)
    add("-v", "--verbose", action="store_true", help="say what happens, and show the agent's log")
    add("command", nargs=argparse.REMAINDER, metavar="CMD", help=argparse.SUPPRESS)
    parser.set_defaults(act=_act)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file to bring into the sandbox."""

    local: str
    remote: str

    @classmethod
    def parse(cls, text: str) -> Upload:
        local, colon, remote = text.rpartition(":")
        if not (local and colon and remote):
            raise Invalid(f"--file {text!r} does not name two files", hint="use LOCAL:REMOTE")
        return cls(local=local, remote=remote)

    def open(self) -> int:
        """A descriptor to read the local file. Raises Invalid."""
        if Path(self.local).is_dir():
            raise Invalid(
                f"{self.local} is a directory, and --file takes single files",
                hint=f"tar -C {self.local} -c . | sandmartin run -- sh -c 'tar -x && CMD'",
            )
        try:
            return os.open(self.local, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Invalid(f"{self.local} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that one run does, checked before anything starts."""

    new: NewSandbox
    command: Command
    uploads: tuple[Upload, ...]
    place: Place
    #: How to start an agent where one should be and none is.
    agent_argv: tuple[str, ...]
    verbose: bool
    began: float

    def tell(self, text: str) -> None:
        if self.verbose:
            say(f"[{time.monotonic() - self.began:6.2f} s] {text}")


def plan_of(args: argparse.Namespace) -> Plan:
    """What `args` ask for. Raises Invalid."""
    if not args.command:
        args.parser.error("run needs a command")
    check_utf8(*args.command, *args.env, *args.file, args.user, args.cwd)
    new = NewSandbox(
        sandbox_id=new_sandbox_id(),
        template=args.template,
        vcpus=args.vcpus,
        memory_mb=args.memory,
        disk_size_mb=args.disk,
    )
    command = Command(
        cmd=args.command[0],
        args=tuple(args.command[1:]),
        envs=environment(args.env),
        cwd=args.cwd,
        user=args.user,
        stdin=stdin_is_open(),
        timeout_s=args.timeout,
    )
    return Plan(
        new=new,
        command=command,
        uploads=tuple(Upload.parse(text) for text in args.file),
        place=place_of(args),
        agent_argv=_agent_argv(args),
        verbose=args.verbose or args.debug,
        began=time.monotonic(),
    )


def _agent_argv(args: argparse.Namespace) -> tuple[str, ...]:
    # -P: what lies in the working directory is not imported, by root least of all.
    argv = [sys.executable, "-P", "-m", "sandmartin", "agent", "--temporary"]
    if args.accel is not None:
        argv += ["--accel", args.accel]
    if args.settings is not None:
        argv += ["--settings", os.fspath(args.settings)]
    if args.debug:
        argv.append("--debug")
    return tuple(argv)


def _act(args: argparse.Namespace) -> int:
    return asyncio.run(run(plan_of(args)))


async def run(plan: Plan) -> int:
    """Carry `plan` out and return the exit code."""
    return await carry_out(partial(_run, plan))


async def _run(plan: Plan, stack: AsyncExitStack, interrupts: Interrupts) -> int:
    """The work. What must be undone is entered on `stack`, which outlasts it."""
    sources = []
    for upload in plan.uploads:
        descriptor = upload.open()
        stack.callback(os.close, descriptor)
        sources.append((upload, ByteSource(descriptor)))
    place = plan.place
    if place.socket is not None and not await agent_answers(place.socket):
        require_root()
        plan.tell(f"no agent listens on {place.socket}: starting one for this run")
        agent = await stack.enter_async_context(own_agent(plan.agent_argv, verbose=plan.verbose))
        place = Place(socket=await agent.ready())
    transport = await stack.enter_async_context(aclosing(place.transport()))
    plan.tell(f"creating a sandbox from {plan.new.template} at {place}")
    sandbox = await stack.enter_async_context(temporary_sandbox(transport, plan.new))
    plan.tell(f"{sandbox.sandbox_id} runs")
    for upload, source in sources:
        plan.tell(f"uploading {upload.local} to {upload.remote}")
        await _send(sandbox, upload, source, plan.command.user)
    plan.tell(f"running {plan.command.cmd}")
    async with sandbox.exec(plan.command) as execution:
        ended = await relay(execution, interrupts, stdin=plan.command.stdin)
    plan.tell(f"ended with {ended.exit_code}")
    return exit_code_of(ended)


async def _send(sandbox: AsyncSandbox, upload: Upload, source: ByteSource, user: str) -> None:
    try:
        await sandbox.write_file(upload.remote, aiter(source), user)
    except OSError as error:
        raise Invalid(f"{upload.local} cannot be read: {error.strerror}") from error
