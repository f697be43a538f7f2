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
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandmartin import __version__
from sandmartin.cli.extras import extra
from sandmartin.cli.options import (
    add_accel_flag,
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
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="0 takes a free one (default: 8000)")
    parser.add_argument("--database-url", metavar="URL", help="default: SQLite in the data dir")
    parser.add_argument(
        "--on-exit", choices=_AT_EXIT, default="pause", help="what becomes of running sandboxes"
    )
    parser.add_argument("--log-level", choices=_LEVELS, default="warning")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.set_defaults(act=_serve)


def _serve(args: argparse.Namespace) -> int:
    level = "debug" if args.debug else args.log_level
    with extra("control"):
        from sandmartin.control.telemetry import set_up_logging  # noqa: PLC0415

    set_up_logging(level, args.log_format)
    asyncio.run(_run(args))
    return 0


async def _run(args: argparse.Namespace) -> None:
    with extra("control"):
        from sandmartin.control.bootstrap import ensure_first_key, ensure_platform  # noqa: PLC0415
        from sandmartin.control.platform import open_platform  # noqa: PLC0415
        from sandmartin.control.server import listen, serving  # noqa: PLC0415
        from sandmartin.control.settings import ControlSettings  # noqa: PLC0415

    settings = load_settings(args)
    flags = {"host": args.host, "port": args.port, "database_url": args.database_url}
    control = ControlSettings.load({**flags, "data_dir": settings.data_dir})
    leave = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave.set)
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(listen(control.host, control.port)))
        control = replace(control, port=listener.getsockname()[1])
        agent_settings = replace(settings, data_dir=settings.data_dir / "agent")
        agent_ended = await stack.enter_async_context(_agent(agent_settings))
        platform = await stack.enter_async_context(open_platform(control))
        await ensure_platform(platform.db)
        await platform.hosts.ensure_local(_facts(agent_settings))
        await platform.reconciler.tick()
        key = await ensure_first_key(platform.db, platform.keys, control.data_dir / "api.key")
        served = await stack.enter_async_context(serving(platform, listener))
        _announce(args, control.base_url, key, control.data_dir)
        stopping = asyncio.ensure_future(leave.wait())
        await asyncio.wait({stopping, served, agent_ended}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in (served, agent_ended):
            if task.done():
                task.result()
        await _leave(platform, args.on_exit)


def _announce(args: argparse.Namespace, url: str, key: str, data_dir: Path) -> None:
    if args.json:
        print_json({"url": url, "api_key": key, "data_dir": os.fspath(data_dir)})
        sys.stdout.flush()
        return
    say(f"Sandmartin serves on {url}; everything is in {data_dir}")
    print(f"export SANDMARTIN_URL={url} SANDMARTIN_API_KEY={key}", flush=True)


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


def _facts(settings: Settings) -> Any:
    with extra("agent"):
        from sandmartin.agent.admission import memory_total_mb  # noqa: PLC0415
        from sandmartin.agent.disk import free_mb  # noqa: PLC0415
        from sandmartin.control.hosts import HostFacts  # noqa: PLC0415

    return HostFacts(
        name="local",
        address=f"unix:{settings.socket}",
        cpus=os.cpu_count() or 1,
        memory_mb=memory_total_mb() - settings.memory_reserve_mb,
        disk_free_mb=free_mb(settings.data_dir),
        cpu_overcommit=settings.cpu_overcommit,
        memory_overhead_mb=0,
        accel="",
        version=__version__,
    )


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
