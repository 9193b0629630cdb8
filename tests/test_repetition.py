"""Promises about the law of text that is read again."""

import csv
import math
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT
from trainer.errors import FitError
from trainer.ladder.stats import huber, overfitting, repetition
from trainer.ladder.stats.forms import DELTA
from trainer.ladder.stats.huber import HuberLaw
from trainer.ladder.stats.records import Interval
from trainer.ladder.stats.repetition import Repetition, effective

PUBLISHED_RUNS = ROOT.parent / "shared" / "data" / "datablations.csv"
LAW = Repetition(1.9, 520.0, 1490.0, 0.35, Interval(15.0, None, None), Interval(5.0, None, None), 0, None)
N, U, EPOCHS = (
    each.ravel()
    for each in np.meshgrid(
        np.geomspace(1e7, 1e9, 4), np.geomspace(1e8, 1e10, 4), [1.0, 4.0, 16.0, 64.0], indexing="ij"
    )
)


def losses(sd: float, law: Repetition = LAW, seed: int = 0) -> np.ndarray:
    noise = np.random.Generator(np.random.Philox(seed)).standard_normal(len(N))
    return law.loss_at(N, U * EPOCHS, U) + sd * noise


def test_text_read_once_counts_whole_and_read_for_ever_one_plus_r_times():
    one = np.array(1.0)
    assert effective(np.array(0.5), one, 15.0) == 0.5 and effective(one, one, 15.0) == 1.0
    assert effective(np.array(1e9), one, 15.0) == pytest.approx(16.0)
    assert LAW.value_of_epoch(1).value == 1.0
    assert LAW.value_of_epoch(2).value == pytest.approx(15 * (1 - np.exp(-1 / 15)))
    assert LAW.worth_of(4.0).value == pytest.approx(1 + sum(LAW.value_of_epoch(n).value or 0.0 for n in (2, 3, 4)))
    last = LAW.last_paying_epoch().value
    assert last is not None
    rise = repetition.worth(last + 1e-4, 15.0) - repetition.worth(last, 15.0)
    assert rise / 1e-4 == pytest.approx(repetition.PAYS, rel=1e-3), "beyond it a token is worth less than that"


def test_a_law_without_noise_is_found_exactly():
    found = repetition.fit(N, U * EPOCHS, U, losses(0.0))
    assert (found.E, found.alpha) == (pytest.approx(1.9, rel=1e-3), pytest.approx(0.35, rel=1e-3))
    assert (pytest.approx(520, rel=1e-2), pytest.approx(1490, rel=1e-2)) == (found.A, found.B)
    assert found.R_N is not None
    assert (found.R_D.value, found.R_N.value) == (pytest.approx(15, rel=1e-2), pytest.approx(5, rel=1e-2))
    assert np.abs(found.loss_at(N, U * EPOCHS, U) - losses(0.0)).max() < 1e-4


def test_intervals_by_profile_hold_the_truth_and_shrink_with_the_noise():
    quiet, loud = (repetition.fit(N, U * EPOCHS, U, losses(sd)) for sd in (0.002, 0.01))
    for found in (quiet, loud):
        for name, truth in (("R_D", 15.0), ("R_N", 5.0)):
            one = getattr(found, name)
            assert one.low is not None and one.high is not None and one.low < truth < one.high
    assert (quiet.R_D.high or 0) - (quiet.R_D.low or 0) < (loud.R_D.high or 0) - (loud.R_D.low or 0)


def test_of_one_size_the_law_of_text_alone_is_fitted():
    one = np.isclose(N, N[0])
    found = repetition.fit(N[one], (U * EPOCHS)[one], U[one], 2.5 + 1490 * effective(U * EPOCHS, U, 15.0)[one] ** -0.35)
    assert (found.A, found.R_N) == (None, None)
    assert (found.E, found.alpha, found.R_D.value) == (
        pytest.approx(2.5, rel=1e-3), pytest.approx(0.35, rel=1e-3), pytest.approx(15, rel=1e-2),
    )  # fmt: skip


