"""A report's pictures: each as PNG, and as SVG that takes its colours from the page, so that both can be light or dark.

A run that is not there leaves a gap; no line is drawn over it.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from trainer.ladder.report import wording
from trainer.ladder.report.estimates import Tree
from trainer.ladder.results import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
MOST_UNLIKE = 8.0
"""Panels share an axis unless one would be so many times as tall."""
GAPS = ("not a number", "no run has finished")
MEANT = {"promote": GOOD, "reject": "#b3261e", "inconclusive": "#855b00"}
VARIABLES |= {MEANT["reject"]: "--reject", MEANT["inconclusive"]: "--inconclusive"}


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    """What it shows, in a sentence."""
    png: bytes
    svg: str
    """With ids of its own, for pages that hold several."""


def draw(tree: Tree) -> list[Picture]:
    """All that there is something to show for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = []
    kinds: Sequence[tuple[str, str, Callable[[Tree], Figure | None]]] = (
        ("multiplier", "Compute multiplier against compute", _multiplier),
        ("loss", "Loss against compute", _loss),
        ("prediction", "Predictions against what came out", _prediction),
        ("cost", "Worth in compute and in time", _cost),
    )
    for name, title, make in kinds:
        with pyplot.rc_context(rc=_style()):
            figure = make(tree)
            if figure is not None:
                found.append(Picture(name, title, _png(figure), _svg(figure, name, f"{tree['name']}: {title}")))
                pyplot.close(figure)
    return found


def _style() -> Any:
    return {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "figure.facecolor": PAPER,
        "axes.facecolor": PAPER, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT,
        "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
        "grid.linewidth": 0.8, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.frameon": False,
        "legend.fontsize": 8.5, "svg.hashsalt": "toprope", "svg.fonttype": "path",
    }  # fmt: skip


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


def _svg(figure: "Figure", name: str, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


# What pictures share


def colours(tree: Tree) -> dict[str, str]:
    """One for each arm; the baseline has the ink's, arms without a change are grey."""
    rest = itertools.cycle(ARM_COLOURS)
    arms = {arm["name"]: UNCHANGED if arm["unchanged"] else next(rest) for arm in tree["arms"]}
    return {BASELINE: INK} | arms


def _marks(tree: Tree) -> dict[str, str]:
    return dict(zip([BASELINE, *(arm["name"] for arm in tree["arms"])], itertools.cycle(MARKS), strict=False))


def _by_compute(axes: "Axes", tree: Tree, label: bool = True) -> None:
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


def _mark_target(axes: "Axes", tree: Tree) -> None:
    axes.annotate("target", (tree["target"]["flops"], 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 3),
                  textcoords="offset points", ha="center", va="bottom", color=SOFT, fontsize=8.5)  # fmt: skip


def _as_multipliers(axis: Any, wide: bool) -> None:
    """Ticks of a log axis as "1.2×"."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    if wide:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    else:
        low, high = axis.get_view_interval()
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


def _ends(value: float, interval: Mapping[str, Any]) -> list[list[float]] | None:
    """Lengths for an error bar; None where an end is not known."""
    if interval["low"] is None or interval["high"] is None:
        return None
    return [[max(value - interval["low"], 0.0)], [max(interval["high"] - value, 0.0)]]


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def decision(tree: Tree, arm: str) -> Tree | None:
    """The arm's verdict with what time says where that is known; None without any."""
    plain = next((one for one in tree["verdicts"] if one["arm"] == arm), None)
    timed = next((one for one in tree.get("course", {}).get("verdicts", []) if one["arm"] == arm), {})
    return None if plain is None else plain | {key: value for key, value in timed.items() if key != "rungs"}


# Loss


def _loss(tree: Tree) -> "Figure | None":
    from matplotlib import pyplot

    if not any(run["loss"] is not None for run in tree["runs"]) or not tree["rungs"]:
        return None
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, height_ratios=[5, 4], figsize=(9, 7.4), layout="constrained"
    )
    unit = wording.UNITS[tree["unit"]]
    curve = tree["curve"]
    if curve is not None:
        _draw_curve(above, below, tree)
    for number, arm in enumerate((BASELINE, *(arm["name"] for arm in tree["arms"]))):
        _draw_runs(above, below, tree, arm, number)
    _draw_target(above, below, tree)
    _by_compute(above, tree, label=False)
    _by_compute(below, tree)
    _mark_target(above, tree)
    above.set_ylabel(f"{tree['metric']} loss ({unit})" if tree["unit"] != "bits_per_byte" else f"{tree['metric']}, {unit}")
    what = "the baseline's curve" if curve is not None else "the baseline's mean"
    below.set_ylabel(f"minus {what}\n({wording.SHORT_UNITS[tree['unit']]})")
    handles, labels = above.get_legend_handles_labels()
    marks = [mark for mark in below.get_lines() if mark.get_label() in GAPS]
    once = {**dict(zip(labels, handles, strict=True)), **{str(mark.get_label()): mark for mark in marks}}
    # A falling curve leaves the lower left free; points of few rungs, the middle.
    above.legend(once.values(), once.keys(), loc="lower left" if curve else "upper center",
                 ncols=1 if len(once) < 9 else 2)  # fmt: skip
    return figure


