"""A second metric at the target, such as a task's accuracy or another held-out set's score: predicted by the loss.

A ladder names a held-out set of its own runs (`downstream` in its file), a table a column.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.errors import FitError
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.downstream import Link, ranking
from trainer.ladder.stats.records import BASELINE, Curve, Interval, RunResult
from trainer.ladder.stats.significance import LACK_OF_FIT

MANY = 10**12  # runs whose mean has no noise


def estimate(
    name: str, metric: Mapping[tuple[str, str, int], float], results: Sequence[RunResult], tree: Tree, target: float,
    most: float | None = None,
) -> Tree:  # fmt: skip
    """Return the metric's link to the loss, its predictions at the target, and the ranking at the largest size.

    `metric` has the values of runs by (arm, rung, seed), `tree` the fit and the verdicts, `target` the amount that they
    are about. `most` is the value of all where the metric is a share, and None where it is none.
    """
    known = [run for run in results if (run.arm, run.rung, run.seed) in metric and math.isfinite(run.loss)]
    values = np.array([metric[run.arm, run.rung, run.seed] for run in known], dtype=float)
    found: Tree = {"column": name, "runs": len(known), "refused": None, "link": None, "predictions": []}
    try:
        loss, level = np.array([run.loss for run in known]), tree["criterion"]["level"]
        link = Link(loss, values, [run.arm for run in known], most, level)
        # Where a smaller loss goes with less of it, less is better.
        better = -1.0 if float(np.cov(loss, values)[0, 1]) > 0 else 1.0
        ranked = ranking(results, {key: better * value for key, value in metric.items()})
        found |= {
            "link": {"form": link.form, "sd": link.sd, "arms_sd": link.arms_sd, "arms_differ_p": link.arms_differ_p},
            "ranking": [row | {"value": better * row["value"]} for row in ranked],
        }
        return found | {"predictions": _predictions(link, results, tree, target)}
    except FitError as error:
        return found | {"refused": str(error)}


def _predictions(link: Link, results: Sequence[RunResult], tree: Tree, target: float) -> list[Tree]:
    if tree["fit"] is None:
        raise FitError("the metric is predicted through the loss, and no curve of the loss in compute was fitted.")
    curve = Curve(**tree["fit"]["curve"])
    base = fits.predict([run for run in results if run.arm == BASELINE], target, MANY, link.level).predicted
    found = [_prediction(BASELINE, base, link.predict(base), None)]
    for verdict in tree["verdicts"]:
        # More compute, less loss: the ends change places.
        value, high, low = (
            None if m is None else curve.loss_at(target * m)
            for m in (verdict["multiplier"][key] for key in ("value", "low", "high"))
        )
        own = Interval(value, low, high, link.level)
        found.append(_prediction(
            verdict["arm"], both := _with(own, base), link.predict(both), link.difference(own, base.value or 0.0)
        ))  # fmt: skip
    return found


def _with(own: Interval, base: Interval) -> Interval:
    """An arm's loss with the error of the baseline's, of which the multiplier knows nothing."""
    if None in (own.value, own.low, own.high, base.value, base.low, base.high):
        return Interval(own.value, None, None, own.level)
    (value, low, high), (middle, least, most) = (
        [float(end) for end in (it.value, it.low, it.high) if end is not None] for it in (own, base)
    )
    return Interval(
        value,
        value - math.hypot(value - low, middle - least),
        value + math.hypot(high - value, most - middle),
        own.level,
    )


def _prediction(arm: str, loss: Interval, metric: Interval, difference: Interval | None) -> dict[str, Any]:
    return {
        "arm": arm, "loss": loss.to_json(), "metric": metric.to_json(),
        "difference": difference and difference.to_json(),
    }  # fmt: skip


def cautions(tree: Tree) -> list[str]:
    """Return a sentence for each reason not to trust the link."""
    link = tree["link"]
    if link and link["arms_differ_p"] is not None and link["arms_differ_p"] < LACK_OF_FIT:
        return [
            f"Arms lie off the link of {tree['column']} and loss by more than their runs do: what their loss says of "
            f"{tree['column']} is uncertain by {link['arms_sd']:.2g}."
        ]
    return []
