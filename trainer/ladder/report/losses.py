"""The picture of loss against compute or text: losses above, their distances from the baseline's curve below."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.drawing import (
    DASHED,
    amount,
    amount_axis,
    amount_label,
    arm_styles,
    error_bar,
    floats,
    hollow,
)
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE
from trainer.show import units
from trainer.show.figure import INK, PAPER, SOFT, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIVERGED, WAITING = "not a number", "no run has finished"
"""Labels of gaps."""


def draw(tree: Tree) -> "Figure | None":
    """Draw the losses of all runs; None if no run has one."""
    if not any(run["loss"] is not None for run in tree["runs"]) or not tree["rungs"]:
        return None
    figure = new_figure(9, 7.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 4])
    fitted = tree["curve"] is not None
    if fitted:
        _draw_curve(above, below, tree)
    for number, arm in enumerate(arm_styles(tree)):
        _draw_runs(above, below, tree, arm, number)
    _draw_target(above, below, tree)
    for axes in (above, below):
        amount_axis(axes, tree)
    above.annotate("target", (amount(tree, tree["target"]), 1.0), xycoords=above.get_xaxis_transform(), xytext=(0, 3),
                   textcoords="offset points", ha="center", va="bottom", color=SOFT, fontsize=8.5)  # fmt: skip
    unit = units.LOSS_UNITS[tree["unit"]]
    in_bits = tree["unit"] == "bits_per_byte"
    above.set_ylabel(f"{tree['metric']}, {unit}" if in_bits else f"{tree['metric']} loss ({unit})")
    below.set_xlabel(amount_label(tree))
    reference = "curve" if fitted else "mean"
    below.set_ylabel(f"minus the baseline's {reference}\n({units.SHORT_LOSS_UNITS[tree['unit']]})")
    handles, labels = above.get_legend_handles_labels()
    gaps = [mark for mark in below.get_lines() if mark.get_label() in (DIVERGED, WAITING)]
    # A dict: however many gaps there are, the legend explains each kind once.
    entries = dict(zip(labels, handles, strict=True)) | {str(mark.get_label()): mark for mark in gaps}
    # A falling curve leaves the lower left free; points of few rungs, the middle.
    above.legend(entries.values(), entries.keys(), loc="lower left" if fitted else "upper center",
                 ncols=1 if len(entries) < 9 else 2)  # fmt: skip
    return figure


def _draw_curve(above: "Axes", below: "Axes", tree: Tree) -> None:
    """The baseline's curve and its band: solid up to the largest rung, dashed where it extrapolates."""
    curve, fit, last_rung = tree["curve"], tree["fit"]["curve"], amount(tree, tree["rungs"][-1])
    flops = curve["flops"]
    value, low, high = (floats(curve[key]) for key in ("value", "low", "high"))
    known = sum(point <= last_rung * 1.001 for point in flops)  # 1.001: the grid is rounded
    percent = units.percent(1 - tree["criterion"]["level"])
    above.fill_between(flops, low, high, color=INK, alpha=0.1, linewidth=0, label=f"{percent} interval of the curve")
    label = f"baseline's curve: E {fit['E']:.3g}, α {fit['alpha']:.3f}"
    above.plot(flops[:known], value[:known], color=INK, linewidth=1.4, label=label)
    above.plot(flops[known - 1 :], value[known - 1 :], color=INK, linewidth=1.2, linestyle=DASHED)
    under, over = ([edge - middle for edge, middle in zip(side, value, strict=True)] for side in (low, high))
    below.fill_between(flops, under, over, color=INK, alpha=0.1, linewidth=0)
    below.axhline(0, color=INK, linewidth=1.2)


