"""A run in wall time, as a picture of its timeline (`trainer.log.timeline`, or a simulated one: `forecast.course`).

From above: a flag for each fault; the step reached over wall time, a line per attempt, with lost work shaded; the
attempts, hatched while they start; the incidents as the run recorded them. Where each incident would need a row of its
own and there is no room for so many, a row holds all incidents of one sort, with their number and their time.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.show import figure
from trainer.show.units import clock, duration, plural, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sizes in inches.
WIDTH, LEFT, RIGHT = 9.0, 0.62, 0.12
PLOT, LANE, FLAG_ROW, INCIDENT_ROW, GAP = 1.9, 0.2, 0.15, 0.2, 0.08
LETTER = 0.068  # a letter at TEXT_POINTS: wider than the average of any label in a usual sans-serif font
TEXT_POINTS = 8.0
MARGIN = 4 - 72 * LEFT  # points from the axes' left end to where names of rows begin
FLAG_ROWS = 14  # faults beyond that get a flag without a label
INCIDENT_ROWS = 24  # incidents that need more are shown by sort
SORT_ROWS = 12  # the most frequent sorts of incidents have a row each, the rest share the last one
DAY = 86_400.0
WORK, LOST, FAULT, INCIDENT, SAVE = figure.SERIES[0], figure.SERIES[1], figure.BAD, figure.UNSURE, figure.SERIES[2]
ATTEMPT_COLOURS = {"finished": SAVE, "preempted": INCIDENT, "failed": LOST, "died": LOST}
DASHES: Any = (0, (1.6, 1.6))
GAP_IN_LINE = (math.nan, math.nan)
SAVE_MARK: Any = {"marker": "|", "markersize": 8, "markeredgewidth": 1.6}
EVAL_MARK: Any = {"marker": "o", "markersize": 4, "markerfacecolor": figure.PAPER}
HATCHED: Any = {"facecolor": "none", "edgecolor": figure.SOFT, "hatch": "//////", "linewidth": 0.6}


def svg(timeline: Mapping[str, Any], name: str = "timeline") -> str:
    """Draw a timeline as an SVG element in the colours of its page.

    `name` must be unique among the pictures of a page: it begins every id in the element.
    """
    if timeline.get("origin") is None:
        about = "no timeline: nothing was logged, or the log cannot be read"
        with figure.style():
            empty = figure.new_figure(WIDTH, 0.5, layout="none")
            empty.text(0.5, 0.5, about, ha="center", va="center", color=figure.SOFT)
        return figure.svg(empty, name, about, text_as_paths=False)
    begin, end = _span(timeline)
    attempts = len(timeline["attempts"])
    about = (
        f"step over {end - begin:.1f} s: {attempts} attempts, {max(0, attempts - 1)} restarts, "
        f"{len(timeline['faults'])} faults, {len(timeline['incidents'])} incidents"
    )
    return figure.svg(draw(timeline), name, about, text_as_paths=False)


@dataclass
class Label:
    """Text beside a mark, to be put into a row where it covers no other text."""

    text: str
    time: float  # seconds at which the mark is
    row: int | None = None  # None: no row was free
    is_flipped: bool = False  # the text is on the left of its mark, since on the right it would leave the picture


def assign_rows(labels: Sequence[Label], begin: float, end: float, inch: float, most: int) -> int:
    """Give each label, sorted by time, the lowest of `most` rows in which it covers no other. Returns the rows used.

    The picture shows seconds `begin` to `end`, `inch` of them an inch. Goes from the last label to the first, so that
    the pole of an earlier flag passes on the left of later labels.
    """
    left_ends: list[float] = []  # of the leftmost label in each row
    for label in reversed(labels):
        width = (len(label.text) * LETTER + 0.2) * inch
        label.is_flipped = label.time + width > end and label.time - width > begin
        left, right = (label.time - width, label.time) if label.is_flipped else (label.time, label.time + width)
        label.row = next((row for row, left_end in enumerate(left_ends) if right <= left_end), None)
        if label.row is not None:
            left_ends[label.row] = left
        elif len(left_ends) < most:
            label.row = len(left_ends)
            left_ends.append(left)
    return len(left_ends)


def draw(timeline: Mapping[str, Any]) -> "Figure":
    """Draw the timeline of a run that logged something."""
    begin, end = _span(timeline)
    width = WIDTH - LEFT - RIGHT
    inch = (end - begin) / width
    flags = _flags(timeline["faults"])
    flag_rows = assign_rows(flags, begin, end, inch, FLAG_ROWS)
    incidents, incident_rows = _incidents(timeline, begin, end, inch)
    title = timeline.get("title", "")

    # Heights from below: legend and seconds, incidents, attempts, steps, flags.
    bottom, lanes_height = 0.5, LANE + 2 * GAP + incident_rows * INCIDENT_ROW
    height = bottom + lanes_height + PLOT + flag_rows * FLAG_ROW + 0.15 + (0.2 if title else 0)
    with figure.style({"font.size": TEXT_POINTS}):
        from matplotlib.ticker import MaxNLocator

        drawn = figure.new_figure(WIDTH, height, layout="none")
        left, right = LEFT / WIDTH, width / WIDTH
        plot = drawn.add_axes((left, (bottom + lanes_height) / height, right, PLOT / height))
        lanes = drawn.add_axes((left, bottom / height, right, lanes_height / height), sharex=plot)
        highest = max([timeline["steps_budget"] or 1, *(row[1] for row in timeline["steps"])])
        plot.set(xlim=(begin, end), ylim=(0, highest))
        lanes.set(ylim=(lanes_height, 0), yticks=[])  # inches, downwards
        plot.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        if end - begin > 3 * DAY:  # clocks are round numbers of seconds, days are not
            ticks = MaxNLocator(9, steps=[1, 2, 5, 10], integer=True).tick_values(begin / DAY, end / DAY)
            lanes.set_xticks([day * DAY for day in ticks if begin <= day * DAY <= end])
        else:
            lanes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
        lanes.xaxis.set_major_formatter(lambda t, _: _moment(t, end - begin))
        for axes in (plot, lanes):
            axes.tick_params(length=0, labelcolor=figure.SOFT, labelbottom=axes is lanes)
            axes.spines[:].set_visible(False)
        _write(plot, "step", (0, 1), (MARGIN, 5), xycoords="axes fraction", color=figure.SOFT)
        rows = {"attempt": GAP + LANE / 2, "incident": LANE + 2 * GAP + 0.12}
        for name, y in rows.items() if incidents else [("attempt", rows["attempt"])]:
            where = lanes.get_yaxis_transform()
            _write(lanes, name, (0, y), (MARGIN, 0), xycoords=where, va="center", color=figure.SOFT)
        _draw_progress(plot, timeline)
        _draw_saves_and_evals(plot, timeline)
        _draw_flags(plot, flags)
        _draw_attempts(lanes, timeline["attempts"], inch)
        _draw_incidents(lanes, incidents, inch)
        _draw_legend(drawn, timeline)
        if title:
            drawn.text(LEFT / WIDTH, 1 - 0.08 / height, title, va="top", weight="bold", parse_math=False)
    return drawn


@dataclass
class Incidents:
    """A row's worth of incidents: one, or all of one sort."""

    label: Label
    spans: list[tuple[float, float]]
    """First and last second of each."""


