"""Loss curves as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_COLOURS = ("#2f6690", "#c8553d", "#3a7d44", "#7b5ea7", "#b8860b", "#3f3f46")
SET_MARKS = ("o", "s", "^", "D", "v", "P")
GREY = "#8a8f98"
INCIDENT_COLOURS = {"preempted": "#b8860b", "not_finite": "#7b5ea7", "save_failed": "#b8860b"}
INCIDENT_COLOUR = "#b3261e"
LABELS = 24  # more would cover each other
SMOOTHING = 0.02  # of the run's steps: the width of the moving average


def draw_curves(summaries: Mapping[str, Mapping[str, Any]], path: Path, log_steps: bool = False) -> None:
    """Write a PNG of the loss curves of one or more runs, named by the keys; values as `summary.summarise` gives them.

    Above: training loss (faint: each step; solid: moving average) and every evaluation set, in nats per token. Below:
    bits per byte of the evaluation sets, which compares runs across tokenizers. One colour a run, one mark a set; thin
    vertical lines are restarts, at the step they resumed from. One run alone also shows its incidents: what happened
    where, as labelled ticks, and the steps lost by it as a shaded stretch. The file appears whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    evaluated = any(summary["eval"] for summary in summaries.values())
    with pyplot.rc_context(rc=_style()):
        heights = [5, 3] if evaluated else [1]
        figure, grid = pyplot.subplots(
            len(heights), 1, sharex=True, squeeze=False, height_ratios=heights, figsize=(9, 6.6 if evaluated else 4.6)
        )
        panels: list[Axes] = list(grid[:, 0])
        for number, (name, summary) in enumerate(summaries.items()):
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            _draw_run(panels, name, summary, colour, many=len(summaries) > 1)
        if len(summaries) == 1:
            for summary in summaries.values():
                _draw_incidents(panels, summary.get("incidents", []))
        _dress(panels, log_steps, columns=min(3, len(summaries)))
        panels[0].set_title(_title(summaries), loc="left", fontsize=12, fontweight="bold", pad=12)
        figure.tight_layout()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=160)
        pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, file.getvalue())


def _style() -> Any:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": "#30343b",
        "axes.grid": True,
        "grid.color": "#e8eaed",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": "#30343b",
        "ytick.color": "#30343b",
        "legend.frameon": False,
        "legend.fontsize": 9,
    }


def _draw_run(panels: Sequence["Axes"], name: str, summary: Mapping[str, Any], colour: str, many: bool) -> None:
    prefix = f"{name} · " if many else ""
    if summary["train"]:
        steps, losses = zip(*summary["train"], strict=True)
        panels[0].plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
        means = smooth(losses)
        panels[0].plot(steps, means, color=colour, linewidth=1.8, label=f"{prefix}train  {means[-1]:.3f}")
    for number, (set_name, rows) in enumerate(summary["eval"].items()):
        steps, losses, bits = zip(*rows, strict=True)
        # One run may give its sets a colour each; several need colour to tell the runs apart.
        own = colour if many else RUN_COLOURS[(number + 1) % len(RUN_COLOURS)]
        mark = SET_MARKS[number % len(SET_MARKS)]
        look: Any = {"color": own, "marker": mark, "markersize": 4.5, "linewidth": 1.1, "linestyle": (0, (4, 2))}
        panels[0].plot(steps, losses, label=f"{prefix}{set_name}  {losses[-1]:.3f}", **look)
        panels[-1].plot(steps, bits, label=f"{prefix}{set_name}  {bits[-1]:.3f}", **look)
    for attempt in summary["attempts"][1:]:
        if attempt["from_step"] is not None:
            for panel in panels:
                panel.axvline(attempt["from_step"], color=colour if many else GREY, linewidth=0.8, linestyle=":")


def _draw_incidents(panels: Sequence["Axes"], incidents: Sequence[Mapping[str, Any]]) -> None:
    known = [incident for incident in incidents if incident["step"] is not None]
    for incident in known:
        colour = INCIDENT_COLOURS.get(incident["kind"], INCIDENT_COLOUR)
        step, lost = incident["step"], incident["lost_steps"] or 0
        if lost:
            for panel in panels:
                panel.axvspan(step - lost, step, color=colour, alpha=0.07, linewidth=0)
        # Of ticks, not lines: restarts have those.
        panels[-1].plot([step], [0], marker="^", color=colour, markersize=5, clip_on=False, zorder=5,
                        transform=panels[-1].get_xaxis_transform())  # fmt: skip
    for label in labels(known):
        panels[-1].annotate(
            label["text"],
            (label["step"], 0.04),
            xycoords=panels[-1].get_xaxis_transform(),
            rotation=90,
            fontsize=7,
            ha="center",
            va="bottom",
            color=INCIDENT_COLOURS.get(label["kind"], INCIDENT_COLOUR),
        )


def labels(incidents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One label for the incidents of a step; none at all where there would be too many to read."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for incident in incidents:
        by_step.setdefault(incident["step"], []).append(incident)
    if len(by_step) > LABELS:
        return []
    return [
        {"step": step, "kind": here[0]["kind"], "text": ", ".join(dict.fromkeys(_label(incident) for incident in here))}
        for step, here in by_step.items()
    ]


def _label(incident: Mapping[str, Any]) -> str:
    words = {"worker_lost": "lost", "save_failed": "save failed", "checkpoint_rejected": "damaged checkpoint"}
    what: str = words.get(incident["kind"]) or incident["kind"].replace("_", " ")
    of_rank = incident["rank"] is not None and incident["kind"] in ("worker_lost", "hung")
    return f"rank {incident['rank']} {what}" if of_rank else f"workers {what}" if what == "lost" else what


def _dress(panels: Sequence["Axes"], log_steps: bool, columns: int) -> None:
    panels[0].set_ylabel("loss (nats per token)")
    panels[-1].set_xlabel("step")
    if len(panels) > 1:
        panels[-1].set_ylabel("bits per byte")
    for panel in panels:
        panel.margins(x=0.02)
        if log_steps:
            panel.set_xscale("log")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="best", ncols=columns, title="at the last step", title_fontsize=8)
    if not panels[0].lines:
        panels[0].text(0.5, 0.5, "no step has been completed", transform=panels[0].transAxes, ha="center", color=GREY)


def _title(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    restarts = sum(max(0, len(summary["attempts"]) - 1) for summary in summaries.values())
    marks = f"   ({restarts} restart{'s' if restarts > 1 else ''}, dotted)" if restarts else ""
    return ", ".join(summaries) + marks if len(summaries) <= 4 else f"{len(summaries)} runs{marks}"


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of about 2 % of the values, narrower towards the start, where a loss falls steeply.

    Centred, so that it does not lag behind. What is not finite stays NaN and is left out of its neighbours' means.
    """
    import numpy

    array = numpy.asarray(values, dtype=numpy.float64)
    finite = numpy.isfinite(array)
    index = numpy.arange(len(array))
    half = numpy.minimum(index, max(1, round(SMOOTHING * len(array) / 2)))
    first, last = index - half, numpy.minimum(index + half + 1, len(array))
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(finite, array, 0.0))])
    counts = numpy.concatenate([[0], numpy.cumsum(finite)])
    means = (sums[last] - sums[first]) / numpy.maximum(counts[last] - counts[first], 1)
    return numpy.where(finite, means, numpy.nan).tolist()
