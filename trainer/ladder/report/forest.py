"""Pictures with a row for each arm: predictions beside observations, and gains in compute beside gains in time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.ladder.report import drawing
from trainer.ladder.report.estimates import Tree
from trainer.show import units
from trainer.show.figure import PAPER, SOFT, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL: Any = {"marker": "o", "markeredgecolor": PAPER}
"""Style of a point that was measured."""


def draw_predictions(tree: Tree) -> "Figure | None":
    """Losses and multipliers as predicted from smaller rungs, and as measured; None before there is a comparison."""
    from matplotlib.lines import Line2D

    shown = [prediction for prediction in tree["predictions"] if prediction["predicted"] is not None]
    if not any(prediction["observed"] is not None for prediction in shown):
        return None
    multipliers = {
        (prediction["rung"], prediction["arm"]): prediction
        for prediction in tree["multiplier_predictions"]
        if all(prediction[key] and prediction[key]["value"] is not None for key in ("predicted", "measured"))
    }
    panels = 2 if multipliers else 1
    figure = new_figure(9 if multipliers else 6.6, 0.34 * len(shown) + 1.6)
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    # Rows are sorted by rung; a line separates one rung from the next.
    names = [(p["arm"], shortened(f"{p['arm']}, {p['rung']}", 30)) for p in shown]
    drawing.arm_rows(grid[0], tree, names)
    for number in range(1, len(shown)):
        if shown[number]["rung"] != shown[number - 1]["rung"]:
            grid[0].axhline(number - 0.5, color=SOFT, linewidth=0.8)
    _draw_losses(grid[0], tree, shown)
    if multipliers:
        grid[1].tick_params(axis="y", length=0)
        grid[1].grid(visible=False, axis="y")
        _draw_multipliers(grid[1], tree, [multipliers.get((p["rung"], p["arm"])) for p in shown])
    legend = [
        Line2D([], [], color=SOFT, **drawing.hollow("D"), label="predicted from the smaller rungs"),
        Line2D([], [], color=SOFT, marker="o", linestyle="", label="observed"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _draw_losses(axes: "Axes", tree: Tree, shown: Sequence[Tree]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.axvline(0, color=SOFT, linewidth=1.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for y, prediction in enumerate(shown):
        colour, _ = drawing.arm_styles(tree)[prediction["arm"]]
        # The prediction is 0 in every row, so that intervals of very different losses share an axis.
        style: Any = {"color": colour, "markersize": 5.5, "capsize": 3, "linewidth": 1.3, "alpha": 0.75}
        drawing.error_bar(axes, 0, y, prediction["predicted"], horizontal=True, **style, **drawing.hollow("D"))
        if prediction["error"] is not None:
            axes.plot([prediction["error"]], [y], color=colour, markersize=7, zorder=5, **FULL)
    axes.set_xlabel(f"loss minus its prediction ({units.SHORT_LOSS_UNITS[tree['unit']]})")
    axes.set_title("Loss")


def _draw_multipliers(axes: "Axes", tree: Tree, rows: Sequence[Tree | None]) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color=SOFT, linewidth=1.1)
    for y, row in enumerate(rows):
        if row is None:
            continue
        for interval, offset, style in (
            (row["predicted"], -0.12, {"markersize": 5.5, "alpha": 0.75, **drawing.hollow("D")}),
            (row["measured"], 0.12, {"markersize": 6, **FULL}),
        ):
            style |= {"color": drawing.arm_styles(tree)[row["arm"]][0], "capsize": 2.5, "linewidth": 1.2}
            drawing.error_bar(axes, interval["value"], y + offset, interval, horizontal=True, **style)
    intervals = [row[key] for row in rows if row is not None for key in ("predicted", "measured")]
    axes.set_xlim(drawing.multiplier_limits(intervals))
    drawing.multiplier_axis(axes.xaxis)
    axes.set_xlabel(drawing.multiplier_label(tree))
    axes.set_title("Multiplier")


def draw_cost(tree: Tree) -> "Figure | None":
    """Each arm's multiplier at the target in compute and in time; None if no time is known."""
    from matplotlib.lines import Line2D

    verdicts = [drawing.final(tree, arm["name"]) for arm in tree["arms"]]
    shown = [verdict for verdict in verdicts if verdict and verdict["multiplier"]["value"]]
    if not any(verdict.get("wall_clock", {}).get("value") for verdict in shown):
        return None
    figure = new_figure(8, 0.62 * len(shown) + 1.5)
    axes = figure.subplots()
    for y, verdict in enumerate(shown):
        for key, offset, style in (
            ("multiplier", -0.14, {"markersize": 7, **FULL}),
            ("wall_clock", 0.14, {"markersize": 6.5, **drawing.hollow("s")}),
        ):
            value = verdict[key]["value"]
            if value is not None:
                style |= {"color": drawing.arm_styles(tree)[verdict["arm"]][0], "capsize": 3, "linewidth": 1.3}
                drawing.error_bar(axes, value, y + offset, verdict[key], horizontal=True, **style)
        slowdown = verdict.get("slowdown", {}).get("value")
        if slowdown is not None:
            # To the right of the axes: 1.0 of their width, 6 points on.
            place: Any = {"xycoords": axes.get_yaxis_transform(), "xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(f"a step takes {slowdown:.2f}×", (1.0, y), fontsize=8.5, va="center", color=SOFT, **place)
    axes.set_xscale("log")
    intervals = [verdict[key] for verdict in shown for key in ("multiplier", "wall_clock")]
    axes.set_xlim(drawing.multiplier_limits(intervals))
    drawing.multiplier_axis(axes.xaxis)
    drawing.reference_lines(tree, axes.axvline)
    drawing.arm_rows(axes, tree, [(verdict["arm"], shortened(verdict["arm"], 30)) for verdict in shown])
    axes.set_xlabel("multiplier at the target")
    legend = [
        *drawing.least_useful(tree),
        Line2D([], [], color=SOFT, marker="o", label="in compute"),
        Line2D([], [], color=SOFT, **drawing.hollow("s"), label="in time on this machine"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8.5)
    return figure
