"""The course of one simulated run, as the timeline that real runs have (`trainer.log.timeline`), for the same picture.

Steps are fractions here: a job that computes for half of a step's time has done half a step.
"""

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.show import units

MOST_INCIDENTS = 1_000
"""Incidents after which a course ends: a run of ten million devices has hundreds of thousands."""
MOST_SAVES = 200
"""Saves that a timeline lists; of more it lists none, since marks would cover the line."""

Point = tuple[float, float]
"""(second, seconds of work done)."""


class Course:
    """Course of a simulated job over time, noted while it is simulated."""

    def __init__(self, horizon: float) -> None:
        self.until = horizon
        """The second until which it is noted."""
        self.saves: list[Point] = []
        self.save_count = 0
        self._horizon = horizon
        self._incidents = 0
        self._points: list[tuple[float, float, int]] = []  # (second, seconds of work, attempt)
        self._attempts: list[dict[str, Any]] = []  # those that have ended
        self._now: dict[str, Any] = {"process_started": 0.0, "ready": 0.0, "from_work": 0.0}

    @property
    def is_whole(self) -> bool:
        """True if it goes on to the end of the run."""
        return self.until == self._horizon

    def struck(self, time: float) -> None:
        """Note an incident; one too many ends the course."""
        self._incidents += 1
        if self._incidents > MOST_INCIDENTS:
            self.until = min(self.until, time)

    def computed(self, since: Point, until: Point) -> None:
        if since[0] >= self.until:
            return
        if until[0] > self.until:
            share = (self.until - since[0]) / (until[0] - since[0])
            until = (self.until, since[1] + share * (until[1] - since[1]))
        if self._now["ready"] is None:  # its restart took no time
            self.ready(*since)
        number = len(self._attempts)
        if not self._points or self._points[-1] != (*since, number):
            self._points.append((*since, number))
        self._points.append((*until, number))

    def saved(self, count: int, time: Point, work: Point) -> None:
        """Note saves. `time` and `work`: of the first one, and from one to the next."""
        if time[0] >= self.until:
            return
        self.save_count += count
        if self.save_count > MOST_SAVES:
            self.saves = []
        else:
            self.saves += [(time[0] + n * time[1], work[0] + n * work[1]) for n in range(count)]

    def ended(self, time: float, ended_as: str) -> None:
        """Note that all workers stop. Without a start there is no attempt to end."""
        if time < self.until and self._now["process_started"] is not None:
            self._attempts.append({**self._now, "ended": time, "ended_as": ended_as})
            self._now = {"process_started": None, "ready": None, "from_work": None}

    def starting(self, time: float) -> None:
        if self._now["process_started"] is None:
            self._now["process_started"] = time

    def ready(self, time: float, work: float) -> None:
        if time < self.until:  # beyond it no end is noted, so no start is either
            self.starting(time)
            self._now |= {"ready": time, "from_work": work}

    def timeline(self, step_seconds: float, incidents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the timeline, with the keys of `log.timeline.read_timeline` and `simulated`, `saves_unlisted`.

        `incidents` are those of the replicate. `saves_unlisted` is the number of saves, if they are too many to list.
        """
        end = self.until
        attempts = list(self._attempts)
        if self._now["process_started"] is not None and self._now["process_started"] < end:
            attempts.append({**self._now, "ended": end, "ended_as": "finished" if self.is_whole else None})

        def steps(work: float | None) -> float | None:
            return None if work is None else round(work / step_seconds, 2)

        points = [(t, steps(work), number) for t, work, number in self._points]
        reached = {number: done for _, done, number in points}
        told = [
            {"attempt": number, "process_started": a["process_started"], "ready": a["ready"], "ended": a["ended"],
             "from_step": steps(a["from_work"]),
             "to_step": reached.get(number, steps(a["from_work"])), "world_size": None,
             "ended_as": a["ended_as"]}
            for number, a in enumerate(attempts)
        ]  # fmt: skip
        return {
            "origin": 0.0, "simulated": True, "steps_budget": math.ceil(end / step_seconds), "attempts": told,
            "steps": [list(point) for point in points], "evals": [], "faults": [],
            "saves": [[t, steps(work)] for t, work in self.saves],
            "saves_unlisted": self.save_count if self.save_count > MOST_SAVES else 0,
            "incidents": _incidents([i for i in incidents if i["time"] < end], told, points, end),
        }  # fmt: skip


def _incidents(
    found: list[Mapping[str, Any]], attempts: list[dict[str, Any]], points: list[Any], end: float
) -> list[dict[str, Any]]:
    """Return incidents as a timeline has them. One that stops all lasts until they are ready or struck again."""
    ends = [attempt["ended"] for attempt in attempts]
    begins = [attempt["ready"] for attempt in attempts if attempt["ready"] is not None]
    struck = [incident["time"] for incident in found]
    times = [t for t, _, _ in points]
    told = []
    for incident in found:
        t, seconds = incident["time"], incident["seconds"]
        at = bisect.bisect_right(times, t) - 1
        step = points[at][1] if at >= 0 else 0.0
        number = min(bisect.bisect_left(ends, t), len(attempts) - 1)
        begun = attempts[number]["ready"]
        stops_all = begun is None or not begun <= t < ends[number]
        if stops_all:
            later = [values[bisect.bisect_right(values, t) :][:1] for values in (begins, struck)]
            seconds = min([*later[0], *later[1], end]) - t
        text = _text(incident, t, step, seconds if stops_all else None)
        told.append(
            {"t": t, "kind": incident["kind"], "cause": incident["detected_as"], "text": text,
             "lost_steps": incident["lost_steps"], "seconds": seconds, "attempt": number, "rank": None,
             "step": math.floor(step)}
        )  # fmt: skip
    return told


def _text(incident: Mapping[str, Any], t: float, step: float, stopped: float | None) -> str:
    """One line for people, as `log.incidents` writes it. `stopped`: seconds without training; None: others went on."""
    lost, cause = incident["lost_steps"], incident["detected_as"]
    what = {"preempted": "preempted (planned maintenance)", "corrupted": f"silent corruption ({cause}) was noticed"}
    when = f"day {t / 86_400:.2f}: {what.get(incident['kind'], f'failure ({cause})')} after step {math.floor(step):,}"
    again = f"{lost or 'no'} step{'' if lost == 1 else 's'} to replay"
    if stopped is not None:
        return f"{when}; resumed with {again}; {units.duration(stopped)} without training"
    return f"{when}; {units.duration(incident['seconds'])} until it was made good, {again}"
