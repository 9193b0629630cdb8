"""Promises about the worth of an arm and the decision about it."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from scripts import bench_ladder
from tests import ladders
from tests.ladders import LONG, SHORT, Arm, Design, draw, power_law
from trainer.errors import FitError
from trainer.ladder.stats import advice, significance, verdict
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.pairs import Baseline
from trainer.ladder.stats.records import BASELINE, Criterion, Interval, RunResult, Verdict
from trainer.ladder.stats.worth import Baselines, Worths

TARGET = 1e16
CLEAR = replace(LONG, sd=0.001)


def ladder(arms: Mapping[str, Arm], design: Design = CLEAR, seed: int = 0) -> list[RunResult]:
    return draw(design, power_law(), arms, np.random.Generator(np.random.Philox(seed)))


def change(
    results: Sequence[RunResult], chosen: Callable[[RunResult], bool], **values: float | None
) -> list[RunResult]:
    return [replace(run, **values) if chosen(run) else run for run in results]


def judge(results: Sequence[RunResult], **criterion: float) -> Verdict:
    return verdict.judge(results, Criterion(**criterion), TARGET)[0]  # pyright: ignore[reportArgumentType]


def slowed(results: Sequence[RunResult], by: float) -> list[RunResult]:
    """Make the arm's steps `by` times as long, and all durations vary a little."""
    jitter = {run: 1 + 0.004 * math.sin(7.0 * n) for n, run in enumerate(results)}
    return [replace(run, seconds=jitter[run] * (1.0 if run.arm == BASELINE else by)) for run in results]


# Multipliers


def test_without_noise_a_constant_gain_is_the_same_at_every_rung_and_the_target():
    results = ladder({"arm": ladders.CONSTANT}, replace(LONG, sd=0.0))
    done = judge(results)
    values = [rung.multiplier.value for rung in done.rungs] + [done.multiplier.value, done.other_floor.value]
    assert values == pytest.approx([1.15] * 7, rel=1e-4)
    assert [rung.without for rung in done.rungs] == pytest.approx([1.15] * 5, rel=1e-4)
    assert done.slope.value == pytest.approx(0.0, abs=1e-4)


def test_an_arm_of_twice_the_compute_and_the_same_loss_is_worth_half():
    results = ladder({"arm": ladders.UNCHANGED}, replace(LONG, sd=1e-5))
    done = judge([run if run.arm == BASELINE else replace(run, flops=2 * run.flops) for run in results])
    assert [rung.multiplier.value for rung in done.rungs] == pytest.approx([0.5] * 5, rel=1e-3)
    assert (done.multiplier.value, done.other_floor.value) == (
        pytest.approx(0.5, rel=1e-3), pytest.approx(0.5, rel=1e-3)
    )  # fmt: skip
    assert done.decision == "reject"


@given(seed=st.integers(0, 200), E=st.floats(0.0, 2.5), alpha=st.floats(0.03, 0.6))
def test_the_null_is_exact_whatever_the_curve(seed: int, E: float, alpha: float):
    """Swapping arm and baseline only changes the sign of the estimate, for right and for wrong curves."""
    results = ladder({"arm": ladders.UNCHANGED}, LONG, seed)
    baseline = Baseline.from_results(results, fits.fit_curve(results, second_opinion=False))
    loss = [np.array([[[run.loss for run in results if (run.arm, run.rung) == (name, rung)]
                       for rung in baseline.rungs.names]]) for name in (BASELINE, "arm")]  # fmt: skip
    x = baseline.rungs.x
    curve = Baselines(x, np.array(E), np.array(1.0), np.array(alpha), np.full(5, 3.0), np.full(5, 1e-4), np.array(1e-4))
    there, back = (Worths.from_pairs(curve, *pair) for pair in (loss, loss[::-1]))
    assert there.means == pytest.approx(-back.means, abs=1e-9)
    far = float(x[-1]) + math.log(10)
    assert there.at(far).values == pytest.approx(-back.at(far).values, abs=1e-9)
    assert there.at(far).value == pytest.approx(-back.at(far).value, abs=1e-9)


