"""The ladder's statistics on simulated ladders: a part of what scripts/bench_ladder.py measures.

All draws have fixed seeds, so a test that passes keeps passing. Limits leave three standard errors for chance.
"""

import math
from dataclasses import replace

import pytest

from scripts.bench_ladder import BIG, FADING, FLOORS
from tests import ladders
from tests.ladders import LONG, SEVEN, SHORT, Simulated, Trouble, simulate

pytestmark = pytest.mark.timeout(400)  # the machine may be shared

REGULAR = {"unchanged": ladders.UNCHANGED, "constant": ladders.CONSTANT, "reversing": ladders.REVERSING}
STANDARD = REGULAR | {"shrinking": ladders.SHRINKING, "barely": ladders.BARELY}
COUNT = 500
LEVEL = 0.05


def limit(share: float, count: int = COUNT) -> float:
    """Limit that an observed share exceeds once in a thousand times if `share` is the true one."""
    return share + 3 * math.sqrt(share * (1 - share) / count)


@pytest.fixture(scope="module")
def regular() -> Simulated:
    return simulate(replace(SHORT, correlation=0.5), STANDARD, COUNT, seed=11)


@pytest.mark.slow
def test_intervals_of_the_baselines_curve_cover_as_often_as_they_say():
    covered = ladders.simulate_fits(replace(SHORT, correlation=0.5), 600, seed=11)
    assert covered.fits == 600
    for share in (covered.E, covered.alpha, covered.prediction):
        assert share == pytest.approx(1 - LEVEL, abs=0.03)


def test_arms_that_change_nothing_are_not_promoted(regular: Simulated):
    assert regular.arms["unchanged"].promote <= LEVEL


def test_intervals_cover_at_least_as_often_as_they_say_where_all_assumptions_hold(regular: Simulated):
    assert all(arm.coverage >= 1 - limit(LEVEL) for arm in regular.arms.values())


def test_constant_gains_are_promoted_and_not_called_shrinking(regular: Simulated):
    constant = regular.arms["constant"]
    assert constant.promote > 0.89 and constant.reject == 0
    assert constant.shrinks <= LEVEL / 2


def test_true_reversals_are_found_and_never_promoted(regular: Simulated):
    reversing = regular.arms["reversing"]
    assert reversing.reject > 0.9 and reversing.shrinks > 0.9 and reversing.promote == 0


def test_at_exactly_the_least_useful_gain_the_level_holds(regular: Simulated):
    assert regular.arms["barely"].promote <= limit(LEVEL) and regular.arms["barely"].reject <= limit(LEVEL)


def test_a_gain_that_levels_off_elsewhere_is_inconclusive_where_a_line_is_wrong():
    levelling = simulate(LONG, {"arm": ladders.LEVELLING}, 300, seed=12).arms["arm"]
    assert levelling.truth == pytest.approx(1.0)
    assert levelling.line_coverage < 0.7, "the line alone is wrong here"
    assert levelling.coverage > 0.93 and levelling.promote <= limit(LEVEL, 300)


HARD = {
    "one seed": (replace(LONG, seeds=1), STANDARD, Trouble()),
    "pairs that go together, one seed": (replace(LONG, seeds=1, correlation=0.95), BIG, Trouble()),
    "fades to a constant, one seed": (replace(SEVEN, seeds=1), FADING, Trouble()),
    "fades to a constant": (SEVEN, FADING, Trouble()),
    "levels off elsewhere": (LONG, FLOORS, Trouble()),
    "rungs shared by all arms": (replace(LONG, sd=0.003), BIG, Trouble(shared=0.003)),
    "rungs of each arm": (replace(LONG, sd=0.003), STANDARD, Trouble(own=0.003)),
    "rungs of each arm, and nine seeds more at one": (  # which do not average the effect of that rung
        replace(LONG, sd=0.003, seeds=1),
        STANDARD,
        Trouble(own=0.005, added=9),
    ),
    "noise falls with scale": (LONG, STANDARD, Trouble(exponent=-0.15)),
    "heavy tails": (LONG, STANDARD, Trouble(heavy_tails=True)),
    "an outlying run": (LONG, STANDARD, Trouble(outlier=10)),
    "an outlying run, one seed": (replace(LONG, seeds=1), STANDARD, Trouble(outlier=10)),
}


@pytest.mark.parametrize("what", HARD)
def test_verdicts_are_not_confidently_wrong_where_an_assumption_fails(what: str):
    design, arms, trouble = HARD[what]
    done = simulate(design, arms, COUNT, seed=20, trouble=trouble)
    for name, arm in done.arms.items():
        assert arm.coverage >= 0.915, name  # the bench's bar of 0.93, less what so few ladders scatter
        assert arm.wrong(1.02) <= limit(LEVEL), name
    assert done.false_trends is None or done.false_trends <= limit(LEVEL)


def test_a_wrong_curve_leads_to_few_wrong_verdicts():
    for base in (ladders.two_powers(), ladders.power_law(0.2, 2.7, 0.06)):
        done = simulate(LONG, REGULAR, 200, base=base, seed=14)
        assert all(arm.wrong(1.02) <= LEVEL for arm in done.arms.values())


def test_over_data_intervals_cover_and_the_level_holds_although_the_law_is_another():
    base = ladders.of_text(4)
    done = simulate(replace(ladders.TEXT, correlation=0.5), ladders.TEXT_ARMS, COUNT, base=base, seed=15)
    for name, arm in done.arms.items():
        assert arm.coverage >= 0.915, name
        assert arm.wrong(1.02) <= limit(LEVEL), name
    assert done.arms["A/A"].promote <= limit(LEVEL)
    assert done.arms["16 epochs, not 4"].promote > 0.9
