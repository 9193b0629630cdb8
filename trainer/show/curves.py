"""Loss curves as a picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import files
from trainer.show import figure, units
from trainer.show.figure import BAD, GREY, MARKS, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCIDENT_COLOURS = {"preempted": SERIES[4], "not_finite": SERIES[3], "save_failed": SERIES[4]}
MOST_LABELS = 24  # more would cover each other
LETTER_INCHES = 0.062  # of a label, which is written upwards
LABEL_SHARE = 0.019  # of the picture's width
X_MARGIN = 0.02
SMOOTHING = 0.02  # width of the moving average, as a share of the run's steps


def draw_curves(summaries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the loss curves of one or more runs: names and values of `log.summary.summarise`.

    Above the losses (faint: each step; solid: moving average), in nats per token, below the bits per byte of held-out
    sets, which can be compared across tokenizers. Each run has a colour and each set a mark; dotted lines are restarts,
    at the step they resumed from. A single run also shows its incidents, with the steps that they cost shaded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, figure.png(draw(summaries)))


def draw(summaries: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """The figure that `draw_curves` writes."""
    is_evaluated = any(summary["eval"] or _code_so_far(summary) for summary in summaries.values())
    is_single = len(summaries) == 1
    incidents = [i for i in next(iter(summaries.values())).get("incidents", []) if is_single and i["step"] is not None]
    labels = incident_labels(incidents)
    heights = [4.1, 2.5] if is_evaluated else [4.6]
    if incidents:
        heights.append(0.2 + LETTER_INCHES * max([0, *(len(text) for _, _, text in labels)]))
    with figure.style():
        drawn = figure.new_figure(9, sum(heights))
        grid = drawn.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        panels: list[Axes] = list(grid[:, 0])
        lowest, band = panels[-1], panels.pop() if incidents else None
        for number, (name, summary) in enumerate(summaries.items()):
            _draw_run(panels, "" if is_single else f"{name} · ", summary, SERIES[number % len(SERIES)])
        for panel, unit in zip(panels, ("loss (nats per token)", "bits per byte"), strict=False):
            panel.set_ylabel(unit)
            panel.margins(x=X_MARGIN)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(loc="best", ncols=min(3, len(summaries)), title="at the last step", title_fontsize=8)
        if band is not None:
            _draw_incidents(panels, band, incidents, labels)
        lowest.set_xlabel("step")
        if not panels[0].lines:
            where: Any = {"transform": panels[0].transAxes, "ha": "center", "color": GREY}
            panels[0].text(0.5, 0.5, "no step has been completed", **where)
        restarts = sum(max(0, len(summary["attempts"]) - 1) for summary in summaries.values())
        title = ", ".join(summaries) if len(summaries) <= 4 else f"{len(summaries)} runs"
        title += f"   ({units.plural(restarts, 'restart')}, dotted)" if restarts else ""
        panels[0].set_title(title, fontsize=12, pad=12)
    return drawn


def _draw_run(panels: Sequence["Axes"], prefix: str, summary: Mapping[str, Any], colour: str) -> None:
    """Draw one run; an empty `prefix` says that it is the only one."""
    if summary["train"]:
        steps, losses = zip(*summary["train"], strict=True)
        panels[0].plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
        # The number is the loss itself, as `inspect` has it; the line is not.
        label = f"{prefix}train  {losses[-1]:.3f}  (line: mean of {2 * _half_window(len(losses)) + 1} steps)"
        panels[0].plot(steps, smooth(losses), color=colour, linewidth=1.8, label=label)
    for number, (set_name, rows) in enumerate(summary["eval"].items()):
        steps, losses, bits = zip(*rows, strict=True)
        style: Any = {
            # The only run may give each set a colour; for several runs, the colour shows the run.
            "color": colour if prefix else SERIES[(number + 1) % len(SERIES)],
            "marker": MARKS[number % len(MARKS)], "markersize": 4.5, "linewidth": 1.1, "linestyle": (0, (4, 2)),
        }  # fmt: skip
        panels[0].plot(steps, losses, label=f"{prefix}{set_name}  {losses[-1]:.3f}", **style)
        # matplotlib leaves a gap where a value is unknown.
        known = [math.nan if value is None else value for value in bits]
        panels[-1].plot(steps, known, label=f"{prefix}{set_name}  {units.loss(bits[-1], 3)}", **style)
    if code := _code_so_far(summary):
        steps, bits = zip(*code, strict=True)
        label = f"{prefix}code of the first epoch so far  {units.loss(bits[-1], 3)}"
        panels[-1].plot(steps, bits, color=colour if prefix else GREY, linewidth=1.3, linestyle=":", label=label)
    for attempt in summary["attempts"][1:]:
        if attempt["from_step"] is not None:
            for panel in panels:
                panel.axvline(attempt["from_step"], color=colour if prefix else GREY, linewidth=0.8, linestyle=":")


def _code_so_far(summary: Mapping[str, Any]) -> list[list[float]]:
    """[[step, bits per byte]] of the prequential code (log/code_length.py); empty if it is unknown."""
    so_far = summary.get("code_length", {}).get("so_far", [])
    return [[step, math.nan if bits is None else bits] for step, bits in so_far]


def _draw_incidents(
    panels: Sequence["Axes"], band: "Axes", incidents: Sequence[Mapping[str, Any]],
    labels: Sequence[tuple[int, str, str]],
) -> None:  # fmt: skip
    """Shade lost steps in the panels; mark and label the incidents in the band, where there are no curves."""
    band.set(ylim=(0, 1), yticks=[])
    band.grid(visible=False)
    band.spines["left"].set_visible(False)
    band.margins(x=X_MARGIN)
    for incident in incidents:
        colour = INCIDENT_COLOURS.get(incident["kind"], BAD)
        step, lost = incident["step"], incident["lost_steps"] or 0
        for panel in panels if lost else ():
            panel.axvspan(step - lost, step, color=colour, alpha=0.07, linewidth=0)
        band.plot([step], [1], marker="^", color=colour, markersize=5, clip_on=False, zorder=5)
    first, last = band.get_xlim()
    places = spread([step for step, _, _ in labels], (last - first) * LABEL_SHARE, last)
    for place, (_, kind, text) in zip(places, labels, strict=True):
        colour = INCIDENT_COLOURS.get(kind, BAD)
        band.annotate(text, (place, 1), (0, -6), textcoords="offset points", rotation=90, fontsize=7, ha="center",
                      va="top", color=colour)  # fmt: skip


def spread(wanted: Sequence[float], apart: float, most: float) -> list[float]:
    """Places near the `wanted` ones, which rise: at least `apart` from one another, none beyond `most` if they fit."""
    rising = itertools.accumulate(wanted, lambda before, place: max(place, before + apart))
    falling = itertools.accumulate(reversed([*rising, most + apart]), lambda after, place: min(place, after - apart))
    return list(falling)[:0:-1]


def incident_labels(incidents: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """Return (step, kind, text): one label for all incidents of a step; none if there would be too many to read."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for incident in incidents:
        by_step.setdefault(incident["step"], []).append(incident)
    if len(by_step) > MOST_LABELS:
        return []
    texts = {step: ", ".join(dict.fromkeys(map(units.words, same))) for step, same in by_step.items()}
    return [(step, by_step[step][0]["kind"], texts[step]) for step in sorted(by_step)]


def _half_window(values: int) -> int:
    return max(1, round(SMOOTHING * values / 2))


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a window of about 2 % of the values, narrower towards both ends.

    The window is centred, so that the curve does not lag behind a loss that falls steeply. Values that are not finite
    become NaN and are left out of their neighbours' means.
    """
    import numpy

    array = numpy.asarray(values, dtype=numpy.float64)
    finite = numpy.isfinite(array)
    index = numpy.arange(len(array))
    half = numpy.minimum(index, _half_window(len(array)))
    first, last = index - half, numpy.minimum(index + half + 1, len(array))
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(finite, array, 0.0))])
    counts = numpy.concatenate([[0], numpy.cumsum(finite)])
    means = (sums[last] - sums[first]) / numpy.maximum(counts[last] - counts[first], 1)
    return numpy.where(finite, means, numpy.nan).tolist()