def test_pairing_is_worth_what_the_correlation_makes_it():
    alone, paired = (
        judge(ladder({"arm": ladders.UNCHANGED}, replace(LONG, seeds=200, sd=0.01, correlation=rho))).pairing
        for rho in (0.0, 0.5)
    )
    assert alone.ratio == pytest.approx(1.0, abs=0.12) and alone.correlation == pytest.approx(0.0, abs=0.1)
    assert paired.ratio == pytest.approx(2.0, abs=0.25) and paired.correlation == pytest.approx(0.5, abs=0.1)


def test_the_crossing_is_found_where_the_gain_ends():
    done = judge(ladder({"arm": ladders.REVERSING}))
    truth = 1e12 * 10 ** (4 * math.log(1.3) / math.log(1.3 / 0.83))
    assert done.trend == "reverses" and done.crossing is not None
    assert done.crossing.value == pytest.approx(truth, rel=0.1)
    assert done.crossing.low is not None and done.crossing.high is not None
    assert done.crossing.low < truth < done.crossing.high
    assert "is gone at" in done.why


# Decisions


def test_a_gain_that_holds_is_promoted_and_one_that_reverses_rejected():
    good, bad = verdict.judge(ladder({"good": ladders.CONSTANT, "bad": ladders.REVERSING}), Criterion(), TARGET)
    assert (good.decision, good.trend) == ("promote", "persists")
    assert (bad.decision, bad.trend) == ("reject", "reverses")
    assert good.why.startswith("At the target it is worth at least 1.1") and good.why.endswith("as long.")
    assert good.remedies == [] and good.lower is not None and good.lower >= 1.02
    assert bad.upper is not None and bad.upper < 1.02


def test_a_fading_gain_is_not_promoted_where_another_floor_would_end_it():
    done = judge(ladder({"arm": ladders.LEVELLING}, replace(LONG, sd=0.003), seed=1))
    assert done.decision == "inconclusive" and done.trend == "shrinks"
    assert done.line.low is not None and done.line.low > 1.02, "the line alone would have promoted it"
    assert "levels off elsewhere" in done.why
    assert done.other_floor.low is not None and done.other_floor.high is not None
    assert done.other_floor.low < 1.0 < done.other_floor.high
    assert done.multiplier.low is not None and done.multiplier.low < 1.0, "the interval shown is the one that decides"


def test_noise_is_answered_with_inconclusive_and_with_what_may_settle_it():
    results = ladder({"arm": ladders.CONSTANT}, replace(SHORT, sd=0.01), seed=4)
    done = judge(results)
    assert done.decision == "inconclusive" and "anything from" in done.why
    assert len(done.remedies) >= 2 and {"rung", "seeds"} == {remedy.what for remedy in done.remedies}
    for remedy in done.remedies:
        assert remedy.probability is not None and 0.1 <= remedy.probability <= 1
        size = 1e15 if remedy.rung == "r3" else remedy.flops
        if size is not None:  # one size: as many runs of the arm as of the baseline
            assert remedy.total_flops == pytest.approx(2 * remedy.seeds * size)
        assert (remedy.flops is not None) == (remedy.what == "rung")
    assert judge(results).remedies == done.remedies, "the same results give the same advice"


def test_more_of_the_same_runs_settle_a_question_more_often():
    results = ladder({"arm": ladders.CONSTANT}, replace(SHORT, sd=0.01), seed=4)
    judged = verdict.JudgedLadder(
        Baseline.from_results(results, fits.fit_curve(results)), results, ["arm"], (), Criterion(), TARGET
    )
    futures = advice.Futures(judged.situation(0), 400, np.random.Generator(np.random.Philox(0)))
    chances = futures.settled([advice.Purchase((0, 1, 2, 3), pairs, None, 1.0) for pairs in (1, 8, 64)])
    assert chances[0] < chances[1] < chances[2]


def test_further_seeds_at_one_rung_count_as_far_as_seeds_explain_its_noise():
    counts = np.array([1, 1, 10, 0])
    assert significance.effective_counts(counts, np.array(1.0)) == pytest.approx(counts)
    alike = significance.effective_counts(counts, np.array(0.0))
    assert alike == pytest.approx([1 / 0.7, 1 / 0.7, 1 / 0.7, 0]), "the harmonic mean of 1, 1 and 10"
    half = significance.effective_counts(np.array([[2, 2, 2], [1, 1, 10]]), np.array([0.5, 0.5]))
    assert half[0] == pytest.approx(2) and 1 < half[1, 0] < half[1, 2] < 4