@pytest.mark.parametrize(("epochs", "low", "high"), [([1.0, 2.0], True, False), ([8.0], False, False)])
def test_an_end_that_the_runs_do_not_bound_is_unknown(epochs: list[float], low: bool, high: bool):
    """Two epochs of nearly new worth leave open how soon it fades; one number of epochs leaves open all."""
    chosen = np.isclose(N, N[0])
    u, e = (each.ravel() for each in np.meshgrid(np.geomspace(1e8, 1e10, 8), epochs))
    noise = 0.01 * np.random.Generator(np.random.Philox(3)).standard_normal(len(u))
    found = repetition.fit(
        np.full(len(u), N[chosen][0]), u * e, u, 2.5 + 1490 * effective(u * e, u, 15.0) ** -0.35 + noise
    )
    assert (found.R_D.low is not None, found.R_D.high is not None) == (low, high)
    assert found.last_paying_epoch().high is None and found.worth_of(8.0).high is None


def test_where_repeats_look_better_than_new_text_r_ends_where_its_profile_does():
    u, e = (each.ravel() for each in np.meshgrid(np.geomspace(1e8, 1e10, 8), [1.0, 4.0, 16.0]))
    noise = 0.002 * np.random.Generator(np.random.Philox(3)).standard_normal(len(u))
    loss = 2.5 + 1490 * (u * e) ** -0.35 * e**-0.02 + noise
    found = repetition.fit(np.full(len(u), 1e8), u * e, u, loss)
    assert found.R_D.value == pytest.approx(repetition.MOST)
    assert found.R_D.low is not None and found.R_D.high is None
    assert found.last_paying_epoch().high is None


