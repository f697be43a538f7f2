"""`sandmartin shell`: a shell in a sandbox, on our terminal.

The terminal is in raw mode while the shell runs, so that every key is the shell's, and is put
back as it was on every way out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.connection import add_id, sandbox_of
from sandmartin.cli.execution import ended_with_us, exit_code_of, relay
from sandmartin.cli.interrupts import Interrupts, carry_out
from sandmartin.cli.options import (
    Parser,
    add_command_flags,
    add_place_flags,
    check_utf8,
    environment,
)
from sandmartin.cli.pipes import stdin_is_open
from sandmartin.client.sandbox import Execution
from sandmartin.errors import Conflict, Invalid, NotFound
from sandmartin.transport import Command, PtySize

_STDIN = 0
_LOGIN = "command -v bash >/dev/null 2>&1 && exec bash -i -l; exec sh -i -l"
_DEFAULT_SIZE = PtySize(cols=80, rows=24)


def configure(verbs: Any) -> None:
    parser: Parser = verbs.add_parser(
        "shell",
        help="open a shell in a sandbox",
        description="Open a shell in a sandbox on this terminal: bash where there is one, else "
        "sh. The exit code is the shell's.",
        epilog=exitcode.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.passes_exit_on = True
    add_command_flags(parser)
    add_place_flags(parser)
    add_id(parser)
    parser.set_defaults(act=_shell)


def _shell(args: argparse.Namespace) -> int:
    if not (stdin_is_open() and os.isatty(_STDIN)):
        raise Invalid(
            "a shell needs a terminal as its standard input",
            hint=f"without one: sandmartin exec {args.id} -- sh",
        )
    term = os.environ.get("TERM") or "xterm"
    check_utf8(*args.env, args.user, args.cwd, term)
    command = Command(
        cmd="sh",
        args=("-c", _LOGIN),
        envs={"TERM": term} | environment(args.env),
        cwd=args.cwd,
        user=args.user,
        pty=terminal_size(),
    )

    async def act(stack: AsyncExitStack, interrupts: Interrupts) -> int:
        sandbox = await stack.enter_async_context(sandbox_of(args))
        resized = stack.enter_context(_resizes())
        execution = await stack.enter_async_context(sandbox.exec(command))
        with raw_terminal():
            # As the closing of a terminal has it: what the shell started with nohup goes on.
            async with ended_with_us(execution, signal.SIGHUP):
                follow = _follow_size(execution, command.pty, resized)
                ended = await relay(execution, interrupts, follow, stdin=True)
        return exit_code_of(ended)

    return asyncio.run(carry_out(act))


def terminal_size() -> PtySize:
    """The size of our terminal; one that does not tell has the size that all once had."""
    try:
        size = os.get_terminal_size(_STDIN)
    except OSError:
        return _DEFAULT_SIZE
    return PtySize(*size) if all(size) else _DEFAULT_SIZE


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Our terminal passes on every key and every byte as it is."""
    before = termios.tcgetattr(_STDIN)
    try:
        tty.setraw(_STDIN, termios.TCSADRAIN)
        yield
    finally:
        # One that was closed under us needs nothing.
        with suppress(termios.error):
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


@contextmanager
def _resizes() -> Iterator[asyncio.Event]:
    """Set whenever the size of our terminal changed, and first of all: it may have just now."""
    loop, resized = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGWINCH, resized.set)
    resized.set()
    try:
        yield resized
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def _follow_size(execution: Execution, shown: PtySize | None, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        if (size := terminal_size()) != shown:
            # It may have ended meanwhile.
            with suppress(NotFound, Conflict):
                await execution.resize(size)
            shown = size