@pytest.mark.parametrize(("seeds", "further", "rung", "gain"), [(3, 9, "r4", 1.08), (2, 3, "r0", 1.12)])
def test_advice_decides_as_a_verdict_does_about_the_same_runs(seeds: int, further: int, rung: str, gain: float):
    """Else the share of possible truths that are decided is not the probability that is told."""
    decided, alike, arm = [], [], {"arm": ladders.line(gain, gain)}
    for seed in range(40):
        results = ladder(arm, replace(LONG, sd=0.006, seeds=seeds), seed)
        baseline = Baseline.from_results(results, fits.fit_curve(results, second_opinion=False))
        now = verdict.JudgedLadder(baseline, results, ["arm"], (), Criterion(), TARGET).situation(0)
        futures = advice.Futures(now, 1, np.random.Generator(np.random.Philox(seed)))
        more = ladder(arm, replace(LONG, sd=0.006, seeds=further), 1000 + seed)
        results += [replace(run, seed=100 + run.seed) for run in more if run.rung == rung]
        sizes = Baseline.from_results(results, fits.fit_curve(results, second_opinion=False))
        pairs = sizes.table([list(sizes.match(results, "arm"))])[:, 0]
        x = np.log(sizes.rungs.flops / now.scale)
        foreseen = bool(futures._decided(x, sizes.losses[None, None], pairs[:, None, None])[0, 0])
        (found,) = verdict.judge(results, Criterion(), TARGET, remedies=False)
        decided.append(found.decision != "inconclusive")
        alike.append(foreseen == decided[-1])
    assert 0.2 < np.mean(decided) < 0.8
    assert all(alike)


def test_a_change_whose_steps_take_too_long_is_rejected_however_good():
    done = judge(slowed(ladder({"arm": ladders.CONSTANT}), 1.5))
    assert done.decision == "reject" and "as long as the baseline's" in done.why
    assert done.slowdown.value == pytest.approx(1.5, rel=0.01)


def test_a_change_of_unknown_speed_is_not_promoted_where_the_baselines_is_known():
    done = judge(change(ladder({"arm": ladders.CONSTANT}), lambda run: run.arm == "arm", seconds=None))
    assert done.decision == "inconclusive" and "is not known" in done.why
    assert done.slowdown.value is None and done.wall_clock.value is None
    assert done.remedies == []


def test_a_table_without_seconds_is_judged_by_compute_and_says_so():
    done = judge(change(ladder({"arm": ladders.CONSTANT}), lambda run: True, seconds=None))
    assert done.decision == "promote" and done.why.endswith("seconds were not given.")
    assert any(note.startswith("Seconds were not given") for note in done.notes)


def test_better_per_flop_and_slower_per_second_is_said():
    done = judge(slowed(ladder({"arm": ladders.CONSTANT}), 1.2))
    assert done.faster_per_flop_slower_per_second and done.decision == "promote"
    assert done.wall_clock.value == pytest.approx(1.15 / 1.2, rel=0.03)
    assert any(note.startswith("Better per FLOP and slower per second") for note in done.notes)


def test_an_answer_that_hangs_on_the_floor_is_inconclusive():
    results = ladder({"arm": ladders.CONSTANT})
    fit = fits.fit_curve(results, second_opinion=False)
    unsure = replace(fit, alpha=Interval(fit.alpha.value, None, None))
    (done,) = verdict.judge(results, Criterion(), TARGET, fit=unsure)
    assert done.decision == "inconclusive" and "E and alpha" in done.why
    assert [remedy.what for remedy in done.remedies] == ["rung"]


def test_arms_and_looks_are_corrected_for_and_an_arm_without_a_change_is_not_counted():
    arms = {"aa": ladders.UNCHANGED, "one": ladders.CONSTANT, "two": ladders.CONSTANT}
    done = verdict.judge(ladder(arms), Criterion(level=0.06, looks=3), TARGET, unchanged=["aa"])
    assert [judged.arm for judged in done] == list(arms)
    assert [judged.bound_level for judged in done] == pytest.approx([0.06 / 2 / 3] * 3)
    assert {judged.multiplier.level for judged in done} == {0.06}


