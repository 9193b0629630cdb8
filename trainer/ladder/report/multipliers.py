"""The picture of multipliers against compute or text, with a panel for each arm."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report import drawing
from trainer.ladder.report.estimates import Tree
from trainer.show import units
from trainer.show.figure import BAD, GOOD, GREY, PAPER, SOFT, UNSURE, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
SHARED_AXIS_UP_TO = 12.0
"""Panels share their y axis unless a shared one would be this many times as tall as the smallest panel's."""
FORMS = {
    "line": ("if it is a line", (0, (6, 1.5, 1, 1.5))),
    "other_floor": ("if its loss levels off elsewhere", (0, (1, 1.6))),
    "fades": ("if it fades to a constant", (0, (3, 1, 1, 1, 1, 1))),
}
"""Forms by which a line is continued beyond the rungs: their names and dashes."""
DECISION_COLOURS = {"promote": GOOD, "reject": BAD, "inconclusive": UNSURE, drawing.NOISE_FLOOR: SOFT}


def draw(tree: Tree) -> "Figure | None":
    """Draw each arm's multipliers at the rungs and at the target; None if no rung has any."""
    shown = [verdict for verdict in tree["verdicts"] if any(_known(rung) for rung in verdict["rungs"])]
    if not shown:
        return None
    columns = 2 if len(shown) == 4 else min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    limits = []
    for verdict in shown:
        intervals = [verdict["multiplier"], *(rung["multiplier"] for rung in verdict["rungs"])]
        beyond = {"value": None, "low": verdict["other_floor"]["value"], "high": None}
        limits.append(drawing.multiplier_limits([*intervals, beyond], tree["criterion"]["min_gain"]))
    widest = min(low for low, _ in limits), max(high for _, high in limits)
    smallest = min(math.log(high / low) for low, high in limits)
    if math.log(widest[1] / widest[0]) < SHARED_AXIS_UP_TO * smallest:
        limits = [widest] * len(shown)
    figure = new_figure(max(9 if columns > 1 else 5.6, 3.2 * columns), 2.9 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    panels = list(grid.flat)
    for axes, verdict, ends in zip(panels, shown, limits, strict=False):
        _draw_arm(axes, tree, verdict, ends)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    # The lowest panel of each column has the labels, also above an empty place.
    for axes in panels[max(0, len(shown) - columns) : len(shown)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(drawing.amount_label(tree))
    for axes in grid[:, 0]:
        axes.set_ylabel(drawing.multiplier_label(tree))
    handles = _legend(tree)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), fontsize=8)
    return figure


def _known(rung: Tree) -> bool:
    return rung["multiplier"]["value"] is not None


def _draw_arm(axes: "Axes", tree: Tree, verdict: Tree, limits: tuple[float, float]) -> None:
    arm = verdict["arm"]
    colour, mark = drawing.arm_styles(tree)[arm]
    drawing.amount_axis(axes, tree)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    drawing.multiplier_axis(axes.yaxis)
    drawing.reference_lines(tree, axes.axhline)
    line, target = tree["lines"].get(arm), drawing.amount(tree, tree["target"])
    if line is not None:
        _draw_line(axes, line, drawing.amount(tree, tree["rungs"][-1]), colour)
    style: Any = {"marker": mark, "markersize": 5.5, "markeredgecolor": PAPER, "markeredgewidth": 0.6, "zorder": 4}
    if rungs := list(filter(_known, verdict["rungs"])):
        at, intervals = [rung["flops"] for rung in rungs], [rung["multiplier"] for rung in rungs]
        drawing.error_bars(axes, at, intervals, color=colour, capsize=2.5, linewidth=1.2, **style)
    if verdict["multiplier"]["value"] is not None:
        style = {"markersize": 6, "linewidth": 1.8, "capsize": 4, "zorder": 5, **drawing.hollow("D")}
        value = verdict["multiplier"]["value"]
        drawing.error_bar(axes, target, value, verdict["multiplier"], color=colour, **style)
    for prediction in _measured_at_target(tree):
        if prediction["arm"] == arm:
            axes.plot([target], [prediction["measured"]["value"]], marker="*", markersize=13, color=colour,
                      markeredgecolor=PAPER, linestyle="", zorder=6)  # fmt: skip
    # A rung without a multiplier says so: an empty place could be read as "not planned".
    known = {rung["rung"] for rung in verdict["rungs"] if _known(rung)}
    for rung in tree["rungs"]:
        if rung["name"] not in known:
            place: Any = {"xycoords": axes.get_xaxis_transform(), "rotation": 90, "ha": "center", "va": "bottom"}
            axes.annotate("no pair", (drawing.amount(tree, rung), 0.02), fontsize=7.5, color=SOFT, **place)
    decided = (drawing.final(tree, arm) or verdict)["decision"]
    axes.set_title(shortened(arm, 30 - len(decided)), color=colour if colour != GREY else SOFT)
    axes.set_title(f"{units.SIGNS[decided]} {decided}", loc="right", fontsize=9, color=DECISION_COLOURS[decided])


def _draw_line(axes: "Axes", line: Tree, last_rung: float, colour: str) -> None:
    """The multiplier and its band, solid up to the largest rung, dashed where it extrapolates; there with each form."""
    flops = line["flops"]
    value, low, high = (drawing.floats(line[key]) for key in ("value", "low", "high"))
    known = sum(point <= last_rung * 1.001 for point in flops)
    beyond = slice(known - 1, None)
    axes.fill_between(flops, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(flops[:known], value[:known], color=colour, linewidth=1.6)
    axes.plot(flops[beyond], value[beyond], color=colour, linewidth=1.4, linestyle=drawing.DASHED)
    for key, (_, dashes) in FORMS.items():
        axes.plot(flops[beyond], drawing.floats(line[key])[beyond], color=colour, linewidth=0.9, linestyle=dashes)


def _measured_at_target(tree: Tree) -> Sequence[Tree]:
    at_target = (p for p in tree["multiplier_predictions"] if p["rung"] == tree["target"]["rung"])
    return [prediction for prediction in at_target if prediction["measured"] and prediction["measured"]["value"]]


def _legend(tree: Tree) -> list[Any]:
    from matplotlib.lines import Line2D

    percent = units.percent(1 - tree["criterion"]["level"])
    entries = [
        Line2D([], [], color=SOFT, marker="o", linewidth=1.2, label=f"measured, {percent} interval"),
        Line2D([], [], color=SOFT, linestyle=drawing.DASHED, label="predicted, over all forms", **drawing.hollow("D")),
        *(Line2D([], [], color=SOFT, linewidth=0.9, linestyle=dashes, label=name) for name, dashes in FORMS.values()),
        *drawing.least_useful(tree),
        Line2D([], [], color=SOFT, linestyle=drawing.DOTTED, marker="|", linewidth=0, markersize=11, label="target"),
    ]
    if _measured_at_target(tree):
        star = Line2D([], [], color=SOFT, marker="*", markersize=11, linestyle="", label="measured at the target")
        entries.append(star)
    return entries
