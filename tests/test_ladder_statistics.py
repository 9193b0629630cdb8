"""The ladder's statistics on simulated ladders: a fast part of what scripts/bench_ladder.py measures.

All draws have fixed seeds, so a test that passes keeps passing. Limits leave three standard errors for chance; coverage
must be within two points of nominal.
"""

import math
from dataclasses import replace

import pytest

from tests import ladders
from tests.ladders import LONG, SHORT, Simulated, Tally, simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # the machine may be shared

REGULAR = {"unchanged": ladders.UNCHANGED, "constant": ladders.CONSTANT, "reversing": ladders.REVERSING}
COUNT = 1000
LEVEL = 0.05


def limit(share: float, count: int) -> float:
    """Limit that an observed share exceeds once in a thousand times if `share` is the true one."""
    return share + 3 * math.sqrt(share * (1 - share) / count)


@pytest.fixture(scope="module")
def regular() -> Simulated:
    return simulate(replace(SHORT, correlation=0.5), REGULAR | {"shrinking": ladders.SHRINKING}, COUNT, seed=11)


@pytest.fixture(scope="module")
def levelling() -> Tally:
    return simulate(LONG, {"arm": ladders.LEVELLING}, 200, seed=12).arms["arm"]


@pytest.mark.parametrize("arm", ["unchanged", "constant", "shrinking", "reversing"])
def test_the_interval_at_the_target_covers_the_truth_as_often_as_it_says(regular: Simulated, arm: str):
    assert regular.refused == 0
    assert regular.arms[arm].known == COUNT
    assert regular.arms[arm].coverage == pytest.approx(1 - LEVEL, abs=0.02)


def test_intervals_of_the_baselines_curve_cover_as_often_as_they_say(regular: Simulated):
    for covered in (regular.E_covered, regular.alpha_covered, regular.prediction_covered):
        assert covered / regular.fits == pytest.approx(1 - LEVEL, abs=0.02)


def test_arms_that_change_nothing_are_not_promoted(regular: Simulated):
    assert regular.arms["unchanged"].share("promote") <= LEVEL


def test_constant_gains_are_not_called_shrinking(regular: Simulated):
    constant = regular.arms["constant"]
    assert constant.share("shrinks") + constant.share("reverses") <= limit(LEVEL / 2, COUNT)
    assert constant.share("promote") > 0.9 and constant.share("reject") == 0


def test_true_reversals_are_found_and_never_promoted(regular: Simulated):
    reversing = regular.arms["reversing"]
    assert reversing.share("reject") > 0.9
    assert reversing.share("reverses") + reversing.share("shrinks") > 0.9
    assert reversing.share("promote") == 0


def test_at_exactly_the_least_useful_gain_the_level_holds():
    barely = simulate(SHORT, {"arm": ladders.BARELY}, 300, seed=13).arms["arm"]
    assert barely.share("promote") <= limit(LEVEL, 300)
    assert barely.share("reject") <= limit(LEVEL, 300)


def test_a_gain_that_levels_off_is_inconclusive_and_not_promoted(levelling: Tally):
    assert levelling.truth == pytest.approx(1.0)
    assert levelling.coverage < 0.5, "the line alone is wrong here"
    assert levelling.covered_by_other_floor / levelling.ladders > 0.92
    assert levelling.wrong / levelling.ladders <= limit(LEVEL, levelling.ladders)
    assert levelling.share("inconclusive") > 0.8


def test_a_wrong_curve_leads_to_few_wrong_verdicts():
    for base in (ladders.two_powers(), ladders.power_law(0.2, 2.7, 0.06)):
        done = simulate(LONG, REGULAR, 60, base=base, seed=14)
        for tally in done.arms.values():
            assert tally.wrong / tally.ladders <= LEVEL
