"""The budgets: what each is taken from, its limit, and whether a run kept it.

A ratio of things measured in the same run holds on any machine, so ratios are what the ratchet
keeps; but not those of things that should not differ at all, where better is only luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.figures import Figures


@dataclass(frozen=True)
class Budget:
    """A limit on one number that is worked out from some figures."""

    name: str
    #: The figures it is worked out from.
    needs: tuple[str, ...]
    measure: Callable[[Figures], float]
    limit: float
    unit: str = ""
    more_is_better: bool = False
    ratchet: bool = False

    def find(self, figures: Figures) -> float | None:
        """The number, None when this run did not measure what it is made of."""
        if any(name not in figures for name in self.needs):
            return None
        return self.measure(figures)

    def keeps(self, found: float) -> bool:
        return found >= self.limit if self.more_is_better else found <= self.limit


def ratio(figure: str, baseline: str, limit: float, *, ratchet: bool = True) -> Budget:
    """The ratio of two medians."""
    return Budget(
        f"{figure} / {baseline}",
        (figure, baseline),
        lambda figures: figures[figure].median / figures[baseline].median,
        limit,
        ratchet=ratchet,
    )


def spread(name: str, parts: tuple[str, ...], limit: float) -> Budget:
    """The ratio of the largest of some medians to the smallest."""

    def measure(figures: Figures) -> float:
        medians = [figures[part].median for part in parts]
        return max(medians) / min(medians)

    return Budget(f"{name}, largest / smallest", parts, measure, limit)


def quantile(figure: str, share: float, limit: float, unit: str = "ms") -> Budget:
    """A quantile of one figure."""
    name = f"{figure}, p{round(share * 100)}"
    return Budget(name, (figure,), lambda figures: figures[figure].quantile(share), limit, unit)


def at_least(figure: str, limit: float, unit: str) -> Budget:
    """A median that must not be smaller."""
    return Budget(figure, (figure,), lambda f: f[figure].median, limit, unit, more_is_better=True)


def total(name: str, parts: tuple[str, ...], limit: float, unit: str) -> Budget:
    """The sum of some medians."""
    return Budget(name, parts, lambda f: sum(f[part].median for part in parts), limit, unit)


BOOT = "boot to exit of true"
GVISOR = "gVisor's runsc run of true"
CREATE = "create"
CREATE_TO_TRUE = "create to exit of true"
WAITING_TO_TRUE = "create to exit of true, VMM waiting"
READY = "create, sandbox ready"
READY_TO_TRUE = "create to exit of true, sandbox ready"
TWENTY = "20 creates at once"
TWENTY_READY = "20 creates at once, 20 ready"
EXEC_EXTRA = "exec of true, the agent's share"
PING_EXTRA = "ping, the control plane's share"
REST_EXTRA = "exec of true, the control plane's share"
PAUSE = "pause, 32 MB dirty"
FULL_SAVE = "full save, 32 MB dirty"
SLOW_SAVE = "full save, 32 MB dirty, at QEMU's default rate"
FIRST_PAUSE, LAST_PAUSE = "pause, the first", "pause, the 20th"
RESUME = "resume to exit of true"
STOPPED = "checkpoint: source stopped"
STOPPED_SNAPSHOT = "live snapshot: source stopped"
FORK_EACH = "fork, each of 8"
WRITE, READ = "write of 64 MB", "read of 64 MB"
RAW_IN, RAW_OUT = "raw TCP of 64 MB, in", "raw TCP of 64 MB, out"
PSS_20 = "PSS of an idle sandbox of 20"
PSS_50 = "PSS of an idle sandbox of 50"
HELD = "idle sandboxes held"
AGENT_RSS = "agent's RSS with 50 sandboxes"
AGENT_CPU = "agent's CPU, 50 idle sandboxes sampled"
GUEST_CPU = "CPU of answering the sampler, all of 50"
#: Sizes of RAM whose pauses are compared.
MEMORIES_MB = (256, 1024, 4096)
#: Limits of what should not differ at all: as much as is noise.
_SAME = 1.3


def pause_with(memory_mb: int) -> str:
    return f"{PAUSE}, {memory_mb} MB of RAM"


BUDGETS: tuple[Budget, ...] = (
    ratio(CREATE_TO_TRUE, BOOT, 0.08),
    ratio(CREATE_TO_TRUE, GVISOR, 1.5),
    ratio(WAITING_TO_TRUE, BOOT, 0.08),
    ratio(WAITING_TO_TRUE, GVISOR, 1.5),
    ratio(READY_TO_TRUE, GVISOR, 0.5),
    quantile(READY, 0.5, 25),
    quantile(READY, 0.95, 60),
    ratio(TWENTY, CREATE, 8),
    ratio(TWENTY, CREATE_TO_TRUE, 8),
    quantile(TWENTY_READY, 0.5, 1000),
    quantile(EXEC_EXTRA, 0.5, 5),
    quantile(PING_EXTRA, 0.5, 5),
    quantile(REST_EXTRA, 0.5, 5),
    ratio(PAUSE, FULL_SAVE, 0.25),
    ratio(PAUSE, SLOW_SAVE, 0.25),
    spread("pause at 256 MB, 1 GB, 4 GB", tuple(map(pause_with, MEMORIES_MB)), _SAME),
    ratio(LAST_PAUSE, FIRST_PAUSE, _SAME, ratchet=False),
    ratio(RESUME, BOOT, 0.08),
    quantile(STOPPED, 0.5, 12),
    quantile(STOPPED, 0.95, 25),
    quantile(STOPPED_SNAPSHOT, 0.5, 12),
    quantile(STOPPED_SNAPSHOT, 0.95, 25),
    ratio(FORK_EACH, BOOT, 0.08),
    # These are times of the same bytes: half the rate is twice the time.
    ratio(WRITE, RAW_IN, 2),
    ratio(READ, RAW_OUT, 2),
    quantile(PSS_20, 0.5, 60, "MB"),
    at_least(HELD, 50, "sandboxes"),
    quantile(AGENT_RSS, 0.5, 150, "MB"),
    total("sampling of 50, agent and guests", (AGENT_CPU, GUEST_CPU), 3, "% of a core"),
)


def judge(figures: Figures) -> str:
    """The table of all budgets; what this run did not measure comes last."""
    lines = [f"{'budget':<76}{'found':>9}{'limit':>9}"]
    left_out = []
    for budget in BUDGETS:
        found = budget.find(figures)
        if found is None:
            left_out.append(f"not measured: {budget.name}")
            continue
        verdict = "kept" if budget.keeps(found) else "missed"
        numbers = f"{found:9.3f}{budget.limit:9.2f}  {verdict:<8}{budget.unit}"
        lines.append(f"{budget.name:<76}{numbers}".rstrip())
    return "\n".join([*lines, *left_out])


def to_json(figures: Figures) -> list[dict[str, object]]:
    found = ((budget, budget.find(figures)) for budget in BUDGETS)
    return [
        {
            "name": budget.name,
            "found": number,
            "limit": budget.limit,
            "unit": budget.unit,
            "kept": number is not None and budget.keeps(number),
        }
        for budget, number in found
    ]