def _incidents(timeline: Mapping[str, Any], begin: float, end: float, inch: float) -> tuple[list[Incidents], int]:
    """Return the incidents with their labels put into rows, and the number of rows."""
    ends = {attempt["attempt"]: attempt["ended"] for attempt in timeline["attempts"]}
    spans: list[tuple[float, float, str]] = []
    for incident in timeline["incidents"]:
        # An attempt that died before its first progress has an incident without a time.
        time = ends.get(incident["attempt"]) if incident["t"] is None else incident["t"]
        if time is not None:
            spans.append((time, time + (incident["seconds"] or 0.0), words(incident)))
    spans.sort(key=lambda span: span[0])
    singles = [Incidents(Label(text + _lasting(until - t), t), [(t, until)]) for t, until, text in spans]
    rows = assign_rows([single.label for single in singles], begin, end, inch, len(singles))
    if rows <= INCIDENT_ROWS:
        return singles, rows
    sorts = [text for text, _ in Counter(text for _, _, text in spans).most_common()]
    rest = sorts[SORT_ROWS - 1 :] if len(sorts) > SORT_ROWS else []
    groups = [(text, {text}) for text in sorts[: len(sorts) - len(rest)]]
    if rest:
        groups.append((f"{len(rest)} other sorts", set(rest)))
    bundles = []
    for name, texts in groups:
        those = [(t, until) for t, until, text in spans if text in texts]
        seconds = math.fsum(until - t for t, until in those)
        label = Label(f"{name}: {len(those):,}" + _lasting(seconds), begin, len(bundles))
        bundles.append(Incidents(label, those))
    return bundles, len(bundles)


