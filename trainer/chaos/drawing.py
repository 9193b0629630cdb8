"""A timeline as a picture: one SVG that stands alone, on a light page or a dark one.

From above: a flag for each fault; the step reached over wall time, a line per attempt, with what was lost below it;
the attempts, hatched while they start; the incidents as the run told them; seconds.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.show.units import clock

LEFT, RIGHT, TOP = 58, 14, 8
PLOT, LANE, ROW = 190, 20, 15
LETTER = 6.3
"""Width of a letter at 11 px: more than any sans-serif's average, so that labels keep apart on every machine."""
ROWS = 14
"""Of labels above one another; faults beyond that are drawn without one."""

STYLE = """
.tl{--tl-paper:var(--paper,#fff);--tl-ink:#24292f;--tl-soft:#667085;--tl-grid:#e4e7ec;--tl-down:#f2f3f6;
--tl-work:#2f6690;--tl-lost:#c8553d;--tl-fault:#b3261e;--tl-good:#3a7d44;--tl-told:#a06a00;
font:11px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.tl{--tl-paper:var(--paper,#14171c);--tl-ink:#e6e9ee;--tl-soft:#98a2b3;
--tl-grid:#2c323b;--tl-down:#20252d;--tl-work:#7fb2dc;--tl-lost:#e8916f;--tl-fault:#ff8a80;--tl-good:#7cc48a;
--tl-told:#e3b341}}
.tl text{fill:var(--tl-ink)}.tl .soft{fill:var(--tl-soft)}.tl .grid{stroke:var(--tl-grid)}
.tl .halo{paint-order:stroke;stroke:var(--tl-paper);stroke-width:3px;stroke-linejoin:round}
.tl .down{fill:var(--tl-down)}.tl .hatch{stroke:var(--tl-soft);stroke-width:.8;fill:none;opacity:.7}
.tl .frame{stroke:var(--tl-soft);stroke-width:.8;fill:none;opacity:.7}
.tl .work{stroke:var(--tl-work);stroke-width:2;fill:none;stroke-linejoin:round;stroke-linecap:round}
.tl .replay{stroke:var(--tl-lost);stroke-width:2;fill:none;stroke-dasharray:3 3}
.tl .lost{fill:var(--tl-lost);opacity:.22}.tl .back{stroke:var(--tl-soft);fill:none;stroke-dasharray:1 3}
.tl .save{stroke:var(--tl-good);stroke-width:2}.tl .eval{fill:var(--tl-paper);stroke:var(--tl-work)}
.tl .fault{stroke:var(--tl-fault);fill:var(--tl-fault)}.tl .pole{stroke:var(--tl-fault);stroke-width:1;opacity:.65}
.tl .told{stroke:var(--tl-told);fill:var(--tl-told)}
.tl .finished{fill:var(--tl-good)}.tl .preempted{fill:var(--tl-told)}.tl .died,.tl .failed{fill:var(--tl-lost)}
.tl .running,.tl .unknown{fill:var(--tl-soft)}.tl .on{fill:var(--tl-paper);font-weight:600}
"""


@dataclass
class Label:
    """Words at a place in time, to be laid in a row where they cover no others."""

    at: float
    """Pixels."""
    text: str
    title: str
    row: int | None = None
    flipped: bool = False
    """It ends at `at`, since it would leave the picture."""

    @property
    def extent(self) -> tuple[float, float]:
        width = len(self.text) * LETTER + 12
        return (self.at - width, self.at) if self.flipped else (self.at, self.at + width)


def lay(labels: Sequence[Label], left: float, right: float) -> int:
    """Give each label the lowest row in which it covers no other; None beyond ROWS. Returns how many rows there are.

    The last in time first: the pole of an earlier one above it then passes on the left of its words.
    """
    rows: list[list[tuple[float, float]]] = []
    for label in reversed(labels):
        label.flipped = label.extent[1] > right and label.at - label.extent[1] + label.at > left
        begin, end = label.extent
        free = (n for n, row in enumerate(rows) if all(end <= other[0] or begin >= other[1] for other in row))
        label.row = next(free, len(rows) if len(rows) < ROWS else None)
        if label.row is None:
            continue
        if label.row == len(rows):
            rows.append([])
        rows[label.row].append((begin, end))
    return len(rows)