def test_the_bounds_that_decide_hold_under_every_form_that_is_shown():
    # Two-sided intervals at 0.1 have the ends of one-sided bounds at 0.05; a short ladder rules out no form.
    results = ladder({"arm": ladders.SHRINKING}, ladders.SHORT)
    done, shown = judge(results, level=0.05), judge(results, level=0.1)
    assert done.lower is not None and done.upper is not None and done.lower < done.upper
    for form in (shown.line, shown.other_floor, shown.fades):
        assert form.low is not None and form.high is not None
        assert done.lower <= form.low * 1.001 and done.upper >= form.high / 1.001, form


# Missing data


def test_a_missing_rung_is_a_gap_and_nothing_is_invented():
    results = [run for run in ladder({"arm": ladders.CONSTANT}) if (run.arm, run.rung) != ("arm", "r2")]
    done = judge(results)
    gap = done.rungs[2]
    assert (gap.rung, gap.pairs, gap.gap) == ("r2", 0, "no finished pair")
    assert gap.multiplier.value is None and gap.loss_difference is None and gap.slowdown is None and gap.without is None
    assert "r2: no finished pair." in done.notes
    assert done.multiplier.value == pytest.approx(1.15, rel=0.02) and done.decision == "promote"


def test_fewer_runs_of_an_arm_make_its_interval_wider():
    results = ladder({"arm": ladders.CONSTANT}, LONG, seed=4)
    fewer = [run for run in results if run.arm == BASELINE or run.seed < 2 or run.rung == "r0"]
    whole, part = judge(results), judge(fewer)
    assert [rung.pairs for rung in part.rungs] == [3, 2, 2, 2, 2]
    assert part.rungs[1].gap == "2 pairs of 3"
    widths = [math.log(done.multiplier.high / done.multiplier.low) for done in (whole, part)]  # pyright: ignore
    assert widths[1] > 1.05 * widths[0]


def test_two_rungs_are_too_few_for_a_trend_and_say_so():
    results = [run for run in ladder({"arm": ladders.CONSTANT}) if run.arm == BASELINE or run.rung in ("r0", "r4")]
    done = judge(results)
    assert (done.decision, done.trend) == ("inconclusive", "unknown")
    assert "compared at 2 rungs, and a trend needs three" in done.why
    assert done.multiplier == Interval(None, None, None) and done.lower is None and done.crossing is None
    assert done.rungs[0].multiplier.value == pytest.approx(1.15, rel=0.02)
    assert done.rungs[0].multiplier.low is not None


def test_an_arm_without_any_run_is_inconclusive():
    (done,) = verdict.judge(ladder({}), Criterion(), TARGET, arms=["planned"])
    assert (done.decision, done.trend) == ("inconclusive", "unknown")
    assert all(rung.gap == "no finished pair" for rung in done.rungs)
    json.dumps(done.to_json(), allow_nan=False)


def test_a_rung_that_the_baseline_lacks_is_noted():
    results = [run for run in ladder({"arm": ladders.CONSTANT}) if (run.arm, run.rung) != (BASELINE, "r3")]
    done = judge(results)
    assert [rung.rung for rung in done.rungs] == ["r0", "r1", "r2", "r4"]
    assert "r3: the baseline has no finished run there." in done.notes


def test_runs_that_diverged_keep_an_arm_from_being_promoted():
    results = change(
        ladder({"arm": ladders.CONSTANT}), lambda run: (run.arm, run.rung, run.seed) == ("arm", "r3", 1), loss=math.nan
    )
    done = judge(results)
    assert done.decision == "inconclusive" and "not finite at r3 seed 1" in done.why
    assert done.rungs[3].pairs == 2 and "r3 seed 1: its loss was not finite." in done.notes


def test_a_loss_at_the_floor_has_no_multiplier():
    results = change(ladder({"arm": ladders.CONSTANT}), lambda run: (run.arm, run.rung) == ("arm", "r4"), loss=1.7)
    done = judge(results)
    assert done.rungs[4].multiplier.value is None and "floor" in done.rungs[4].gap
    assert done.rungs[4].loss_difference == pytest.approx(1.7 - power_law()(1e15), abs=0.01)
    assert done.decision == "inconclusive" and "no amount of compute compares" in done.why
    assert done.rungs[0].multiplier.value == pytest.approx(1.15, rel=0.02) and done.multiplier.value is None


