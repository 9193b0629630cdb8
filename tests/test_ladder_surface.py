"""Promises about arms whose sizes vary in parameters and tokens apart: the multiplier m(N, D)."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests import ladders
from trainer.errors import FitError
from trainer.ladder.stats import planes, verdict
from trainer.ladder.stats.records import Criterion, RunResult

TARGET = ladders.APART_TARGET


def runs(worth: ladders.Worth, sd: float = 0.002, seeds: int = 2) -> list[RunResult]:
    return ladders.draw_apart({"arm": worth}, np.random.Generator(np.random.Philox(0)), sd, seeds)


def judged(results: list[RunResult], **more: float) -> verdict.Verdict:
    (found,) = verdict.judge(results, Criterion(), TARGET, **more)  # pyright: ignore[reportArgumentType]
    return found


def test_without_noise_a_constant_gain_is_the_same_at_every_size():
    found = judged(runs(lambda n, d: 1.3, sd=1e-7))
    assert [rung.multiplier.value for rung in found.rungs] == pytest.approx([1.3] * len(ladders.APART), rel=2e-3)
    assert found.multiplier.value == pytest.approx(1.3, rel=2e-3)


def test_a_gain_is_promoted_and_a_loss_rejected_from_one_seed_a_size():
    for worth, decision in ((1.5, "promote"), (0.7, "reject")):
        found = judged(runs(lambda n, d, worth=worth: worth, seeds=1))
        assert found.decision == decision, found.why
        assert found.multiplier.low is not None and found.multiplier.high is not None
        assert found.multiplier.low < worth < found.multiplier.high


def test_swapping_the_arm_and_the_baseline_at_a_size_inverts_the_multiplier_there():
    results = runs(lambda n, d: 1.0)
    sizes = planes.SurfaceBaseline.from_results(results, TARGET, 0.05)
    there = sizes.compare([list(sizes.match(results, "arm"))])
    swapped = sizes.compare([[
        replace(rung, pairs=[(arm, base) for base, arm in rung.pairs]) for rung in sizes.match(results, "arm")
    ]])  # fmt: skip
    assert swapped.means == pytest.approx(-there.means, abs=1e-9)


def test_a_gain_that_depends_on_the_tokens_per_parameter_is_told_for_those_of_the_target():
    def worth(n: float, d: float) -> float:
        return 1.3 * (d / n / 20) ** 0.15

    for ratio in (5.0, 80.0):
        found = judged(runs(worth, sd=0.0005), target_mix=math.log(ratio))
        assert found.multiplier.value == pytest.approx(worth(1, ratio), rel=0.03)
        assert found.multiplier.low is not None and found.multiplier.high is not None
        assert found.multiplier.low < worth(1, ratio) < found.multiplier.high


def test_the_surfaces_own_error_is_in_the_interval():
    results = runs(lambda n, d: 4.0, sd=0.003)
    sizes = planes.SurfaceBaseline.from_results(results, TARGET, 0.05)
    worths = sizes.compare([list(sizes.match(results, "arm"))])
    known = replace(worths, baseline_variance=np.zeros(()))
    x = math.log(TARGET / sizes.scale)
    assert worths.at(x).variances[0, -1] > 1.1 * known.at(x).variances[0, -1]


def test_the_derivatives_of_the_multiplier_are_those_of_the_surface():
    results = runs(lambda n, d: 2.0, sd=0.002)
    sizes = planes.SurfaceBaseline.from_results(results, TARGET, 0.05)
    matched = [list(sizes.match(results, "arm"))]
    by, there, h = sizes.compare(matched).by, sizes.compare(matched).means, 1e-5
    values = [*map(math.log, sizes.surface.coefficients), *sizes.surface.exponents]
    for k in range(5):
        moved = [value + h * (number == k) for number, value in enumerate(values)]
        other = replace(sizes.surface, coefficients=tuple(map(math.exp, moved[:3])), exponents=tuple(moved[3:]))
        assert (sizes.compare(matched, other).means - there) / h == pytest.approx(by[k], rel=2e-3, abs=1e-4)


def test_sizes_on_one_line_of_compute_are_no_surface_and_too_few_are_refused():
    results = runs(lambda n, d: 1.0)
    line = [run for run in results if run.tokens == 20 * run.parameters]
    assert planes.vary_apart(results) and not planes.vary_apart(line)
    few = [run for run in results if run.parameters <= 3e7 and run.tokens != 80 * run.parameters and run.seed == 0]
    with pytest.raises(FitError, match="runs are too few"):
        planes.SurfaceBaseline.from_results(few, TARGET, 0.05)
