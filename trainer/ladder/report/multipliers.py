"""Compute multiplier against compute, a panel for each arm, as a picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.drawing import (
    COLUMNS,
    DECISION_COLOURS,
    MOST_UNLIKE,
    as_multipliers,
    by_compute,
    colours,
    decision,
    ends_of,
    floats,
    marks,
)
from trainer.ladder.report.estimates import Tree
from trainer.show import units
from trainer.show.figure import GOOD, GREY, PAPER, SOFT, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(tree: Tree) -> "Figure | None":
    shown = [one for one in tree["verdicts"] if any(_known(rung) for rung in one["rungs"])]
    if not shown:
        return None
    columns = 2 if len(shown) == 4 else min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    limits = [_limits(tree, one) for one in shown]
    alike = _widest(limits) < MOST_UNLIKE * min(math.log(high / low) for low, high in limits)
    figure = new_figure(max(9 if columns > 1 else 5.6, 3.2 * columns), 2.9 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    cells = list(grid.flat)
    for axes, one, own in zip(cells, shown, limits, strict=False):
        _draw_arm(axes, tree, one, (min(low for low, _ in limits), max(high for _, high in limits)) if alike else own)
    for axes in cells[len(shown) :]:
        axes.axis("off")
    for axes in cells[max(0, len(shown) - columns) : len(shown)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("training compute of a run (FLOPs)")
    for axes in grid[:, 0]:
        axes.set_ylabel("compute multiplier")
    handles = _multiplier_legend(tree)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), fontsize=8)
    return figure


def _known(rung: Tree) -> bool:
    return rung["multiplier"]["value"] is not None


def _limits(tree: Tree, one: Tree) -> tuple[float, float]:
    """Of the log axis: all values, and their intervals as far as these do not dwarf them."""
    values = [rung["multiplier"]["value"] for rung in one["rungs"] if _known(rung)] + [
        1.0,
        tree["criterion"]["min_gain"],
    ]
    worth = one["multiplier"]
    values += [worth["value"]] if worth["value"] is not None else []
    low, high = min(values), max(values)
    intervals = [worth, *(rung["multiplier"] for rung in one["rungs"])]
    ends = [end for interval in intervals for end in (interval["low"], interval["high"]) if end is not None]
    ends += [] if one["other_floor"]["value"] is None else [one["other_floor"]["value"]]
    room = max((high / low) ** 1.5, 1.5)
    low, high = max(min([low, *ends]), low / room), min(max([high, *ends]), high * room)
    edge = (high / low) ** 0.07
    return low / edge, high * edge


def _widest(limits: Sequence[tuple[float, float]]) -> float:
    return math.log(max(high for _, high in limits) / min(low for low, _ in limits))


def _draw_arm(axes: "Axes", tree: Tree, one: Tree, limits: tuple[float, float]) -> None:
    arm, colour = one["arm"], colours(tree)[one["arm"]]
    by_compute(axes, tree, label=False)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    as_multipliers(axes.yaxis)
    axes.axhline(1, color=SOFT, linewidth=1.1, zorder=1)
    if tree["criterion"]["min_gain"] > 1:
        axes.axhline(tree["criterion"]["min_gain"], color=GOOD, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    if (line := tree["lines"].get(arm)) is not None:
        _draw_line(axes, line, tree["rungs"][-1]["flops"], colour)
    for rung in one["rungs"]:
        if _known(rung):
            value = rung["multiplier"]["value"]
            axes.errorbar([rung["flops"]], [value], yerr=ends_of(value, rung["multiplier"]), fmt=marks(tree)[arm],
                          color=colour, markersize=5.5, capsize=2.5, linewidth=1.2, markeredgecolor=PAPER,
                          markeredgewidth=0.6, zorder=4)  # fmt: skip
    _draw_at_target(axes, tree, one, colour)
    for rung in _without_pairs(tree, one):
        axes.annotate("no pair", (rung["flops"], 0.02), xycoords=axes.get_xaxis_transform(), rotation=90, ha="center",
                      va="bottom", fontsize=7.5, color=SOFT)  # fmt: skip
    final = decision(tree, arm) or one
    axes.set_title(shortened(arm, 24), color=colour if colour != GREY else SOFT)
    axes.set_title(f"{units.SIGNS[final['decision']]} {final['decision']}", loc="right", fontsize=9,
                   color=DECISION_COLOURS[final["decision"]])  # fmt: skip


def _without_pairs(tree: Tree, one: Tree) -> list[Tree]:
    known = {rung["rung"] for rung in one["rungs"] if _known(rung)}
    return [rung for rung in tree["rungs"] if rung["name"] not in known]


def _draw_line(axes: "Axes", line: Tree, last: float, colour: str) -> None:
    flops, value = line["flops"], floats(line["value"])
    known = sum(one <= last * 1.001 for one in flops)
    axes.fill_between(flops, floats(line["low"]), floats(line["high"]), color=colour, alpha=0.14, linewidth=0)
    axes.plot(flops[:known], value[:known], color=colour, linewidth=1.6)
    axes.plot(flops[known - 1 :], value[known - 1 :], color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.plot(flops[known - 1 :], floats(line["other_floor"])[known - 1 :], color=colour, linewidth=1.2,
              linestyle=(0, (1, 1.6)))  # fmt: skip


def _draw_at_target(axes: "Axes", tree: Tree, one: Tree, colour: str) -> None:
    value, flops = one["multiplier"]["value"], tree["target"]["flops"]
    if value is not None:
        axes.errorbar([flops], [value], yerr=ends_of(value, one["multiplier"]), fmt="D", markerfacecolor=PAPER,
                      markersize=6, color=colour, linewidth=1.8, capsize=4, zorder=5)  # fmt: skip
    for told in tree["multiplier_predictions"]:
        measured = told["measured"]
        if (told["rung"], told["arm"]) == (tree["target"]["rung"], one["arm"]) and measured and measured["value"]:
            axes.plot([flops], [measured["value"]], marker="*", markersize=13, color=colour, markeredgecolor=PAPER,
                      linestyle="", zorder=6)  # fmt: skip


def _multiplier_legend(tree: Tree) -> list[Any]:
    from matplotlib.lines import Line2D

    percent = f"{100 * (1 - tree['criterion']['level']):.3g} %"
    said = [
        Line2D([], [], color=SOFT, marker="o", linewidth=1.2, label=f"measured, {percent} interval"),
        Line2D(
            [], [], color=SOFT, marker="D", markerfacecolor=PAPER, linestyle=(0, (4, 2)), label="as a line, predicted"
        ),
        Line2D([], [], color=SOFT, linestyle=(0, (1, 1.6)), label="if its loss levels off elsewhere"),
    ]
    if tree["criterion"]["min_gain"] > 1:
        least = f"least useful: {tree['criterion']['min_gain']:g}×"
        said.append(Line2D([], [], color=GOOD, linestyle=(0, (4, 2)), label=least))
    said.append(
        Line2D([], [], color=SOFT, linestyle=(0, (1, 2)), marker="|", linewidth=0, markersize=11, label="target")
    )
    run = [one for one in tree["multiplier_predictions"] if one["rung"] == tree["target"]["rung"] and one["pairs"]]
    if run:
        said.append(Line2D([], [], color=SOFT, marker="*", markersize=11, linestyle="", label="measured at the target"))
    return said
