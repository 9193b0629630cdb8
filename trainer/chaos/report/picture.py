"""The matrix as a picture, for pages that cannot hold a table of colours."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import files
from trainer.chaos.report import matrix
from trainer.chaos.results import Report, Result
from trainer.faults.checker import NOT_ASKED
from trainer.show.figure import BAD, GOOD, INK, PAPER, SILENT, SOFT, UNSURE, colour, new_figure, png, shortened, style
from trainer.show.units import SIGNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {
    "pass": (colour("good-back"), GOOD), "fail": (colour("bad-back"), BAD),
    "undetected": (colour("silent-back"), SILENT), "unknown": (colour("unsure-back"), UNSURE),
    "skipped": (colour("idle-back"), SOFT), NOT_ASKED: (colour("idle-back"), SOFT),
}  # fmt: skip
"""Colours of each answer: background, sign."""
# Sizes in inches: a row (or column), and a letter of its name, of a column's name, of a reason.
ROW, ROW_LETTER, COLUMN_LETTER, REASON_LETTER = 0.24, 0.08, 0.066, 0.062
MARGIN = 0.1
ROWS_PER_PANEL = 40

MatrixRow = tuple[str, Result | None]
"""A run with its label, or a group's heading."""


def matrix_png(report: Report, path: Path) -> None:
    """Write the matrix as a PNG: a row per run, grouped; a column per invariant, each answer a colour and a sign.

    A long matrix is broken into panels side by side. The file appears whole or not at all.
    """
    asked = matrix.invariants(report.results)
    panels = _panels(_groups(report.results))
    rows = max(map(len, panels))
    names = [ROW_LETTER * max([10, *(len(words) for words, _ in panel)]) + 0.2 for panel in panels]
    widths = [name + ROW * (len(asked) + 2.4) for name in names]
    head = COLUMN_LETTER * max([8, *map(len, asked)]) + 0.2
    # The figure is as large as its rows and names need: nothing is scaled.
    width, height = sum(widths) + 2 * MARGIN, ROW * rows + head + 0.8
    counts = matrix.counts(report.results)
    title = f"{report.campaign}: {', '.join(f'{number} {name}' for name, number in counts.items())}"
    made = "".join(f"     {words}" for words in matrix.commits(report.results))
    # A skipped run says why in its row.
    given = {answer.answer for result in report.results for answer in result.answers}
    legend = "     ".join(f"{SIGNS[name]} {meaning}" for name, meaning in matrix.MEANINGS.items() if name in given)
    with style({"font.size": 9}):
        figure = new_figure(width, height, layout="none")
        grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
        for axes, panel, name in zip(grid[0], panels, names, strict=True):
            _draw(axes, panel, asked, name / ROW)
            axes.set_ylim(rows, -head / ROW)
        figure.suptitle(title, x=MARGIN / width, ha="left", fontsize=11, fontweight="bold", color=INK)
        figure.text(MARGIN / width, 0.12 / height, legend + made, fontsize=8, color=SOFT)
        edges = {"left": MARGIN / width, "right": 1 - MARGIN / width, "bottom": 0.4 / height, "top": 1 - 0.4 / height}
        figure.subplots_adjust(**edges, wspace=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, png(figure))


def _groups(results: Sequence[Result]) -> list[list[MatrixRow]]:
    """The rows of each group under its heading. A label names ranks and strategy only where they are unusual."""
    usual_world = Counter(map(matrix.world, results)).most_common(1)
    groups: list[list[MatrixRow]] = []
    for group, members in matrix.groups(results).items():
        groups.append([(group, None)])
        for result in members:
            world = matrix.world(result).removeprefix(usual_world[0][0])
            groups[-1].append((f"{matrix.label(result, members)}  {world.strip()}".rstrip(), result))
    return groups


def _panels(groups: list[list[MatrixRow]]) -> list[list[MatrixRow]]:
    """Distribute the groups over panels of about equal length, without cutting one."""
    rows = sum(map(len, groups))
    count = max(1, math.ceil(rows / ROWS_PER_PANEL))
    panels: list[list[MatrixRow]] = [[]]
    for group in groups:
        # The next panel begins where more than half of the group would be beyond this one's share.
        if len(panels) < count and panels[-1] and len(panels[-1]) + len(group) / 2 > rows / count:
            panels.append([])
        panels[-1] += group
    return panels


def _draw(axes: "Axes", panel: list[MatrixRow], asked: Sequence[str], left: float) -> None:
    from matplotlib.patches import Rectangle

    columns = ["outcome", *asked]
    places = [0.0, *(number + 1.4 for number in range(len(asked)))]  # a gap after the outcome
    axes.set_xlim(-left, len(asked) + 2.4)
    axes.axis("off")
    for x, name in zip(places, columns, strict=True):
        axes.text(x + 0.5, -0.25, name, rotation=90, ha="center", va="bottom", color=SOFT, fontsize=8)
    for y, (words, result) in enumerate(panel):
        if result is None:
            axes.text(-0.3, y + 0.6, words, ha="right", va="center", color=INK, fontweight="bold")
            continue
        skipped = result.outcome in ("skipped", NOT_ASKED)
        answers = [] if skipped else [answer.answer for answer in matrix.answers(result, asked)]
        axes.text(-0.3, y + 0.5, words, ha="right", va="center", color=SOFT if skipped else INK)
        for x, answer in zip(places, [result.outcome, *answers], strict=False):
            back, ink = SHADES.get(answer, (PAPER, SOFT))
            axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=back, edgecolor="none"))
            axes.text(x + 0.5, y + 0.52, SIGNS[answer], ha="center", va="center", color=ink, weight="bold")
        if skipped:
            # Its row has no answers: the reason stands there instead, as long as the columns are wide.
            why = shortened(result.why.removeprefix(f"{result.name}: "), int(len(asked) * ROW / REASON_LETTER))
            axes.text(1.5, y + 0.5, why, va="center", color=SOFT, fontsize=7.5, fontstyle="italic")
