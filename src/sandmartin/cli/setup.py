"""`sandmartin setup`: fetch and build what the agent needs on this machine."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from sandmartin.cli.extras import extra
from sandmartin.cli.options import add_settings_flags, load_settings
from sandmartin.cli.talk import say


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "setup",
        help="install and build what the agent needs",
        description="Install missing system packages, fetch the kernel and build the base "
        "template. What is there already is left alone, so it may be run at any time.",
    )
    parser.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="NAME",
        help="build this template too, or `all` of them; may be given several times",
    )
    add_settings_flags(parser)
    parser.set_defaults(act=_setup)


def _setup(args: argparse.Namespace) -> int:
    with extra("agent"):
        from sandmartin.agent import assets  # noqa: PLC0415

    began = time.monotonic()

    def report(line: str) -> None:
        say(f"[{time.monotonic() - began:6.1f} s] {line}")

    asyncio.run(assets.setup(load_settings(args), report, args.template))
    report("done")
    return 0