def _lasting(seconds: float) -> str:
    return "" if seconds < 0.05 else f", {seconds:.1f} s" if seconds < 600 else f", {duration(seconds)}"


def _moment(t: float, span: float) -> str:
    return f"{t:g} s" if span < 300 else clock(t) if span <= 3 * DAY else f"day {t / DAY:g}"


def _span(timeline: Mapping[str, Any]) -> tuple[float, float]:
    """The first and the last second of anything that is known."""
    times = [0.0, *(fault["t"] for fault in timeline["faults"]), *_progress_times(timeline)]
    times += [attempt[name] for attempt in timeline["attempts"] for name in ("process_started", "ready", "ended")]
    known = [time for time in times if time is not None]
    return min(known), max(*known, min(known) + 0.1)


def _progress_times(timeline: Mapping[str, Any]) -> list[float]:
    return [row[0] for name in ("steps", "saves", "evals") for row in timeline[name]]


def _write(axes: "Axes", text: str, xy: tuple[float, float], points: tuple[float, float], **style: Any) -> None:
    """Write user text at a place, moved by so many points; outside of the axes too, and never read as a formula."""
    axes.annotate(text, xy, points, textcoords="offset points", annotation_clip=False, parse_math=False, **style)


def _draw_progress(plot: "Axes", timeline: Mapping[str, Any]) -> None:
    """Draw the step reached over time, a line per attempt, and below it the work that a later attempt did again."""
    attempts, times = timeline["attempts"], _progress_times(timeline)
    idle_since, before = plot.get_xlim()[0], None
    by_attempt: dict[int, list[tuple[float, float]]] = {}
    for t, step, number in timeline["steps"]:
        by_attempt.setdefault(number, []).append((t, step))
    # Lines of one kind are one line with gaps: a simulated run has hundreds of attempts.
    idle, work, lost_work, dropped, shapes = [], [], [], [], []
    for number, attempt in enumerate(attempts):
        # No rank trains from the last progress of an attempt until the next one is ready.
        if attempt["ready"] is not None and attempt["ready"] > idle_since:
            idle.append((idle_since, attempt["ready"] - idle_since))
        idle_since = max([idle_since, *(t for t in times if t <= attempt["ended"])])
        points = by_attempt.get(attempt["attempt"], [])
        if attempt["ready"] is not None and attempt["from_step"] is not None:
            points = [(attempt["ready"], attempt["from_step"]), *points]
        if not points:
            continue
        if (every := len(points) // round(200 * WIDTH)) > 1:  # about two a pixel are enough
            points = [*points[::every], points[-1]]
        if before is not None:
            dropped += [before, (points[0][0], before[1]), points[0], GAP_IN_LINE]
        # Steps above the lowest one that a later attempt resumed from were lost.
        resumed = min((a["from_step"] for a in attempts[number + 1 :] if a["from_step"] is not None), default=math.inf)
        kept = [point for point in points if point[1] <= resumed]
        if kept:
            work += [*kept, GAP_IN_LINE]
        if len(kept) < len(points):
            lost = [*kept[-1:], *points[len(kept) :]]
            lost_work += [*lost, GAP_IN_LINE]
            corner = max(attempt["ended"], lost[-1][0])
            shapes.append([*lost, (corner, lost[-1][1]), (corner, resumed), (lost[0][0], resumed)])
        before = points[-1]
    back = plot.get_xaxis_transform()
    plot.broken_barh(idle, (0, 1), transform=back, color=figure.colour("idle-back"), linewidth=0, zorder=0)
    for line, style in (
        (dropped, {"color": figure.SOFT, "linewidth": 0.8, "linestyle": (0, (1, 2))}),
        (work, {"color": WORK, "linewidth": 1.8}),
        (lost_work, {"color": LOST, "linewidth": 1.8, "linestyle": DASHES}),
    ):
        if line:
            plot.plot(*zip(*line, strict=True), **style)
    from matplotlib.collections import PolyCollection

    plot.add_collection(PolyCollection(shapes, color=LOST, alpha=0.22, linewidth=0), autolim=False)


def _draw_saves_and_evals(plot: "Axes", timeline: Mapping[str, Any]) -> None:
    # A save is logged some steps after its state was taken; mark it on the line, where it was taken.
    steps = timeline["steps"]
    taken = [max((at for at, done, _ in steps if done == step and at <= t), default=t) for t, step in timeline["saves"]]
    saved = [step for _, step in timeline["saves"]]
    plot.plot(taken, saved, linestyle="none", color=SAVE, zorder=3, clip_on=False, **SAVE_MARK)
    for t, step in timeline["evals"]:
        plot.plot([t], [step], color=WORK, zorder=4, clip_on=False, **EVAL_MARK)


def _draw_flags(plot: "Axes", flags: Sequence[Label]) -> None:
    from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE

    transform = plot.get_xaxis_transform()  # x in seconds, y in heights of the plot
    for flag in flags:
        top = 1.0 if flag.row is None else 1.0 + (0.1 + flag.row * FLAG_ROW) / PLOT
        style: Any = {"color": FAULT, "transform": transform, "clip_on": False}
        plot.plot([flag.time] * 2, [0, top + 0.025], linewidth=0.8, alpha=0.65, **style)
        marker: Any = CARETLEFTBASE if flag.is_flipped else CARETRIGHTBASE
        plot.plot([flag.time], [top], marker=marker, markersize=5, markeredgewidth=0, **style)
        if flag.row is not None:
            _write_label(plot, flag, top, 7.0, xycoords=transform)
    if hidden := sum(flag.row is None for flag in flags):
        where: Any = {"xycoords": "axes fraction", "ha": "right", "va": "top", "color": figure.SOFT}
        _write(plot, f"{hidden} more faults without a label", (1, 1), (-4, -4), **where)


def _write_label(axes: "Axes", label: Label, y: float, aside: float, **style: Any) -> None:
    # On paper, since poles of other flags may pass behind it.
    paper = {"facecolor": figure.PAPER, "linewidth": 0, "pad": 0.4}
    side, points = ("right", -aside) if label.is_flipped else ("left", aside)
    _write(axes, label.text, (label.time, y), (points, 0), ha=side, va="center", bbox=paper, **style)


def _draw_attempts(lanes: "Axes", attempts: Sequence[Mapping[str, Any]], inch: float) -> None:
    starting, bars, texts = [], dict[str, list[tuple[float, float]]](), []
    for attempt in attempts:
        # Without a beginning, it died before it was ready.
        begin = attempt["ended"] - 0.02 * inch if attempt["ready"] is None else attempt["ready"]
        if attempt["ready"] is not None:
            before = max(begin - attempt["process_started"], 0.01 * inch)
            starting.append((begin - before, before))
        width = max(attempt["ended"] - begin, 0.02 * inch)
        colour = ATTEMPT_COLOURS.get(attempt["ended_as"], figure.SOFT)
        bars.setdefault(colour, []).append((begin, width))
        number, size, ended = attempt["attempt"], attempt["world_size"], attempt["ended_as"] or "no end known"
        ranks = "" if size is None else f", {plural(size, 'rank')}"
        choices = (f"{number}{ranks}, {ended}", f"{number} {ended}", f"{number}", "")
        texts.append((begin, next(text for text in choices if len(text) * LETTER + 0.1 < width / inch or not text)))
    lanes.broken_barh(starting, (GAP, LANE), **HATCHED)
    for colour, spans in bars.items():
        lanes.broken_barh(spans, (GAP, LANE), color=colour, linewidth=0)
    for begin, text in texts:
        if text:
            place = (begin, GAP + LANE / 2)
            _write(lanes, text, place, (4, 0), va="center_baseline", weight="bold", color=figure.PAPER)


def _draw_incidents(lanes: "Axes", incidents: Sequence[Incidents], inch: float) -> None:
    for several in incidents:
        assert several.label.row is not None
        y = LANE + 2 * GAP + several.label.row * INCIDENT_ROW
        spans = [(t, max(until - t, 0.02 * inch)) for t, until in several.spans]
        lanes.broken_barh(spans, (y, 0.03 if len(spans) == 1 else 0.05), color=INCIDENT, linewidth=0)
        _write_label(lanes, several.label, y + 0.12, 1.5)


def _draw_legend(drawn: "Figure", timeline: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.markers import CARETRIGHTBASE
    from matplotlib.patches import Patch

    fault: Any = CARETRIGHTBASE
    simulated = timeline.get("simulated", False)  # what no simulation has is left out there
    handles = [
        Line2D([], [], label="progress", color=WORK, linewidth=1.8),
        Line2D([], [], label="lost, computed again", color=LOST, linewidth=1.8, linestyle=DASHES),
        Line2D([], [], label="checkpoint", color=SAVE, linewidth=0, **SAVE_MARK),
        Line2D([], [], label="held-out loss", color=WORK, linewidth=0, **EVAL_MARK),
        Line2D([], [], label="fault", color=FAULT, linewidth=0, marker=fault, markersize=5, markeredgewidth=0),
        Patch(label="starting", **HATCHED),
        Patch(label="no rank trains", facecolor=figure.colour("idle-back"), edgecolor=figure.SOFT, linewidth=0.6),
        Line2D([], [], label="incident" if simulated else "incident, as the run recorded it", color=INCIDENT,
               linewidth=3, solid_capstyle="butt"),
    ]  # fmt: skip
    absent = {"held-out loss", "fault", *([] if timeline["saves"] else ["checkpoint"])} if simulated else set()
    handles = [handle for handle in handles if handle.get_label() not in absent]
    drawn.legend(handles=handles, loc="lower left", bbox_to_anchor=(LEFT / WIDTH, 0), ncols=len(handles), fontsize=7.5,
                 labelcolor=figure.SOFT, columnspacing=1.1, handlelength=1.5, handletextpad=0.5)  # fmt: skip


def _flags(faults: Iterable[Mapping[str, Any]]) -> list[Label]:
    """A flag for each fault; one alone where it hits several ranks at once."""
    flags: list[tuple[Mapping[str, Any], list[int | None]]] = []  # a fault and its victims
    newest: dict[tuple[Any, str], tuple[Mapping[str, Any], list[int | None]]] = {}
    for fault in faults:
        key, victim = (fault.get("index"), fault["kind"]), fault["victim"]
        first, victims = newest.get(key, (fault, [victim]))
        if victim not in victims and fault["t"] - first["t"] < 1.0:
            victims.append(victim)
        else:
            newest[key] = (fault, [victim])
            flags.append(newest[key])
    ranks = (sorted(victim for victim in victims if victim is not None) for _, victims in flags)
    texts = (f" r{','.join(map(str, hit))}" if hit else "" for hit in ranks)
    return [Label(fault["kind"] + text, fault["t"]) for (fault, _), text in zip(flags, texts, strict=True)]