def published() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens, unique tokens and loss of the 182 runs of Muennighoff et al. 2023."""
    if not PUBLISHED_RUNS.exists():
        pytest.skip(f"{PUBLISHED_RUNS} is not there")
    with PUBLISHED_RUNS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    params, tokens, unique, loss = (
        np.array([float(row[name]) for row in rows]) for name in ("params", "tokens", "unique_tokens", "loss")
    )
    return params, tokens, unique, loss


A, B, ALPHA = math.exp(6.255414), math.exp(7.3049974), 0.3526596
PUBLISHED_LAW = {"E": math.exp(0.6254804), "A": A, "alpha": ALPHA, "G": (A / B) ** (1 / (2 * ALPHA))}


@pytest.mark.parametrize("start", [(20 / 3, 20 / 3), (40 / 3, 20 / 3), (20, 20 / 3)])
def test_from_their_authors_starts_the_published_digits_come_out(start: tuple[float, float]):
    """Published: R_D 15.387756, R_N 5.309743 at a sum of 0.0158259366, where L-BFGS stopped in float32."""
    parameters, tokens, unique, loss = published()
    law = repetition._Law(parameters, tokens, unique, sizes=True)
    search = HuberLaw(law.terms, loss, [repetition._bounds(name, PUBLISHED_LAW) for name in repetition.NAMES])
    found, least = search.descend(np.array([0.0, 0.0, 0.0, *np.log(start), 0.0]))
    assert np.exp(found[3:5]) == pytest.approx((15.387756, 5.309743), rel=1.5e-3)
    assert least * DELTA**2 == pytest.approx(0.0158259366, rel=1e-6)


def test_they_are_a_local_minimum_and_the_published_runs_do_not_bound_r_above():
    found = repetition.fit(*published(), known=PUBLISHED_LAW)
    assert found.R_D.value == pytest.approx(95.4, abs=0.5), "its sum is 0.13 % lower"
    assert found.R_D.low is not None and 4.0 < found.R_D.low < 15.39 and found.R_D.high is None
    assert found.R_N is not None and found.R_N.low is not None and found.R_N.high is not None
    assert found.R_N.low < 5.31 < found.R_N.high


def test_with_all_parameters_free_the_published_runs_bound_r():
    found = repetition.fit(*published())
    assert found.R_D.value == pytest.approx(33.6, abs=0.5)
    assert found.R_D.low is not None and found.R_D.low > 20
    assert found.R_D.high is not None and found.R_D.high < 110


def test_a_penalty_describes_the_published_runs_better_and_says_when_to_stop():
    size, tokens, unique, loss = published()
    penalty, effective_data = (law.fit(size, tokens, unique, loss) for law in (overfitting, repetition))
    medians = [
        float(np.median(np.abs(np.log(loss / law.loss_at(size, tokens, unique))))) for law in (penalty, effective_data)
    ]
    assert medians == [pytest.approx(0.0169, abs=3e-4), pytest.approx(0.0260, abs=3e-4)]
    law = penalty.law
    assert (law.delta, law.kappa) == tuple(pytest.approx(value, abs=0.005) for value in overfitting.EXPONENTS.values())
    assert law.P.low is not None and law.P.low > 0.02 and law.P.high is not None and law.held == ()
    # The more parameters for each unique token, the sooner repeats harm.
    stops = [penalty.best_epochs(count, 1e8).value for count in (14e6, 146e6, 1e9)]
    assert stops == sorted(stops, reverse=True) and stops[-1] == pytest.approx(34, abs=2)


def test_a_penalty_without_noise_is_found_and_one_of_nothing_has_no_end():
    u, e = (each.ravel() for each in np.meshgrid(np.geomspace(1e8, 1e10, 4), [1.0, 4.0, 8.0, 32.0]))
    size = np.full_like(u, 1e8)
    plain = 2.5 + 1490 * (u * e) ** -0.35
    found = overfitting.fit(size, u * e, u, plain + 0.05 * (e - 1) ** 0.5 * (size / u) ** 0.71)
    assert (found.law.P.value, found.law.delta) == (pytest.approx(0.05, rel=1e-2), pytest.approx(0.5, rel=1e-2))
    assert (found.law.A, found.law.held) == (None, ("kappa",)), "runs of one size"
    noise = 0.002 * np.random.Generator(np.random.Philox(3)).standard_normal(len(u))
    harmless = overfitting.fit(size, u * e, u, plain + noise)
    assert harmless.best_epochs(1e8, 1e9).high is None and harmless.law.P.low is None


def test_two_numbers_of_epochs_leave_one_parameter_of_the_penalty():
    u, e = (each.ravel() for each in np.meshgrid(np.geomspace(1e8, 1e10, 4), [8.0, 16.0]))
    e *= np.tile(1 + 0.003 * np.arange(4), 2)  # steps are whole: no amount of text is read exactly so often
    size = np.full_like(u, 1e8)
    law = overfitting.fit(size, u * e, u, 2.5 + 1490 * (u * e) ** -0.35 + 0.05 * (e - 1) ** 0.35 * (size / u) ** 0.71)
    assert law.law.held == ("delta", "kappa") and law.law.P.value == pytest.approx(0.05, rel=0.02)
    with pytest.raises(FitError, match="no run read its text again"):
        overfitting.fit(size, u, u, 2.5 + 1490 * u**-0.35)


def test_where_each_round_finds_a_lower_sum_the_last_minimum_is_told_without_an_interval(monkeypatch):
    def refuted(fit: huber.HuberFit, place: int, room: float) -> np.ndarray:
        fit.ends[place] = (0.0, 1.0)
        return fit.best

    monkeypatch.setattr(huber.HuberFit, "profile", refuted)
    u, e = (each.ravel() for each in np.meshgrid(np.geomspace(1e8, 1e10, 4), [8.0, 16.0]))
    loss = 2.5 + 1490 * (u * e) ** -0.35 + 0.05 * (e - 1) ** 0.35
    found = overfitting.fit(np.full_like(u, 1e8), u * e, u, loss)
    epochs = found.best_epochs(1e8, 1e9)
    assert [found.law.P.low, found.law.P.high, epochs.low, epochs.high] == [None] * 4


def test_runs_that_cannot_tell_are_refused():
    with pytest.raises(FitError, match="no run read its text more than 1 times"):
        repetition.fit(N, U, U, losses(0.0))
    few: Any = slice(0, 5)
    with pytest.raises(FitError, match="too few for this law"):
        repetition.fit(N[few] * np.arange(1, 6), (U * EPOCHS)[few], U[few], losses(0.0)[few])
