"""What the benchmark makes of its figures: budgets kept and missed, and the ratchet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import budgets
from bench.figures import Figures
from bench.ratchet import Ratchet

_NAME = f"{budgets.RESUME} / {budgets.BOOT}"


def figures(resumes: Sequence[float], boot: float = 1000) -> Figures:
    made = Figures()
    for value in resumes:
        made.add(budgets.RESUME, value)
    made.add(budgets.BOOT, boot)
    return made


def test_a_budget_is_kept_missed_or_not_measured() -> None:
    found = figures([70, 80, 500])
    (budget,) = (each for each in budgets.BUDGETS if each.name == _NAME)
    assert budget.find(found) == pytest.approx(0.08)
    assert budget.keeps(0.08)
    assert not budget.keeps(0.081)
    assert budget.find(Figures()) is None
    told = budgets.judge(found).splitlines()
    assert [line for line in told if line.startswith(_NAME) and line.endswith("kept")]
    assert sum(line.startswith("not measured: ") for line in told) == len(budgets.BUDGETS) - 1


def test_more_is_better_where_a_budget_says_so() -> None:
    held = next(each for each in budgets.BUDGETS if each.more_is_better)
    assert held.keeps(50)
    assert not held.keeps(49)


def test_the_ratchet_holds_what_was_reached_and_forgives_noise(tmp_path: Path) -> None:
    file = tmp_path / "ratchet.json"
    ratchet = Ratchet.load(file)
    ratchet.keep(figures([100] * 20), "tcg")
    ratchet.keep(figures([300] * 20), "tcg")
    ratchet.save(file)
    kept = Ratchet.load(file)
    assert kept.best == {"tcg": {_NAME: 0.1}}
    assert not kept.spoilt(figures([114] * 20), "tcg")
    (sentence,) = kept.spoilt(figures([117] * 20), "tcg")
    assert _NAME in sentence
    # What another accelerator reached says nothing.
    assert not kept.spoilt(figures([117] * 20), "kvm")
    # The median is worse, but the values lie so far apart that another run would have passed.
    noisy = figures([100] * 9 + [180] * 11)
    assert noisy[budgets.RESUME].median == 180
    assert not kept.spoilt(noisy, "tcg")


def test_quantiles_are_values_that_were_measured() -> None:
    found = figures([5, 1, 4, 2, 3])[budgets.RESUME]
    assert [found.quantile(share) for share in (0, 0.5, 0.95, 1)] == [1, 3, 5, 5]
