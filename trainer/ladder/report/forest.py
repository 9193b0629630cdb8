"""Predictions beside what came out, and compute beside time: pictures with a row for each arm."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report.drawing import as_multipliers, colours, decision, ends_of
from trainer.ladder.report.estimates import Tree
from trainer.show import units
from trainer.show.figure import GOOD, PAPER, SOFT, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_predictions(tree: Tree) -> "Figure | None":
    shown = [one for one in tree["predictions"] if one["predicted"] is not None]
    ratios = {(one["rung"], one["arm"]): one for one in tree["multiplier_predictions"] if _both(one)}
    if not any(one["observed"] is not None for one in shown):
        return None
    panels = 2 if ratios else 1
    figure = new_figure(9 if panels == 2 else 6.6, 0.34 * len(shown) + 1.6)
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)
    _rows(grid[0, 0], tree, shown)
    _draw_errors(grid[0, 0], tree, shown)
    if ratios:
        grid[0, 1].tick_params(axis="y", length=0)
        _draw_ratios(grid[0, 1], tree, {y: ratios.get((one["rung"], one["arm"])) for y, one in enumerate(shown)})
    figure.legend(handles=_prediction_legend(), loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _both(one: Tree) -> bool:
    return bool(
        one["predicted"] and one["measured"] and None not in (one["predicted"]["value"], one["measured"]["value"])
    )


def _rows(axes: "Axes", tree: Tree, shown: Sequence[Tree]) -> None:
    names = [shortened(f"{one['arm']}, {one['rung']}", 30) for one in shown]
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
        axes.errorbar([0], [y], xerr=ends_of(value, one["predicted"]), fmt="D", markerfacecolor=PAPER, color=colour,
                      markersize=5.5, capsize=3, linewidth=1.3, alpha=0.75)  # fmt: skip
        if one["error"] is not None:
            axes.plot([one["error"]], [y], marker="o", color=colour, markersize=7, markeredgecolor=PAPER, zorder=5)
    axes.set_xlabel(f"loss minus its prediction ({units.SHORT_LOSS_UNITS[tree['unit']]})")
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
            axes.errorbar([told["value"]], [y + above], xerr=ends_of(told["value"], told), color=colour, capsize=2.5,
                          linewidth=1.2, **look)  # fmt: skip
    values = [told["value"] for one in shown for told in (one["predicted"], one["measured"])] + [1.0]
    ends = [end for one in shown for told in (one["predicted"], one["measured"]) for end in (told["low"], told["high"])]
    known = [end for end in ends if end is not None]
    room = max((max(values) / min(values)) ** 0.8, 1.2)
    axes.set_xlim(
        max(min([*values, *known]), min(values) / room) / 1.03, min(max([*values, *known]), max(values) * room) * 1.03
    )
    as_multipliers(axes.xaxis)
    axes.set_xlabel("compute multiplier")
    axes.set_title("Multiplier")


def _prediction_legend() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=SOFT, marker="D", markerfacecolor=PAPER, label="predicted from the smaller rungs"),
        Line2D([], [], color=SOFT, marker="o", linestyle="", label="what came out"),
    ]


# Cost


def draw_cost(tree: Tree) -> "Figure | None":
    shown = [one for arm in tree["arms"] if (one := decision(tree, arm["name"])) and one["multiplier"]["value"]]
    if not any(one.get("wall_clock", {}).get("value") for one in shown):
        return None
    figure = new_figure(8, 0.62 * len(shown) + 1.5)
    axes = figure.subplots()
    values = [1.0]
    for y, one in enumerate(shown):
        colour = colours(tree)[one["arm"]]
        for told, above, look in (
            (one["multiplier"], -0.14, {"fmt": "o", "markersize": 7, "markeredgecolor": PAPER}),
            (one["wall_clock"], 0.14, {"fmt": "s", "markersize": 6.5, "markerfacecolor": PAPER}),
        ):
            if told["value"] is not None:
                values.append(told["value"])
                axes.errorbar([told["value"]], [y + above], xerr=ends_of(told["value"], told), color=colour, capsize=3,
                              linewidth=1.3, **look)  # fmt: skip
        slow = one.get("slowdown", {}).get("value")
        said = "" if slow is None else f"a step takes {slow:.2f}×"
        axes.annotate(said, (1.0, y), xytext=(6, 0), xycoords=axes.get_yaxis_transform(), fontsize=8.5,
                      textcoords="offset points", va="center", color=SOFT)  # fmt: skip
    axes.set_xscale("log")
    room = max((max(values) / min(values)) ** 0.6, 1.25)
    axes.set_xlim(min(values) / room, max(values) * room)
    as_multipliers(axes.xaxis)
    axes.axvline(1, color=SOFT, linewidth=1.1, zorder=1)
    if tree["criterion"]["min_gain"] > 1:
        axes.axvline(tree["criterion"]["min_gain"], color=GOOD, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    axes.set_yticks(range(len(shown)), [shortened(one["arm"], 30) for one in shown])
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
