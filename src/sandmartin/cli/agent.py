"""`sandmartin agent`: the host agent in the foreground.

The announcement, one JSON object with `socket` and `pid`, and for a host of a platform its
`address`, is its only line on stdout, printed once requests are served; `run` waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandmartin.cli.extras import extra
from sandmartin.cli.options import add_accel_flag, add_settings_flags, load_settings
from sandmartin.cli.talk import print_json, say
from sandmartin.model import Settings

_LEVELS = ("debug", "info", "warning", "error")


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "agent",
        help="serve sandboxes on this machine",
        description="Run the host agent in the foreground, as root. SIGTERM and Ctrl-C end it and "
        "leave the sandboxes running; the next agent on the same data directory adopts them.",
    )
    add_settings_flags(parser)
    add_accel_flag(parser)
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="at the end of standard input destroy all sandboxes and exit",
    )
    parser.add_argument(
        "--temporary",
        action="store_true",
        help="use a private data directory, removed at the end; implies --until-stdin-closes",
    )
    _add_membership_flags(parser)
    parser.add_argument("--log-level", choices=_LEVELS, default="info", help="default: info")
    parser.set_defaults(act=_serve)


def _add_membership_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "as a host of a platform", "Only for the first start: a restart needs none of these."
    )
    group.add_argument("--control", metavar="URL", default="", help="the control plane")
    group.add_argument(
        "--token",
        default="",
        help="what `sandmartin host add` printed (SANDMARTIN_HOST_TOKEN, which other users of "
        "this machine do not see)",
    )
    group.add_argument(
        "--listen", metavar="HOST:PORT", default="", help="for the control plane; mutual TLS"
    )
    group.add_argument(
        "--advertise", metavar="NAME", default="", help="how it reaches us, if not as HOST"
    )
    group.add_argument(
        "--insecure-control",
        action="store_true",
        help="send our token over plain HTTP to another machine",
    )


def _serve(args: argparse.Namespace) -> int:
    with extra("agent"):
        from sandmartin.agent.membership import Wish  # noqa: PLC0415
        from sandmartin.agent.server import serve  # noqa: PLC0415

    level = "debug" if args.debug else args.log_level
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # It tells of every heartbeat.
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))
    settings = load_settings(args)
    if not args.temporary:
        wish = Wish(
            control=args.control,
            token=args.token or os.environ.get("SANDMARTIN_HOST_TOKEN", ""),
            listen=args.listen,
            advertise=args.advertise,
            insecure=args.insecure_control,
        )
        asyncio.run(
            serve(
                settings,
                until_stdin_closes=args.until_stdin_closes,
                announce=print_json,
                wish=wish,
            )
        )
        return 0
    with _private_data_dir(settings) as private:
        asyncio.run(serve(private, until_stdin_closes=True, announce=print_json))
    return 0


@contextmanager
def _private_data_dir(settings: Settings) -> Iterator[Settings]:
    """Settings with a data directory of their own.

    The process that uses it removes it, so it goes even when whoever started us was killed. It
    stays where sandboxes are left in it: their journal is what a next agent cleans up by.
    """
    # Not under /run or /tmp, which may be memory: the sandboxes' disks are written here.
    path = Path(tempfile.mkdtemp(prefix="sandmartin-run-", dir="/var/tmp"))
    try:
        # It lives for one sandbox: nothing is worth making ahead.
        yield replace(settings, data_dir=path, slot_pool_size=1, vm_pool_size=0, ready_sandboxes="")
    finally:
        sandboxes = path / "sandboxes"
        if sandboxes.is_dir() and any(sandboxes.iterdir()):
            say(f"sandmartin: sandboxes are left in {path}")
            say(f"hint: adopt them with: sandmartin agent --data-dir {path}")
        else:
            shutil.rmtree(path)
