"""`sandmartin up`: control plane and agent in one process, everything in one data directory.

The first line on stdout says where it serves and with which key; with `--json` it is one object
with `url`, `api_key` and `data_dir`, printed once requests are served.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandmartin.cli.extras import extra
from sandmartin.cli.options import (
    CONTROL_FLAGS,
    add_accel_flag,
    add_control_flags,
    add_json_flag,
    add_settings_flags,
    load_settings,
)
from sandmartin.cli.talk import print_json, say
from sandmartin.errors import SandmartinError
from sandmartin.model import Settings

_LEVELS = ("debug", "info", "warning", "error")
_AT_EXIT = ("pause", "keep", "kill")
_PAUSE_S = 30.0


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "up",
        help="serve everything on this machine",
        description="Run control plane and host agent in the foreground, as root. SIGTERM and "
        "Ctrl-C end both and pause the sandboxes first.",
    )
    add_settings_flags(parser)
    add_accel_flag(parser)
    add_json_flag(parser)
    add_control_flags(parser)
    parser.add_argument(
        "--on-exit", choices=_AT_EXIT, default="pause", help="what becomes of running sandboxes"
    )
    parser.add_argument("--log-level", choices=_LEVELS, default="warning")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.set_defaults(act=_serve)


def _serve(args: argparse.Namespace) -> int:
    log_to_stderr(args)
    asyncio.run(_run(args))
    return 0


def log_to_stderr(args: argparse.Namespace) -> None:
    level = "debug" if args.debug else args.log_level
    with extra("control"):
        from sandmartin.control.telemetry import set_up_logging  # noqa: PLC0415

    set_up_logging(level, args.log_format)


async def _run(args: argparse.Namespace) -> None:
    with extra("control"):
        from sandmartin.control import bootstrap  # noqa: PLC0415
        from sandmartin.control.hosts import HostFacts  # noqa: PLC0415
        from sandmartin.control.platform import open_platform  # noqa: PLC0415
        from sandmartin.control.server import listen, serving  # noqa: PLC0415
        from sandmartin.control.settings import ControlSettings  # noqa: PLC0415

    settings = load_settings(args)
    flags = {name: getattr(args, name) for name in CONTROL_FLAGS}
    control = ControlSettings.load({**flags, "data_dir": settings.data_dir})
    async with contextlib.AsyncExitStack() as stack:
        leave = stack.enter_context(signals())
        listener = stack.enter_context(contextlib.closing(listen(control.host, control.port)))
        control = replace(control, port=listener.getsockname()[1])
        agent_settings = replace(settings, data_dir=settings.data_dir / "agent")
        agent_ended = await stack.enter_async_context(_agent(agent_settings))
        platform = await stack.enter_async_context(open_platform(control))
        await bootstrap.ensure_platform(platform.db)
        local = HostFacts(name="local", address=f"unix:{agent_settings.socket}")
        await platform.hosts.ensure_local(local)
        await platform.reconciler.tick()
        key_file = control.data_dir / "api.key"
        key = await bootstrap.ensure_first_key(platform.db, platform.keys, key_file)
        sign_up_url = await bootstrap.ensure_first_invitation(platform.db, platform.accounts)
        served = await stack.enter_async_context(serving(platform, listener))
        announce(args, control.base_url, key, control.data_dir, sign_up_url)
        await first_end(leave, served, agent_ended)
        await _leave(platform, args.on_exit)


def announce(
    args: argparse.Namespace, url: str, key: str, data_dir: Path, sign_up_url: str
) -> None:
    """Where is served, with which key, and where the first account is made if there is none."""
    if sign_up_url:
        say(f"the first account is made at {sign_up_url}")
    if args.json:
        print_json({"url": url, "api_key": key, "data_dir": os.fspath(data_dir)})
        sys.stdout.flush()
        return
    say(f"Sandmartin serves on {url}; everything is in {data_dir}")
    print(f"export SANDMARTIN_URL={url} SANDMARTIN_API_KEY={key}", flush=True)


@contextlib.contextmanager
def signals() -> Iterator[asyncio.Event]:
    """Set by SIGTERM and SIGINT."""
    leave, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    try:
        yield leave
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def first_end(leave: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Wait for `leave`, or for a task to end, and raise what that raised."""
    stopping = asyncio.ensure_future(leave.wait())
    await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in tasks:
        if task.done():
            task.result()


@contextlib.asynccontextmanager
async def _agent(settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    """The agent, which serves for as long as the context lasts; its task."""
    with extra("agent"):
        from sandmartin.agent.server import serve  # noqa: PLC0415

    leave, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(
        serve(settings, announce=lambda _: ready.set(), leave=leave), name="agent"
    )
    try:
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        yield task
    finally:
        leave.set()
        await asyncio.wait({task})


async def _leave(platform: Any, on_exit: str) -> None:
    """What becomes of the sandboxes that run."""
    if on_exit == "keep":
        return
    try:
        async with asyncio.timeout(_PAUSE_S):
            count = await platform.sandboxes.end_all(kill=on_exit == "kill")
        if count:
            say(f"{count} sandboxes {'killed' if on_exit == 'kill' else 'paused'}")
    except (SandmartinError, TimeoutError) as error:
        say(f"sandmartin: not all sandboxes could be {on_exit}d: {error or 'it took too long'}")
