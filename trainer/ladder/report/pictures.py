"""A report's pictures: all that the data allow, as PNG for files and as SVG for the page.

A run that is missing leaves a gap; no line is drawn over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.ladder.report import forest, losses, multipliers
from trainer.ladder.report.estimates import Tree
from trainer.show import figure

KINDS: Sequence[tuple[str, Callable[[Tree], Any], str, str]] = (
    (
        "multiplier", multipliers.draw, "Compute multiplier against compute",
        "How many times more compute the baseline would need to reach the arm's loss. Points: each rung alone. "
        "Line and band: all rungs, extrapolated to the target. Dotted: the same if the arm's loss levels off at "
        "another value than the baseline's. A verdict must hold for both.",
    ),
    (
        "loss", losses.draw, "Loss against compute",
        "Above: means over seeds, each seed faint. Below: the same minus the baseline's curve, arms side by side. A "
        "run without a result leaves a gap.",
    ),
    (
        "prediction", forest.draw_predictions, "Predictions against observations",
        "Each row was predicted from the smaller rungs alone, the target from all of them. An observation outside its "
        "interval was predicted wrongly.",
    ),
    (
        "cost", forest.draw_cost, "Worth in compute and in time",
        "What an arm is worth in compute, and in time if steps keep the duration measured here. Times are those of a "
        "run's fastest steps: sharing a machine only makes steps slower.",
    ),
)  # fmt: skip
"""(name, drawing function, which returns None if there is nothing to draw, title, caption) of each picture."""
NAMES = [name for name, *_ in KINDS]


@dataclass(frozen=True)
class Picture:
    """A drawn picture."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    png: bytes
    svg: str
    """An SVG element; its ids begin with the picture's name."""


def draw(tree: Tree) -> list[Picture]:
    """Draw all pictures for which the report has something to show."""
    found = []
    for name, make, title, caption in KINDS:
        with figure.style():
            drawn = make(tree)
        if drawn is not None:
            svg = figure.svg(drawn, name, f"{tree['name']}: {title}")
            found.append(Picture(name, title, caption, figure.png(drawn), svg))
    return found
