"""Promises about fitting loss against compute."""

import csv
import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tests import ladders
from tests.ladders import LONG, Design, draw, power_law
from tests.support import ROOT
from trainer.errors import FitError
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import forms, surfaces
from trainer.ladder.stats.records import Interval, RunResult

GADRE = ROOT.parent / "shared" / "data" / "gadre_rpj.csv"


def baseline(design: Design = LONG, base: ladders.Law | None = None, seed: int = 0) -> list[RunResult]:
    return draw(design, base or power_law(), {}, np.random.Generator(np.random.Philox(seed)))


@pytest.fixture(scope="module")
def gadre() -> list[dict[str, str]]:
    if not GADRE.exists():
        pytest.skip(f"{GADRE} is not there")
    with GADRE.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names = ("params", "tokens_per_param_nominal", "c4_val_loss")
    parameters, ratio, loss = (np.array([float(row[name]) for row in rows]) for name in names)
    return parameters, ratio, loss


def test_the_published_fit_of_gadre_et_al_comes_out(gadre: list[dict[str, str]]):
    models = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
    few = [(name, 20.0) for name in models] + [(models[0], 320.0)]
    chosen = [row for row in gadre if (row["model"], float(row["tokens_per_param_nominal"])) in few]
    law = forms.fit_overtrained(*columns(chosen), "varpro")  # as its authors fitted
    assert (law.a, law.b) == (pytest.approx(166.21, abs=0.005), pytest.approx(366.69, abs=0.005))
    assert (law.eta, law.E) == (pytest.approx(-0.2729, abs=5e-5), pytest.approx(1.8366, abs=5e-5))
    largest = [("open_lm_1b", 640.0), ("open_lm_7b", 20.0)]
    held_out = [row for row in gadre if (row["model"], float(row["tokens_per_param_nominal"])) in largest]
    errors = [law.loss_at(n, m) / loss - 1 for n, m, loss in zip(*columns(held_out), strict=True)]
    assert len(errors) == 2 and max(map(abs, errors)) < 0.00735


@pytest.mark.parametrize("method", ["varpro", "huber"])
def test_a_surface_without_noise_is_found_exactly(method: forms.Method):
    n, ratio = np.repeat(np.geomspace(1e6, 1e9, 4), 3), np.tile([5.0, 20.0, 80.0], 4)
    loss = 1.69 + 406.4 / n**0.34 + 410.7 / (n * ratio) ** 0.28
    law = forms.fit_surface(n, n * ratio, loss, method)
    assert (law.E, law.alpha, law.beta) == (
        pytest.approx(1.69, abs=0.002), pytest.approx(0.34, abs=0.001), pytest.approx(0.28, abs=0.001)
    )  # fmt: skip


def test_one_bad_run_moves_least_squares_and_not_the_sum_of_hubers():
    n, ratio = np.repeat(np.geomspace(1e6, 1e9, 4), 3), np.tile([5.0, 20.0, 80.0], 4)
    loss = 1.69 + 406.4 / n**0.34 + 410.7 / (n * ratio) ** 0.28
    loss[-1] += 0.2
    assert abs(forms.fit_surface(n, n * ratio, loss, "huber").E - 1.69) < 0.01
    assert abs(forms.fit_surface(n, n * ratio, loss, "varpro").E - 1.69) > 0.03


N = np.repeat(np.geomspace(1e7, 1e9, 5), 4)
D = N * np.tile([5.0, 20.0, 80.0, 320.0], 5)
LARGE = (math.log(1e10), math.log(2e11))


def surface_losses(sd: float, bend: float = 0.0) -> np.ndarray:
    noise = sd * np.random.Generator(np.random.Philox(1)).standard_normal(len(N))
    clean = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
    return clean * np.exp(noise + bend * (np.log(N) - np.log(N).mean()) ** 2)


def inside(found: Interval, truth: float) -> bool:
    assert found.low is not None and found.high is not None
    return found.low < truth < found.high


def test_an_interval_that_the_data_hardly_bound_is_not_cut_at_the_end_of_the_grid(monkeypatch):
    n, ratio = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e8, 4), [5.0, 20.0, 80.0]))
    noise = 1 + 0.01 * np.random.default_rng(3).standard_normal(n.size)
    surface = surfaces.hoffmann(n, ratio * n, (1.69 + 406 / n**0.34 + 411 / (ratio * n) ** 0.28) * noise)
    found = surface.exponent(0)
    assert found.high is not None and found.high > 0.34
    monkeypatch.setattr(surfaces, "REACH", 60.0)
    wider = surfaces.hoffmann(n, ratio * n, surface.loss).exponent(0)
    assert wider.high == pytest.approx(found.high, rel=0.1)


