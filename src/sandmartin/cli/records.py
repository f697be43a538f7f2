"""What a sandbox left to be read: `logs` (its console) and `metrics`."""

from __future__ import annotations

import argparse
import asyncio
import codecs
import sys
from dataclasses import asdict
from typing import Any

from sandmartin.cli.connection import add_id, ask_sandbox
from sandmartin.cli.options import add_json_flag, add_place_flags
from sandmartin.cli.talk import moment, plain, print_json, print_table, say
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import Conflict, NotFound

#: How long what is said may wait to be printed.
_LOOK_S = 0.3
_RANGES = ("10m", "2h", "24h")


def configure_logs(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "logs",
        help="print the console of a sandbox",
        description="Print the newest that the console of a sandbox said, 64 KiB at most. What "
        "was printed once is not kept.",
    )
    add_id(parser)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the sandbox no longer runs"
    )
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_logs)


def configure_metrics(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "metrics",
        help="show what a sandbox used",
        description="Show what a sandbox used, oldest first: CPU in percent of one, memory as "
        "the guest sees it, disk as allocated on the host.",
    )
    add_id(parser)
    parser.add_argument(
        "--range",
        choices=_RANGES,
        default=_RANGES[0],
        help="10m: every 0.5 s (default); 2h: every 30 s; 24h: every 5 min",
    )
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_metrics)


def _logs(args: argparse.Namespace) -> int:
    async def read(sandbox: AsyncSandbox) -> None:
        tell = _Console(as_json=args.json)
        tell(await sandbox.read_console())
        while args.follow:
            await asyncio.sleep(_LOOK_S)
            try:
                tell(await sandbox.read_console(), more=True)
            except (NotFound, Conflict) as error:
                say(f"the end: {error.message}")
                return

    ask_sandbox(args, read)
    return 0


class _Console:
    """Prints what a console said, piece by piece."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        # A piece may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, content: bytes, *, more: bool = False) -> None:
        text = self._decoder.decode(content)
        if sys.stdout is None or (more and not content):
            return
        if self._as_json:
            print_json({"console": text})
        elif sys.stdout.isatty():
            # Lines of a console end in CR LF.
            print(plain(text.replace("\r", "")), end="", flush=True)
        else:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()


def _metrics(args: argparse.Namespace) -> int:
    points = ask_sandbox(args, lambda sandbox: sandbox.metrics(args.range))
    if args.json:
        print_json([asdict(point) for point in points])
    else:
        rows = [
            (
                moment(point.timestamp),
                f"{point.cpu_pct:.1f}",
                str(point.mem_bytes),
                str(point.disk_bytes),
            )
            for point in points
        ]
        print_table(("TIME", "CPU_PCT", "MEMORY_BYTES", "DISK_BYTES"), rows)
    return 0
