"""Runs the benchmark on real VMs, prints its tables and writes the raw data."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from pathlib import Path

from bench import budgets
from bench.agents import Bench, directory
from bench.figures import Figures
from bench.groups import GROUPS, measure
from bench.ratchet import Ratchet

_RUNS, _QUICK_RUNS = 20, 4
_GROUP_FAILED, _SPOILT = 1, 3


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"  {each.name:<13}{each.about}" for each in GROUPS)
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog=f"groups:\n{groups}\n`steps` and `blocks` are measured only when they are named.\n\n"
        f"exit code: {_GROUP_FAILED} when a group failed, {_SPOILT} when --check found a ratio"
        " that is worse than it was",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=int, default=_RUNS, metavar="N", help=f"runs of a figure; default {_RUNS}")
    add("--quick", action="store_true", help=f"a look: {_QUICK_RUNS} runs")
    names = [each.name for each in GROUPS]
    add("--only", nargs="+", choices=names, default=[], metavar="NAME", help="only these groups")
    add("--json", type=Path, default=Path("bench/results/latest.json"), metavar="PATH")
    add("--check", action="store_true", help="compare with bench/ratchet.json")
    add("--ratchet", action="store_true", help="keep in bench/ratchet.json what became better")
    return parser


def _save(path: Path, figures: Figures, accel: str) -> None:
    raw = {
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "accel": accel,
            "at": int(time.time()),
        },
        "figures": figures.to_json(),
        "budgets": budgets.to_json(figures),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=1) + "\n")


def main() -> int:
    args = _parser().parse_args()
    figures = Figures()
    with directory() as path:
        bench = Bench(figures, _QUICK_RUNS if args.quick else max(1, args.runs), path)
        failed = asyncio.run(measure(bench, args.only))
    print(figures.table(), budgets.judge(figures), sep="\n\n")
    _save(args.json, figures, bench.accel)
    ratchet = Ratchet.load()
    spoilt = ratchet.spoilt(figures, bench.accel) if args.check else []
    for sentence in spoilt:
        print(f"worse than it was: {sentence}", file=sys.stderr)
    if args.ratchet:
        ratchet.keep(figures, bench.accel)
        ratchet.save()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return _GROUP_FAILED
    return _SPOILT if spoilt else 0


if __name__ == "__main__":
    sys.exit(main())