def test_the_intervals_of_a_surface_hold_the_truth_and_new_runs_have_wider_ones():
    surface = surfaces.hoffmann(N, D, surface_losses(0.003))
    assert inside(surface.exponent(0), 0.34) and inside(surface.exponent(1), 0.28) and inside(surface.floor(), 1.69)
    truth = 1.69 + 406.4 / 1e10**0.34 + 410.7 / 2e11**0.28
    curve, run = surface.predict(LARGE), surface.predict(LARGE, runs=1)
    assert inside(curve, truth) and inside(run, truth)
    assert curve.low and run.low and curve.high and run.high
    assert curve.low > run.low and curve.high < run.high
    assert surface.sd == pytest.approx(0.003, rel=0.6) and (surface.bend_p() or 0) > 0.01
    # Leaving out a run near the point moves the prediction there more than one far from it does.
    moved = np.abs(surface.influence((math.log(N[-1]), math.log(D[-1]))))
    assert moved.argmax() >= len(N) - 4


def test_a_surface_that_bends_otherwise_than_its_form_is_told():
    p = surfaces.hoffmann(N, D, surface_losses(0.001, bend=0.004)).bend_p()
    assert p is not None and p < surfaces.FORM_FAILS


def test_a_surface_is_refused_where_n_and_d_rise_together():
    n = np.geomspace(1e6, 1e9, 6)
    with pytest.raises(FitError, match="cannot be separated"):
        forms.fit_surface(n, 20 * n, 2 + n**-0.1)


def test_a_curve_without_noise_is_found_exactly_by_both_estimators():
    fit = fits.fit_curve(baseline(replace(LONG, sd=0.0)))
    assert fit.huber is not None
    for curve in (fit.curve, fit.huber):
        assert (curve.E, curve.alpha) == (pytest.approx(1.8, abs=1e-3), pytest.approx(0.15, abs=1e-4))
        assert curve.loss_at(1e16) == pytest.approx(power_law()(1e16), abs=1e-4)
        assert curve.slope(1e15) == pytest.approx(0.15 * 1.14, abs=1e-4)


@given(unit=st.floats(1e-6, 1e6), seed=st.integers(0, 50))
def test_the_unit_of_compute_does_not_matter(unit: float, seed: int):
    results = baseline(seed=seed)
    here = fits.fit_curve(results, second_opinion=False)
    there = fits.fit_curve([replace(run, flops=run.flops * unit) for run in results], second_opinion=False)
    for name in ("curve", "E", "alpha"):
        first, second = getattr(here, name).to_json(), getattr(there, name).to_json()
        for key in first.keys() - {"A", "scale"}:
            assert second[key] == pytest.approx(first[key], rel=1e-3), (name, key)


def test_the_delta_methods_derivative_is_that_of_the_fit():
    rungs = fits.Rungs.from_results(baseline())
    *curve, _ = fits.solve(rungs.x, rungs.loss, rungs.seeds)
    derivative = fits.sensitivity(rungs.x, rungs.seeds, *curve)
    for k in range(len(rungs.names)):
        moved = []
        for sign in (-1, 1):
            loss = rungs.loss.copy()
            loss[k] += sign * 1e-3
            moved.append(np.array(fits.solve(rungs.x, loss, rungs.seeds)[:3]))
        found = (moved[1] - moved[0]) / 2e-3
        assert derivative[:, k] == pytest.approx(found, rel=0.1, abs=0.02)


def test_leverages_sum_to_the_number_of_parameters():
    fit = fits.fit_curve(baseline(), second_opinion=False)
    assert sum(rung.leverage for rung in fit.rungs) == pytest.approx(3.0, abs=1e-6)
    assert all(0 < rung.leverage < 1 for rung in fit.rungs)


def test_a_curve_that_bends_shows_as_lack_of_fit():
    straight = fits.fit_curve(baseline(seed=2), second_opinion=False)
    bent = fits.fit_curve(baseline(base=ladders.bent(), seed=2), second_opinion=False)
    assert straight.lack_of_fit_p is not None and straight.lack_of_fit_p > 0.05
    assert bent.lack_of_fit_p is not None and bent.lack_of_fit_p < 0.001
    assert bent.E.low is not None and straight.E.low is not None
    assert bent.degrees_of_freedom == 2 < straight.degrees_of_freedom == 12


def test_noise_that_differs_between_rungs_is_noticed():
    even = fits.fit_curve(baseline(replace(LONG, seeds=6)), second_opinion=False)
    uneven = fits.fit_curve(baseline(replace(LONG, seeds=6, growth=20.0)), second_opinion=False)
    assert even.unequal_noise_p is not None and even.unequal_noise_p > 0.01
    assert uneven.unequal_noise_p is not None and uneven.unequal_noise_p < 0.001


