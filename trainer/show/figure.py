"""Shared by all pictures: palette, matplotlib style, and a figure as PNG or as SVG.

A picture depends on its contents alone, not on MPLBACKEND or a matplotlibrc. So figures are made
without pyplot, which also keeps every figure it made, and everything that draws enters `style` before it asks for
another part of matplotlib.
"""

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# `svg` replaces each light colour by its name. So no two names share one, and paper is not the plain white that
# matplotlib itself draws in.
PALETTE: Mapping[str, tuple[str, str]] = {
    "paper": ("#fffffe", "#14171c"), "panel": ("#f7f8fa", "#1b1f26"),
    "line": ("#e4e7ec", "#2c323b"), "ink": ("#1d2127", "#e6e9ee"),
    "soft": ("#667085", "#98a2b3"), "grey": ("#8a8f98", "#98a2b3"),
    "good": ("#1a7343", "#7fd09a"), "good-back": ("#e6f4ea", "#173324"),
    "bad": ("#b3261e", "#ff9a90"), "bad-back": ("#fce8e6", "#43201d"),
    "unsure": ("#855b00", "#ecc35c"), "unsure-back": ("#fdf3d7", "#392e12"),
    "silent": ("#86349b", "#dda0ee"), "silent-back": ("#f6e8fa", "#381f40"),
    "idle-back": ("#f1f2f5", "#22272f"), "series0": ("#2f6690", "#7fb2dc"),
    "series1": ("#c8553d", "#f0917b"), "series2": ("#3a7d44", "#84c68e"),
    "series3": ("#7b5ea7", "#b9a1e0"), "series4": ("#b8860b", "#e0b84d"),
    "series5": ("#00798c", "#5cc4d4"), "series6": ("#a23b72", "#e08ab8"),
    "series7": ("#6b4226", "#c9a184"),
}  # fmt: skip
"""Each colour by the name of its CSS variable: on a light page, on a dark one. Pictures are drawn in the light ones."""


def colour(name: str) -> str:
    """The palette's colour `name` on a light page, as "#rrggbb"."""
    return PALETTE[name][0]


PAPER, LINE, INK, SOFT, GREY = map(colour, ("paper", "line", "ink", "soft", "grey"))
GOOD, BAD, UNSURE, SILENT = map(colour, ("good", "bad", "unsure", "silent"))
SERIES = tuple(colour(name) for name in PALETTE if name.startswith("series"))
"""Colours of arms, runs and held-out sets, in this order."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "h")
DPI = 160

STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "figure.facecolor": PAPER,
    "axes.facecolor": PAPER, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT,
    "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE,
    "grid.linewidth": 0.8, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.frameon": False,
    "legend.fontsize": 8.5, "svg.hashsalt": "toprope", "svg.fonttype": "path",
}  # fmt: skip


@contextmanager
def style(more: Any = None) -> Iterator[None]:
    """Use the house style. It applies both when a figure's parts are made and when it is drawn: do both in here.

    `more` are settings of matplotlib that override the house style.
    """
    # A notebook's kernel sets MPLBACKEND for all processes that it starts, to a backend that may be missing here.
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    # All of its own defaults first: a matplotlibrc has changed the current settings.
    settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**settings, **STYLE, **(more or {})}), warnings.catch_warnings():
        # Names are the user's: a page has them as text, even where the font lacks a letter.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def new_figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # pyplot would choose the canvas by MPLBACKEND or by the machine's displays.
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def png(figure: "Figure", source: str | None = None) -> bytes:
    """The figure as PNG: the same bytes every time. `source` is kept in it as a text."""
    return _save(figure, "png", metadata={"Software": None, "Source": source})


def svg(figure: "Figure", name: str, title: str, text_as_paths: bool = True) -> str:
    """The figure as an SVG element for a page that defines the palette's variables, so it can be light or dark.

    `name` begins every id in it: pages hold several pictures. `title` is for readers who cannot see the picture.
    Letters are drawn as shapes, the same on every machine, or else as text, ten times smaller and found by a search,
    but as wide as the reader's font makes it.
    """
    font = {} if text_as_paths else {"svg.fonttype": "none", "font.family": ["DejaVu Sans", "sans-serif"]}
    text = _save(figure, "svg", {"Date": None, "Creator": None}, font).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for variable, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{variable})")
    # Ids must differ between the pictures of a page.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def standalone(svg: str) -> str:
    """A picture made by `svg` as a file of its own: it brings the colours that a page would define."""
    light, dark = ("".join(f"--{name}:{pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return svg.replace(">", f">{style}", 1)


def _save(figure: "Figure", kind: str, metadata: dict[str, str | None], settings: Any = None) -> bytes:
    file = io.BytesIO()
    with style(settings):
        engine = figure.get_layout_engine()
        if engine is not None:
            # Lay it out once for both formats. With any engine left, even one that does nothing, matplotlib would draw
            # the whole figure once more before each format.
            engine.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()


def shortened(text: str, most: int) -> str:
    """A user's name for a picture: at most `most` characters, and no "$" read as a formula."""
    text = text.replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"