def _draw_runs(above: "Axes", below: "Axes", tree: Tree, arm: str, number: int) -> None:
    """Draw each seed small and their mean large. In the lower panel, arms of one amount stand side by side."""
    colour, mark = arm_styles(tree)[arm]
    step = math.log(amount(tree, tree["target"]) / amount(tree, tree["rungs"][0])) * 0.014
    shift = math.exp(step * (number - len(tree["arms"]) / 2))
    means: list[tuple[float, float, float]] = []
    # All runs of an arm are one artist: a picture of twelve arms has a thousand of them.
    seeds: list[tuple[float, float, float]] = []
    spans: list[tuple[float, float]] = []
    for rung in [*(rung["name"] for rung in tree["rungs"]), tree["target"]["rung"]]:
        runs = [run for run in tree["runs"] if (run["arm"], run["rung"]) == (arm, rung)]
        losses = [run["loss"] for run in runs if run["loss"] is not None]
        reference = _reference(tree, rung, runs)
        if runs and reference is not None and (not losses or any(run["diverged"] for run in runs)):
            _mark_gap(below, runs, amount(tree, runs[0]) * shift, colour)
        if not losses or reference is None:
            means.append((math.nan, math.nan, math.nan))  # a gap in the line
            continue
        at, mean = amount(tree, runs[0]), math.fsum(losses) / len(losses)
        seeds += [(at, loss, loss - reference) for loss in losses]
        spans += [(at, min(losses) - reference), (at, max(losses) - reference), (math.nan, math.nan)]
        means.append((at, mean, mean - reference))
    if seeds:
        amounts, losses, distances = zip(*seeds, strict=True)
        faint: Any = {"linestyle": "", "marker": mark, "color": colour}
        above.plot(amounts, losses, markersize=3, alpha=0.35, **faint)
        below.plot([value * shift for value in amounts], distances, markersize=3.4, alpha=0.4, **faint)
        amounts, distances = zip(*spans, strict=True)
        below.plot([value * shift for value in amounts], distances, color=colour, linewidth=1.1, alpha=0.6)
    amounts, losses, distances = zip(*means, strict=True)
    style: Any = {"color": colour, "marker": mark, "markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 0.7}
    above.plot(amounts, losses, linestyle="", label=shortened(arm, 30), zorder=4, **style)
    below.plot([value * shift for value in amounts], distances, linewidth=0.9, zorder=4,
               linestyle="" if arm == BASELINE else (0, (2, 2)), **style)  # fmt: skip


def _reference(tree: Tree, rung: str, runs: Sequence[Tree]) -> float | None:
    """The loss that the lower panel subtracts: the curve's at that amount, else the baseline's mean."""
    if tree["fit"] is not None and runs:
        curve = tree["fit"]["curve"]
        return curve["E"] + curve["A"] * (amount(tree, runs[0]) / curve["scale"]) ** -curve["alpha"]
    return next((row["mean"] for row in tree["noise"] if (row["arm"], row["rung"]) == (BASELINE, rung)), None)


def _mark_gap(axes: "Axes", runs: Sequence[Tree], at: float, colour: str) -> None:
    """At the lower edge: a cross if a run diverged, a ring if none has finished."""
    diverged = any(run["diverged"] for run in runs)
    axes.plot([at], [0.0], marker="X" if diverged else "o", markersize=6.5 if diverged else 5,
              color=colour, markerfacecolor=colour if diverged else "none", transform=axes.get_xaxis_transform(),
              clip_on=False, zorder=6, linestyle="", label=DIVERGED if diverged else WAITING)  # fmt: skip


def _draw_target(above: "Axes", below: "Axes", tree: Tree) -> None:
    """Draw the baseline's predicted loss at the target."""
    wanted = (tree["target"]["rung"], BASELINE)
    prediction = next((p for p in tree["predictions"] if (p["rung"], p["arm"]) == wanted and p["predicted"]), None)
    if prediction is None or prediction["predicted"]["value"] is None:
        return
    value = prediction["predicted"]["value"]
    for axes, reference, label in ((above, 0.0, f"predicted: {value:.4f}"), (below, value, None)):
        error_bar(axes, prediction["flops"], value - reference, prediction["predicted"], color=SOFT, capsize=4,
                  markersize=6, linewidth=1.3, zorder=3, label=label, **hollow("D"))  # fmt: skip