def test_one_seed_a_rung_still_has_an_interval_from_the_rungs_scatter():
    done = judge(ladder({"arm": ladders.CONSTANT}, replace(LONG, seeds=1)))
    assert done.multiplier.low is not None and done.rungs[0].multiplier.low is not None
    assert done.lack_of_fit_p is None and done.pairing.ratio is None
    assert any("No rung has two seeds" in note for note in done.notes)


def test_rungs_off_the_line_widen_the_interval_and_ask_for_no_seeds():
    results = ladder({"arm": ladders.CONSTANT}, LONG, seed=3)
    off = [
        replace(run, loss=run.loss + (0.05 if run.rung in ("r1", "r3") else -0.05)) if run.arm == "arm" else run
        for run in results
    ]
    done = judge(off)
    assert done.lack_of_fit_p is not None and done.lack_of_fit_p < 0.001
    assert done.decision == "inconclusive" and all(remedy.what == "rung" for remedy in done.remedies)
    assert any("do not lie on a line" in note for note in done.notes)


def test_an_arm_that_is_the_baseline_to_the_bit_is_worth_exactly_once_its_compute():
    results = [run for run in ladder({}, LONG) if run.arm == BASELINE]
    done = judge([*results, *(replace(run, arm="same") for run in results)])
    assert done.multiplier == Interval(1.0, 1.0, 1.0) and done.other_floor == Interval(1.0, 1.0, 1.0)
    assert (done.decision, done.trend, done.crossing) == ("reject", "none", None)
    assert done.pairing.ratio is None and done.lack_of_fit_p is None


def test_the_tables_of_the_readme_are_there():
    text = bench_ladder.README.read_text(encoding="utf-8")
    for name, rows in (
        ("regular", 8), ("decisions", 8), ("hard", len(list(bench_ladder.hard()))), ("public", 11), ("data", 6),
        ("advice", 2), ("looks", 4), ("apart", 3), ("repeated", 4),
    ):  # fmt: skip
        start, end = (bench_ladder.MARKS.format(what) for what in (name, f"end of {name}"))
        table = text.split(start)[1].split(end)[0].strip().splitlines()
        assert len(table) == rows + 2 and all(line.startswith("|") for line in table)


