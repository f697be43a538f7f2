"""What a sandbox left to be read: `logs` (its console) and `metrics`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from sandmartin.cli.connection import ask_sandbox
from sandmartin.cli.options import add_json_flag, add_settings_flags
from sandmartin.cli.talk import moment, plain, print_json, print_table

_RANGES = ("10m", "2h", "24h")


def configure_logs(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "logs",
        help="print the console of a sandbox",
        description="Print the newest that the console of a sandbox said, 64 KiB at most. What "
        "was printed once is not kept.",
    )
    parser.add_argument("id", metavar="ID")
    add_settings_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_logs)


def configure_metrics(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "metrics",
        help="show what a sandbox used",
        description="Show what a sandbox used, oldest first: CPU in percent of one, memory as "
        "the guest sees it, disk as allocated on the host.",
    )
    parser.add_argument("id", metavar="ID")
    parser.add_argument(
        "--range",
        choices=_RANGES,
        default=_RANGES[0],
        help="10m: every 0.5 s (default); 2h: every 30 s; 24h: every 5 min",
    )
    add_settings_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_metrics)


def _logs(args: argparse.Namespace) -> int:
    content = ask_sandbox(args, lambda sandbox: sandbox.read_console())
    text = content.decode(errors="replace")
    if args.json:
        print_json({"console": text})
    elif sys.stdout is not None and sys.stdout.isatty():
        # Lines of a console end in CR LF.
        print(plain(text.replace("\r", "")), flush=True)
    elif sys.stdout is not None:
        sys.stdout.buffer.write(content)
    return 0


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
