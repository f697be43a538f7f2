"""`sandmartin doctor`: whether this machine can run sandboxes, and what to do where it cannot."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.extras import extra
from sandmartin.cli.options import (
    add_accel_flag,
    add_json_flag,
    add_settings_flags,
    load_settings,
)
from sandmartin.cli.talk import print_json


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "doctor",
        help="check this machine",
        description="Check whether this machine can run sandboxes. Exits 1 when it cannot.",
    )
    add_settings_flags(parser)
    add_accel_flag(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_examine)


def _examine(args: argparse.Namespace) -> int:
    with extra("agent"):
        from sandmartin.agent import doctor  # noqa: PLC0415

    findings = asyncio.run(doctor.examine(load_settings(args)))
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        width = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            mark = "ok  " if finding.ok else "FAIL" if finding.needed else "warn"
            print(f"{mark}  {finding.name.ljust(width)}  {finding.detail}")
            if not finding.ok and finding.remedy:
                print(f"      {' ' * width}  -> {finding.remedy}")
    fails = any(finding.needed and not finding.ok for finding in findings)
    return exitcode.FAILED if fails else 0
