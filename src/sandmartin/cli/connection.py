"""The verbs' way to what serves sandboxes: the one place that chooses their transport.

`run` alone has a way of its own, for it may start an agent.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from sandmartin.cli import exitcode
from sandmartin.cli.options import load_settings
from sandmartin.cli.talk import print_json, say_error
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import SandmartinError
from sandmartin.model import check_name
from sandmartin.transport import Transport
from sandmartin.transport.agent import AgentSocket

_T = TypeVar("_T")


@asynccontextmanager
async def connected(args: argparse.Namespace) -> AsyncGenerator[Transport, None]:
    """A transport to the agent that `args` name."""
    async with aclosing(AgentSocket(load_settings(args).socket)) as agent:
        yield agent


@asynccontextmanager
async def sandbox_of(args: argparse.Namespace) -> AsyncGenerator[AsyncSandbox, None]:
    """The sandbox that the argument `id` names. Raises Invalid."""
    sandbox_id = check_name(args.id, "sandbox id")
    async with connected(args) as transport:
        yield AsyncSandbox(transport, sandbox_id)


def ask(args: argparse.Namespace, question: Callable[[Transport], Awaitable[_T]]) -> _T:
    """The answer to one question."""

    async def answer() -> _T:
        async with connected(args) as transport:
            return await question(transport)

    return asyncio.run(answer())


def ask_sandbox(args: argparse.Namespace, question: Callable[[AsyncSandbox], Awaitable[_T]]) -> _T:
    """The answer of the sandbox that the argument `id` names to one question."""

    async def answer() -> _T:
        async with sandbox_of(args) as sandbox:
            return await question(sandbox)

    return asyncio.run(answer())


def do_each(
    args: argparse.Namespace,
    names: Sequence[str],
    done_word: str,
    act: Callable[[Transport, str], Awaitable[object]],
) -> int:
    """Do `act` to each of `names`, print those it was done to, and return the exit code.

    One that fails is told, and the others go on.
    """
    done, failed = asyncio.run(_do_each(args, names, act))
    if args.json:
        print_json({done_word: done, "failed": failed})
    elif done:
        print("\n".join(done))
    return exitcode.FAILED if failed else 0


async def _do_each(
    args: argparse.Namespace,
    names: Sequence[str],
    act: Callable[[Transport, str], Awaitable[object]],
) -> tuple[list[str], list[str]]:
    done: list[str] = []
    failed: list[str] = []
    async with connected(args) as transport:
        for name in names:
            try:
                await act(transport, name)
                done.append(name)
            except SandmartinError as error:
                say_error(error)
                failed.append(name)
    return done, failed
