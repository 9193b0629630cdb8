"""What a report's pictures share: colours, axes, and how what is unknown or missing looks."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, GRID, PAPER = "#1d2127", "#667085", "#e4e7ec", "#fffffe"
GOOD = "#1a7343"
ARM_COLOURS = ("#2f6690", "#c8553d", "#3a7d44", "#7b5ea7", "#b8860b", "#00798c", "#a23b72", "#6b4226")
UNCHANGED = "#8a8f98"
MARKS = ("o", "s", "^", "D", "v", "P", "X", "h")
VARIABLES = {
    INK: "--ink", SOFT: "--soft", GRID: "--line", PAPER: "--paper", GOOD: "--promote", UNCHANGED: "--aa",
    **{colour: f"--arm{number}" for number, colour in enumerate(ARM_COLOURS)},
}  # fmt: skip
"""What the page calls each colour."""
COLUMNS = 3
MOST_LINEAR = 4.0
"""Ticks of an axis are evenly apart unless its ends are by more than this."""
MOST_UNLIKE = 12.0
"""Panels share an axis unless one would be so many times as tall."""
GAPS = ("not a number", "no run has finished")
MEANT = {"promote": GOOD, "reject": "#b3261e", "inconclusive": "#855b00"}
VARIABLES |= {MEANT["reject"]: "--reject", MEANT["inconclusive"]: "--inconclusive"}


def style() -> Any:
    return {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "figure.facecolor": PAPER,
        "axes.facecolor": PAPER, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT,
        "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
        "grid.linewidth": 0.8, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.frameon": False,
        "legend.fontsize": 8.5, "svg.hashsalt": "toprope", "svg.fonttype": "path",
    }  # fmt: skip


def colours(tree: Tree) -> dict[str, str]:
    """One for each arm; the baseline has the ink's, arms without a change are grey."""
    rest = itertools.cycle(ARM_COLOURS)
    arms = {arm["name"]: UNCHANGED if arm["unchanged"] else next(rest) for arm in tree["arms"]}
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
    """The arm's verdict with what time says where that is known; None without any."""
    plain = next((one for one in tree["verdicts"] if one["arm"] == arm), None)
    timed = next((one for one in tree.get("course", {}).get("verdicts", []) if one["arm"] == arm), {})
    return None if plain is None else plain | {key: value for key, value in timed.items() if key != "rungs"}


def shortened(text: str, most: int) -> str:
    """Names are the user's: not to be read as formulas, nor longer than their place."""
    text = text.replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"