def _draw_curve(above: "Axes", below: "Axes", tree: Tree) -> None:
    curve, last = tree["curve"], tree["rungs"][-1]["flops"]
    flops, value = curve["flops"], _floats(curve["value"])
    low, high = _floats(curve["low"]), _floats(curve["high"])
    percent = f"{100 * (1 - tree['criterion']['level']):.3g} %"
    above.fill_between(flops, low, high, color=INK, alpha=0.1, linewidth=0, label=f"{percent} interval of the curve")
    known = sum(one <= last * 1.001 for one in flops)
    fit = tree["fit"]["curve"]
    above.plot(flops[:known], value[:known], color=INK, linewidth=1.4, label=f"baseline's curve: E {fit['E']:.3g}, α {fit['alpha']:.3f}")
    above.plot(flops[known - 1 :], value[known - 1 :], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    offsets = [[edge - middle for edge, middle in zip(side, value, strict=True)] for side in (low, high)]
    below.fill_between(flops, *offsets, color=INK, alpha=0.1, linewidth=0)
    below.axhline(0, color=INK, linewidth=1.2)


def _draw_runs(above: "Axes", below: "Axes", tree: Tree, arm: str, number: int) -> None:
    """Each seed small, their mean large; in the lower panel beside each other what lies at one compute."""
    colour, mark = colours(tree)[arm], _marks(tree)[arm]
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
    above.plot([x / aside for x in xs], middles, linestyle="", label=_shortened(arm, 30), zorder=4, **look)
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
        axes.errorbar([told["flops"]], [value - base], yerr=_ends(value, told["predicted"]), color=SOFT, capsize=4,
                      fmt="D", markersize=6, markerfacecolor=PAPER, linewidth=1.3, zorder=3, label=label)  # fmt: skip


# Multipliers


def _multiplier(tree: Tree) -> "Figure | None":
    from matplotlib import pyplot

    shown = [one for one in tree["verdicts"] if any(_known(rung) for rung in one["rungs"])]
    if not shown:
        return None
    columns = 2 if len(shown) == 4 else min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    limits = [_limits(tree, one) for one in shown]
    alike = _widest(limits) < MOST_UNLIKE * min(math.log(high / low) for low, high in limits)
    figure, grid = pyplot.subplots(
        rows, columns, squeeze=False, sharex=True, figsize=(max(9 if columns > 1 else 5.6, 3.2 * columns), 2.9 * rows + 0.7),
        layout="constrained",
    )
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
    values = [rung["multiplier"]["value"] for rung in one["rungs"] if _known(rung)] + [1.0, tree["criterion"]["min_gain"]]
    worth = one["multiplier"]
    values += [worth["value"]] if worth["value"] is not None else []
    low, high = min(values), max(values)
    intervals = [worth, *(rung["multiplier"] for rung in one["rungs"])]
    ends = [end for interval in intervals for end in (interval["low"], interval["high"]) if end is not None]
    room = max((high / low) ** 0.9, 1.15)
    low, high = max(min([low, *ends]), low / room), min(max([high, *ends]), high * room)
    edge = (high / low) ** 0.07
    return low / edge, high * edge


def _widest(limits: Sequence[tuple[float, float]]) -> float:
    return math.log(max(high for _, high in limits) / min(low for low, _ in limits))


def _draw_arm(axes: "Axes", tree: Tree, one: Tree, limits: tuple[float, float]) -> None:
    arm, colour = one["arm"], colours(tree)[one["arm"]]
    _by_compute(axes, tree, label=False)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    _as_multipliers(axes.yaxis, limits[1] / limits[0] > 6)
    axes.axhline(1, color=SOFT, linewidth=1.1, zorder=1)
    if tree["criterion"]["min_gain"] > 1:
        axes.axhline(tree["criterion"]["min_gain"], color=GOOD, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    if (line := tree["lines"].get(arm)) is not None:
        _draw_line(axes, line, tree["rungs"][-1]["flops"], colour)
    for rung in one["rungs"]:
        if _known(rung):
            value = rung["multiplier"]["value"]
            axes.errorbar([rung["flops"]], [value], yerr=_ends(value, rung["multiplier"]), fmt=_marks(tree)[arm],
                          color=colour, markersize=5.5, capsize=2.5, linewidth=1.2, markeredgecolor=PAPER,
                          markeredgewidth=0.6, zorder=4)  # fmt: skip
    _draw_at_target(axes, tree, one, colour)
    for rung in _without_pairs(tree, one):
        axes.annotate("no pair", (rung["flops"], 0.02), xycoords=axes.get_xaxis_transform(), rotation=90, ha="center",
                      va="bottom", fontsize=7.5, color=SOFT)  # fmt: skip
    final = decision(tree, arm) or one
    axes.set_title(_shortened(arm, 24), color=colour if colour != UNCHANGED else SOFT)
    axes.set_title(f"{wording.SIGNS[final['decision']]} {final['decision']}", loc="right", fontsize=9,
                   color=MEANT[final["decision"]])  # fmt: skip


def _without_pairs(tree: Tree, one: Tree) -> list[Tree]:
    known = {rung["rung"] for rung in one["rungs"] if _known(rung)}
    return [rung for rung in tree["rungs"] if rung["name"] not in known]


def _draw_line(axes: "Axes", line: Tree, last: float, colour: str) -> None:
    flops, value = line["flops"], _floats(line["value"])
    known = sum(one <= last * 1.001 for one in flops)
    axes.fill_between(flops, _floats(line["low"]), _floats(line["high"]), color=colour, alpha=0.14, linewidth=0)
    axes.plot(flops[:known], value[:known], color=colour, linewidth=1.6)
    axes.plot(flops[known - 1 :], value[known - 1 :], color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.plot(flops[known - 1 :], _floats(line["other_floor"])[known - 1 :], color=colour, linewidth=1.2,
              linestyle=(0, (1, 1.6)))  # fmt: skip


def _draw_at_target(axes: "Axes", tree: Tree, one: Tree, colour: str) -> None:
    value, flops = one["multiplier"]["value"], tree["target"]["flops"]
    if value is not None:
        axes.errorbar([flops], [value], yerr=_ends(value, one["multiplier"]), fmt="D", markerfacecolor=PAPER,
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
        Line2D([], [], color=SOFT, marker="D", markerfacecolor=PAPER, linestyle=(0, (4, 2)), label="as a line, predicted"),
        Line2D([], [], color=SOFT, linestyle=(0, (1, 1.6)), label="if its loss levels off elsewhere"),
    ]
    if tree["criterion"]["min_gain"] > 1:
        least = f"least useful: {tree['criterion']['min_gain']:g}×"
        said.append(Line2D([], [], color=GOOD, linestyle=(0, (4, 2)), label=least))
    said.append(Line2D([], [], color=SOFT, linestyle=(0, (1, 2)), marker="|", linewidth=0, markersize=11, label="target"))
    run = [one for one in tree["multiplier_predictions"] if one["rung"] == tree["target"]["rung"] and one["pairs"]]
    if run:
        said.append(Line2D([], [], color=SOFT, marker="*", markersize=11, linestyle="", label="measured at the target"))
    return said


def _shortened(text: str, most: int) -> str:
    """Names are the user's: not to be read as formulas, nor longer than their place."""
    text = text.replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"


# Predictions


def _prediction(tree: Tree) -> "Figure | None":
    from matplotlib import pyplot

    shown = [one for one in tree["predictions"] if one["predicted"] is not None]
    ratios = {(one["rung"], one["arm"]): one for one in tree["multiplier_predictions"] if _both(one)}
    if not any(one["observed"] is not None for one in shown):
        return None
    panels = 2 if ratios else 1
    figure, grid = pyplot.subplots(
        1, panels, squeeze=False, sharey=True, figsize=(9 if panels == 2 else 6.6, 0.34 * len(shown) + 1.6),
        layout="constrained",
    )  # fmt: skip
    _rows(grid[0, 0], tree, shown)
    _draw_errors(grid[0, 0], tree, shown)
    if ratios:
        grid[0, 1].tick_params(axis="y", length=0)
        _draw_ratios(grid[0, 1], tree, {y: ratios.get((one["rung"], one["arm"])) for y, one in enumerate(shown)})
    figure.legend(handles=_prediction_legend(), loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _both(one: Tree) -> bool:
    return bool(one["predicted"] and one["measured"] and None not in (one["predicted"]["value"], one["measured"]["value"]))


def _rows(axes: "Axes", tree: Tree, shown: Sequence[Tree]) -> None:
    names = [_shortened(f"{one['arm']}, {one['rung']}", 30) for one in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    for label, one in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(colours(tree)[one["arm"]])
    for number in range(1, len(shown)):
        if shown[number]["rung"] != shown[number - 1]["rung"]:
            axes.axhline(number - 0.5, color=SOFT, linewidth=0.8)


def _draw_errors(axes: "Axes", tree: Tree, shown: Sequence[Tree]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.axvline(0, color=SOFT, linewidth=1.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for y, one in enumerate(shown):
        colour, value = colours(tree)[one["arm"]], one["predicted"]["value"]
        axes.errorbar([0], [y], xerr=_ends(value, one["predicted"]), fmt="D", markerfacecolor=PAPER, color=colour,
                      markersize=5.5, capsize=3, linewidth=1.3, alpha=0.75)  # fmt: skip
        if one["error"] is not None:
            axes.plot([one["error"]], [y], marker="o", color=colour, markersize=7, markeredgecolor=PAPER, zorder=5)
    axes.set_xlabel(f"loss minus its prediction ({wording.SHORT_UNITS[tree['unit']]})")
    axes.set_title("Loss")


def _draw_ratios(axes: "Axes", tree: Tree, rows: Mapping[int, Tree | None]) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color=SOFT, linewidth=1.1)
    axes.grid(visible=False, axis="y")
    shown = [one for one in rows.values() if one is not None]
    for y, one in rows.items():
        if one is None:
            continue
        colour = colours(tree)[one["arm"]]
        for told, above, look in (
            (one["predicted"], -0.12, {"fmt": "D", "markerfacecolor": PAPER, "markersize": 5.5, "alpha": 0.75}),
            (one["measured"], 0.12, {"fmt": "o", "markersize": 6, "markeredgecolor": PAPER}),
        ):
            axes.errorbar([told["value"]], [y + above], xerr=_ends(told["value"], told), color=colour, capsize=2.5,
                          linewidth=1.2, **look)  # fmt: skip
    values = [told["value"] for one in shown for told in (one["predicted"], one["measured"])] + [1.0]
    ends = [end for one in shown for told in (one["predicted"], one["measured"]) for end in (told["low"], told["high"])]
    known = [end for end in ends if end is not None]
    room = max((max(values) / min(values)) ** 0.8, 1.2)
    axes.set_xlim(max(min([*values, *known]), min(values) / room) / 1.03, min(max([*values, *known]), max(values) * room) * 1.03)
    _as_multipliers(axes.xaxis, axes.get_xlim()[1] / axes.get_xlim()[0] > 6)
    axes.set_xlabel("compute multiplier")
    axes.set_title("Multiplier")


def _prediction_legend() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=SOFT, marker="D", markerfacecolor=PAPER, label="predicted from the smaller rungs"),
        Line2D([], [], color=SOFT, marker="o", linestyle="", label="what came out"),
    ]


# Cost


def _cost(tree: Tree) -> "Figure | None":
    from matplotlib import pyplot

    shown = [one for arm in tree["arms"] if (one := decision(tree, arm["name"])) and one["multiplier"]["value"]]
    if not any(one.get("wall_clock", {}).get("value") for one in shown):
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.62 * len(shown) + 1.5), layout="constrained")
    values = [1.0]
    for y, one in enumerate(shown):
        colour = colours(tree)[one["arm"]]
        for told, above, look in (
            (one["multiplier"], -0.14, {"fmt": "o", "markersize": 7, "markeredgecolor": PAPER}),
            (one["wall_clock"], 0.14, {"fmt": "s", "markersize": 6.5, "markerfacecolor": PAPER}),
        ):
            if told["value"] is not None:
                values.append(told["value"])
                axes.errorbar([told["value"]], [y + above], xerr=_ends(told["value"], told), color=colour, capsize=3,
                              linewidth=1.3, **look)  # fmt: skip
        slow = one.get("slowdown", {}).get("value")
        axes.annotate("" if slow is None else f"a step takes {slow:.2f}×", (1.0, y), xytext=(6, 0), fontsize=8.5,
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center", color=SOFT)  # fmt: skip
    axes.set_xscale("log")
    room = max((max(values) / min(values)) ** 0.6, 1.25)
    axes.set_xlim(min(values) / room, max(values) * room)
    _as_multipliers(axes.xaxis, axes.get_xlim()[1] / axes.get_xlim()[0] > 6)
    axes.axvline(1, color=SOFT, linewidth=1.1, zorder=1)
    if tree["criterion"]["min_gain"] > 1:
        axes.axvline(tree["criterion"]["min_gain"], color=GOOD, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    axes.set_yticks(range(len(shown)), [_shortened(one["arm"], 30) for one in shown])
    for label, one in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(colours(tree)[one["arm"]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("multiplier at the target")
    figure.legend(handles=_cost_legend(tree), loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _cost_legend(tree: Tree) -> list[Any]:
    from matplotlib.lines import Line2D

    least = tree["criterion"]["min_gain"]
    line = Line2D([], [], color=GOOD, linestyle=(0, (4, 2)), label=f"least useful: {least:g}×")
    return [
        *([line] if least > 1 else []),
        Line2D([], [], color=SOFT, marker="o", label="in compute"),
        Line2D([], [], color=SOFT, marker="s", markerfacecolor=PAPER, label="in time on this machine"),
    ]
