"""What a report's pictures share: colours, axes, and how what is unknown or missing looks."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.decision import final_verdict
from trainer.ladder.stats.records import BASELINE
from trainer.show.figure import BAD, GOOD, GREY, INK, MARKS, SERIES, SOFT, UNSURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
MOST_LINEAR = 4.0
"""Ticks of an axis are evenly apart unless its ends are by more than this."""
MOST_UNLIKE = 12.0
"""Panels share an axis unless one would be so many times as tall."""
GAPS = ("not a number", "no run has finished")
DECISION_COLOURS = {"promote": GOOD, "reject": BAD, "inconclusive": UNSURE}


def colours(tree: Tree) -> dict[str, str]:
    """One for each arm; the baseline has the ink's, arms without a change are grey."""
    rest = itertools.cycle(SERIES)
    arms = {arm["name"]: GREY if arm["unchanged"] else next(rest) for arm in tree["arms"]}
    return {BASELINE: INK} | arms


def marks(tree: Tree) -> dict[str, str]:
    return dict(zip([BASELINE, *(arm["name"] for arm in tree["arms"])], itertools.cycle(MARKS), strict=False))


def by_compute(axes: "Axes", tree: Tree, label: bool = True) -> None:
    """A log axis of FLOPs over all rungs, with the target marked."""
    from matplotlib.ticker import NullFormatter

    target, first = tree["target"]["flops"], tree["rungs"][0]["flops"]
    room = (target / first) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(first / room, target * room)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(target, color=SOFT, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    if label:
        axes.set_xlabel("training compute of a run (FLOPs)")


def mark_target(axes: "Axes", tree: Tree) -> None:
    axes.annotate("target", (tree["target"]["flops"], 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 3),
                  textcoords="offset points", ha="center", va="bottom", color=SOFT, fontsize=8.5)  # fmt: skip


def as_multipliers(axis: Any) -> None:
    """Ticks of a log axis as "1.2×"."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    if high / low > MOST_LINEAR:
        subs = (1, 1.5, 2, 3, 5, 7) if high / low < 10 * MOST_LINEAR else (1, 2, 5)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    else:
        axis.set_major_locator(FixedLocator(list(_round_ratios(low, high))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}×"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _round_ratios(low: float, high: float) -> Iterator[float]:
    """Four to nine round values between, 1 among them."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < 8:
            yield from (round(number * step, 4) for number in range(max(first, 1), last + 1))
            return


def ends_of(value: float, interval: Mapping[str, Any]) -> list[list[float]] | None:
    """Lengths for an error bar; None where an end is not known."""
    if interval["low"] is None or interval["high"] is None:
        return None
    return [[max(value - interval["low"], 0.0)], [max(interval["high"] - value, 0.0)]]


def floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def decision(tree: Tree, arm: str) -> Tree | None:
    """The arm's final verdict; None without any."""
    return final_verdict(tree["verdicts"], tree.get("course", {}).get("verdicts", []), arm)
