"""The ratchet: the best ratios ever reached, checked in, and what a later run may not spoil.

One file for all machines, so it holds ratios alone, apart for each accelerator. A run spoils a
ratio when even the friendly end of what the run could have found is worse than the best by more
than the allowance: values are drawn anew from those measured, and a ratio that only bad luck made
bad comes out well in some of the draws.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bench.budgets import BUDGETS, Budget
from bench.figures import Figures

FILE = Path(__file__).with_name("ratchet.json")
ALLOWANCE = 1.15
_DRAWS = 400
#: The share of draws that is taken for luck.
_LUCK = 0.1


@dataclass
class Ratchet:
    """The best ratios, by accelerator and name of the budget."""

    best: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path = FILE) -> Ratchet:
        return cls(json.loads(file.read_bytes())) if file.exists() else cls()

    def save(self, file: Path = FILE) -> None:
        file.write_text(json.dumps(self.best, indent=1, sort_keys=True) + "\n")

    def spoilt(self, figures: Figures, accel: str) -> list[str]:
        """A sentence for each ratio that is worse than it may be."""
        best = self.best.get(accel, {})
        sentences = []
        for budget in _measured(figures):
            if (reached := best.get(budget.name)) is None:
                continue
            if (found := _friendly(budget, figures)) > reached * ALLOWANCE:
                median = budget.measure(figures)
                sentences.append(
                    f"{budget.name} is {median:.3f} (at best {found:.3f}) and was {reached:.3f}"
                )
        return sentences

    def keep(self, figures: Figures, accel: str) -> None:
        """Take what this run did better than any before."""
        best = self.best.setdefault(accel, {})
        for budget in _measured(figures):
            found = round(budget.measure(figures), 4)
            best[budget.name] = min(best.get(budget.name, found), found)


def _measured(figures: Figures) -> list[Budget]:
    """The ratios of this run; of all of them, less is better."""
    return [each for each in BUDGETS if each.ratchet and each.find(figures) is not None]


def _friendly(budget: Budget, figures: Figures) -> float:
    """The best that the run could have found, luck left out."""
    random = Random(1)  # noqa: S311 - a draw that anybody can repeat is wanted.
    drawn = sorted(budget.measure(figures.resampled(random)) for _ in range(_DRAWS))
    return drawn[int(_LUCK * _DRAWS)]
