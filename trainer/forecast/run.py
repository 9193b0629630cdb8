"""A forecast: replicates of one scenario, what they say together, and what the source of the scenario says."""

import math
from typing import Any

import numpy as np

from trainer.forecast import scenario as scenarios
from trainer.forecast.scenario import DAY, Scenario
from trainer.forecast.simulator import PARTS, Replicate, simulate
from trainer.show import units

INTERVALS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Checkpoint intervals that are tried, as multiples of the scenario's own."""
LEVEL = 0.95
DRAWN = 0
"""Number of the replicate whose incidents and timeline are shown."""


def forecast(scenario: Scenario) -> dict[str, Any]:
    """Return the forecast as a tree: goodput, time by part, time lost by cause, best checkpoint interval, source."""
    settings = draw(scenario)
    replicates = [simulate(drawn, seed, keep_course=seed == DRAWN) for seed, drawn in enumerate(settings)]
    goodput = [replicate.goodput for replicate in replicates]
    failures = [sum(replicate.failures.values()) for replicate in replicates]
    tree = {
        "question": scenario.question,
        "scenario": scenario.model_dump(exclude={"question", "published"}),
        "goodput": mean_interval(goodput),
        "range": quantiles(goodput),
        "parts": {name: float(np.mean([replicate.parts[name] for replicate in replicates])) for name in PARTS},
        "wall_seconds": scenario.days * DAY,
        "failures": {name: float(np.mean([replicate.failures[name] for replicate in replicates]))
                     for name in replicates[0].failures},
        "lost_by_cause": {name: float(np.mean([replicate.lost_by_cause[name] for replicate in replicates]))
                          for name in replicates[0].lost_by_cause},
        "mttf_hours": mean_interval([scenario.days * 24 / number for number in failures if number]),
        "checkpoint": checkpoint_intervals(scenario),
        "findings": scenarios.findings(scenario),
        "incidents": replicates[DRAWN].incidents,
        "timeline": _timeline(settings[DRAWN], replicates[DRAWN]),
    }  # fmt: skip
    tree["published"] = _held_against(scenario, tree)
    return tree


def _timeline(scenario: Scenario, replicate: Replicate) -> dict[str, Any]:
    """Return the timeline of the replicate that is drawn, with a title that says which one it is."""
    course = replicate.course
    assert course is not None
    found = course.timeline(scenario.step_seconds, replicate.incidents)
    count = len(found["incidents"])
    part = "" if course.is_whole else f", its first {units.duration(course.until)} with {count:,} incidents"
    saves = f"; {found['saves_unlisted']:,} checkpoints, not marked" if found["saves_unlisted"] else ""
    title = f"simulated run {DRAWN} of {scenario.replicates} (seed {scenario.seed}), "
    title += f"goodput {units.percent(replicate.goodput)}{part}{saves}"
    return {"title": title, "seed": [scenario.seed, DRAWN], **found}


def draw(scenario: Scenario) -> list[Scenario]:
    """Return the scenario of each replicate: settings in `vary` are drawn, each range in equal shares of its logarithm.

    A Latin hypercube: few replicates cover every range.
    """
    if not scenario.vary:
        return [scenario] * scenario.replicates
    from scipy import stats  # not above: its import takes seconds

    random = np.random.default_rng([scenario.seed, 1 << 31])
    places = stats.qmc.LatinHypercube(len(scenario.vary), rng=random).random(scenario.replicates)
    drawn = []
    for row in places:
        values = {
            name: math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
            for (name, (low, high)), place in zip(scenario.vary.items(), row, strict=True)
        }
        drawn.append(scenarios.with_values(scenario, values))
    return drawn


def mean_interval(values: list[float]) -> dict[str, float | None]:
    """The mean and its 95 % interval (Student's t over replicates); None where there is nothing to average."""
    if not values:
        return {"value": None, "low": None, "high": None}
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"value": mean, "low": None, "high": None}
    from scipy import stats

    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values))
    return {"value": mean, "low": max(0.0, mean - half), "high": mean + half}


def quantiles(values: list[float]) -> dict[str, float]:
    """The median, and the range in which 95 % of the replicates lie."""
    low, middle, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return {"value": float(middle), "low": float(low), "high": float(high)}


def checkpoint_intervals(scenario: Scenario) -> dict[str, Any]:
    """Return the interval in use, and goodput with others: {seconds, tried: [{seconds, goodput}], best_seconds}.

    The same random numbers for each, so that the differences are those of the interval.
    """
    used = scenarios.save_interval(scenario)
    floor = max(scenarios.write_seconds(scenario), scenario.step_seconds)
    tried = []
    for seconds in sorted({max(used * factor, floor) for factor in INTERVALS}):
        other = scenarios.with_values(scenario, {"policy.checkpoint_every_seconds": float(seconds)})
        runs = [simulate(other, seed).goodput for seed in range(min(scenario.replicates, 8))]
        tried.append({"seconds": seconds, "goodput": float(np.mean(runs))})
    return {"seconds": used, "tried": tried, "best_seconds": max(tried, key=lambda row: row["goodput"])["seconds"]}


def _held_against(scenario: Scenario, tree: dict[str, Any]) -> dict[str, Any] | None:
    """Compare with the published figures.

    Goodput agrees if the published range overlaps with 95 % of the replicates, the mean time to failure within 10 %.
    """
    published = scenario.published
    if published is None:
        return None
    checks = []
    if published.goodput is not None:
        low, high = published.goodput
        ours = tree["range"]
        checks.append({"what": "goodput", "published": [low, high], "ours": ours,
                       "agrees": ours["low"] <= high and ours["high"] >= low})  # fmt: skip
    if published.mttf_hours is not None:
        ours = tree["mttf_hours"]
        near = ours["value"] is not None and math.isclose(ours["value"], published.mttf_hours, rel_tol=0.1)
        checks.append({"what": "mttf_hours", "published": [published.mttf_hours] * 2, "ours": ours, "agrees": near})
    return {"source": published.source, "figure": published.figure, "why": published.why, "checks": checks}
