"""Draw docs/architecture.svg: the rooms of trainer/ and their imports, from the import graph itself.

    python -m scripts.architecture            write the picture
    python -m scripts.architecture --check    exit 1 if the picture no longer shows the import graph

A room stands above all rooms that it imports. An arrow that longer paths imply is left out (transitive reduction), so
that the remaining ones can be followed with a finger. The list of arrows stands in the picture's description: that is
how `--check` and the tests compare a picture with the code without drawing it again.
"""

import io
import re
import sys
from pathlib import Path

import grimp
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
GROUND = (
    "config",
    "config_rules",
    "tomlfile",
    "builtin",
    "files",
    "errors",
    "out_of_memory",
    "phases",
    "signals",
    "torch_versions",
)
"""Rooms that nearly all others import: drawn as one box."""
COLOURS = {"many runs": "#e7e2f0", "one worker": "#f3e3dc", "training": "#fbf1d9", "log and display": "#e2efe2"}
KINDS = {
    "many runs": ("ladder", "chaos", "fleet", "launch"),
    "one worker": ("member", "job", "faults", "sentinel", "loop"),
    "training": ("checkpoint", "step", "evaluate", "costs", "exact", "data", "model", "optim", "parallel"),
    "log and display": ("log", "show"),
}
WIDTH, HEIGHT = 1.16, 0.34

Edge = tuple[str, str]


def edges() -> list[Edge]:
    """(importing room, imported room), without what a longer path implies."""
    graph = grimp.build_graph("trainer", exclude_type_checking_imports=True, cache_dir=None)
    found: set[Edge] = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            source, target = _room(module), _room(imported)
            if source != target and source not in ("", "__main__", "ground") and target:
                found.add((source, target))
    return sorted(edge for edge in found if not _implied(edge, found))


def _room(module: str) -> str:
    room = [*module.split("."), ""][1]
    return "ground" if room in GROUND else room


def _implied(edge: Edge, found: set[Edge]) -> bool:
    start, goal = edge
    reached = {target for source, target in found if source == start and target != goal}
    while True:
        further = {target for source, target in found if source in reached} - reached
        if goal in further or not further:
            return goal in further
        reached |= further


def drawn(picture: Path = PICTURE) -> list[Edge]:
    """The arrows that a picture says it shows."""
    described = re.search(r"<desc>(.*?)</desc>", picture.read_text(encoding="utf-8"), re.DOTALL)
    pairs = described[1].split("; ") if described else []
    return [(source, target) for source, target in (pair.split(" imports ") for pair in pairs)]


def draw(arrows: list[Edge]) -> str:
    """The picture as SVG text."""
    places = _places(arrows)
    lowest = min(y for _, y in places.values())
    figure = Figure(figsize=(10.6, 0.85 * (0.9 - lowest)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10.6), ylim=(lowest - 0.45, 0.45))
    axes.axis("off")
    for source, target in arrows:
        (x0, y0), (x1, y1) = places[source], places[target]
        bend = 0.05 * (x1 - x0) / max(1.0, y0 - y1)
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0 - HEIGHT / 2 - 0.02),
                (x1, y1 + HEIGHT / 2 + 0.03),
                arrowstyle="-|>",
                mutation_scale=9,
                linewidth=0.9,
                shrinkA=0,
                shrinkB=0,
                color="#7b8794",
                connectionstyle=f"arc3,rad={bend:.2f}",
                zorder=1,
            )
        )
    for room, (x, y) in places.items():
        kind = next((kind for kind, members in KINDS.items() if room in members), "")
        axes.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.07",
                facecolor=COLOURS.get(kind, "#eceff1"),
                edgecolor="#8a94a0",
                linewidth=0.8,
                zorder=3,
            )
        )
        axes.text(x, y, room, ha="center", va="center", fontsize=10, weight="bold", zorder=4, color="#1d2127")
    for number, (name, colour) in enumerate(COLOURS.items()):
        axes.text(
            0.2, 0.2 - 0.3 * number, name, va="center", fontsize=8.5, color="#1d2127",
            bbox={"boxstyle": "round,pad=0.3", "facecolor": colour, "edgecolor": "none"},
        )  # fmt: skip
    return _svg(figure, arrows)


def _places(arrows: list[Edge]) -> dict[str, tuple[float, float]]:
    """Centre of each room. Rows by the longest path from the top; in a row, rooms lie near those they are tied to."""
    rooms = sorted({room for edge in arrows for room in edge})
    depth = dict.fromkeys(rooms, 0)
    for _ in rooms:  # a path visits each room once at most
        for source, target in arrows:
            depth[target] = max(depth[target], depth[source] + 1)
    for room in sorted(rooms, key=depth.__getitem__, reverse=True):  # as low as the rooms it imports allow
        below = [depth[target] for source, target in arrows if source == room]
        if below and room != "cli":
            depth[room] = min(below) - 1
    rows = [sorted(room for room in rooms if depth[room] == level) for level in range(max(depth.values()) + 1)]
    x = {room: 5.3 + 0.01 * number for number, room in enumerate(rooms)}
    for _ in range(30):
        for row in rows:
            wish = {room: _mean([x[s if t == room else t] for s, t in arrows if room in (s, t)]) for room in row}
            row.sort(key=lambda room: (wish[room], room))
            step = WIDTH + 0.35
            first = sum(wish.values()) / max(1, len(wish)) - step * (len(row) - 1) / 2
            first = min(max(first, WIDTH / 2 + 0.1), 10.5 - WIDTH / 2 - step * (len(row) - 1))
            for number, room in enumerate(row):
                x[room] = first + step * number
    return {room: (x[room], -float(level)) for level, row in enumerate(rows) for room in row}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _svg(figure: Figure, arrows: list[Edge]) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "toprope", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    described = "; ".join(f"{source} imports {target}" for source, target in arrows)
    start = text.index(">", text.index("<svg")) + 1
    return (
        f"{text[:start]}\n <title>Rooms of trainer/ and their imports</title>\n <desc>{described}</desc>{text[start:]}"
    )


def main() -> None:
    arrows = edges()
    if "--check" in sys.argv[1:]:
        if drawn() != arrows:
            sys.exit(
                "docs/architecture.svg no longer shows the imports of trainer/.\n  Run python -m scripts.architecture."
            )
        return
    PICTURE.write_text(draw(arrows), encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
