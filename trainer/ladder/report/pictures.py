"""A report's pictures: each as PNG, and as SVG that takes its colours from the page, so that both can be light or dark.

A run that is not there leaves a gap; no line is drawn over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.ladder.report import forest, losses, multipliers
from trainer.ladder.report.estimates import Tree
from trainer.show import figure

KINDS: Sequence[tuple[str, str, Callable[[Tree], Any]]] = (
    ("multiplier", "Compute multiplier against compute", multipliers.figure),
    ("loss", "Loss against compute", losses.figure),
    ("prediction", "Predictions against what came out", forest.predictions),
    ("cost", "Worth in compute and in time", forest.cost),
)
"""(name, title, what draws it or returns None)"""
NAMES = [name for name, _, _ in KINDS]


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
    found = []
    for name, title, make in KINDS:
        with figure.style():
            drawn = make(tree)
        if drawn is not None:
            found.append(Picture(name, title, figure.png(drawn), figure.svg(drawn, name, f"{tree['name']}: {title}")))
    return found
