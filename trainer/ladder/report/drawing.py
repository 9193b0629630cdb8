"""Shared by a report's pictures: an arm's colour and mark, its decision, axes of amounts and of multipliers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats import records
from trainer.ladder.stats.decision import final_verdict
from trainer.ladder.stats.records import BASELINE
from trainer.show.figure import GOOD, GREY, INK, MARKS, PAPER, SERIES, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

NOISE_FLOOR = "noise floor"
"""Stands for the decision about an arm without a change (A/A): it shows how far noise alone moves an arm."""
DASHED, DOTTED = (0, (4, 2)), (0, (1, 2))
LINEAR_TICKS_UP_TO = 4.0
"""Largest ratio of an axis' ends at which its ticks are evenly apart."""


def final(tree: Tree, arm: str) -> Tree | None:
    """The arm's verdict with what time overrules; None without a verdict. An arm without a change is not judged."""
    found = final_verdict(tree["verdicts"], tree.get("course", {}).get("verdicts", []), arm)
    if found is None or not any(row["unchanged"] for row in tree["arms"] if row["name"] == arm):
        return found
    why = "It equals the baseline but for its initial weights, so its multipliers show what noise looks like."
    if found["decision"] == "promote":
        why += " By the criterion it would be promoted: on this ladder noise passes for a gain."
    return found | {"decision": NOISE_FLOOR, "why": why, "trend": NOISE_FLOOR, "crossing": None, "remedies": []}


def arm_styles(tree: Tree) -> dict[str, tuple[str, str]]:
    """(colour, mark) of each arm. The baseline is drawn in ink, arms without a change (A/A) in grey."""
    colours = itertools.cycle(SERIES)
    arms = {arm["name"]: GREY if arm["unchanged"] else next(colours) for arm in tree["arms"]}
    named = {BASELINE: INK} | arms
    return {arm: (colour, mark) for (arm, colour), mark in zip(named.items(), itertools.cycle(MARKS), strict=False)}


def error_bar(
    axes: "Axes", x: float, y: float, interval: Mapping[str, Any], horizontal: bool = False, **style: Any
) -> None:  # fmt: skip
    """Draw a point with the interval's distances from its value as error bars; without them if an end is unknown."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    ends = None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]
    axes.errorbar([x], [y], **{"xerr" if horizontal else "yerr": ends}, linestyle="none", **style)


def error_bars(axes: "Axes", x: Sequence[float], intervals: Sequence[Mapping[str, Any]], **style: Any) -> None:
    """The same for several points, upright, with one call that takes as long as one for a single point."""
    unknown = [interval["low"] is None or interval["high"] is None for interval in intervals]
    ends = [
        [math.nan if none else max(side * (interval[key] - interval["value"]), 0.0)
         for none, interval in zip(unknown, intervals, strict=True)]
        for key, side in (("low", -1), ("high", 1))
    ]  # fmt: skip
    yerr = None if all(unknown) else ends
    axes.errorbar(x, [interval["value"] for interval in intervals], yerr=yerr, linestyle="none", **style)


def hollow(mark: str) -> dict[str, Any]:
    """Style of a point that was predicted."""
    return {"marker": mark, "markerfacecolor": PAPER}


def floats(values: Sequence[float | None]) -> list[float]:
    """The values for matplotlib, which leaves a gap at NaN."""
    return [math.nan if value is None else value for value in values]


def axis_of(tree: Tree) -> records.Axis:
    """Return the kind of amount that the ladder's rungs are."""
    return tree.get("axis", "compute")


def amount(tree: Tree, row: Tree) -> float:
    """Amount of a rung, of a run or of the target, as the x axis has it."""
    return row["unique_tokens" if axis_of(tree) == "data" else "flops"]


def amount_label(tree: Tree) -> str:
    """Label of the x axis."""
    return "unique text of a run (tokens)" if axis_of(tree) == "data" else "training compute of a run (FLOPs)"


def multiplier_label(tree: Tree) -> str:
    """Label of an axis of multipliers."""
    return f"{axis_of(tree)} multiplier"


def amount_axis(axes: "Axes", tree: Tree) -> None:
    """Make the x axis one of amounts, logarithmic, over all rungs, with a line at the target."""
    from matplotlib.ticker import NullLocator

    target, first = amount(tree, tree["target"]), amount(tree, tree["rungs"][0])
    margin = (target / first) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(first / margin, target * margin)
    # The style shows no minor ticks, but matplotlib would make and place dozens in every panel.
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(target, color=SOFT, linewidth=1.0, linestyle=DOTTED, zorder=1)


def multiplier_axis(axis: "Axis") -> None:
    """Make the axis logarithmic with ticks like "1.2×"; set its limits before."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    if high / low > LINEAR_TICKS_UP_TO:
        subs = (1, 1.5, 2, 3, 5, 7) if high / low < 10 * LINEAR_TICKS_UP_TO else (1, 2, 5)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    else:
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{value:.4g}×")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def multiplier_limits(intervals: Sequence[Mapping[str, Any]], *more: float) -> tuple[float, float]:
    """Ends of an axis with all multipliers, `more` and 1, and with the intervals unless they are far wider."""
    values = [1.0, *more, *(interval["value"] for interval in intervals if interval["value"] is not None)]
    ends = [interval[key] for interval in intervals for key in ("low", "high") if interval[key] is not None]
    low, high = min(values), max(values)
    # A wide interval is cut off at the edge: shown whole, it would squeeze all points into a line.
    room = max((high / low) ** 1.5, 1.5)
    low, high = max(min([low, *ends]), low / room), min(max([high, *ends]), high * room)
    margin = (high / low) ** 0.07
    return low / margin, high * margin


def reference_lines(tree: Tree, line: Any) -> None:
    """Mark a multiplier of 1 and the least useful one by `line`, which is axes.axhline or axes.axvline."""
    line(1, color=SOFT, linewidth=1.1, zorder=1)
    if tree["criterion"]["min_gain"] > 1:
        line(tree["criterion"]["min_gain"], color=GOOD, linewidth=1.0, linestyle=DASHED, zorder=1)


def least_useful(tree: Tree) -> list[Any]:
    """Legend entry of the least useful multiplier, if there is one."""
    from matplotlib.lines import Line2D

    least = tree["criterion"]["min_gain"]
    return [Line2D([], [], color=GOOD, linestyle=DASHED, label=f"least useful: {least:g}×")] if least > 1 else []


def arm_rows(axes: "Axes", tree: Tree, labels: Sequence[tuple[str, str]]) -> None:
    """Make the y axis one of rows from above: (arm, label) of each, in the arm's colour."""
    axes.set_yticks(range(len(labels)), [label for _, label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    for text, (arm, _) in zip(axes.get_yticklabels(), labels, strict=True):
        text.set_color(arm_styles(tree)[arm][0])