# What cannot be


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"flops": 0.0}, "flops = 0"), ({"tokens": 0}, "tokens = 0"), ({"loss": -1.0}, "loss = -1"),
        ({"seed": 0}, "there are 2 results of arm arm, rung r1, seed 0"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_named_and_refused(values: dict[str, float], fact: str):
    results = ladder({"arm": ladders.CONSTANT})
    odd = change(results, lambda run: (run.arm, run.rung, run.seed) == ("arm", "r1", 1), **values)
    with pytest.raises(FitError, match=fact):
        judge(odd)


def test_losses_in_bits_beside_losses_in_nats_are_told_by_their_ratio():
    results = ladder({"arm": ladders.CONSTANT})
    bits = [replace(run, loss=run.loss / math.log(2)) if run.arm == "arm" else run for run in results]
    with pytest.raises(FitError, match="as bits are"):
        judge(bits)


def test_a_target_below_the_largest_rung_is_refused():
    with pytest.raises(FitError, match="lies below the largest rung"):
        verdict.judge(ladder({"arm": ladders.CONSTANT}), Criterion(), 1e14)


def test_losses_without_noise_have_a_value_and_no_verdict():
    done = judge(ladder({"arm": ladders.CONSTANT}, replace(LONG, sd=0.0)))
    assert (done.decision, done.trend) == ("inconclusive", "unknown") and "no noise at all" in done.why
    assert done.multiplier.value == pytest.approx(1.15, rel=1e-3) and done.multiplier.low is None


def test_runs_without_a_common_seed_are_compared_as_unpaired():
    results = ladder({"arm": ladders.CONSTANT})
    done = judge([replace(run, seed=run.seed + 10) if run.arm == "arm" else run for run in results])
    assert done.decision == "promote" and done.pairing.ratio is None
    assert [rung.pairs for rung in done.rungs] == [3] * 5
    assert "r0: no common seed, so its runs are compared as unpaired." in done.notes


# Forms, arms and looks


def test_a_gain_that_fades_to_a_constant_is_not_extrapolated_through_it():
    done = judge(ladder({"arm": ladders.fading(5, 1.1, 0.4)}, replace(LONG, seeds=1, sd=0.002)))
    assert done.line.high is not None and done.line.high < 1.0, "the line would have rejected it"
    assert done.decision == "promote" and done.trend == "shrinks" and done.bend_p is not None and done.bend_p < 0.05
    assert done.multiplier.low is not None and done.multiplier.high is not None
    assert done.multiplier.low < 1.1 * 5 ** (1e4**-0.4) < done.multiplier.high


def test_what_nobody_has_seen_is_not_decided():
    """The gain of the last rung is above min_gain, and every form has it below at the target."""
    done = judge(ladder({"arm": ladders.line(1.6, 0.95)}, replace(LONG, sd=1e-4)))
    assert done.upper is not None and done.upper < 1.02
    assert done.decision == "inconclusive" and "only beyond r4" in done.why


def test_trends_are_corrected_for_the_number_of_arms():
    one = ladder({"arm": ladders.line(1.15, 1.12)}, replace(LONG, sd=0.003), seed=3)
    arms = {f"more{k}": ladders.UNCHANGED for k in range(9)} | {"arm": ladders.line(1.15, 1.12)}
    alone, among = (verdict.judge(runs, Criterion(), TARGET)[-1].trend_p
                    for runs in (one, ladder(arms, replace(LONG, sd=0.003), seed=3)))  # fmt: skip
    assert alone is not None and among is not None and among > alone


def test_a_report_that_may_be_read_at_any_time_has_wider_bounds():
    results = ladder({"arm": ladders.CONSTANT}, LONG)
    once, always = (verdict.judge(results, Criterion(looks=looks), TARGET)[0] for looks in (1, "any"))
    assert once.lower is not None and always.lower is not None and once.upper is not None and always.upper is not None
    price = math.log(always.upper / always.lower) / math.log(once.upper / once.lower)
    assert 1.5 < price < 2.5 and always.bound_level < 0.01


def test_reading_after_every_seed_keeps_the_level_where_looks_are_corrected_for():
    found = ladders.look_often(LONG, ladders.BARELY, 300, seed=5)
    naive, twelve, always = (found[rule] for rule in ladders.RULES[1:])
    assert naive.promote[-1] > 0.055 and naive.reject[-1] > 0.055, "read naively, the level does not hold"
    for looked in (twelve, always):
        assert looked.promote[-1] <= 0.05 and looked.reject[-1] <= 0.05


@pytest.mark.slow
def test_advice_settles_about_as_often_as_it_says():
    found = [ladders.follow(30, effects, seed=7) for effects in (False, True)]
    told, settled = (sum(getattr(one, name) for one in found) / 2 for name in ("stated", "settled"))
    assert settled == pytest.approx(told, abs=0.05 + 2 * math.sqrt(0.25 / 60))


@pytest.mark.parametrize("seed", range(8))
def test_with_anything_missing_or_absurd_there_is_an_answer_or_a_refusal(seed: int):
    random = np.random.Generator(np.random.Philox(seed))
    arms = {"const": ladders.CONSTANT, "better": ladders.line(1, 50), "worse": ladders.line(1, 0.01)}
    for rungs, decades, seeds, sd in ((3, 0.5, 2, 0.3), (4, 1.5, 1, 0.05), (5, 3.0, 3, 0.0), (6, 3.0, 2, 0.005)):
        results = ladder(arms, Design.spanning(rungs, decades, seeds=seeds, sd=sd), seed)
        results = [run for run in results if random.random() > 0.15]
        results = change(results, lambda _: random.random() < 0.05, loss=math.inf)
        results = change(results, lambda _: random.random() < 0.2, seconds=None)
        with contextlib.suppress(FitError):
            for target in (1e15, 1e16, 1e20):
                for done in verdict.judge(results, Criterion(), target, arms=[*arms, "none"], remedies=target == 1e16):
                    json.dumps(done.to_json(), allow_nan=False)
                    assert done.decision != "promote" or (done.lower is not None and done.lower >= 1.02)
