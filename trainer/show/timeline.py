"""A run in wall time: its attempts, steps, faults and incidents, as plain data and as a picture.

The picture has, from above: a flag for each fault; the step reached over wall time, a line per attempt, with lost work
shaded; the attempts, hatched while they start; the incidents as the run recorded them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import RunDirectoryError
from trainer.log import events, summary
from trainer.log.events import CheckpointSaved, Entry, EvalDone, FaultFired
from trainer.log.history import Attempt, History, process_start
from trainer.log.incidents import Incident, incidents_of
from trainer.show import figure
from trainer.show.units import clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOCK_SLACK_SECONDS = 1.0  # NTP slews a clock a little; a larger jump means that someone set it

# Sizes in inches.
WIDTH, LEFT, RIGHT = 9.0, 0.62, 0.12
PLOT, LANE, FLAG_ROW, INCIDENT_ROW, GAP = 1.9, 0.2, 0.15, 0.2, 0.08
LETTER = 0.068  # a letter of DejaVu Sans at TEXT_POINTS, wider than the average of any label
TEXT_POINTS = 8.0
FLAG_ROWS = 14  # faults beyond that get a flag without a label
WORK, LOST, FAULT, INCIDENT, SAVE = figure.SERIES[0], figure.SERIES[1], figure.BAD, figure.UNSURE, figure.SERIES[2]
ATTEMPT_COLOURS = {"finished": SAVE, "preempted": INCIDENT, "failed": LOST, "died": LOST}


# --- data -------------------------------------------------------------------------------------------------------------


def from_run(run: Path) -> dict[str, Any]:
    """Return the timeline of a run that has ended, as JSON values. Raises RunDirectoryError if its log is damaged.

    {origin: Unix seconds, steps_budget,
     attempts: [{attempt, process_started, ready, ended, from_step, to_step, world_size, ended_as}],
     steps: [[t, step, attempt]], saves: [[t, step]], evals: [[t, step]],
     faults: [{t, kind, victim, step, phase, index, attempt}],
     incidents: [{t, kind, text, lost_steps, seconds, attempt, rank, step}]}

    Times `t` are seconds since `origin`: the start of the first process, or the first fault if that was earlier. An
    attempt's `ended` is the time of rank 0's AttemptEnded, else the last sign of life of any of its ranks. An incident
    that ended an attempt begins at the attempt's last progress and lasts until the next attempt is ready. Unknown
    values are None; a run that logged nothing has no origin and empty lists.
    """
    history = History.from_entries(_entries_on_steady_clocks(run))
    times = [entry.time for entry in (*history.entries, *history.fired)]
    times += [process_start(start) for attempt in history.attempts for start in attempt.starts.values()]
    origin = min(times, default=None)
    if origin is None:
        lists = ("attempts", "steps", "saves", "evals", "faults", "incidents")
        return {"origin": None, "steps_budget": None} | {name: [] for name in lists}
    saves = events.select(history.entries, CheckpointSaved, rank=0)
    # The sets of one step are evaluated one after the other: the last one's time stands for all of them.
    evals = {(e.attempt, event.step): e.time for e, event in events.select(history.entries, EvalDone, rank=0)}
    budgets = [event.steps for attempt in history.attempts for _, event in attempt.starts.values()]
    ended_as = _ended_as(run)
    return {
        "origin": origin,
        "steps_budget": budgets[-1] if budgets else None,
        "attempts": [_attempt(a, history.fired, ended_as.get(a.number), origin) for a in history.attempts],
        "steps": [[entry.time - origin, event.step, entry.attempt] for entry, event in history.steps],
        "saves": [[entry.time - origin, event.step] for entry, event in saves],
        "evals": [[time - origin, step] for (_, step), time in evals.items()],
        "faults": [_fault(entry, origin) for entry in sorted(history.fired, key=lambda entry: entry.time)],
        "incidents": [_incident(incident, origin) for incident in incidents_of(history)],
    }


def _entries_on_steady_clocks(run: Path) -> Iterator[Entry]:
    """Yield all entries of a run, with times as if nobody had set a clock while it ran: a jump would hide all else.

    Faults keep the time of the clock before it jumped, which is when they were written.
    """
    logs: dict[tuple[int, int], list[Entry]] = {}
    jumps: dict[tuple[int, int], list[float]] = {}
    for path in sorted(events.events_directory(run).glob("*.jsonl")):
        for entry in events.read_file(path):
            process = (entry.attempt, entry.rank)
            if not isinstance(entry.event, FaultFired):
                logs.setdefault(process, []).append(entry)
                continue
            yield entry
            if entry.event.fault == "clock_jump":
                jumps.setdefault(process, []).append(entry.time)
    for process, log in logs.items():
        yield from _steady(log, sorted(jumps.get(process, [])))


def _steady(log: Iterable[Entry], jumps: list[float]) -> Iterator[Entry]:
    """Yield the entries of one process in the order it wrote them, none earlier than the one before.

    `jumps` are the times at which a fault was about to set its clock. The entry after a jump was written no later than
    the duration that it states. Without that knowledge a clock set forward looks like a long wait; only one that was
    set back can be recognised.
    """
    offset, last = 0.0, -math.inf
    for entry in log:
        read = steady = entry.time + offset
        if read < last - CLOCK_SLACK_SECONDS:
            steady = max(last, jumps.pop(0)) if jumps else last
        elif jumps and read > jumps[0]:
            latest = jumps.pop(0) + getattr(entry.event, "seconds", 0.0)
            steady = latest if read > latest + CLOCK_SLACK_SECONDS else read
        offset += steady - read
        last = max(last, steady)
        yield replace(entry, time=last)


def _ended_as(run: Path) -> dict[int, str | None]:
    """How each attempt ended, as `inspect` says."""
    try:
        return {attempt["attempt"]: attempt["ended"] for attempt in summary.summarise(run)["attempts"]}
    except RunDirectoryError:  # it has a log, but died before it wrote config.json
        return {}


def _attempt(attempt: Attempt, fired: Sequence[Entry], ended_as: str | None, origin: float) -> dict[str, Any]:
    # Rank 0 may have died before it was ready; then the lowest rank that was ready stands for the attempt.
    start = attempt.starts[min(attempt.starts)] if attempt.starts else None
    # A rank that makes a fault on itself was alive then.
    alive = [*attempt.entries, *(e for e in fired if e.attempt == attempt.number and e.rank >= 0)]
    ended = attempt.ends[0][0].time if 0 in attempt.ends else max(entry.time for entry in alive)
    return {
        "attempt": attempt.number,
        "process_started": None if start is None else process_start(start) - origin,
        "ready": None if start is None else start[0].time - origin,
        "ended": ended - origin,
        "from_step": None if start is None else start[1].from_step,
        "to_step": attempt.furthest_step,
        "world_size": None if start is None else start[1].world_size,
        "ended_as": ended_as,
    }


def _fault(entry: Entry, origin: float) -> dict[str, Any]:
    event = entry.event
    assert isinstance(event, FaultFired)
    details = {name: getattr(event, name) for name in ("victim", "step", "phase", "index")}
    return {"t": entry.time - origin, "kind": event.fault, **details, "attempt": entry.attempt}


def _incident(incident: Incident, origin: float) -> dict[str, Any]:
    names = ("kind", "text", "lost_steps", "seconds", "attempt", "rank", "step")
    time = None if incident.time is None else incident.time - origin
    return {"t": time, **{name: getattr(incident, name) for name in names}}


# --- picture ----------------------------------------------------------------------------------------------------------


def svg(timeline: Mapping[str, Any], name: str = "timeline") -> str:
    """Draw a timeline (`from_run`) as an SVG element in the colours of its page.

    `name` must be unique among the pictures of a page: it begins every id in the element.
    """
    if timeline.get("origin") is None:
        return figure.svg(
            _empty(), name, "no timeline: nothing was logged, or the log cannot be read", text_as_paths=False
        )
    restarts = max(0, len(timeline["attempts"]) - 1)
    begin, end = _span(timeline)
    about = (
        f"step over {end - begin:.1f} s: {len(timeline['attempts'])} attempts, {restarts} restarts, "
        f"{len(timeline['faults'])} faults, {len(timeline['incidents'])} incidents"
    )
    return figure.svg(draw(timeline), name, about, text_as_paths=False)


def _empty() -> "Figure":
    with figure.style():
        empty = figure.new_figure(WIDTH, 0.5, layout="none")
        words = "no timeline: nothing was logged, or the log cannot be read"
        empty.text(0.5, 0.5, words, ha="center", va="center", color=figure.SOFT)
        return empty


@dataclass
class Label:
    """Text that begins at a place in the picture, to be put into a row where it covers no other."""

    x: float
    """Inches from the left edge of the plot."""
    text: str
    time: float
    """Seconds."""
    until: float
    row: int | None = None
    """None: no row was free."""
    is_flipped: bool = False
    """It ends at `x` instead, since it would leave the picture."""

    @property
    def extent(self) -> tuple[float, float]:
        width = len(self.text) * LETTER + 0.2
        return (self.x - width, self.x) if self.is_flipped else (self.x, self.x + width)


def assign_rows(labels: Sequence[Label], width: float, most: int) -> int:
    """Give each label, sorted by time, the lowest of `most` rows in which it covers no other. Returns the rows used.

    Goes from the last in time to the first, so that the pole of an earlier flag passes on the left of later labels.
    """
    left_ends: list[float] = []  # of the leftmost label in each row
    for label in reversed(labels):
        begin, end = label.extent
        label.is_flipped = end > width and label.x - (end - begin) > 0
        begin, end = label.extent
        label.row = next((row for row, left_end in enumerate(left_ends) if end <= left_end), None)
        if label.row is not None:
            left_ends[label.row] = begin
        elif len(left_ends) < most:
            label.row = len(left_ends)
            left_ends.append(begin)
    return len(left_ends)


def draw(timeline: Mapping[str, Any]) -> "Figure":
    """Draw the timeline of a run that logged something."""
    begin, end = _span(timeline)
    width = WIDTH - LEFT - RIGHT

    def label(text: str, time: float, seconds: float = 0.0) -> Label:
        return Label((time - begin) / (end - begin) * width, text, time, time + seconds)

    flags = [label(_fault_text(fault), fault["t"]) for fault in _group_victims(timeline["faults"])]
    ends = {attempt["attempt"]: attempt["ended"] for attempt in timeline["attempts"]}
    placed = [(i["t"] if i["t"] is not None else ends.get(i["attempt"]), i) for i in timeline["incidents"]]
    incidents = [label(_incident_text(i), t, i["seconds"] or 0.0) for t, i in placed if t is not None]
    incidents.sort(key=lambda incident: incident.time)
    flag_rows = assign_rows(flags, width, FLAG_ROWS)
    incident_rows = assign_rows(incidents, width, len(incidents))

    # Heights from below: legend and seconds, incidents, attempts, steps, flags.
    bottom = 0.5
    lanes_height = LANE + 2 * GAP + incident_rows * INCIDENT_ROW
    plot_bottom = bottom + lanes_height
    height = plot_bottom + PLOT + flag_rows * FLAG_ROW + 0.15
    with figure.style():
        drawn = figure.new_figure(WIDTH, height, layout="none")
        plot = drawn.add_axes((LEFT / WIDTH, plot_bottom / height, width / WIDTH, PLOT / height))
        lanes = drawn.add_axes((LEFT / WIDTH, bottom / height, width / WIDTH, lanes_height / height), sharex=plot)
        _dress(plot, lanes, timeline, begin, end, lanes_height)
        _draw_progress(plot, timeline, begin)
        _draw_flags(plot, flags)
        _draw_attempts(lanes, timeline["attempts"], (end - begin) / width)
        _draw_incidents(lanes, incidents, (end - begin) / width)
        _draw_legend(drawn)
        return drawn


def _span(timeline: Mapping[str, Any]) -> tuple[float, float]:
    """The first and the last second of anything that is known."""
    times = [fault["t"] for fault in timeline["faults"]]
    times += [attempt[name] for attempt in timeline["attempts"] for name in ("process_started", "ready", "ended")]
    times += [row[0] for name in ("steps", "saves", "evals") for row in timeline[name]]
    known = [0.0, *(t for t in times if t is not None)]
    return min(known), max(*known, min(known) + 0.1)


def _dress(
    plot: "Axes", lanes: "Axes", timeline: Mapping[str, Any], begin: float, end: float, lanes_height: float
) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = max([timeline["steps_budget"] or 1, *(step for _, step, _ in timeline["steps"])])
    plot.set(xlim=(begin, end), ylim=(0, steps))
    plot.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    plot.annotate("step", (0, 1), (-LEFT * 72 + 4, 5), xycoords="axes fraction", textcoords="offset points",
                  color=figure.SOFT, fontsize=TEXT_POINTS)  # fmt: skip
    # The y axis of the lanes is inches, downwards.
    lanes.set(ylim=(lanes_height, 0), yticks=[])
    lanes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    lanes.xaxis.set_major_formatter(lambda t, _: f"{t:g} s" if end - begin < 300 else clock(t))
    for axes in (plot, lanes):
        axes.tick_params(length=0, labelsize=TEXT_POINTS, labelcolor=figure.SOFT)
        axes.spines[:].set_visible(False)
    plot.tick_params(labelbottom=False)


def _draw_progress(plot: "Axes", timeline: Mapping[str, Any], begin: float) -> None:
    """The step reached over time: one line per attempt; what a later attempt had to compute again is dashed."""
    attempts, times = timeline["attempts"], [row[0] for name in ("steps", "saves", "evals") for row in timeline[name]]
    before: tuple[float, int] | None = None
    idle_since = begin
    for number, attempt in enumerate(attempts):
        if attempt["ready"] is not None and attempt["ready"] > idle_since:
            plot.axvspan(idle_since, attempt["ready"], color=figure.colour("idle-back"), linewidth=0, zorder=0)
        idle_since = max([idle_since, *(t for t in times if t <= attempt["ended"])])
        points = _points(attempt, timeline["steps"])
        if not points:
            continue
        if before is not None:
            dropped = [before, (points[0][0], before[1]), points[0]]
            plot.plot(*zip(*dropped, strict=True), color=figure.SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        # Whatever lies above the lowest step that a later attempt resumed from was lost.
        resumed = min((a["from_step"] for a in attempts[number + 1 :] if a["from_step"] is not None), default=math.inf)
        kept = [point for point in points if point[1] <= resumed]
        lost = [*kept[-1:], *points[len(kept) :]] if len(kept) < len(points) else []
        plot.plot(*zip(*kept, strict=True), color=WORK, linewidth=1.8) if kept else None
        if lost:
            plot.plot(*zip(*lost, strict=True), color=LOST, linewidth=1.8, linestyle=(0, (1.6, 1.6)))
            corner = max(attempt["ended"], lost[-1][0])
            shape = [*lost, (corner, lost[-1][1]), (corner, resumed), (lost[0][0], resumed)]
            plot.fill(*zip(*shape, strict=True), color=LOST, alpha=0.22, linewidth=0)
        before = points[-1]
    _draw_saves_and_evals(plot, timeline)


def _points(attempt: Mapping[str, Any], steps: Iterable[Sequence[Any]]) -> list[tuple[float, int]]:
    """[(seconds, step)] of an attempt, at most about two a pixel."""
    points: list[tuple[float, int]] = []
    if attempt["ready"] is not None and attempt["from_step"] is not None:
        points.append((attempt["ready"], attempt["from_step"]))
    points += [(t, step) for t, step, number in steps if number == attempt["attempt"]]
    every = max(1, len(points) // round(200 * WIDTH))
    return points[::every] + (points[-1:] if every > 1 else [])


def _draw_saves_and_evals(plot: "Axes", timeline: Mapping[str, Any]) -> None:
    for t, step in timeline["saves"]:
        # A save is logged some steps after its state was taken; mark it on the line, where it was taken.
        taken = max((at for at, done, _ in timeline["steps"] if done == step and at <= t), default=t)
        plot.plot([taken], [step], marker="|", markersize=8, markeredgewidth=1.6, color=SAVE, clip_on=False, zorder=3)
    for t, step in timeline["evals"]:
        plot.plot([t], [step], marker="o", markersize=4, markerfacecolor=figure.PAPER, color=WORK, clip_on=False,
                  zorder=4)  # fmt: skip


def _draw_flags(plot: "Axes", flags: Sequence[Label]) -> None:
    from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE

    transform = plot.get_xaxis_transform()  # x in seconds, y in heights of the plot
    for flag in flags:
        top = 1.0 if flag.row is None else 1.0 + (0.1 + flag.row * FLAG_ROW) / PLOT
        plot.plot([flag.time] * 2, [0, top + 0.025], color=FAULT, linewidth=0.8, alpha=0.65, transform=transform,
                  clip_on=False)  # fmt: skip
        marker = CARETLEFTBASE if flag.is_flipped else CARETRIGHTBASE
        plot.plot([flag.time], [top], marker=marker, markersize=5, markeredgewidth=0, color=FAULT,
                  transform=transform, clip_on=False)  # fmt: skip
        if flag.row is not None:
            _write(plot, flag, top, 7.0, transform=transform)
    if hidden := sum(flag.row is None for flag in flags):
        plot.text(0.995, 0.97, f"{hidden} more faults without a label", transform=plot.transAxes, ha="right", va="top",
                  fontsize=TEXT_POINTS, color=figure.SOFT)  # fmt: skip


def _write(axes: "Axes", label: Label, y: float, points_aside: float, transform: Any) -> None:
    """Write a label beside its mark, on paper: poles of other flags may pass behind it."""
    aside = -points_aside if label.is_flipped else points_aside
    axes.annotate(
        label.text, (label.time, y), (aside, 0), xycoords=transform, textcoords="offset points", va="center",
        ha="right" if label.is_flipped else "left", fontsize=TEXT_POINTS, parse_math=False,
        bbox={"facecolor": figure.PAPER, "linewidth": 0, "pad": 0.4}, annotation_clip=False,
    )  # fmt: skip


def _draw_attempts(lanes: "Axes", attempts: Sequence[Mapping[str, Any]], seconds_per_inch: float) -> None:
    _name_lane(lanes, "attempt", GAP + LANE / 2)
    for attempt in attempts:
        begin, end = attempt["ready"], attempt["ended"]
        if begin is None:  # it died before it was ready
            begin = end - 0.02 * seconds_per_inch
        else:
            starting = max(begin - attempt["process_started"], 0.01 * seconds_per_inch)
            lanes.barh(GAP, -starting, LANE, begin, align="edge", facecolor="none", edgecolor=figure.SOFT,
                       hatch="//////", linewidth=0.6)  # fmt: skip
        width = max(end - begin, 0.02 * seconds_per_inch)
        colour = ATTEMPT_COLOURS.get(attempt["ended_as"], figure.SOFT)
        lanes.barh(GAP, width, LANE, begin, align="edge", color=colour, linewidth=0)
        room = width / seconds_per_inch - 0.1
        text = next((text for text in _attempt_texts(attempt) if len(text) * LETTER < room), "")
        lanes.annotate(text, (begin, GAP + LANE / 2), (4, 0), textcoords="offset points", va="center_baseline",
                       fontsize=TEXT_POINTS, fontweight="bold", color=figure.PAPER)  # fmt: skip


def _draw_incidents(lanes: "Axes", incidents: Sequence[Label], seconds_per_inch: float) -> None:
    if incidents:
        _name_lane(lanes, "incident", LANE + 2 * GAP + 0.12)
    for incident in incidents:
        assert incident.row is not None
        y = LANE + 2 * GAP + incident.row * INCIDENT_ROW
        until = max(incident.until, incident.time + 0.02 * seconds_per_inch)
        lanes.barh(y, until - incident.time, 0.03, incident.time, align="edge", color=INCIDENT, linewidth=0)
        _write(lanes, incident, y + 0.12, 1.5, transform=lanes.transData)


def _name_lane(lanes: "Axes", name: str, y: float) -> None:
    lanes.annotate(name, (0, y), (-LEFT * 72 + 4, 0), xycoords=lanes.get_yaxis_transform(),
                   textcoords="offset points", va="center", color=figure.SOFT, fontsize=TEXT_POINTS)  # fmt: skip


def _draw_legend(drawn: "Figure") -> None:
    from matplotlib.lines import Line2D
    from matplotlib.markers import CARETRIGHTBASE
    from matplotlib.patches import Patch

    def line(label: str, colour: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, color=colour, **style)

    handles = [
        line("progress", WORK, linewidth=1.8),
        line("lost, computed again", LOST, linewidth=1.8, linestyle=(0, (1.6, 1.6))),
        line("checkpoint", SAVE, linewidth=0, marker="|", markersize=8, markeredgewidth=1.6),
        line("held-out loss", WORK, linewidth=0, marker="o", markersize=4, markerfacecolor=figure.PAPER),
        line("fault", FAULT, linewidth=0, marker=CARETRIGHTBASE, markersize=5, markeredgewidth=0),
        Patch(label="starting", facecolor="none", edgecolor=figure.SOFT, hatch="//////", linewidth=0.6),
        Patch(label="nobody trains", facecolor=figure.colour("idle-back"), edgecolor=figure.SOFT, linewidth=0.6),
        line("incident, as the run recorded it", INCIDENT, linewidth=3, solid_capstyle="butt"),
    ]
    drawn.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(LEFT / WIDTH, 0.0), ncols=len(handles), fontsize=7.5,
        labelcolor=figure.SOFT, columnspacing=1.1, handlelength=1.5, handletextpad=0.5, borderpad=0.2,
        borderaxespad=0.2,
    )  # fmt: skip


def _group_victims(faults: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for a fault that hits several ranks at once."""
    groups: list[dict[str, Any]] = []
    for fault in faults:
        last = next(
            (g for g in reversed(groups) if (g.get("index"), g["kind"]) == (fault.get("index"), fault["kind"])), None
        )
        if last is not None and fault["t"] - last["t"] < 1.0 and fault["victim"] not in last["victims"]:
            last["victims"].append(fault["victim"])
        else:
            groups.append({**fault, "victims": [fault["victim"]]})
    return groups


def _fault_text(fault: Mapping[str, Any]) -> str:
    ranks = sorted(victim for victim in fault["victims"] if victim is not None)
    return f"{fault['kind']} r{','.join(map(str, ranks))}" if ranks else str(fault["kind"])


def _incident_text(incident: Mapping[str, Any]) -> str:
    # Incidents of other kinds carry the rank that wrote them down.
    is_of_rank = incident["rank"] is not None and incident["kind"] in ("worker_lost", "hung")
    rank = f" r{incident['rank']}" if is_of_rank else ""
    seconds = f", {incident['seconds']:.1f} s" if (incident["seconds"] or 0.0) >= 0.05 else ""
    return f"{incident['kind'].replace('_', ' ')}{rank}{seconds}"


def _attempt_texts(attempt: Mapping[str, Any]) -> list[str]:
    """Texts for an attempt's bar, the longest first."""
    number, size, ended = attempt["attempt"], attempt["world_size"], attempt["ended_as"] or "no end known"
    ranks = f", {size} rank{'' if size == 1 else 's'}" if size is not None else ""
    return [f"{number}{ranks}, {ended}", f"{number} {ended}", f"{number}"]