def test_three_rungs_of_one_seed_give_a_curve_and_no_interval():
    fit = fits.fit_curve(baseline(Design.spanning(3, 2.0, seeds=1)), second_opinion=False)
    assert fit.sd is None and fit.seed_sd is None and fit.lack_of_fit_p is None
    assert fit.E.value is not None and fit.E.low is None and fit.E.high is None
    assert not fit.E_determined
    tree = json.loads(json.dumps(fit.to_json(), allow_nan=False))
    assert tree["E"]["low"] is None


def test_a_floor_that_the_data_do_not_show_reaches_down_to_zero():
    design = replace(Design.spanning(4, 1.0), sd=0.02)
    fit = fits.fit_curve(baseline(design), second_opinion=False)
    assert fit.E.low == 0.0 and not fit.E_determined


@pytest.mark.parametrize("rungs", [0, 1, 2])
def test_fewer_than_three_rungs_are_refused(rungs: int):
    results = [run for run in baseline() if int(run.rung[1:]) < rungs]
    with pytest.raises(FitError, match="at least three") as caught:
        fits.fit_curve(results)
    assert f"finished runs at {rungs} rungs" in str(caught.value)


def test_rungs_of_the_same_compute_are_refused():
    results = [replace(run, flops=1e13) if run.rung in ("r1", "r2") else run for run in baseline()]
    with pytest.raises(FitError, match="each of another compute"):
        fits.fit_curve(results)


def test_a_baseline_that_does_not_improve_is_refused():
    with pytest.raises(FitError, match="does not fall with compute"):
        fits.fit_curve(baseline(base=lambda flops: 3 + 0.1 * math.log10(flops / 1e12)))


def test_a_run_that_diverged_is_left_out_and_never_invented():
    results = baseline()
    without = [run for run in results if (run.rung, run.seed) != ("r2", 1)]
    diverged = [run if run in without else replace(run, loss=math.nan) for run in results]
    assert fits.fit_curve(diverged, second_opinion=False) == fits.fit_curve(without, second_opinion=False)
    assert [rung.seeds for rung in fits.fit_curve(diverged, second_opinion=False).rungs] == [3, 3, 2, 3, 3]


def test_a_prediction_can_be_proven_wrong():
    prediction = fits.predict(baseline(), 1e16, seeds=2)
    value, low, high = prediction.predicted.value, prediction.predicted.low, prediction.predicted.high
    assert value is not None and low is not None and high is not None and low < power_law()(1e16) < high
    held = fits.check(prediction, [value + 0.001, value + 0.001])
    assert held.inside and held.error == pytest.approx(0.001)
    failed = fits.check(prediction, [high + 0.01, high + 0.01])
    assert failed.inside is False and failed.relative_error == pytest.approx((high + 0.01 - value) / value)
    assert fits.check(prediction, [math.nan, 2.0]).observed is None
    with pytest.raises(ValueError, match="1 losses"):
        fits.check(prediction, [2.0])


def test_curves_that_are_searched_for_together_are_those_that_are_found_alone():
    designs = (LONG, replace(LONG, seeds=1, sd=0.02), ladders.SHORT, Design.spanning(5, 2.0))
    together = [fits.Rungs.from_results(baseline(design, seed=seed)) for design in designs for seed in (0, 1)]
    for rungs, profile in zip(together, fits.Profile.from_many(together, 0.05), strict=True):
        alone = fits.Profile.from_rungs(rungs, 0.05)
        assert profile.curve == alone.curve and profile.prediction(1e16, 2) == alone.prediction(1e16, 2)


def test_the_further_the_target_the_wider_the_prediction():
    def width(flops: float) -> float:
        predicted = fits.predict(baseline(), flops).predicted
        assert predicted.low is not None and predicted.high is not None
        return predicted.high - predicted.low

    assert width(1e15) < width(1e16) < width(1e18)


def test_the_bootstrap_is_the_same_each_time_and_finds_the_truth():
    found = fits.bootstrap(baseline(), draws=200)
    assert found == fits.bootstrap(baseline(), draws=200)
    assert found.draws == 200 and 0 < found.refused < 60
    assert found.E.low is not None and found.E.high is not None and found.E.low < 1.8 < found.E.high


def test_run_results_come_back_from_json():
    run = baseline()[0]
    for result in (run, replace(run, seconds=None), replace(run, loss=math.inf)):
        back = RunResult.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
        assert back == result or (math.isnan(back.loss) and replace(back, loss=0.0) == replace(result, loss=0.0))
