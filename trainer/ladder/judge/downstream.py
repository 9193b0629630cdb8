"""What a table's second metric, such as the accuracy of a task, will be at the target: through the loss."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.errors import FitError
from trainer.ladder.judge import meaning
from trainer.ladder.judge.meaning import TableRun
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.downstream import Link, ranking
from trainer.ladder.stats.records import BASELINE, Curve, Interval, RunResult
from trainer.ladder.stats.significance import LACK_OF_FIT

MANY = 10**12  # runs whose mean has no noise
NO_SHARE = {"bits", "bpb", "nats", "loss", "perplexity", "ppl"}
"""Words of a metric that lies between 0 and 1 and is yet no share."""


def estimate(column: str, runs: Sequence[TableRun], results: Sequence[RunResult], tree: Tree) -> Tree:
    """Return the metric's link to the loss, its predictions at the target, and the ranking at the largest size."""
    known = [run for run in runs if run.metric is not None and math.isfinite(run.loss)]
    metric = np.array([run.metric for run in known], dtype=float)
    found: Tree = {"column": column, "runs": len(known), "refused": None, "link": None, "predictions": []}
    try:
        loss, level = np.array([run.loss for run in known]), tree["criterion"]["level"]
        link = Link(loss, metric, [run.arm for run in known], _whole(column, metric), level)
        # Where a smaller loss goes with less of it, less is better.
        better = -1.0 if float(np.cov(loss, metric)[0, 1]) > 0 else 1.0
        ranked = ranking(results, {(run.arm, run.rung, run.seed or 0): better * (run.metric or 0.0) for run in known})
        found |= {
            "link": {"form": link.form, "sd": link.sd, "arms_sd": link.arms_sd, "arms_differ_p": link.arms_differ_p},
            "ranking": [row | {"value": better * row["value"]} for row in ranked],
        }
        return found | {"predictions": _predictions(link, results, tree)}
    except FitError as error:
        return found | {"refused": str(error)}


def _whole(column: str, metric: np.ndarray) -> float | None:
    """The value of all for a share; None for a metric that is none."""
    said = set(meaning.words(column).split("_"))
    if not len(metric) or said & NO_SHARE or metric.min() < 0:
        return None
    if metric.max() <= 1:
        return 1.0
    return 100.0 if metric.max() <= 100 and said & {*meaning.MORE_IS_BETTER, "error", "percent"} else None


def _predictions(link: Link, results: Sequence[RunResult], tree: Tree) -> list[Tree]:
    if tree["fit"] is None:
        raise FitError("the metric is predicted through the loss, and no curve of the loss in compute was fitted.")
    curve, flops = Curve(**tree["fit"]["curve"]), tree["target"]["flops"]
    base = fits.predict([run for run in results if run.arm == BASELINE], flops, MANY, link.level).predicted
    found = [_prediction(BASELINE, base, link.predict(base), None)]
    for verdict in tree["verdicts"]:
        # More compute, less loss: the ends change places.
        value, high, low = (
            None if m is None else curve.loss_at(flops * m)
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