def svg(timeline: Mapping[str, Any], width: int = 900) -> str:
    """A timeline (timeline.of) as one <svg> element: no script, no reference to anything outside, any text escaped."""
    if timeline.get("origin") is None:
        words = _tag(
            "text",
            "no timeline: nothing was logged, or the log cannot be read",
            x=width / 2,
            y=30,
            text_anchor="middle",
            class_="soft",
        )
        return _frame(width, 52, "an empty timeline", [words])
    return _Picture(timeline, width).draw()


class _Picture:
    def __init__(self, timeline: Mapping[str, Any], width: int) -> None:
        self.timeline, self.width = timeline, width
        self.attempts: list[Mapping[str, Any]] = timeline["attempts"]
        self.begin, self.end = _span(timeline)
        self.steps = max([timeline["steps_budget"] or 1, *(step for _, step, _ in timeline["steps"])])
        self.faults = [
            Label(self.x(fault["t"]), _fault_words(fault), _fault_title(fault))
            for fault in _together(timeline["faults"])
        ]
        ends = {attempt["attempt"]: attempt["ended"] for attempt in self.attempts}
        shown = [(one["t"] if one["t"] is not None else ends.get(one["attempt"]), one) for one in timeline["incidents"]]
        self.bars = [(t, t + (one["seconds"] or 0.0)) for t, one in shown if t is not None]
        self.incidents = [
            Label(self.x(t), _incident_words(one), f"{one['kind']}: {one['text']}") for t, one in shown if t is not None
        ]
        self.plot_top = TOP + lay(self.faults, LEFT, width - RIGHT) * ROW + 4
        self.plot_bottom = self.plot_top + PLOT
        self.lane = self.plot_bottom + 8
        self.told = self.lane + LANE + 8
        rows = lay(self.incidents[::-1], LEFT, width - RIGHT)
        self.axis = self.told + (rows * (ROW + 4) if rows else 0)
        self.height = self.axis + 40

    def x(self, t: float) -> float:
        return LEFT + (t - self.begin) / (self.end - self.begin) * (self.width - LEFT - RIGHT)

    def y(self, step: float) -> float:
        return self.plot_bottom - step / self.steps * PLOT

    def draw(self) -> str:
        parts = [*self._grid(), *self._gaps(), *self._lost_work(), *self._poles(), *self._progress(), *self._marks()]
        parts += [*self._lane(), *self._told(), *self._flags(), *self._legend()]
        restarts = max(0, len(self.attempts) - 1)
        about = (
            f"step over {self.end - self.begin:.1f} s: {len(self.attempts)} attempts, {restarts} restarts, "
            f"{len(self.timeline['faults'])} faults, {len(self.timeline['incidents'])} incidents"
        )
        return _frame(self.width, self.height, about, parts)

    def _grid(self) -> list[str]:
        parts = []
        for step in _ticks(0, self.steps, 4, least=1):
            y = self.y(step)
            parts.append(_tag("line", x1=LEFT, x2=self.width - RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(_tag("text", f"{step:g}", x=LEFT - 8, y=y + 4, text_anchor="end", class_="soft"))
        parts.append(_tag("text", "step", x=8, y=self.plot_top - 10, class_="soft"))
        for t in _ticks(self.begin, self.end, 9):
            x = self.x(t)
            parts.append(_tag("line", x1=x, x2=x, y1=self.plot_top, y2=self.axis, class_="grid"))
            text = f"{t:g} s" if self.end - self.begin < 300 else clock(t)
            parts.append(_tag("text", text, x=x, y=self.axis + 13, text_anchor="middle", class_="soft"))
        return parts

    def _gaps(self) -> list[str]:
        """Where nobody trains: from the last progress of an attempt until the next is ready."""
        parts, since = [], self.begin
        progress = sorted(row[0] for name in ("steps", "saves", "evals") for row in self.timeline[name])
        for attempt in self.attempts:
            if attempt["ready"] is not None and attempt["ready"] > since:
                x = self.x(since)
                width = self.x(attempt["ready"]) - x
                parts.append(_tag("rect", x=x, y=self.plot_top, width=width, height=PLOT, class_="down"))
            since = max([since, *(t for t in progress if t <= attempt["ended"])])
        return parts

    def _points(self, attempt: Mapping[str, Any]) -> list[tuple[float, int]]:
        """[(t, step)] of an attempt, at most about two a pixel."""
        ready = (
            []
            if attempt["ready"] is None or attempt["from_step"] is None
            else [(attempt["ready"], attempt["from_step"])]
        )
        points = ready + [(t, step) for t, step, of in self.timeline["steps"] if of == attempt["attempt"]]
        every = max(1, len(points) // (2 * self.width))
        return points[::every] + (points[-1:] if every > 1 else [])

    def _resumed(self, number: int) -> int | None:
        """The earliest step from which a later attempt than the `number`th went on."""
        return min((a["from_step"] for a in self.attempts[number + 1 :] if a["from_step"] is not None), default=None)

    def _lost_work(self) -> list[str]:
        parts = []
        for number, attempt in enumerate(self.attempts):
            resumed, points = self._resumed(number), self._points(attempt)
            lost = [point for point in points if resumed is not None and point[1] > resumed]
            if not lost or resumed is None:
                continue
            kept = [point for point in points if point[1] <= resumed][-1:]
            corner = [(max(attempt["ended"], lost[-1][0]), lost[-1][1])]
            shape = [*kept, *lost, *corner, (corner[0][0], resumed), ((kept or lost)[0][0], resumed)]
            title = f"attempt {attempt['attempt']}: {lost[-1][1] - resumed} steps lost, {resumed + 1} to {lost[-1][1]}"
            parts.append(_tag("polygon", _tag("title", title), points=self._path(shape), class_="lost"))
        return parts

    def _progress(self) -> list[str]:
        parts = []
        before: tuple[float, int] | None = None
        for number, attempt in enumerate(self.attempts):
            points, resumed = self._points(attempt), self._resumed(number)
            if not points:
                continue
            if before is not None:
                parts.append(
                    _tag("polyline", points=self._path([before, (points[0][0], before[1]), points[0]]), class_="back")
                )
            kept = [point for point in points if resumed is None or point[1] <= resumed]
            parts.append(_tag("polyline", points=self._path(kept), class_="work"))
            if len(kept) < len(points):
                parts.append(_tag("polyline", points=self._path([*kept[-1:], *points[len(kept) :]]), class_="replay"))
            before = points[-1]
        return parts

    def _marks(self) -> list[str]:
        parts = []
        for t, step in self.timeline["evals"]:
            title = _tag("title", f"held-out loss at step {step}, {t:.1f} s")
            parts.append(_tag("circle", title, cx=self.x(t), cy=self.y(step), r=2.5, class_="eval"))
        for t, step in self.timeline["saves"]:
            # On the line, where the state was taken: the log hears of it some steps later.
            taken = [at for at, done, _ in self.timeline["steps"] if done == step and at <= t]
            x, y = self.x(max(taken, default=t)), self.y(step)
            title = _tag("title", f"checkpoint of step {step}, known at {t:.1f} s")
            parts.append(_tag("line", title, x1=x, x2=x, y1=y - 5, y2=y + 5, class_="save"))
        return parts

    def _path(self, points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(t):.1f},{self.y(step):.1f}" for t, step in points)

    def _poles(self) -> list[str]:
        return [
            _tag("line", x1=flag.at, x2=flag.at, y1=self._row(flag), y2=self.plot_bottom, class_="pole")
            for flag in self.faults
        ]

    def _row(self, flag: Label) -> float:
        """The upper edge of a flag; without a row it has no words and stands on the plot."""
        return self.plot_top - 4 if flag.row is None else self.plot_top - 4 - ROW * (flag.row + 1)

    def _flags(self) -> list[str]:
        parts, hidden = [], 0
        for flag in self.faults:
            y, way = self._row(flag), -1 if flag.flipped else 1
            title = _tag("title", flag.title)
            cloth = f"M{flag.at:.1f} {y:.1f}l{7 * way} 4l{-7 * way} 4z"
            words = ""
            if flag.row is None:
                hidden += 1
            else:
                at = {"x": flag.at + 10 * way, "y": y + 9, "text_anchor": "end" if flag.flipped else "start"}
                words = _tag("text", flag.text, class_="halo", **at)
            parts.append(_tag("g", title, _tag("path", d=cloth, class_="fault"), words))
        if hidden:
            words = f"{hidden} more faults without a label"
            parts.append(
                _tag("text", words, x=self.width - RIGHT, y=self.plot_top + 12, text_anchor="end", class_="soft halo")
            )
        return parts

    def _lane(self) -> list[str]:
        parts = [_tag("text", "attempt", x=8, y=self.lane + 14, class_="soft")]
        for attempt in self.attempts:
            shapes = [_tag("title", _attempt_title(attempt))]
            begin, end = attempt["ready"], self.x(attempt["ended"])
            if begin is not None:
                start, begin = self.x(attempt["process_started"]), self.x(begin)
                shapes.append(_hatch(start, self.lane, max(1.0, begin - start), LANE))
            else:  # it died before it was ready
                begin = end - 2
            width, kind = max(2.0, end - begin), attempt["ended_as"] or "running"
            shapes.append(_tag("rect", x=begin, y=self.lane, width=width, height=LANE, rx=2, class_=kind))
            words = next((words for words in _attempt_words(attempt) if len(words) * LETTER + 8 < width), "")
            shapes.append(_tag("text", words, x=begin + 5, y=self.lane + 14, class_="on"))
            parts.append(_tag("g", *shapes))
        return parts

    def _told(self) -> list[str]:
        if not self.incidents:
            return []
        parts = [_tag("text", "told", x=8, y=self.told + 14, class_="soft")]
        for label, (_, until) in zip(self.incidents, self.bars, strict=True):
            if label.row is None:
                continue
            y, x = self.told + label.row * (ROW + 4), label.at
            bar = _tag("rect", x=x, y=y, width=max(2.0, self.x(until) - x), height=3, class_="told")
            way = -1 if label.flipped else 1
            at = {"x": x + 2 * way, "y": y + 13, "text_anchor": "end" if label.flipped else "start"}
            parts.append(_tag("g", _tag("title", label.title), bar, _tag("text", label.text, class_="halo", **at)))
        return parts

    def _legend(self) -> list[str]:
        y, x, parts = self.axis + 30, float(LEFT), []
        for words, shape in (
            ("progress", _tag("line", x1=0, x2=16, y1=-4, y2=-4, class_="work")),
            ("lost, computed again", _tag("line", x1=0, x2=16, y1=-4, y2=-4, class_="replay")),
            ("checkpoint", _tag("line", x1=8, x2=8, y1=-9, y2=1, class_="save")),
            ("held-out loss", _tag("circle", cx=8, cy=-4, r=2.5, class_="eval")),
            ("fault", _tag("path", d="M5 -9v10M5 -9l7 4l-7 4z", class_="fault")),
            ("starting", _hatch(0, -9, 16, 10)),
            ("nobody trains", _tag("rect", x=0, y=-9, width=16, height=10, class_="down frame")),
            ("incident, as the run told it", _tag("rect", x=0, y=-6, width=16, height=3, class_="told")),
        ):
            text = _tag("text", words, x=21, y=0, class_="soft")
            parts.append(_tag("g", shape, text, transform=f"translate({x:.1f} {y:.1f})"))
            x += 21 + len(words) * LETTER * 0.88 + 14
        return parts


def _span(timeline: Mapping[str, Any]) -> tuple[float, float]:
    """The first and the last second of anything that is known."""
    times = [fault["t"] for fault in timeline["faults"]]
    for attempt in timeline["attempts"]:
        times += [attempt["process_started"], attempt["ready"], attempt["ended"]]
    for name in ("steps", "saves", "evals"):
        times += [row[0] for row in timeline[name]]
    known = [0.0, *(t for t in times if t is not None)]
    return min(known), max(*known, min(known) + 0.1)


def _ticks(begin: float, end: float, about: int, least: float = 0.1) -> list[float]:
    """Round numbers from `begin` to `end`, some `about` of them, at least `least` apart."""
    rough = max(least, (end - begin) / about)
    size = 10.0 ** len(str(int(rough))) / 10 if rough >= 1 else 0.1
    every = next(size * times for times in (1, 2, 5, 10, 20) if size * times >= rough or times == 20)
    first = -(-begin // every)
    return [round((first + n) * every, 6) for n in range(int((end - first * every) / every) + 1)]


def _together(faults: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One that hits several ranks at once is one flag."""
    flags: list[dict[str, Any]] = []
    for fault in faults:
        same = ("index", "kind")
        last = next((f for f in reversed(flags) if all(f.get(key) == fault.get(key) for key in same)), None)
        if last is not None and fault["t"] - last["t"] < 1.0 and fault["victim"] not in last["victims"]:
            last["victims"].append(fault["victim"])
        else:
            flags.append({**fault, "victims": [fault["victim"]]})
    return flags


def _fault_words(fault: Mapping[str, Any]) -> str:
    ranks = sorted(victim for victim in fault["victims"] if victim is not None)
    return f"{fault['kind']} r{','.join(map(str, ranks))}" if ranks else str(fault["kind"])


def _fault_title(fault: Mapping[str, Any]) -> str:
    ranks = ", ".join(f"rank {victim}" for victim in fault["victims"] if victim is not None)
    where = f" at step {fault['step']}" if fault["step"] is not None else ""
    where += f", {fault['phase']}" if fault["phase"] else ""
    return f"{fault['kind']}{f' on {ranks}' if ranks else ''}{where}, after {fault['t']:.1f} s"


def _incident_words(incident: Mapping[str, Any]) -> str:
    # Of other kinds it is the rank that wrote it down.
    named = incident["rank"] is not None and incident["kind"] in ("worker_lost", "hung")
    rank = f" r{incident['rank']}" if named else ""
    seconds = f", {incident['seconds']:.1f} s" if (incident["seconds"] or 0.0) >= 0.05 else ""
    return f"{incident['kind'].replace('_', ' ')}{rank}{seconds}"


def _attempt_title(attempt: Mapping[str, Any]) -> str:
    def known(value: Any) -> Any:
        return "?" if value is None else value

    ready = "" if attempt["ready"] is None else f", ready after {attempt['ready'] - attempt['process_started']:.1f} s"
    steps = f"steps {known(attempt['from_step'])} to {known(attempt['to_step'])}"
    return f"attempt {attempt['attempt']}: {known(attempt['world_size'])} ranks, {steps}, {_fate(attempt)}{ready}"


def _attempt_words(attempt: Mapping[str, Any]) -> list[str]:
    """What may stand in an attempt's bar, the longest first."""
    number, size = attempt["attempt"], attempt["world_size"]
    ranks = f", {size} rank{'' if size == 1 else 's'}" if size is not None else ""
    return [f"{number}{ranks}, {_fate(attempt)}", f"{number} {_fate(attempt)}", f"{number}"]


def _fate(attempt: Mapping[str, Any]) -> str:
    return attempt["ended_as"] or "no end known"


def _hatch(x: float, y: float, width: float, height: float) -> str:
    """Diagonals in a frame. Drawn, not a <pattern>: its id would be the same in every picture of a page."""
    lines = []
    for start in range(0, int(width + height), 5):
        x1, y1 = (x + start, y) if start <= width else (x + width, y + start - width)
        x2, y2 = (x + start - height, y + height) if start >= height else (x, y + start)
        lines.append(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")
    return _tag("path", d=f"M{x:.1f} {y:.1f}h{width:.1f}v{height}h{-width:.1f}z" + "".join(lines), class_="hatch")


def _frame(width: int, height: float, about: str, parts: Iterable[str]) -> str:
    box = f"0 0 {width} {height:g}"
    shown = {"viewBox": box, "width": width, "height": height, "role": "img", "aria-label": about, "class_": "tl"}
    style = f"<style>{STYLE.strip()}</style>"
    return _tag("svg", style, *parts, xmlns="http://www.w3.org/2000/svg", **shown)


def _tag(name: str, *inner: str, **attributes: Any) -> str:
    """An element. What is inside is escaped where it is text, and left as it is where it is elements."""
    values = {key: f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in attributes.items()}
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in values.items())
    body = "".join(html.escape(part) for part in inner) if name in ("text", "title") else "".join(inner)
    return f"<{name}{shown}>{body}</{name}>" if body else f"<{name}{shown}/>"
