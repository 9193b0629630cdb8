"""A report's pictures: each as PNG, and as SVG that takes its colours from the page, so that both can be light or dark.

A run that is not there leaves a gap; no line is drawn over it.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from trainer.ladder.report import forest, losses, multipliers
from trainer.ladder.report.drawing import VARIABLES, style
from trainer.ladder.report.estimates import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = []
    for name, title, make in KINDS:
        with pyplot.rc_context(rc=style()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # in names: the page has them in text
            figure = make(tree)
            if figure is not None:
                figure.draw_without_rendering()  # lays it out
                figure.set_layout_engine("none")  # once for both formats, else half of the time goes there
                found.append(Picture(name, title, _png(figure), _svg(figure, name, f"{tree['name']}: {title}")))
                pyplot.close(figure)
    return found


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
