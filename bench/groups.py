"""The groups of figures, in the order in which they are measured."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from bench import (
    baselines,
    blocks,
    control,
    copies,
    density,
    e2b,
    life,
    steps,
    transfer,
)
from bench.agents import Bench

_log = logging.getLogger("bench")


@dataclass(frozen=True)
class Group:
    """Figures that are measured together."""

    name: str
    about: str
    measure: Callable[[Bench], Awaitable[None]]
    #: Something else is compared with it: measured before all others and once more after them.
    baseline: bool = False
    #: Only when it is asked for by name.
    extra: bool = False


GROUPS: tuple[Group, ...] = (
    Group("boot", "a create that boots, to the exit of true", baselines.measure_boot, True),
    Group("gvisor", "gVisor's runsc run of the same command", baselines.measure_gvisor, True),
    Group("create", "create, and create to the exit of true", life.measure_create),
    Group("waiting", "the same with VMMs that wait for a state", life.measure_waiting),
    Group("ready", "the same from ready sandboxes", life.measure_ready),
    Group("exec", "a command over the agent and of the guest directly", life.measure_exec),
    Group(
        "control", "calls over the control plane and of the host directly", control.measure_control
    ),
    Group("e2b", "what a user of E2B's own Python package waits for", e2b.measure_e2b),
    Group("pause", "pause and resume, 20 times each, and a full save", copies.measure_pause),
    Group("memory", "pause at 256 MB, 1 GB and 4 GB of RAM", copies.measure_memories),
    Group("checkpoint", "how long a source stands still", copies.measure_checkpoint),
    Group("snapshot", "the same for a live snapshot", copies.measure_snapshot),
    Group("cached", "a checkpoint with written files in RAM too", copies.measure_cached),
    Group("fork", "8 forks at once", copies.measure_fork),
    Group("transfer", "64 MB in and out, and over plain TCP", transfer.measure_transfer),
    Group("crowd", "20 creates at once, and the PSS of each", life.measure_crowd),
    Group("ready-crowd", "20 creates at once from 20 ready ones", life.measure_ready_crowd),
    Group("density", "50 idle sandboxes and what sampling costs", density.measure_density),
    Group("steps", "where the time of create and resume goes", steps.measure_steps, extra=True),
    Group("blocks", "what emulation translates, and its CPU", blocks.measure_blocks, extra=True),
)


async def measure(bench: Bench, names: Sequence[str]) -> list[str]:
    """Measure the groups of these names, or all but the extra ones; returns those that failed."""
    chosen = [each for each in GROUPS if each.name in names or not (names or each.extra)]
    halves = [each for each in chosen if each.baseline]
    failed: list[str] = []
    for group in [*chosen, *halves]:
        print(group.name, end=" ", file=sys.stderr, flush=True)
        try:
            await group.measure(bench)
        # One group that fails must not take the figures of the others with it.
        except Exception:  # noqa: BLE001
            _log.exception("group %s failed", group.name)
            failed.append(group.name)
    print(file=sys.stderr)
    return failed
