"""The verbs' way to what serves sandboxes: the one place that chooses their transport.

A control plane where one is named or logged in to, else the agent of this machine; that one also
where a flag is about it. `run` alone may start an agent where there is none.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, TypeVar

from sandmartin.cli import exitcode
from sandmartin.cli.options import load_settings
from sandmartin.cli.talk import print_json, say_error
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import Invalid, SandmartinError
from sandmartin.model import check_name
from sandmartin.transport import Transport
from sandmartin.transport.api import Api
from sandmartin.transport.place import Place, find_place

_T = TypeVar("_T")
#: Whoever waits for a word to be completed does not wait longer.
_PATIENCE_S = 2.0


def add_id(parser: argparse.ArgumentParser) -> None:
    """The argument `id`, which shells can complete."""
    _completed(parser.add_argument("id", metavar="ID"))


def add_ids(parser: argparse.ArgumentParser) -> None:
    """The argument `ids`, one at least."""
    _completed(parser.add_argument("ids", nargs="+", metavar="ID"))


def _completed(argument: argparse.Action) -> None:
    argument.completer = _known_ids  # type: ignore[attr-defined]


def _known_ids(parsed_args: argparse.Namespace, **_: Any) -> dict[str, str]:
    """The id of each sandbox, with its state and template; none when nobody answers at once."""

    async def answer() -> dict[str, str]:
        async with asyncio.timeout(_PATIENCE_S), connected(parsed_args) as transport:
            found = await transport.list_sandboxes()
        return {each.sandbox_id: f"{each.state} {each.template}" for each in found}

    try:
        return asyncio.run(answer())
    except (SandmartinError, TimeoutError):
        return {}


def place_of(args: argparse.Namespace) -> Place:
    """Where the sandboxes are that `args` are about. Raises Invalid."""
    about_agent = [args.data_dir, args.settings, getattr(args, "accel", None)]
    if all(each is None for each in about_agent):
        return find_place(args.server)
    if args.server:
        raise Invalid(
            "--server names a control plane, and another flag is for the agent of this machine",
            hint="use one of them",
        )
    return Place(socket=load_settings(args).socket)


@asynccontextmanager
async def connected(args: argparse.Namespace) -> AsyncGenerator[Transport, None]:
    """A transport to where the sandboxes are that `args` are about."""
    async with aclosing(place_of(args).transport()) as transport:
        yield transport


@asynccontextmanager
async def control_plane(args: argparse.Namespace) -> AsyncGenerator[Api, None]:
    """The API of the control plane that `args` are about. Raises Invalid where there is none."""
    place = find_place(args.server)
    if place.socket is not None:
        raise Invalid(
            "nothing says which control plane is meant",
            hint="log in (sandmartin login URL), or set SANDMARTIN_URL and SANDMARTIN_API_KEY",
        )
    async with aclosing(Api(place.url, place.api_key)) as api:
        yield api


def ask_control_plane(args: argparse.Namespace, question: Callable[[Api], Awaitable[_T]]) -> _T:
    """The answer of a control plane to one question."""

    async def answer() -> _T:
        async with control_plane(args) as api:
            return await question(api)

    return asyncio.run(answer())


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
    connection: AbstractAsyncContextManager[_T],
    names: Sequence[str],
    done_word: str,
    act: Callable[[_T, str], Awaitable[object]],
) -> int:
    """Do `act` to each of `names`, print those it was done to, and return the exit code.

    One that fails is told, and the others go on.
    """
    done, failed = asyncio.run(_do_each(connection, names, act))
    if args.json:
        print_json({done_word: done, "failed": failed})
    elif done:
        print("\n".join(done))
    return exitcode.FAILED if failed else 0


async def _do_each(
    connection: AbstractAsyncContextManager[_T],
    names: Sequence[str],
    act: Callable[[_T, str], Awaitable[object]],
) -> tuple[list[str], list[str]]:
    done: list[str] = []
    failed: list[str] = []
    async with connection as opened:
        for name in names:
            try:
                await act(opened, name)
                done.append(name)
            except SandmartinError as error:
                say_error(error)
                failed.append(name)
    return done, failed
