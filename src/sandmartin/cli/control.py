"""`sandmartin control`: the control plane alone, in the foreground.

What it says on stdout is what `up` says. Several may share one PostgreSQL and one secret key.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandmartin.cli.extras import extra
from sandmartin.cli.options import (
    CONTROL_FLAGS,
    add_control_flags,
    add_debug_flag,
    add_json_flag,
)
from sandmartin.cli.up import announce, first_end, log_to_stderr, signals

_LEVELS = ("debug", "info", "warning", "error")


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "control",
        help="serve the control plane alone",
        description="Run the control plane in the foreground; hosts are added with `sandmartin "
        "host add`. SIGTERM and Ctrl-C end it, and sandboxes run on.",
    )
    parser.set_defaults(act=_serve)
    add_debug_flag(parser)
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="secret key, first API key, and SQLite")
    add("--settings", type=Path, metavar="FILE", help="TOML file with further settings")
    add_control_flags(parser)
    add("--log-level", choices=_LEVELS, default="info", help="default: info")
    add("--log-format", choices=("text", "json"), default="text", help="default: text")
    add_json_flag(parser)


def _serve(args: argparse.Namespace) -> int:
    log_to_stderr(args)
    asyncio.run(_run(args))
    return 0


async def _run(args: argparse.Namespace) -> None:
    with extra("control"):
        from sandmartin.control import bootstrap  # noqa: PLC0415
        from sandmartin.control.platform import open_platform  # noqa: PLC0415
        from sandmartin.control.server import listen, serving  # noqa: PLC0415
        from sandmartin.control.settings import ControlSettings  # noqa: PLC0415

    flags = {name: getattr(args, name) for name in (*CONTROL_FLAGS, "data_dir")}
    settings = ControlSettings.load(flags, file=args.settings)
    async with contextlib.AsyncExitStack() as stack:
        leave = stack.enter_context(signals())
        listener = stack.enter_context(contextlib.closing(listen(settings.host, settings.port)))
        settings = replace(settings, port=listener.getsockname()[1])
        platform = await stack.enter_async_context(open_platform(settings))
        await bootstrap.ensure_platform(platform.db)
        key_file = settings.data_dir / "api.key"
        key = await bootstrap.ensure_first_key(platform.db, platform.keys, key_file)
        sign_up_url = await bootstrap.ensure_first_invitation(platform.db, platform.accounts)
        served = await stack.enter_async_context(serving(platform, listener))
        announce(args, settings.base_url, key, settings.data_dir, sign_up_url)
        await first_end(leave, served)
