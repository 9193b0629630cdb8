"""Loss against compute, as a picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.drawing import (
    GAPS,
    by_compute,
    colours,
    ends_of,
    floats,
    mark_target,
    marks,
)
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE
from trainer.show import units
from trainer.show.figure import INK, PAPER, SOFT, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(tree: Tree) -> "Figure | None":
    if not any(run["loss"] is not None for run in tree["runs"]) or not tree["rungs"]:
        return None
    figure = new_figure(9, 7.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 4])
    unit = units.LOSS_UNITS[tree["unit"]]
    curve = tree["curve"]
    if curve is not None:
        _draw_curve(above, below, tree)
    for number, arm in enumerate((BASELINE, *(arm["name"] for arm in tree["arms"]))):
        _draw_runs(above, below, tree, arm, number)
    _draw_target(above, below, tree)
    by_compute(above, tree, label=False)
    by_compute(below, tree)
    mark_target(above, tree)
    above.set_ylabel(
        f"{tree['metric']} loss ({unit})" if tree["unit"] != "bits_per_byte" else f"{tree['metric']}, {unit}"
    )
    what = "the baseline's curve" if curve is not None else "the baseline's mean"
    below.set_ylabel(f"minus {what}\n({units.SHORT_LOSS_UNITS[tree['unit']]})")
    handles, labels = above.get_legend_handles_labels()
    gaps = [mark for mark in below.get_lines() if mark.get_label() in GAPS]
    once = dict(zip(labels, handles, strict=True)) | {str(mark.get_label()): mark for mark in gaps}
    # A falling curve leaves the lower left free; points of few rungs, the middle.
    above.legend(once.values(), once.keys(), loc="lower left" if curve else "upper center",
                 ncols=1 if len(once) < 9 else 2)  # fmt: skip
    return figure


def _draw_curve(above: "Axes", below: "Axes", tree: Tree) -> None:
    curve, last = tree["curve"], tree["rungs"][-1]["flops"]
    flops, value = curve["flops"], floats(curve["value"])
    low, high = floats(curve["low"]), floats(curve["high"])
    percent = f"{100 * (1 - tree['criterion']['level']):.3g} %"
    above.fill_between(flops, low, high, color=INK, alpha=0.1, linewidth=0, label=f"{percent} interval of the curve")
    known = sum(one <= last * 1.001 for one in flops)
    fit = tree["fit"]["curve"]
    above.plot(
        flops[:known],
        value[:known],
        color=INK,
        linewidth=1.4,
        label=f"baseline's curve: E {fit['E']:.3g}, α {fit['alpha']:.3f}",
    )
    above.plot(flops[known - 1 :], value[known - 1 :], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    under, over = ([edge - middle for edge, middle in zip(side, value, strict=True)] for side in (low, high))
    below.fill_between(flops, under, over, color=INK, alpha=0.1, linewidth=0)
    below.axhline(0, color=INK, linewidth=1.2)


def _draw_runs(above: "Axes", below: "Axes", tree: Tree, arm: str, number: int) -> None:
    """Each seed small, their mean large; in the lower panel beside each other what lies at one compute."""
    colour, mark = colours(tree)[arm], marks(tree)[arm]
    count = 1 + len(tree["arms"])
    step = math.log(tree["target"]["flops"] / tree["rungs"][0]["flops"]) * 0.014
    aside = math.exp(step * (number - (count - 1) / 2))
    means: list[tuple[float, float, float]] = []
    for rung in [*tree["rungs"], {"name": tree["target"]["rung"]}]:
        runs = [run for run in tree["runs"] if (run["arm"], run["rung"]) == (arm, rung["name"])]
        losses = [run["loss"] for run in runs if run["loss"] is not None]
        base = _reference(tree, rung["name"], runs)
        if not losses or base is None:
            means.append((math.nan, math.nan, math.nan))  # the gap
            if runs and base is not None:
                _mark_gap(below, runs, aside, colour)
            continue
        x, mean = runs[0]["flops"] * aside, math.fsum(losses) / len(losses)
        at = [runs[0]["flops"]] * len(losses)
        above.plot(at, losses, linestyle="", marker=mark, markersize=3, color=colour, alpha=0.35)
        away = [loss - base for loss in losses]
        below.plot([x] * len(losses), away, linestyle="", marker=mark, markersize=3.4, color=colour, alpha=0.4)
        below.plot([x, x], [min(away), max(away)], color=colour, linewidth=1.1, alpha=0.6)
        means.append((x, mean, mean - base))
        if any(run["diverged"] for run in runs):
            _mark_gap(below, runs, aside, colour)
    xs, middles, offsets = zip(*means, strict=True)
    look: Any = {"color": colour, "marker": mark, "markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 0.7}
    above.plot([x / aside for x in xs], middles, linestyle="", label=shortened(arm, 30), zorder=4, **look)
    below.plot(xs, offsets, linewidth=0.9, linestyle="" if arm == BASELINE else (0, (2, 2)), zorder=4, **look)


def _reference(tree: Tree, rung: str, runs: Sequence[Tree]) -> float | None:
    """What losses are held against in the lower panel: the curve at that compute, else the baseline's mean."""
    if tree["fit"] is not None and runs:
        curve = tree["fit"]["curve"]
        return curve["E"] + curve["A"] * (runs[0]["flops"] / curve["scale"]) ** -curve["alpha"]
    return next((one["mean"] for one in tree["noise"] if (one["arm"], one["rung"]) == (BASELINE, rung)), None)


def _mark_gap(axes: "Axes", runs: Sequence[Tree], aside: float, colour: str) -> None:
    """At the lower edge: ✕ where a loss was not a number, a ring where there is none."""
    diverged = any(run["diverged"] for run in runs)
    label = GAPS[0] if diverged else GAPS[1]
    axes.plot([runs[0]["flops"] * aside], [0.0], marker="X" if diverged else "o", markersize=6.5 if diverged else 5,
              color=colour, markerfacecolor=colour if diverged else "none", transform=axes.get_xaxis_transform(),
              clip_on=False, zorder=6, linestyle="", label=label)  # fmt: skip


def _draw_target(above: "Axes", below: "Axes", tree: Tree) -> None:
    """The baseline's prediction at the target."""
    rung = tree["target"]["rung"]
    told = next((one for one in tree["predictions"] if (one["rung"], one["arm"]) == (rung, BASELINE)), None)
    if told is None or told["predicted"] is None or told["predicted"]["value"] is None:
        return
    value = told["predicted"]["value"]
    for axes, base, label in ((above, 0.0, f"predicted: {value:.4f}"), (below, value, None)):
        axes.errorbar([told["flops"]], [value - base], yerr=ends_of(value, told["predicted"]), color=SOFT, capsize=4,
                      fmt="D", markersize=6, markerfacecolor=PAPER, linewidth=1.3, zorder=3, label=label)  # fmt: skip
