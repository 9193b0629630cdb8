"""A forecast for people: on the terminal, as pictures, and as one page."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import files
from trainer.show import figure, inspect, page, timeline, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

PAGE, PICTURE, TREE = "forecast.html", "forecast.png", "forecast.json"
TIMELINE = "timeline.png"
SHOWN_INCIDENTS = 12
"""Incidents that the terminal shows; the page has all."""
MEANINGS = {
    "productive": "work that survived",
    "save_stall": "waiting for saves and copies",
    "lost_steps": "work that was lost and done again",
    "down": "until a failure was known",
    "startup": "restarting or regrouping",
    "preempted": "planned maintenance",
    "waiting": "for enough healthy nodes, or for other clusters",
    "reduced": "what missing nodes would have computed",
}
COLOURS = dict(
    zip(MEANINGS, ("good", "series4", "bad", "series7", "unsure", "grey", "series0", "series3"), strict=True)
)


def write(tree: dict[str, Any], out: Path) -> None:
    """Write OUT/forecast.html, forecast.png, forecast.json and of one scenario timeline.png. Raises OSError."""
    import json

    out.mkdir(parents=True, exist_ok=True)
    drawn = scale_figure(tree) if "lines" in tree else parts_figure(tree)
    title = tree["question"] or "A forecast of goodput"
    files.write(out / PICTURE, figure.png(drawn))
    files.write(out / TREE, json.dumps(tree, indent=1))
    pictures = {"picture": figure.svg(drawn, "forecast", title), "timeline": ""}
    if "timeline" in tree:
        pictures["timeline"] = timeline.svg(tree["timeline"])
        files.write(out / TIMELINE, figure.png(timeline.draw(tree["timeline"])))
    files.write(out / PAGE, page.render("forecast.html", tree=tree, meanings=MEANINGS, title=title, **pictures))


def terminal(tree: dict[str, Any]) -> "RenderableType":
    """The forecast as tables of text."""
    return _scale_table(tree) if "lines" in tree else _run_table(tree)


def _run_table(tree: dict[str, Any]) -> "RenderableType":
    from rich.console import Group
    from rich.table import Table

    wall = tree["wall_seconds"]
    head = Table.grid(padding=(0, 2))
    head.add_row("goodput", units.interval(tree["goodput"], units.percent) + "  mean and its 95 % interval")
    head.add_row(
        "", f"{units.percent(tree['range']['low'])} to {units.percent(tree['range']['high'])}  in 95 % of runs"
    )
    head.add_row("failures", f"{sum(tree['failures'].values()):,.0f} in a run, one in {units.duration(_mttf(tree))}")
    saves = tree["checkpoint"]
    best = "" if saves["best_seconds"] == saves["seconds"] else f"; better: {units.duration(saves['best_seconds'])}"
    head.add_row("saves", f"one in {units.duration(saves['seconds'])} of work{best}")
    parts = Table("time", "share", "hours", "", box=None, header_style="bold")
    for name, seconds in tree["parts"].items():
        if seconds:
            parts.add_row(name, units.percent(seconds / wall), f"{seconds / 3600:,.1f}", MEANINGS[name])
    causes = Table("lost to", "failures", "hours", box=None, header_style="bold")
    for name, seconds in sorted(tree["lost_by_cause"].items(), key=lambda item: -item[1]):
        causes.add_row(name, f"{tree['failures'][name]:,.0f}", f"{seconds / 3600:,.1f}")
    return Group(
        tree["question"], "", head, "", parts, "", causes, "", *_incidents(tree["timeline"]), *_published_lines(tree),
        *tree["findings"],
    )  # fmt: skip


def _incidents(drawn: dict[str, Any]) -> "list[RenderableType]":
    """The first incidents of the simulated run that is drawn, as `inspect` shows those of a real one."""
    found = drawn["incidents"]
    rest = [f"… and {len(found) - SHOWN_INCIDENTS:,} more: --out DIR writes all of them"]
    return (
        [
            drawn["title"],
            inspect.incidents(found[:SHOWN_INCIDENTS]),
            *(rest if len(found) > SHOWN_INCIDENTS else []),
        ]
        if found
        else [f"{drawn['title']}: no incident"]
    )


def _mttf(tree: dict[str, Any]) -> float | None:
    hours = tree["mttf_hours"]["value"]
    return None if hours is None else hours * 3600


def _published_lines(tree: dict[str, Any]) -> list[str]:
    published = tree.get("published")
    if published is None:
        return []
    lines = ["", f"published: {published['figure']} ({published['source']})"]
    for check in published["checks"]:
        number = units.percent if check["what"] == "goodput" else "{:.3g} h".format
        verdict = "agrees" if check["agrees"] else f"does not agree{': ' if published['why'] else ''}{published['why']}"
        lines.append(f"ours:      {units.interval(check['ours'], number)}: {verdict}")
    return lines


def _scale_table(tree: dict[str, Any]) -> "RenderableType":
    from rich.console import Group
    from rich.table import Table

    table = Table("devices", *(line["name"] for line in tree["lines"]), box=None, header_style="bold")
    for number, point in enumerate(tree["lines"][0]["points"]):
        cells = [line["points"][number]["goodput"]["value"] for line in tree["lines"]]
        table.add_row(units.amount(point["devices"]), *map(units.percent, cells))
    for bar in tree["thresholds"]:
        falls = [line["falls_below"][str(bar)] for line in tree["lines"]]
        table.add_row(f"below {units.percent(bar)} at", *("–" if at is None else units.amount(at) for at in falls))
    first = Table("improve first at", *(line["name"] for line in tree["lines"]), box=None, header_style="bold")
    for number, point in enumerate(tree["lines"][0]["points"]):
        cells = [advice(line["points"][number]["improve"]) for line in tree["lines"]]
        first.add_row(units.amount(point["devices"]), *cells)
    return Group(
        tree["question"], "", table, "", first, "halving a time or a rate, doubling spares or clusters: goodput gained"
    )


def advice(improve: dict[str, float]) -> str:
    """ "restart +4.1": the improvement that adds most, in points of goodput; "–" where none adds half a point."""
    name, gain = next(iter(improve.items()))
    return f"{name} +{100 * gain:.1f}" if gain >= 0.005 else "–"


def parts_figure(tree: dict[str, Any]) -> "Figure":
    """One bar: how the wall time is shared out."""
    with figure.style():
        drawn = figure.new_figure(7.2, 1.9)
        axes = drawn.add_subplot()
        left = 0.0
        for name, seconds in tree["parts"].items():
            share = 100 * seconds / tree["wall_seconds"]
            if share > 0:
                axes.barh([0], [share], left=left, color=figure.colour(COLOURS[name]), label=f"{name} {share:.3g} %")
                left += share
        axes.set_xlim(0, 100)
        axes.set_yticks([])
        axes.set_xlabel("share of the wall time, %")
        axes.set_title(f"goodput {units.interval(tree['goodput'], units.percent)}")
        drawn.legend(loc="outside lower center", ncols=4)
    return drawn


def scale_figure(tree: dict[str, Any]) -> "Figure":
    """Goodput against devices, a line per policy with the interval of its mean."""
    with figure.style():
        drawn = figure.new_figure(7.2, 4.2)
        axes = drawn.add_subplot()
        for line, colour, mark in zip(tree["lines"], figure.SERIES, figure.MARKS, strict=False):
            devices = [point["devices"] for point in line["points"]]
            value, low, high = (
                [100 * point["goodput"][key] for point in line["points"]] for key in ("value", "low", "high")
            )
            axes.plot(devices, value, color=colour, marker=mark, markersize=4, label=line["name"])
            axes.fill_between(devices, low, high, color=colour, alpha=0.2, linewidth=0)
        for bar in tree["thresholds"]:
            axes.axhline(100 * bar, color=figure.SOFT, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_ylim(0, 100)
        axes.set_xlabel("devices")
        axes.set_ylabel("goodput, % of the wall time")
        axes.set_title("Where each kind of fault tolerance stops working")
        axes.legend(loc="lower left")
    return drawn
